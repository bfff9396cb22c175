"""The controller of L0, on plants whose answer is known; what it is for k-architectures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tcsae.base.errors import UserError
from tcsae.config import run_id
from tcsae.data.batches import Calibration
from tcsae.training.member import Member
from tcsae.training.sparsity import L0Controller

STEPS = 400


def follow(
    controller: L0Controller,
    power: float,
    shift: float,
    lag: float,
    steps: range,
    log_l0: float,
    drift: float = 0.0,
) -> float:
    """ln L0 of a plant that falls as coefficient^-power, with a lag, a top speed and noise.

    It also falls by itself, by `drift` over the whole run.
    """
    noise = random.Random(0)
    for step in steps:
        wanted = controller.target + shift - power * math.log(controller.multiplier(step).item())
        wanted -= drift * step / STEPS
        slower = min(1.0, (STEPS - step) / (0.2 * STEPS))  # as the learning rate falls
        log_l0 += max(-0.1, min(0.1, (wanted - log_l0) / lag)) * slower
        controller.observe(step, torch.tensor(math.exp(log_l0 + noise.gauss(0, 0.03))))
    return log_l0


@settings(max_examples=25, deadline=None)
@given(
    target=st.floats(4, 200),
    power=st.floats(0.5, 1.2),
    shift=st.floats(-1.5, 1.5),
    lag=st.floats(10, 40),
    lr=st.sampled_from([1e-4, 3e-4, 1e-3, 3e-3, 6e-3]),
)
# Configured so far off that the proportional part balances at an error of .6 to .9, where an
# integral that only small errors move never moves.
@example(target=4.0, power=0.5, shift=1.0, lag=10.0, lr=1e-3)
@example(target=8.0, power=0.5, shift=1.5, lag=40.0, lr=1e-3)
@example(target=200.0, power=0.5, shift=-1.5, lag=40.0, lr=1e-3)
def test_l0_ends_at_the_target_whatever_the_coefficient_was(
    target: float, power: float, shift: float, lag: float, lr: float
) -> None:
    controller = L0Controller(target, STEPS, "cpu", lr)
    log_l0 = follow(controller, power, shift, lag, range(STEPS), math.log(1100))
    assert math.exp(log_l0) == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("lr", [3e-3, 6e-3])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("lag", [3.0, 13.0])
def test_at_high_rates_l0_ends_at_the_target_though_it_falls_by_itself(
    lr: float, shift: float, lag: float
) -> None:
    """As features learn, fewer fire: with a third of the gains such runs ended 4 to 16 % low."""
    controller = L0Controller(32, STEPS, "cpu", lr)
    log_l0 = follow(controller, 0.8, shift, lag, range(STEPS), math.log(1100), drift=0.7)
    assert math.exp(log_l0) == pytest.approx(32, rel=0.05)


def test_noise_of_small_batches_does_not_swing_the_coefficient() -> None:
    """L0 is right and its measurement is not: gains under which the coefficient still moved tenfold
    made short runs end at 48 for 32."""
    controller, noise, multipliers = L0Controller(32, STEPS, "cpu"), random.Random(0), []
    for step in range(STEPS):
        multipliers.append(controller.multiplier(step).item())
        controller.observe(step, torch.tensor(32 * math.exp(noise.gauss(0, 0.1))))
    settled = multipliers[STEPS // 4 :]
    assert max(settled) / min(settled) < 2


def test_without_it_l0_ends_elsewhere() -> None:
    """The plant of the test above is no easy one: left alone, it is far off."""

    class Idle(L0Controller):
        def multiplier(self, step: int) -> torch.Tensor:
            return torch.ones(())

    log_l0 = follow(Idle(32, STEPS, "cpu"), 1.0, 1.0, 20, range(STEPS), math.log(1100))
    assert math.exp(log_l0) > 2 * 32


def test_a_saved_controller_goes_on_exactly() -> None:
    whole, first, second = (L0Controller(32, STEPS, "cpu") for _ in range(3))
    plant = (1.0, 1.0, 20.0)
    follow(whole, *plant, range(200), math.log(1100))
    half = follow(first, *plant, range(200), math.log(1100))
    second.load(first.state)
    follow(whole, *plant, range(200, 300), half)
    follow(second, *plant, range(200, 300), half)
    assert second.multiplier(300) == whole.multiplier(300)


def test_before_anything_was_seen_the_coefficient_is_as_configured() -> None:
    assert L0Controller(32, STEPS, "cpu").multiplier(0) == 1


@pytest.fixture
def config(tiny_gpt2: Path, texts: Path) -> Callable[..., object]:
    return lambda **changes: small_config(tiny_gpt2, texts, **changes)


def test_architectures_with_a_k_take_the_target_as_k(config: Callable[..., object]) -> None:
    steered = config(training__target_l0="12")
    assert steered.sae.k == 12  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"target_l0 = 12.5: sae=topk has a whole number"):
        config(training__target_l0="12.5")


def test_a_steered_penalty_is_warm_when_the_target_should_be_reached(
    config: Callable[..., Any],
) -> None:
    def weights(**changes: str) -> list[float]:
        steps = {"training__tokens": "12800", "training__sparsity_warmup": "1.0"}  # 100 steps
        member = Member(
            config(sae="standard", **steps, **changes),
            8,
            Calibration(1.0, math.inf, 0.0, torch.randn(16, 8)),
            "cpu",
            False,
        )
        found = []
        for member.step in (10, 30, 99):
            found.append(float(member._sparsity_weight()))
        return found

    # The controller has seen nothing yet: what is left is the warm-up alone.
    assert weights(training__target_l0="12") == pytest.approx([11 / 31, 1, 1])
    assert weights() == pytest.approx([11 / 101, 31 / 101, 100 / 101])


def test_a_target_is_part_of_what_a_run_is_and_none_is_not(config: Callable[..., object]) -> None:
    plain, steered = config(sae="standard"), config(sae="standard", training__target_l0="12")
    assert run_id(plain) != run_id(steered)  # type: ignore[arg-type]
    # Runs from before there was such a key keep their names.
    content = plain.dump()["training"]  # type: ignore[attr-defined]
    assert content["target_l0"] is None
