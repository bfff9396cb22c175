"""How much of a feature's activation lies on tokens of one kind: on the layout of a text.

Shapes: B contexts of a batch, T positions, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LAYOUT_SHARE = 0.5
"""A feature with more than this share of its activation on layout tokens is a layout feature."""


class LayoutShare:
    """Of each feature, the share of its summed activation that is on layout tokens.

    Args:
        n_features: F.
    """

    def __init__(self, n_features: int) -> None:
        self._mass = torch.zeros(2, n_features, dtype=torch.float64)
        self._tokens = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, features: Tensor, layout: Tensor, valid: Tensor) -> None:
        """Add a batch: features [B, T, F]; layout and valid [B, T] bool."""
        kept = valid.flatten().to(features.device)
        on_layout = layout.flatten().to(features.device) & kept
        weights = torch.stack([on_layout, kept]).to(features.dtype)
        self._mass += (weights @ features.flatten(0, 1).abs()).double().cpu()
        self._tokens += weights.double().sum(1).cpu()

    def compute(self) -> Tensor:
        """[F] float64, from 0 to 1; NaN for a feature that was never on."""
        on_layout, whole = self._mass
        return on_layout / torch.where(whole > 0, whole, torch.nan)

    def summary(self, energy: Tensor) -> dict[str, Any]:
        """What of the tokens and of the features is layout; energy is `c0`, [F].

        Returns:
            token_share: share of the valid tokens; n_features: layout features; energy_share: of
            the variance of all features, that of the layout features (null without variance).
        """
        is_layout = is_layout_feature(self.compute())
        weight = energy.double().nan_to_num(nan=0.0).clamp(min=0.0)
        total, tokens = float(weight.sum()), float(self._tokens[1])
        return {
            "token_share": float(self._tokens[0]) / tokens if tokens else None,
            "n_features": int(is_layout.sum()),
            "energy_share": float(weight[is_layout].sum()) / total if total else None,
        }


def is_layout_feature(layout_share: Tensor) -> Tensor:
    """[F] bool; of a feature that was never on it is not known, and False."""
    return layout_share > LAYOUT_SHARE
