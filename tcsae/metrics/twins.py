"""Position twins: pairs of features that say one thing at different positions.

Shapes: T positions, F features, P pairs of features, I documents in which a feature fires,
K bins of positions, R draws.

That the firing profiles of two features hardly overlap shows nothing by itself: of two features
without any dependence on position it is so until they have fired hundreds of times apart from each
other, and a run of ten tokens, or ten contexts of one document, is one time and not ten. So the
overlap is held against its own null, in which the documents of both features are pooled and dealt
at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.metrics.top_contexts import Firings, firing_units
from tcsae.metrics.units import Units

N_DRAWS = 499
LEAST_DOCUMENTS = 5
LEAST_DEALS = 1000
"""A pair cannot be told if one of it fires in fewer documents, or if the documents of both can be
dealt to the two in fewer ways (6 and 6, 5 and 7): even twins would not stand out then."""
FALSE_TWINS = 0.01
"""Share of the pairs called twins that may be none (Benjamini and Hochberg 1995)."""
_MOST_ITEMS = 64
_BLOCK_ROWS = 1024


class PositionTwins(NamedTuple):
    """Pairs of features, first < second, with the largest cosine first."""

    first: Tensor
    """[P] int64."""
    second: Tensor
    """[P] int64."""
    correlation: Tensor
    """[P] Pearson coefficient."""
    cosine: Tensor
    """[P] float32, cosine of the two decoder rows."""
    lag: Tensor
    """[P] int16, all 0."""
    n_candidates: int
    """Pairs of one direction whose profiles hardly overlap, before the test."""
    n_cannot_tell: int
    """Candidates that fire in too few documents for the test."""
    told_from_firings: bool
    """False: no firings were given, so that no candidate could be told."""


def pair_records(columns: Sequence[Tensor], n: int) -> list[dict[str, Any]]:
    """The first n pairs for JSON, from the columns first, second, correlation, cosine and lag."""
    return [
        {"features": [i, j], "correlation": r, "cosine": cosine, "lag": lag}
        for i, j, r, cosine, lag in zip(*(c[:n].tolist() for c in columns), strict=True)
    ]


def similar_decoder_pairs(W_dec: Tensor, threshold: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs first < second with decoder cosine above the threshold: first, second, cosine."""
    unit = normalize(W_dec.detach().cpu().float(), dim=1)
    found = []
    for start in range(0, len(unit), _BLOCK_ROWS):
        cosine = (unit[start : start + _BLOCK_ROWS] @ unit.T).triu(start + 1)
        row, column = (cosine > threshold).nonzero(as_tuple=True)
        found.append((row + start, column, cosine[row, column]))
    if not found:
        return torch.empty(0).long(), torch.empty(0).long(), torch.empty(0)
    first, second, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    return first, second, cosine


