"""Batches one ahead: the next one's activations are read while the present one is trained on.

On a GPU they wait in page-locked memory, so that their copy to the device does not stop the host:
two buffers, one being filled while the other is in use.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from tcsae.data.store import ActivationBatches, Batch


def read_ahead(batches: ActivationBatches, indices: Iterable[Tensor]) -> Generator[Batch]:
    """`batches.batch(i)` for every i of `indices`, in their order, and equal to it.

    Close it (`contextlib.closing`) when not all of it is used. A source that computes instead of
    reading (store=stream) is asked when its turn comes: two threads would fight for one device.
    """
    if not batches.source.is_read:
        yield from map(batches.batch, indices)
        return
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        pending: tuple[Tensor, Future[Tensor]] | None = None
        for wanted in indices:
            submitted = wanted, pool.submit(batches.read, wanted)
            if pending is not None:
                yield batches.finish(pending[0], pending[1].result())
            pending = submitted
        if pending is not None:
            yield batches.finish(pending[0], pending[1].result())
