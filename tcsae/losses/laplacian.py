"""Windows of positions and their graph Laplacian, a [T, T] matrix for every context.

Shapes: B contexts, T positions, S = T - W + 1 starts of windows of W. `tcsae/consistency.py` says
what it is for; here is nothing of features or losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tcsae.tensors.window_counts import WindowCounts

Window = int | str  # a number of positions, or "document"


class Laplacian(NamedTuple):
    """Q [B, T, T] (or [1, T, T], the same for every context) and the number of windows, a scalar
    tensor, which may be 0."""

    matrix: Tensor
    n_windows: Tensor


def window_laplacian(
    window: Window,
    n_positions: int,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Laplacian:
    """The Laplacian of all windows of a batch.

    Args:
        window: positions in a window, 2 to `n_positions`, or "document".
        segments: [B, T] integers, the document of every position; None: one document a context.
        valid: [B, T] bool; None: all valid.

    Raises:
        ValueError: a window that is no such number.
    """
    segments, valid = _both(n_positions, segments, valid, device)
    if window == "document":
        return _document_laplacian(segments, valid, dtype)
    counts, n_windows = window_counts(window, n_positions, segments, valid, dtype)
    return Laplacian(counts.laplacian(), n_windows)


def window_counts(
    window: Window, n_positions: int, segments: Tensor, valid: Tensor, dtype: torch.dtype
) -> tuple[WindowCounts, Tensor]:
    """What the Laplacian of windows is made of, and the number of windows, a scalar tensor; for the
    arguments see there. ValueError: a window that is no such number."""
    if not isinstance(window, int) or isinstance(window, bool) or not 2 <= window <= n_positions:
        raise ValueError(f'window = {window}: must be 2 to {n_positions} positions, or "document"')
    allowed_BS = _allowed_windows(window, segments, valid)
    return WindowCounts.of(window, allowed_BS, dtype), allowed_BS.sum()


def _both(
    n_positions: int,
    segments: Tensor | None,
    valid: Tensor | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    for given in (segments, valid):
        device = given.device if given is not None and device is None else device
    if segments is None:
        segments = torch.zeros(1, n_positions, dtype=torch.int32, device=device)
    if valid is None:
        valid = torch.ones(1, n_positions, dtype=torch.bool, device=device)
    return segments, valid


def _allowed_windows(window: int, segments: Tensor, valid: Tensor) -> Tensor:
    """[B, T - W + 1] bool, by first position: all of the window is valid and in one segment."""
    # A position breaks the run where it is invalid or starts another segment than its predecessor.
    n_invalid = nn.functional.pad((~valid).to(torch.int32).cumsum(-1), (1, 0))
    changes = nn.functional.pad((segments[:, 1:] != segments[:, :-1]).to(torch.int32), (1, 0))
    n_changes = changes.cumsum(-1)
    last = valid.shape[1] - window + 1
    return (n_invalid[:, window:] == n_invalid[:, :-window]) & (
        n_changes[:, window - 1 :] == n_changes[:, :last]
    )


def share_in_windows(window: Window, segments: Tensor, valid: Tensor) -> float:
    """Share of the valid positions [B, T] that some window holds."""
    parts = zip(segments.split(_CHUNK), valid.split(_CHUNK), strict=True)
    n_held = sum(_held(window, *part).sum().item() for part in parts)
    return n_held / max(valid.sum().item(), 1)


_CHUNK = 8192
"""Contexts looked at together: a large text's would take many times its memory."""


def _held(window: Window, segments: Tensor, valid: Tensor) -> Tensor:
    """Which valid positions some window holds: bool [B, T]."""
    if window == "document":
        places = segments.long()
        n_BS = torch.zeros(len(places), int(places.max()) + 1, dtype=torch.int64)
        n_BS.scatter_add_(1, places, valid.long())
        return valid & (n_BS.gather(1, places) >= 2)
    held_BT = torch.zeros_like(valid)
    allowed_BS = _allowed_windows(int(window), segments, valid)
    for offset in range(int(window)):
        held_BT[:, offset : offset + allowed_BS.shape[1]] |= allowed_BS
    return held_BT


def _document_laplacian(segments: Tensor, valid: Tensor, dtype: torch.dtype) -> Laplacian:
    """One window for the valid positions of every segment that has at least two."""
    same = (segments[:, :, None] == segments[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    length_BT = same.sum(-1)
    counted = length_BT >= 2
    safe = length_BT.clamp(min=2).to(dtype)[:, :, None]
    weights = same.to(dtype) * counted[:, :, None].to(dtype)
    matrix = (torch.diag_embed(counted.to(dtype)) - weights / safe) / (safe - 1)
    first = torch.tril(same, diagonal=-1).any(-1)
    return Laplacian(matrix, (counted & ~first).sum())
