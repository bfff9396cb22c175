"""The neighbours of a feature: the one with the nearest direction, and those that fire with it.

Shapes: F = d_sae features, D = d_in.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tcsae.measure.analysis import Analysis

DIGITS = 3
AT_ONCE = 2**26
"""Cosines worked out at a time (256 MB)."""


@torch.inference_mode()
def nearest(W_dec: Tensor, features: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The feature, of all, with the largest decoder cosine with each, and that cosine.

    Args:
        W_dec: [F, D].
        features: numbers of those that it is looked for; None: all.

    Returns:
        number [F] int32, -1 where it was not looked for or a feature is alone; cosine [F] float32,
        NaN there.
    """
    directions = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    n_features = len(directions)
    number_F = torch.full((n_features,), -1, dtype=torch.int32)
    cosine_F = torch.full((n_features,), torch.nan)
    wanted = torch.arange(n_features) if features is None else features
    if n_features > 1:
        for rows in wanted.split(max(1, AT_ONCE // n_features)):
            cosine_RF = directions[rows] @ directions.T
            cosine_RF[torch.arange(len(rows)), rows] = -2.0
            best_R, at_R = cosine_RF.max(1)
            number_F[rows], cosine_F[rows] = at_R.int(), best_R
    return number_F.numpy(), cosine_F.numpy()


def together(analysis: Analysis | None) -> dict[int, list[list[float]]]:
    """By feature, rows of [number, correlation], most correlated first; {} where there are none."""
    tensors = {} if analysis is None else analysis.correlation
    if "together" not in tensors:
        return {}  # an analysis of an older version
    rows = zip(
        tensors["together_feature"].tolist(),
        tensors["together"].tolist(),
        tensors["together_correlation"].tolist(),
        strict=True,
    )
    return {
        feature: [
            [other, round(r, DIGITS)] for other, r in zip(others, of, strict=True) if other >= 0
        ]
        for feature, others, of in rows
    }
