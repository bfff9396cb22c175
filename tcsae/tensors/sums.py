"""Reductions of [N, F] tensors, and gradients to them, in as few passes as they need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 128


def column_sums(rows_NF: Tensor) -> Tensor:
    """Sums over tokens, [F] float32 or better.

    Matrix products are the quickest pass over memory. In bfloat16 the sum of each CHUNK of tokens
    is rounded (2^-9, at random); the sums over chunks are not.
    """
    wide = torch.promote_types(rows_NF.dtype, torch.float32)
    whole = len(rows_NF) // CHUNK * CHUNK
    ones_1C = rows_NF.new_ones(1, CHUNK)
    chunks_KCF = rows_NF[:whole].reshape(-1, CHUNK, rows_NF.shape[1])
    sums_F = (ones_1C @ chunks_KCF).to(wide).sum((0, 1))
    return sums_F if whole == len(rows_NF) else sums_F + rows_NF[whole:].sum(0, dtype=wide)


def position_sums(features_BTF: Tensor, place_BT: Tensor | None = None) -> Tensor:
    """Sums over contexts of what stands at each position, [T, F] float32 or better; with `place_BT`
    position t of context n stands at place_BT[n, t]. In bfloat16 each sum is rounded once."""
    wide = torch.promote_types(features_BTF.dtype, torch.float32)
    n_contexts, n_positions, d_sae = features_BTF.shape
    if place_BT is None:
        ones_1B = features_BTF.new_ones(1, n_contexts)
        return (ones_1B @ features_BTF.reshape(n_contexts, -1)).to(wide).view(n_positions, d_sae)
    position_T1 = torch.arange(n_positions, device=features_BTF.device)[:, None]
    chosen_TN = (position_T1 == place_BT.flatten()).to(features_BTF.dtype)
    return (chosen_TN @ features_BTF.flatten(0, 1)).to(wide)


class RowNorms(torch.autograd.Function):
    """Norms of the rows of [F, D], [F]."""

    @staticmethod
    def forward(ctx: Any, rows_FD: Tensor) -> Tensor:
        norm_F = rows_FD.norm(dim=1)
        ctx.save_for_backward(rows_FD, norm_F)
        return norm_F

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_F: Tensor) -> Any:
        rows_FD, norm_F = ctx.saved_tensors
        return rows_FD * (grad_F / norm_F.clamp(min=1e-12))[:, None]
