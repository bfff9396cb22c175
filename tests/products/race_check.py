"""What Triton's interpreter hides, seen on a CPU: it runs programs one after another, and lets them
read where they will.

    with watch() as seen: ...

raises Offence at the first launch in which two programs write one address, or one reads what
another writes; in which an address lies in no argument; or which leaves other bits when its
programs run from the last to the first. What `torch.empty` makes is NaN (integers: -7), so that
what nobody writes fails whatever is compared.

Addresses are those of the inputs that were run: a test, no proof. Within a program nothing is seen:
its barriers are Triton's. A read out of one argument and into another passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

Addresses = np.ndarray[Any, np.dtype[np.int64]]


class Offence(AssertionError):
    pass


@dataclass
class Seen:
    """What was done while watching, and the launch that is under way."""

    launches: int = 0
    loads: int = 0
    stores: int = 0
    is_backward: bool = False
    grid: tuple[int, ...] = (1, 1, 1)
    program: int = -1
    ranges: Addresses = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    read: list[tuple[int, Addresses]] = field(default_factory=list)
    written: list[tuple[int, Addresses]] = field(default_factory=list)

    def note(self, pointers: Any, mask: Any, is_store: bool) -> None:
        """One load or store of the program that runs."""
        at, on = np.broadcast_arrays(pointers.data, mask.data)
        at = at[on.astype(bool)].ravel().astype(np.int64)
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        first, end = self.ranges.T[:, :, None]
        outside = ~((at >= first) & (at + size <= end)).any(0)
        what = "store" if is_store else "load"
        if outside.any():
            raise Offence(f"{what} outside every argument, at {int(outside.sum())} addresses")
        if is_store and len(np.unique(at)) < len(at):
            raise Offence("one store writes an address twice")
        (self.written if is_store else self.read).append((self.program, at))
        self.stores += is_store * len(at)
        self.loads += (not is_store) * len(at)

    def end_of_launch(self, name: str) -> None:
        (writer, written), (reader, read) = _joined(self.written), _joined(self.read)
        self.written, self.read = [], []
        order = written.argsort(kind="stable")
        writer, written = writer[order], written[order]
        twice = (written[1:] == written[:-1]) & (writer[1:] != writer[:-1])
        if twice.any():
            pair = (writer[:-1][twice][0], writer[1:][twice][0])
            raise Offence(f"{name}: two programs write one address ({pair[0]} and {pair[1]})")
        if not len(written):
            return
        place = np.searchsorted(written, read).clip(max=len(written) - 1)
        race = (written[place] == read) & (writer[place] != reader)
        if race.any():
            pair = (writer[place][race][0], reader[race][0])
            raise Offence(f"{name}: program {pair[0]} writes what program {pair[1]} reads")


def _joined(parts: list[tuple[int, Addresses]]) -> tuple[Addresses, Addresses]:
    """(program, address) of every access."""
    none = np.zeros(0, np.int64)
    programs = [np.full(len(at), program) for program, at in parts]
    return np.concatenate([none, *programs]), np.concatenate([none, *(at for _, at in parts)])


def _range(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * size * (tensor.numel() > 0)


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    builder, executor = type(interpreter.interpreter_builder), interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "set_grid_dim", "set_grid_idx")
    masked_load, masked_store, grid_dim, grid_idx = (getattr(builder, name) for name in names)
    kept_call, kept_empty, kept_like = executor.__call__, torch.empty, torch.empty_like
    seen = Seen()

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen.note(pointers, mask, is_store=False)
        return masked_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.note(pointers, mask, is_store=True)
        return masked_store(self, pointers, value, mask, *rest)

    def set_grid_dim(self: Any, *grid: int) -> None:
        seen.grid = grid
        grid_dim(self, *grid)

    def set_grid_idx(self: Any, *at: int) -> None:
        if seen.is_backward:
            at = tuple(n - 1 - i for n, i in zip(seen.grid, at, strict=True))
        seen.program = int(np.ravel_multi_index(at, seen.grid))
        grid_idx(self, *at)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        seen.ranges = np.array([_range(t) for t in tensors], np.int64).reshape(-1, 2)
        before, name = [t.clone() for t in tensors], self.fn.__name__
        seen.launches += 1
        kept_call(self, *args, **kwargs)
        seen.end_of_launch(name)
        forward = [t.clone() for t in tensors]
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        seen.is_backward = True
        try:
            kept_call(self, *args, **kwargs)
        finally:
            seen.is_backward = False
        seen.end_of_launch(name)
        for tensor, value in zip(tensors, forward, strict=True):
            if not ((tensor == value) | ((tensor != tensor) & (value != value))).all():
                raise Offence(f"{name}: other bits when its programs run backward")

    def poisoned(made: Tensor) -> Tensor:
        return made.fill_(torch.nan if made.is_floating_point() else -7)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (builder, names[0], load),
            (builder, names[1], store),
            (builder, names[2], set_grid_dim),
            (builder, names[3], set_grid_idx),
            (executor, "__call__", call),
            (torch, "empty", lambda *a, **k: poisoned(kept_empty(*a, **k))),
            (torch, "empty_like", lambda *a, **k: poisoned(kept_like(*a, **k))),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield seen
