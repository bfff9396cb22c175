"""Sparse codes as the temporal loss and the SAEs exchange them."""

from __future__ import annotations

from collections.abc import Sequence
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

    def dense(self) -> Tensor:
        """[N, d_sae] in `dtype`, carrying the graph."""
        flat = self.values_M.new_zeros(len(self.start_N) * self.d_sae, dtype=self.dtype)
        at_M = self.token_M * self.d_sae + self.feature_M
        return flat.scatter(0, at_M, self.values_M.to(self.dtype)).view(-1, self.d_sae)

    def first(self, n_features: int) -> SparseCodes:
        """The codes of the first `n_features` features, carrying the graph."""
        at_M = (self.feature_M < n_features).nonzero()[:, 0]
        return SparseCodes.of(
            self.values_M.index_select(0, at_M),
            self.feature_M.index_select(0, at_M),
            self.token_M.index_select(0, at_M),
            (len(self.start_N), n_features),
            self.dtype,
        )

    def sums(self) -> Tensor:
        """Over tokens, [d_sae], carrying the graph."""
        return self.values_M.new_zeros(self.d_sae).index_add(0, self.feature_M, self.values_M)

    def firings(self) -> Tensor:
        """At how many tokens each feature is above zero, [d_sae] float32."""
        on_M = (self.values_M.detach() > 0).float()
        return on_M.new_zeros(self.d_sae).index_add_(0, self.feature_M, on_M)


def split_tokens(token_M: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    """(context, position) of tokens; a division takes several times as long as a shift."""
    bits = n_positions.bit_length() - 1
    if n_positions == 1 << bits:
        return token_M >> bits, token_M & (n_positions - 1)
    context_M = token_M.div(n_positions, rounding_mode="floor")
    return context_M, token_M - context_M * n_positions
