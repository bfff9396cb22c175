"""What the jobs of sweeps and runs are doing: as a table, as advice, as JSON."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tcsae.base.printable import visible
from tcsae.runs.status import Group, Job, RunStatus, seconds_left

MISSING = ("failed", "lost", "interrupted", "unknown")
"""States of jobs that have stopped and that a rerun of the command resumes."""
WIDTH = 100
MIN_NAME = 12
MAX_STAGE = 18
SLURM_LOGS = ".packs/**/{}_*log.*"
"""Where submitit keeps the logs of a job, below the sweep's folder."""
MAX_TOLD = 8
"""Jobs of one state that are told about below the table."""
_COLOURS = {"done": 32, "running": 36, "failed": 31, "lost": 31, "silent": 33, "interrupted": 33}


# ----------------------------------------------------------------------------- words and numbers


def duration(seconds: float) -> str:
    """45 s, 12 min, 2 h 05 min or 3 d 04 h; rounded to the nearest of its last unit."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes = int(seconds / 60 + 0.5)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = int(seconds / 3600 + 0.5)
    return f"{hours // 24} d {hours % 24:02d} h"


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters, the middle replaced by an ellipsis."""
    text = visible(text)
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return text[: width - 1 - end] + "…" + text[len(text) - end :]


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Names that do not fit lose the beginning they share, then their middles."""
    if len(names) > 1 and max(map(len, names)) > width:
        shared = os.path.commonprefix(list(names))
        cut = max(shared.rfind("-"), shared.rfind(",")) + 1
        names = [("…" if cut else "") + name[cut:] for name in names]
    return [shorten(name, width) for name in names]


def state_words(status: RunStatus) -> str:
    words = status.state
    if status.state == "silent" and status.age is not None:
        words += f" for {duration(status.age)}"
    if status.attempt is not None and status.attempt > 1:
        words += f", attempt {status.attempt}"
    return words


def _rate_words(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


# -------------------------------------------------------------------------------------- table


_HEAD = ("#", "job", "state", "stage", "done", "tokens/s", "left", "loss")
_RIGHT = (True, False, False, False, True, True, True, True)
_NAME, _STATE = 1, 2


def cells_of(job: Job) -> list[str]:
    status = job.status
    share, rate, left, loss = (
        status.progress,
        status.tokens_per_second,
        status.seconds_left,
        status.loss,
    )
    return [
        str(job.number),
        job.name,
        state_words(status),
        shorten(status.stage or "-", MAX_STAGE),
        # 99.9 % is not done yet.
        "-" if share is None else f"{math.floor(100 * share)} %",
        "-" if rate is None else _rate_words(rate),
        "-" if left is None else duration(left),
        "-" if loss is None else f"{loss:.4g}",
    ]


def table(jobs: Sequence[Job], width: int = WIDTH, colour: bool = False) -> list[str]:
    """Aligned lines of at most `width` characters where a name of `MIN_NAME` leaves the room."""
    rows = [cells_of(job) for job in jobs]
    sizes = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    others = sum(sizes) - sizes[_NAME] + 2 * (len(sizes) - 1)
    sizes[_NAME] = min(sizes[_NAME], max(width - others, MIN_NAME))
    for row, name in zip(
        rows, shorten_names([row[_NAME] for row in rows], sizes[_NAME]), strict=True
    ):
        row[_NAME] = name
    lines = []
    for row, state in zip([list(_HEAD), *rows], [None, *(j.state for j in jobs)], strict=True):
        cells = [
            cell.rjust(size) if is_right else cell.ljust(size)
            for cell, size, is_right in zip(row, sizes, _RIGHT, strict=True)
        ]
        if colour and state in _COLOURS:
            cells[_STATE] = f"\x1b[{_COLOURS[state]}m{cells[_STATE]}\x1b[0m"
        lines.append("  ".join(cells).rstrip())
    return lines


def summary(group: Group) -> str:
    """5 done, 1 failed, 2 running, 8 queued; about 12 min left"""
    parts = ", ".join(f"{count} {state}" for state, count in group.counts.items())
    estimate = seconds_left(group.jobs)
    if estimate is None:
        return parts or "no jobs"
    seconds, is_bound = estimate
    return f"{parts}; {'at least' if is_bound else 'about'} {duration(seconds)} left"


# -------------------------------------------------------------------------------- what to do next


def log_file(group: Group, job: Job) -> Path | None:
    """The newest log of a job: the one that Slurm kept, else the one in its folder."""
    slurm_id = job.slurm_job_id or ""
    found: list[Path] = []
    if slurm_id.replace("_", "").isalnum():
        found = list(group.folder.glob(SLURM_LOGS.format(slurm_id)))
    found = found or list(job.status.folder.glob("*.log"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _told(group: Group, job: Job) -> list[str]:
    """Lines about one job that is not well."""
    status, said, step = job.status, job.status.said, job.status.checkpoint
    ago = duration(status.age or 0.0)
    if job.state == "failed":
        message = (said and said.message) or "no message was kept"
        return [message, f"log: {log_file(group, job) or status.folder}"]
    if job.state == "lost" and said:
        again = "begins again" if step is None else f"goes on from the checkpoint at step {step}"
        return [f"killed without a word {ago} ago (process {said.pid}); run again, it {again}"]
    if job.state == "silent" and said:
        slurm = f"; squeue -j {job.slurm_job_id} says more" if job.slurm_job_id else ""
        return [f"no word for {ago} from process {said.pid} on {said.host}{slurm}"]
    logged = status.metrics.get("step")
    return [f"last heard {ago} ago" + (f" at step {logged}" if logged is not None else "")]


def advice(group: Group) -> list[str]:
    """One line for each problem, with what to do about it; empty if there is none."""
    lines = []
    for state in ("failed", "lost", "silent", "unknown"):
        jobs = [job for job in group.jobs if job.state == state]
        for job in jobs[:MAX_TOLD]:
            first, *more = _told(group, job)
            lines.append(f"{state}: {job.number} {shorten(job.name, 40)}: {first}")
            lines += [f"    {line}" for line in more]
        if len(jobs) > MAX_TOLD:
            lines.append(f"{state}: {len(jobs) - MAX_TOLD} more")
    if "failed" in group.counts:
        folder = shlex.quote(str(group.folder))
        lines.append(f"the tracebacks: python -m tcsae.status {folder} --failed")
    if any(state in group.counts for state in MISSING):
        lines.append(_how_to_go_on(group))
    return lines


def _how_to_go_on(group: Group) -> str:
    others = any(state in group.counts for state in ("running", "silent", "queued"))
    when = "once the others have ended, " if others else ""
    if not group.command:
        return f"{when}the command that began a run goes on with it"
    again = shlex.join(["python", "-m", "tcsae.train", *group.command])
    return f"{when}this runs what is missing: {again}"


def tracebacks(groups: Sequence[Group]) -> list[str]:
    """Of every failed job, under its name."""
    lines = []
    for group in groups:
        for job in group.jobs:
            if job.state != "failed":
                continue
            said = job.status.said
            kept = (said and (said.traceback or said.message)) or "no traceback was kept"
            where = log_file(group, job) or job.status.folder
            lines += [f"== {job.number} {job.name}", kept.rstrip(), f"log: {where}", ""]
    return lines[:-1] or ["no job has failed"]


# -------------------------------------------------------------------------------------- output


def text(
    groups: Sequence[Group],
    width: int = WIDTH,
    colour: bool = False,
    hidden: Collection[str] = (),
) -> str:
    """What the command prints; jobs in a state of `hidden` are only counted."""
    lines: list[str] = []
    for group in groups:
        shown = [job for job in group.jobs if job.state not in hidden]
        lines += [group.title]
        lines += [f"warning: {group.warning}"] if group.warning else []
        lines += table(shown, width, colour)
        if n_hidden := len(group.jobs) - len(shown):
            lines += [f"({n_hidden} more: {' or '.join(hidden)})"]
        lines += [summary(group), *advice(group), ""]
    return "\n".join(lines[:-1])


def fitting_text(groups: Sequence[Group], width: int, height: int, colour: bool) -> str:
    """The same, without the least interesting jobs if it needs more than `height` lines."""
    hidden: tuple[str, ...] = ()
    for hidden in ((), ("done",), ("done", "queued")):
        lines = text(groups, width, hidden=hidden).split("\n")
        if sum(max(-(-len(line) // width), 1) for line in lines) <= height:
            break
    return text(groups, width, colour, hidden)


def to_json(groups: Sequence[Group]) -> dict[str, Any]:
    """What the command prints with --json."""
    return {"groups": [_group_json(group) for group in groups]}


def _group_json(group: Group) -> dict[str, Any]:
    estimate = seconds_left(group.jobs)
    return {
        "folder": str(group.folder),
        "title": group.title,
        "is_sweep": group.is_sweep,
        "launcher": group.launcher,
        "command": group.command,
        "warning": group.warning,
        "counts": group.counts,
        "seconds_left": estimate and estimate[0],
        "seconds_left_is_lower_bound": estimate and estimate[1],
        "jobs": [_job_json(group, job) for job in group.jobs],
    }


def _job_json(group: Group, job: Job) -> dict[str, Any]:
    status, said = job.status, job.status.said
    log = log_file(group, job) if job.state == "failed" else None
    return {
        "number": job.number,
        "name": job.name,
        "run_id": job.run_id,
        "folder": str(status.folder),
        "state": job.state,
        "attempt": status.attempt,
        "stage": status.stage,
        "done": said and said.done,
        "total": said and said.total,
        "unit": said and said.unit,
        "progress": status.progress,
        "tokens_per_second": status.tokens_per_second,
        "seconds_left": status.seconds_left,
        "loss": status.loss,
        "note": said and said.note,
        "checkpoint_step": status.checkpoint,
        "last_heard": status.heard,
        "host": said and said.host,
        "pid": said and said.pid,
        "slurm_job_id": job.slurm_job_id,
        "message": said and said.message,
        "traceback": said and said.traceback,
        "log": str(log) if log else None,
    }
