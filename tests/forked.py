"""The command in a process of its own, without the eight seconds in which Python loads torch.

One server for each test worker imports all that a run needs, and waits. Whoever starts the command
gets a fork of it: a process with a number, signals and an end of its own, that has only the imports
behind it. What is tested before them (a `sitecustomize`, a job preempted while Python starts) takes
a process that is really started.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

LOADED = (
    *("tcsae.train", "tcsae.jobs.bank", "tcsae.launch.closing", "tcsae.report.trials"),
    *("hydra_plugins.tcsae_launchers", "transformer_lens", "transformers", "plotly", "wandb"),
)


# ------------------------------------------------------------------------------- the server


def serve() -> None:
    """Forks for each message on stdin. Returns in the fork alone, which is then the command."""
    import importlib

    for name in LOADED:
        importlib.import_module(name)
    requests = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child = os.fork()
            if child == 0:
                return become(json.loads(message), *fds)
            keep(child, socket.socket(fileno=fds[2]))
        for fd in fds:
            os.close(fd)


def keep(child: int, line: socket.socket) -> None:
    """Says who the child is and, when it has ended, how."""
    line.send(str(child).encode())
    _, status = os.waitpid(child, 0)
    line.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: dict[str, Any], out: int, err: int, line: int) -> None:
    import random

    import numpy

    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, number in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(fd, number)
    for fd in (nothing, out, err, line):
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv[1:] = request["arguments"]
    random.seed()
    numpy.random.seed()


# ------------------------------------------------------------------------------- the worker


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    env["PYTHONPATH"] = str(Path(__file__).parent.parent)
    # It ends when the socket is closed, at the latest with this process.
    subprocess.Popen([sys.executable, "-P", __file__], stdin=theirs, env=env)
    theirs.close()
    return ours


class Forked(subprocess.Popen[str]):
    """A fork of the server, handled as what subprocess.Popen starts."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        self.args, self.returncode, self._child_created = arguments, None, False
        self.stdin = self.stdout = self.stderr = None
        self._out, self._err = os.memfd_create("stdout"), os.memfd_create("stderr")
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"arguments": arguments, "env": env, "cwd": os.getcwd()}
        fds = [self._out, self._err, theirs.fileno()]
        socket.send_fds(_server(), [json.dumps(request).encode()], fds)
        theirs.close()
        said = self._line.recv(64)
        assert said, "the server of tests/forked.py has ended"
        self.pid = int(said)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._line.recv(64))
            self._line.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, input: str | None = None, timeout: float | None = None) -> Any:
        self.wait(timeout)
        found = []
        for fd in (self._out, self._err):
            with os.fdopen(fd, "rb") as file:
                file.seek(0)
                found.append(file.read().decode())
        return tuple(found)


if __name__ == "__main__":
    serve()
    from tcsae.train import main

    main()
