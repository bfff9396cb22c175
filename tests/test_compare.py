"""`python -m tcsae.compare`: what it writes, where, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import environment
from run_folders import F, N, T, changed, codes, inputs, write_run

from tcsae.compare import main
from tcsae.report.compare_files import default_output

FILES = {"comparison.json", "comparison.csv", "comparison.md", "report.html", "notes.txt"}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "multirun" / "sweep"
    write_run(folder / "base")
    write_run(folder / "variant", changed(lambda_=1.0), features=codes(0.9))
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *folders: Path) -> str:
    """The one line that a refused call leaves."""
    with pytest.raises(SystemExit) as stop:
        main([str(folder) for folder in folders])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("tcsae: ")
    return line


def test_a_sweep_gets_its_comparison_in_its_own_folder(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(sweep)])
    out = capsys.readouterr().out
    assert {path.name for path in (sweep / "comparison").iterdir()} == FILES
    assert "| baseline | 0 |" in out and "| lambda=1 | 0 |" in out
    assert f"page: {sweep / 'comparison' / 'report.html'}" in out
    assert (sweep / "comparison" / "comparison.md").read_text() in out


def as_loaded(folder: Path) -> Path:
    """A run folder turned into that of an SAE which was not trained there."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("seed", "lambda", "consistency", "training", "tracking"):
        del config[key]
    config["sae"] = {"architecture": "topk", "d_sae": F, "k": 4}
    where = {"folder": "/data/theirs", "sha256": "0" * 64}
    config["source"] = {**where, "architecture": "topk", "library": "SAELens"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "final_info.json").write_text('{"layer": 1, "training_steps": null}')
    (folder / "metrics.jsonl").unlink()
    return folder


def test_an_sae_from_elsewhere_lies_beside_a_sweep_and_changes_nothing_in_it(
    sweep: Path, tmp_path: Path
) -> None:
    main([str(sweep), "--output", str(tmp_path / "alone")])
    theirs = as_loaded(write_run(tmp_path / "theirs", features=codes(0.5)))
    main([str(sweep), str(theirs), "--output", str(tmp_path / "both")])
    alone, both = (
        json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("alone", "both")
    )
    *own, group = both["groups"]
    assert own == alone["groups"] and both["grids"] == alone["grids"]
    assert group["label"] == "loaded from data/theirs"
    assert group["seeds"] == [] and group["deltas"] == {} and not group["is_baseline"]
    assert group["settings"] == {
        "architecture": "topk",
        "d_sae": F,
        "k": 4,
        "window": None,
        "loaded from": "data/theirs",
        "sha256": "0" * 64,
    }
    wanted = [n for n in own[0]["metrics"] if own[0]["metrics"][n]["value"] is not None]
    assert all(group["metrics"][name]["value"] is not None for name in wanted)
    for name in ("notes.txt", "comparison.md", "comparison.csv", "report.html"):
        assert "loaded from data/theirs" in (tmp_path / "both" / name).read_text()


def test_a_comparison_can_be_repeated(sweep: Path) -> None:
    main([str(sweep)])
    first = (sweep / "comparison" / "comparison.json").read_text()
    main([str(sweep)])
    assert (sweep / "comparison" / "comparison.json").read_text() == first


def test_output_goes_where_it_is_sent(sweep: Path, tmp_path: Path) -> None:
    main([str(sweep / "base"), str(sweep / "variant"), "--output", str(tmp_path / "there")])
    assert {path.name for path in (tmp_path / "there").iterdir()} == FILES
    assert not (sweep / "comparison").exists()


def test_runs_meet_in_their_common_folder(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert default_output(runs) == tmp_path / "comparison"


def test_a_single_run_gets_its_comparison_beside_it(sweep: Path) -> None:
    assert default_output([sweep / "base"]) == sweep / "comparison"


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "neither a run nor a sweep" in refusal(capsys, tmp_path)
    assert "is not a folder" in refusal(capsys, tmp_path / "nowhere")


def test_a_run_that_never_finished_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "half", finished=False)
    assert "has not finished" in refusal(capsys, run)


def test_a_damaged_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "bad")
    (run / "eval" / "core.json").write_text("{")
    assert "core.json" in refusal(capsys, run)


def test_runs_of_different_models_are_compared_apart(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(sweep / "other", changed(model__name="test/other"), x=inputs(seed=3))
    main([str(sweep)])
    assert "2 different sets of activations" in capsys.readouterr().out


def test_a_dead_sae_and_a_single_context_get_pages(tmp_path: Path) -> None:
    write_run(tmp_path / "dead" / "base")
    dead = torch.zeros(N, T, F)
    write_run(tmp_path / "dead" / "dead", changed(lambda_=1.0), features=dead)
    for name, value in (("base", 0.0), ("variant", 1.0)):
        write_run(tmp_path / "one" / name, changed(lambda_=value), x=inputs(n_contexts=1))
    for sweep in ("dead", "one"):
        main([str(tmp_path / sweep)])
        folder = tmp_path / sweep / "comparison"
        assert {path.name for path in folder.iterdir()} == FILES
        assert "NaN" not in (folder / "comparison.json").read_text()
        assert "NaN" not in (folder / "comparison.csv").read_text()


def test_an_output_folder_that_cannot_be_is_refused(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main([str(sweep), "--output", str(tmp_path / "file" / "below")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tcsae: ")


def test_the_command_runs_as_a_module(sweep: Path) -> None:
    command = [sys.executable, "-m", "tcsae.compare"]
    done = subprocess.run(
        [*command, str(sweep)], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((sweep / "comparison" / "comparison.json").read_text())
    assert len(told["groups"]) == 2
    bad = subprocess.run(
        [*command, str(sweep / "nowhere")], capture_output=True, text=True, env=environment()
    )
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
