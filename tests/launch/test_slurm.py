"""On a real Slurm: failures, preemption, signals, cancelling, refusals, the closing job."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import REPOSITORY, Outcome, finish, run_apart, run_here, start, weights_digest
from sweeps import TOO_LARGE, Grid, folders, grid_maker, is_bad, wait_for, words

from tcsae.base.files import locked
from tcsae.runs.state import RunState, read_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm")]

SMALL_JOB = (
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",
    "hydra.launcher.poll_seconds=0.5",
    "hydra.launcher.pack=1",
)
LONG = {"training__tokens": "400000", "training__checkpoint_every": "500"}
"""Long enough to be interrupted, short enough to be waited for: 3125 steps."""


@pytest.fixture(scope="module")
def grid(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return grid_maker(tiny_gpt2, texts, tmp_path_factory.mktemp("store"))


def slurm_states(sweep: Path) -> dict[int, list[str]]:
    """Slurm's own account of every job of the last submission: all its states, in order."""
    packs = json.loads((sweep / "sweep.json").read_text())["submissions"][-1]["packs"]
    found = {}
    for pack in packs:
        command = ["sacct", "-D", "-X", "-n", "-P", "-o", "State", "-j", pack["job_id"]]
        states = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[pack["jobs"][0]] = [line.split()[0] for line in states.splitlines()]
    return found


def job_id(sweep: Path, name: str) -> str:
    state = read_state(folders(sweep)[name])
    assert state is not None and state.slurm_job_id is not None
    return state.slurm_job_id


def is_training(folder: Path, attempt: int) -> bool:
    """In that attempt or, where that was stopped before its first step, in a later one."""
    state: RunState | None = read_state(folder)
    # Its state is written every few seconds, which a short job may not last; its metrics at once.
    metrics = folder / "metrics.jsonl"
    return (
        state is not None
        and (state.state, state.stage) == ("running", "train")
        and state.attempt >= attempt
        and metrics.is_file()
        and metrics.stat().st_size > 0
    )


def disturb(sweep: Path, *plan: tuple[str, int, Callable[[str], None]]) -> None:
    """Do each thing of the plan to its job, once that trains in its attempt.

    All of them are watched for at once: which job trains first, and how long one alone on the
    machine takes, is Slurm's affair and the machine's.
    """
    left = list(plan)

    def all_done() -> bool:
        for step in tuple(left):
            name, attempt, action = step
            if is_training(folders(sweep)[name], attempt):
                left.remove(step)
                action(job_id(sweep, name))
        return not left

    wait_for(lambda: (sweep / "sweep.json").is_file())
    wait_for(all_done, told=lambda: f"{left} of {[read_state(f) for f in folders(sweep).values()]}")


