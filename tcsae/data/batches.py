"""Batches of activations: masks and scale, their order, and the next one read ahead."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.data.copies import Sender, Sent
from tcsae.data.store import ActivationSource, ActivationStore


@dataclass(frozen=True)
class Calibration:
    """Statistics of the first contexts' activations, for masks, scale and b_dec."""

    median_norm: float
    """Median over tokens that are neither special nor first."""
    norm_limit: float
    """Tokens beyond it are massive: invalid. Infinite without a filter."""
    massive_share: float
    """Share of those tokens that are massive."""
    sample: Tensor
    """[N, d_in] float32: valid activations."""


@dataclass(frozen=True)
class Batch:
    """x [B, T, d_in] raw activations; the others [B, T]."""

    x: Tensor
    ids: Tensor
    segments: Tensor
    valid: Tensor
    """Neither special nor massive: what is trained on and measured."""
    not_special: Tensor
    """Whatever the norm; position 0 is special."""


Begun = tuple[Tensor, Sent]
"""Token ids, on the CPU, and the rest of a batch on its way."""
CALIBRATION_CONTEXTS = 256


def calibrate(source: ActivationSource, norm_filter: float) -> Calibration:
    """Median norm and massive tokens of the first contexts (they are in random order already).

    Raises UserError for activations without a scale: all zero, or not numbers.
    """
    contexts = source.contexts
    indices = torch.arange(min(CALIBRATION_CONTEXTS, len(contexts.ids)))
    x = source.activations(indices).float()[contexts.valid[indices]]
    norms = x.norm(dim=-1)
    median = norms.median().item() if len(norms) else 0.0
    if not 0 < median < float("inf"):
        raise UserError(
            f"the median norm of the activations is {median:.4g}, so there is nothing to train on: "
            "check the weights (model.path), model.hook and model.dtype"
        )
    limit = norm_filter * median if norm_filter > 0 else float("inf")
    kept = norms <= limit
    return Calibration(median, limit, 1 - kept.float().mean().item(), x[kept])


class ActivationBatches:
    """Batches of a source, selected by context index, with massive tokens masked, on `device`."""

    def __init__(self, source: ActivationSource, calibration: Calibration, device: str) -> None:
        self.source, self.calibration, self.device = source, calibration, device
        self._sender = Sender(device)

    def __len__(self) -> int:
        return len(self.source.contexts.ids)

    def batch(self, indices: Tensor) -> Batch:
        batch = self.finish(self.begin(indices))
        return replace(batch, ids=batch.ids.to(self.device))

    def begin(self, indices: Tensor) -> Begun:
        """Read a batch and, to a GPU, begin its copies."""
        contexts = self.source.contexts
        sent = self._sender.send(
            self._read(indices), contexts.valid[indices], contexts.segments[indices]
        )
        return contexts.ids[indices], sent

    def _read(self, indices: Tensor) -> Tensor:
        if not (self._sender.is_beside and isinstance(self.source, ActivationStore)):
            return self.source.activations(indices)
        # Straight to where the GPU fetches it: no second copy by the host.
        rows = self.source.rows(indices)
        shape, dtype = (len(rows), *rows[0].shape), rows[0].dtype
        return torch.stack(rows, out=torch.empty(shape, dtype=dtype, pin_memory=True))

    def finish(self, begun: Begun) -> Batch:
        """The batch, with `ids` on the CPU still: training has no use for them."""
        ids, sent = begun
        x, not_special, segments = self._sender.receive(sent)
        valid = not_special & (x.float().norm(dim=-1) <= self.calibration.norm_limit)
        return Batch(x, ids, segments, valid, not_special)

    def in_order(self, batch_contexts: int, indices: Tensor | None = None) -> Iterator[Batch]:
        """Batches of `batch_contexts`: of all contexts, or of those of `indices` [M], in order."""
        chosen = torch.arange(len(self)) if indices is None else indices
        if len(chosen):
            yield from map(self.batch, chosen.split(batch_contexts))


def shuffled_indices(step: int, batch: int, n_contexts: int, seed: int) -> Tensor:
    """[batch] context indices of one step: whole contexts, every one once an epoch.

    A pure function of its arguments, so the order needs no state to be resumed: the steps read
    consecutive pieces of one endless row of seeded permutations.
    """
    wanted = torch.arange(step * batch, (step + 1) * batch)
    epochs = wanted // n_contexts
    out = torch.empty(batch, dtype=torch.long)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        out[here] = _permutation(n_contexts, seed, epoch)[wanted[here] % n_contexts]
    return out


@functools.lru_cache(maxsize=2)
def _permutation(n_contexts: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n_contexts, generator=generator)


# ---------------------------------------------------------------------------------- one ahead


def read_ahead(batches: ActivationBatches, indices: Iterable[Tensor]) -> Generator[Batch]:
    """`batches.batch(i)` for every i of `indices`, in their order, and equal to it;
    `ids` stay on the CPU.

    The next one's activations are read while the present one is trained on, and copied to a GPU
    from page-locked memory while it computes: two buffers, one being filled while the other is in
    use.

    Close it (`contextlib.closing`) when not all of it is used. A source that computes instead of
    reading (store=stream) is asked when its turn comes: two threads would fight for one device.
    """
    if not batches.source.is_read:
        yield from map(batches.finish, map(batches.begin, indices))
        return
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        pending: Future[Begun] | None = None
        for wanted in indices:
            submitted = pool.submit(batches.begin, wanted)
            if pending is not None:
                yield batches.finish(pending.result())
            pending = submitted
        if pending is not None:
            yield batches.finish(pending.result())
