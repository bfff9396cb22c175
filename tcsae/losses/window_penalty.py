"""Value and gradient of the temporal loss in its forms, written out for speed.

Shapes: B contexts, T positions, N = B * T tokens, F features, M entries of sparse codes, G bags.
`tcsae/consistency.py` makes what a batch's windows and pairs weigh and says what is computed; tests
hold both forms to autograd's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tcsae.products import products_for
from tcsae.products.penalty import Weights
from tcsae.tensors.sparse import SparseCodes
from tcsae.tensors.sums import column_sums, position_sums

Form = Literal["window_variance", "scale_free", "slow"]
"""docs/method.md has the formulas."""
IN_CACHE = 512
"""Positions whose features stay in a processor's cache from one pass to the next."""
LARGEST_SHARE = 100.0
"""slow: no feature weighs more than this many times what it weighs in scale_free."""


def _normalised(form: Form, e_F: Tensor, mean_F: Tensor, v_F: Tensor) -> tuple[Tensor, Tensor]:
    """(share, e / v) by feature; e counts share_j times.

    A feature without variance has neither.
    """
    alive_F = v_F > 1e-6 * mean_F.square() + torch.finfo(v_F.dtype).tiny
    share_F = alive_F.to(v_F.dtype)
    if form == "slow":
        typical = (v_F * share_F).sum() / share_F.sum().clamp(min=1)
        share_F = share_F * (typical / v_F.clamp(min=typical / LARGEST_SHARE)).nan_to_num()
    return share_F, torch.where(alive_F, e_F / v_F, 0)


class WindowPenalty(torch.autograd.Function):
    """sum_j e_j of features that are zero at invalid positions, in one of the forms.

    Plain: the gradient of e_j, 2 M f_j with M its quadratic form. Scale-free: the gradient of
    sum_j sg(v_j) e_j / v_j, 2 (M f_j - (e_j / v_j) measure (f_j - mean_j) / total), with v_j the
    variance over the batch by the measure: it has no component along f_j - mean_j, so it cannot be
    lowered by shrinking a feature. Slow: the same, a feature at a time times mean(v) / v_j, so that
    all weigh alike. Features without variance get neither value nor gradient.

    The product runs in the features' own dtype (bfloat16 where the SAE's products do), sums in
    float32. What either pass makes of a few contexts is still in the cache when it is used again:
    beside f, M f and the gradient no tensor of their size is made.
    """

    @staticmethod
    def forward(ctx: Any, features_BTF: Tensor, weights: Weights, form: Form) -> Tensor:
        measure_BT = weights.measure_BT.to(features_BTF.dtype)  # rounded once, for all it is in
        measured = None if form == "window_variance" else measure_BT
        smooth_BTF, e_F, mean_F, square_F = _smoothed(features_BTF, weights.matrix(), measured)
        # The number of windows comes in afterwards: in bfloat16 it would round all alike.
        e_F = e_F / weights.n_windows
        half_TF = None
        if weights.spread_T is not None:
            between_F, half_TF = weights.between(position_sums(features_BTF, weights.place_BT))
            e_F = e_F + between_F
        kept = (smooth_BTF, weights.n_windows, half_TF, weights.place_BT)
        if form == "window_variance":
            ctx.save_for_backward(*kept)
            return e_F.sum()
        total = measure_BT.sum(dtype=square_F.dtype).clamp(min=1)
        mean_F = mean_F / total
        share_F, ratio_F = _normalised(form, e_F, mean_F, square_F / total - mean_F.square())
        pull_F = 2 * share_F * ratio_F / total
        ctx.save_for_backward(*kept, features_BTF, measure_BT, mean_F, pull_F, share_F)
        return (share_F * e_F).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        smooth_BTF, n_windows, half_TF, place_BT, *rest = ctx.saved_tensors
        scale, dtype = 2 * grad / n_windows, smooth_BTF.dtype
        rows_TF = None if half_TF is None else half_TF * (2 * grad)
        if not rest:
            gradient_BTF = smooth_BTF * scale.to(dtype)
        else:
            features_BTF, measure_BT, mean_F, pull_F, share_F = rest
            rows_TF = None if rows_TF is None else rows_TF * share_F
            factors_F = (scale * share_F, grad * pull_F, mean_F)
            gradient_BTF = _scale_free_gradient(
                smooth_BTF, features_BTF, measure_BT, *(of_F.to(dtype) for of_F in factors_F)
            )
        if rows_TF is not None:
            _add_by_position(gradient_BTF, rows_TF.to(dtype), place_BT)
        return gradient_BTF, None, None


