"""Tensors on their way to the device that trains, beside what it computes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sent(NamedTuple):
    tensors: tuple[Tensor, ...]
    copied: Any = None
    """The torch.cuda.Event after the copies; None where none are under way."""


class Sender:
    """Copies from page-locked memory to a GPU, on a stream of their own; elsewhere plain copies.

    `send` may be called by another thread than `receive`. The host waits for neither: the stream
    that computes waits for the event, and memory is handed on only when that stream has used it.
    Page-locked memory comes from torch's own pool, which knows when a copy from it is over: with
    one batch read ahead that makes two buffers, used in turn.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream: Any = None
        if self.device.type == "cuda":
            # Of the GPU that is current in this thread; in another one it may be another.
            self._stream = torch.cuda.Stream(self.device)
            self.device = self._stream.device

    @property
    def is_beside(self) -> bool:
        """Whether copies go on beside what the device computes."""
        return self._stream is not None

    def send(self, *tensors: Tensor) -> Sent:
        """Begin to copy; those on a device already are left there."""
        if self._stream is None:
            return Sent(tensors)
        with torch.cuda.stream(self._stream):
            sent = tuple(self._begun(tensor) for tensor in tensors)
            return Sent(sent, self._stream.record_event())

    def _begun(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cpu:
            return tensor
        locked = tensor if tensor.is_pinned() else tensor.pin_memory()
        return locked.to(self.device, non_blocking=True)

    def receive(self, sent: Sent) -> tuple[Tensor, ...]:
        """The tensors on the device, for the stream that is current here."""
        if sent.copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(sent.copied)
            for tensor in sent.tensors:
                if tensor.device == self.device:
                    tensor.record_stream(here)
        return tuple(tensor.to(self.device) for tensor in sent.tensors)
