"""Passes and losses change nothing: called twice they say the same. What changes, `after_step`
changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saes import batch, dead_at, every_variant, make
from torch import Tensor

from tcsae.consistency import Consistency
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import TrainingOutput

PROGRESS = [0.0, 0.3, 0.6, 1.0]
"""p_anneal's exponent falls from each to the next."""
FORMS = ["none", "scale_free", "window_variance", "slow", "batch_history"]


def one_pass(sae: SparseAutoencoder, seed: int, progress: float) -> TrainingOutput:
    x_BTD, valid_BT = batch(seed)
    return sae.training_forward(
        x_BTD,
        valid_BT,
        sparsity_warmup=1.0,
        dead_F=dead_at(1, 2),
        progress=progress,
        generator=torch.Generator().manual_seed(seed),
    )


def state(module: torch.nn.Module) -> dict[str, Any]:
    """Tensors, and what numbers the module holds beside them."""
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, int | float)}
    return {**{k: v.clone() for k, v in module.state_dict().items()}, **numbers}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        for name, value in first.items()
    )


@every_variant
def test_a_training_pass_called_twice_says_the_same(name: str) -> None:
    sae, has_changed = make(name), False
    for seed, progress in enumerate(PROGRESS):
        before = state(sae)
        first, second = (one_pass(sae, seed, progress) for _ in range(2))
        assert same(state(sae), before)
        assert same(first.losses, second.losses)
        assert torch.equal(first.features, second.features)
        assert torch.equal(first.reconstruction, second.reconstruction)
        sae.after_step(first.codes, progress=progress)
        has_changed |= not same(state(sae), before)
    has_state = any(part in name for part in ("batchtopk", "matryoshka", "tsae", "p_anneal"))
    assert has_changed == (has_state and name != "matryoshka, token")


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("n_features", [None, 20])
@pytest.mark.parametrize("form", FORMS)
def test_a_penalty_called_twice_says_the_same(
    form: str, n_features: int | None, is_sparse: bool
) -> None:
    penalty = Consistency(form, 4, n_features=n_features, d_sae=64)
    sae, has_changed = make("topk"), False
    for seed in range(6):
        codes = one_pass(sae, seed, 0.0).codes
        valid_BT = batch(seed)[1]
        features = codes.sparse if is_sparse else codes.features_NF.view(*valid_BT.shape, -1)
        assert features is not None
        masks = {"segments": torch.zeros_like(valid_BT, dtype=torch.long), "valid": valid_BT}
        before = state(penalty)
        first, second = (penalty(features, **masks) for _ in range(2))
        assert torch.equal(first, second) and same(state(penalty), before)
        penalty.after_step(features, valid=valid_BT)
        has_changed |= not same(state(penalty), before)
    assert has_changed == (form == "batch_history")
