"""The Gated SAE against its definition."""

from __future__ import annotations

import pytest
import torch

from tcsae.config.sae import GatedConfig
from tcsae.sae.gated import GatedSAE

D_IN, D_SAE = 8, 20


def random_sae(**options: float) -> GatedSAE:
    generator = torch.Generator().manual_seed(0)
    sae = GatedSAE(GatedConfig(d_sae=D_SAE, **options), D_IN, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


def test_a_feature_fires_by_its_gate_as_strongly_as_its_magnitude_says() -> None:
    sae = random_sae()
    x_ND = torch.randn(30, D_IN)
    gate = (x_ND - sae.b_dec) @ sae.W_enc + sae.b_gate
    magnitude = (x_ND - sae.b_dec) @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag
    wanted = (gate > 0) * magnitude.relu()
    torch.testing.assert_close(sae.encode(x_ND), wanted)
    assert ((gate > 0) & (magnitude <= 0)).any() and ((gate <= 0) & (magnitude > 0)).any()


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_losses_and_gradients_are_those_of_the_paper(warmup: float) -> None:
    sae, plain = random_sae(l1_coefficient=0.3), random_sae()
    x_BTD, valid_BT = torch.randn(4, 6, D_IN), torch.rand(4, 6) > 0.4
    output = sae.training_forward(
        x_BTD, valid_BT, sparsity_warmup=warmup, dead_F=torch.zeros(D_SAE, dtype=torch.bool)
    )
    sum(output.losses.values()).backward()

    x_ND = x_BTD[valid_BT]
    projected = (x_ND - plain.b_dec) @ plain.W_enc
    gate = (projected + plain.b_gate).relu()
    features = (gate > 0) * (projected * plain.r_mag.exp() + plain.b_mag).relu()
    frozen = gate @ plain.W_dec.detach() + plain.b_dec.detach()
    losses = {
        "reconstruction": (plain.decode(features) - x_ND).square().sum(-1).mean(),
        "sparsity": 0.3 * D_IN**0.5 * warmup * gate.sum(-1).mean(),
        "gate": (frozen - x_ND).square().sum(-1).mean(),
    }
    sum(losses.values()).backward()
    torch.testing.assert_close(output.losses, losses)
    torch.testing.assert_close(output.features[valid_BT], features)
    for (name, ours), theirs in zip(sae.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_heavier_penalty_leaves_fewer_features_on_and_does_not_shrink_them() -> None:
    fired, shrinkage = [], []
    for l1 in (0.01, 0.1):
        generator = torch.Generator().manual_seed(0)
        sae = GatedSAE(GatedConfig(d_sae=D_SAE, l1_coefficient=l1), D_IN, generator)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        dead_F = torch.zeros(D_SAE, dtype=torch.bool)
        for _ in range(400):
            x_BTD = 3 * (torch.rand(8, 16, D_IN, generator=generator) < 0.2)
            output = sae.training_forward(
                x_BTD, torch.ones(8, 16).bool(), sparsity_warmup=1.0, dead_F=dead_F
            )
            optimizer.zero_grad()
            sum(output.losses.values()).backward()
            optimizer.step()
            sae.constrain()
        x_ND = 3.0 * (torch.rand(2000, D_IN, generator=generator) < 0.2)
        fired.append((sae.encode(x_ND) > 0).sum(-1).float().mean().item())
        shrinkage.append((sae(x_ND).norm() / x_ND.norm()).item())
    assert fired[1] < 0.7 * fired[0]
    assert min(shrinkage) > 0.97


def test_a_resampled_feature_begins_with_both_paths_alike() -> None:
    sae = random_sae()
    dead_F = torch.arange(D_SAE) == 3
    sae.revive(dead_F, torch.optim.Adam(sae.parameters()), torch.randn(30, D_IN))
    for vector in (sae.r_mag, sae.b_gate, sae.b_mag):
        assert vector[3] == 0 and (vector[~dead_F] != 0).all()
