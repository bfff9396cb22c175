"""Reading ahead changes when a batch is read, and nothing else."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.data.batches import ActivationBatches, Batch, Calibration, read_ahead
from tcsae.data.contexts import Contexts

N, T, D = 12, 5, 3
ORDER = [torch.tensor(i) for i in ([3, 1], [0, 11], [7, 7], [2, 5])]


class Source:
    def __init__(self, is_read: bool, broken: int | None = None) -> None:
        self.is_read, self.broken = is_read, broken
        self.x_NTD = torch.randn(N, T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
        ids = torch.arange(N * T, dtype=torch.int32).view(N, T)
        valid = torch.ones(N, T, dtype=torch.bool)
        self.contexts = Contexts(ids, torch.zeros_like(ids), valid, ())
        self.asked: list[list[int]] = []
        self.threads: set[int] = set()
        self.ask = threading.Semaphore(0)

    def activations(self, indices: Tensor) -> Tensor:
        if self.broken in indices.tolist():
            raise UserError("a damaged shard")
        self.asked.append(indices.tolist())
        self.threads.add(threading.get_ident())
        self.ask.release()
        return self.x_NTD[indices]


def batches_of(source: Source) -> ActivationBatches:
    return ActivationBatches(source, Calibration(1.0, 3.0, 0.0, torch.zeros(0, D)), "cpu")


def same(first: Batch, second: Batch) -> bool:
    parts = ("x", "ids", "segments", "valid")
    return all(torch.equal(getattr(first, p), getattr(second, p)) for p in parts)


@pytest.mark.parametrize("is_read", [True, False])
def test_batches_come_in_order_and_as_without_reading_ahead(is_read: bool) -> None:
    batches = batches_of(Source(is_read))
    found = list(read_ahead(batches, ORDER))
    assert len(found) == len(ORDER)
    assert all(same(a, batches.batch(i)) for a, i in zip(found, ORDER, strict=True))


def test_the_next_batch_is_read_while_the_present_one_is_used() -> None:
    source = Source(is_read=True)
    with contextlib.closing(read_ahead(batches_of(source), ORDER)) as ahead:
        next(ahead)
        # Two reads without another call of next: the second is of the batch that comes next.
        assert source.ask.acquire(timeout=30) and source.ask.acquire(timeout=30)
        assert source.asked == [ORDER[0].tolist(), ORDER[1].tolist()]
    assert threading.get_ident() not in source.threads


def test_a_source_that_computes_is_asked_when_its_turn_comes() -> None:
    source = Source(is_read=False)
    ahead = read_ahead(batches_of(source), ORDER)
    next(ahead)
    assert source.asked == [ORDER[0].tolist()]
    assert source.threads == {threading.get_ident()}


def test_what_goes_wrong_while_reading_is_raised_at_its_batch() -> None:
    ahead = read_ahead(batches_of(Source(is_read=True, broken=7)), ORDER)
    next(ahead)
    next(ahead)
    with pytest.raises(UserError, match="damaged"):
        next(ahead)


def test_closing_early_ends_its_thread() -> None:
    before = set(threading.enumerate())
    ahead = read_ahead(batches_of(Source(is_read=True)), ORDER)
    next(ahead)
    ahead.close()
    assert set(threading.enumerate()) <= before


def test_no_batch_of_no_order() -> None:
    assert list(read_ahead(batches_of(Source(is_read=True)), [])) == []
