"""Values of features as numbers that JSON can hold, with intervals and the reasons for gaps.

Shapes: F features, K lags, R resamples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcsae.base.json_numbers import plain
from tcsae.metrics.bootstrap import interval, median, weighted_mean


def over_features(
    values_F: Tensor, weights_F: Tensor, draws_R2: Tensor | None, level: float
) -> dict[str, Any]:
    """Median, quartiles, 99th percentile, mean and weighted mean over the features that have a
    value, their number n, and the intervals of the weighted mean and of the median.

    Args:
        values_F: NaN: none.
        weights_F: of the weighted mean.
        draws_R2: resamples of the weighted mean and of the median. None: no interval.
        level: coverage of the intervals.
    """
    known_F = values_F.isfinite()
    x, weights = values_F[known_F], weights_F[known_F]
    found = plain([torch.nan] * 6)
    weighted = middle = plain([torch.nan, torch.nan])
    if len(x):
        quantiles = x.quantile(x.new_tensor([0.25, 0.75, 0.99]))
        estimate = torch.stack([weighted_mean(x, weights), median(x)])
        found = plain([estimate[1], *quantiles, x.mean(), estimate[0]])
        if draws_R2 is not None:
            low, high = interval(draws_R2, estimate, level)
            weighted, middle = plain([low[0], high[0]]), plain([low[1], high[1]])
    names = ("median", "q25", "q75", "q99", "mean", "energy_weighted")
    return {
        **dict(zip(names, found, strict=True)),
        "n": len(x),
        "energy_weighted_interval": weighted,
        "median_interval": middle,
    }


def single(value: Tensor, draws_R: Tensor | None, level: float, reason: str) -> dict[str, Any]:
    """One number for all features: its value, interval, and, if it is NaN, the reason."""
    if not value.isfinite():
        return {"value": None, "interval": [None, None], "reason": reason}
    ends = plain([torch.nan, torch.nan])
    if draws_R is not None:
        ends = plain(interval(draws_R, value, level))
    return {"value": float(value), "interval": ends, "reason": None}


def curve(
    rho_KF: Tensor, energy_F: Tensor, draws_RK: Tensor | None, level: float
) -> dict[str, Any]:
    """The energy-weighted autocorrelation, lag by lag, with its band."""
    # A constant feature has no rho; it has no energy either.
    rho_KF, energy_F = rho_KF[:, energy_F > 0], energy_F[energy_F > 0]
    curve_K = weighted_mean(rho_KF, energy_F.expand_as(rho_KF))
    low_K = high_K = torch.full_like(curve_K, torch.nan)
    if draws_RK is not None:
        low_K, high_K = interval(draws_RK, curve_K, level)
    return {
        "lags": list(range(len(curve_K))),
        "rho": plain(curve_K),
        "low": plain(low_K),
        "high": plain(high_K),
    }