def profile_overlap(profiles: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Overlap coefficient of the position profiles of pairs of features, [P] in [0, 1].

    sum over t of min(p_i(t), p_j(t)), p being a feature's firing rate by position divided by its
    sum. 1: same positions; 0: disjoint. NaN if a feature never fires.

    Args:
        profiles: firing rate by position [T, F]; NaN counts as 0 (a position never valid).
    """
    rate_TF = profiles.detach().cpu().double().nan_to_num(nan=0.0)
    p_TF = rate_TF / rate_TF.sum(dim=0)
    parts = zip(first.split(65536), second.split(65536), strict=True)
    overlaps = [torch.minimum(p_TF[:, i], p_TF[:, j]).sum(dim=0) for i, j in parts]
    return torch.cat(overlaps) if overlaps else torch.empty(0, dtype=torch.double)


class _Dealing:
    """The test of one pair: documents pooled and dealt at random, as many to each as it had."""

    def __init__(self, firings: Firings, units: Units, n_positions: int, seed: int) -> None:
        self.columns = firings.pattern.tocsc()
        self.document, self.position = units.document.numpy()[firings.context], firings.position
        self.n_positions, self.seed = n_positions, seed
        counted = np.bincount(firings.position, minlength=n_positions)
        # A firing weighs more at a position that counts less often, as in a rate.
        self.weight = 1 / np.maximum(counted, 1)
        self._order: dict[int, np.ndarray] = {}

    def items(self, feature: int) -> np.ndarray:
        """Rates by position in each document in which the feature fires, [I, T].

        Of more than `_MOST_ITEMS` documents several share an item.
        """
        rows = self.columns.indices[self.columns.indptr[feature] : self.columns.indptr[feature + 1]]
        documents, item = np.unique(self.document[rows], return_inverse=True)
        n = min(len(documents), _MOST_ITEMS)
        items_IT = np.zeros((n, self.n_positions), dtype=np.float32)
        np.add.at(items_IT, (item % n, self.position[rows]), self.weight[self.position[rows]])
        return items_IT

    def order(self, n: int) -> np.ndarray:
        """Random orders of n items, [R, n]; the same for every pair with as many."""
        if n not in self._order:
            generator = np.random.default_rng([self.seed, n])
            self._order[n] = generator.random((N_DRAWS, n)).argsort(axis=1)
        return self._order[n]

    def p_value(self, first: int, second: int) -> float:
        """How likely the overlap is so small by chance; NaN: it cannot be told.

        Positions are joined to as many bins as there are documents, at least 8, so that few
        firings spread over many positions can be seen to avoid each other.
        """
        mine, theirs = self.items(first), self.items(second)
        fewest = min(len(mine), len(theirs))
        if fewest < LEAST_DOCUMENTS or comb(len(mine) + len(theirs), fewest) < LEAST_DEALS:
            return float("nan")
        n_bins = min(self.n_positions, max(8, fewest))
        starts = np.arange(n_bins) * self.n_positions // n_bins
        both_IK = np.add.reduceat(np.concatenate([mine, theirs]), starts, axis=1)
        seen = _overlap(both_IK[: len(mine)].sum(0), both_IK[len(mine) :].sum(0))
        dealt_RI = (self.order(len(both_IK)) < len(mine)).astype(np.float32)
        first_RK = dealt_RI @ both_IK
        null = _overlap(first_RK, np.maximum(both_IK.sum(0) - first_RK, 0))
        return _tail(float(seen), null)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Overlap coefficient of rates by position [..., K]."""
    a, b = (x / np.maximum(x.sum(-1, keepdims=True), 1e-30) for x in (a, b))
    return np.asarray(np.minimum(a, b).sum(-1))


def _tail(seen: float, null: np.ndarray) -> float:
    """Share of the null at or below what was seen.

    Below all of the draws: that of a beta distribution with their mean and variance, as many pairs
    are tested at once, which asks for a p far below one over the draws.
    """
    from scipy.stats import beta

    below = int((null <= seen + 1e-6).sum())
    mean, variance = float(null.mean()), float(null.var())
    if below or variance <= 0 or not 0 < mean < 1:
        return (1 + below) / (1 + len(null))
    concentration = mean * (1 - mean) / variance - 1
    return float(beta.cdf(max(seen, 0.0), mean * concentration, (1 - mean) * concentration))


def _discoveries(p_P: np.ndarray) -> np.ndarray:
    """Which of the p-values are taken for true, [P] bool; NaN is not (Benjamini and Hochberg)."""
    told = np.flatnonzero(~np.isnan(p_P))
    taken = np.zeros(len(p_P), dtype=bool)
    order = told[np.argsort(p_P[told], kind="stable")]
    below = np.flatnonzero(p_P[order] <= FALSE_TWINS * np.arange(1, len(order) + 1) / len(order))
    if len(below):
        taken[order[: below[-1] + 1]] = True
    return taken


def position_twins(
    correlation: Tensor | Callable[[Tensor, Tensor], Tensor],
    W_dec: Tensor,
    profiles: Tensor,
    *,
    cosine_threshold: float = 0.7,
    correlation_threshold: float = 0.3,
    overlap_threshold: float = 0.3,
    firings: Firings | None = None,
    documents: Units | Tensor | None = None,
    seed: int = 0,
) -> PositionTwins:
    """Pairs that stand for one thing at different positions: one direction, apart in position.

    A candidate has a decoder cosine above, and a zero-lag Pearson coefficient and an overlap of
    position profiles below the thresholds. It is a twin if the overlap is also smaller than chance
    allows: the documents in which either fires are pooled and dealt to the two at random, as many
    to each as it had (a permutation test), and of all pairs called twins at most 1 % are expected
    to be none. Dead and constant features, which have no coefficient, are no twins. A candidate
    that fires in too few documents (fewer than 5 or 6 each) cannot be told, and without firings
    none can.

    Args:
        correlation: zero-lag coefficients [F, F], or a function of (first [P], second [P]) that
            gives those of chosen pairs [P] (`SparseFeatureCorrelation.of_pairs`).
        W_dec: decoder [F, d_in].
        profiles: firing rate by position [T, F].
        firings: of the same F features (`FiringPatterns.compute`).
        documents: [contexts], which document each context is from, or the units. None: each
            context is a document of its own.
        seed: of the draws.
    """
    first, second, cosine = similar_decoder_pairs(W_dec, cosine_threshold)
    r = correlation(first, second) if callable(correlation) else correlation.cpu()[first, second]
    overlap = profile_overlap(profiles, first, second)
    candidate = (r < correlation_threshold) & (overlap < overlap_threshold)
    first, second, r, cosine = (x[candidate] for x in (first, second, r, cosine))
    p = np.full(len(first), np.nan)
    if firings is not None and len(firings.context) and len(first):
        units = firing_units(firings, documents)
        test = _Dealing(firings, units, len(profiles), seed)
        pairs = zip(first.tolist(), second.tolist(), strict=True)
        p = np.array([test.p_value(i, j) for i, j in pairs])
    n_candidates, n_cannot_tell = len(p), int(np.isnan(p).sum())
    twins = torch.from_numpy(_discoveries(p))
    first, second, r, cosine = (x[twins] for x in (first, second, r, cosine))
    order = cosine.argsort(descending=True, stable=True)
    first, second, r, cosine = (x[order] for x in (first, second, r, cosine))
    lag = torch.zeros_like(first, dtype=torch.int16)
    told = firings is not None
    return PositionTwins(first, second, r, cosine, lag, n_candidates, n_cannot_tell, told)


def twins_report(found: PositionTwins, live: Tensor, n_examples: int = 20) -> dict[str, Any]:
    """Number of position twins, share of live features that have one, and examples, for JSON.

    twinned_share is None, with a reason, where most candidates cannot be told. Where some cannot
    (n_cannot_tell of n_candidates), the share is of those found, and may be larger.

    Args:
        found: of `position_twins`.
        live: [F] bool, features that fired at least once at a counted position.
        n_examples: longest list of pairs to give.
    """
    n_live = int(live.sum())
    n_twinned = len(torch.cat([found.first, found.second]).unique())
    report: dict[str, Any] = {
        "n_pairs": len(found.first),
        "n_features": n_twinned,
        "n_candidates": found.n_candidates,
        "n_cannot_tell": found.n_cannot_tell,
        "twinned_share": None,
        "examples": pair_records(found[:5], n_examples),
    }
    if n_live == 0:
        report["twinned_share_reason"] = "no feature fired"
    elif found.n_cannot_tell * 2 > found.n_candidates:
        report["twinned_share_reason"] = _cannot_tell(found)
    else:
        report["twinned_share"] = n_twinned / n_live
    return report


def _cannot_tell(found: PositionTwins) -> str:
    if not found.told_from_firings:
        return "cannot tell: it takes the firings in each document, and they were not given"
    return (
        f"cannot tell: in {found.n_cannot_tell} of {found.n_candidates} pairs of one direction "
        "the features fire in too few documents"
    )
