"""Positions of contexts: documents, and the random order of the controls."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in [0, 1), of the shape and on the device of `tensor`, drawn on the CPU."""
    drawn = torch.rand(tensor.shape, generator=generator)
    # Only from pinned memory does a copy not wait for what is queued before it.
    drawn = drawn.pin_memory() if tensor.is_cuda else drawn
    return drawn.to(tensor.device, non_blocking=True)


def permute_within_segments(segments: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """[B, T] indices that permute the valid positions of every segment among themselves.

    Invalid positions stay where they are, so windows and their number do not change: what is left
    of a temporal loss on permuted positions is not due to order.
    """
    noise = noise_like(segments, generator)
    n_positions = segments.shape[1]
    positions = torch.arange(n_positions, device=segments.device).expand_as(segments)
    # Sorting by (segment and validity, noise) and by (segment and validity, position) lists the
    # same positions group by group: the one in random order, the other in place.
    group = segments.long() * 2 + valid.long()
    by_noise = torch.argsort(noise, dim=1)
    shuffled = by_noise.gather(1, torch.argsort(group.gather(1, by_noise), dim=1, stable=True))
    in_place = torch.argsort(group, dim=1, stable=True)
    permutation = torch.empty_like(shuffled).scatter_(1, in_place, shuffled)
    return torch.where(valid, permutation, positions)


def reordered(x_BTX: Tensor, order_BT: Tensor) -> Tensor:
    """[B, T, X] with positions taken in another order; `order_BT.argsort(dim=1)` undoes it."""
    return x_BTX.gather(1, order_BT[..., None].expand_as(x_BTX))


def block_means(x_BTD: Tensor, length: int, segments_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """[B, T, D]: at every valid position the mean over the valid ones of its block and document.

    Blocks are `length` positions, from the start of a context on; a document that ends within one
    ends the mean. Positions that are not valid keep what they hold, and no mean has it.
    """
    n_contexts, n_positions, width = x_BTD.shape
    padding = -n_positions % length

    def blocks(tensor: Tensor) -> Tensor:
        filled = torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, padding))
        return filled.reshape(-1, length, *tensor.shape[2:])

    own, kept = blocks(segments_BT), blocks(valid_BT)
    together = (own[:, :, None] == own[:, None, :]) & kept[:, :, None] & kept[:, None, :]
    weights = together.to(x_BTD.dtype) / together.sum(-1, keepdim=True).clamp(min=1)
    means = weights @ blocks(torch.where(valid_BT[..., None], x_BTD, 0))
    means_BTD = means.reshape(n_contexts, -1, width)[:, :n_positions]
    return torch.where(valid_BT[..., None], means_BTD, x_BTD)


def document_starts(segments_BT: Tensor) -> Tensor:
    """[B, T] bool: the first position of every document of a context."""
    starts_BT = segments_BT != segments_BT.roll(1, 1)
    starts_BT[:, 0] = True
    return starts_BT


def as_contexts(
    x: Tensor, segments: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [B, T, X], segments [B, T], valid [B, T]) of x [..., T, X] or, a single token, [X].

    Without segments a context is one document; without `valid` every position counts.
    """
    x_BTX = x.reshape((-1, *x.shape[-2:]) if x.ndim > 1 else (1, 1, -1))
    shape = x_BTX.shape[:2]
    if segments is None:
        segments = torch.zeros(shape, dtype=torch.int32, device=x.device)
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=x.device)
    return x_BTX, segments.reshape(shape), valid.reshape(shape)
