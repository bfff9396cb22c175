"""Progress: what it says, who hears of it, and silence."""

from __future__ import annotations

import logging

import pytest

from tcsae.base import progress
from tcsae.base.progress import Progress, listening, silenced


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[now], in seconds, as Progress sees it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_it_says_rate_and_time_left_of_what_was_done_here(
    caplog: pytest.LogCaptureFixture, time: list[float]
) -> None:
    caplog.set_level(logging.INFO)
    with Progress("read", 1000, done=200) as counter:
        time[0] += 20
        counter.update(100)
        assert (counter.rate, counter.seconds_left) == (5.0, 140.0)
        time[0] += 140
        counter.update(700)
    assert caplog.messages == [
        "read: 300 of 1,000 tokens (30 %), 5 tokens/s, 2:20 left",
        "read: 800 tokens in 2:40 (5 tokens/s)",
    ]


def test_the_inner_listener_hears_alone() -> None:
    outer: list[int] = []
    inner: list[int] = []
    with listening(lambda p: outer.append(p.done)):
        with listening(lambda p: inner.append(p.done)), Progress("a", 5) as counter:
            counter.update(2)
        Progress("b", 5).update(4)
    Progress("c", 5).update(5)
    assert (inner, outer) == ([0, 2], [4])


def test_what_begins_in_silence_stays_silent(
    caplog: pytest.LogCaptureFixture, time: list[float]
) -> None:
    caplog.set_level(logging.INFO)
    heard: list[int] = []
    with listening(lambda p: heard.append(p.done)):
        with silenced(), Progress("a", 5) as counter:
            time[0] += 60
            counter.update(2)
        assert (caplog.messages, heard) == ([], [])
        Progress("b", 5).update(1)
    assert heard == [1]
