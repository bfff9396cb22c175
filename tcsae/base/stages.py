"""Where a run's time goes: seconds by stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

Seconds = dict[str, float]
"""By the name of a stage, in the order in which they came."""

_clock: ContextVar[Seconds | None] = ContextVar("clock", default=None)
"""Of each thread its own: jobs are measured side by side."""


@contextlib.contextmanager
def timing() -> Iterator[Seconds]:
    """The stages of the block, as they end. An outer block is not told of them."""
    seconds: Seconds = {}
    token = _clock.set(seconds)
    try:
        yield seconds
    finally:
        _clock.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the block as part of `name`, if anybody is timing. Stages do not nest."""
    started = time.monotonic()
    try:
        yield
    finally:
        if (seconds := _clock.get()) is not None:
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started


def in_words(seconds: Mapping[str, float]) -> str:
    """harvest 61 s, train 75 s: what took half a second or more, or else the longest."""
    shown = {name: f"{value:.0f} s" for name, value in seconds.items() if value >= 0.5}
    if not shown and seconds:
        name = max(seconds, key=lambda stage: seconds[stage])
        shown = {name: f"{seconds[name]:.1g} s"}
    return ", ".join(f"{name} {text}" for name, text in shown.items())


def account(shared: Seconds, own: Seconds, n_jobs: int) -> dict[str, Any]:
    """`seconds` of final_info.json: what `n_jobs` went through together, and what one did alone."""
    return {"shared_by": n_jobs, "shared": dict(shared), "own": dict(own)}
