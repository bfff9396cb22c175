"""Reductions of [N, F] tensors, and gradients to them, in as few passes as they need."""

from __future__ import annotations

from typing import Any, NamedTuple

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


def position_sums(rows_NF: Tensor, n_positions: int) -> Tensor:
    """Sums over contexts, [T, F] float32 or better, of rows that are whole contexts one after
    another. In bfloat16 each sum is rounded once."""
    wide = torch.promote_types(rows_NF.dtype, torch.float32)
    contexts_BX = rows_NF.reshape(-1, n_positions * rows_NF.shape[1])
    ones_1B = rows_NF.new_ones(1, len(contexts_BX))
    return (ones_1B @ contexts_BX).to(wide).view(n_positions, -1)


class PositionSums(torch.autograd.Function):
    """`position_sums` of features [B, T, F], differentiable; with `place_BT` as if position t of
    context n stood at place_BT[n, t]."""

    @staticmethod
    def forward(ctx: Any, features_BTF: Tensor, place_BT: Tensor | None = None) -> Tensor:
        ctx.shape, ctx.dtype, ctx.place_BT = features_BTF.shape, features_BTF.dtype, place_BT
        n_positions, rows_NF = features_BTF.shape[1], features_BTF.flatten(0, 1)
        if place_BT is None:
            return position_sums(rows_NF, n_positions)
        position_T1 = torch.arange(n_positions, device=rows_NF.device)[:, None]
        chosen_TN = (position_T1 == place_BT.flatten()).to(rows_NF.dtype)
        wide = torch.promote_types(rows_NF.dtype, torch.float32)
        return (chosen_TN @ rows_NF).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> Any:
        grad_TF = grad_TF.to(ctx.dtype)
        if ctx.place_BT is None:
            return grad_TF.expand(ctx.shape), None
        return grad_TF.index_select(0, ctx.place_BT.flatten()).view(ctx.shape), None


class GradientPart(NamedTuple):
    """A part smooth * share - measure * (f - mean) * pull of the gradient to features f, not yet
    made. `add_to` adds all of it but a row that is the same for every token, `row_F`."""

    smooth_NF: Tensor
    share_F: Tensor
    pull_F: Tensor
    mean_F: Tensor
    measure_N1: Tensor

    @property
    def row_F(self) -> Tensor:
        return self.pull_F * self.mean_F

    def add_to(self, gradient_RF: Tensor, features_RF: Tensor, first: int) -> None:
        """In place, the rows from `first` on."""
        rows = slice(first, first + len(gradient_RF))
        gradient_RF.addcmul_(self.smooth_NF[rows], self.share_F)
        # mean + measure * (f - mean), in one pass.
        drawn_RF = torch.lerp(self.mean_F, features_RF, self.measure_N1[rows])
        gradient_RF.addcmul_(drawn_RF, self.pull_F, value=-1)


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
