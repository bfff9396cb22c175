"""The JumpReLU SAE against its definition, and its estimators against a smoothed objective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tcsae.config.sae import JumpReLUConfig
from tcsae.sae.jumprelu import JumpReLUSAE

D_IN, D_SAE = 8, 20


def random_sae(seed: int = 0, **options: Any) -> JumpReLUSAE:
    generator = torch.Generator().manual_seed(seed)
    cfg = JumpReLUConfig(**{"d_sae": D_SAE, "initial_threshold": 0.2, "bandwidth": 0.2, **options})
    sae = JumpReLUSAE(cfg, D_IN, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    sae.constrain()
    return sae


def run(sae: JumpReLUSAE, x_BTD: Tensor, valid_BT: Tensor, warmup: float = 1.0) -> Any:
    dead_F = torch.zeros(D_SAE, dtype=torch.bool)
    return sae.training_forward(x_BTD, valid_BT, sparsity_warmup=warmup, dead_F=dead_F)


def pre_activations(sae: JumpReLUSAE, x_ND: Tensor) -> Tensor:
    return (x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc


def test_a_feature_is_its_pre_activation_above_its_threshold_and_zero_below() -> None:
    sae = random_sae()
    x_ND = torch.randn(50, D_IN)
    pre = pre_activations(sae, x_ND)
    for token, row in enumerate(sae.encode(x_ND).tolist()):
        for j, found in enumerate(row):
            p, threshold = pre[token, j].item(), sae.threshold[j].item()
            assert found == pytest.approx(p if p > threshold else 0.0, abs=1e-6)
    assert sae.threshold.min() >= 0 and ((pre > 0) & (pre < sae.threshold)).any()


def test_thresholds_start_at_their_share_of_the_inputs_norm_and_stay_at_or_above_zero() -> None:
    sae = JumpReLUSAE(JumpReLUConfig(d_sae=D_SAE, initial_threshold=0.01), 576)
    torch.testing.assert_close(sae.threshold, torch.full((D_SAE,), 0.24))
    assert sae.threshold_unit == 32 and math.frexp(sae.threshold_unit)[0] == 0.5
    with torch.no_grad():
        sae.scaled_threshold -= 1.0
    sae.constrain()
    assert torch.equal(sae.threshold, torch.zeros(D_SAE))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_the_step_penalty_is_the_number_of_features_that_fire(warmup: float) -> None:
    sae = random_sae(l0_coefficient=0.3)
    x_BTD, valid_BT = torch.randn(4, 6, D_IN), torch.rand(4, 6) > 0.4
    output = run(sae, x_BTD, valid_BT, warmup)
    l0 = (sae.encode(x_BTD[valid_BT]) > 0).sum(-1).float().mean()
    torch.testing.assert_close(output.losses["sparsity"], 0.3 * D_IN * warmup * l0)
    assert set(output.losses) == {"reconstruction", "sparsity"}


def test_the_estimators_are_the_papers_pseudo_derivatives_summed_entry_by_entry() -> None:
    sae = random_sae(l0_coefficient=0.3)
    x_BTD, valid_BT = torch.randn(6, 8, D_IN), torch.rand(6, 8) > 0.3
    output = run(sae, x_BTD, valid_BT)
    slope_BTF = torch.randn(6, 8, D_SAE)
    loss = (output.features * slope_BTF).sum() + output.losses["sparsity"]
    (found,) = torch.autograd.grad(loss, [sae.scaled_threshold])
    pre, slope = pre_activations(sae, x_BTD[valid_BT]).tolist(), slope_BTF[valid_BT].tolist()
    width, n_valid = sae.bandwidth, len(pre)
    for j, threshold in enumerate(sae.threshold.tolist()):
        wanted = 0.0
        for row, slopes in zip(pre, slope, strict=True):
            if abs(row[j] - threshold) < width / 2:
                wanted -= threshold / width * slopes[j] + 0.3 * D_IN / width / n_valid
        assert found[j].item() == pytest.approx(wanted * sae.threshold_unit, rel=1e-3, abs=1e-4)
    assert (found != 0).sum() > D_SAE / 2


def test_thresholds_move_as_the_expected_loss_asks() -> None:
    """Over many tokens the estimator is the slope of the loss that finite differences show."""
    sae = random_sae(l0_coefficient=0.05, bandwidth=0.05)
    x_BTD = torch.randn(1, 200_000, D_IN)
    valid_BT = torch.ones(1, 200_000, dtype=torch.bool)
    output = run(sae, x_BTD, valid_BT)
    (slope,) = torch.autograd.grad(sum(output.losses.values()), [sae.scaled_threshold])
    for j in (0, 7, 13):
        values, step = [], 0.05 / sae.threshold_unit
        for sign in (-1, 1):
            moved = random_sae(l0_coefficient=0.05, bandwidth=0.05)
            with torch.no_grad():
                moved.scaled_threshold[j] += sign * step
                values.append(sum(run(moved, x_BTD, valid_BT).losses.values()).item())
        assert slope[j].item() == pytest.approx((values[1] - values[0]) / (2 * step), rel=0.1)


def test_the_tanh_form_has_the_updates_losses_and_gradients() -> None:
    options = {"penalty": "tanh", "l0_coefficient": 0.2, "tanh_scale": 3.0}
    sae = random_sae(**options, preact_coefficient=0.01)
    x_BTD, valid_BT = torch.randn(4, 6, D_IN), torch.rand(4, 6) > 0.4
    output = run(sae, x_BTD, valid_BT, 0.5)
    x_ND, root = x_BTD[valid_BT], D_IN**0.5
    pre, threshold = pre_activations(sae, x_ND), sae.threshold
    near = (pre - threshold).abs() < sae.bandwidth / 2
    # threshold / bandwidth near the jump, towards the pre-activation and against the threshold.
    estimator = near * threshold.detach() / sae.bandwidth * (pre - threshold)
    features = (pre > threshold) * pre + estimator - estimator.detach()
    below = (threshold - pre).relu()
    losses = {
        "reconstruction": (sae.decode(features) - x_ND).square().sum(-1).mean(),
        "sparsity": 0.2 * D_IN * 0.5 * (3.0 / root * features).tanh().sum(-1).mean(),
        "preact": 0.01 * root * below.sum(-1).mean(),
    }
    torch.testing.assert_close(output.losses, losses)
    names = [name for name, _ in sae.named_parameters()]
    ours = torch.autograd.grad(sum(output.losses.values()), list(sae.parameters()))
    theirs = torch.autograd.grad(sum(losses.values()), list(sae.parameters()))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_the_tanh_form_starts_small_and_dense() -> None:
    sae = JumpReLUSAE(JumpReLUConfig(d_sae=D_SAE, penalty="tanh"), D_IN)
    torch.testing.assert_close(sae.W_enc, D_IN / D_SAE * sae.W_dec.T)
    x_ND = torch.randn(4000, D_IN) + 1
    sae.initialise_from_data(x_ND)
    density_F = (sae.encode(x_ND) > 0).float().mean(0)
    torch.testing.assert_close(density_F, torch.full((D_SAE,), 0.5), atol=1e-3, rtol=0)
    wide = JumpReLUSAE(JumpReLUConfig(d_sae=40_000, penalty="tanh"), D_IN)
    wide.initialise_from_data(x_ND[:200])
    l0 = (wide.encode(x_ND[:200]) > 0).sum(-1).float().mean()
    assert l0 == pytest.approx(10_000, rel=0.01)


def test_a_threshold_below_zero_of_another_library_lets_nothing_negative_through() -> None:
    sae = random_sae()
    tensors = {**sae.saelens_state().tensors, "threshold": torch.full((D_SAE,), -1.0)}
    sae.load_saelens({}, tensors)
    x_ND = torch.randn(20, D_IN)
    torch.testing.assert_close(sae.encode(x_ND), pre_activations(sae, x_ND).relu())


@pytest.mark.parametrize(
    "options", [{"penalty": "l2"}, {"bandwidth": 0.0}, {"initial_threshold": -0.1}]
)
def test_what_does_not_fit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        JumpReLUConfig(**{"d_sae": D_SAE, **options})
