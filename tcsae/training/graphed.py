"""A step recorded once and replayed: on a GPU hundreds of small launches cost the host more than
the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

EAGER_STEPS = 3
"""Before the recording: kernels are compiled and the optimizer has its state."""


class GraphedStep:
    """`step(*tensors)` as a CUDA graph of its own, recorded at the fourth call of one shape.

    A replay runs the kernels of the recorded call on tensors of the same shapes, so `step` must do
    all it does on the device, in place, and read no value; what it returns is overwritten by the
    next call. Calls of another shape are made directly, as are all of them once a recording failed.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step, self._calls = step, 0
        self._graph: Any = None
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Any = None
        self.is_on = True

    @property
    def is_recorded(self) -> bool:
        return self._graph is not None

    def __call__(self, *tensors: Tensor) -> Any:
        if self._graph is None and self.is_on and self._calls >= EAGER_STEPS:
            self._record(tensors)
        if self._graph is None or any(
            a.shape != b.shape for a, b in zip(tensors, self._inputs, strict=True)
        ):
            self._calls += 1
            return self._step(*tensors)
        for kept, new in zip(self._inputs, tensors, strict=True):
            kept.copy_(new)
        self._graph.replay()
        return self._result

    def _record(self, tensors: tuple[Tensor, ...]) -> None:
        # Recorded on a stream of its own, and the steps before were not: torch would warn of that.
        warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if warn is not None:  # of torch 2.10 and newer
            warn(False)
        inputs = tuple(tensor.clone() for tensor in tensors)
        try:
            graph, result = self._recorded(inputs)
        except Exception as error:  # of the driver, the allocator, the kernels
            self.is_on = False
            said = " ".join(str(error).split())[:200]
            log.warning(
                f"steps are not recorded ({type(error).__name__}: {said}): they go on as they are"
            )
            torch.cuda.synchronize(inputs[0].device)
            return
        self._graph, self._inputs, self._result = graph, inputs, result

    def _recorded(self, inputs: tuple[Tensor, ...]) -> tuple[Any, Any]:
        # The GPU that is current may be the model's, and a stream is of one GPU.
        with torch.cuda.device(inputs[0].device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            # Other threads may read ahead meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = self._step(*inputs)
        return graph, result
