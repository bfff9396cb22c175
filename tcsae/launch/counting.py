"""Counts what real code does, on tensors that have a shape and no values.

Loads torch: imported by the one function that counts (tcsae/launch/counted.py).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from tcsae.launch.machine import Work

aten = torch.ops.aten
# Of a table they read the rows they look up: as much as they give.
_LOOK_UPS = {"embedding", "index", "index_select", "gather", "take"}
# Sums of rows: which arguments are the table and the entries.
_ROWS = {
    "_embedding_bag": (0, 1),
    "_embedding_bag_forward_only": (0, 1),
    "_embedding_bag_per_sample_weights_backward": (1, 2),
}
_MASKED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "linear",
             "einsum", "scaled_dot_product_attention"}  # fmt: skip


class Counting(TorchDispatchMode):
    """Sums operations, bytes read and written, kernels, and the peak of what is allocated.

    Args:
        on_meta: keep every tensor on the meta device. What asks for values is told that all
            elements are chosen and every number is 1. False: count code that really runs.
    """

    def __init__(self, *, on_meta: bool = True) -> None:
        super().__init__()
        self.on_meta = on_meta
        self.peak = self.most = 0
        self._live: dict[int, tuple[Any, int]] = {}
        self._before: dict[int, Any] = {}
        self.restart()

    def restart(self) -> None:
        """Count from here, `most` left out; what is allocated stays so."""
        self.flops = self.float32_flops = self.bytes = self.kernels = 0.0
        self.peak = self.held

    def work(self, what: str) -> Work:
        return Work(what, self.flops, self.float32_flops, self.bytes, self.kernels)

    @property
    def held(self) -> int:
        """Bytes allocated under this mode that are still there."""
        self._live = {k: kept for k, kept in self._live.items() if kept[0]() is not None}
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.on_meta:
            if func is aten._local_scalar_dense.default:
                return args[0].dtype.is_floating_point and 1.0 or 1
            if func is aten.nonzero.default:
                shape = args[0].numel(), args[0].ndim
                return torch.empty(shape, dtype=torch.long, device="meta")
            args, kwargs = self._without_values(func, args, kwargs)
        ins = _tensors((args, kwargs))
        for x in ins:
            key = x.untyped_storage()._cdata
            if key not in self._live or self._live[key][0]() is None:
                self._before[key] = weakref.ref(x.untyped_storage())
        out = func(*args, **kwargs)
        outs = _tensors(out)
        self._count(func, args, kwargs, ins, out, outs)
        self._watch(outs)
        return out

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if any(x.device.type != "meta" for x in _tensors((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, _shape_of, (args, kwargs))
        if func in _MASKED:
            args = (args[0], _all_chosen(args[1]), *args[2:])
        named = _argument_names(func)
        # One that is given by its place is a tensor's, and so meta already.
        if "device" in named[len(args) :]:
            kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": None}
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        return args, {key: value for key, value in kwargs.items() if key in named}

    def _count(self, func: Any, args: Any, kwargs: Any, ins: Any, out: Any, outs: Any) -> None:
        held = {x.untyped_storage()._cdata for x in ins}
        is_view = all(x.untyped_storage()._cdata in held for x in outs)
        name = func._overloadpacket.__name__
        if (is_view and not func._schema.is_mutable) or name.startswith(("empty", "new_empty")):
            return
        self.kernels += 1
        flops = (
            flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            if (func._overloadpacket in flop_registry)
            else 0
        )
        if name in _ROWS:
            # A row of the table for every entry, and what else is as long as they or as the result.
            table, entries = (args[i] for i in _ROWS[name])
            width = table.shape[1]
            self.float32_flops += 2 * entries.numel() * width
            self.bytes += entries.numel() * width * table.element_size()
            self.bytes += sum(size_of(x) for x in (*ins, *outs) if x is not table)
            return
        is_short = flops and all(x.element_size() == 2 for x in ins)
        self.flops += flops if is_short else 0
        self.float32_flops += 0 if is_short else flops
        read = outs if name in _LOOK_UPS else ins
        self.bytes += sum(size_of(x) for x in (*read, *outs))

    def _watch(self, outs: list[Tensor]) -> None:
        for x in outs:
            storage = x.untyped_storage()
            # The place of one that is gone may be another's now.
            known = (self._before.get(storage._cdata), self._live.get(storage._cdata, (None,))[0])
            if all(ref is None or ref() is None for ref in known):
                self._live[storage._cdata] = weakref.ref(storage), storage.nbytes()
        self.peak = max(self.peak, self.held)
        self.most = max(self.most, self.peak)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def size_of(x: Tensor) -> int:
    """Bytes; of an expanded tensor those that are there."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _shape_of(x: Tensor) -> Tensor:
    return x if x.device.type == "meta" else x.to("meta")


def _all_chosen(indices: Any) -> list[Any]:
    """Masks as the places of all their elements."""
    out: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            out += [index.new_empty(index.numel(), dtype=torch.long) for _ in index.shape]
        else:
            out.append(index)
    return out


@functools.cache
def _argument_names(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)


class _Autocast(TorchFunctionMode):
    """Autocast to bfloat16 for the meta device, for which torch has none."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = False

    @contextlib.contextmanager
    def __call__(self, device: str, dtype: Any = None, enabled: bool = True) -> Iterator[None]:
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "tolist":
            return np.ones(args[0].shape).tolist()
        if self.enabled and name in _PRODUCTS:
            args = tree_map_only(Tensor, _in_bfloat16, args)
        return func(*args, **(kwargs or {}))


def _in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16() if x.dtype == torch.float32 else x


@contextlib.contextmanager
def on_meta() -> Iterator[Counting]:
    """Everything in here is made on the meta device, and counted."""
    autocast = _Autocast()
    with (
        mock.patch.object(torch, "autocast", autocast),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: autocast.enabled),
        mock.patch.object(torch, "get_autocast_dtype", lambda device: torch.bfloat16),
        # Adam's one kernel, too, has to be told that it may.
        mock.patch.object(
            import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_: None
        ),
        autocast,
        Counting() as counting,
    ):
        yield counting
