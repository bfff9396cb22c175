"""Types of an SAE's training pass: token places, codes, and the output.

Shape suffixes: B contexts, T positions, N = B * T tokens, D = d_in, F = d_sae.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.tensors.over_ranks import any_of, summed
from tcsae.tensors.sparse import SparseCodes


class Places(NamedTuple):
    """Document and validity of the N = B * T tokens of a training batch."""

    valid_BT: Tensor
    segments_BT: Tensor
    """Document of every position."""
    n_valid: Tensor
    """Of all ranks; at least 1."""
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
        n_valid = summed(valid_BT.sum()).clamp(min=1)
        return cls(valid_BT, segments_BT, n_valid, generator)


class Moment(NamedTuple):
    """How far a run has come, for the losses that change on the way."""

    sparsity_warmup: float | Tensor
    """What the sparsity term is multiplied by."""
    progress: float
    """The share of the run that is done, in [0, 1]."""


class Codes:
    """The codes of a batch and what belongs to them; all zero at tokens that are not valid.

    Args:
        features_NF: in the dtype of the products, carrying the graph; None: as `sparse` has them.
        decoded_ND: features @ W_dec, without b_dec.
        pre_NF: pre-activations, for the losses that need them.
        sparse: the same features by their entries, where the architecture has them at hand.
        sums_F: the features' sums over tokens, float32, with a gradient of their own to the
            encoder, where the architecture has them at hand.
        least: the least activation that a selection over the batch kept, inf if none; a scalar.
        input_ND: what the encoder saw, where that is not x - b_dec; without gradient.
        extra: what else the architecture's own losses need.
    """

    def __init__(
        self,
        features_NF: Tensor | None,
        decoded_ND: Tensor,
        pre_NF: Tensor | None = None,
        *,
        sparse: SparseCodes | None = None,
        sums_F: Tensor | None = None,
        least: Tensor | None = None,
        input_ND: Tensor | None = None,
        extra: tuple[Tensor, ...] = (),
    ) -> None:
        self._features_NF = features_NF
        self.decoded_ND, self.pre_NF, self.extra = decoded_ND, pre_NF, extra
        self.sparse, self.sums_F = sparse, sums_F
        self.least, self.input_ND = least, input_ND

    @property
    def features_NF(self) -> Tensor:
        """Dense; of sparse codes they are made at the first call."""
        if self._features_NF is None:
            assert self.sparse is not None
            self._features_NF = self.sparse.dense()
        return self._features_NF

    def first_features(self, n: int) -> Tensor:
        """The first `n` features, dense [N, n]."""
        if self._features_NF is None and self.sparse is not None:
            return self.sparse.dense(n)
        return self.features_NF[:, :n]

    @torch.no_grad()
    def fired_F(self) -> Tensor:
        """[d_sae] bool: which features are above zero at some token, of any rank."""
        if self.sparse is not None:
            return any_of(self.sparse.firings() > 0)
        if self.sums_F is not None:  # of features that are nowhere below zero
            return any_of(self.sums_F > 0)
        return any_of(self.features_NF.amax(0) > 0)

    @torch.no_grad()
    def n_active(self) -> Tensor:
        """How many features are above zero, summed over the tokens of all ranks."""
        if self.sparse is not None:
            return summed((self.sparse.values_M > 0).sum())
        return summed((self.features_NF > 0).sum())


class TrainingOutput(NamedTuple):
    """One training pass over contexts [B, T]."""

    codes: Codes
    shape: torch.Size
    """[B, T, d_in]"""
    b_dec: Tensor
    """As it was in this pass."""
    losses: dict[str, Tensor]
    """Float32 scalars, already multiplied by their coefficients: their sum is the loss."""

    @property
    def features(self) -> Tensor:
        """f_BTF [B, T, d_sae], dense, zero where a position is not valid, in the dtype of the
        products; carries the graph, so that a loss on it trains the encoder."""
        return self.codes.features_NF.view(*self.shape[:-1], -1)

    @property
    def reconstruction(self) -> Tensor:
        """x_hat_BTD [B, T, d_in], float32; b_dec where a position is not valid."""
        return (self.codes.decoded_ND.float() + self.b_dec).view(self.shape)


class SAELensState(NamedTuple):
    """An SAE in SAELens' format: architecture name, further cfg keys, tensors."""

    architecture: str
    cfg: dict[str, Any]
    tensors: dict[str, Tensor]
