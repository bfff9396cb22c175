"""Several processes for one command, with torch.distributed on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    Outcome,
    digest,
    environment,
    finish,
    leftovers,
    metric_lines,
    run_apart,
    run_here,
    small_job,
    start,
    weights_digest,
)
from safetensors.torch import load_file
from sweeps import Grid, folders, free_port, grid_maker, started, wait_for, words

from tcsae.base import ranks
from tcsae.base.errors import UserError
from tcsae.base.run_files import RunFiles
from tcsae.runs.state import read_state

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def grid(tiny_gpt2: Path, texts: Path, store: Path) -> Grid:
    return grid_maker(tiny_gpt2, texts, store)


@pytest.fixture(scope="module")
def alone(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the grid: four SAEs."""
    sweep = tmp_path_factory.mktemp("alone") / "sweep"
    assert run_here(*grid(sweep, **FOUR)).code == 0
    return sweep


FOUR = {"window": "4,8", "lambda": "0.1,0.2"}


def together(size: int, *arguments: str) -> list[Outcome]:
    return [finish(process) for process in started(size, *arguments)]


def contents(store: Path) -> dict[str, str]:
    files = [path for path in store.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(store).as_posix(): digest(path) for path in files}


# ------------------------------------------------------------------------------- harvest


def test_a_store_of_four_ranks_is_that_of_one(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, alone: Path, store: Path
) -> None:
    job = small_job(tiny_gpt2, texts, "unused", layer="1", store__dir=str(tmp_path))
    job = [a for a in job if "hydra.run.dir" not in a]
    outcomes = together(4, "--harvest", *job)
    assert [outcome.code for outcome in outcomes] == [0] * 4, outcomes
    assert contents(tmp_path) == contents(store)
    assert leftovers(tmp_path) == []
    made = [(outcome.stderr + outcome.stdout).count("prepared:") for outcome in outcomes]
    assert made == [1, 0, 0, 0]  # one rank speaks


# ------------------------------------------------------------------------------- training


