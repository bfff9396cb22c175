"""Like against like: a variant beside the baseline at its own L0, and at its own firing density.

**Matched L0.** The groups of a baseline arm that no other group of it beats (less L0 and no less
explained variance) are its Pareto front. At the variant's L0 every metric of the baseline is
interpolated between the two neighbours on the front, linearly in log L0. Nothing is extrapolated:
outside the front the nearest group of the arm stands in if its L0 is within 5 %, else there is no
baseline.

**Matched density.** Features that fire often are more consistent than rare ones in any SAE, so a
loss that only makes features denser moves energy-weighted means. Both arms are cut into bins of
log10 density, 4 to a decade. With e_A(b) the share of arm A's energy (sum of c0) in bin b and
m_A(b) the energy-weighted mean of a metric there,

    w(b) = min(e_A(b), e_B(b)),    matched mean of A = sum_b w(b) m_A(b) / sum_b w(b)

and the same weights for B: two arms that differ in density alone have a difference of 0. The
overlap sum_b w(b) is the share of both that is compared. Features of several seeds, or of two
neighbours on a front, enter with their share of the weight. Intervals are from a bootstrap over
features (Poisson weights), not over contexts. Features of one number and seed get the same weight
in both arms: they began as the same feature, and what became the same of them is no noise of the
difference; where they have nothing in common the pairing changes nothing.

Shapes: F features of an arm, b bins, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.bootstrap import interval
from tcsae.report.paired import LEVEL, Term, holds_zero

SAME_L0 = 0.05
"""Relative difference of L0 up to which a group off the front's range may stand in."""
_EQUAL = 1e-3
BINS_A_DECADE = 4
DENSITY_EDGES = torch.arange(-7 * BINS_A_DECADE, 1) / BINS_A_DECADE
"""Edges of the bins, log10 of density."""
FEATURE_DRAWS = 500
_AT_ONCE = 2**23
_MOST_FEATURES = 2**30


class Point(NamedTuple):
    """A group in the plane of L0 and explained variance."""

    group: int
    l0: float
    explained_variance: float


class Match(NamedTuple):
    """Groups of the baseline and their weights, which stand for it at one L0."""

    kind: str
    """"single", "interpolated" or "none"."""
    groups: list[int]
    weights: list[float]
    l0: float | None
    words: str


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that none with less or equal L0 beats in explained variance, by increasing L0."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.l0, -p.explained_variance)):
        if not front or point.explained_variance > front[-1].explained_variance:
            front.append(point)
    return front


def match_l0(l0: float, baseline: Sequence[Point]) -> Match:
    """What stands for the baseline at this L0."""
    points = [point for point in baseline if point.l0 > 0]
    if not points:
        return Match("none", [], [], None, "no baseline with the same settings")
    if l0 <= 0:
        return Match("none", [], [], None, "no feature fires, so there is no L0 to match")

    def distance(point: Point) -> float:
        return abs(math.log(point.l0 / l0))

    front = pareto_front(points)
    if front[0].l0 < l0 < front[-1].l0 and distance(min(front, key=distance)) > _EQUAL:
        upper = next(i for i, point in enumerate(front) if point.l0 >= l0)
        low, high = front[upper - 1], front[upper]
        share = math.log(l0 / low.l0) / math.log(high.l0 / low.l0)
        words = f"between L0 {low.l0:.4g} and {high.l0:.4g}"
        return Match("interpolated", [low.group, high.group], [1 - share, share], l0, words)
    on_front = front[0].l0 < l0 < front[-1].l0
    nearest = min(front if on_front else points, key=distance)
    if abs(nearest.l0 / l0 - 1) > SAME_L0:
        words = f"no baseline at this L0 ({l0:.4g}): the nearest has {nearest.l0:.4g}"
        return Match("none", [], [], None, words)
    return Match("single", [nearest.group], [1.0], nearest.l0, f"L0 {nearest.l0:.4g}")


# ---------------------------------------------------------------------------- matched density


class Features(NamedTuple):
    """The live features of an arm."""

    unit: Tensor
    """[F] int64, the same for features of one seed and number."""
    bin: Tensor
    """[F] int64 of log10 density."""
    energy: Tensor
    """[F], shares that sum to 1."""
    metrics: Mapping[str, Tensor]
    """[F] each."""


def density_bin(density: Tensor) -> Tensor:
    """Bin of each density in (0, 1]; what is rarer than the first edge is in the first bin."""
    inner = DENSITY_EDGES[1:-1].to(density.dtype)
    return torch.bucketize(density.log10(), inner, right=True)


