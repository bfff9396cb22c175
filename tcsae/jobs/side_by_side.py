"""What the jobs of a bank measure each for itself, several at the same time.

A thread a job: products and sums of torch run beside each other, with as many of torch's own
threads as in a job alone, so that every number is the same to the last bit. What holds Python's
lock (clusters) is done in processes apart.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from tcsae.base.apart import Apart, Calls, here
from tcsae.base.progress import Progress, listening
from tcsae.base.signals import StopRequest
from tcsae.config import Config
from tcsae.data.stream import Stream
from tcsae.jobs.job import Examined, Job, Scored, examine

log = logging.getLogger(__name__)

MOST_AT_ONCE = 4
BYTES_A_FEATURE = 400_000
"""Memory that the measurements of a job take at their peak, for each feature: an estimate on the
safe side, of which the sums of the suite are 150,000."""
HELPER_BYTES = 500_000_000
"""Of the process that finds the clusters."""


def cores() -> int:
    """Those that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")  # where nothing binds the process to them
    return min(allowed or 1, int(given)) if given.isdigit() and int(given) else allowed or 1


def at_once(configs: Sequence[Config], device: str) -> int:
    """How many jobs are measured at the same time, their SAEs on `device`: as cores and free memory
    allow."""
    most = min(len(configs), cores(), MOST_AT_ONCE)
    if most < 2:
        return 1
    each = BYTES_A_FEATURE * max(config.sae.d_sae for config in configs)
    free = free_host_bytes() // (each + HELPER_BYTES)
    if device.startswith("cuda"):
        free = min(free_host_bytes() // HELPER_BYTES, torch.cuda.mem_get_info(device)[0] // each)
    return min(most, 1 + free // 2)


def free_host_bytes() -> int:
    """What this process may still take of the host's memory; 0 where nothing says so."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        free = 1024 * int({line[0]: line[1] for line in lines}["MemAvailable:"])
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return max(0, min(free, *(limit - own for limit in _limits())))
    return 0


def _limits() -> list[int]:
    """Bytes that Slurm, or the control group, gives to this job."""
    found = [sys.maxsize]
    with contextlib.suppress(OSError, ValueError):  # "max": none
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    whole, by_core = (
        int(os.environ.get(f"SLURM_MEM_PER_{of}", "0")) * 2**20 for of in ("NODE", "CPU")
    )
    return [*found, *(limit for limit in (whole, by_core * cores()) if limit)]


def side_by_side(
    scored: list[Scored], stream: Stream, n_at_once: int, stop: StopRequest
) -> Iterator[Examined]:
    """The jobs as they are measured, in their order. One that fails has its outcome, is closed,
    and is left out; the others go on.

    Takes the phases out of the list, so that a bank's memory goes back job by job.

    Raises Interrupted if a signal came.
    """
    waiting, n_jobs = [phase.job for phase in scored], len(scored)
    if n_at_once > 1 and stream.is_in_memory:
        log.info(f"measuring {n_jobs} jobs, {n_at_once} at the same time")
        yield from _in_threads(scored, stream, n_at_once, stop)
        return
    for index, job in enumerate(waiting):
        if n_jobs > 1:
            log.info(f"-- {index + 1} of {n_jobs}: {job.title}")
        with listening(partial(_tell_first, waiting[index:])):
            examined = _examined(stream, stop, here, scored.pop(0))
        if examined is not None:
            yield examined


def _in_threads(
    scored: list[Scored], stream: Stream, n_at_once: int, stop: StopRequest
) -> Iterator[Examined]:
    for phase in scored:
        phase.job.state.stage("waiting for its evaluation")
    with Apart(torch.get_num_threads()) as apart:
        pool = ThreadPoolExecutor(n_at_once, "measure")
        try:
            futures: list[Future[Examined | None]] = []
            while scored:
                futures.append(pool.submit(_in_thread, stream, stop, apart, scored.pop(0)))
            while futures:
                if (examined := futures.pop(0).result()) is not None:
                    yield examined
        finally:
            # After a signal: every thread looks for one between two batches.
            pool.shutdown(wait=True, cancel_futures=True)


def _in_thread(stream: Stream, stop: StopRequest, apart: Calls, phase: Scored) -> Examined | None:
    with listening(partial(tell, [phase.job])):
        return _examined(stream, stop, apart, phase)


def _examined(stream: Stream, stop: StopRequest, calls: Calls, phase: Scored) -> Examined | None:
    with phase.job.guarded():
        found = examine(stream, stop, calls, phase)
    if phase.job.outcome is None:
        return found
    phase.job.close()
    return None


def tell(jobs: Sequence[Job], progress: Progress) -> None:
    """What the jobs do now, into their state files."""
    p = progress
    for job in jobs:
        if job.outcome is None:
            job.state.stage(p.what, p.done, p.total, p.unit, p.rate, p.note)


def _tell_first(jobs: Sequence[Job], progress: Progress) -> None:
    """Of the job that is measured; behind it the others wait."""
    tell(jobs[:1], progress)
    for job in jobs[1:]:
        if job.outcome is None:
            job.state.stage("waiting for its evaluation")
