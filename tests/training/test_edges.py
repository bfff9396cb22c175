"""What the temporal loss may not be gamed by, in training: energy moved to the edges of contexts.

Few windows hold the first positions. Of inputs that show their position early on, the first version
of the loss (variance over positions) made features of the edge; the fair one does not.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.config.sae import BatchTopKConfig
from tcsae.consistency import Consistency
from tcsae.sae.batchtopk import BatchTopKSAE

CONTEXTS, POSITIONS, D_IN, D_SAE, WINDOW, STEPS = 32, 32, 24, 64, 8, 600


def inputs(n_contexts: int, generator: torch.Generator) -> Tensor:
    """[n, T, d_in]: 48 sparse features, half of which last, and a direction that says how early
    the position is."""
    fixed = torch.Generator().manual_seed(5)
    directions = normalize(torch.randn(48, D_IN, generator=fixed), dim=1)
    early = normalize(torch.randn(1, D_IN, generator=fixed), dim=1)
    shape = (n_contexts, POSITIONS, 48)
    on = (torch.rand(shape, generator=generator) < 0.06).float()
    on = on * (1 + torch.rand(shape, generator=generator))
    held = torch.rand(n_contexts, POSITIONS, 24, generator=generator) < 0.8
    for t in range(1, POSITIONS):
        on[:, t, :24] = torch.where(held[:, t], on[:, t - 1, :24], on[:, t, :24])
    noise = 0.05 * torch.randn(n_contexts, POSITIONS, D_IN, generator=generator)
    decay = torch.exp(-torch.arange(POSITIONS) / 4.0)[:, None]
    return on @ directions + 3 * decay * early + noise


def edge_energy(penalty: Consistency | None) -> float:
    """Energy at the first W - 1 positions over that at the rest, of a BatchTopK SAE trained with
    the penalty at lambda 3."""
    generator = torch.Generator().manual_seed(0)
    cfg = BatchTopKConfig(d_sae=D_SAE, k=4, revival="none")
    sae = BatchTopKSAE(cfg, D_IN, generator=torch.Generator().manual_seed(1))
    sae.initialise_from_data(inputs(CONTEXTS, generator).flatten(0, 1))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    valid = torch.ones(CONTEXTS, POSITIONS, dtype=torch.bool)
    valid[:, 0] = False
    segments = torch.zeros(CONTEXTS, POSITIONS, dtype=torch.int32)
    for step in range(STEPS):
        x_BTD = inputs(CONTEXTS, generator)
        output = sae.training_forward(x_BTD, valid, sparsity_warmup=1.0, dead_F=None)
        loss = sum(output.losses.values())
        if penalty is not None:
            codes = output.codes.sparse
            assert codes is not None
            loss = loss + 3 * min(1, step / 60) * penalty(codes, segments=segments, valid=valid)
        optimizer.zero_grad()
        loss.backward()
        sae.project_decoder_gradient()
        optimizer.step()
        sae.constrain()
    with torch.no_grad():
        features = sae.encode(inputs(400, torch.Generator().manual_seed(9)))
    energy_T = features.square().sum(-1).mean(0)
    return (energy_T[1:WINDOW].mean() / energy_T[WINDOW:].mean()).item()


@pytest.fixture(scope="module")
def baseline() -> float:
    return edge_energy(None)


@pytest.mark.slow
def test_the_fair_loss_leaves_energy_by_position_as_it_was(baseline: float) -> None:
    assert edge_energy(Consistency("scale_free", WINDOW)) == pytest.approx(baseline, rel=0.15)


@pytest.mark.slow
def test_the_position_term_does_not_raise_it(baseline: float) -> None:
    """It may lower it: part of these inputs' energy early on is due to the position alone."""
    with_term = Consistency("scale_free", WINDOW, position_weight=1.0)
    assert edge_energy(with_term) < 1.15 * baseline


@pytest.mark.slow
def test_the_first_version_moved_it_to_the_edge(baseline: float) -> None:
    """The proof that the tests above can fail."""
    first = Consistency("scale_free", WINDOW, variance_over="positions")
    assert edge_energy(first) > 1.5 * baseline