def test_four_saes_of_two_ranks_end_as_those_of_one(
    grid: Grid, alone: Path, store: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    first, second = together(2, *grid(sweep, **FOUR, store__dir=str(tmp_path / "store")))
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert "4 done" in first.stdout and second.stdout == ""
    assert "4 to do in 2 processes" in first.stderr
    assert contents(tmp_path / "store") == contents(store)
    for name, folder in folders(alone).items():
        other = folders(sweep)[name]
        assert weights_digest(folder) == weights_digest(other)
        assert metric_lines(folder) == metric_lines(other)
    pids = {state.pid for f in folders(sweep).values() if (state := read_state(f)) is not None}
    assert len(pids) == 2
    assert (sweep / "comparison" / "report.html").is_file()


LONG = {"training__tokens": "128000000", "training__checkpoint_every": "50"}
"""A million steps: never reached."""


def is_training(folder: Path) -> bool:
    return any(RunFiles(folder).checkpoints.glob("step-*"))


def test_the_death_of_a_rank_ends_the_job_which_then_goes_on(
    grid: Grid, alone: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    command = grid(sweep, **{**FOUR, "window": "4", **LONG})
    both = started(2, *command)
    wait_for(lambda: len([1 for f in sweep.glob("*") if is_training(f)]) == 2, 120)
    os.kill(both[1].pid, signal.SIGKILL)
    first, second = (finish(process) for process in both)
    assert first.code == 75 and second.code == -signal.SIGKILL
    lines = [line for line in first.stderr.splitlines() if "rank 1 of 2 is gone" in line]
    assert len(lines) == 1 and "the same command goes on from here" in lines[0]
    assert "Traceback" not in first.stderr
    again = started(2, *command)
    wait_for(
        lambda: all(
            (state := read_state(f)) is not None and state.attempt == 2 and (state.done or 0) > 0
            for f in folders(sweep).values()
        ),
        120,
    )
    for process in again:
        process.terminate()
    said = [finish(process) for process in again]
    assert [outcome.code for outcome in said] == [75, 75]
    logs = [(folder / "train.log").read_text() for folder in folders(sweep).values()]
    assert all("resuming at step" in log for log in logs)


def test_the_death_of_a_rank_that_trains_along_ends_the_run_which_then_goes_on(
    tiny_gpt2: Path, texts: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fixed = {"layer": "1", "store__dir": str(store)}
    job = small_job(tiny_gpt2, texts, run, **fixed, **LONG)
    both = started(2, *job)
    wait_for(lambda: is_training(run), 120)
    os.kill(both[1].pid, signal.SIGKILL)
    both[0].wait(timeout=60)  # seconds on a free machine: it hangs on no sum
    first, _ = (finish(process) for process in both)
    assert first.code == 75, words(first)
    said = [line for line in words(first).splitlines() if "rank 1 of 2 is gone" in line]
    assert len(said) == 1 and "the same command goes on from here" in said[0], words(first)
    assert "Traceback" not in words(first)
    state = read_state(run)
    assert state is not None and state.state == "interrupted"
    again = started(2, *job)
    wait_for(
        lambda: (s := read_state(run)) is not None and s.attempt == 2 and (s.done or 0) > 0, 120
    )
    for process in again:
        process.terminate()
    assert [finish(process).code for process in again] == [75, 75]
    assert "resuming at step" in (run / "train.log").read_text()


def test_one_run_of_two_ranks_is_that_of_one_but_for_rounding(
    tiny_gpt2: Path, texts: Path, store: Path, alone: Path, tmp_path: Path
) -> None:
    fixed = {"window": "4", "lambda": "0.1", "layer": "1", "store__dir": str(store)}
    first, second = together(2, *small_job(tiny_gpt2, texts, tmp_path / "run", **fixed))
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert "held-out results" in first.stdout and words(second) == ""
    one = folders(alone)["window=4,lambda=0.1"]
    weights = [load_file(f / "sae" / "sae_weights.safetensors") for f in (tmp_path / "run", one)]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-4, atol=1e-5)
    for ours, other in zip(metric_lines(tmp_path / "run"), metric_lines(one), strict=True):
        assert ours == pytest.approx(other, rel=1e-3, abs=1e-5)
    state = read_state(tmp_path / "run")
    assert state is not None and (state.state, state.attempt) == ("done", 1)


def test_torchrun_starts_a_run_of_its_own_as_it_is_alone(
    grid: Grid, alone: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    command = [*TORCHRUN, "--master-port", str(free_port()), "-m", "tcsae.train"]
    two = {"window": "4", "lambda": "0.1,0.2"}
    ended = subprocess.run(
        [*command, *grid(sweep, **two)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 done" in ended.stdout
    for name, folder in folders(sweep).items():
        assert weights_digest(folder) == weights_digest(folders(alone)[f"window=4,{name}"])


# ------------------------------------------------------------------------------- refusals


def refusal(outcomes: list[Outcome]) -> str:
    """The one line that all of them leave together."""
    assert all(outcome.code not in (0, 75) for outcome in outcomes), outcomes
    lines = [line for outcome in outcomes for line in outcome.messages]
    assert len(lines) == 1, lines
    return lines[0]


def test_ranks_of_two_configs_are_refused(grid: Grid, tmp_path: Path) -> None:
    port = str(free_port())
    processes = [
        start(
            *grid(tmp_path / "sweep", window="4", **{"lambda": weight}),
            **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank, weight in enumerate(("0.1", "0.3"))
    ]
    line = refusal([finish(process) for process in processes])
    assert line.startswith("tcsae: the ranks disagree in config: rank 0 has ")
    assert not (tmp_path / "sweep").exists()


def test_half_an_environment_is_refused() -> None:
    line = run_apart("model=other", WORLD_SIZE="2").refusal()
    assert "WORLD_SIZE = 2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in line


def test_launchers_of_their_own_are_refused(grid: Grid, tmp_path: Path) -> None:
    command = [*grid(tmp_path / "sweep", window="4,8"), "hydra/launcher=local"]
    ended = run_apart(
        *command, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="x", MASTER_PORT="1"
    )
    assert "hydra/launcher=local starts processes of its own" in ended.refusal()


SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[007-008],other3",
}


def test_srun_says_who_is_who() -> None:
    place = ranks.place_of(SRUN)
    assert (place.rank, place.size, place.local_rank, place.host) == (3, 4, 1, "node007")
    assert place.port == ranks.place_of({**SRUN, "SLURM_PROCID": "0"}).port
    assert ranks.place_of({**SRUN, "SLURM_STEP_NODELIST": "a1,b2"}).host == "a1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, without srun
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # what submitit starts
    ],
)
def test_one_process_is_alone(environ: dict[str, str]) -> None:
    assert ranks.place_of(environ) == ranks.ALONE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "2"}, "RANK = 2 with WORLD_SIZE = 2: ranks count from 0"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT = x: must be a whole number"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE = 2 without MASTER_ADDR"),
    ],
)
def test_wrong_places_are_refused(changes: dict[str, str], said: str) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    with pytest.raises(UserError, match=said):
        ranks.place_of({**given, "MASTER_PORT": "1", **changes})


def test_every_rank_gets_a_gpu_of_its_own_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_place", ranks.ALONE)
    monkeypatch.setattr(ranks, "_gpus_there", [])
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    torchrun = {"WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    found = {}
    for rank in range(3):
        environ = {**torchrun, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.begin(environ, tmp_path)
        found[rank] = environ.get("CUDA_VISIBLE_DEVICES"), ranks.gpu_problem()
    assert found[0] == ("0", None) and found[1] == ("1", None)
    assert found[2][1] is not None and "shows 2 GPUs: start at most 2 a machine" in found[2][1]
    bound = {**SRUN, "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"}
    ranks.begin(bound, tmp_path)
    assert bound["CUDA_VISIBLE_DEVICES"] == "0" and ranks.gpu_problem() is None
