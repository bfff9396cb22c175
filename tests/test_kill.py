"""Killed, stopped, cut off from the network: the same command ends with the same weights.

Real processes and real signals. A job here: 60 shards, then 300 steps with a checkpoint every 10.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import (
    REPOSITORY,
    Outcome,
    finish,
    leftovers,
    metric_lines,
    run_apart,
    run_here,
    small_job,
    start,
    weights_digest,
    write_texts,
)

pytestmark = pytest.mark.slow

STEPS, INTERVAL, SHARDS = 300, 10, 60

BLOCKED = """
import os, socket

def refuse(address):
    with open(os.environ["TRIED_TO_CONNECT"], "a") as file:
        file.write(f"{address}\\n")
    raise OSError(f"no network in this test: {address}")

def guard(original):
    def connect(self, address, *rest):
        is_local = self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1")
        return original(self, address, *rest) if is_local else refuse(address)
    return connect

def getaddrinfo(host, *rest, original=socket.getaddrinfo, **more):
    local = (None, "", b"", "localhost", "127.0.0.1", "::1")
    return original(host, *rest, **more) if host in local else refuse(host)

socket.socket.connect = guard(socket.socket.connect)
socket.socket.connect_ex = guard(socket.socket.connect_ex)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("long"), documents=40, words=400)


@pytest.fixture(scope="module")
def job(tiny_gpt2: Path, long_texts: Path) -> Callable[..., list[str]]:
    def build(folder: Path, **changes: str) -> list[str]:
        return small_job(
            tiny_gpt2,
            long_texts,
            folder / "run",
            store__dir=str(folder / "store"),
            dataset__n_contexts="472",
            model__forward_contexts="1",
            training__tokens=str(STEPS * 8 * 16),
            training__checkpoint_every=str(INTERVAL),
            **{"lambda": "0.5", "layer": "1", **changes},
        )

    return build


class Cut:
    """A whole run, as it comes out when nothing disturbs it, and what it tried to reach."""

    def __init__(self, folder: Path, outcome: Outcome, tried: Path) -> None:
        self.folder, self.outcome, self.tried = folder, outcome, tried
        self.digest = weights_digest(folder / "run")


@pytest.fixture(scope="module")
def undisturbed(
    job: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Cut:
    """With no network: every socket but local ones is refused, and the attempt noted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(BLOCKED)
    outcome = run_apart(
        *job(folder, tracking="offline"),
        PYTHONPATH=f"{folder / 'site'}:{REPOSITORY}",
        TRIED_TO_CONNECT=str(folder / "tried"),
    )
    assert outcome.code == 0, outcome.stderr
    return Cut(folder, outcome, folder / "tried")


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("store/activations/*/0*.safetensors")))


def steps_in(folder: Path) -> int:
    """The last step in metrics.jsonl, as far as it is written."""
    file = folder / "run" / "metrics.jsonl"
    found = re.findall(r'"step": (\d+),', file.read_text()) if file.exists() else []
    return int(found[-1]) if found else 0


def newest_checkpoint(folder: Path) -> int:
    files = (folder / "run" / "checkpoint").glob("step-*.safetensors")
    return max((int(file.stem.removeprefix("step-")) for file in files), default=0)


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ----------------------------------------------------------------------------------- network


def test_a_whole_run_reaches_for_no_network(undisturbed: Cut) -> None:
    assert not undisturbed.tried.exists(), undisturbed.tried.read_text()
    assert undisturbed.outcome.messages == []
    assert list((undisturbed.folder / "run" / "wandb").glob("offline-run-*"))
    assert shards_in(undisturbed.folder) == SHARDS


# ------------------------------------------------------------------------------------- kill


def test_killed_at_five_random_moments_it_ends_with_the_weights_of_the_undisturbed_run(
    job: Callable[..., list[str]], undisturbed: Cut, tmp_path: Path
) -> None:
    chance = random.Random(20)
    moments = [("shards", chance.randrange(3, 28)), ("shards", chance.randrange(30, 58))]
    moments += [("steps", chance.randrange(*span)) for span in ((2, 90), (100, 190), (200, 280))]
    least = 0  # what the run must at least resume at
    for what, number in moments:
        reached = {"shards": shards_in, "steps": steps_in}[what]
        process = start(*job(tmp_path))
        wait_for(process, lambda r=reached, n=number: r(tmp_path) >= n)  # type: ignore[misc]
        time.sleep(chance.random() * 0.05)
        process.kill()
        outcome = finish(process)
        assert outcome.code == -signal.SIGKILL
        resumed = re.findall(r"resuming at step (\d+)", outcome.stdout)
        assert int(resumed[0]) >= least if least > 0 else not resumed
        least = max(0, steps_in(tmp_path) - INTERVAL)
    outcome = run_apart(*job(tmp_path))
    assert outcome.code == 0, outcome.stderr
    assert weights_digest(tmp_path / "run") == undisturbed.digest
    assert metric_lines(tmp_path / "run") == metric_lines(undisturbed.folder / "run")
    assert leftovers(tmp_path) == []


# ---------------------------------------------------------------------------- stop signals


def test_stopped_by_signals_it_saves_says_75_and_ends_with_the_same_weights(
    job: Callable[..., list[str]], undisturbed: Cut, tmp_path: Path
) -> None:
    process = start(*job(tmp_path))
    wait_for(process, lambda: shards_in(tmp_path) >= 20)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert outcome.code == 75, outcome.stderr
    assert outcome.messages == []
    assert "SIGTERM: stopped, everything up to here is saved" in outcome.stdout
    assert 20 <= shards_in(tmp_path) < SHARDS

    process = start(*job(tmp_path))
    wait_for(process, lambda: steps_in(tmp_path) >= 101)
    # While it is at work nobody else may be, and to ask does it no harm.
    process.send_signal(signal.SIGSTOP)
    assert "is in use by another process" in run_here(*job(tmp_path)).refusal()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    outcome = finish(process)
    assert outcome.code == 75, outcome.stderr
    assert "SIGINT: stopped, everything up to here is saved" in outcome.stdout
    saved = newest_checkpoint(tmp_path)
    assert steps_in(tmp_path) <= saved <= steps_in(tmp_path) + 1

    outcome = run_apart(*job(tmp_path))
    assert outcome.code == 0, outcome.stderr
    assert f"resuming at step {saved} of {STEPS}" in outcome.stdout
    assert weights_digest(tmp_path / "run") == undisturbed.digest
    assert metric_lines(tmp_path / "run") == metric_lines(undisturbed.folder / "run")


# -------------------------------------------------------------------------- finished is finished


def test_a_finished_run_is_not_repeated_and_is_quick(
    job: Callable[..., list[str]], undisturbed: Cut
) -> None:
    weights = undisturbed.folder / "run" / "sae" / "sae_weights.safetensors"
    before = weights.stat().st_mtime_ns
    started = time.monotonic()
    outcome = run_here(*job(undisturbed.folder, tracking="offline"))
    assert outcome.code == 0
    assert time.monotonic() - started < 10
    assert "already finished" in outcome.stdout
    assert weights.stat().st_mtime_ns == before
