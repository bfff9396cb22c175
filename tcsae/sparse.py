"""Sparse codes as the temporal loss and the SAEs exchange them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SparseCodes(NamedTuple):
    """The k features that may be on at each of N tokens (contexts one after another).

    M = N * k entries; all others of the [N, d_sae] codes are zero.
    """

    values_NK: Tensor
    """Activations, float32, zero at tokens that are not valid; carries the graph."""
    index_NK: Tensor
    """Feature of every entry."""
    order_M: Tensor
    """Positions in the flattened [N, k] tensors, by feature and within it by token."""
    d_sae: int
