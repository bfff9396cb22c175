"""What a baseline would show at the L0 of a variant, and how well that is known.

A metric is read off the baselines' curve on the scale on which it is nearly straight in log L0:
its logarithm for what goes with the number of active features, log(1 - x) for what approaches 1.
The error of the curve is part of the answer: where three baselines or more were run, a line past
one of them misses it by what the curve bends, and it bends as much between two others.

Shapes: R draws.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAME_L0 = 1e-3
"""Relative difference of L0 below which nothing is to be corrected."""

_LOGARITHM = frozenset(
    ("density", "l1", "mse", "mean_activation", "run_length", "tau_int", "correlation_length")
)
_TO_ONE = frozenset(("explained_variance", "ce_loss_score", "kl_div_score", "cossim"))
_IN_PROPORTION = frozenset(("density", "l1"))
"""With one baseline these are taken to go with L0; of the others no slope is known."""

_CHORD_ERROR = 0.1
"""Between two baselines: the standard error in their middle, as a share of their difference."""
_SLOPE_ERROR = 0.5
"""Standard error of a slope: of one measured between two baselines as a share of it; of one that is
not known, d log x / d log L0."""


class AtL0(NamedTuple):
    """A metric of the baselines at one L0."""

    value: Tensor
    weights: list[float]
    """How much it moves with each of the groups of the match."""
    error: float
    """Standard deviation of the curve's own error, in the metric's units."""


class _Scale(NamedTuple):
    to: Callable[[float], float]
    back: Callable[[float], float]
    slope: Callable[[float], float]
    """Of `to`."""


_RAW = _Scale(lambda x: x, lambda y: y, lambda x: 1.0)
_LOG = _Scale(math.log, math.exp, lambda x: 1.0 / x)
_LOG_REST = _Scale(lambda x: math.log(1 - x), lambda y: 1 - math.exp(y), lambda x: -1.0 / (1 - x))


def _scale_of(name: str, values: Sequence[float]) -> _Scale:
    if name in _LOGARITHM and min(values) > 0:
        return _LOG
    return _LOG_REST if name in _TO_ONE and max(values) < 1 else _RAW


def at_l0(
    name: str, l0: float, used: Sequence[int], front: Mapping[int, tuple[float, float]]
) -> AtL0:
    """A metric of the baselines at `l0`.

    Args:
        name: of the metric.
        l0: where it is wanted.
        used: one group that stands in, or the two between which `l0` lies.
        front: (L0, value of the metric) of every baseline with a value, by group.
    """
    known = sorted((math.log(x), group) for group, (x, _) in front.items())
    scale = _scale_of(name, [value for _, value in front.values()])
    place = {group: x for x, group in known}
    height = {group: scale.to(front[group][1]) for group in front}
    at = math.log(l0)
    if len(used) == 1:
        found, error, weights = _stand_in(name, at, used[0], place, height, scale, front)
    else:
        low, high = sorted(used, key=lambda group: place[group])
        share = (at - place[low]) / (place[high] - place[low])
        found = (1 - share) * height[low] + share * height[high]
        by_group = {low: 1 - share, high: share}
        weights = [by_group[group] for group in used]
        if len(known) > 2:
            ordered = [(x, height[group]) for x, group in known]
            error = _bend(ordered) * (at - place[low]) * (place[high] - at) / 2
        else:
            error = _CHORD_ERROR * 4 * share * (1 - share) * abs(height[high] - height[low])
    value = scale.back(found)
    unit = scale.slope(value)
    weights = [
        weight * scale.slope(front[group][1]) / unit
        for weight, group in zip(weights, used, strict=True)
    ]
    return AtL0(torch.tensor(value, dtype=torch.float64), weights, abs(error / unit))


def _stand_in(
    name: str,
    at: float,
    group: int,
    place: Mapping[int, float],
    height: Mapping[int, float],
    scale: _Scale,
    front: Mapping[int, tuple[float, float]],
) -> tuple[float, float, list[float]]:
    """(height, its error, weight) of a baseline that is not quite at this L0."""
    step = at - place[group]
    if abs(step) < SAME_L0:
        return height[group], 0.0, [1.0]
    others = [other for other in place if abs(place[other] - place[group]) >= SAME_L0]
    if others:
        nearest = min(others, key=lambda other: abs(place[other] - place[group]))
        slope = (height[nearest] - height[group]) / (place[nearest] - place[group])
        return height[group] + slope * step, _SLOPE_ERROR * abs(slope * step), [1.0]
    size = 1.0 if scale is not _RAW else abs(front[group][1])
    moved = step if name in _IN_PROPORTION and scale is _LOG else 0.0
    return height[group] + moved, _SLOPE_ERROR * abs(step) * size, [1.0]


def _bend(points: Sequence[tuple[float, float]]) -> float:
    """Largest second derivative that leaving out an inner point shows."""
    found = 0.0
    for (x0, y0), (x1, y1), (x2, y2) in zip(points, points[1:], points[2:], strict=False):
        missed = y1 - (y0 + (y2 - y0) * (x1 - x0) / (x2 - x0))
        found = max(found, abs(2 * missed / ((x1 - x0) * (x2 - x1))))
    return found


def error_draws(name: str, error: float, n_draws: int) -> Tensor:
    """Draws [R] of the curve's error; of two metrics they have nothing to do with each other."""
    from scipy.stats import norm

    even = norm.ppf((np.arange(n_draws) + 0.5) / n_draws)
    order = np.random.default_rng(zlib.crc32(name.encode())).permutation(n_draws)
    return torch.from_numpy(even[order]) * error
