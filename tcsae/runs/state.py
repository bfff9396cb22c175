"""`state.json`: what a run says of itself while it works, written by the run, read by anybody."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from tcsae.base.errors import UserError
from tcsae.base.files import make_folder, write_json
from tcsae.base.run_files import RunFiles

log = logging.getLogger(__name__)

WRITE_EVERY = 5.0
"""Seconds between two writes of the same stage."""
LARGEST = 1e15
"""No number of a run is as large; what is, comes from a damaged file."""

States = Literal["queued", "running", "done", "failed", "interrupted"]
STATES: tuple[str, ...] = typing.get_args(States)
EndStates = Literal["done", "failed", "interrupted"]
_BEGUN = ("running", "done", "failed")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The content of `state.json`. Times are unix seconds, by the clock of `host`."""

    state: str
    stage: str | None = None
    """What is being done now: the name of a Progress."""
    done: int | None = None
    total: int | None = None
    unit: str = "tokens"
    """Of `done`, `total` and `rate`."""
    rate: float | None = None
    """Units a second."""
    seconds_left: float | None = None
    """Of the stage."""
    note: str | None = None
    message: str | None = None
    """Of a failure, in one line."""
    traceback: str | None = None
    host: str
    pid: int
    slurm_job_id: str | None = None
    attempt: int
    """How many times the run was begun; 0: queued for the first time."""
    started: float
    """When the attempt began."""
    updated: float


_HINTS = typing.get_type_hints(RunState)


# ------------------------------------------------------------------------------------- reading


def read_state(folder: Path) -> RunState | None:
    """The content of state.json; None if there is none, or it is damaged."""
    return _state_of(read_object(RunFiles(folder).state))


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None for a file that is absent, damaged or anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _state_of(content: dict[str, Any] | None) -> RunState | None:
    if content is None or content.get("state") not in STATES:
        return None
    known = {f.name: content[f.name] for f in fields(RunState) if f.name in content}
    if not all(_fits(value, _HINTS[name]) for name, value in known.items()):
        return None
    try:
        return RunState(**known)
    except TypeError:  # a field is missing
        return None


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return False
    if not isinstance(value, int | float):
        return isinstance(value, hint)
    # JSON writes 3.0 as it likes: a whole number is a float too.
    is_kind = isinstance(0.5, hint) or (isinstance(value, int) and isinstance(1, hint))
    return is_kind and 0 <= value < LARGEST


# ------------------------------------------------------------------------------------- writing


def slurm_job_id() -> str | None:
    """Of the job that this process is in, as Slurm's lists write it ("12_3" in an array)."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _state_now(state: States, attempt: int, slurm_job_id: str | None) -> RunState:
    return RunState(
        state=state,
        host=socket.gethostname(),
        pid=os.getpid(),
        slurm_job_id=slurm_job_id,
        attempt=attempt,
        started=time.time(),
        updated=time.time(),
    )


class StateFile:
    """Writes the `state.json` of the run in `folder`, from the one process that works on it.

    A state that cannot be written never stops the run: it is one warning.
    """

    def __init__(self, folder: Path, write_every: float = WRITE_EVERY) -> None:
        self.folder, self.write_every = Path(folder), write_every
        before = read_state(self.folder)
        self.state = _state_now("queued", before.attempt if before else 0, slurm_job_id())
        self._written = -math.inf
        self._warned = False

    def begin(self) -> None:
        """Another attempt begins, in this process."""
        before = read_state(self.folder)
        attempt = before.attempt + 1 if before else 1
        self.state = _state_now("running", attempt, slurm_job_id())
        self._write()

    def stage(
        self,
        what: str,
        done: int | None = None,
        total: int | None = None,
        unit: str = "tokens",
        rate: float | None = None,
        note: str | None = None,
    ) -> None:
        """Where the run is. Written at once for a new stage, else every `write_every` seconds."""
        is_new = what != self.state.stage
        rate = rate if rate is not None and 0 <= rate < LARGEST else None
        left = None
        if rate and done is not None and total is not None:
            left = max(total - done, 0) / rate
        self.state = replace(
            self.state,
            stage=what,
            done=done,
            total=total,
            unit=unit,
            rate=rate,
            seconds_left=left if left is not None and left < LARGEST else None,
            note=note or (None if is_new else self.state.note),
        )
        if is_new or time.monotonic() - self._written >= self.write_every:
            self._write()

    def end(
        self, state: EndStates, message: str | None = None, traceback: str | None = None
    ) -> None:
        """The attempt has ended; `message` becomes one line."""
        self.state = replace(
            self.state,
            state=state,
            rate=None,
            seconds_left=None,
            message=" ".join(message.split()) if message else None,
            traceback=traceback,
        )
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        self.state = replace(self.state, updated=time.time())
        try:
            write_json(RunFiles(self.folder).state, asdict(self.state))
        except (OSError, UserError) as error:
            if not self._warned:
                log.warning(f"the state of the run is not shown from here on ({error})")
            self._warned = True


def queued(folder: Path, slurm_job_id: str | None = None) -> None:
    """Say that a run waits for its (next) attempt; how far it came is kept. Makes the folder.

    Nothing is said of a run that has begun already, under the same Slurm job.
    """
    file = StateFile(folder)
    before = read_state(folder)
    if before and before.slurm_job_id == slurm_job_id is not None and before.state in _BEGUN:
        return
    file.state = replace(
        before or file.state,
        state="queued",
        rate=None,
        seconds_left=None,
        message=None,
        traceback=None,
        slurm_job_id=slurm_job_id,
    )
    try:
        make_folder(file.folder)
    except (OSError, UserError) as error:
        log.warning(f"the state of the run is not shown ({error})")
        return
    file._write()
