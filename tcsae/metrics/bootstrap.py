"""Sums over contexts, kept apart in blocks, and the bootstrap over contexts that they allow.

Contexts are the independent units: tokens of one context are not. Accumulators deal the contexts
out to blocks and keep each block's sums; a resample draws as many blocks as there are, with
replacement, and the summary is computed again from the resampled sums.

Shapes: F features, G blocks, R resamples.
"""

from __future__ import annotations

import torch
from torch import Tensor

# With fewer blocks the percentiles of the resamples are too narrow to be worth printing.
MIN_BLOCKS = 8


class Accumulator:
    """Base of the metrics that see one batch at a time: named sums, allocated at the first batch.

    A state named `block_...` has one row per bootstrap block; context number i belongs to block
    i % n_blocks. A state named `origin` is what was subtracted from the features before summing.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.reset()

    def reset(self) -> None:
        """Forget every batch."""
        self.n_contexts = 0
        self._state: dict[str, Tensor] = {}

    def _blocks_of(self, n_contexts: int, device: torch.device) -> Tensor:
        """Block of each of the next contexts; one block for all if none are kept apart."""
        first = self.n_contexts
        return torch.arange(first, first + n_contexts, device=device) % max(self.n_blocks, 1)

    def _add_to_blocks(self, sums: dict[str, Tensor]) -> None:
        """Add each context's sums [B, ...] to its block, in float64."""
        for name, value in sums.items():
            if name not in self._state:
                shape = (max(self.n_blocks, 1), *value.shape[1:])
                self._state[name] = value.new_zeros(shape, dtype=torch.float64)
            block = self._blocks_of(len(value), value.device)
            self._state[name].index_add_(0, block, value.double())

    def _drawn(self, name: str, weights_RG: Tensor) -> Tensor:
        """Sums of resampled blocks, [R, ...]."""
        blocks = self._state[name]
        drawn = weights_RG.to(blocks.dtype) @ blocks.reshape(len(blocks), -1)
        return drawn.reshape(len(weights_RG), *blocks.shape[1:])

    def _require_batches(self) -> dict[str, Tensor]:
        if not self._state:
            raise ValueError("no batch was added: call update(features) first")
        return self._state


def resampling_weights(n_used: int, n_blocks: int, n_boot: int, seed: int) -> Tensor:
    """How often each block is drawn in each resample, [R, G] float32.

    Blocks beyond `n_used` hold no context and are never drawn. The same arguments give the same
    resamples: runs measured on the same contexts in the same order can be compared pairwise.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_used, (n_boot, n_used), generator=generator)
    weights = torch.zeros(n_boot, n_blocks)
    return weights.scatter_add_(1, drawn, torch.ones(n_boot, n_used))


def interval(draws: Tensor, estimate: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Percentile interval of the draws [R, ...], moved so that their mean is the estimate [...].

    The move takes out the bias of resampling: a resample carries the noise of sampling contexts
    twice, which for shares of variance and information only ever adds, and would put the interval
    above the estimate. NaN where every draw or the estimate is NaN.
    """
    centred = draws - draws.nanmean(0) + estimate
    tail = (1.0 - level) / 2.0
    low, high = centred.nanquantile(centred.new_tensor([tail, 1.0 - tail]), dim=0)
    return low, high


def median(values: Tensor) -> Tensor:
    """Median over the last axis, NaN left out; the mean of the middle two of an even number.

    By selection, several times faster than by the sort of `torch.nanquantile`.
    """
    low = values.nanmedian(-1).values
    high = -(-values).nanmedian(-1).values
    return (low + high) / 2.0


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over the last axis with weights of the same shape, NaN in either left out."""
    counted = values.isfinite() & weights.isfinite()
    total = torch.where(counted, weights, 0.0).sum(-1)
    return torch.where(counted, values * weights, 0.0).sum(-1) / total
