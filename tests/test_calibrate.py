"""A small calibration: a rate outside chance fails; `make calibrate` is the large one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import calibrate  # noqa: E402

from tcsae.base.progress import Progress  # noqa: E402

TRIALS = 40


@pytest.fixture(scope="module")
def progress() -> Progress:
    return Progress("calibrate", 100 * TRIALS, unit="trials")


@pytest.mark.parametrize("documents", [16, 32])
def test_intervals_hold_the_truth_as_often_as_they_say(documents: int, progress: Progress) -> None:
    found = calibrate.coverage(documents, TRIALS, False, progress)
    assert {"C_8", "L_2", "omega_squared", "density", "explained_variance", "l0"} <= set(found)
    wrong = {
        name: (held, given)
        for name, (held, given) in found.items()
        if calibrate.outside(held, given, calibrate.LEVEL)
    }
    assert not wrong


def test_equals_are_not_called_different_and_an_effect_is_found(progress: Progress) -> None:
    called = calibrate.comparisons(32, TRIALS, False, progress)
    assert not calibrate.outside(called.false, called.trials, calibrate.MOST_DIFFERENT, above=True)
    assert not calibrate.outside(called.found, called.trials, calibrate.POWER)


def test_a_baseline_does_not_differ_from_itself_at_another_k(progress: Progress) -> None:
    for grid, (wrong, given) in calibrate.itself(TRIALS, progress).items():
        assert not calibrate.outside(wrong, given, calibrate.MOST_DIFFERENT, above=True), grid


def test_a_rate_that_is_off_is_seen() -> None:
    assert calibrate.outside(28, 40, 0.95) and not calibrate.outside(36, 40, 0.95)
    assert calibrate.outside(10, 40, 0.05, above=True)
    assert not calibrate.outside(4, 40, 0.05, above=True)
