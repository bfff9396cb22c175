"""Calls in processes of their own, for work that holds Python's lock while other threads wait.

A process is started when a call finds none idle, and serves one call after the other. Whatever is
sent and returned is pickled, between these two programs only. A process that is killed is no
error: its call is made here instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any, TypeVar

from tcsae.base.errors import Interrupted

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Calls = Callable[..., Any]
"""Called with a function and its arguments; gives its result."""

_SERVE = "import sys; sys.path[:] = sys.argv[1:]; from tcsae.base.apart import serve; serve()"
_LENGTH = 8


def here(function: Callable[..., Result], *args: Any, **named: Any) -> Result:
    """The call in this process: what stands for `Apart` where nothing goes on beside it."""
    return function(*args, **named)


class Apart:
    """Other processes that make calls; close it, or use it in a with block.

    Args:
        threads: of torch in each: as many as here, where the last bit counts.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._all: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, function: Callable[..., Result], *args: Any, **named: Any) -> Result:
        """`function(*args, **named)`, both of which can be pickled; raises what it raises.

        Raises Interrupted if it was closed meanwhile.
        """
        process = self._taken()
        try:
            ok, found = _ask(process, (function, args, named))
        except (OSError, EOFError):
            if self._closed:
                raise Interrupted("stopped, everything up to here is saved") from None
            code = process.wait()
            log.warning(f"a process that helped was ended ({code}): its work is done here instead")
            return function(*args, **named)
        with self._lock:
            self._idle.append(process)
        if not ok:
            raise found
        result: Result = found
        return result

    def _taken(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, *sys.path],  # the same modules as here
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
                start_new_session=True,  # Ctrl-C is for this process
            )
            self._all.append(process)
            return process

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._closed = True
        for process in self._all:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # of what was half sent
                        stream.close()


def _ask(process: subprocess.Popen[bytes], call: Any) -> Any:
    assert process.stdin is not None and process.stdout is not None
    _write(process.stdin, pickle.dumps(call, protocol=5))
    return pickle.loads(_read(process.stdout))


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(len(data).to_bytes(_LENGTH, "big"))
    file.write(data)
    file.flush()


def _read(file: IO[bytes]) -> bytes:
    """Raises EOFError where the other side has ended."""
    head = file.read(_LENGTH)
    data = file.read(int.from_bytes(head, "big")) if len(head) == _LENGTH else b""
    if len(head) < _LENGTH or len(data) < int.from_bytes(head, "big"):
        raise EOFError
    return data


def serve() -> None:
    """Make calls until nobody asks any more. What is printed goes to stderr."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all of a job: who asks decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            asked = _read(sys.stdin.buffer)
        except EOFError:
            return
        _write(answers, _answer(asked))


def _answer(asked: bytes) -> bytes:
    try:
        function, args, named = pickle.loads(asked)
        return pickle.dumps((True, function(*args, **named)), protocol=5)
    except Exception as error:
        error.add_note("in a process apart:\n" + "".join(traceback.format_exception(error)))
        try:
            return pickle.dumps((False, error))
        except Exception:  # whatever an error holds that cannot be sent
            return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
