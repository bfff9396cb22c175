"""The status page of a sweep, written while a command waits for its jobs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.runs.status import find_groups

log = logging.getLogger(__name__)

WRITE_EVERY = 30.0
"""Seconds: how often browsers look."""


class StatusPage:
    """Writes it, at most every WRITE_EVERY seconds. A page that cannot be written is one warning:
    the waiting goes on."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self._written = -math.inf
        self._warned = False

    def write(self, said_by_slurm: Mapping[str, str], is_last: bool = False) -> None:
        """`said_by_slurm`: state and reason by job id; `is_last`: at once, for good."""
        if not is_last and time.monotonic() - self._written < WRITE_EVERY:
            return
        from tcsae.report.status_page import write_status_page

        self._written = time.monotonic()
        try:
            for group in find_groups([self.sweep]):
                write_status_page(group, said_by_slurm, again=not is_last)
        except (OSError, UserError) as error:
            if not self._warned:
                log.warning(f"no status page: {error}")
            self._warned = True
