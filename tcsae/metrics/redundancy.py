"""Features that say the same thing twice: near-copies, position twins, and how many are left.

Shapes: T positions, F features, P pairs of features, J chosen features, k partners per feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.metrics.masks import checked_masks, require_shape
from tcsae.metrics.twins import pair_records
from tcsae.metrics.twins import position_twins as position_twins
from tcsae.metrics.twins import profile_overlap as profile_overlap
from tcsae.metrics.twins import similar_decoder_pairs as similar_decoder_pairs
from tcsae.metrics.twins import twins_report as twins_report

_BLOCK_ROWS = 1024
# A variance below this share of the squared mean is rounding: the feature is constant there.
_CONSTANT = 1e-12
_PERMUTATIONS = 200


class FeaturePairs(NamedTuple):
    """Pairs of features, first < second, strongest first."""

    first: Tensor
    """[P] int64."""
    second: Tensor
    """[P] int64."""
    correlation: Tensor
    """[P] Pearson coefficient."""
    cosine: Tensor
    """[P] float32, cosine of the two decoder rows."""
    lag: Tensor
    """[P] int16: `second` lags `first` by that many positions."""


def _unique_pairs(first: Tensor, second: Tensor, value: Tensor, lag: Tensor) -> tuple[Tensor, ...]:
    """Pairs once each, with first < second (the lag turned to match), best value first."""
    lag = torch.where(first < second, lag, -lag)
    first, second = torch.minimum(first, second), torch.maximum(first, second)
    order = value.argsort(descending=True, stable=True)
    first, second, value, lag = (x[order] for x in (first, second, value, lag))
    _, kept = np.unique(torch.stack([first, second]).numpy(), axis=1, return_index=True)
    keep = torch.from_numpy(np.sort(kept))
    return first[keep], second[keep], value[keep], lag[keep]


def _pair_cosines(W_dec: Tensor, first: Tensor, second: Tensor) -> Tensor:
    unit = normalize(W_dec.detach().cpu().float(), dim=1)
    cosines = [
        (unit[i] * unit[j]).sum(dim=1)
        for i, j in zip(first.split(65536), second.split(65536), strict=True)
    ]
    return torch.cat(cosines) if cosines else torch.empty(0)


def redundant_pairs(
    values: Tensor,
    W_dec: Tensor,
    *,
    correlation_threshold: float = 0.9,
    cosine_threshold: float = 0.7,
    lags: Tensor | None = None,
    partners: Tensor | None = None,
) -> FeaturePairs:
    """Pairs whose activations and decoder directions both nearly agree.

    A pair is redundant if its largest Pearson coefficient over the lags is above
    `correlation_threshold` and the cosine of its decoder rows above `cosine_threshold`.

    Args:
        values: coefficients [F, F] (`LaggedCorrelation.values`), or with `partners` [F, k].
        W_dec: decoder [F, d_in].
        lags: lags of `values`, same shape. None: all 0.
        partners: feature numbers [F, k] of a `TopPartners`. None: `values` is [F, F].
    """
    first, column = (values > correlation_threshold).nonzero(as_tuple=True)
    value = values[first, column].cpu()
    lag = torch.zeros(len(first)) if lags is None else lags[first, column].cpu()
    second = (column if partners is None else partners[first, column]).cpu()
    first = first.cpu()
    other = first != second
    pairs = _unique_pairs(first[other], second[other], value[other], lag[other].to(torch.int16))
    cosine = _pair_cosines(W_dec, pairs[0], pairs[1])
    keep = cosine > cosine_threshold
    first, second, value, lag = (x[keep] for x in pairs)
    return FeaturePairs(first, second, value, cosine[keep], lag)


def redundancy_groups(pairs: FeaturePairs, n_features: int) -> list[list[int]]:
    """Connected components of the pairs, of two features or more, the largest first."""
    edges = (np.ones(len(pairs.first)), (pairs.first.numpy(), pairs.second.numpy()))
    graph = sparse.coo_matrix(edges, shape=(n_features, n_features))
    _, label = sparse.csgraph.connected_components(graph, directed=False)
    members: dict[int, list[int]] = {}
    for feature in torch.cat([pairs.first, pairs.second]).unique().tolist():
        members.setdefault(int(label[feature]), []).append(feature)
    return sorted(members.values(), key=lambda group: (-len(group), group))


def redundancy_report(pairs: FeaturePairs, live: Tensor, n_examples: int = 20) -> dict[str, Any]:
    """What `redundant_pairs` found, ready for JSON.

    redundant_share is the share of the live features that could go with one feature of every
    group kept: sum over groups of (size - 1), divided by the number of live features.

    Args:
        pairs: redundant pairs.
        live: [F] bool, features that fired at least once at a counted position.
        n_examples: longest list of groups and of pairs to give.
    """
    groups = redundancy_groups(pairs, len(live))
    n_live, n_spare = int(live.sum()), sum(len(group) - 1 for group in groups)
    report: dict[str, Any] = {
        "n_live": n_live,
        "n_pairs": len(pairs.first),
        "n_groups": len(groups),
        "group_sizes": [len(group) for group in groups],
        "n_redundant": n_spare,
        "redundant_share": n_spare / n_live if n_live else None,
        "groups": groups[:n_examples],
        "examples": pair_records(pairs, n_examples),
    }
    if n_live == 0:
        report["redundant_share_reason"] = "no feature fired"
    return report


def effective_rank(values: Tensor, halves: tuple[Tensor, Tensor] | None = None) -> float:
    """Participation ratio of the eigenvalues of the correlation matrix R, 1 to F.

    (sum lambda)^2 / sum lambda^2 = tr(R)^2 / |R|_F^2: m groups of identical features, equal in
    size, give m. The squared noise of every coefficient would add to |R|^2, the more the longer
    features last, so the squares are products of the coefficients of two halves of the documents,
    whose noise is independent: F^2 / (F + sum over i != j of r_ij(A) r_ij(B)) (cross-validation;
    unbiased in the denominator). F counts the features that vary in both halves. Where noise makes
    the sum negative, nothing is shared and the rank is F.

    Args:
        values: zero-lag coefficients [F, F]. One matrix alone cannot tell noise from what is
            shared: it only says which features vary.
        halves: [F, F] each, of two disjoint halves of the documents
            (`FeatureCorrelation.compute_halves`).

    Returns:
        NaN without halves, and where no feature varies in both.
    """
    if halves is None:
        return float("nan")
    first, second = halves
    varies = ~(values.diagonal().isnan() | first.diagonal().isnan() | second.diagonal().isnan())
    n = int(varies.sum())
    if n == 0:
        return float("nan")
    shared = sum(
        float((first[rows][:, varies].double() * second[rows][:, varies].double()).sum())
        for rows in varies.nonzero().flatten().split(_BLOCK_ROWS)
    )
    shared -= float((first.diagonal() * second.diagonal())[varies].double().sum())
    return float(min(max(n**2 / max(n + shared, 1e-9), 1.0), n))


class PositionCorrelation:
    """Position-by-position correlation of chosen features across contexts, T x T for each.

    For positions t and u of feature j: Pearson's coefficient of f_j(t) and f_j(u) over the
    contexts in which both are valid and in one segment. Holds 2 (3 J T^2 + T^2) float64 numbers,
    as the sums of two halves of the contexts are kept apart (50 MB for 64 features at T = 128).
    """

    def __init__(self, feature_ids: Sequence[int] | Tensor, n_positions: int) -> None:
        self.feature_ids = torch.as_tensor(feature_ids, dtype=torch.long)
        self.n_positions = n_positions
        self.reset()

    def reset(self) -> None:
        square = (self.n_positions, self.n_positions)
        # Of the first and of the second half of the contexts.
        self._n = torch.zeros(2, *square, dtype=torch.float64)
        self._sums = torch.zeros(2, 3, len(self.feature_ids), *square, dtype=torch.float64)

    def update(
        self,
        features: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
        half: Tensor | None = None,
    ) -> None:
        """Take in features [B, T, F], with segments [B, T] int and valid [B, T] bool.

        Args:
            half: [B] bool, in which of two halves each context is, for `compute_halves`. None:
                all in the first.
        """
        require_shape(features, features.shape[-1], self.n_positions)
        segments, valid = checked_masks(features, segments, valid)
        if half is None:
            half = torch.zeros(len(features), dtype=torch.bool)
        for side, chosen in enumerate((~half, half)):
            if chosen.any():
                some = chosen.to(features.device)
                self._add(side, features[some], segments[some], valid[some])

    def _add(self, side: int, features: Tensor, segments: Tensor, valid: Tensor) -> None:
        # One row for every segment of every context, so that all sums become matrix products.
        number = segments.long() - segments.min() + 1
        number += torch.arange(len(segments), device=number.device)[:, None] * number.max()
        row_BT = number.unique(return_inverse=True)[1].cpu()
        position = torch.arange(self.n_positions)
        chosen = features.detach()[:, :, self.feature_ids.to(features.device)].double().cpu()
        f_JBT = torch.where(valid.cpu(), chosen.permute(2, 0, 1), 0.0)
        here_RT = torch.zeros(int(row_BT.max()) + 1, self.n_positions, dtype=torch.float64)
        f_JRT = here_RT.repeat(len(f_JBT), 1, 1)
        here_RT[row_BT, position] = valid.double().cpu()
        f_JRT[:, row_BT, position] = f_JBT
        self._n[side] += here_RT.T @ here_RT
        self._sums[side, 0] += f_JRT.transpose(1, 2) @ here_RT
        self._sums[side, 1] += f_JRT.square().transpose(1, 2) @ here_RT
        self._sums[side, 2] += f_JRT.transpose(1, 2) @ f_JRT

    def compute(self) -> Tensor:
        """Coefficients [J, T, T] float64; NaN where fewer than two contexts count, or f_j is
        constant at one of the two positions."""
        return self._coefficients(self._n.sum(dim=0), self._sums.sum(dim=0))

    def compute_halves(self) -> tuple[Tensor, Tensor]:
        """The same of each of the two halves of the contexts."""
        first, second = (
            self._coefficients(*side) for side in zip(self._n, self._sums, strict=True)
        )
        return first, second

    @staticmethod
    def _coefficients(n_TT: Tensor, sums: Tensor) -> Tensor:
        mean_JTU, square_JTU, product_JTU = sums / n_TT
        variance = square_JTU - mean_JTU.square()
        variance[variance <= _CONSTANT * square_JTU] = torch.nan
        covariance = product_JTU - mean_JTU * mean_JTU.transpose(1, 2)
        r = covariance * variance.rsqrt() * variance.transpose(1, 2).rsqrt()
        r[:, n_TT < 2] = torch.nan
        return r.clamp_(-1, 1)


def diagonal_means(correlation: Tensor) -> Tensor:
    """Mean of each diagonal of [J, T, T]: entry d is the mean over t of R(t, t + d), [J, T].

    NaN entries are left out; NaN where a whole diagonal is undefined.
    """
    n_positions = correlation.shape[-1]
    means = [correlation.diagonal(d, 1, 2).nanmean(dim=1) for d in range(n_positions)]
    return torch.stack(means, dim=1)


def toeplitz_share(
    correlation: Tensor, halves: tuple[Tensor, Tensor] | None = None, *, seed: int = 0
) -> Tensor:
    """How far R(t, u) depends on u - t only: [J] in [0, 1], 1 for a stationary feature.

    Share of the variance of the entries above the diagonal that the diagonal means explain. The
    noise of the entries is in neither of its two sums, as both are products of the entries of two
    halves A and B of the documents: 1 - sum e_A e_B / sum d_A d_B, with e an entry less its
    diagonal's mean and d an entry less the mean of all. Entries that are undefined in a half are
    left out of both.

    Args:
        correlation: [J, T, T]; an entry that is undefined here is left out too.
        halves: [J, T, T] each, of the halves (`PositionCorrelation.compute_halves`).
        seed: of the permutations.

    Returns:
        NaN where it cannot be told: without halves, and where sum d_A d_B is no more than noise. It
        is, unless it lies 6 standard deviations above what it is when the positions of one half
        are permuted (Mantel 1967): a feature that is constant in a context, or white, is as
        stationary as can be, but has nothing that distance could explain.
    """
    n_features, n_positions = correlation.shape[:2]
    share = torch.full((n_features,), torch.nan, dtype=torch.float64)
    if halves is None:
        return share
    t, u = torch.triu_indices(n_positions, n_positions, offset=1)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n_positions, generator=generator) for _ in range(_PERMUTATIONS)]
    for j, (whole, *pair) in enumerate(zip(correlation, *halves, strict=True)):
        known = torch.stack([whole, *pair]).isfinite().all(dim=0)
        defined = known[t, u]
        if not defined.any():
            continue
        entries = [r.double()[t, u].where(defined, torch.nan) for r in pair]
        d_A, d_B = (r - r.nanmean() for r in entries)
        e_A, e_B = (r - _of_diagonals(r, u - t) for r in entries)
        total = float((d_A * d_B).nansum())
        if total > _permuted_limit(d_A, d_B, n_positions, orders):
            share[j] = 1 - float((e_A * e_B).nansum()) / total
    return share.clamp(0, 1)


def _of_diagonals(entries: Tensor, distance: Tensor) -> Tensor:
    """The mean of each entry's diagonal, without NaN."""
    defined = entries.isfinite().double()
    size = torch.zeros(int(distance.max()) + 1).double().index_add_(0, distance, defined)
    total = torch.zeros_like(size).index_add_(0, distance, entries.nan_to_num())
    return (total / size)[distance]


def _permuted_limit(d_A: Tensor, d_B: Tensor, n_positions: int, orders: Sequence[Tensor]) -> float:
    """What sum d_A d_B must be above: 6 standard deviations over its mean by permutation."""
    t, u = torch.triu_indices(n_positions, n_positions, offset=1)
    square = torch.zeros(n_positions, n_positions, dtype=torch.float64)
    square[t, u] = square[u, t] = d_B.nan_to_num()
    by_chance = torch.stack([(square[p[t], p[u]] * d_A).nansum() for p in orders])
    return float(by_chance.mean() + 6 * by_chance.std() + _CONSTANT)
