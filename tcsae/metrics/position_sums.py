"""Sums by position and block that several metrics stand on: the means to take out, without bias.

The mean over contexts at a position is estimated from the same tokens that it is taken from, and
contexts of one document are alike: a product of two such means is too large by the noise they
share. What is wanted is the product of the means of DIFFERENT documents: with S(t) the sum of d at
position t over all blocks (whole documents), S_g(t) that of block g, n for the numbers of tokens,

    U(t, u) = (S(t) S(u) - sum_g S_g(t) S_g(u)) / (n(t) n(u) - sum_g n_g(t) n_g(u))

has no product of a document with itself in it, so that its mean is mu(t) mu(u) however alike the
tokens, or the contexts, of a document are.

d is taken about a mean over all tokens, which is made of them too. Where masks or segments leave a
lag some of the positions only, that would show: `Centring` has what each block adds to the part
that goes with the origin, so that it is multiplied by the mean over the other blocks instead.

Shapes: B contexts of a batch, T positions, F features, G blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.accumulator import Accumulator
from tcsae.metrics.masks import checked_masks, require_shape
from tcsae.metrics.units import MAX_BLOCKS, Units

# Contexts worked on at a time, so that memory does not grow with the batch.
_CONTEXT_CHUNK = 64


class Added(NamedTuple):
    """A few contexts, as the accumulators that share one `PositionSums` take them."""

    features: Tensor
    """[B, T, F] as given."""
    d: Tensor
    """[B, T, F] float64: less the origin, 0 where not valid."""
    segments: Tensor
    """[B, T]."""
    valid: Tensor
    """[B, T] bool."""
    block: Tensor
    """[B] int64."""


class PositionSums(Accumulator):
    """Sums of the features by position, and of their squares, for every block.

    Taken about one origin for each feature, the mean over all tokens, to which it is moved when
    the sums are read: products of what is left cancel little, and nothing hangs on the batches.

    Memory: 8 G T F bytes (151 MB at G = 64, T = 128, F = 2304).

    Args:
        n_features: F.
        n_positions: T.
        units, n_blocks: see `Accumulator`.
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int,
        *,
        units: Units | None = None,
        n_blocks: int = MAX_BLOCKS,
    ) -> None:
        self.n_features = n_features
        self.n_positions = n_positions
        super().__init__(units, n_blocks)

    def reset(self) -> None:
        super().reset()
        self._n_centred = 0

    @torch.no_grad()
    def add(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> Iterator[Added]:
        """Add a batch: features [B, T, F], segments and valid [B, T]; gives it back in parts."""
        require_shape(features, self.n_features, self.n_positions)
        segments, valid = checked_masks(features, segments, valid)
        if not self._state:
            f_BTF = torch.where(valid[..., None], features, 0.0).double()
            self.origin_F = f_BTF.sum((0, 1)) / valid.sum().clamp(min=1)
        parts = (x.split(_CONTEXT_CHUNK) for x in (features, segments, valid))
        for f_BTF, some_segments, some_valid in zip(*parts, strict=True):
            d_BTF = torch.where(some_valid[..., None], f_BTF - self.origin_F, 0.0)
            block_B = self._blocks_of(len(d_BTF), d_BTF.device)
            sums = {
                "block_sums": d_BTF,
                "block_squares": d_BTF.square().sum(1),
                "block_counts": some_valid,
            }
            self._add_to_blocks(sums, block_B)
            self.n_contexts += len(d_BTF)
            yield Added(f_BTF, d_BTF, some_segments, some_valid, block_B)

    def centred(self) -> dict[str, Tensor]:
        """`block_sums` [G, T, F], `block_squares` [G, F] and `block_counts` [G, T] of the blocks in
        use, about the mean over all tokens, which `origin_F` then is."""
        state = self._require_batches()
        if self._n_centred != self.n_contexts:
            shift_F = state["block_sums"].sum((0, 1)) / state["block_counts"].sum().clamp(min=1)
            totals_GF, tokens_G = state["block_sums"].sum(1), state["block_counts"].sum(1)
            change_GF = (2 * totals_GF - tokens_G[:, None] * shift_F) * shift_F
            state["block_squares"] -= change_GF
            for sums_TF, counts_T in zip(state["block_sums"], state["block_counts"], strict=True):
                sums_TF -= counts_T[:, None] * shift_F
            self.origin_F = self.origin_F + shift_F
            self._n_centred = self.n_contexts
        return {name: value[: self.n_used] for name, value in state.items()}

    def constant(self, about_F: Tensor) -> Tensor:
        """[..., F] bool: a mean square about the means that is nothing but rounding."""
        state = self.centred()
        tokens = state["block_counts"].sum().clamp(min=1)
        raw_F = state["block_squares"].sum(0) / tokens + self.origin_F.square()
        return about_F <= CONSTANT * raw_F


# A feature whose standard deviation is under 1e-7 of its root mean square, the resolution of
# float32, is constant as far as anyone can tell.
CONSTANT = 1e-14


def pairs_of_blocks(first_GT: Tensor, second_GT: Tensor) -> Tensor:
    """n(t) n(u) - sum_g n_g(t) n_g(u), [T], from numbers of tokens by block at t and at u."""
    return first_GT.sum(0) * second_GT.sum(0) - (first_GT * second_GT).sum(0)


class MeanProducts(NamedTuple):
    """sum over pairs of U(t, u), in forms that allow leaving a block out. [G, L, F] but `whole`.

    With r(t, u) = pairs(t, u) / (n(t) n(u) - sum_g n_g(t) n_g(u)): `whole` [L, F] is
    sum r S S', `own` sum r S_g S_g', `with_whole` sum r (S S_g' + S_g S').
    """

    whole: Tensor
    own: Tensor
    with_whole: Tensor

    def rows(self, scale_GL: Tensor | None) -> Tensor:
        """[1 + G, L, F]: of all blocks, and without each, where r changes by `scale_GL`; only the
        first row without a scale."""
        all_LF = self.whole - self.own.sum(0)
        if scale_GL is None:
            return all_LF[None]
        left_GLF = (all_LF - self.with_whole + 2 * self.own) * scale_GL[..., None]
        return torch.cat([all_LF[None], left_GLF])


class Centring(NamedTuple):
    """What moving the origin by 1 takes from a covariance, by block: [G, L, F] both.

    `pairs`: sums over the block's pairs of d(t) + d(u). `means`: sums over pairs of what the block
    adds to U(t, u), r(t, u) ((n(u) - n_g(u)) S_g(t) + (n(t) - n_g(t)) S_g(u)).
    """

    pairs: Tensor
    means: Tensor

    def change(self, sums: dict[str, Tensor]) -> Tensor:
        """What is to be taken from the sum over pairs, [L, F]: every block about the mean over the
        tokens of the others."""
        totals_GF, tokens_G1 = sums["block_sums"].sum(1), sums["block_counts"].sum(1)[:, None]
        others_GF = (totals_GF.sum(0) - totals_GF) / (tokens_G1.sum(0) - tokens_G1).clamp(min=1)
        return (others_GF[:, None] * (self.pairs - self.means)).sum(0)


def scale_without(pairs_GL: Tensor, different_L: Tensor, without_GL: Tensor) -> Tensor:
    """[G, L]: what r of `MeanProducts` is multiplied by when a block is left out: the share of the
    pairs that stays, over that of the pairs of different blocks. Exact where all positions are
    masked alike."""
    total_L = pairs_GL.sum(0)
    kept_GL = (total_L - pairs_GL) / total_L.clamp(min=1)
    different_GL = without_GL / different_L.clamp(min=1)
    return torch.where(without_GL > 0, kept_GL / different_GL.clamp(min=1e-300), torch.nan)
