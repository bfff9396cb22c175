"""What may go from a disk: checkpoints of finished runs, runs that never finished, activations.

Needs nothing but the standard library, as looking (status.py) does.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.base.files import Lock, disk_errors, locked
from tcsae.base.run_files import ACTIVATIONS, IDENTITY, RunFiles
from tcsae.runs.status import find_groups

GONE = ("failed", "lost", "interrupted")
"""States of a run that nothing works on, and that has no result."""
DAY = 86_400.0


@dataclass(frozen=True)
class Leftover:
    """A folder that may go."""

    path: Path
    n_bytes: int
    said: str
    """What it is of, in a few words."""
    lock: Path | None = None
    """Held by whoever works there."""

    def remove(self) -> bool:
        """False: somebody works there. Raises UserError where the folder cannot be removed."""
        if self.lock is None:
            return self._remove()
        with locked(self.lock) as lock:
            return lock is not Lock.BUSY and self._remove()

    def _remove(self) -> bool:
        with disk_errors(self.path):
            shutil.rmtree(self.path)
        return True


def n_bytes(folder: Path) -> int:
    """Of the files in and below a folder; what goes away meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size if path.is_file() or path.is_symlink() else 0
    return total


Found = Sequence[tuple[str, RunFiles]]
"""(state, files) of runs."""


def checkpoints(runs: Found) -> list[Leftover]:
    """Of the finished ones."""
    return [
        Leftover(files.checkpoints, n_bytes(files.checkpoints), str(files.path), files.lock)
        for state, files in runs
        if state == "done" and files.checkpoints.is_dir()
    ]


def unfinished(runs: Found) -> list[Leftover]:
    """Those that have no result and that nothing works on."""
    return [
        Leftover(files.path, n_bytes(files.path), state, files.lock)
        for state, files in runs
        if state in GONE and files.path.is_dir()
    ]


def runs_in(folders: Sequence[Path]) -> list[tuple[str, RunFiles]]:
    """All that are in or below the folders. Raises UserError where there are none."""
    return [
        (job.state, RunFiles(job.status.folder))
        for group in find_groups(folders)
        for job in group.jobs
    ]


def stores(root: Path, unused_for: float, now: Callable[[], float] = time.time) -> list[Leftover]:
    """Activations in `root` (store.dir) that no run has begun to read for `unused_for` seconds.

    Raises UserError if `root` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give store.dir")
    found = []
    for folder in sorted((root / ACTIVATIONS).glob("*")):
        if (identity := folder / IDENTITY).is_file():
            age = now() - identity.stat().st_mtime
            if age >= unused_for:
                said = f"last used {age / DAY:.0f} days ago"
                found.append(Leftover(folder, n_bytes(folder), said))
    return found
