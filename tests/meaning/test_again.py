"""Text run through the model again: contexts that start elsewhere, and longer ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from browser import Tags
from helpers import run_here, small_config, small_job, write_texts

import tcsae
from tcsae.base.run_files import RunFiles
from tcsae.base.signals import StopRequest, stop_on_signal
from tcsae.config.compose import config_of
from tcsae.config.sae import config_class
from tcsae.data.batches import ActivationBatches, Calibration
from tcsae.data.contexts import Contexts, SpecialIds, segments_of, valid_of
from tcsae.data.store import StreamSource
from tcsae.data.stream import open_held_out, open_model
from tcsae.meaning.__main__ import main
from tcsae.meaning.again import Run
from tcsae.meaning.held_text import Findings, HeldText
from tcsae.meaning.lengths import _long, lengths, of_block
from tcsae.meaning.shift import shift
from tcsae.metrics.position import position_dependence
from tcsae.metrics.units import Units
from tcsae.report.comparison import compare_runs
from tcsae.sae.registry import sae_class

T, D, F, VOCABULARY, N = 64, 16, 48, 50, 20


class Planted:
    """A model whose activation is the token's own vector, and so much of the position's."""

    device = "cpu"
    special_ids = SpecialIds(bos=0, boundaries=frozenset({0}), masked=frozenset({0}))

    def __init__(self, bound: float) -> None:
        draws = torch.Generator().manual_seed(0)
        self.cfg = SimpleNamespace(forward_contexts=8)
        self._token = torch.randn(VOCABULARY, D, generator=draws)
        self._position = bound * torch.randn(T, D, generator=draws)

    def activations(self, ids: torch.Tensor) -> torch.Tensor:
        return self._token[ids.long()] + self._position[: ids.shape[1]]


def an_sae() -> Any:
    cfg = config_class("topk")(architecture="topk", d_sae=F, k=6)
    return sae_class("topk")(cfg, D, torch.Generator().manual_seed(1)).eval()


def shifted(bound: float, n_contexts: int = N) -> Findings:
    draws = torch.Generator().manual_seed(2)
    ids = torch.randint(1, VOCABULARY, (n_contexts, T), generator=draws, dtype=torch.int32)
    ids[:, 0] = 0
    ids[::3, 30] = 0  # a second document
    model: Any = Planted(bound)
    special = model.special_ids
    contexts = Contexts(
        ids, segments_of(ids, special.boundaries), valid_of(ids, special.masked), ()
    )
    unlimited = Calibration(1.0, float("inf"), 0.0, torch.empty(0, D))
    batches = ActivationBatches(StreamSource(model, contexts), unlimited, "cpu")
    config: Any = SimpleNamespace(
        model=SimpleNamespace(forward_contexts=8), dataset=SimpleNamespace(context_size=T)
    )
    with stop_on_signal() as stop:
        return shift(an_sae(), HeldText(model, batches, stop), config)


def test_a_position_free_sae_on_position_free_activations_keeps_every_code() -> None:
    found = shifted(0.0)
    for name in ("jaccard", "cosine", "correlation", "input_cosine"):
        number = found.headline[f"shift_{name}"]
        assert number.value == pytest.approx(1, abs=1e-6), name
        assert number.interval == pytest.approx((1, 1), abs=1e-5)
    assert found.headline["shift_moved"].value is None
    by = found.details["by_shift"]
    assert list(by) == ["1", "8", "32"]
    assert by["32"]["features"]["q25_median_q75"] == pytest.approx([1, 1, 1])
    assert by["8"]["near_start"]["jaccard"] == pytest.approx(1)
    assert found.details["again"]["cosine"] == pytest.approx(1)


def test_what_hangs_on_the_position_is_seen_and_read_against_the_activations() -> None:
    weak, strong = shifted(0.3), shifted(1.5)
    for name in ("jaccard", "cosine", "correlation", "input_cosine"):
        values = [found.headline[f"shift_{name}"].value for found in (weak, strong)]
        assert 1 > values[0] > values[1] > 0, name
    # x = token + 0.3 position, two positions: cosine 1 / (1 + .09).
    assert weak.headline["shift_input_cosine"].value == pytest.approx(1 / 1.09, abs=0.03)
    low, high = weak.headline["shift_cosine"].interval
    assert low < weak.headline["shift_cosine"].value < high
    assert weak.headline["shift_moved"].value > 1
    # The same tokens at every shift; position 0 and the second document's BOS are left out.
    assert weak.details["n_tokens"] == N * (T - weak.details["first_position"])
    # Run again where they were, nothing moves.
    assert weak.details["again"] == pytest.approx(dict.fromkeys(weak.details["again"], 1.0))


def test_few_documents_have_no_interval_and_short_contexts_a_reason() -> None:
    few = shifted(0.3, n_contexts=8)
    assert few.headline["shift_jaccard"].interval == (None, None)
    assert any("later a token keeps" in sentence for sentence in few.said)


# -------------------------------------------------------------------------------- longer contexts


def test_a_block_of_positions_has_the_evaluations_own_numbers() -> None:
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(N, T, D, generator=draws) + torch.linspace(0, 2, T)[:, None]
    valid = torch.rand(N, T, generator=draws) > 0.05
    run = Run(x, torch.ones(N, T), valid)
    units, sae = Units(torch.arange(N) // 2), an_sae()
    found = of_block(sae, run, units, 8, 40)
    here = slice(8, 40)
    f, x_hat = sae.encode_and_decode(x[:, here])
    kept = valid[:, here]
    error = (x_hat - x[:, here])[kept].square().sum()
    about = (x[:, here][kept] - x[:, here][kept].mean(0)).square().sum()
    assert float(found["explained_variance"][0]) == pytest.approx(1 - error.item() / about.item())
    assert float(found["l0"][0]) == pytest.approx(float((f > 0).sum(-1)[kept].double().mean()))
    of = position_dependence(f.detach(), valid=kept, units=units)
    values = torch.where(kept[..., None], f.detach(), 0.0).double()
    energy = values.square().sum((0, 1)) / kept.sum() - (values.sum((0, 1)) / kept.sum()).square()
    weighted = float((of.omega_squared * energy).nansum() / energy.sum())
    assert float(found["omega_squared"][0]) == pytest.approx(weighted, abs=0.01)
    assert weighted > 0.05
    alone = Run(*(part[2:] for part in (run.x, run.segments, run.valid)))
    without = of_block(sae, alone, Units(torch.arange(2, N) // 2), 8, 40)
    # The mean over the block stays that of all contexts, as in the evaluation.
    assert float(found["l0"][1]) == pytest.approx(float(without["l0"][0]))
    assert float(found["omega_squared"][1]) == pytest.approx(float(without["omega_squared"][0]))


@pytest.fixture(scope="module")
def finished(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("again")
    texts = write_texts(root / "texts", documents=60)
    job = small_job(
        tiny_gpt2,
        texts,
        root / "run",
        dataset__n_eval_contexts="20",
        evaluation__windows="[2,4]",
        evaluation__meaning="[shift,lengths]",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCSAE_STORE", str(root / "store"))
        done = run_here(*job)
    assert done.code == 0, done.stderr
    return root / "run"


def test_a_run_is_measured_at_shifts_and_lengths(finished: Path) -> None:
    found = json.loads(RunFiles(finished).eval.meaning.read_text())
    told = found["shift"]["by_shift"]
    assert list(told) == ["1", "8"]
    again = found["shift"]["again"]
    assert again["input_cosine"] == pytest.approx(1, abs=1e-3)
    # A table of positions is added to every token, and the past is gone: nothing stays as it was.
    assert told["8"]["input_cosine"]["value"] < 0.99
    blocks = found["lengths"]["blocks"]
    assert [blocks[n]["positions"] for n in ("1x", "2x", "4x")] == [[8, 16], [16, 32], [32, 64]]
    ratio = found["lengths"]["headline"]["lengths_l0_4x"]["value"]
    values = [blocks[name]["l0"]["value"] for name in ("4x", "1x")]
    assert ratio == pytest.approx(values[0] / values[1], rel=1e-4)
    info = json.loads(RunFiles(finished).final_info.read_text())
    assert {"shift_cosine", "lengths_explained_variance_2x"} <= set(info["meaning"])
    assert any("In longer contexts" in sentence for sentence in found["lengths"]["said"])


def test_of_next_to_nothing_no_share_is_taken(finished: Path) -> None:
    run = tcsae.load_run(finished)
    _, batches = open_held_out(run.config, float("inf"), StopRequest())
    text = HeldText(open_model(run.config), batches, StopRequest())
    with torch.no_grad():
        run.sae.W_dec.zero_()  # it explains nothing; its features fire as before
    found = lengths(run.sae, text, run.config)
    assert found.headline["lengths_explained_variance_2x"].value is None
    assert found.headline["lengths_l0_2x"].value is not None
    (said,) = [sentence for sentence in found.said if "too little to take shares" in sentence]
    assert "explained variance is" in said


def test_page_notes_and_comparison_show_them_beside_omega(finished: Path, tmp_path: Path) -> None:
    files = RunFiles(finished)
    page = files.report.read_text(encoding="utf-8")
    notes = " ".join(files.notes.read_text(encoding="utf-8").split())
    for text in (Tags(page).text, notes):
        assert "What the features mean" in text and "later a token keeps" in text
        assert "Shift: cosine of activations" in text and "Length 4 x: L0" in text
    found = json.loads(files.eval.meaning.read_text())["shift"]["headline"]["shift_cosine"]
    comparison = compare_runs([finished])
    entry = comparison.groups[0]["metrics"]["shift_cosine"]
    assert entry["value"] == found["value"]
    assert [entry["low"], entry["high"]] == pytest.approx(found["interval"])
    wanted = {"omega_squared", "shift_cosine", "lengths_explained_variance_4x"}
    assert wanted <= set(comparison.headline)
    assert "shift_cosine_low" in comparison.csv().splitlines()[0]
    # A copy with another seed in its config: the replicates give the difference an interval.
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"lambda": 0.0}))
    pair = compare_runs([finished, other])
    delta = next(g["deltas"] for g in pair.groups if g["deltas"])["shift_cosine"]
    assert delta["value"] == 0 and delta["low"] == pytest.approx(0) == delta["high"]


def test_contexts_are_no_longer_than_the_models_positions(tiny_gpt2: Path, texts: Path) -> None:
    for size, said in (("128", "has 128 positions, no more than"), ("100", "has 128 positions")):
        config = small_config(tiny_gpt2, texts, dataset__context_size=size)
        text: Any = SimpleNamespace(model=open_model(config))
        assert said in str(_long(text, config))


def test_a_synthetic_world_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(Exception, match="is a synthetic world: leave it out, or choose"):
        config_of("model=synthetic", "evaluation.meaning=[shift]")
    config_of("model=synthetic", "evaluation.meaning=[probes]")


def test_the_command_line_takes_both(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(RunFiles(finished).eval.meaning.read_text())
    main([str(finished), "--instruments", "shift,lengths", "--json"])
    printed = json.loads(capsys.readouterr().out)[str(finished)]
    assert printed == before
