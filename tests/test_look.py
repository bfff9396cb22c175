"""Text in, features out: from Python and by `python -m tcsae.look`, on one trained tiny run."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import EVIL, Shown, Tags, show
from chrome import Page, chrome
from helpers import run_here, small_job, write_texts

import tcsae
from tcsae.base.errors import UserError
from tcsae.base.files import load_tensors, read_json, save_tensors, write_json
from tcsae.base.signals import StopRequest
from tcsae.data.stream import Stream, open_stream
from tcsae.jobs.opening import OpenedSAE
from tcsae.look import main
from tcsae.measure.strips import longest_run
from tcsae.report.changed import changed_blocks
from tcsae.report.compare_files import write_comparison
from tcsae.report.look_page import counterpart
from tcsae.report.passage import DENSE, Passage
from tcsae.report.rows import spans
from tcsae.report.run_page import write_run_page
from tcsae.runs.folder import LoadedRun
from tcsae.training.member import Member

TEXT = "the river walked quietly under the old bridge, 日本 <s> & <b>"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in which one character in six takes more than one token."""
    folder = write_texts(tmp_path_factory.mktemp("written"))
    for i, file in enumerate(sorted(folder.iterdir())):
        words = file.read_text().split()
        for at in range(i, len(words), 7):
            words[at] += " 日本" if at % 2 else " é"
        file.write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def sweep(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs with their analysis: no loss, the control, the loss."""
    root = tmp_path_factory.mktemp("look")
    arms: dict[str, dict[str, str]] = {
        "none": {"lambda": "0"},
        "control": {"lambda": "0.5", "consistency": "shuffled"},
        "loss": {"lambda": "0.5"},
    }
    for name, changes in arms.items():
        changes |= {"store.dir": str(root / "store"), "evaluation.analysis": "true"}
        # With 400 tokens of random weights none is massive: a limit near the median makes some.
        changes |= {"dataset.norm_filter": "1.02", "dataset.n_eval_contexts": "12"}
        job = small_job(tiny_gpt2, texts, root / "runs" / name, **changes)
        assert (done := run_here(*job)).code == 0, done.stderr
    return root / "runs"


@pytest.fixture(scope="module")
def run(sweep: Path) -> LoadedRun:
    return tcsae.load_run(sweep / "loss")


@pytest.fixture(scope="module")
def stream(run: LoadedRun) -> Stream:
    return open_stream(run.config, StopRequest())


def test_values_and_masks_are_those_of_the_evaluation(run: LoadedRun, stream: Stream) -> None:
    batch = stream.evaluation.batch(torch.arange(12))
    with torch.inference_mode():
        wanted = run.sae.encode(batch.x.float(), segments=batch.segments, valid=batch.valid)
    massive = batch.not_special & ~batch.valid
    assert massive.any() and wanted.any()
    for i in range(12):
        found = run.features(batch.ids[i])
        # A batch of another size multiplies in another order: float32 rounding, no more.
        torch.testing.assert_close(found.values, wanted[i], rtol=1e-5, atol=1e-5)
        assert torch.equal(found.valid, batch.valid[i])
        assert torch.equal(found.massive, massive[i])


def test_text_is_tokenised_as_documents_are(run: LoadedRun, texts: Path, stream: Stream) -> None:
    """Whole documents are found in what was trained on, token by token."""
    trained = _without_bos(stream.train.source.contexts.ids)
    rows = [_without_bos(run.features(f.read_text(), parted=True).ids) for f in texts.iterdir()]
    found = [row for row in rows if row in trained]
    assert len(found) >= 2 and all(len(row) > 500 for row in found)


def _without_bos(ids: torch.Tensor) -> str:
    return " ".join(f"{i:03d}" for i in ids.flatten().tolist() if i != 0)


def test_whole_characters_show_and_text_spells_no_special_token(run: LoadedRun) -> None:
    found = run.features(TEXT, parted=True)
    assert found.text.replace("<s>", "", 1).replace("<s>", "", len(found.contexts.unique()) - 1)
    inside = "".join(p.text for p in found.pieces)
    assert "日本" in inside or len(found.contexts.unique()) > 1
    short = run.features("an 日本 é")
    assert short.text == "<s>an 日本 é"
    assert "\\xe6" in "".join(short.tokens) and "\ufffd" not in "".join(short.tokens)
    assert run.features("<s> a").ids.tolist().count(0) == 1  # the BOS before it, and no other


def test_a_long_text_is_refused_or_read_as_training_text_is(run: LoadedRun) -> None:
    words = " ".join(["river stone morning walked"] * 12)
    with pytest.raises(UserError, match=r"tokens with its BOS, and a context of this run 16"):
        run.features(words)
    found = run.features(words, parted=True)
    n_contexts = len(found.contexts.unique())
    assert n_contexts > 2 and (found.ids == 0).sum() == n_contexts
    assert found.values.shape == (len(found), 96) and not found.valid[found.ids == 0].any()
    # Each part is read by itself.
    second = found.ids[found.contexts == 1]
    alone = run.features(second)
    torch.testing.assert_close(
        found.values[found.contexts == 1], alone.values, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ([0], "no token ids"),
        ([3, 4000], "beyond the"),
        ([-1], "0 or"),
        (None, "a NoneType that is neither a text nor a list of token ids"),
        (["a", "b"], "a list that is neither"),
        ([3.5], "neither"),
        (b"", "no token ids"),
        ("a \ud800", "half a character"),
    ],
)
def test_what_cannot_be_read_is_refused(run: LoadedRun, text: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run.features(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 2, 15, 16, 29, 30, 31])
def test_a_text_of_any_length_has_all_its_tokens_once(run: LoadedRun, n: int) -> None:
    """Around one and two contexts of 16, BOS included."""
    ids = [5 + i % 7 for i in range(n)]
    found = run.features(ids, parted=True)
    assert [i for i in found.ids.tolist() if i != 0] == ids
    assert len(found.values) == len(found) == n + len(found.contexts.unique())
    strip = found.strip(found.top(1)[0].feature if found.top(1) else 3)
    assert len(strip) == len(found) and 1 <= len(strip.part(len(found) - 1, 99)) <= 3
    beyond = strip.part(len(found) + 5, len(found) + 9)
    assert len(beyond) == 0 and "does not fire here" in repr(beyond) and beyond.html()


def test_top_is_over_tokens_that_count(run: LoadedRun) -> None:
    found = run.features("river stone morning walked")
    values = torch.where(found.valid[:, None], found.values, 0)
    best = found.top(3)
    assert [f.feature for f in best] == values.sum(0).argsort(descending=True)[:3].tolist()
    assert found.top(1, by="peak")[0].peak == pytest.approx(float(values.max()))
    runs = [longest_run(values[found.valid, j] > 0) for j in range(96)]
    assert found.top(1, by="longest")[0].longest == max(runs) > 0
    assert found.top(0) == [] and len(found.top(10_000)) == len(found.top(96))
    with pytest.raises(UserError, match="top -1"):
        found.top(-1)
    with pytest.raises(UserError, match="sum, peak, longest"):
        found.top(by="size")  # type: ignore[arg-type]


def test_a_strip_marks_where_the_feature_fires(run: LoadedRun) -> None:
    found = run.features("a <b> 日 walked & stone")
    strip = found.strip(found.top(1)[0].feature)
    assert torch.equal(strip.values, found.values[:, strip.feature])
    marks = strip.marks()
    assert "".join(mark.text for mark in marks).replace("·", " ") == found.text
    assert max(mark.level for mark in marks) == 1.0 and marks[0].masked
    html = strip._repr_html_()
    assert "&lt;" in html and "<b" not in html and "&amp;" in html and "日" in html
    assert "█" in repr(strip) and repr(strip).startswith(f"feature {strip.feature}: on at")
    for number in (96, -1, 3.5, "3", None, True):
        with pytest.raises(UserError, match=f"feature {number}: this SAE has 0 to 95"):
            found.strip(number)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"feature {number}: this SAE has 0 to 95"):
            run.feature(number)  # type: ignore[arg-type]
    assert found._repr_html_().count('class="tcsae"') == len(found.top(8))


def test_a_run_prints_six_lines(run: LoadedRun) -> None:
    lines = repr(run).splitlines()
    assert len(lines) == 6 and max(map(len, lines)) < 250
    assert "C_4" in repr(run) and "explained_variance" in repr(run) and "lambda 0.5" in repr(run)


def test_the_table_has_every_scalar(run: LoadedRun) -> None:
    table = run.table()
    assert len(table) == 96 and table.index.name == "feature"
    density = torch.tensor(table["density"].to_numpy())
    torch.testing.assert_close(density, run.per_feature["density"])
    assert {"C_4", "rho_1", "tokens", "cluster"} <= set(table.columns)


def test_a_feature_has_its_contexts(run: LoadedRun) -> None:
    strongest = int(run.per_feature["c0"].nan_to_num().argmax())
    feature = run.feature(strongest)
    assert feature.values["density"] == pytest.approx(float(run.per_feature["density"][strongest]))
    assert feature.contexts and feature.contexts[0].largest >= feature.contexts[-1].largest > 0
    assert feature.tokens and repr(feature.tokens[0]) in repr(feature)
    with pytest.raises(UserError, match="0 to 95"):
        run.feature(-1)


def test_contexts_show_whole_characters_and_tokens_their_bytes(
    run: LoadedRun, in_browser: Shown | None
) -> None:
    features = [run.feature(j) for j in range(96)]
    strips = [strip for feature in features for strip in feature.contexts]
    joined = [piece for s in strips for piece in s.pieces if piece.stop - piece.start > 1]
    assert {piece.text.strip() for piece in joined} <= {"日", "本", "é", "日本"} and joined
    assert not any("\ufffd" in text for strip in strips for text in strip.tokens)
    # A part is shown as its bytes only where the rest of the character is outside the context.
    bare = [p for s in strips for p in s.pieces if p.text.startswith("\\x")]
    assert all(p.start < 4 or p.stop > 13 for p in bare)
    if in_browser is not None:
        text = in_browser.tags.text
        assert in_browser.messages == [] and "日" in text and "\ufffd" not in text


@pytest.fixture(scope="module")
def in_browser(run: LoadedRun, passage: Passage) -> Shown | None:
    """The run's page with a feature opened whose contexts have whole characters of many tokens."""
    features = (run.feature(j) for j in range(96) if passage.strip(j).n_on)
    strongest = ((f.number, f.contexts[0].pieces) for f in features if f.contexts)
    opened = next(j for j, pieces in strongest if any("日" in piece.text for piece in pieces))
    return show(run.folder / "report.html", f"#feature-{opened}")


# ------------------------------------------------------------------- along one document


@pytest.fixture(scope="module")
def passage(run: LoadedRun) -> Passage:
    found = Passage.of(run.analysis)
    assert found is not None
    return found


def test_the_document_is_held_out_text_as_the_sae_has_it(
    run: LoadedRun, passage: Passage, stream: Stream, texts: Path
) -> None:
    ids = stream.evaluation.source.contexts.passage
    assert len(ids) == passage.n_contexts > 2 and len(passage) == ids.numel()
    text = stream.model.tokenizer.decode([i for i in ids.flatten().tolist() if i != 0])
    assert any(text in file.read_text() for file in texts.iterdir())
    trained = _without_bos(stream.train.source.contexts.ids)
    assert _without_bos(ids)[:200] not in trained
    found = run.features([i for i in ids.flatten().tolist() if i != 0], parted=True)
    assert torch.equal(found.ids, ids.flatten().long())
    for j in (f.feature for f in found.top(5)):
        strip = passage.strip(j)
        assert torch.equal(strip.valid, found.valid)
        torch.testing.assert_close(
            strip.values[strip.valid], found.values[found.valid, j], rtol=2e-3, atol=1e-4
        )


def test_the_longest_lived_are_those_with_the_longest_runs(passage: Passage) -> None:
    longest = {j: passage.strip(j).longest for j in range(96)}
    assert {run.feature: run.length for run in passage.runs} == {
        j: n for j, n in longest.items() if n
    }
    for run in passage.runs:
        on = passage.strip(run.feature).values[run.start :][passage.strip(0).valid[run.start :]] > 0
        assert on[: run.length].all() and not on[run.length : run.length + 1].any()
    chosen = passage.longest_lived(5)
    counts = {j: passage.strip(j).n_on for j in range(96)}
    most = DENSE * int(passage.strip(0).valid.sum())
    rest = [
        n for j, n in longest.items() if counts[j] <= most and j not in {r.feature for r in chosen}
    ]
    assert 0 < len(chosen) <= 5 and min(run.length for run in chosen) >= max(rest)
    assert [run.start for run in chosen] == sorted(run.start for run in chosen)


def test_the_run_page_has_a_raster_with_the_text_below(
    run: LoadedRun, passage: Passage, in_browser: Shown | None
) -> None:
    page = run.folder / "report.html"
    rows = [one.feature for one in passage.longest_lived()]
    tags = Tags(page.read_text(encoding="utf-8"))
    assert [a["data-row"] for a in tags.named("div") if "data-row" in a] == [str(j) for j in rows]
    if in_browser is not None:
        shown = "".join(in_browser.tags.text.split())
        words = "".join("".join(piece.text for piece in passage.pieces[20:40]).split())
        assert f"markedwherefeature{rows[0]}ison" in shown
        assert shown.count(words) == 2  # below the raster, and in the feature's dialog


def test_a_run_without_a_document_says_so(run: LoadedRun, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "analysis" / "document.safetensors").unlink()
    page = write_run_page(tcsae.load_run(tmp_path / "run"), tmp_path / "page.html")
    assert (
        "The document: not there: the analysis is of an older version"
        in Tags(page.read_text()).text
    )


def test_contexts_that_an_older_version_packed_have_no_document(
    run: LoadedRun, tmp_path: Path
) -> None:
    shutil.copytree(run.config.store.dir, tmp_path / "store")
    (file,) = (tmp_path / "store" / "contexts").glob("*/eval.safetensors")
    tensors, metadata = load_tensors(file, "")
    kept = {name: value.clone() for name, value in tensors.items() if name != "passage"}
    save_tensors(file, kept, metadata)
    store = run.config.store.model_copy(update={"dir": str(tmp_path / "store")})
    older = open_stream(run.config.model_copy(update={"store": store}), StopRequest())
    assert older.passage is None and len(older.evaluation) == 12


def test_the_features_that_the_loss_changed_most(sweep: Path, tmp_path: Path) -> None:
    content = tcsae.compare(sweep).to_json()
    (block,) = changed_blocks(content["groups"], content)
    assert block.reason == "" and 0 < len(block.features) <= 6
    window = content["headline_window"]
    none, loss = tcsae.load_run(sweep / "none"), tcsae.load_run(sweep / "loss")
    parts = []
    for one in (none, loss):
        energy = one.per_feature["c0"].nan_to_num()
        C = one.per_feature[f"C_{window}"]
        parts.append(energy * C.isfinite() / (energy * C.isfinite()).sum() * C.nan_to_num())
    unit = [torch.nn.functional.normalize(one.sae.W_dec.detach(), dim=1) for one in (none, loss)]
    nearest = (unit[1] @ unit[0].T).argmax(1)
    gain = parts[1] - parts[0][nearest]
    on = [
        tcsae.load_run(sweep / "loss").analysis.document["feature"].eq(j).sum() for j in range(96)
    ]
    shown = [one.feature for one in block.features]
    wanted = [j for j in gain.argsort(descending=True).tolist() if on[j] >= 3 and gain[j] > 0]
    assert shown == wanted[: len(shown)]
    for one in block.features:
        assert [side.name for side in one.sides] == ["baseline", "loss", "control"]
        assert f"feature {int(nearest[one.feature])}," in one.sides[0].words
        # All three over the same text.
        assert len({"".join(p.text for p in side.excerpt.pieces) for side in one.sides}) == 1
    page = write_comparison(tcsae.compare(sweep), tmp_path)
    tags = Tags(page.read_text(encoding="utf-8"))
    assert len([a for a in tags.named("details") if a.get("class") == "changed"]) == len(shown)
    seen = show(page)
    assert seen is None or seen.messages == []


@pytest.fixture(scope="module")
def phone() -> Iterator[Page]:
    with chrome() as found:
        if found is None:
            pytest.skip("NOT TESTED: the pages under a finger (no Chromium on PATH)")
        found.size(390, 800)
        found.touch()
        yield found


@pytest.mark.parametrize("kind", ["run", "comparison", "look"])
def test_a_finger_learns_what_a_pointer_does(
    kind: str, phone: Page, sweep: Path, looked: tuple[Path, str], tmp_path: Path
) -> None:
    if kind == "comparison":
        page = write_comparison(tcsae.compare(sweep), tmp_path)
    else:
        page = sweep / "loss" / "report.html" if kind == "run" else page_in(looked[1])
    phone.open(f"file://{page}")
    phone.wait("document.body.dataset.drawn === 'all'")
    told = "document.querySelector('.told')"
    for token, words in (("mark[title]", "title"), (".cells", "ariaLabel")):
        phone.tap(token)
        phone.wait(f"{told}?.textContent === document.querySelector('{token}').{words}")
        box = phone.run(f"(b => [b.left, b.right, b.top])({told}.getBoundingClientRect())")
        assert box[0] >= 0 and box[1] <= 390 and box[2] >= 0
        phone.tap("h1")
        phone.wait(f"!{told}")
    for place in (".cells", ".plot")[: 1 if kind == "look" else 2]:
        phone.run(f"document.querySelector('{place}').scrollIntoView({{block: 'center'}})")
        before = phone.run("scrollY")
        phone.swipe(place, up=250)
        phone.wait(f"scrollY > {before} + 150")
        assert not phone.run(f"{told} || getSelection().toString()")
    if kind == "run":
        phone.tap("#features-body td")
        phone.wait("document.querySelector('dialog[open] mark[title]')")
        phone.tap("dialog mark[title]")
        phone.wait(f"{told}?.parentElement.id === 'feature'")
        assert phone.beyond() == []
        phone.tap("#feature-close")
        phone.wait(f"!{told}")
    assert phone.beyond() == [] and phone.run("document.documentElement.scrollWidth") == 390
    assert phone.messages == []


def test_runs_of_which_no_document_is_known_are_told_so(sweep: Path, tmp_path: Path) -> None:
    for name in ("none", "loss"):
        shutil.copytree(sweep / name, tmp_path / name)
    shutil.rmtree(tmp_path / "none" / "analysis")
    content = tcsae.compare(tmp_path).to_json()
    (block,) = changed_blocks(content["groups"], content)
    assert block.features == [] and "none is not there: this run has no analysis" in block.reason
    assert "its shuffled control is not among the runs" in block.words


# ----------------------------------------------------------------------- what is opened


def test_the_latest_of_a_folder_or_one_by_its_settings(sweep: Path) -> None:
    latest = tcsae.open(sweep)
    assert latest.folder == sweep / "loss"
    assert tcsae.open(sweep, lambda_=0).folder == sweep / "none"
    assert tcsae.open(sweep, sae__k=8, lambda_=0.5).folder == sweep / "loss"
    with pytest.raises(UserError, match="none of the 3 finished runs .* has lambda=7"):
        tcsae.open(sweep, lambda_=7)
    with pytest.raises(UserError, match="sae.kk: no run"):
        tcsae.open(sweep, sae__kk=7)
    with pytest.raises(UserError, match="does not have seed=3"):
        tcsae.open(sweep / "loss", seed=3)


def test_what_is_no_run_is_said(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        tcsae.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no runs"):
        tcsae.open(tmp_path)
    shutil.copytree(sweep / "none", tmp_path / "copy")
    (tmp_path / "copy" / "final_info.json").unlink()
    for folder in (tmp_path, tmp_path / "copy"):
        with pytest.raises(UserError, match="copy has not finished: it was stopped; to go on: "):
            tcsae.open(folder)
    with pytest.raises(UserError, match="there is no folder .*nothing"):
        tcsae.load_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a run folder .*; there are runs below it, such as .*"):
        tcsae.load_run(sweep)
    shutil.copytree(sweep / "loss", tmp_path / "other")
    (tmp_path / "other" / "final_info.json").unlink()
    with pytest.raises(UserError, match="has 2 unfinished runs: python -m tcsae.status"):
        tcsae.open(tmp_path)


def test_a_stopped_run_says_the_command_that_goes_on(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Member.train_step

    def dies(self: Member, *args: Any) -> Any:
        if self.step == 7:
            raise KeyboardInterrupt
        return original(self, *args)

    folder = tmp_path / "a run, 1"
    how = {"training.checkpoint_every": "4", "store.dir": str(tmp_path / "store")}
    arguments = small_job(tiny_gpt2, texts, folder, **how)
    with monkeypatch.context() as patch:
        patch.setattr(Member, "train_step", dies)
        assert run_here(*arguments).code == 130
    with pytest.raises(UserError) as refused:
        tcsae.load_run(folder)
    said, _, command = str(refused.value).partition("; to go on: ")
    assert said == f"the run in {folder} has not finished: it was stopped, saved at step 4 of 12"
    done = run_here(*shlex.split(command)[3:])
    assert done.code == 0 and "step 4" in done.stdout, done.stdout
    assert tcsae.load_run(folder).final_info["training_steps"] == 12


def test_other_weights_than_the_run_was_made_with_are_refused(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "none", tmp_path / "copy")
    content = tmp_path / "copy" / "content.json"
    write_json(content, read_json(content) | {"weights": "others"})
    with pytest.raises(UserError, match="other weights"):
        tcsae.open(tmp_path / "copy").features("a word")


def test_a_folder_of_saelens_is_read_with_the_model_it_names(run: LoadedRun) -> None:
    opened = tcsae.open(run.folder / "sae")
    assert isinstance(opened, OpenedSAE) and "not measured" in repr(opened)
    found, wanted = opened.features("river stone"), run.features("river stone")
    assert torch.equal(found.values, wanted.values) and torch.equal(found.valid, wanted.valid)


def test_a_folder_with_a_config_of_its_own_is_no_run(run: LoadedRun, tmp_path: Path) -> None:
    """dictionary_learning's folders have a config.json, as runs do."""
    config = {"trainer": {"dict_class": "AutoEncoder", "lm_name": str(run.config.model.path)}}
    write_json(tmp_path / "config.json", config | {"buffer": {"ctx_len": 64}})
    state = {"encoder.weight": torch.randn(20, 48), "encoder.bias": torch.zeros(20)}
    state |= {"decoder.weight": torch.randn(48, 20), "bias": torch.zeros(48)}
    torch.save(state, tmp_path / "ae.pt")
    where = {"layer": 1, "model": "other", "model__path": str(run.config.model.path)}
    del where["model"]  # the folder alone says which model it is
    opened = tcsae.open(tmp_path, **where)
    assert opened.features("river stone").values.shape[1] == 20


def test_two_runs_are_compared(sweep: Path, run: LoadedRun) -> None:
    comparison = tcsae.compare(run, sweep / "none")
    assert len(comparison.table()) == 2
    assert repr(comparison) == comparison.markdown() and "lambda" in repr(comparison)


# --------------------------------------------------------------------------- tcsae.look


@pytest.fixture(scope="module")
def looked(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A page of two runs, and what the terminal said."""
    text = tmp_path_factory.mktemp("text") / "evil.txt"
    text.write_text(f"a 日 {EVIL} é")
    return text, look_here(sweep / "loss", text, "--baseline", sweep / "none", "--parts")


def look_here(*arguments: object) -> str:
    """What `python -m tcsae.look` prints; a refusal as its one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            assert stop.code == 2
            return err.getvalue()
    return out.getvalue()


def page_in(said: str) -> Path:
    return Path(said.splitlines()[-1].removeprefix("page: "))


def test_the_page_has_strips_of_both_runs(looked: tuple[Path, str], run: LoadedRun) -> None:
    file, said = looked
    page = page_in(said)
    assert page.parent == run.folder / "look" and page.stat().st_size < 400_000
    tags = Tags(page.read_text(encoding="utf-8"))
    best = [f.feature for f in run.features(file.read_text(), parted=True).top(12)]
    panels = [a["id"] for a in tags.named("div") if (a.get("class") or "") == "strip-panel"]
    assert panels == [f"strip-{j}" for j in best]
    assert [line.split()[0] for line in said.splitlines()[2:-1]] == [str(j) for j in best]
    assert tags.text.count("decoder cosine") == len(best) and "日" in tags.text


def test_a_text_cannot_break_out_of_the_page(looked: tuple[Path, str]) -> None:
    page = page_in(looked[1])
    html = page.read_text(encoding="utf-8")
    tags = Tags(html)
    assert not tags.named("img") and not tags.named("b")
    assert EVIL not in html and "plotly.js v" not in html
    for _, attributes in tags.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    shown = show(page)
    if shown is not None:
        assert shown.messages == [] and 'data-drawn="all"' in shown.html


def test_chosen_features_and_where_the_page_goes(sweep: Path, tmp_path: Path) -> None:
    said = look_here(
        sweep, "river stone", "--features", "3,17,3", "--output", tmp_path / "a" / "b.html"
    )
    assert page_in(said) == tmp_path / "a" / "b.html"
    tags = Tags(page_in(said).read_text(encoding="utf-8"))
    titles = [text.strip() for text in tags.texts if text.strip().startswith("feature ")]
    assert {"feature 3", "feature 17"} <= set(titles) and len(said.splitlines()) == 5


def test_a_counterpart_is_the_nearest_direction() -> None:
    of = torch.eye(3)
    assert counterpart(1, of, of * 5) == (1, 1.0)
    assert counterpart(0, of, torch.tensor([[0.0, 1, 0], [2.0, 0, 0]])) == (1, 1.0)
    # Two alike: the one of the same number.
    assert counterpart(1, of, torch.tensor([[0.0, 3, 0], [0.0, 1, 0]]))[0] == 1


def test_cells_are_spans_of_tokens() -> None:
    assert spans([True, True, False, True]) == [(0, 2), (3, 4)] and spans([]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{run}", " "), "the text is empty"),
        (("{run}", "word " * 40), "a context of this run 16"),
        (("{run}", "a", "--features", "96"), "feature 96: this SAE has 0 to 95"),
        (("{empty}", "a"), "has no runs"),
        (("{empty}/nothing", "a"), "is not a folder"),
        (("{run}/eval", "a"), "has no runs"),
        (("{run}", "{run}/sae/sae_weights.safetensors"), "is not UTF-8 text"),
        (("{run}", "a", "--baseline", "{empty}"), "has no runs"),
        (("{run}", "a", "--features", "x"), "numbers with commas"),
        (("{run}", "a", "--top", "0"), "1 or more"),
    ],
)
def test_bad_input_is_one_line(
    run: LoadedRun, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    filled = [
        a.replace("{run}", str(run.folder)).replace("{empty}", str(tmp_path)) for a in arguments
    ]
    line = look_here(*filled)
    assert said in line and "Traceback" not in line
    assert line.splitlines()[-1].startswith(("tcsae: ", "python -m tcsae.look: error"))


def test_stdin_is_read(run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"river stone"), "utf-8"))
    assert look_here(run.folder, "-", "--output", tmp_path / "p.html").endswith("p.html\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), "utf-8"))
    assert look_here(run.folder, "-") == "tcsae: stdin is empty: give some words\n"
