"""Progress with rate and time left: a bar in a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TextIO, TypeVar

log = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0
Item = TypeVar("Item")


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Log lines that do not tear the progress bar on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False) and sys.stderr.isatty():
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


_listener: ContextVar[Callable[[Progress], None] | None] = ContextVar("listener", default=None)
_is_silent = False


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Nothing is shown, logged or told of what begins during the block."""
    global _is_silent
    before, _is_silent = _is_silent, True
    try:
        yield
    finally:
        _is_silent = before


@contextlib.contextmanager
def listening(tell: Callable[[Progress], None]) -> Iterator[None]:
    """`tell` hears of every progress that this thread makes during the block; an inner block's
    hears instead."""
    token = _listener.set(tell)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """Counts `unit`s up to `total`; rate and time left come from the units done here.

    Every line goes to the log file; the console shows a bar if it is a terminal, else the lines.
    """

    def __init__(self, what: str, total: int, unit: str = "tokens", done: int = 0) -> None:
        from tqdm import tqdm

        self.what, self.total, self.unit = what, total, unit
        self.done = self.first = done
        self.note, self.silent = "", _is_silent
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=f" {unit}",
            unit_scale=True,
            disable=self.silent or not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
        )

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) / max(self.rate, 1e-9)

    def update(self, n: int, note: str = "") -> None:
        self.done, self.note = self.done + n, note
        self.bar.update(n)
        self._tell()
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        if time.monotonic() - self.last_line >= LOG_EVERY_SECONDS and self.done < self.total:
            self.last_line = time.monotonic()
            self._line(
                f"{self.what}: {self.done:,} of {self.total:,} {self.unit} "
                f"({100 * self.done / self.total:.0f} %), {self.rate:,.0f} {self.unit}/s, "
                f"{clock(self.seconds_left)} left" + (f"; {note}" if note else "")
            )

    def _line(self, text: str) -> None:
        if not self.silent:
            log.info(text, extra={"file_only": True})

    def _tell(self) -> None:
        tell = _listener.get()
        if tell is not None and not self.silent:
            tell(self)

    def __enter__(self) -> Progress:
        self._tell()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.bar.close()
        if kind is None and not self.silent:
            elapsed = time.monotonic() - self.started
            log.info(
                f"{self.what}: {self.done - self.first:,} {self.unit} in {clock(elapsed)} "
                f"({self.rate:,.0f} {self.unit}/s)"
            )


def shown(jobs: Iterable[Item], total: int) -> Iterator[Item]:
    """The same, with a bar in a terminal once it takes long."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return iter(tqdm(jobs, "check", total, unit=" jobs", leave=False, delay=2, disable=quiet))
