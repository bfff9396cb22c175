"""Which positions and which pairs of positions count (B contexts, T positions, F features)."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_masks(
    features: Tensor, segments: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Segments and valid mask of a batch, both [B, T] on the device of `features`.

    `None` means one segment per context, and every position valid.

    Raises:
        ValueError: `features` is not [B, T, F], or a mask is not [B, T].
    """
    if features.ndim != 3:
        raise ValueError(
            f"features must be [contexts, positions, features], not {tuple(features.shape)}"
        )
    shape = features.shape[:2]
    for name, mask in (("segments", segments), ("valid", valid)):
        if mask is not None and mask.shape != shape:
            raise ValueError(
                f"{name} must be [contexts, positions] = {tuple(shape)}, not {tuple(mask.shape)}"
            )
    if segments is None:
        segments = torch.zeros(shape, dtype=torch.long, device=features.device)
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=features.device)
    return segments.to(features.device), valid.to(features.device, torch.bool)


def require_shape(features: Tensor, n_features: int, n_positions: int | None = None) -> None:
    """Refuse a batch that does not fit the accumulator it is given to.

    Raises:
        ValueError: the last axes of `features` are not [n_positions, n_features].
    """
    wanted = f"[contexts, {'positions' if n_positions is None else n_positions}, {n_features}]"
    fits = features.ndim == 3 and features.shape[2] == n_features
    if not fits or n_positions not in (None, features.shape[1]):
        raise ValueError(f"this accumulator takes features {wanted}, not {tuple(features.shape)}")


def pair_mask(segments: Tensor, valid: Tensor, lag: int) -> Tensor:
    """[B, T - lag] bool: the pair (t, t + lag) has both positions valid and in one segment.

    What lies between the two positions does not matter, as for the usual autocorrelation of a
    series with missing values (Parzen 1963).
    """
    n = segments.shape[1] - lag
    return valid[:, :n] & valid[:, lag:] & (segments[:, :n] == segments[:, lag:])


def pair_weights(segments: Tensor, valid: Tensor, max_lag: int, dtype: torch.dtype) -> Tensor:
    """[B, max_lag + 1, T]: 1 where the pair (t, t + lag) counts, 0 elsewhere and past the end."""
    b, t = segments.shape
    weights = torch.zeros(b, max_lag + 1, t, dtype=dtype, device=segments.device)
    for lag in range(max_lag + 1):
        weights[:, lag, : t - lag] = pair_mask(segments, valid, lag)
    return weights
