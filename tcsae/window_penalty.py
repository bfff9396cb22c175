"""Value and gradient of sum_j f_j^T Q f_j in its forms, written out for speed.

Shapes: B contexts, T positions, N = B * T tokens, F features, M entries of sparse codes, G bags.
`tcsae/consistency.py` makes Q and says what is computed; tests hold both forms to autograd's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from tcsae.sparse import SparseCodes
from tcsae.sums import GradientPart, column_sums

Form = Literal["window_variance", "scale_free", "slow"]
"""docs/method.md has the formulas."""
IN_CACHE = 512
"""Positions whose features stay in a processor's cache from one pass to the next."""
LARGEST_SHARE = 100.0
"""slow: no feature weighs more than this many times what it weighs in scale_free."""


def _normalised(form: Form, s2_F: Tensor, mean_F: Tensor, v_F: Tensor) -> tuple[Tensor, Tensor]:
    """(share, s2 / v) by feature; s2 counts share_j times.

    A feature without variance has neither.
    """
    alive_F = v_F > 1e-6 * mean_F.square() + torch.finfo(v_F.dtype).tiny
    share_F = alive_F.to(v_F.dtype)
    if form == "slow":
        typical = (v_F * share_F).sum() / share_F.sum().clamp(min=1)
        share_F = share_F * (typical / v_F.clamp(min=typical / LARGEST_SHARE)).nan_to_num()
    return share_F, torch.where(alive_F, s2_F / v_F, 0)


