"""SIGTERM, SIGINT and SIGUSR2 ask a job to save and stop; the handler only sets a flag."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from tcsae.base.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""SIGUSR2 is how a Slurm job hears that its time limit is near."""


class StopRequest:
    """A flag that a signal sets and that loops check between two steps."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.signal_name = signal.Signals(number).name

    def check(self) -> None:
        """Raises Interrupted if a signal has come; call it where everything is saved."""
        if self:
            raise Interrupted(f"{self.signal_name}: stopped, everything up to here is saved")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Installs the handlers (in the main thread) and puts the old ones back."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
