"""Whether SAEs that differ in their seed alone found the same features.

Two seeds are matched one to one by the sum of decoder cosines (Hungarian, `match_features`). The
mean over the features of both, 0 for those without a match, is the pair's MCC, and its floor is
that of random dictionaries of the same shape. Above `HUNGARIAN_LIMIT` features that takes too
long: then two features are a pair where each is the other's nearest (mutual nearest neighbours), a
stricter matching, whose floor is as much lower; the two are never to be compared.

PW-MCC is the number of Song et al. 2025 (arXiv 2505.20254): the mean over all pairs of runs of the
MCC of whole dictionaries, by the size of the cosine. It counts dead features and either sign, which
ours does not.

Shapes: S seeds, F features of one, P features of all seeds together, d_in dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tcsae.metrics.truth import match_features
from tcsae.metrics.units import MIN_UNITS, Units, jackknife_interval

HUNGARIAN_LIMIT = 4096
"""Live features up to which matching is Hungarian: 4 s a pair."""
SHARED_COSINE = 0.7
"""A feature is shared with another seed if the cosine with its match is above this."""
MAX_PAIRS = 15
"""Pairs of seeds that are matched; of more, neighbours in the order of the seeds."""
_AT_ONCE = 2**25


class Matched(NamedTuple):
    """Features of one SAE and their matches in another."""

    match: Tensor
    """[F] int64, -1 for none."""
    cosine: Tensor
    """[F] float64, 0 for none."""


def matching_kind(*sizes: int) -> str:
    """ "Hungarian" or "mutual nearest neighbours", by the numbers of features."""
    return "Hungarian" if max(sizes) <= HUNGARIAN_LIMIT else "mutual nearest neighbours"


def match_seeds(first: Tensor, second: Tensor) -> tuple[Matched, Matched]:
    """Features [F, d_in] and [G, d_in] of two SAEs matched, seen from either."""
    if matching_kind(len(first), len(second)) == "Hungarian":
        match_F, cosine_F = match_features(second, first)
    else:
        match_F, cosine_F = _mutual_nearest(first, second)
    back_G = torch.full((len(second),), -1)
    matched_F = match_F >= 0
    back_G[match_F[matched_F]] = matched_F.nonzero().flatten()
    cosine_G = torch.zeros(len(second), dtype=torch.float64)
    cosine_G[match_F[matched_F]] = cosine_F[matched_F]
    return Matched(match_F, cosine_F), Matched(back_G, cosine_G)


def _mutual_nearest(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    one_FD, other_GD = (functional.normalize(w.float().cpu(), dim=-1) for w in (first, second))
    nearest_F, cosine_F = _nearest(one_FD, other_GD)
    nearest_G, _ = _nearest(other_GD, one_FD)
    mutual_F = nearest_G[nearest_F] == torch.arange(len(first))
    return nearest_F.where(mutual_F, -1), cosine_F.double().where(mutual_F, 0.0)


def _nearest(one_FD: Tensor, other_GD: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the nearest of the others, and the cosine."""
    found = [(part @ other_GD.T).max(1) for part in one_FD.split(max(1, _AT_ONCE // len(other_GD)))]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def mcc(matched: tuple[Matched, Matched]) -> float:
    """The mean matched cosine over the features of both."""
    return float(torch.cat([side.cosine for side in matched]).mean())


def share_above(matched: tuple[Matched, Matched], cosine: float = SHARED_COSINE) -> float:
    """The share of the features of both whose match is nearer than this."""
    return float((torch.cat([side.cosine for side in matched]) > cosine).double().mean())


@functools.lru_cache(maxsize=64)
def random_mcc(n_features: int, d_in: int) -> float:
    """`mcc` of two dictionaries of random directions: what chance makes of that many."""
    draws = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n_features, d_in, generator=draws) for _ in range(2))
    return mcc(match_seeds(first, second))


def pairs_of(n_seeds: int) -> list[tuple[int, int]]:
    """Which seeds are matched: all pairs up to `MAX_PAIRS`, else each with as many neighbours as
    that allows, at least the next one."""
    every = [(i, j) for i in range(n_seeds) for j in range(i + 1, n_seeds)]
    if len(every) <= MAX_PAIRS:
        return every
    reach = max(1, MAX_PAIRS // n_seeds)
    around = {tuple(sorted((i, (i + k) % n_seeds))) for i in range(n_seeds) for k in _to(reach)}
    return [pair for pair in every if pair in around]


def _to(n: int) -> range:
    return range(1, n + 1)


class Stability(NamedTuple):
    """How far the seeds of one setting agree."""

    matching: str
    """Of `matching_kind`."""
    mcc: list[float]
    """Of each pair of seeds, live features."""
    shared: list[float]
    """`share_above` of each pair."""
    random: float
    """`random_mcc` of as many features."""
    pw_mcc: float | None
    """Over whole dictionaries, as published; None above `HUNGARIAN_LIMIT` features."""
    features: list[Tensor]
    """[F] float64 for each seed: the mean matched cosine over the other seeds; NaN where dead."""
    family: list[Tensor]
    """[F] int64 for each seed: near copies, and matches near each other (of two seeds all matches),
    have one number; -1 where dead."""


def stability(decoders: Sequence[Tensor], live: Sequence[Tensor]) -> Stability:
    """Match the features of two seeds or more.

    Args:
        decoders: [F, d_in] of every seed.
        live: [F] bool of every seed; the others count only in `pw_mcc`.
    """
    directions = [w.detach()[alive] for w, alive in zip(decoders, live, strict=True)]
    start = np.cumsum([0, *map(len, directions)])
    sums = [torch.zeros(len(w), dtype=torch.float64) for w in directions]
    times = [0] * len(directions)
    links = [_alike(w) + i for w, i in zip(directions, start[:-1], strict=True)]
    means, shares, published = [], [], []
    pairs = pairs_of(len(decoders))
    sizes = [len(w) for w in decoders]
    for i, j in pairs:
        found = match_seeds(directions[i], directions[j])
        means.append(mcc(found))
        shares.append(share_above(found))
        # Of two seeds a pair has one stability; of more, chance matches would chain all of them.
        least = 0.0 if len(decoders) == 2 else SHARED_COSINE
        near = (found[0].cosine > least).nonzero().flatten()
        links.append(torch.stack([near + start[i], found[0].match[near] + start[j]]))
        for one, side in zip((i, j), found, strict=True):
            sums[one] += side.cosine
            times[one] += 1
        if matching_kind(*sizes) == "Hungarian":
            sized = match_features(decoders[j], decoders[i], unsigned=True)[1]
            published.append(float(sized.mean()))
    family_P = _families(torch.cat(links, 1), int(start[-1]))
    mean_size = round(sum(map(len, directions)) / len(directions))
    return Stability(
        matching=matching_kind(*map(len, directions)),
        mcc=means,
        shared=shares,
        random=random_mcc(mean_size, decoders[0].shape[1]),
        pw_mcc=sum(published) / len(published) if published else None,
        features=[_placed(s / n, a, torch.nan) for s, n, a in zip(sums, times, live, strict=True)],
        family=[
            _placed(part, a, -1)
            for part, a in zip(family_P.split(list(map(len, directions))), live, strict=True)
        ],
    )


def _placed(values: Tensor, where_F: Tensor, fill: float) -> Tensor:
    found = torch.full(where_F.shape, fill, dtype=values.dtype)
    found[where_F] = values
    return found


def _alike(directions: Tensor) -> Tensor:
    """[2, n] pairs of features of one SAE in nearly the same direction."""
    unit_FD = functional.normalize(directions.float().cpu(), dim=-1)
    found, first = [torch.zeros(2, 0, dtype=torch.long)], 0
    for part in unit_FD.split(max(1, _AT_ONCE // max(1, len(unit_FD)))):
        pairs = (part @ unit_FD.T > SHARED_COSINE).nonzero().T
        pairs[0] += first
        found.append(pairs[:, pairs[0] < pairs[1]])
        first += len(part)
    return torch.cat(found, 1)


def _families(links: Tensor, n: int) -> Tensor:
    """[n] int64: the number of the set of linked features that each is in."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    one, other = links.numpy()
    graph = coo_matrix((np.ones(len(one)), (one, other)), shape=(n, n))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


# ------------------------------------------------------------------------ rank correlation


def rank_correlation(
    seeds: Sequence[Mapping[str, Tensor]], family: Sequence[Tensor], level: float
) -> dict[str, Any]:
    """Spearman's correlation of `x` and `y` over features, mean over seeds, and with density fixed.

    The interval leaves families out, with all their members of all seeds: what two seeds share is
    found twice, and near copies within a seed are one finding.

    Args:
        seeds: for each seed `x`, `y`, `density`, [F] each; features with a NaN are left out.
        family: [F] for each seed, of `Stability`.
        level: of the interval.

    Returns:
        `value`, `low`, `high` of the plain correlation, `given_density` {the same} of the partial
        one, `n` features, `n_families`, and `reason` for what is None.
    """
    known = [torch.stack([s["x"], s["y"], s["density"]]).isfinite().all(0) for s in seeds]
    columns = [
        torch.stack([s[n][k].double() for n in ("x", "y", "density")])
        for s, k in zip(seeds, known, strict=True)
    ]
    of = [f[k] for f, k in zip(family, known, strict=True)]
    entry: dict[str, Any] = dict.fromkeys(("value", "low", "high", "given_density", "reason"))
    entry |= {"n": sum(map(int, map(torch.sum, known))), "n_families": len(torch.cat(of).unique())}
    if min(len(f) for f in of) < MIN_UNITS or entry["n_families"] < MIN_UNITS:
        return entry | {"reason": "too few features were seen often enough"}
    units = Units(torch.cat(of))
    blocks = units.block.split([len(f) for f in of])
    keep = [[slice(None)] * len(of)]
    keep += [[block != g for block in blocks] for g in range(units.n_blocks)]
    rows = torch.stack([_correlations(columns, kept) for kept in keep])
    low, high = jackknife_interval(rows[1:], rows[0], level)
    parts = [
        {"value": float(rows[0, i]), "low": float(low[i]), "high": float(high[i])} for i in (0, 1)
    ]
    if not rows.isfinite().all():
        return entry | {"reason": "all features have the same value"}
    return entry | parts[0] | {"given_density": parts[1]}


def _correlations(columns: Sequence[Tensor], kept: Sequence[Any]) -> Tensor:
    """[2] the plain and the partial correlation, means over seeds."""
    found = [_plain_and_partial(column[:, k]) for column, k in zip(columns, kept, strict=True)]
    return torch.stack(found).mean(0)


def _plain_and_partial(columns_3F: Tensor) -> Tensor:
    from scipy.stats import rankdata

    r = torch.corrcoef(torch.from_numpy(rankdata(columns_3F.numpy(), axis=1)))
    xy, xz, yz = r[0, 1], r[0, 2], r[1, 2]
    return torch.stack([xy, (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)).sqrt()])
