"""`python -m tcsae.evaluate`: an SAE from anywhere gets the numbers that a run would give it."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import count_calls, digest, environment, leftovers, run_here, small_job
from safetensors.torch import load_file, save_file

import tcsae
from tcsae.base.errors import Interrupted, UserError
from tcsae.base.files import read_json
from tcsae.base.signals import StopRequest, stop_on_signal
from tcsae.compare import main as compare
from tcsae.config import LoadedConfig, parse_any, run_id
from tcsae.config.sae import config_class
from tcsae.evaluate import main
from tcsae.jobs.export import export_run
from tcsae.jobs.foreign import Facts, ForeignSAE, composed, from_folder, from_release
from tcsae.jobs.measure_foreign import evaluate_sae
from tcsae.sae.formats.saelens import CFG_NAME, WEIGHTS_NAME, save_saelens
from tcsae.sae.registry import sae_class

D_IN, D_SAE = 48, 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def trained(root: Path, tiny_gpt2: Path, texts: Path) -> Path:
    """A finished run, only to be looked at."""
    # A filter of norms that some tokens do not pass: it is set by the training contexts.
    places = {"store__dir": str(root / "store"), "layer": "1", "dataset__norm_filter": "1.05"}
    job = small_job(tiny_gpt2, texts, root / "run", **places, evaluation__analysis="true")
    outcome = run_here(*job)
    assert outcome.code == 0, outcome.stderr
    return root / "run"


@pytest.fixture(scope="module")
def exported(trained: Path, root: Path) -> Path:
    return export_run(trained, root / "export")


@pytest.fixture(scope="module")
def where(root: Path, tiny_gpt2: Path, texts: Path) -> list[str]:
    """The places of this machine, which an export does not tell."""
    return [f"model.path={tiny_gpt2}", f"dataset.path={texts}", f"store.dir={root / 'store'}"]


@pytest.fixture(scope="module")
def loaded(exported: Path, where: list[str], root: Path) -> Path:
    """The export, measured; only to be looked at."""
    main([str(exported), *where, "--output", str(root / "loaded")])
    return root / "loaded"


@pytest.fixture(scope="module")
def on_the_text(trained: Path, where: list[str]) -> list[str]:
    """All that a folder that says nothing of itself must be told."""
    kept = [a for a in small_job(Path("m"), Path("t"), "r") if a.startswith(("eval", "dataset."))]
    kept = [a for a in kept if not a.startswith("dataset.path")]
    fixed = ["model=other", "model.name=test/tiny", "model.dtype=float32", "layer=1"]
    return [*fixed, "dataset=files", *kept, *where]


def plain(folder: Path, name: str = "standard", **metadata: Any) -> Path:
    """A SAELens folder of which nothing is known but `metadata`."""
    cfg = config_class(name)(architecture=name, d_sae=D_SAE)
    sae = sae_class(name)(cfg, D_IN, torch.Generator().manual_seed(3))
    save_saelens(folder, sae, metadata)
    edit_cfg(folder, metadata=metadata)
    return folder


def edit_cfg(folder: Path, **changes: Any) -> None:
    cfg = json.loads((folder / CFG_NAME).read_text())
    (folder / CFG_NAME).write_text(json.dumps(cfg | changes))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    """The one line, beside the log, that a refused call leaves."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    lines = [line for line in captured.err.splitlines() if " INFO " not in line]
    assert len(lines) == 1 and lines[0].startswith("tcsae: "), captured.err
    return lines[0]


# ---------------------------------------------------------------- the same numbers as a run


def test_an_export_gets_the_very_numbers_of_its_run(trained: Path, loaded: Path) -> None:
    mine, theirs = (read_json(run / "eval" / "core.json") for run in (trained, loaded))
    assert mine["eval_result_metrics"] == theirs["eval_result_metrics"]
    assert mine["eval_result_details"] == theirs["eval_result_details"]
    assert mine["eval_result_unstructured"] == theirs["eval_result_unstructured"]
    mine, theirs = (read_json(run / "eval" / "consistency.json") for run in (trained, loaded))
    assert mine == theirs and 60 < mine["summary"]["n_valid_tokens"] < 115
    mine, theirs = (read_json(run / "final_info.json") for run in (trained, loaded))
    assert 0.01 < mine["massive_token_share"] == theirs["massive_token_share"]
    for name in ("redundancy", "specialization", "top_contexts"):
        file = Path("analysis") / f"{name}.json"
        assert read_json(trained / file) == read_json(loaded / file)
    weights = Path("sae") / WEIGHTS_NAME
    assert digest(trained / weights) == digest(loaded / weights)


