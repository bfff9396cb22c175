"""Values of features as numbers that JSON can hold, with intervals and the reasons for gaps.

Shapes: F features, K lags, R rows: of all documents, and without each block of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcsae.base.json_numbers import plain
from tcsae.metrics.units import jackknife_interval


def over_features(values_F: Tensor, rows_R2: Tensor, level: float) -> dict[str, Any]:
    """Quartiles, 99th percentile and mean over the features that have a value, their number n, the
    weighted mean and the median, and the intervals of these two.

    Args:
        values_F: NaN: none; infinite: beyond what could be measured, so that quantiles are known
            only up to there, and the mean is not.
        rows_R2: weighted mean and median, of all documents and without each block of them; of all
            only: no interval.
        level: coverage of the intervals.
    """
    x = values_F[~values_F.isnan()]
    found: list[Any] = [torch.nan] * 4
    weighted = middle = plain([torch.nan, torch.nan])
    if len(x):
        quantiles = x.quantile(x.new_tensor([0.25, 0.75, 0.99]), interpolation="nearest")
        if x.isfinite().all():
            quantiles = x.quantile(x.new_tensor([0.25, 0.75, 0.99]))
        found = [*quantiles, x.mean()]
    estimate_2 = rows_R2[0]
    if len(rows_R2) > 1:
        low, high = jackknife_interval(rows_R2[1:], estimate_2, level)
        weighted, middle = plain([low[0], high[0]]), plain([low[1], high[1]])
    names = ("median", "q25", "q75", "q99", "mean", "energy_weighted")
    return {
        **dict(zip(names, plain([estimate_2[1], *found, estimate_2[0]]), strict=True)),
        "n": len(x),
        "energy_weighted_interval": weighted,
        "median_interval": middle,
    }


def single(rows_R: Tensor, level: float, reason: str) -> dict[str, Any]:
    """One number for all features: its value, interval, and, if it is NaN, the reason."""
    value = rows_R[0]
    if not value.isfinite():
        return {"value": None, "interval": [None, None], "reason": reason}
    ends = plain([torch.nan, torch.nan])
    if len(rows_R) > 1:
        ends = plain(jackknife_interval(rows_R[1:], value, level))
    return {"value": float(value), "interval": ends, "reason": None}


def curve(rows_RK: Tensor, level: float) -> dict[str, Any]:
    """The energy-weighted autocorrelation, lag by lag, with its band."""
    curve_K = rows_RK[0]
    low_K = high_K = torch.full_like(curve_K, torch.nan)
    if len(rows_RK) > 1:
        low_K, high_K = jackknife_interval(rows_RK[1:], curve_K, level)
    return {
        "lags": list(range(len(curve_K))),
        "rho": plain(curve_K),
        "low": plain(low_K),
        "high": plain(high_K),
    }
