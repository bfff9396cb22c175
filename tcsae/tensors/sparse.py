"""Sparse codes as the temporal loss and the SAEs exchange them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class SparseCodes(NamedTuple):
    """The M entries of [N, d_sae] codes that may be on; all others are zero.

    In the order of tokens (contexts one after another); a token may have any number of entries.
    """

    values_M: Tensor
    """Activations, zero at tokens that are not valid; carries the graph."""
    feature_M: Tensor
    token_M: Tensor
    start_N: Tensor
    """Where each token's entries begin."""
    order_M: Tensor
    """The entries by feature, and within it by token."""
    sorted_feature_M: Tensor
    """Their features in that order, int32."""
    sorted_token_M: Tensor
    """Their tokens in that order."""
    start_F: Tensor
    """Where each feature's entries begin in that order."""
    dtype: torch.dtype
    """Of the products that made the values; they themselves are float32 or better."""

    @classmethod
    def of(
        cls,
        values_M: Tensor,
        feature_M: Tensor,
        token_M: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> SparseCodes:
        """From entries in the order of tokens; `shape` is (N, d_sae)."""
        n_tokens, d_sae = shape
        # Keys of 32 bits sort in half the time.
        sorted_feature_M, order_M = feature_M.int().sort(stable=True)
        # Searched for and not counted: to count, the host would have to read the largest.
        every_N = torch.arange(n_tokens, device=token_M.device)
        every_F = torch.arange(d_sae, device=token_M.device, dtype=torch.int32)
        start_N = torch.searchsorted(token_M, every_N)
        start_F = torch.searchsorted(sorted_feature_M, every_F)
        sorted_token_M = token_M.index_select(0, order_M)
        return cls(
            values_M,
            feature_M,
            token_M,
            start_N,
            order_M,
            sorted_feature_M,
            sorted_token_M,
            start_F,
            dtype,
        )

    @property
    def d_sae(self) -> int:
        return len(self.start_F)

    def dense(self, n_features: int | None = None) -> Tensor:
        """[N, d_sae], or of the first `n_features` [N, n_features], in `dtype`, carrying the
        graph."""
        width = self.d_sae if n_features is None else n_features
        end = len(self.start_N) * width
        at_M = self.token_M * width + self.feature_M
        if width < self.d_sae:  # the others into one place more, which is left out
            at_M = torch.where(self.feature_M < width, at_M, end)
        flat = self.values_M.new_zeros(end + (width < self.d_sae), dtype=self.dtype)
        return flat.scatter(0, at_M, self.values_M.to(self.dtype))[:end].view(-1, width)

    def in_groups(self, sizes: Sequence[int]) -> SparseCodes:
        """The same entries as the codes of N G tokens, token n's of group g those of n G + g.

        The entries of a token must be in the order of groups (`in_group_order`).
        """
        row_M = self.token_M * len(sizes) + _group_of(self.feature_M, sizes)
        every = torch.arange(len(self.start_N) * len(sizes), device=row_M.device)
        return self._replace(
            token_M=row_M,
            start_N=torch.searchsorted(row_M, every),
            sorted_token_M=row_M.index_select(0, self.order_M),
        )

    def sums(self) -> Tensor:
        """Over tokens, [d_sae], carrying the graph."""
        return self.values_M.new_zeros(self.d_sae).index_add(0, self.feature_M, self.values_M)

    def firings(self) -> Tensor:
        """At how many tokens each feature is above zero, [d_sae] float32."""
        on_M = (self.values_M.detach() > 0).float()
        return on_M.new_zeros(self.d_sae).index_add_(0, self.feature_M, on_M)


def in_group_order(feature_M: Tensor, token_M: Tensor, sizes: Sequence[int]) -> Tensor:
    """[M]: the order of entries by token and within it by group of features, of these sizes."""
    row_M = token_M * len(sizes) + _group_of(feature_M, sizes)
    return row_M.int().sort(stable=True).indices


def _group_of(feature_M: Tensor, sizes: Sequence[int]) -> Tensor:
    group_M = torch.zeros_like(feature_M)
    for end in accumulate(sizes[:-1]):
        group_M += feature_M >= end
    return group_M


def split_tokens(token_M: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    """(context, position) of tokens; a division takes several times as long as a shift."""
    bits = n_positions.bit_length() - 1
    if n_positions == 1 << bits:
        return token_M >> bits, token_M & (n_positions - 1)
    context_M = token_M.div(n_positions, rounding_mode="floor")
    return context_M, token_M - context_M * n_positions