def test_the_folder_is_a_runs_and_does_not_pretend_to_have_trained(
    loaded: Path, exported: Path, trained: Path
) -> None:
    run = tcsae.load_run(loaded)
    assert isinstance(run.config, LoadedConfig) and run.metrics == []
    assert run.final_info["training_steps"] is None
    assert run.final_info["source"] == {
        "folder": str(exported),
        "pretrained": False,
        "sha256": digest(exported / "sae" / WEIGHTS_NAME),
        "architecture": "topk",
        "library": "tcsae",
        "made_for": "test/tiny, blocks.1.hook_resid_post",
        "cautions": [],
    }
    config = read_json(loaded / "config.json")
    assert not {"training", "seed", "lambda", "consistency", "tracking"} & config.keys()
    assert config["sae"] == {"architecture": "topk", "d_sae": D_SAE, "k": 8}
    # Of what a finished run has, all but what training leaves.
    left_out = {"checkpoint", "metrics.jsonl", "train.log", "state.json", "wandb"}
    names = {p.name for p in trained.iterdir()} - left_out
    assert names == {p.name for p in loaded.iterdir()}
    assert leftovers(loaded) == []
    known = {"training_steps", "layer", "dict_size", "unique_id", "metrics", "consistency"}
    assert known <= run.final_info.keys()
    assert not {"tokens", "learning_rate", "final_loss", "seed"} & run.final_info.keys()


def test_page_and_notes_say_where_the_sae_comes_from(loaded: Path, exported: Path) -> None:
    page, notes = ((loaded / name).read_text() for name in ("report.html", "notes.txt"))
    for text in (page, notes):
        assert f"loaded from {exported}" in " ".join(text.split())
    assert "not trained here" in page and 'id="training"' not in page
    assert "documents that training never saw" not in page
    assert "not by this run" in notes and "lambda" not in notes
    assert f"python -m tcsae.evaluate {exported} model.path=" in notes


def test_compare_lays_it_beside_the_run(trained: Path, loaded: Path, tmp_path: Path) -> None:
    compare([str(trained), str(loaded), "--output", str(tmp_path)])
    told = read_json(tmp_path / "comparison.json")
    assert len(told["streams"]) == 1
    ours, theirs = told["groups"]
    assert theirs["label"] == f"loaded from {loaded.parent.name}/export"
    assert theirs["seeds"] == [] and not theirs["is_baseline"] and theirs["deltas"] == {}
    assert "not trained here" in theirs["match"]["words"]
    assert ours["metrics"] == theirs["metrics"] and ours["metrics"]["C_4"]["value"] is not None
    assert ours["label"] == "lambda=0.1" and told["grids"] == []
    assert "tokens" not in theirs["settings"] and "lambda" not in theirs["settings"]
    by_name = {run["name"]: run for run in told["runs"]}
    assert by_name["loaded"]["tokens"] is None and by_name["loaded"]["status"] == "used"
    table = (tmp_path / "comparison.md").read_text()
    assert f"| {theirs['label']} |  |" in table
    assert theirs["label"] in (tmp_path / "report.html").read_text()