def live_features(terms: Sequence[Term], names: Sequence[str]) -> Features | None:
    """Features with energy of all runs of the terms; None if there are none."""
    runs = [(term.weight / len(term.runs), run) for term in terms for run in term.runs]
    unit, density, energy = [], [], []
    metrics: dict[str, list[Tensor]] = {name: [] for name in names}
    for weight, run in runs:
        columns = run.features
        live = (columns["density"] > 0) & (columns["c0"] > 0)
        own = columns["c0"][live]
        unit.append(live.nonzero().flatten() + (run.seed or 0) * _MOST_FEATURES)
        density.append(columns["density"][live])
        energy.append(weight * own / own.sum())
        for name in names:
            metrics[name].append(columns[name][live])
    together = torch.cat(density)
    if not len(together):
        return None
    joined = {name: torch.cat(values) for name, values in metrics.items()}
    return Features(torch.cat(unit), density_bin(together), torch.cat(energy), joined)


class _Binned(NamedTuple):
    energy: Tensor
    """[R, b], shares of the energy."""
    mean: Tensor
    """[R, b], energy-weighted mean of the metric; 0 where there is no energy."""


def _binned(features: Features, name: str, weights_RF: Tensor) -> _Binned:
    values = features.metrics[name]
    known = values.isfinite()
    energy_F = torch.where(known, features.energy, 0.0)
    sums = torch.zeros(len(values), 2 * (len(DENSITY_EDGES) - 1), dtype=torch.float64)
    rows = torch.arange(len(values))
    sums[rows, 2 * features.bin] = energy_F
    sums[rows, 2 * features.bin + 1] = energy_F * torch.where(known, values, 0.0)
    energy_Rb, moment_Rb = (weights_RF @ sums).unflatten(1, (-1, 2)).unbind(-1)
    mean_Rb = torch.where(energy_Rb > 0, moment_Rb / energy_Rb, 0.0)
    return _Binned(energy_Rb / energy_Rb.sum(1, keepdim=True), mean_Rb)


def _matched(first: _Binned, second: _Binned) -> Tensor:
    """[R, 3]: both matched means and the overlap."""
    w_Rb = torch.minimum(first.energy, second.energy)
    overlap_R = w_Rb.sum(1)
    means = [(w_Rb * arm.mean).sum(1) / overlap_R for arm in (first, second)]
    return torch.stack([*means, overlap_R], 1)


def _resampled_delta(first: Features, second: Features, name: str) -> Tensor:
    """[R] differences of the matched means."""
    units, place = torch.cat([first.unit, second.unit]).unique(return_inverse=True)
    at_first, at_second = place.split([len(first.unit), len(second.unit)])
    generator = torch.Generator().manual_seed(0)
    draws = []
    for some in torch.arange(FEATURE_DRAWS).split(max(1, _AT_ONCE // len(units))):
        rates = torch.ones(len(some), len(units), dtype=torch.float64)
        weights = torch.poisson(rates, generator=generator)
        arms = ((first, at_first), (second, at_second))
        matched = _matched(*(_binned(arm, name, weights[:, at]) for arm, at in arms))
        draws.append(matched[:, 0] - matched[:, 1])
    return torch.cat(draws)


def density_matched(first: Features, second: Features, name: str) -> dict[str, Any]:
    """A metric of two arms weighted to one distribution of density; an entry of the JSON."""
    single = [torch.ones(1, len(arm.energy), dtype=torch.float64) for arm in (first, second)]
    estimate = _matched(_binned(first, name, single[0]), _binned(second, name, single[1]))[0]
    value, baseline, overlap = estimate.tolist()
    entry: dict[str, Any] = dict.fromkeys(
        ("value", "baseline", "delta", "low", "high", "within_noise", "reason")
    )
    entry["overlap"] = overlap if overlap == overlap else 0.0
    if not entry["overlap"] > 0:
        return entry | {"reason": "the two have no density in common"}
    entry |= {"value": value, "baseline": baseline, "delta": value - baseline}
    delta = estimate[0] - estimate[1]
    low, high = interval(_resampled_delta(first, second, name), delta, LEVEL)
    if not low.isfinite():
        return entry | {"reason": "too few features for an interval"}
    ends = float(low), float(high)
    inside = holds_zero(*ends, scale=baseline)
    return entry | {"low": ends[0], "high": ends[1], "within_noise": inside}


def density_histogram(features: Features | None, name: str | None) -> dict[str, Any]:
    """Share of the live features by bin of density, and the energy-weighted metric there."""
    edges = DENSITY_EDGES.tolist()
    n_bins = len(edges) - 1
    if features is None:
        return {"edges": edges, "share": [0.0] * n_bins, "C": [None] * n_bins}
    share = torch.bincount(features.bin, minlength=n_bins) / len(features.bin)
    C: list[float | None] = [None] * n_bins
    if name is not None:
        binned = _binned(features, name, torch.ones(1, len(features.bin), dtype=torch.float64))
        C = [float(m) if e > 0 else None for e, m in zip(*(x[0] for x in binned), strict=True)]
    return {"edges": edges, "share": share.tolist(), "C": C}
