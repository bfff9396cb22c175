"""The temporal penalty of sparse codes and its gradient, entry by entry.

Shapes: B contexts, T positions, F features, M entries of sparse codes. `tcsae/consistency.py` makes
what a batch's windows and pairs weigh and says what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from tcsae.tensors.sparse import SparseCodes, split_tokens
from tcsae.tensors.window_counts import WindowCounts

if TYPE_CHECKING:
    from tcsae.products.plain import Plain

Normalised = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(e, mean, v) [F] of a batch -> (how often e counts, e / v) [F]."""


class Weights(NamedTuple):
    """All that a batch's penalty depends on beside the features f. With S_t the sum over contexts
    of what stands at position t, and c = `counted_T`,

        e_j = sum over contexts of f_j^T within f_j / n_windows
              + sum_t spread_t S_tj^2 - joint (sum_t c_t S_tj)^2

    is the window variance of feature j and its position term (weighted), and its mean and variance
    are those over `measure_BT`.
    """

    windows_BTT: Tensor | None
    """The windows' part of `within`; None: `counts` has it."""
    n_windows: Tensor
    """At least 1."""
    measure_BT: Tensor
    spread_T: Tensor | None = None
    """None: no position term."""
    joint: Tensor | None = None
    counted_T: Tensor | None = None
    place_BT: Tensor | None = None
    """Where each position stands, if not at its own place."""
    counts: WindowCounts | None = None
    """Of windows that are of so many positions."""
    within_BTT: Tensor | None = None
    """Where it is at hand; `matrix` makes it."""

    def matrix(self) -> Tensor:
        """`within`, [B, T, T]."""
        if self.within_BTT is not None:
            return self.within_BTT
        within_BTT = self.windows_BTT
        if within_BTT is None:
            assert self.counts is not None
            within_BTT = self.counts.laplacian()
        if self.spread_T is not None and self.counted_T is not None and self.joint is not None:
            pairs_TT = self.joint * self.counted_T[:, None] * self.counted_T - self.spread_T.diag()
            within_BTT = within_BTT + self.n_windows * pairs_TT
        if self.place_BT is not None:
            for dim, at in ((1, self.place_BT[:, :, None]), (2, self.place_BT[:, None, :])):
                within_BTT = within_BTT.gather(dim, at.expand_as(within_BTT))
        return within_BTT

    def between(self, sums_TF: Tensor) -> tuple[Tensor, Tensor]:
        """The part of e between contexts [F], and half its gradient to the sums [T, F]."""
        assert self.spread_T is not None and self.counted_T is not None and self.joint is not None
        along_F = self.joint * (self.counted_T @ sums_TF)
        half_TF = self.spread_T[:, None] * sums_TF - self.counted_T[:, None] * along_F
        return (sums_TF * half_TF).sum(0), half_TF


def penalty_of_entries(
    products: Plain,
    codes: SparseCodes,
    values_M: Tensor,
    weights: Weights,
    normalised: Normalised | None,
) -> tuple[Tensor, Tensor]:
    """(sum_j share_j e_j, its gradient to the values [M]); without `normalised` every share is 1,
    with it the gradient is blind to the scale of a feature."""
    order_M, feature_M = codes.order_M, codes.sorted_feature_M
    f_M = values_M.index_select(0, order_M)
    sums = functools.partial(products.sorted_sums, codes)
    smooth_M = products.smooth(codes, f_M, weights.matrix())
    e_F = sums(smooth_M, f_M) / weights.n_windows
    half_M = None
    if weights.spread_T is not None:
        between_F, half_M = _between_entries(products, f_M, codes, weights)
        e_F = e_F + between_F
    if normalised is None:
        gradient_M = smooth_M.mul_(2 / weights.n_windows)
    else:
        rounded_BT = weights.measure_BT.to(codes.dtype).to(f_M)
        total = rounded_BT.sum().clamp(min=1)
        measure_M = rounded_BT.view(-1).index_select(0, codes.sorted_token_M)
        drawn_M = measure_M * f_M
        mean_F, square_F = sums(drawn_M) / total, sums(drawn_M, f_M) / total
        share_F, ratio_F = normalised(e_F, mean_F, square_F - mean_F.square())
        e_F, pull_F = share_F * e_F, 2 * share_F * ratio_F / total
        weight_M, pull_M, pull_mean_M = (
            of_F.index_select(0, feature_M)
            for of_F in (2 * share_F / weights.n_windows, pull_F, pull_F * mean_F)
        )
        gradient_M = smooth_M.mul_(weight_M).addcmul_(pull_M, drawn_M, value=-1)
        gradient_M.addcmul_(pull_mean_M, measure_M)
        if half_M is not None:
            half_M = half_M * share_F.index_select(0, feature_M)
    if half_M is not None:
        gradient_M.add_(half_M, alpha=2)
    return e_F.sum(), values_M.new_empty(values_M.shape).index_copy_(0, order_M, gradient_M)


def _between_entries(
    products: Plain, f_M: Tensor, codes: SparseCodes, weights: Weights
) -> tuple[Tensor, Tensor]:
    """(the part of e between contexts [F], half its gradient at the entries)."""
    n_positions = weights.measure_BT.shape[1]
    position_M = split_tokens(codes.sorted_token_M, n_positions)[1]
    if weights.place_BT is not None:
        position_M = weights.place_BT.view(-1).index_select(0, codes.sorted_token_M)
    sums_FT = products.position_sums(codes, f_M, position_M, n_positions)
    between_F, half_TF = weights.between(sums_FT.T)
    at_M = position_M.add(codes.sorted_feature_M, alpha=n_positions)
    return between_F, half_TF.T.reshape(-1).index_select(0, at_M)