def test_loaded_runs_can_be_compared_without_trained_ones(loaded: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(loaded, again)
    compare([str(loaded), str(again), "--output", str(tmp_path / "out")])
    runs = read_json(tmp_path / "out" / "comparison.json")["runs"]
    assert [run["status"] for run in runs] == ["used", "duplicate"]


def test_the_same_command_again_does_nothing_and_rerun_repeats(
    exported: Path, loaded: Path, where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tcsae.jobs import measure_foreign

    calls = count_calls(measure_foreign, "measure", monkeypatch)
    main([str(exported), *where, "--output", str(loaded)])
    assert calls == []
    metrics = read_json(loaded / "final_info.json")["metrics"]
    main([str(exported), *where, "rerun=true", "--output", str(loaded)])
    assert len(calls) == 1
    assert read_json(loaded / "final_info.json")["metrics"] == metrics


def test_an_interruption_leaves_what_the_same_command_ends(
    exported: Path, where: list[str], tmp_path: Path
) -> None:
    stop = StopRequest()
    found = from_folder(exported)
    stop.signal_name = "SIGTERM"
    with pytest.raises(Interrupted):
        evaluate_sae(found, where, tmp_path / "run", stop)
    assert not (tmp_path / "run" / "final_info.json").exists()
    with stop_on_signal() as stop:
        assert evaluate_sae(found, where, tmp_path / "run", stop) == tmp_path / "run"
    assert tcsae.load_run(tmp_path / "run").final_info["training_steps"] is None


# ---------------------------------------------------------------- other people's folders


def test_a_saelens_folder_gets_what_sae_lens_itself_computes(
    on_the_text: list[str], tmp_path: Path, trained: Path
) -> None:
    from sae_lens import SAE, TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    theirs = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=6, rescale_acts_by_decoder_norm=True))
    theirs.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    theirs.cfg.metadata.context_size = 16
    theirs.save_model(tmp_path / "theirs")
    keys = [a for a in on_the_text if not a.startswith(("layer=", "dataset.context_size"))]
    main([str(tmp_path / "theirs"), *keys, "--output", str(tmp_path / "run")])
    run = tcsae.load_run(tmp_path / "run")
    assert isinstance(run.config, LoadedConfig)
    assert run.config.layer == 1 and run.config.dataset.context_size == 16
    assert run.config.source.library == "SAELens" and run.config.sae.k == 6

    from tcsae.data.stream import open_stream

    stream = open_stream(run.config, StopRequest())
    batch = stream.evaluation.batch(torch.arange(len(stream.evaluation)))
    x_ND = batch.x[batch.valid].float()
    with torch.no_grad():
        codes_NF = SAE.load_from_disk(tmp_path / "theirs").encode(x_ND)
        error = (theirs(x_ND) - x_ND).square().sum()
    wanted = 1 - error / (x_ND - x_ND.mean(0)).square().sum()
    core = run.core["eval_result_metrics"]
    got = core["reconstruction_quality"]["explained_variance"]
    assert got == pytest.approx(wanted.item(), abs=1e-4)
    assert core["sparsity"]["l0"] == pytest.approx((codes_NF > 0).sum(1).float().mean().item())


def test_a_dictionary_learning_folder_is_measured_where_it_was_trained(
    on_the_text: list[str], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "encoder.weight": (D_SAE, D_IN),
        "encoder.bias": (D_SAE,),
        "decoder.weight": (D_IN, D_SAE),
        "bias": (D_IN,),
    }
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(state, folder / "ae.pt")
    trainer = {
        "dict_class": "AutoEncoder",
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "lm_name": "test/tiny",
        "layer": 1,
        "submodule_name": "resid_post_layer_1",
    }
    content = {"trainer": trainer, "buffer": {"ctx_len": 16}}
    (folder / "config.json").write_text(json.dumps(content))
    keys = [a for a in on_the_text if not a.startswith(("layer=", "dataset.context_size"))]
    main([str(folder), *keys, "--output", str(tmp_path / "run")])
    config = tcsae.load_run(tmp_path / "run").config
    assert isinstance(config, LoadedConfig)
    assert config.source.library == "dictionary_learning"
    assert config.source.architecture == "AutoEncoder"
    assert config.source.sha256 == digest(folder / "ae.pt")
    assert (config.layer, config.model.hook, config.dataset.context_size) == (1, "resid_post", 16)
    assert sorted(p.name for p in folder.iterdir()) == ["ae.pt", "config.json"]


