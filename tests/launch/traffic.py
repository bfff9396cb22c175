"""Counts what real computations do: kernels, bytes, memory, and products of unusual operators."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts kernels, the bytes they read and write, and the peak of the memory they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = self.peak = 0
        self._new: dict[int, tuple[Any, int]] = {}
        self._old: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ins = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in ins:
            storage = x.untyped_storage()
            if storage._cdata not in self._new:
                self._old[storage._cdata] = weakref.ref(storage)
        out = func(*args, **(kwargs or {}))
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        held = {x.untyped_storage()._cdata for x in ins}
        is_view = all(x.untyped_storage()._cdata in held for x in outs)
        if (not is_view or func._schema.is_mutable) and "empty" not in func.name():
            self.kernels += 1
            self.bytes += sum(map(size_of, outs)) + _read(func.name(), ins)
        self._watch(outs)
        return out

    def _watch(self, outs: list[torch.Tensor]) -> None:
        self._new = {key: kept for key, kept in self._new.items() if kept[0]() is not None}
        self._old = {key: kept for key, kept in self._old.items() if kept() is not None}
        for x in outs:
            storage = x.untyped_storage()
            if storage._cdata not in self._old and storage._cdata not in self._new:
                self._new[storage._cdata] = weakref.ref(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._new.values()))


def size_of(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _read(name: str, ins: list[torch.Tensor]) -> int:
    """What a kernel reads; of a table, the rows that it looks up."""
    if "embedding_bag" in name:
        table, index = (ins[1], ins[2]) if "backward" in name else (ins[0], ins[1])
        return index.numel() * table.shape[1] * table.element_size()
    if name.startswith("aten::embedding"):
        return 0
    return sum(map(size_of, ins))


def _bag_flops(table: Any, index: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(index) * table[1]


def _bag_backward_flops(_: Any, table: Any, index: Any, *__: Any, **___: Any) -> int:
    return _bag_flops(table, index)


def _linear_flops(rows: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * math.prod(out_shape) * rows[-1]


BAGS: dict[Any, Any] = {
    torch.ops.mkldnn._linear_pointwise: _linear_flops,
    torch.ops.aten._embedding_bag: _bag_flops,
    torch.ops.aten._embedding_bag_forward_only: _bag_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _bag_backward_flops,
}
"""For FlopCounterMode(custom_mapping=...), which knows none of these."""
