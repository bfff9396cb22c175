"""The Matryoshka SAE against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tcsae.config.sae import BatchTopKConfig, MatryoshkaConfig, TopKConfig
from tcsae.sae.batchtopk import BatchTopKSAE
from tcsae.sae.formats.saelens import load_saelens, save_saelens
from tcsae.sae.matryoshka import MatryoshkaSAE
from tcsae.sae.topk import TopKSAE

D_IN, D_SAE = 8, 40


def random_sae(**options: Any) -> MatryoshkaSAE:
    generator = torch.Generator().manual_seed(0)
    cfg = MatryoshkaConfig(**{"d_sae": D_SAE, "k": 3, **options})
    sae = MatryoshkaSAE(cfg, D_IN, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


@pytest.mark.parametrize("fractions", [None, (0.2, 0.8), (0.1, 0.3, 0.6)])
def test_every_nested_dictionary_must_rebuild_the_input_alone(
    fractions: tuple[float, ...] | None,
) -> None:
    sae = random_sae(**({} if fractions is None else {"group_fractions": fractions}))
    x_BTD, valid_BT = torch.randn(4, 6, D_IN), torch.rand(4, 6) > 0.3
    dead_F = torch.zeros(D_SAE, dtype=torch.bool)
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F)
    x_ND, features = x_BTD[valid_BT], output.features[valid_BT]
    losses, width = [], 0
    for size in sae.cfg.group_sizes:
        width += size
        rebuilt = features[:, :width] @ sae.W_dec[:width] + sae.b_dec
        losses.append((rebuilt - x_ND).square().sum(-1).mean())
    assert width == D_SAE
    torch.testing.assert_close(output.losses["reconstruction"], losses[-1])
    torch.testing.assert_close(output.losses["inner"], sum(losses[:-1]))

    ours = torch.autograd.grad(
        sum(output.losses.values()), [sae.W_dec, sae.b_dec], retain_graph=True
    )
    # The encoder's share of b_dec's gradient reaches the plain loss through the features.
    theirs = torch.autograd.grad(sum(losses), [sae.W_dec, sae.b_dec])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_default_groups_are_the_papers_and_the_last_takes_the_rest() -> None:
    assert MatryoshkaConfig(d_sae=65_536).group_sizes == [2048, 4096, 8192, 16384, 34816]
    assert MatryoshkaConfig(d_sae=2304).group_sizes == [72, 144, 288, 576, 1224]
    assert MatryoshkaConfig(d_sae=33).group_sizes == [1, 2, 4, 8, 18]
    assert MatryoshkaConfig(d_sae=40, group_fractions=[0.2, 0.8]).group_sizes == [8, 32]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_group_alone_rebuilds_more_than_that_of_a_dictionary_without_nesting(
    seed: int,
) -> None:
    nested = MatryoshkaConfig(d_sae=D_SAE, k=2, group_fractions=(0.25, 0.75))
    plain = BatchTopKConfig(d_sae=D_SAE, k=2)
    strength_D = torch.tensor([9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    explained = []
    for cls, cfg in ((MatryoshkaSAE, nested), (BatchTopKSAE, plain)):
        generator = torch.Generator().manual_seed(seed)
        sae = cls(cfg, D_IN, generator)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        dead_F = torch.zeros(D_SAE, dtype=torch.bool)
        for _ in range(200):
            x_BTD = (torch.rand(8, 16, D_IN, generator=generator) < 0.25) * strength_D
            output = sae.training_forward(
                x_BTD, torch.ones(8, 16).bool(), sparsity_warmup=1.0, dead_F=dead_F
            )
            optimizer.zero_grad()
            sum(output.losses.values()).backward()
            optimizer.step()
            sae.constrain()
        x_ND = x_BTD.flatten(0, 1)
        error_ND = x_ND - sae.encode(x_ND)[:, :10] @ sae.W_dec[:10] - sae.b_dec
        variance = (x_ND - x_ND.mean(0)).square().sum()
        explained.append(1 - (error_ND.square().sum() / variance).item())
    assert explained[0] > 0.6 and explained[0] > explained[1] + 0.2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group_fractions": [0.5, 0.4]}, "add up to 0.9"),
        ({"group_fractions": [0.5, -0.5, 1.0]}, "group_fractions"),
        ({"group_fractions": [1.0]}, "group_fractions"),
        ({"d_sae": 20, "k": 3}, "without a feature at d_sae 20"),
        ({"k": 50}, "k is 50"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MatryoshkaConfig(**{"d_sae": D_SAE, **options})


def test_selected_by_token_the_codes_are_those_of_topk_in_training_and_in_use() -> None:
    sae = random_sae(selection="token")
    plain = TopKSAE(TopKConfig(d_sae=D_SAE, k=3), D_IN)
    plain.load_state_dict({name: value.detach() for name, value in sae.named_parameters()})
    x_BTD, valid_BT = torch.randn(4, 6, D_IN), torch.rand(4, 6) > 0.3
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=None)
    torch.testing.assert_close(output.features[valid_BT], plain.encode(x_BTD)[valid_BT])
    sae.after_step(output.codes, progress=0.5)
    torch.testing.assert_close(sae.encode(x_BTD), plain.encode(x_BTD))
    assert (sae.threshold == 0).all()
    assert (output.features > 0).sum(-1).max() == 3


def test_selected_by_token_it_is_saved_as_topk_and_read_as_it_was(tmp_path: Path) -> None:
    sae = random_sae(selection="token")
    sae.normalise_decoder()
    save_saelens(tmp_path, sae)
    read, cfg = load_saelens(tmp_path)
    x_ND = torch.randn(5, D_IN)
    assert cfg["architecture"] == "topk"
    assert isinstance(read, MatryoshkaSAE)
    assert read.cfg == sae.cfg
    torch.testing.assert_close(read(x_ND), sae(x_ND))
