"""Sums over contexts, kept apart in blocks of whole documents, and summaries over features.

Shapes: B contexts of a batch, F features, G blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcsae.metrics.units import MAX_BLOCKS, Units


class Accumulator:
    """Base of the metrics that see one batch at a time: named sums, allocated at the first batch.

    A state named `block_...` has one row per block, in float64. Contexts come in the order of
    `units`; without units every context is a document of its own, and context number i belongs to
    block i % n_blocks.

    Args:
        units: which contexts belong together. None: none do.
        n_blocks: G where there are no units.
    """

    def __init__(self, units: Units | None = None, n_blocks: int = MAX_BLOCKS) -> None:
        self.units = units
        self.n_blocks = max(n_blocks, 1) if units is None else units.n_blocks
        self.reset()

    def reset(self) -> None:
        """Forget every batch."""
        self.n_contexts = 0
        self._state: dict[str, Tensor] = {}

    @property
    def n_used(self) -> int:
        """Blocks that hold a context."""
        return min(self.n_blocks, self.n_contexts)

    def _blocks_of(self, n_contexts: int, device: torch.device) -> Tensor:
        """Block of each of the next contexts."""
        first, last = self.n_contexts, self.n_contexts + n_contexts
        if self.units is None:
            return torch.arange(first, last, device=device) % self.n_blocks
        if last > len(self.units):
            raise ValueError(f"the units are those of {len(self.units)} contexts, not of {last}")
        return self.units.block[first:last].to(device)

    def _add_to_blocks(self, sums: dict[str, Tensor], block_B: Tensor) -> None:
        """Add each context's sums [B, ...] to its block, in float64."""
        for name, value in sums.items():
            if name not in self._state:
                shape = (self.n_blocks, *value.shape[1:])
                self._state[name] = value.new_zeros(shape, dtype=torch.float64)
            self._state[name].index_add_(0, block_B, value.double())

    def _require_batches(self) -> dict[str, Tensor]:
        if not self._state:
            raise ValueError("no batch was added: call update(features) first")
        return self._state


def with_deleted(blocks: Tensor, n_used: int | None = None, deletions: bool = True) -> Tensor:
    """Sums [1 + G, ...] from sums by block [G', ...]: of all, then without each of the blocks in
    use (None: all); only the first row if no deletions are wanted."""
    total = blocks.sum(0, keepdim=True)
    return torch.cat([total, total - blocks[:n_used]]) if deletions else total


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
