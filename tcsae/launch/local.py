"""hydra/launcher=local: the packs in several processes of this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tcsae.base.errors import INTERRUPTED_EXIT_CODE
from tcsae.base.signals import StopRequest, stop_on_signal
from tcsae.config.launcher import LocalOptions, checked
from tcsae.launch.closing import write_sweep_page
from tcsae.launch.jobs import write_pack
from tcsae.launch.launcher import GridLauncher, Packs
from tcsae.launch.sweep_folder import PACKS, SweepFolder

log = logging.getLogger(__name__)

LOOK_EVERY = 0.2


class LocalLauncher(GridLauncher):
    kind = "local"

    @property
    def options(self) -> LocalOptions:
        return checked(LocalOptions, self.given)

    def processes(self) -> int | None:
        return self.options.processes

    def execute(self, sweep: SweepFolder, packs: Packs) -> dict[int, str]:
        folder = sweep.path / PACKS / f"local-{os.getpid()}-{int(time.time())}"
        folder.mkdir(parents=True)
        files = [folder / f"{index}.json" for index in range(len(packs))]
        for file, pack in zip(files, packs, strict=True):
            write_pack(file, pack, sweep.path)
        sweep.add_submission(packs, [None] * len(packs))
        log.info(f"logs of the processes: {folder}")
        with stop_on_signal() as stop:
            codes = _run(files, self.options, stop)
        if stop:
            log.warning(f"{stop.signal_name}: stopped; the same command goes on from here")
            sys.exit(INTERRUPTED_EXIT_CODE)
        if self.compares:
            write_sweep_page(sweep.path)
        said: dict[int, str] = {}
        for file, pack, code in zip(files, packs, codes, strict=True):
            if code:
                text = f"its process ended with code {code}: {file.with_suffix('.log')}"
                said |= {job.number: text for job in pack}
        return said


def _run(files: list[Path], options: LocalOptions, stop: StopRequest) -> list[int]:
    """The exit codes of all, in order; at most `processes` at once. A signal ends them softly."""
    waiting = list(enumerate(files))
    running: dict[int, subprocess.Popen[bytes]] = {}
    slots: dict[int, int] = {}
    codes: dict[int, int] = {}
    while running or (waiting and not stop):
        while waiting and len(running) < options.processes and not stop:
            index, file = waiting.pop(0)
            slots[index] = min(set(range(options.processes)) - {slots[i] for i in running})
            running[index] = _start(file, slots[index], options)
        for index, process in list(running.items()):
            if (code := process.poll()) is not None:
                codes[index] = code
                del running[index]
                log.info(f"{len(codes)} of {len(files)} processes ended (the last with {code})")
        if stop:
            for process in running.values():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            for index, process in running.items():
                codes[index] = process.wait()
            break
        time.sleep(LOOK_EVERY)
    return [codes.get(index, INTERRUPTED_EXIT_CODE) for index in range(len(files))]


def _start(file: Path, slot: int, options: LocalOptions) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if options.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(options.gpus[slot % len(options.gpus)])
    with _appended(file.with_suffix(".log")) as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tcsae.launch.worker", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C comes to this process, which then asks them to save
        )


@contextlib.contextmanager
def _appended(path: Path) -> Iterator[int]:
    with open(path, "ab") as file:
        yield file.fileno()
