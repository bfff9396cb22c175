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


class GradientPart(NamedTuple):
    """A part smooth * share - f * pull of the gradient to features f, not yet made."""

    smooth_NF: Tensor
    share_F: Tensor
    pull_F: Tensor

    def add_to(self, gradient_RF: Tensor, features_RF: Tensor, first: int) -> None:
        """In place, the rows from `first` on."""
        smooth_RF = self.smooth_NF[first : first + len(gradient_RF)]
        gradient_RF.addcmul_(smooth_RF, self.share_F).addcmul_(features_RF, self.pull_F, value=-1)


class ColumnSums(torch.autograd.Function):
    """`column_sums`, differentiable."""

    @staticmethod
    def forward(ctx: Any, rows_NF: Tensor) -> Tensor:
        ctx.like = rows_NF.shape, rows_NF.dtype
        return column_sums(rows_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_F: Tensor) -> Any:
        shape, dtype = ctx.like
        return grad_F.to(dtype).expand(shape)


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
