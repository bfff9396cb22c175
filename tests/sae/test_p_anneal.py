"""The p-annealed SAE: its schedule, its penalty, and a strength that does not jump."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tcsae.config.sae import PAnnealConfig
from tcsae.sae.p_anneal import SMOOTHING, PAnnealSAE

D_IN, D_SAE = 8, 20


def random_sae(**options: Any) -> PAnnealSAE:
    generator = torch.Generator().manual_seed(0)
    sae = PAnnealSAE(PAnnealConfig(d_sae=D_SAE, **options), D_IN, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


def run(sae: PAnnealSAE, x_BTD: Tensor, valid_BT: Tensor, progress: float) -> dict[str, Tensor]:
    dead_F = torch.zeros(D_SAE, dtype=torch.bool)
    output = sae.training_forward(
        x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F, progress=progress
    )
    sae.after_step(output.codes, progress=progress)
    return output.losses


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(4, 6, D_IN, generator=generator)
    return x_BTD, torch.rand(4, 6, generator=generator) > 0.4


def test_the_exponent_goes_down_a_stairway_from_one_to_its_end() -> None:
    sae = random_sae(anneal_start=0.2, anneal_stages=4, p_end=0.2)
    steps = 1000
    exponents = [sae.scheduled_exponent(step / steps) for step in range(steps)]
    assert exponents[:200] == [1.0] * 200
    for stage, p in enumerate((0.8, 0.6, 0.4, 0.2)):
        begin = 200 + 200 * stage
        assert exponents[begin + 1 : begin + 199] == pytest.approx([p] * 198)
    assert sae.scheduled_exponent(1.0) == pytest.approx(0.2)


def test_the_penalty_is_the_sum_of_powers_of_valid_tokens_features() -> None:
    sae = random_sae(anneal_stages=1, p_end=0.5, l1_coefficient=0.7)
    x_BTD, valid_BT = batch()
    found = run(sae, x_BTD, valid_BT, 0.9)["sparsity"]
    e = SMOOTHING * D_IN**0.5
    codes = sae.encode(x_BTD[valid_BT]).flatten().tolist()
    total = sum((f + e) ** 0.5 - e**0.5 for f in codes if f > 0)
    wanted = 0.7 * D_IN**0.5 * sae.strength.item() * total / valid_BT.sum().item()
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_before_annealing_it_is_the_l1_penalty() -> None:
    sae = random_sae(l1_coefficient=0.7)
    x_BTD, valid_BT = batch()
    l1 = sae.encode(x_BTD[valid_BT]).sum(-1).mean()
    torch.testing.assert_close(run(sae, x_BTD, valid_BT, 0.1)["sparsity"], 0.7 * D_IN**0.5 * l1)


def test_the_strength_of_the_penalty_does_not_jump_when_the_exponent_falls() -> None:
    sae = random_sae(anneal_stages=5)
    x_BTD, valid_BT = batch()
    before = run(sae, x_BTD, valid_BT, 0.0)["sparsity"]
    for progress in (0.3, 0.5, 0.7, 0.99):
        torch.testing.assert_close(run(sae, x_BTD, valid_BT, progress)["sparsity"], before)
    assert sae.exponent.item() == pytest.approx(0.2) and sae.strength != 1
    # Between two falls it follows the features again.
    assert run(sae, 2 * x_BTD, valid_BT, 0.99)["sparsity"] != before


def test_a_batch_without_features_leaves_the_strength_alone() -> None:
    sae = random_sae()
    x_BTD, valid_BT = batch()
    run(sae, x_BTD, torch.zeros_like(valid_BT), 0.5)
    assert sae.strength == 1 and sae.exponent < 1


def test_small_features_are_pushed_harder_than_large_ones_but_not_without_bound() -> None:
    sae = random_sae(anneal_stages=1)
    f = torch.tensor([1e-30, 1e-3, 1.0, 10.0], requires_grad=True)
    sae._penalty(f, 0.2).backward()
    slope = f.grad.tolist()
    assert slope == sorted(slope, reverse=True) and slope[2] > 5 * slope[3]
    assert slope[0] == pytest.approx(0.2 * (SMOOTHING * D_IN**0.5) ** -0.8, rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"p_end": 0.0}, {"p_end": 1.5}, {"anneal_start": 1.0}, {"anneal_stages": 0}]
)
def test_what_does_not_fit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PAnnealConfig(d_sae=D_SAE, **options)