def slurm(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def requeue(job: str) -> None:
    slurm("scontrol", "requeue", job)


def near_its_limit(job: str) -> None:
    slurm("scancel", "--signal=USR2", job)


def terminate(job: str) -> None:
    slurm("scancel", "--signal=TERM", job)


@pytest.fixture(scope="module")
def alone(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run that the others are held against."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    arguments = grid(folder, **LONG)[1:-1]
    outcome = run_apart(*arguments, f"hydra.run.dir={folder}")
    assert outcome.code == 0, outcome.stderr
    return folder


# ------------------------------------------------------------------- failures and preemption


HELD_UP = """\
import os, pathlib, time
hold = pathlib.Path(os.environ["HOLD"])
if "SLURM_JOB_ID" in os.environ and hold.exists():
    hold.with_name("pid").write_text(str(os.getpid()))
    while hold.exists():
        time.sleep(0.05)
"""


def test_a_job_preempted_while_python_starts_is_queued_again(grid: Grid, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HELD_UP)
    sweep, hold, pid = tmp_path / "sweep", tmp_path / "hold", tmp_path / "pid"
    hold.touch()
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    arguments = [*grid(sweep), *SMALL_JOB, "hydra.launcher.partition=low"]
    process = start(*arguments, PYTHONPATH=path, HOLD=str(hold))
    wait_for(lambda: pid.is_file() and pid.read_text())
    preempt("")
    wait_for(lambda: not Path("/proc", pid.read_text()).exists())
    hold.unlink()
    outcome = finish(process)
    assert outcome.code == 0, words(outcome)
    assert slurm_states(sweep)[0].count("PREEMPTED") + slurm_states(sweep)[0].count("REQUEUED") == 1
    state = read_state(folders(sweep)["job"])
    assert state is not None and (state.state, state.attempt) == ("done", 1)


@pytest.fixture(scope="module")
def rough(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A 2 x 3 grid: one job fails at its evaluation, one is preempted twice."""
    sweep = tmp_path_factory.mktemp("rough") / "sweep"
    arguments = [*grid(sweep, window="4,8", **LONG, **{"lambda": "0,0.1,0.2"}), *SMALL_JOB]
    arguments.append("hydra.launcher.partition=low")
    blocked = run_here(*arguments, "--dry-run")
    assert blocked.code == 0, blocked.stderr
    name = next(w for w in words(blocked).split() if w == "window=8,lambda=0.2")
    process = start(*arguments)
    disturb(
        sweep,
        (name, 1, lambda _: block_evaluation(folders(sweep)[name])),
        ("window=4,lambda=0.1", 1, preempt),
        ("window=4,lambda=0.1", 2, preempt),
    )
    return sweep, finish(process)


def block_evaluation(folder: Path) -> None:
    (folder / "eval").write_text("in the way")


def preempt(job: str) -> None:
    """Takes the node from jobs of the partition `low`, the asked one among them, for a moment."""
    cpus = subprocess.run(
        ["sinfo", "-h", "-o", "%c"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    options = ["-p", "high", "-c", cpus, "-n1", "-o", os.devnull, "--mem=100"]
    # Not waited for (--wait asks every 2 to 32 s, in which the preempted job may end).
    slurm("sbatch", *options, "--wrap", "sleep 1")


def test_five_results_one_failure_and_an_exit_code_that_says_so(
    rough: tuple[Path, Outcome],
) -> None:
    sweep, outcome = rough
    assert outcome.code == 1, words(outcome)
    assert "5 done, 1 failed" in outcome.stdout
    assert "tcsae: 1 of 6 jobs did not finish" in outcome.stderr
    states = slurm_states(sweep)
    assert [s[-1] for s in states.values()].count("COMPLETED") == 5
    assert states[5][-1] == "FAILED"


def test_the_traceback_of_a_failed_job_is_in_its_log(rough: tuple[Path, Outcome]) -> None:
    sweep, _ = rough
    state = read_state(folders(sweep)["window=8,lambda=0.2"])
    assert state is not None and state.state == "failed"
    logs = list(sweep.glob(f".packs/*/{state.slurm_job_id}/*.out"))
    assert len(logs) == 1
    assert "Traceback (most recent call last)" in logs[0].read_text()
    assert "eval" in logs[0].read_text()


def test_a_job_preempted_twice_ends_with_the_weights_of_an_undisturbed_one(
    rough: tuple[Path, Outcome], alone: Path
) -> None:
    sweep, _ = rough
    folder = folders(sweep)["window=4,lambda=0.1"]
    assert weights_digest(folder) == weights_digest(alone)
    state = read_state(folder)
    assert state is not None and state.attempt >= 3
    assert slurm_states(sweep)[1].count("REQUEUED") + slurm_states(sweep)[1].count("PREEMPTED") >= 2


def test_the_closing_job_compares_what_there_is(rough: tuple[Path, Outcome]) -> None:
    sweep, _ = rough
    comparison = json.loads((sweep / "comparison" / "comparison.json").read_text())
    statuses = [run["status"] for run in comparison["runs"]]
    assert statuses.count("unfinished") == 1
    assert statuses.count("used") + statuses.count("duplicate") == 5


def test_the_same_command_then_finishes_only_the_failed_job(
    rough: tuple[Path, Outcome], grid: Grid
) -> None:
    sweep, _ = rough
    (folders(sweep)["window=8,lambda=0.2"] / "eval").unlink()
    arguments = [*grid(sweep, window="4,8", **LONG, **{"lambda": "0,0.1,0.2"}), *SMALL_JOB]
    outcome = run_here(*arguments)
    assert outcome.code == 0, words(outcome)
    assert "1 done, 5 skipped" in outcome.stdout
    assert list(slurm_states(sweep)) == [5]


# ---------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("action", [near_its_limit, terminate, requeue])
def test_a_job_that_is_stopped_saves_and_goes_on_bit_for_bit(
    action: Callable[[str], None], grid: Grid, alone: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    process = start(*grid(sweep, tracking="offline", **LONG), *SMALL_JOB)
    disturb(sweep, ("job", 1, action))
    outcome = finish(process)
    assert outcome.code == 0, words(outcome)
    sessions = list((folders(sweep)["job"] / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2  # of one and the same W&B run
    identity = folders(sweep)["job"].name.rpartition("-")[2]
    assert {session.name.rpartition("-")[2] for session in sessions} == {identity}
    assert weights_digest(folders(sweep)["job"]) == weights_digest(alone)
    state = read_state(folders(sweep)["job"])
    assert state is not None and (state.state, state.attempt) == ("done", 2)
    log = (folders(sweep)["job"] / "train.log").read_text()
    steps = [
        int(line.split("at step ")[1].split()[0])
        for line in log.splitlines()
        if "resuming at step" in line
    ]
    assert len(steps) == 1 and steps[0] % 500  # saved when the signal came, not at an interval


def test_a_killed_process_loses_at_most_one_interval(
    grid: Grid, alone: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    arguments = [*grid(sweep, **LONG), *SMALL_JOB]
    process = start(*arguments)
    wait_for(lambda: any(sweep.glob("*/checkpoint/step-00000500.safetensors")))
    disturb(sweep, ("job", 1, lambda job: slurm("scancel", "--signal=KILL", "--full", job)))
    outcome = finish(process)
    assert outcome.code == 1
    assert run_apart(*arguments).code == 0
    assert weights_digest(folders(sweep)["job"]) == weights_digest(alone)
    assert "resuming at step" in (folders(sweep)["job"] / "train.log").read_text()


def test_a_cancelled_job_stays_cancelled_and_is_told(grid: Grid, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    process = start(*grid(sweep, **LONG), *SMALL_JOB)
    disturb(sweep, ("job", 1, lambda job: slurm("scancel", job)))
    outcome = finish(process)
    assert outcome.code == 1
    assert "CANCELLED, with no result" in outcome.stdout
    assert slurm_states(sweep)[0] == ["CANCELLED"]


def test_a_limit_too_short_for_any_progress_is_an_error_and_no_endless_loop(
    grid: Grid, tmp_path: Path
) -> None:
    sweep, store = tmp_path / "sweep", tmp_path / "store"
    assert run_here(*grid(tmp_path / "before", store__dir=str(store))).code == 0
    contexts = next((store / "contexts").iterdir())
    (contexts / "train.safetensors").unlink()
    with locked(contexts / ".lock"):  # what this job waits for takes longer than its limit
        process = start(*grid(sweep, store__dir=str(store), seed="1"), *SMALL_JOB)
        wait_for(lambda: any(sweep.glob("*/state.json")))
        wait_for(lambda: (state := read_state(folders(sweep)["job"])) and state.state == "running")
        near_its_limit(job_id(sweep, "job"))
        outcome = finish(process)
    assert outcome.code == 1
    assert "shorter than one interval: nothing was saved" in outcome.stdout


def test_the_same_command_while_jobs_run_watches_them_and_sends_nothing_twice(
    grid: Grid, alone: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    arguments = [*grid(sweep, **LONG), *SMALL_JOB]
    unwatched = [word for word in arguments if "poll_seconds" not in word]
    first = run_here(*unwatched, "hydra.launcher.wait=false")
    assert first.code == 0, words(first)
    wait_for(lambda: is_training(folders(sweep)["job"], 1))
    second = run_here(*arguments)
    assert second.code == 0, words(second)
    assert "1 have been sent before and have not ended" in words(second)
    assert "1 done" in second.stdout
    assert len(json.loads((sweep / "sweep.json").read_text())["submissions"]) == 1
    assert weights_digest(folders(sweep)["job"]) == weights_digest(alone)
    state = read_state(folders(sweep)["job"])
    assert state is not None and state.attempt == 1


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hydra.launcher.partition=nowhere"], "invalid partition specified: nowhere"),
        (
            ["hydra.launcher.gpus_per_node=64", "hydra.launcher.tasks_per_node=1"],
            "Requested node configuration is not available",
        ),
        (["hydra.launcher.gpus_per_node=64"], "one SAE over 64 ranks: training.batch_contexts = 8"),
        (["hydra.launcher.timeout_min=2"], "timeout_min = 2: shorter than one interval"),
        (["+hydra.launcher.additional_parameters.nonsense=1"], "unrecognized option"),
    ],
)
def test_what_slurm_cannot_do_is_one_line_and_leaves_nothing(
    options: list[str], message: str, grid: Grid, tmp_path: Path
) -> None:
    outcome = run_here(*grid(tmp_path / "sweep"), *SMALL_JOB, *options)
    assert message in outcome.refusal()
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_the_way_out_is_named(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, *_: None)
    outcome = run_here(*grid(tmp_path / "sweep"), *SMALL_JOB)
    assert "there is no Slurm on this machine" in outcome.refusal()
    assert "hydra/launcher=local" in outcome.refusal()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- packs


def test_packs_of_a_grid_run_on_gpus_and_harvest_once(grid: Grid, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    arguments = grid(
        sweep, store__dir=str(tmp_path / "store"), window="4,8", **{"lambda": f"0,0.1,{TOO_LARGE}"}
    )
    gpu = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=1"]
    outcome = run_here(*arguments, *SMALL_JOB[1:4], *gpu, "hydra.launcher.pack=3")
    assert outcome.code == 1, words(outcome)
    assert "4 done, 2 failed" in outcome.stdout
    states = slurm_states(sweep)
    assert {number: s[-1] for number, s in states.items()} == {0: "FAILED", 3: "FAILED"}
    ran = folders(sweep).items()
    done = [name for name, folder in ran if (folder / "final_info.json").exists()]
    assert len(done) == 4 and not any(is_bad(name) for name in done)
    logs = "".join(path.read_text() for path in sweep.glob(".packs/*/*/*.out"))
    asked = subprocess.run(
        ["sacct", "-X", "-n", "-P", "-o", "AllocTRES", "-j", job_id(sweep, done[0])],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "gres/gpu=1" in asked
    # Two processes at once: between them, every shard was made once.
    made = sum(
        int(line.split("harvest: ")[1].split()[0].replace(",", ""))
        for line in logs.splitlines()
        if "harvest: " in line and " tokens in " in line
    )
    assert made == 768


# ------------------------------------------------------------------------------------- a search


def test_a_search_chooses_its_next_point_from_what_slurm_jobs_came_to(
    grid: Grid, tmp_path: Path
) -> None:
    axes = {"lambda": "tag(log,interval(0.01,2))", "window": "2", "tracking": "disabled"}
    search = ("hydra/sweeper=optuna", "hydra.sweeper.objective=L_2", "hydra.sweeper.n_jobs=1")
    sweep = tmp_path / "sweep"
    outcome = run_here(*grid(sweep, **axes), *SMALL_JOB, *search, "hydra.sweeper.n_trials=2")
    assert outcome.code == 0, words(outcome)
    rows = list(csv.DictReader((sweep / "trials.csv").open()))
    objective = "consistency.metrics.L_2.energy_weighted"
    assert len(rows) == 2 and rows[0]["lambda"] != rows[1]["lambda"]
    for row in rows:
        info = json.loads((sweep / row["folder"] / "final_info.json").read_text())
        assert float(row[objective]) == info["consistency"]["metrics"]["L_2"]["energy_weighted"]
    jobs = json.loads((sweep / "sweep.json").read_text())["submissions"]
    sent = [pack["job_id"] for submission in jobs for pack in submission["packs"]]
    assert len(set(sent)) == 2, "each batch is sent to Slurm when the one before has ended"
