"""Like against like: a variant beside the baseline at its own L0, and at its own firing density.

**Matched L0.** The groups of a baseline arm that no other group of it beats (less L0 and no less
explained variance) are its Pareto front. At the variant's L0 every metric of the baseline is
read off the front, between the two neighbours (`at_l0`). Nothing is extrapolated: outside the front
the nearest group of the arm stands in if its L0 is within 5 %, moved along the slope there, else
there is no baseline.

**Matched density.** Features that fire often are more consistent than rare ones in any SAE, so a
loss that only makes features denser moves energy-weighted means. Both arms are cut into bins of
log10 density, 4 to a decade. With e_A(b) the share of arm A's energy (sum of c0) in bin b, m_A(b)
the energy-weighted mean of a metric there, x_A(b) that of log10 density, and s(b) the slope of the
metric on log10 density within the bin, common to both arms,

    w(b) = min(e_A(b), e_B(b)),    d(b) = m_A(b) - m_B(b) - s(b) (x_A(b) - x_B(b))
    difference = sum_b w(b) d(b) / sum_b w(b)

so that two arms that differ in density alone have a difference of 0. The overlap sum_b w(b) is the
share of both that is compared. Features of several seeds, or of two neighbours on a front, enter
with their share of the weight. The error has two parts, which are added (Owen 2007): that of other
features, from Poisson weights over features, and that of other documents, from the sums without
each block of them. Features of one number and seed get the same weight in both arms: they began as
the same feature, and what became the same of them is no noise of the difference; where they have
nothing in common the pairing changes nothing.

Shapes: F features of an arm, b bins, R draws, G blocks of documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.density import DENSITY_EDGES, N_BINS, bin_and_place, density_bin
from tcsae.metrics.units import interval, jackknife_draws
from tcsae.report.at_l0 import SAME_L0
from tcsae.report.paired import LEVEL, Term, holds_zero, student
from tcsae.report.runs import Run

NEAR_L0 = 0.05
"""Relative difference of L0 up to which a group off the front's range may stand in."""
FEATURE_DRAWS = 1000
_AT_ONCE = 2**23
_NO_SPREAD = 1e-9
"""Spread of log10 density within a bin, as a share of all energy, that tells no slope."""
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
    if front[0].l0 < l0 < front[-1].l0 and distance(min(front, key=distance)) > SAME_L0:
        upper = next(i for i, point in enumerate(front) if point.l0 >= l0)
        low, high = front[upper - 1], front[upper]
        share = math.log(l0 / low.l0) / math.log(high.l0 / low.l0)
        words = f"between L0 {low.l0:.4g} and {high.l0:.4g}"
        return Match("interpolated", [low.group, high.group], [1 - share, share], l0, words)
    on_front = front[0].l0 < l0 < front[-1].l0
    nearest = min(front if on_front else points, key=distance)
    if abs(nearest.l0 / l0 - 1) > NEAR_L0:
        words = f"no baseline at this L0 ({l0:.4g}): the nearest has {nearest.l0:.4g}"
        return Match("none", [], [], None, words)
    words = f"L0 {nearest.l0:.4g}"
    if distance(nearest) >= SAME_L0:
        words += f", moved to {l0:.4g}"
    return Match("single", [nearest.group], [1.0], nearest.l0, words)


# ---------------------------------------------------------------------------- matched density


class Features(NamedTuple):
    """The live features of an arm."""

    unit: Tensor
    """[F] int64, the same for features of one seed and number."""
    bin: Tensor
    """[F], the bin of log10 density and the place in it (`density_bin`)."""
    energy: Tensor
    """[F], shares that sum to 1."""
    metrics: Mapping[str, Tensor]
    """[F] each."""
    by_density: Mapping[str, Tensor] | None = None
    """[1 + G, b, 5] each: sums over the features of all documents, and without each block
    (`ConsistencySuite.by_density`), whose energy sums to 1. None: no documents are known."""


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
    return Features(
        torch.cat(unit),
        density_bin(together),
        torch.cat(energy),
        joined,
        _documents(runs, names),
    )


def _documents(runs: Sequence[tuple[float, Run]], names: Sequence[str]) -> dict[str, Tensor] | None:
    found: dict[str, Tensor] = {}
    for name in names:
        parts = [(weight, run.by_density.get(name)) for weight, run in runs]
        known = [(weight, part) for weight, part in parts if part is not None]
        if len(known) < len(parts) or len({part.shape for _, part in known}) > 1:
            return None
        found[name] = torch.stack(
            [w * part / part[..., 0].sum(1)[:, None, None] for w, part in known]
        ).sum(0)
    return found


def _binned(features: Features, name: str, weights_RF: Tensor) -> Tensor:
    """Sums of e, e y, e x, e x^2, e x y by bin, [R, b, 5]; features without a value left out."""
    values = features.metrics[name]
    known = values.isfinite()
    e_F = torch.where(known, features.energy, 0.0)
    bin_F, x_F = bin_and_place(features.bin.double())
    y_F = torch.where(known, values, 0.0)
    terms_F5 = torch.stack([e_F, e_F * y_F, e_F * x_F, e_F * x_F**2, e_F * x_F * y_F], 1)
    sums = terms_F5.new_zeros(len(values), N_BINS, 5, dtype=torch.float64)
    sums[torch.arange(len(values)), bin_F] = terms_F5.double()
    return (weights_RF @ sums.flatten(1)).unflatten(1, (N_BINS, 5))


class _Matched(NamedTuple):
    delta: Tensor
    """[R]."""
    baseline: Tensor
    """[R], the second arm's mean, with these weights."""
    overlap: Tensor
    """[R]."""


