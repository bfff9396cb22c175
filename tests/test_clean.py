"""`python -m tcsae.clean`: says what can go, asks, and touches no result and no work at hand."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment, run_here, small_job
from state_folders import write_final, write_state, write_sweep

from tcsae.base.files import locked
from tcsae.base.run_files import RunFiles
from tcsae.clean import main
from tcsae.runs.leftovers import DAY, stores

LARGE = b"x" * 2_000_000


def with_checkpoint(folder: Path) -> Path:
    checkpoints = RunFiles(folder).checkpoints
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-000004.safetensors").write_bytes(LARGE)
    return folder


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A job done, one failed, one at work elsewhere, one that waits: each with a checkpoint."""
    folder = write_sweep(tmp_path / "grid", ["window=2", "window=4", "window=8", "window=16"])
    write_final(write_state(folder / "run-0", state="done"), training_steps=4)
    write_state(folder / "run-1", state="failed", message="no")
    write_state(folder / "run-2", state="running")
    write_state(folder / "run-3", state="queued")
    for number in range(4):
        with_checkpoint(folder / f"run-{number}")
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_without_somebody_to_ask_nothing_goes(
    grid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_in(grid)
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        main([str(grid), "--unfinished"])
    said = capsys.readouterr().out
    assert "checkpoints of finished runs: 1, 2 MB" in said
    assert "unfinished runs: 1, 2 MB" in said and "(failed)" in said
    assert "nobody to ask here; --yes does it" in said and files_in(grid) == before


def test_checkpoints_of_finished_runs_go_and_nothing_else(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(grid)
    main([str(grid), "--yes"])
    assert before - files_in(grid) == {"run-0/checkpoint/step-000004.safetensors"}
    assert "freed 2 MB" in capsys.readouterr().out
    main([str(grid), "--yes"])
    assert "nothing to remove" in capsys.readouterr().out


def test_unfinished_runs_go_where_asked_and_those_at_work_stay(grid: Path) -> None:
    main([str(grid), "--unfinished", "--yes"])
    assert sorted(path.name for path in grid.glob("run-*")) == ["run-0", "run-2", "run-3"]


def test_what_somebody_holds_stays(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(grid)
    with locked(RunFiles(grid / "run-0").lock), locked(RunFiles(grid / "run-1").lock):
        main([str(grid), "--unfinished", "--yes"])
        assert before <= files_in(grid)
    said = capsys.readouterr().out
    assert said.count("somebody works there") == 2 and "freed 0 MB" in said


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("n", False), ("", False)])
def test_a_terminal_is_asked(grid: Path, answer: str, goes: bool) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tcsae.clean", str(grid)],
        stdin=slave,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    os.write(master, f"{answer}\n".encode())
    said = process.communicate(timeout=60)[0]
    os.close(master)
    os.close(slave)
    assert process.returncode == 0 and "free 2 MB? [y/N]" in said
    assert RunFiles(grid / "run-0").checkpoints.exists() is not goes


def test_activations_that_nobody_used_for_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1.7e9
    for name, age in (("old", 20.0), ("new", 3.0)):
        folder = tmp_path / "activations" / name
        folder.mkdir(parents=True)
        (folder / "identity.json").write_text("{}")
        (folder / "00000.safetensors").write_bytes(LARGE)
        os.utime(folder / "identity.json", (now - age * DAY,) * 2)
    (tmp_path / "activations" / "no store").mkdir()
    found = stores(tmp_path, 14 * DAY, lambda: now)
    assert [part.path.name for part in found] == ["old"]
    assert found[0].n_bytes == len(LARGE) + 2 and found[0].said == "last used 20 days ago"
    assert found[0].remove() and not found[0].path.exists()
    assert [part.path.name for part in stores(tmp_path, 0.0, lambda: now)] == ["new"]
    main(["--stores", str(tmp_path), "--days", "0", "--yes"])
    assert "activations: 1, 2 MB" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "activations").iterdir()] == ["no store"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a sweep or run folder, or --stores"),
        (["--unfinished", "--stores"], "give a sweep or run folder"),
        (["nowhere"], "nowhere is not a folder"),
        (["--stores", "nowhere"], "nowhere is not a folder: give store.dir"),
        (["--stores", ".", "--days", "-1"], "--days -1: must be 0 or more"),
        (["--stores", ".", "--days", "nan"], "--days nan: must be 0 or more"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_a_finished_run_keeps_its_checkpoints_only_if_asked(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    for keep in (False, True):
        folder = tmp_path / str(keep)
        done = run_here(*small_job(tiny_gpt2, texts, folder, training__keep_checkpoints=str(keep)))
        assert done.code == 0, done.stderr
        files = RunFiles(folder)
        assert files.checkpoints.exists() is keep and files.is_finished
    names = {
        json.loads(RunFiles(tmp_path / which).final_info.read_text())["unique_id"]
        for which in ("False", "True")
    }
    assert len(names) == 1
    # A run that ended before they were removed: the next look at it does.
    again = run_here(*small_job(tiny_gpt2, texts, tmp_path / "True"))
    assert again.code == 0 and not RunFiles(tmp_path / "True").checkpoints.exists()
