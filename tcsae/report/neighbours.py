"""The neighbours of a feature: the one with the nearest direction, and those that fire with it.

Shapes: R features shown, K companions of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcsae.base.json_numbers import plain
from tcsae.measure.analysis import Analysis

DIGITS = 3


def neighbours(W_dec: Tensor, ids: np.ndarray, analysis: Analysis | None) -> dict[str, Any]:
    """What the page's script needs, by feature shown.

    Args:
        W_dec: [d_sae, d_in].
        ids: numbers of the features shown, [R]; the nearest is looked for among them.

    Returns:
        nearest: [R] number, null where it is alone; cosine: [R]; together: [R] rows of
        [number, correlation], most correlated first, [] where the analysis has none.
    """
    directions = torch.nn.functional.normalize(W_dec[torch.from_numpy(ids)].detach().float(), dim=1)
    nearest: list[int | None] = [None] * len(ids)
    cosine: list[float | None] = [None] * len(ids)
    if len(ids) > 1:
        cosine_RR = (directions @ directions.T).fill_diagonal_(-2.0)
        best_R, at_R = cosine_RR.max(1)
        nearest, cosine = ids[at_R.numpy()].tolist(), plain(best_R, DIGITS)
    found = _together(analysis)
    together = [found.get(i, []) for i in ids.tolist()]
    return {"nearest": nearest, "cosine": cosine, "together": together}


def _together(analysis: Analysis | None) -> dict[int, list[list[float]]]:
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