def test_a_sparsify_folder_is_measured_and_its_run_is_heard(
    on_the_text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "b_dec": (D_IN,)}
    shapes["W_dec"] = shapes["encoder.weight"]
    folder = tmp_path / "theirs" / "layers.1"
    folder.mkdir(parents=True)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(state, folder / "sae.safetensors")
    (folder / CFG_NAME).write_text(json.dumps({"d_in": D_IN, "num_latents": D_SAE, "k": 8}))
    run_said = {"model": "test/tiny", "ctx_len": 16, "dataset": "me/pile", "exclude_tokens": []}
    (folder.parent / "config.json").write_text(json.dumps(run_said))
    keys = [a for a in on_the_text if not a.startswith(("layer=", "dataset.context_size"))]
    main([str(folder), *keys, "--output", str(tmp_path / "run")])
    config = tcsae.load_run(tmp_path / "run").config
    assert isinstance(config, LoadedConfig) and config.sae.k == 8
    assert (config.source.library, config.source.architecture) == ("sparsify", "topk")
    assert (config.layer, config.model.hook, config.dataset.context_size) == (1, "resid_post", 16)
    said = read_json(tmp_path / "run" / "final_info.json")["source"]["cautions"]
    assert ["on text of me/pile" in text for text in said] == [False, True]
    assert "parted by eos" in said[0]
    # At the start, and with the results.
    assert capsys.readouterr().err.count(said[1]) == 2
    assert tcsae.load_sae(tmp_path / "run").cfg.architecture == "topk"


def foreign(tmp_path: Path, facts: Facts, d_in: int = D_IN) -> ForeignSAE:
    found = from_folder(plain(tmp_path / "plain"))
    return ForeignSAE(found.sae, found.source, facts, found.cfg)


@pytest.mark.parametrize(
    ("name", "hook", "means"),
    [
        ("gpt2-small", "blocks.8.hook_resid_pre", ("gpt2", 8, "resid_pre")),
        ("gemma-2-2b", "blocks.12.hook_mlp_out", ("google/gemma-2-2b", 12, "mlp_out")),
        ("google/gemma-2-2b", "blocks.0.hook_attn_out", ("google/gemma-2-2b", 0, "attn_out")),
        ("pythia-70m", "blocks.3.hook_resid_post", ("EleutherAI/pythia-70m", 3, "resid_post")),
        ("me/mine", "blocks.2.hook_resid_post", ("me/mine", 2, "resid_post")),
    ],
)
def test_what_a_folder_says_of_itself_is_the_default(
    name: str, hook: str, means: tuple[str, int, str], tmp_path: Path
) -> None:
    config = composed(foreign(tmp_path, Facts(name, hook, context_size=64)), [])
    assert (config.model.name, config.layer, config.model.hook) == means
    assert config.dataset.context_size == 64 and config.dataset.name == "shakespeare"
    assert config.evaluation.max_lag == 32
    own = composed(
        foreign(tmp_path, Facts(name, hook, context_size=64)),
        ["model=smollm2", "layer=3", "dataset.context_size=80", "window=16"],
    )
    assert own.model.name == "HuggingFaceTB/SmolLM2-135M-Instruct" and own.layer == 3
    assert own.dataset.context_size == 80 and own.window == 16


def test_the_result_is_known_by_the_weights_not_by_where_they_lie(tmp_path: Path) -> None:
    facts = Facts("gpt2", "blocks.1.hook_resid_post")
    first = composed(foreign(tmp_path / "a", facts), [])
    assert run_id(first) == run_id(composed(foreign(tmp_path / "b", facts), []))
    assert run_id(first) != run_id(composed(foreign(tmp_path / "a", facts), ["layer=2"]))
    assert parse_any(first.dump()) == first


