"""model=synthetic from end to end: a tiny world through the stages of a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_here, weights_digest
from wandb_server import offline_runs

TINY = {
    "model": "synthetic",
    "world": "absorption",
    "model.world.d_in": "12",
    "model.world.document_tokens": "31",
    "model.world.classes.parent.n": "8",
    "model.world.classes.parent.density": "0.1",
    "+model.world.classes.token": "{n: 8, lifetime: 1, density: 0.05}",
    "model.world.children.per_parent": "1",
    "model.world.amplitude_noise": "0.1",
    "model.world.noise": "0.05",
    "dataset.context_size": "32",
    "dataset.n_contexts": "256",
    "dataset.n_eval_contexts": "32",
    "evaluation.max_lag": "8",
    "evaluation.windows": "[2,4]",
    "evaluation.bootstrap": "100",
    "training.batch_contexts": "8",
    "training.tokens": "60000",
    "training.precision": "float32",
    "training.target_l0": "2",
    "sae": "topk",
    "sae.d_sae": "32",
    "lambda": "0",
    "consistency": "none",
    "tracking": "disabled",
}


def train(folder: Path, **changes: str) -> Any:
    chosen = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return run_here(*(f"{k}={v}" for k, v in chosen.items()), f"hydra.run.dir={folder}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished run of a tiny world, and the outcome of its command."""
    root = tmp_path_factory.mktemp("synthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCSAE_STORE", str(root / "store"))
        outcome = train(root / "run", tracking="offline", tracking__artifacts="false")
    assert outcome.code == 0, outcome.stderr
    return root / "run", outcome


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_truth_metrics_are_in_final_info(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    truth = read(run / "final_info.json")["truth"]
    assert truth == read(run / "eval" / "truth.json")
    assert truth["n_true"] == 24
    assert list(truth["by_class"]) == ["parent", "token", "child"]
    # It has learnt: far above what as many random directions are matched with.
    assert truth["mcc"] > truth["mcc_random"] + 0.15
    assert truth["all"]["n_found"] >= 5
    assert 0.2 < truth["all"]["f1"] <= 1
    # 8 x .1 + 8 x .1 x .2 + 8 x .05 features a token; all that is not noise.
    assert truth["oracle"]["l0"] == pytest.approx(1.36, abs=0.2)
    assert truth["oracle"]["explained_variance"] > 0.99
    ev = read(run / "final_info.json")["metrics"]["reconstruction_quality"]["explained_variance"]
    assert 0.3 < ev < truth["oracle"]["explained_variance"]


def test_truth_metrics_are_in_the_summary_of_wandb(finished: tuple[Path, Any]) -> None:
    import wandb

    run, _ = finished
    truth = read(run / "final_info.json")["truth"]
    wandb.teardown()  # what its own process has not written yet
    (sent,) = offline_runs(run)
    assert sent.summary["eval/truth_mcc"] == truth["mcc"]
    assert sent.summary["eval/truth_found"] == truth["all"]["found"]
    assert sent.summary["eval/truth_found_slow"] == truth["slow"]["found"]


def test_what_needs_a_language_model_is_left_out_with_a_word(finished: tuple[Path, Any]) -> None:
    run, outcome = finished
    core = read(run / "eval" / "core.json")
    scores = core["eval_result_metrics"]["model_performance_preservation"]
    assert set(scores.values()) == {None}
    missing = core["eval_result_unstructured"]["missing"]
    path = "eval_result_metrics.model_performance_preservation.ce_loss_score"
    assert missing[path] == "a synthetic world has no language model"
    notes = (run / "notes.txt").read_text()
    assert "CE loss score" in notes
    assert "a synthetic world has no language model" in " ".join(notes.split())
    assert "CE loss score" not in outcome.stdout


def test_notes_and_page_show_the_truth(finished: tuple[Path, Any]) -> None:
    run, outcome = finished
    truth = read(run / "final_info.json")["truth"]
    notes, page = (run / "notes.txt").read_text(), (run / "report.html").read_text()
    found = f"{truth['all']['n_found']} of 24 true features are found"
    for text in (notes, page):
        assert found in " ".join(text.split())
        assert "synthetic-absorption, 24 true features in 12 dimensions" in text
        assert "the oracle" in text
    assert "Absorption: a parent" in " ".join(notes.split())
    assert f"({truth['all']['n_found']} of 24;" in outcome.stdout


def test_tokens_are_shown_by_their_strongest_true_feature(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    texts = set(read(run / "analysis" / "top_contexts.json")["tokens"].values())
    assert {"BOS", "nothing", "parent 0 ", "child 7 ", "token 3 "} <= texts


def test_streamed_activations_train_the_same_sae(
    finished: tuple[Path, Any], own_store: Path, tmp_path: Path
) -> None:
    run, _ = finished
    outcome = train(tmp_path / "run", store="stream", evaluation__analysis="false")
    assert outcome.code == 0, outcome.stderr
    assert weights_digest(tmp_path / "run") == weights_digest(run)


def test_finished_runs_are_laid_side_by_side(
    finished: tuple[Path, Any], own_store: Path, tmp_path: Path
) -> None:
    from tcsae.report.comparison import compare_runs

    run, _ = finished
    small = {"evaluation__analysis": "false", "window": "4"}
    loss = {"lambda": "1", "consistency": "scale_free"}
    outcome = train(tmp_path / "run", **small, **loss)
    assert outcome.code == 0, outcome.stderr
    compared = compare_runs([run, tmp_path / "run"])
    assert len(compared.streams) == 1
    assert {"truth_mcc", "truth_found_slow", "truth_lag_slow"} <= set(compared.headline)
    assert "ce_loss_score" not in compared.metrics
    values = [group["metrics"]["truth_mcc"]["value"] for group in compared.groups]
    assert values[0] == read(run / "final_info.json")["truth"]["mcc"]
    assert "truth_found" in compared.csv()


def test_a_sweep_ends_with_a_table_and_a_page(own_store: Path, tmp_path: Path) -> None:
    # Two seeds of two settings: differences of the truth's metrics, which have no draws over
    # documents, beside those of metrics that have evaluation.bootstrap of them.
    chosen = TINY | {"training.tokens": "4096", "consistency": "scale_free"}
    del chosen["lambda"]
    outcome = run_here(
        "--multirun",
        *(f"{k}={v}" for k, v in chosen.items()),
        "evaluation.analysis=false",
        "lambda=0,1",
        "seed=0,1",
        "hydra.launcher.pack=4",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    assert outcome.code == 0, outcome.stderr
    rows = [line for line in outcome.stdout.splitlines() if "done" in line and "found" in line]
    assert len(rows) == 4
    assert all("n/a" in row and "MCC 0." in row for row in rows)
    page = (tmp_path / "sweep" / "comparison" / "report.html").read_text()
    assert "Truth: found" in page
    compared = read(tmp_path / "sweep" / "comparison" / "comparison.json")
    variant = next(group for group in compared["groups"] if not group["is_baseline"])
    assert None not in (variant["deltas"]["truth_mcc"]["low"], variant["deltas"]["C_4"]["low"])


def test_a_world_reads_no_text(finished: tuple[Path, Any]) -> None:
    from tcsae.base.errors import UserError
    from tcsae.measure.text_features import shared_model
    from tcsae.runs.folder import load_run

    with pytest.raises(UserError, match="synthetic-absorption is a synthetic world"):
        shared_model(load_run(finished[0]).config.model, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["world=easy"], "world=... is for model=synthetic"),
        (["model=synthetic", "dataset=shakespeare"], "go together"),
        (["model=synthetic", "layer=3"], "layer = 3: must be 0 to 0"),
        (["model=synthetic", "model.world.classes.phrase.lifetime=0.5"], "greater than or equal"),
        (["model=synthetic", "dataset.n_contexts=null"], "set dataset.n_contexts"),
        (["model=synthetic", "dataset.n_contexts=99999999"], "at most"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    arguments: list[str], said: str, tmp_path: Path, own_store: Path
) -> None:
    outcome = run_here(*arguments, "tracking=disabled", f"hydra.run.dir={tmp_path}/run")
    assert said in outcome.refusal()


def test_any_sae_can_be_held_against_a_world(
    finished: tuple[Path, Any], own_store: Path, tmp_path: Path
) -> None:
    from tcsae.base.signals import StopRequest
    from tcsae.jobs.foreign import from_folder
    from tcsae.jobs.measure_foreign import evaluate_sae

    run, _ = finished
    kept = {k: v for k, v in TINY.items() if not k.startswith(("training", "sae", "lambda"))}
    del kept["consistency"], kept["tracking"]
    named = [f"{k}={v}" for k, v in kept.items()]
    # The world as it is named, and as the SAE says by itself.
    for index, arguments in enumerate((named, [])):
        found = evaluate_sae(
            from_folder(run / "sae"),
            [*arguments, "evaluation.analysis=false"],
            tmp_path / f"{index}",
            StopRequest(),
        )
        assert read(found / "final_info.json")["truth"] == read(run / "final_info.json")["truth"]