def _scale_free_gradient(
    smooth_BTF: Tensor,
    features_BTF: Tensor,
    measure_BT: Tensor,
    share_F: Tensor,
    pull_F: Tensor,
    mean_F: Tensor,
) -> Tensor:
    """smooth * share - measure * (f - mean) * pull."""
    gradient_BTF = torch.empty_like(smooth_BTF)
    row_F = pull_F * mean_F
    for smooth_CTF, f_CTF, measure_CT1, gradient_CTF in _in_cache(
        smooth_BTF, features_BTF, measure_BT[..., None], gradient_BTF
    ):
        torch.addcmul(row_F, smooth_CTF, share_F, out=gradient_CTF)
        # mean + measure * (f - mean), in one pass; `row_F` gives the mean's part back.
        drawn_CTF = torch.lerp(mean_F, f_CTF, measure_CT1)
        gradient_CTF.addcmul_(drawn_CTF, pull_F, value=-1)
    return gradient_BTF


def _add_by_position(gradient_BTF: Tensor, rows_TF: Tensor, place_BT: Tensor | None) -> None:
    """In place: to each position its row, that of `place_BT` where there is one."""
    if place_BT is None:
        gradient_BTF.add_(rows_TF)
        return
    for gradient_CTF, place_CT in _in_cache(gradient_BTF, place_BT):
        gradient_CTF.add_(rows_TF[place_CT])


def _in_cache(*tensors_BT: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors [B, T, ...] as many contexts at a time as suits the device."""
    n_contexts, n_positions = tensors_BT[0].shape[:2]
    products = products_for(tensors_BT[0].device)
    contexts = products.at_once(n_contexts, max(IN_CACHE // n_positions, 1))
    return zip(*(tensor.split(contexts) for tensor in tensors_BT), strict=True)


def _smoothed(
    features_BTF: Tensor, within_BTT: Tensor, measure_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(within f, sum of f within f, sums of f and of f^2 by the measure) in the dtype of the
    features and, summed, in float32; without a measure the last two are 0."""
    within_BTT = within_BTT.to(features_BTF.dtype).expand(len(features_BTF), -1, -1)
    smooth_BTF = torch.empty_like(features_BTF)
    wide = torch.promote_types(features_BTF.dtype, torch.float32)
    energy_F, sum_F, square_F = features_BTF.new_zeros(3, features_BTF.shape[2], dtype=wide)
    weights_B1T = within_BTT[:, :1] if measure_BT is None else measure_BT[:, None]
    held = None  # one piece of memory for all products: it stays in the cache
    for f_CTF, within_CTT, weights_C1T, smooth_CTF in _in_cache(
        features_BTF, within_BTT, weights_B1T, smooth_BTF
    ):
        torch.bmm(within_CTT, f_CTF, out=smooth_CTF)
        held = torch.empty_like(f_CTF) if held is None else held[: len(f_CTF)]
        torch.mul(f_CTF, smooth_CTF, out=held)
        energy_F += column_sums(held.flatten(0, 1))
        if measure_BT is not None:
            sum_F += (weights_C1T @ f_CTF).to(wide).sum((0, 1))
            torch.mul(f_CTF, f_CTF, out=held)
            square_F += (weights_C1T @ held).to(wide).sum((0, 1))
    return smooth_BTF, energy_F, sum_F, square_F


class SparseWindowPenalty(torch.autograd.Function):
    """`WindowPenalty` of sparse codes, without making them dense.

    Work and memory follow the number of entries, whatever the window. The gradient is that of the
    dense form at the entries; elsewhere the selection has none.
    """

    @staticmethod
    def forward(
        ctx: Any, values_M: Tensor, codes: SparseCodes, weights: Weights, form: Form
    ) -> Tensor:
        normalised = None if form == "window_variance" else functools.partial(_normalised, form)
        products = products_for(values_M.device)
        value, gradient_M = products.window_penalty(codes, values_M, weights, normalised)
        ctx.save_for_backward(gradient_M)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gradient_M,) = ctx.saved_tensors
        return gradient_M * grad, None, None, None