def test_what_differs_from_where_it_was_made_is_said(
    on_the_text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain(
        tmp_path / "sae",
        hook_name="blocks.2.hook_resid_post",
        model_name="gpt2-small",
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )
    main([str(folder), *on_the_text, "--output", str(tmp_path / "run")])
    said = capsys.readouterr().err
    notes = " ".join((tmp_path / "run" / "notes.txt").read_text().split())
    page = (tmp_path / "run" / "report.html").read_text()
    for words in (
        "made for blocks.2.hook_resid_post and is measured at blocks.1.hook_resid_post",
        "weights were processed (center_writing_weights=True)",
    ):
        assert words in said and words in notes and words in page
    copied = read_json(tmp_path / "run" / "sae" / CFG_NAME)["metadata"]
    assert copied["hook_name"] == "blocks.2.hook_resid_post"
    assert copied["source"]["folder"] == str(folder)


# ---------------------------------------------------------------- what is refused


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        del tensors[name]
        save_file(tensors, folder / WEIGHTS_NAME)

    return change


def with_more(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file(tensors | {"threshold": torch.zeros(D_SAE)}, folder / WEIGHTS_NAME)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def pickled(folder: Path) -> None:
    with open(folder / WEIGHTS_NAME, "wb") as file:
        pickle.dump({"W_enc": Bomb(folder / "exploded")}, file)


def of_another_library(folder: Path) -> None:
    (folder / CFG_NAME).write_text('{"activation": "topk", "num_latents": 64, "k": 32, "d_in": 8}')


def unknown_architecture(folder: Path) -> None:
    edit_cfg(folder, architecture="matching_pursuit")


def narrower(folder: Path) -> None:
    cfg = config_class("topk")(architecture="topk", d_sae=D_SAE, k=8)
    save_saelens(folder, sae_class("topk")(cfg, 16, torch.Generator()))


BAD: list[tuple[str, Callable[[Path], Any], list[str], list[str]]] = [
    ("missing tensor", without("b_enc"), [], ["b_enc missing"]),
    ("additional tensor", with_more, [], ["threshold not expected"]),
    ("wrong d_in in the cfg", lambda f: edit_cfg(f, d_in=64), [], ["W_dec is [96, 48]", "d_in 64"]),
    ("d_in of another model", narrower, [], ["d_in is 16, against 48 of test/tiny", "model="]),
    ("pickle", pickled, [], ["pickle", "not opened"]),
    (
        "another library",
        of_another_library,
        [],
        ["no architecture", "sparsify's, whose weights are sae.safetensors"],
    ),
    ("not computed here", unknown_architecture, [], ["unknown architecture 'matching_pursuit'"]),
    ("not there", shutil.rmtree, [], ["no such folder"]),
    ("layer the model has not", lambda f: None, ["layer=7"], ["layer = 7", "0 to 2"]),
    ("unknown hook", lambda f: None, ["model.hook=z"], ["model.hook = z", "resid_pre"]),
    ("training key", lambda f: None, ["training.lr=1"], ["training.lr=1: nothing is trained here"]),
    ("sae", lambda f: None, ["sae=topk"], ["sae=topk", "what can be set"]),
    ("unknown key", lambda f: None, ["dataset.sead=1"], ["dataset.sead", "did you mean"]),
    ("lag beyond the context", lambda f: None, ["evaluation.max_lag=16"], ["must be below 16"]),
    ("text not there", lambda f: None, ["dataset.path=/nowhere"], ["/nowhere"]),
]


@pytest.mark.parametrize(("what", "change", "more", "says"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    what: str,
    change: Callable[[Path], Any],
    more: list[str],
    says: list[str],
    on_the_text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = plain(tmp_path / "sae")
    change(folder)
    chosen = {override.partition("=")[0] for override in more}
    keys = [a for a in on_the_text if a.partition("=")[0] not in chosen]
    line = refusal(capsys, folder, *keys, *more, "--output", tmp_path / "run")
    for words in says:
        assert words in line
    assert not (tmp_path / "run").exists() and leftovers(tmp_path) == []
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("metadata", "left_out", "says"),
    [
        ({}, ("model", "layer"), "which model"),
        ({"model_name": "gpt2"}, ("model", "layer"), "which layer"),
        ({"hook_name": "blocks.1.attn.hook_z"}, ("layer",), "blocks.1.attn.hook_z"),
        ({"hook_name": "blocks.9.hook_resid_post"}, ("layer",), "layer = 9: must be 0 to 2"),
        ({"model_name": "${oc.env:HOME}"}, ("model",), "${oc.env:HOME}"),
    ],
)
def test_a_folder_that_does_not_say_enough_or_names_another_hook(
    metadata: dict[str, Any],
    left_out: tuple[str, ...],
    says: str,
    on_the_text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = plain(tmp_path / "sae", **metadata)
    keys = [a for a in on_the_text if a.partition("=")[0].partition(".")[0] not in left_out]
    if "model" not in left_out:
        keys = [a for a in on_the_text if not a.startswith("layer")]
    assert says in refusal(capsys, folder, *keys, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_anything_else_is_left_alone(
    trained: Path,
    exported: Path,
    where: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    before = digest(trained / "config.json"), digest(theirs / "config.json")
    for output in (trained, exported, theirs):
        assert "not empty" in refusal(capsys, exported, *where, "--output", output)
    assert before == (digest(trained / "config.json"), digest(theirs / "config.json"))


def test_another_result_in_the_folder_is_not_overwritten(
    loaded: Path, on_the_text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(loaded / "final_info.json")
    folder = plain(tmp_path / "sae")
    line = refusal(capsys, folder, *on_the_text, "--output", loaded)
    assert "holds another result" in line and digest(loaded / "final_info.json") == before


def test_an_export_is_no_run_and_a_loaded_sae_is_not_exported(
    exported: Path, loaded: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is an export, not a run.*tcsae.evaluate"):
        tcsae.load_run(exported)
    with pytest.raises(UserError, match="was loaded from .*export.* share it from there"):
        export_run(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize("arguments", [[], ["--release", "gpt2-small-res-jb"], ["--sae-id", "x"]])
def test_what_to_measure_must_be_said(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "--release" in capsys.readouterr().err


# ---------------------------------------------------------------- SAELens' pretrained SAEs


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download of single files uses."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        file = self.server.folder / self.path.partition("/resolve/main/")[2]  # type: ignore[attr-defined]
        found = file.is_file()
        body = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{digest(file)}"')
            self.send_header("X-Repo-Commit", "1" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub that has the SAE "one" in any repository."""
    said = {"model_name": "test/tiny", "hook_name": "blocks.1.hook_resid_post"}
    plain(tmp_path / "hub" / "one", sae_lens_version="6.54.12", **said)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder = tmp_path / "hub"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def command(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as users start it: the hub's settings are read when it is imported."""
    given = environment(**{"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", **env})
    module = [sys.executable, "-m", "tcsae.evaluate", *arguments]
    return subprocess.run(module, capture_output=True, text=True, env=given, timeout=240)


def test_a_pretrained_sae_is_fetched_by_sae_lens(
    hub: str, on_the_text: list[str], tmp_path: Path
) -> None:
    keys = [a for a in on_the_text if not a.startswith("layer")]
    release = ["--release", "me/saes", "--sae-id", "one", "--output", str(tmp_path / "run")]
    done = command(tmp_path, *release, *keys, HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert f"measured: {tmp_path / 'run'}" in done.stdout
    config = tcsae.load_run(tmp_path / "run").config
    assert isinstance(config, LoadedConfig) and config.layer == 1
    assert config.source.folder == config.source.title == "me/saes one"
    notes = (tmp_path / "run" / "notes.txt").read_text()
    assert "loaded from     me/saes one (SAELens, standard)" in notes
    assert "python -m tcsae.evaluate --release me/saes --sae-id one" in notes


def test_without_the_hub_a_pretrained_sae_is_one_clear_line(tmp_path: Path) -> None:
    release = ["--release", "gpt2-small-res-jb", "--sae-id", "blocks.8.hook_resid_pre"]
    done = command(tmp_path, *release, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("tcsae: sae-lens cannot load gpt2-small-res-jb blocks.8.hook_resid_pre")
    assert line.endswith("without the hub, give a FOLDER that holds the SAE")


def test_a_release_that_sae_lens_does_not_know_is_said_in_its_words() -> None:
    with pytest.raises(UserError, match="nosuch not found in pretrained SAEs directory"):
        from_release("nosuch", "x")
    with pytest.raises(UserError, match="ID nosuch not found in release gpt2-small-res-jb"):
        from_release("gpt2-small-res-jb", "nosuch")


def test_without_sae_lens_a_release_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match="--release needs sae-lens: pip install"):
        from_release("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
