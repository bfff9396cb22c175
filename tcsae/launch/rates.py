"""What this machine's CPU sustains, tried for a third of a second."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from tcsae.data.devices import bfloat16_is_native
from tcsae.launch.machine import Machine

SECONDS = 0.1
"""For each of three trials."""


@functools.cache
def measured_cpu() -> Machine:
    """With as many threads as this process has, beside whatever else the machine does now."""
    side = 1024
    left, right = torch.ones(side, side), torch.ones(side, side)
    float32 = 2 * side**3 / _seconds(lambda: left @ right) / 1e12
    bfloat16 = bfloat16_is_native("cpu")
    tflops = float32
    if bfloat16:
        short_left, short_right = left.bfloat16(), right.bfloat16()
        tflops = 2 * side**3 / _seconds(lambda: short_left @ short_right) / 1e12
    much = torch.ones(8 * 1024**2)
    out = torch.empty_like(much)
    bandwidth = 3 * much.nbytes / _seconds(lambda: torch.mul(much, much, out=out)) / 1e9
    return Machine(
        tflops,
        bandwidth,
        device="cpu",
        bfloat16=bfloat16,
        page_cache_gb=16,
        float32=float32,
        is_measured=True,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of one call: the median over as many as SECONDS hold."""
    work()  # threads and memory are made at the first
    taken: list[float] = []
    while sum(taken) < SECONDS:
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[len(taken) // 2]