class WindowPenalty(torch.autograd.Function):
    """sum_j s2_j of features that are zero at invalid positions, in one of the forms.

    Plain: gradient 2 Q f_j / windows. Scale-free: the gradient of sum_j sg(v_j) s2_j / v_j,
    2 (Q f_j / windows - (s2_j / v_j) (f_j - mean_j) / N), with v_j the variance over the N valid
    positions of the batch: it has no component along f_j - mean_j, so it cannot be lowered by
    shrinking a feature. Slow: the same, a feature at a time times mean(v) / v_j, so that all weigh
    alike. Features without variance get neither value nor gradient.

    `sums_F`, the features' sums over positions (None for the plain form), carries the mean and its
    part of the gradient, one number a feature. The product runs in the features' own dtype
    (bfloat16 where the SAE's products do), sums in float32. What the forward pass makes of a few
    contexts is still in the cache when it is summed. Where there is a list `parts`, the gradient to
    the features is put there in its factors, for whoever made them (as of `Consistency.forward`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        features_BTF: Tensor,
        sums_F: Tensor | None,
        laplacian: Tensor,
        n_windows: Tensor,
        n_valid: Tensor,
        form: Form,
        parts: list[GradientPart] | None = None,
    ) -> Tensor:
        smooth_BTF, s2_F, square_F = _smoothed(features_BTF, laplacian, form != "window_variance")
        # The number of windows comes in afterwards: in bfloat16 it would round all alike.
        s2_F /= n_windows
        ctx.form, ctx.parts = form, parts
        if form == "window_variance":
            ctx.save_for_backward(smooth_BTF, n_windows)
            return s2_F.sum()
        assert sums_F is not None
        mean_F = sums_F / n_valid
        v_F = square_F / n_valid - mean_F.square()
        share_F, ratio_F = _normalised(form, s2_F, mean_F, v_F)
        pull_F = 2 * share_F * ratio_F / n_valid
        ctx.save_for_backward(smooth_BTF, n_windows, features_BTF, mean_F, pull_F, share_F)
        return (share_F * s2_F).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        smooth_BTF, n_windows, *rest = ctx.saved_tensors
        scale = 2 * grad / n_windows
        if ctx.form == "window_variance":
            return smooth_BTF * scale.to(smooth_BTF.dtype), *[None] * 6
        features_BTF, mean_F, pull_F, share_F = rest
        dtype, pull_F = features_BTF.dtype, grad * pull_F
        share_F, row_F = (scale * share_F).to(dtype), pull_F.to(dtype)
        if ctx.parts is not None:
            ctx.parts.append(GradientPart(smooth_BTF.flatten(0, 1), share_F, row_F))
            return None, pull_F * mean_F, *[None] * 5
        gradient_BTF = torch.mul(smooth_BTF, share_F).addcmul_(features_BTF, row_F, value=-1)
        return gradient_BTF, pull_F * mean_F, *[None] * 5


def _in_cache(*tensors_BT: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors [B, T, ...] a few contexts at a time; on another device than the CPU, whole."""
    n_contexts, n_positions = tensors_BT[0].shape[:2]
    is_cpu = tensors_BT[0].device.type == "cpu"
    contexts = max(IN_CACHE // n_positions, 1) if is_cpu else max(n_contexts, 1)
    return zip(*(tensor.split(contexts) for tensor in tensors_BT), strict=True)


def _smoothed(
    features_BTF: Tensor, laplacian: Tensor, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q f, sum of f Q f, sum of f^2 if `squares`) in the dtype of the features and in float32."""
    laplacian = laplacian.to(features_BTF.dtype).expand(len(features_BTF), -1, -1)
    smooth_BTF = torch.empty_like(features_BTF)
    sums_2F: list[Tensor | float] = [0.0, 0.0]
    held = None  # one piece of memory for all products: it stays in the cache
    for f_CTF, q_CTT, smooth_CTF in _in_cache(features_BTF, laplacian, smooth_BTF):
        torch.bmm(q_CTT, f_CTF, out=smooth_CTF)
        held = torch.empty_like(f_CTF) if held is None else held[: len(f_CTF)]
        for number, factor_CTF in enumerate((smooth_CTF, f_CTF) if squares else (smooth_CTF,)):
            torch.mul(f_CTF, factor_CTF, out=held)
            sums_2F[number] += column_sums(held.flatten(0, 1))
    return smooth_BTF, *sums_2F  # type: ignore[return-value]


class SparseWindowPenalty(torch.autograd.Function):
    """`WindowPenalty` of sparse codes, without making them dense.

    Sorted by feature and token, the entries of one feature in one context lie together: a bag. The
    bag's sum of f_u Q[u, :] is column j of Q f in that context, read where the bag has entries.
    Work and memory follow the number of entries, whatever the window. The gradient is that of the
    dense form at the entries; elsewhere the selection has none. The sums over a bag are made in the
    dtype of the SAE's products, as there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values_M: Tensor,
        codes: SparseCodes,
        laplacian: Tensor,
        n_windows: Tensor,
        n_valid: Tensor,
        form: Form,
    ) -> Tensor:
        n_positions, order_M = laplacian.shape[-1], codes.order_M
        f_M = values_M.index_select(0, order_M)
        feature_M, token_M = codes.sorted_feature_M, codes.sorted_token_M
        context_M, position_M = _split(token_M, n_positions)
        begins_M = torch.ones_like(feature_M, dtype=torch.bool)
        begins_M[1:] = (feature_M[1:] != feature_M[:-1]) | (context_M[1:] != context_M[:-1])
        begin_G = begins_M.nonzero()[:, 0]
        columns_GT = embedding_bag(
            token_M if len(laplacian) > 1 else position_M,
            laplacian.to(codes.dtype).flatten(0, 1),
            begin_G,
            per_sample_weights=f_M.to(codes.dtype),
            mode="sum",
        )
        begins_M[:1] = False  # the first bag is number 0
        at_M = torch.add(position_M, begins_M.cumsum(0), alpha=n_positions)
        smooth_M = columns_GT.view(-1).index_select(0, at_M).to(f_M)
        entries_M = torch.arange(len(f_M), device=f_M.device)

        def sums(per_entry_M: Tensor, factor_M: Tensor | None = None) -> Tensor:
            """Over each feature's entries, [F], of values or of products."""
            columns_M1, starts_F = per_entry_M[:, None], codes.start_F
            return embedding_bag(
                entries_M, columns_M1, starts_F, mode="sum", per_sample_weights=factor_M
            )[:, 0]

        s2_F = sums(smooth_M, f_M) / n_windows
        if form == "window_variance":
            gradient_M = smooth_M.mul_(2 / n_windows)
        else:
            mean_F, square_F = sums(f_M) / n_valid, sums(f_M, f_M) / n_valid
            share_F, ratio_F = _normalised(form, s2_F, mean_F, square_F - mean_F.square())
            s2_F, pull_F = share_F * s2_F, 2 * share_F * ratio_F / n_valid
            weight_M, pull_M, pull_mean_M = (
                of_F.index_select(0, feature_M)
                for of_F in (2 * share_F / n_windows, pull_F, pull_F * mean_F)
            )
            gradient_M = smooth_M.mul_(weight_M).addcmul_(pull_M, f_M, value=-1).add_(pull_mean_M)
        ctx.save_for_backward(torch.empty_like(values_M).index_copy_(0, order_M, gradient_M))
        return s2_F.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gradient_M,) = ctx.saved_tensors
        return gradient_M * grad, None, None, None, None, None


def _split(token_M: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    """(context, position) of tokens; a division takes several times as long as a shift."""
    bits = n_positions.bit_length() - 1
    if n_positions == 1 << bits:
        return token_M >> bits, token_M & (n_positions - 1)
    context_M = token_M.div(n_positions, rounding_mode="floor")
    return context_M, token_M - context_M * n_positions
