"""evaluation.meaning in a run, and the door that measures runs that have finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import run_here, small_job, write_texts
from wandb_server import offline_runs

import tcsae
from tcsae.base.run_files import RunFiles
from tcsae.meaning.__main__ import main
from tcsae.meaning.measured import INSTRUMENTS


@pytest.fixture(scope="module")
def finished(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("meaning")
    texts = write_texts(root / "texts", documents=60, words=200)
    rows = [
        {"text": file.read_text(), "kind": ("odd", "even")[number % 2]}
        for number, file in enumerate(sorted(texts.glob("*.txt")))
    ]
    file = root / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = small_job(
        tiny_gpt2,
        file,
        root / "run",
        dataset__context_size="64",
        dataset__n_eval_contexts="32",
        evaluation__windows="[2,4]",
        evaluation__meaning="[probes]",
        evaluation__label_fields="[kind]",
        tracking="offline",
        tracking__artifacts="false",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCSAE_STORE", str(root / "store"))
        done = run_here(*job)
    assert done.code == 0, done.stderr
    return root / "run"


def test_the_names_that_the_config_takes_are_those_of_the_instruments() -> None:
    from typing import get_args

    from tcsae.config import EvaluationConfig

    (names,) = get_args(EvaluationConfig.model_fields["meaning"].annotation)
    assert set(get_args(names)) == set(INSTRUMENTS)


def test_a_run_keeps_what_its_instruments_found(finished: Path) -> None:
    files = RunFiles(finished)
    found = json.loads(files.eval.meaning.read_text())
    assert set(found) == {"probes"} and set(found["probes"]) >= {"headline", "said"}
    assert tcsae.load_run(finished).meaning == found
    info = json.loads(files.final_info.read_text())
    for name, number in found["probes"]["headline"].items():
        assert info["meaning"][name] == {k: number[k] for k in ("value", "interval")}
    assert set(info["meaning"]) == {
        f"probe_{what}_{n}"
        for what in ("context", "semantics")
        for n in ("token", "document", "tokens", "transfer")
    }
    # Random words, and labels dealt in turn: nothing can be read.
    token = found["probes"]["tasks"]["kind"]["readings"]["token"]["k5"]["auc"]
    assert token["value"] == pytest.approx(0.5, abs=0.15)
    assert token["interval"] == [None, None]  # of fewer than 16 documents
    assert "kind (2 classes): 5 features a class of one token" in " ".join(
        files.notes.read_text().split()
    )
    assert "Probe: semantics, one token" in files.report.read_text()


def test_the_headlines_are_in_the_summary_of_wandb_and_in_a_comparison(finished: Path) -> None:
    import wandb

    from tcsae.report.comparison import compare_runs
    from tcsae.report.notes import comparison_notes

    wandb.teardown()  # what its own process has not written yet
    (sent,) = offline_runs(finished)
    found = json.loads(RunFiles(finished).final_info.read_text())["meaning"]
    for name, entry in found.items():
        assert sent.summary[f"eval/{name}"] == entry["value"]
    comparison = compare_runs([finished])
    assert "Probe: semantics, one token" in comparison_notes(comparison)
    assert {"probe_context_token", "probe_semantics_transfer"} <= set(comparison.headline)


def test_the_arms_of_the_experiment_have_one_l0() -> None:
    from omegaconf import OmegaConf

    from tcsae.config.compose import config_of
    from tcsae.config.folder import conf_folder

    points = OmegaConf.load(conf_folder() / "experiment/meaning.yaml").hydra.sweeper.points
    arms = [config_of("+experiment=meaning", *point.split()) for point in points]
    assert {arm.sae.k for arm in arms} == {32}
    assert all(set(arm.evaluation.meaning) == set(INSTRUMENTS) for arm in arms)
    losses = {
        (arm.sae.architecture, arm.consistency.form)
        + (arm.consistency.features, arm.consistency.shuffle_positions, arm.training.average)
        for arm in arms
    }
    assert len(losses) == len(arms) == 8


def test_the_door_finds_what_the_run_found(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        shutil.copytree(finished, tmp_path / name)
    RunFiles(tmp_path / "a").eval.meaning.unlink()
    main([str(tmp_path), "--json"])
    printed = json.loads(capsys.readouterr().out)
    before = json.loads(RunFiles(finished).eval.meaning.read_text())
    assert printed == {str(tmp_path / name): before for name in ("a", "b")}
    assert json.loads(RunFiles(tmp_path / "a").eval.meaning.read_text()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "--instruments", "tea"], "tea: no such instrument; there is"),
        (["{run}/eval"], "has no finished run: train one first"),
        (["{run}/nowhere"], "is not a folder"),
        (["{run}", "--labels", "topic"], "none of the first 60 rows of"),
        (["{run}", "--instruments", "shift", "--labels", "kind"], "leave it out"),
    ],
)
def test_a_mistake_at_the_door_is_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main([part.format(run=finished) for part in arguments])
    line = capsys.readouterr().err.strip()
    assert left.value.code == 2 and said in line and "\n" not in line
