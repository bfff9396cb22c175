"""The state of runs and sweeps, from their files alone: on any machine, also while Slurm is down.

Needs nothing but the standard library, so that looking is quick.
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.base.run_files import SWEEP_FILE, RunFiles, is_sweep, runs_below
from tcsae.runs.state import LARGEST, WRITE_EVERY, RunState, read_object, read_state

STATE_ORDER = (
    "done",
    "failed",
    "lost",
    "interrupted",
    "unknown",
    "silent",
    "running",
    "queued",
)
LOST_AFTER = 3 * WRITE_EVERY
"""A run on this host that has no process and said nothing for so long was killed."""
SILENT_AFTER = 180.0
"""A run of which nothing else is known may be in trouble when it said nothing for so long."""
BORN_SLACK = 10.0
"""Seconds by which a clock may have been set between two looks at it."""
_TAIL_BYTES = 1 << 16


# ------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class RunStatus:
    """What a run is doing, judged at unix time `now`.

    `state` is one of STATES, or "lost" (killed without a word), "silent" (no word for a while; it
    may be well), "unknown" (a folder without a state that can be read).
    """

    folder: Path
    now: float
    state: str
    said: RunState | None = None
    """The run's own word."""
    heard: float | None = None
    """Unix time of the last sign of life."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The last whole line of metrics.jsonl."""
    info: dict[str, Any] = field(default_factory=dict)
    """final_info.json."""
    planned_steps: int | None = None
    checkpoint: int | None = None
    """Step of the newest checkpoint."""

    @property
    def is_here(self) -> bool:
        """Whether it is being worked on, as far as is known."""
        return self.state in ("running", "silent")

    @property
    def age(self) -> float | None:
        """Seconds since the last sign of life."""
        return None if self.heard is None else max(self.now - self.heard, 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the attempt began."""
        return max(self.now - self.said.started, 0.0) if self.said else 0.0

    @property
    def attempt(self) -> int | None:
        """Number of the attempt that runs, ran last, or (queued) comes next."""
        if self.said is None:
            return None
        return self.said.attempt + (self.state == "queued")

    @property
    def stage(self) -> str | None:
        return None if self.state == "done" or self.said is None else self.said.stage

    @property
    def progress(self) -> float | None:
        """Share of the stage that is done, 0 to 1."""
        if self.state == "done":
            return 1.0
        done: float | None
        if self.said is not None:
            done, total = self.said.done, self.said.total
        else:
            done, total = number_in(self.metrics, "step"), self.planned_steps
        return min(done / total, 1.0) if done is not None and total else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the stage while it runs, of the training once it has ended."""
        if self.said is not None and self.is_here:
            return self.said.rate if self.said.unit == "tokens" else None
        if self.state == "queued":
            return None
        known = self.info if "tokens_per_second" in self.info else self.metrics
        return number_in(known, "tokens_per_second")

    @property
    def seconds_left(self) -> float | None:
        """Of the stage, while it runs."""
        if self.state != "running" or self.said is None or self.said.seconds_left is None:
            return None
        return max(self.said.seconds_left - (self.age or 0.0), 0.0)

    @property
    def loss(self) -> float | None:
        """The total loss of the last step that was logged."""
        if "loss/total" in self.metrics:
            return number_in(self.metrics, "loss/total")
        return number_in(self.info, "final_loss")


def run_status(folder: Path, now: float | None = None) -> RunStatus:
    """What the run in `folder` is doing. A finished run is done, whatever its state.json says."""
    files = RunFiles(folder)
    now = time.time() if now is None else now
    said = read_state(files.path)
    is_done = files.is_finished
    heard = said.updated if said else _newest_change(files)
    return RunStatus(
        folder=files.path,
        now=now,
        state="done" if is_done else _judge(said, heard, now),
        said=said,
        heard=heard,
        metrics=_last_line(files.metrics),
        info=(read_object(files.final_info) or {}) if is_done else {},
        planned_steps=_planned_steps(read_object(files.config)),
        checkpoint=_newest_checkpoint(files.checkpoints),
    )


def _judge(said: RunState | None, heard: float | None, now: float) -> str:
    if said is None:
        return "queued" if heard is None else "unknown"
    if said.state != "running":
        return said.state
    age = now - said.updated
    if (
        age > LOST_AFTER
        and said.host == socket.gethostname()
        and not is_alive(said.pid, said.updated)
    ):
        return "lost"
    return "silent" if age > SILENT_AFTER else "running"


def number_in(content: dict[str, Any], key: str) -> float | None:
    """A number of a JSON object; None for what is not one, as for a NaN, which JSON lacks."""
    value = content.get(key)
    return value if isinstance(value, int | float) and abs(value) < LARGEST else None


def _newest_change(files: RunFiles) -> float | None:
    """When the run last wrote one of its files; None: no run was ever here."""
    times = []
    for file in files.marks:
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole JSON object of a file of lines; {} if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a kill, or still being written
            continue
        if isinstance(content, dict):
            return content
    return {}


def _planned_steps(config: dict[str, Any] | None) -> int | None:
    try:
        training, dataset = config["training"], config["dataset"]  # type: ignore[index]
        return math.ceil(
            training["tokens"] / (training["batch_contexts"] * dataset["context_size"])
        )
    except (TypeError, KeyError, ZeroDivisionError, OverflowError, ValueError):
        return None


def _newest_checkpoint(folder: Path) -> int | None:
    steps = (file.stem.removeprefix("step-") for file in folder.glob("step-*.safetensors"))
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def is_alive(pid: int, when: float) -> bool:
    """Whether the process of this host that had the number `pid` at unix time `when` still runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's, so it is there
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # another kind of Unix, or one that hides other people's processes
        return True
    status, *rest = stat.rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(rest[18]) / os.sysconf("SC_CLK_TCK")
    return status not in "ZX" and time.time() - age <= when + BORN_SLACK


# ------------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True)
class Job:
    """A row of the table."""

    number: int
    name: str
    status: RunStatus
    run_id: str | None = None
    submitted_as: str | None = None
    """The Slurm job of its last submission."""

    @property
    def state(self) -> str:
        return self.status.state

    @property
    def slurm_job_id(self) -> str | None:
        return (self.status.said and self.status.said.slurm_job_id) or self.submitted_as


@dataclass(frozen=True)
class Group:
    """A sweep, or runs in one folder."""

    folder: Path
    title: str
    jobs: list[Job]
    launcher: str | None = None
    command: list[str] = field(default_factory=list)
    """Arguments of the `python -m tcsae.train` that made the sweep."""
    is_sweep: bool = False
    warning: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Number of jobs by state, in the order of STATE_ORDER."""
        counted = Counter(job.state for job in self.jobs)
        return {state: counted[state] for state in STATE_ORDER if counted[state]}

    @property
    def is_over(self) -> bool:
        """Whether nothing can change any more without a new command."""
        return set(self.counts) <= {"done", "failed"}


def find_groups(folders: Sequence[Path], now: float | None = None) -> list[Group]:
    """Every sweep in or below the folders, and the runs of each folder that are in no sweep.

    Raises UserError for a folder that is not there, or holds neither.
    """
    groups: list[Group] = []
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        found = list(runs_below(folder, sweeps=True))
        runs = [path for path in found if not is_sweep(path)]
        groups += [_read_sweep(path, now) for path in found if is_sweep(path)]
        if runs:
            groups.append(Group(folder, str(folder), _jobs(runs, now)))
        elif not found:
            raise UserError(f"{folder} is neither a run nor a sweep, and there is none in it")
    return groups


def _jobs(runs: Sequence[Path], now: float | None) -> list[Job]:
    return [Job(n, run.resolve().name, run_status(run, now)) for n, run in enumerate(runs)]


def _read_sweep(folder: Path, now: float | None) -> Group:
    """A sweep.json that cannot be read leaves the runs that are there, and a warning."""
    try:
        content = read_json(folder / SWEEP_FILE)
        slurm_ids = {
            number: pack["job_id"]
            for submission in content.get("submissions", [])
            for pack in submission["packs"]
            for number in pack["jobs"]
        }
        jobs = [
            Job(
                number=int(job["number"]),
                name=str(job["name"]),
                status=run_status(folder / job["folder"], now),
                run_id=job["run_id"],
                submitted_as=slurm_ids.get(job["number"]),
            )
            for job in content["jobs"]
        ]
        launcher, command = content["launcher"], [str(word) for word in content["command"]]
        title = f"sweep {content['name']} ({launcher}): {folder}"
        return Group(folder, title, jobs, launcher, command, is_sweep=True)
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        runs = list(runs_below(folder))
        warning = f"{folder / SWEEP_FILE} is damaged: jobs that have no folder yet are not shown"
        return Group(folder, f"sweep: {folder}", _jobs(runs, now), is_sweep=True, warning=warning)


def seconds_left(jobs: Sequence[Job]) -> tuple[float, bool] | None:
    """(seconds, whether that is a lower bound) until all that runs or waits has ended.

    Finished jobs say how long one takes, and the number that run now how many go on at once. A
    bound where that is not known: without a finished job, or with a running one that says nothing
    of its stage. None: nothing runs, or nothing is known at all.
    """
    here = [job.status for job in jobs if job.status.is_here]
    n_queued = sum(job.state == "queued" for job in jobs)
    ended = [number_in(job.status.info, "wall_seconds") for job in jobs if job.state == "done"]
    known = [seconds for seconds in ended if seconds is not None]
    whole = statistics.median(known) if known else 0.0
    left = []
    for status in here:
        first = status.said is not None and status.said.attempt == 1
        by_others = whole - status.elapsed if first else 0.0
        left.append(max(status.seconds_left or 0.0, by_others, 0.0))
    if not any(left):
        return None
    if not known:  # one that waits takes at least as long as what can be seen of the others
        whole = min(gone + rest for gone, rest in zip((s.elapsed for s in here), left, strict=True))
    total = max(max(left), (sum(left) + n_queued * whole) / len(left))
    return total, not (known and all(left))
