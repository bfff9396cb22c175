"""The ReLU SAE against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcsae.config.sae import StandardConfig
from tcsae.sae.standard import StandardSAE

D_IN, D_SAE = 8, 20


def random_sae(**options: float) -> StandardSAE:
    generator = torch.Generator().manual_seed(0)
    sae = StandardSAE(StandardConfig(d_sae=D_SAE, **options), D_IN, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


def run(sae: StandardSAE, x_BTD: Tensor, valid_BT: Tensor, warmup: float) -> dict[str, Tensor]:
    dead_F = torch.zeros(D_SAE, dtype=torch.bool)
    return sae.training_forward(x_BTD, valid_BT, sparsity_warmup=warmup, dead_F=dead_F).losses


def test_codes_and_reconstructions_are_the_formula() -> None:
    sae = random_sae()
    x_ND = torch.randn(30, D_IN)
    codes = ((x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc).clamp(min=0)
    torch.testing.assert_close(sae.encode(x_ND), codes)
    torch.testing.assert_close(sae(x_ND), codes @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_sparsity_is_the_decoder_weighted_l1_of_valid_tokens_times_the_warmup(
    warmup: float,
) -> None:
    sae = random_sae(l1_coefficient=0.7)
    x_BTD = torch.randn(4, 6, D_IN)
    valid_BT = torch.rand(4, 6) > 0.4
    total = 0.0
    for token in x_BTD[valid_BT]:
        features = sae.encode(token)
        total += sum(features[j].item() * sae.W_dec[j].norm().item() for j in range(D_SAE))
    wanted = 0.7 * D_IN**0.5 * warmup * total / valid_BT.sum().item()
    found = run(sae, x_BTD, valid_BT, warmup)["sparsity"].item()
    assert found == pytest.approx(wanted, rel=1e-5)


def test_gradients_are_those_of_the_plain_loss_also_on_b_dec() -> None:
    sae, plain = random_sae(l1_coefficient=0.3), random_sae(l1_coefficient=0.3)
    x_BTD, valid_BT = torch.randn(4, 6, D_IN), torch.rand(4, 6) > 0.4
    sum(run(sae, x_BTD, valid_BT, 1.0).values()).backward()
    x_ND = x_BTD[valid_BT]
    features = plain.encode(x_ND)
    squared = (plain.decode(features) - x_ND).square().sum(-1).mean()
    (squared + 0.3 * D_IN**0.5 * (features * plain.W_dec.norm(dim=1)).sum(-1).mean()).backward()
    for (name, ours), theirs in zip(sae.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_heavier_penalty_leaves_fewer_features_on() -> None:
    fired = []
    for l1 in (0.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        sae = StandardSAE(StandardConfig(d_sae=D_SAE, l1_coefficient=l1), D_IN, generator)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(150):
            x_BTD = torch.randn(8, 8, D_IN, generator=generator)
            loss = sum(run(sae, x_BTD, torch.ones(8, 8).bool(), 1.0).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sae.normalise_decoder()
        x_ND = torch.randn(500, D_IN, generator=generator)
        fired.append((sae.encode(x_ND) > 0).sum(-1).float().mean().item())
    assert fired[1] < 0.6 * fired[0]


def test_the_coefficient_defaults_to_the_first_experiments_and_may_not_be_negative() -> None:
    assert StandardConfig(d_sae=4).l1_coefficient == 0.04
    with pytest.raises(ValueError, match="l1_coefficient"):
        StandardConfig(d_sae=4, l1_coefficient=-0.1)
