"""Where the time goes: counted by stage, and kept with a run."""

from __future__ import annotations

import time

import pytest

from tcsae.base import stages


def test_seconds_are_counted_by_stage_and_belong_to_the_innermost_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def works(name: str, seconds: float) -> None:
        with stages.stage(name):
            now[0] += seconds

    works("nobody listens", 7.0)
    with stages.timing() as outer:
        works("harvest", 3.0)
        with stages.timing() as inner:
            works("pages", 2.0)
        works("train", 0.25)
        works("harvest", 1.5)
        with pytest.raises(ValueError), stages.stage("fails"):
            now[0] += 4.0
            raise ValueError
    assert outer == {"harvest": 4.5, "train": 0.25, "fails": 4.0} and inner == {"pages": 2.0}
    assert stages.in_words({**outer, "x": 60.6}) == "harvest 4 s, fails 4 s, x 61 s"
    assert stages.in_words({"a": 0.2, "b": 0.31}) == "b 0.3 s" and stages.in_words({}) == ""
