"""What tests of sweeps share: small grids, and what they left."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from helpers import Outcome, small_job, start

TOO_LARGE = "1e39"
"""A weight that no float32 holds: the first loss is infinite, and the job fails."""

Grid = Callable[..., list[str]]


def grid_maker(weights: Path, texts: Path, store: Path) -> Grid:
    """Arguments of a --multirun command in the folder `sweep`; changes as for `small_job`."""

    def build(sweep: Path, **changes: str) -> list[str]:
        fixed = {"store__dir": str(store), "layer": "1", **changes}
        job = small_job(weights, texts, "unused", **fixed)
        kept = [a for a in job if not a.startswith("hydra.run.dir")]
        return ["--multirun", *kept, f"hydra.sweep.dir={sweep}"]

    return build


def folders(sweep: Path) -> dict[str, Path]:
    """Run folders by the name of the job."""
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    return {job["name"]: sweep / job["folder"] for job in jobs}


def is_bad(name: str) -> bool:
    return "e+39" in name or "1e39" in name


def words(outcome: Outcome) -> str:
    return outcome.stderr + outcome.stdout


def wait_for(
    condition: Callable[[], object],
    seconds: float = 300,
    told: Callable[[], str] = lambda: "it did not come about",
) -> None:
    """`told`: what the failure says when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def started(size: int, *arguments: str, **env: str) -> list[subprocess.Popen[str]]:
    """The command in so many ranks, as srun would start them without --kill-on-bad-exit."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(*arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank), **env)
        for rank in range(size)
    ]
