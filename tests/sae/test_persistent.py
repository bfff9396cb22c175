"""The Persistent SAE: its memory against a loop, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saes import batch, dead_at, make
from torch import Tensor

from tcsae.config.sae import LONGEST
from tcsae.sae.persistent import remember


def slow_memory(added: Tensor, l_F: Tensor, segments: Tensor, valid: Tensor) -> Tensor:
    """The recurrence as the docstring has it, a context and a token at a time."""
    contexts = []
    for b in range(len(added)):
        h, rows = torch.zeros_like(l_F), []
        for t in range(added.shape[1]):
            if t and segments[b, t] != segments[b, t - 1]:
                h = torch.zeros_like(l_F)
            if valid[b, t]:
                h = l_F * h + (1 - l_F) * added[b, t]
            rows.append(h if valid[b, t] else torch.zeros_like(h))
        contexts.append(torch.stack(rows))
    return torch.stack(contexts)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), positions=st.integers(1, 9))
def test_the_memory_and_its_gradients_are_those_of_the_recurrence(
    seed: int, positions: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, positions)
    segments = (torch.rand(shape, generator=generator) < 0.3).cumsum(1)
    valid = torch.rand(shape, generator=generator) > 0.3
    added = torch.rand(*shape, 5, generator=generator, dtype=torch.float64) * valid[..., None]
    l_F = torch.rand(5, generator=generator, dtype=torch.float64)
    weights = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    leaves = added.requires_grad_(), l_F.requires_grad_()
    found, wanted = (f(added, l_F, segments, valid) for f in (remember, slow_memory))
    torch.testing.assert_close(found, wanted)
    gradients = []
    for h in (found, wanted):
        nothing = 0 * (added.sum() + l_F.sum())  # the graph of a batch without a valid token
        gradients.append(torch.autograd.grad((h * weights).sum() + nothing, leaves))
    kept = valid[..., None]
    torch.testing.assert_close(gradients[0][0] * kept, gradients[1][0] * kept)
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


def test_a_feature_that_keeps_nothing_is_its_activation() -> None:
    added = torch.rand(2, 6, 4)
    places = torch.zeros(2, 6, dtype=torch.int32), torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(remember(added, torch.zeros(4), *places), added)


def test_retention_starts_where_it_is_told_and_stays_below_the_longest() -> None:
    sae = make("persistent", biased=False, initial_retention=0.3)
    torch.testing.assert_close(sae.retention, torch.full((64,), 0.3))
    with torch.no_grad():
        sae.theta.fill_(50.0)
    assert (sae.retention <= LONGEST).all() and sae.retention.min() > 0.99


def test_the_codes_are_the_remembered_top_k() -> None:
    sae = make("persistent")
    x_BTD, valid_BT = batch()
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_at())
    pre = (x_BTD - sae.b_dec) @ sae.W_enc + sae.b_enc
    least = pre.topk(4, dim=-1).values[..., -1:]
    added = torch.where(pre >= least, pre, 0).relu() * valid_BT[..., None]
    wanted = slow_memory(added, sae.retention, torch.zeros(3, 8), valid_BT)
    torch.testing.assert_close(output.features, wanted)
    torch.testing.assert_close(sae.encode(x_BTD, valid=valid_BT), wanted)


def test_the_shuffled_control_remembers_the_same_tokens_in_another_order() -> None:
    plain, shuffled = make("persistent"), make("persistent", shuffle_positions=True)
    x_BTD, valid_BT = batch(positions=12)
    options = {"sparsity_warmup": 1.0, "dead_F": dead_at()}
    found = []
    for sae in (plain, shuffled):
        generator = torch.Generator().manual_seed(0)
        found.append(sae.training_forward(x_BTD, valid_BT, generator=generator, **options))
    assert not torch.equal(found[0].features, found[1].features)
    assert found[1].features[~valid_BT].abs().sum() == 0
    with torch.no_grad():  # without a memory order means nothing
        for sae in (plain, shuffled):
            sae.theta.fill_(-60.0)
    alike = [sae.training_forward(x_BTD, valid_BT, **options).features for sae in (plain, shuffled)]
    torch.testing.assert_close(*alike)
    assert torch.equal(plain.encode(x_BTD), shuffled.encode(x_BTD)), "in use order is kept"


def test_k_beyond_d_sae_is_refused() -> None:
    with pytest.raises(ValueError, match="at most d_sae"):
        make("persistent", k=65)
