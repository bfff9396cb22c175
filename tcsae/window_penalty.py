"""Value and gradient of sum_j f_j^T Q f_j in its forms, written out for speed.

Shapes: B contexts, T positions, N = B * T tokens, F features, k entries a token, M = N * k, G bags.
`tcsae/consistency.py` makes Q and says what is computed; tests hold both forms to autograd's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tcsae.sparse import SparseCodes

Form = Literal["window_variance", "scale_free", "slow"]
"""docs/method.md has the formulas."""
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


def _column_sums(rows_BTF: Tensor) -> Tensor:
    """Sums over contexts and positions, [F] float32 or better.

    Matrix products are the quickest pass over memory. In bfloat16 each context's sum is rounded
    (2^-9, at random); the sums over contexts are not.
    """
    ones = rows_BTF.new_ones(1, rows_BTF.shape[1])
    per_context_BF = (ones @ rows_BTF)[:, 0]
    return per_context_BF.to(torch.promote_types(rows_BTF.dtype, torch.float32)).sum(0)


class WindowPenalty(torch.autograd.Function):
    """sum_j s2_j of features that are zero at invalid positions, in one of the forms.

    Plain: gradient 2 Q f_j / windows. Scale-free: the gradient of sum_j sg(v_j) s2_j / v_j,
    2 (Q f_j / windows - (s2_j / v_j) (f_j - mean_j) / N), with v_j the variance over the N valid
    positions of the batch: it has no component along f_j - mean_j, so it cannot be lowered by
    shrinking a feature. Slow: the same, a feature at a time times mean(v) / v_j, so that all weigh
    alike. Features without variance get neither value nor gradient.

    The product runs in the features' own dtype (bfloat16 where the SAE's products do), everything
    else in float32: a handful of elementwise passes, forward and backward together.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features_BTF: Tensor,
        laplacian: Tensor,
        n_windows: Tensor,
        valid_BT: Tensor,
        form: Form,
    ) -> Tensor:
        # The number of windows comes in afterwards: in bfloat16 it would round all alike.
        smooth_BTF = laplacian.to(features_BTF.dtype) @ features_BTF
        s2_F = _column_sums(features_BTF * smooth_BTF) / n_windows
        ctx.form = form
        if form == "window_variance":
            ctx.save_for_backward(smooth_BTF, n_windows)
            return s2_F.sum()
        n_valid = valid_BT.sum().clamp(min=1)
        mean_F = _column_sums(features_BTF) / n_valid
        v_F = _column_sums(features_BTF.square()) / n_valid - mean_F.square()
        share_F, ratio_F = _normalised(form, s2_F, mean_F, v_F)
        pull_F = share_F * ratio_F / n_valid
        ctx.save_for_backward(
            smooth_BTF, n_windows, features_BTF, mean_F, pull_F, share_F, valid_BT
        )
        return (share_F * s2_F).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        smooth_BTF, n_windows, *rest = ctx.saved_tensors
        scale = 2 * grad / n_windows
        if ctx.form == "window_variance":
            return smooth_BTF * scale.to(smooth_BTF.dtype), None, None, None, None
        features_BTF, mean_F, pull_F, share_F, valid_BT = rest
        dtype = features_BTF.dtype
        pull_F = 2 * grad * pull_F
        gradient_BTF = smooth_BTF * (scale * share_F).to(dtype)
        gradient_BTF.addcmul_(features_BTF, pull_F.to(dtype), value=-1)
        # (f - mean) is zero at invalid positions, where f itself is: a product of rank one.
        valid_N1, row_1F = valid_BT.reshape(-1, 1).to(dtype), (pull_F * mean_F)[None].to(dtype)
        gradient_BTF.flatten(0, 1).addmm_(valid_N1, row_1F)
        return gradient_BTF, None, None, None, None


class SparseWindowPenalty(torch.autograd.Function):
    """`WindowPenalty` of sparse codes, without making them dense.

    Sorted by feature and token, the entries of one feature in one context lie together: a bag. The
    bag's sum of f_u Q[u, :] is column j of Q f in that context, read where the bag has entries.
    Work and memory follow the number of entries, whatever the window. The gradient is that of the
    dense form at the entries; elsewhere the selection has none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values_NK: Tensor,
        codes: SparseCodes,
        laplacian: Tensor,
        n_windows: Tensor,
        n_valid: Tensor,
        form: Form,
    ) -> Tensor:
        n_positions = laplacian.shape[-1]
        f_M = values_NK.flatten()[codes.order_M]
        feature_M = codes.index_NK.flatten()[codes.order_M]
        token_M = codes.order_M // codes.index_NK.shape[1]
        row_M = token_M if len(laplacian) > 1 else token_M % n_positions
        context_M = token_M // n_positions
        begins_M = torch.ones_like(feature_M, dtype=torch.bool)
        begins_M[1:] = (feature_M[1:] != feature_M[:-1]) | (context_M[1:] != context_M[:-1])
        columns_GT = embedding_bag(
            row_M,
            laplacian.flatten(0, 1),
            begins_M.nonzero()[:, 0],
            per_sample_weights=f_M,
            mode="sum",
        )
        bag_M = begins_M.cumsum(0) - 1
        smooth_M = columns_GT[bag_M, token_M % n_positions] / n_windows
        sums_3F = f_M.new_zeros(3, codes.d_sae)
        sums_3F.index_add_(1, feature_M, torch.stack([f_M * smooth_M, f_M, f_M.square()]))
        s2_F, mean_F, v_F = sums_3F[0], sums_3F[1] / n_valid, sums_3F[2] / n_valid
        gradient_M = 2 * smooth_M
        if form != "window_variance":
            share_F, ratio_F = _normalised(form, s2_F, mean_F, v_F - mean_F.square())
            s2_F, pull_F = share_F * s2_F, 2 * share_F * ratio_F / n_valid
            gradient_M = gradient_M * share_F[feature_M]
            gradient_M -= pull_F[feature_M] * (f_M - mean_F[feature_M])
        gradient_NK = torch.empty_like(values_NK)
        gradient_NK.view(-1)[codes.order_M] = gradient_M
        ctx.save_for_backward(gradient_NK)
        return s2_F.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (gradient_NK,) = ctx.saved_tensors
        return gradient_NK * grad, None, None, None, None, None