def _matched(first: Tensor, second: Tensor) -> _Matched:
    """The second arm's sums and the first's by bin, [R, b, 5] each, laid side by side."""
    energies, means, places, within = [], [], [], []
    for sums in (first, second):
        e, ey, ex, exx, exy = sums.unbind(-1)
        some = torch.where(e > 0, e, torch.nan)
        energies.append(e / e.sum(1, keepdim=True))
        means.append((ey / some).nan_to_num(nan=0.0))
        places.append((ex / some).nan_to_num(nan=0.0))
        # About the bin's means, so that an arm's energy is no part of the slope.
        within.append(
            (
                (exy - ex * means[-1]) / e.sum(1, keepdim=True),
                (exx - ex * places[-1]) / e.sum(1, keepdim=True),
            )
        )
    weights = torch.minimum(*energies)
    joint, square = (within[0][i] + within[1][i] for i in (0, 1))
    slope = torch.where(square > _NO_SPREAD, joint / square.clamp(min=_NO_SPREAD), 0.0)
    apart = means[0] - means[1] - slope * (places[0] - places[1])
    overlap = weights.sum(1)
    delta, baseline = ((weights * x).sum(1) / overlap for x in (apart, means[1]))
    return _Matched(delta, baseline, overlap)


def _over_features(first: Features, second: Features, name: str, n_draws: int) -> Tensor:
    """[R] differences of the matched means with other features."""
    units, place = torch.cat([first.unit, second.unit]).unique(return_inverse=True)
    at_first, at_second = place.split([len(first.unit), len(second.unit)])
    generator = torch.Generator().manual_seed(0)
    draws = []
    for some in torch.arange(n_draws).split(max(1, _AT_ONCE // len(units))):
        rates = torch.ones(len(some), len(units), dtype=torch.float64)
        weights = torch.poisson(rates, generator=generator)
        arms = ((first, at_first), (second, at_second))
        matched = _matched(*(_binned(arm, name, weights[:, at]) for arm, at in arms))
        draws.append(matched.delta)
    return torch.cat(draws)


def _over_documents(first: Features, second: Features, name: str, n_draws: int) -> Tensor | None:
    """[R] differences of the matched means without some documents; None where none are known."""
    sums = [arm.by_density.get(name) if arm.by_density else None for arm in (first, second)]
    if sums[0] is None or sums[1] is None or sums[0].shape != sums[1].shape:
        return None
    delta = _matched(sums[0].double(), sums[1].double()).delta
    return jackknife_draws(delta[1:], delta[0], n_draws)


class Matched(NamedTuple):
    """A difference at equal density."""

    entry: dict[str, Any]
    """Of the JSON."""
    draws: Tensor | None
    """[R] around the difference."""


def _estimate(first: Features, second: Features, name: str) -> tuple[Tensor, ...]:
    """Difference, the second arm's mean, overlap: [] each."""
    single = [torch.ones(1, len(arm.energy), dtype=torch.float64) for arm in (first, second)]
    found = _matched(_binned(first, name, single[0]), _binned(second, name, single[1]))
    return tuple(x[0] for x in found)


def at_density(
    first: Features,
    second: Features,
    name: str,
    n_draws: int = FEATURE_DRAWS,
    by_seed: Sequence[tuple[Features, Features]] = (),
) -> Matched:
    """A metric of two arms weighted to one distribution of density.

    Args:
        first, second: the arms.
        name: of the metric.
        n_draws: R.
        by_seed: the arms of each seed alone, where both have the same: the spread of training is
            then in the interval as well.
    """
    delta, baseline, overlap = _estimate(first, second, name)
    entry: dict[str, Any] = dict.fromkeys(
        ("value", "baseline", "delta", "low", "high", "within_noise", "reason")
    )
    entry["overlap"] = float(overlap) if overlap.isfinite() else 0.0
    if not entry["overlap"] > 0:
        return Matched(entry | {"reason": "the two have no density in common"}, None)
    value = float(baseline + delta)
    entry |= {"value": value, "baseline": float(baseline), "delta": float(delta)}
    draws = _over_features(first, second, name, n_draws)
    draws = draws - draws.nanmean()
    if (documents := _over_documents(first, second, name, n_draws)) is not None:
        draws = draws + documents - documents.mean()
    if len(by_seed) > 1:
        alone = torch.stack([_estimate(*pair, name)[0] for pair in by_seed])
        error = alone.std() / len(alone) ** 0.5
        draws = draws + student(error, len(alone) - 1, n_draws)
    low, high = interval(draws + delta, delta, LEVEL)
    if not low.isfinite():
        return Matched(entry | {"reason": "too few features for an interval"}, None)
    return Matched(entry | {"low": float(low), "high": float(high)}, draws + delta)


def density_matched(first: Features, second: Features, name: str) -> dict[str, Any]:
    """`at_density` of one metric alone: `within_noise` says whether its own interval holds 0."""
    entry = at_density(first, second, name).entry
    if entry["low"] is not None:
        entry["within_noise"] = holds_zero(entry["low"], entry["high"], scale=entry["baseline"])
    return entry


def density_histogram(features: Features | None, name: str | None) -> dict[str, Any]:
    """Share of the live features by bin of density, and the energy-weighted metric there."""
    edges = DENSITY_EDGES.tolist()
    if features is None:
        return {"edges": edges, "share": [0.0] * N_BINS, "C": [None] * N_BINS}
    bin_F, _ = bin_and_place(features.bin)
    share = torch.bincount(bin_F, minlength=N_BINS) / len(bin_F)
    C: list[float | None] = [None] * N_BINS
    if name is not None:
        one = torch.ones(1, len(features.bin), dtype=torch.float64)
        sums_b5 = _binned(features, name, one)[0]
        C = [float(ey / e) if e > 0 else None for e, ey in sums_b5[:, :2].tolist()]
    return {"edges": edges, "share": share.tolist(), "C": C}
