"""What an SAE's training pass takes and gives, in parts.

Shape suffixes: B contexts, T positions, N = B * T tokens, D = d_in, F = d_sae.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.sparse import SparseCodes


class TrainingOutput(NamedTuple):
    """One training pass. Positions that are not valid have all features zero."""

    features: Tensor
    """f_BTF [B, T, d_sae], dense, in the dtype of the products (float32, or bfloat16 under
    autocast); carries the graph, so that a loss on it trains the encoder."""
    reconstruction: Tensor
    """x_hat_BTD [B, T, d_in], float32; b_dec where a position is not valid."""
    losses: dict[str, Tensor]
    """Float32 scalars, already multiplied by their coefficients: their sum is the loss."""
    sparse: SparseCodes | None = None
    """The same features by their entries, where the architecture has them at hand."""


class Places(NamedTuple):
    """Where the N = B * T tokens of a training batch stand, and which of them count."""

    valid_BT: Tensor
    segments_BT: Tensor
    """Document of every position."""
    n_valid: Tensor
    """At least 1."""
    generator: torch.Generator | None = None
    """On the CPU, for what is drawn at random in a pass."""

    @property
    def valid_N1(self) -> Tensor:
        return self.valid_BT.reshape(-1, 1)

    @classmethod
    def of(
        cls,
        valid_BT: Tensor,
        segments_BT: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Places:
        """Without segments every context is one document."""
        if segments_BT is None:
            segments_BT = torch.zeros_like(valid_BT, dtype=torch.int32)
        return cls(valid_BT, segments_BT, valid_BT.sum().clamp(min=1), generator)


class Codes(NamedTuple):
    """What an architecture makes of a batch; all of it zero at tokens that are not valid."""

    features_NF: Tensor
    decoded_ND: Tensor
    """features @ W_dec, without b_dec."""
    pre_NF: Tensor | None = None
    """Pre-activations, for the losses that need them."""
    sparse: SparseCodes | None = None
    extra: tuple[Tensor, ...] = ()
    """What else the architecture's own losses need."""


class SAELensState(NamedTuple):
    """How an SAE is written in SAELens' format: architecture name, further cfg keys, tensors."""

    architecture: str
    cfg: dict[str, Any]
    tensors: dict[str, Tensor]
