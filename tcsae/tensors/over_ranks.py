"""Sums over the ranks of one training step, each of which has some of the batch's contexts.

Outside `shared_batch` there is one process, and every function returns what it is given: the very
tensor, so that nothing is computed and no bit is another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tcsae.base.errors import RankLost

_group: Any = None


@contextlib.contextmanager
def shared_batch(group: Any) -> Iterator[None]:
    """In the block the batch is that of all ranks of the process group; None: of this process."""
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def is_shared() -> bool:
    return _group is not None


def n_ranks() -> int:
    return 1 if _group is None else int(_group.size())


def summed(tensor: Tensor) -> Tensor:
    """The sum over the ranks, without gradient; the same bits in all of them."""
    return tensor if _group is None else _reduced(tensor, "SUM")


def largest(tensor: Tensor) -> Tensor:
    """The largest over the ranks, without gradient."""
    return tensor if _group is None else _reduced(tensor, "MAX")


def any_of(tensor: Tensor) -> Tensor:
    """Of booleans: whether it is so in some rank."""
    return tensor if _group is None else _reduced(tensor.to(torch.uint8), "MAX").bool()


def add_up(tensor: Tensor) -> None:
    """`summed`, in place; as it lies in memory."""
    if _group is None:
        return
    if not tensor.is_contiguous() and tensor.dim() == 2 and tensor.T.is_contiguous():
        tensor = tensor.T
    if not tensor.is_contiguous():
        tensor.copy_(_reduced(tensor, "SUM"))
        return
    _all_reduce(tensor, "SUM")


def _reduced(tensor: Tensor, how: str) -> Tensor:
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    _all_reduce(copy, how)
    return copy


def _all_reduce(tensor: Tensor, how: str) -> None:
    import torch.distributed as dist

    try:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=_group)
    except RuntimeError as error:  # the connection to a rank that is gone
        raise RankLost(
            "stopped in the midst of a step, as another rank is gone; all up to the last "
            "checkpoint is saved"
        ) from error
