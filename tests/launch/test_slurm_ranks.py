"""On a real Slurm: a pack over the tasks of one job, one SAE over them, a task that is killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import finish, metric_lines, run_here, start, weights_digest
from safetensors.torch import load_file
from sweeps import Grid, folders, grid_maker, wait_for, words

from tcsae.base.run_files import RunFiles
from tcsae.runs.state import read_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm")]

TWO_TASKS = (
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.tasks_per_node=2",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=3",
    "hydra.launcher.poll_seconds=0.5",
    "hydra.launcher.compare=false",
)
FOUR = {"window": "4,8", "lambda": "0.1,0.2"}
LONG = {"training__tokens": "96000", "training__checkpoint_every": "100"}
"""750 steps."""


@pytest.fixture(scope="module")
def grid(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return grid_maker(tiny_gpt2, texts, tmp_path_factory.mktemp("store"))


def sent(sweep: Path) -> list[dict[str, object]]:
    return [
        pack
        for submission in json.loads((sweep / "sweep.json").read_text())["submissions"]
        for pack in submission["packs"]
    ]


def test_four_saes_over_two_tasks_end_as_each_would_alone(grid: Grid, tmp_path: Path) -> None:
    alone, sweep = tmp_path / "alone", tmp_path / "sweep"
    assert run_here(*grid(alone, **FOUR), "hydra.launcher.compare=false").code == 0
    store = tmp_path / "store"
    done = run_here(*grid(sweep, **FOUR, store__dir=str(store)), *TWO_TASKS)
    assert done.code == 0, words(done)
    assert "4 to do in one Slurm job of 2 tasks, which share out 4" in words(done)
    assert len(sent(sweep)) == 1
    for name, folder in folders(alone).items():
        assert weights_digest(folders(sweep)[name]) == weights_digest(folder)
        assert metric_lines(folders(sweep)[name]) == metric_lines(folder)
    states = [read_state(folder) for folder in folders(sweep).values()]
    assert len({state.pid for state in states if state is not None}) == 2
    assert {state.slurm_job_id for state in states if state is not None} == {
        sent(sweep)[0]["job_id"]
    }
    # Between them, every shard was made once.
    logs = "".join(path.read_text() for path in sweep.glob(".packs/*/*/*.out"))
    made = [
        int(line.split("harvest: ")[1].split()[0].replace(",", ""))
        for line in logs.splitlines()
        if "harvest: " in line and " tokens in " in line
    ]
    assert sum(made) == 768, made


def kill_task(sweep: Path, rank: int) -> None:
    """Once every run has a checkpoint."""
    wait_for(lambda: (sweep / "sweep.json").is_file())
    wait_for(
        lambda: all(
            any(RunFiles(folder).checkpoints.glob("step-*")) for folder in folders(sweep).values()
        ),
        120,
    )
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        is_task = b"submitit.core._submit" in command and str(sweep).encode() in command
        if is_task and f"SLURM_PROCID={rank}".encode() in environment and b"srun" not in command:
            os.kill(int(folder.name), signal.SIGKILL)
            return
    raise AssertionError(f"no task {rank}")


def test_one_sae_over_two_tasks_is_that_of_one_but_for_rounding(grid: Grid, tmp_path: Path) -> None:
    alone, sweep = tmp_path / "alone", tmp_path / "sweep"
    assert run_here(*grid(alone), "hydra.launcher.compare=false").code == 0
    done = run_here(*grid(sweep), *TWO_TASKS)
    assert done.code == 0, words(done)
    assert "1 to do in one Slurm job of 2 tasks, which train one together" in words(done)
    ours, other = (
        load_file(folders(f)["job"] / "sae" / "sae_weights.safetensors") for f in (sweep, alone)
    )
    for name, value in other.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_a_task_that_is_killed_ends_the_job_which_then_goes_on(grid: Grid, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    command = [*grid(sweep, **LONG), *TWO_TASKS]
    process = start(*command)
    kill_task(sweep, 1)
    ended = finish(process)
    assert ended.code == 1, words(ended)
    (said,) = [line for line in ended.stdout.splitlines() if "gone" in line]
    assert "rank 1 of 2 is gone" in said and "the same command goes on from here" in said
    again = run_here(*command)
    assert again.code == 0, words(again)
    (folder,) = folders(sweep).values()
    assert "resuming at step" in (folder / "train.log").read_text()
    state = read_state(folder)
    assert state is not None and (state.state, state.attempt) == ("done", 2)
