"""A real Slurm of one node, where one can be started."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY


def _why_not() -> str:
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        return "Slurm is not installed, and this is not Debian"
    return ""


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """scripts/start-slurm.sh, and its end; one that ran before is left running."""
    if reason := _why_not():
        pytest.skip(f"NOT TESTED: the real Slurm ({reason})")
    ran_before = subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0 if (
        shutil.which("scontrol")
    ) else False
    if not ran_before:
        _script("start-slurm.sh")
    yield
    if not ran_before:
        _script("stop-slurm.sh")


def _script(name: str) -> None:
    done = subprocess.run(
        ["bash", str(Path(REPOSITORY) / "scripts" / name)],
        env={**os.environ, "FAKE_CPUS": "8", "FAKE_GPUS": "4"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{name} failed:\n{done.stdout}\n{done.stderr}"
