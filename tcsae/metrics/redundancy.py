"""Features that say the same thing twice: near-copies, position twins, and how many are left.

Shapes: T positions, F features, P pairs of features, J chosen features, k partners per feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.metrics.masks import checked_masks, require_shape

_BLOCK_ROWS = 1024
# A variance below this share of the squared mean is rounding: the feature is constant there.
_CONSTANT = 1e-12


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


def _pair_records(pairs: FeaturePairs, n: int) -> list[dict[str, Any]]:
    columns = (column[:n].tolist() for column in pairs)
    return [
        {"features": [i, j], "correlation": r, "cosine": cosine, "lag": lag}
        for i, j, r, cosine, lag in zip(*columns, strict=True)
    ]


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
        "examples": _pair_records(pairs, n_examples),
    }
    if n_live == 0:
        report["redundant_share_reason"] = "no feature fired"
    return report


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


def position_twins(
    correlation: Tensor | Callable[[Tensor, Tensor], Tensor],
    W_dec: Tensor,
    profiles: Tensor,
    *,
    cosine_threshold: float = 0.7,
    correlation_threshold: float = 0.3,
    overlap_threshold: float = 0.3,
) -> FeaturePairs:
    """Pairs that stand for one thing at different positions: one direction, apart in position.

    Decoder cosine above, zero-lag Pearson coefficient below, and overlap of the position profiles
    below their thresholds. Dead and constant features, which have no coefficient, are no twins.

    Args:
        correlation: zero-lag coefficients [F, F], or a function of (first [P], second [P]) that
            gives those of chosen pairs [P] (`SparseFeatureCorrelation.of_pairs`).
        W_dec: decoder [F, d_in].
        profiles: firing rate by position [T, F].
    """
    first, second, cosine = similar_decoder_pairs(W_dec, cosine_threshold)
    r = correlation(first, second) if callable(correlation) else correlation.cpu()[first, second]
    overlap = profile_overlap(profiles, first, second)
    twins = (r < correlation_threshold) & (overlap < overlap_threshold)
    first, second, r, cosine = (x[twins] for x in (first, second, r, cosine))
    order = cosine.argsort(descending=True, stable=True)
    first, second, r, cosine = (x[order] for x in (first, second, r, cosine))
    return FeaturePairs(first, second, r, cosine, torch.zeros_like(first, dtype=torch.int16))


def twins_report(pairs: FeaturePairs, live: Tensor, n_examples: int = 20) -> dict[str, Any]:
    """Number of position twins, share of live features that have one, and examples, for JSON."""
    n_live = int(live.sum())
    n_twinned = len(torch.cat([pairs.first, pairs.second]).unique())
    report: dict[str, Any] = {
        "n_pairs": len(pairs.first),
        "n_features": n_twinned,
        "twinned_share": n_twinned / n_live if n_live else None,
        "examples": _pair_records(pairs, n_examples),
    }
    if n_live == 0:
        report["twinned_share_reason"] = "no feature fired"
    return report


def effective_rank(values: Tensor) -> float:
    """Participation ratio of the eigenvalues of a correlation matrix, 1 to F; NaN if none varies.

    (sum lambda)^2 / sum lambda^2 = tr(R)^2 / |R|_F^2, so no eigenvalue is needed. m groups of
    identical features, equal in size, give m. Sampling noise adds about 1 / n to every squared
    coefficient: with n counted positions the value is at most about n.

    Args:
        values: zero-lag coefficients [F, F]; features whose diagonal is NaN are left out.
    """
    live = ~values.diagonal().isnan()
    squares = sum(
        values[rows][:, live].square().sum(dtype=torch.float64)
        for rows in live.nonzero().flatten().split(_BLOCK_ROWS)
    )
    trace = values.diagonal()[live].sum(dtype=torch.float64)
    return float(trace**2 / squares) if live.any() else float("nan")


class PositionCorrelation:
    """Position-by-position correlation of chosen features across contexts, T x T for each.

    For positions t and u of feature j: Pearson's coefficient of f_j(t) and f_j(u) over the
    contexts in which both are valid and in one segment. Holds 3 J T^2 + T^2 float64 numbers
    (25 MB for 64 features at T = 128).
    """

    def __init__(self, feature_ids: Sequence[int] | Tensor, n_positions: int) -> None:
        self.feature_ids = torch.as_tensor(feature_ids, dtype=torch.long)
        self.n_positions = n_positions
        self.reset()

    def reset(self) -> None:
        square = (self.n_positions, self.n_positions)
        self._n_TT = torch.zeros(square, dtype=torch.float64)
        self._sums = torch.zeros(3, len(self.feature_ids), *square, dtype=torch.float64)

    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Take in features [B, T, F], with segments [B, T] int and valid [B, T] bool."""
        require_shape(features, features.shape[-1], self.n_positions)
        segments, valid = checked_masks(features, segments, valid)
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
        self._n_TT += here_RT.T @ here_RT
        self._sums[0] += f_JRT.transpose(1, 2) @ here_RT
        self._sums[1] += f_JRT.square().transpose(1, 2) @ here_RT
        self._sums[2] += f_JRT.transpose(1, 2) @ f_JRT

    def compute(self) -> Tensor:
        """Coefficients [J, T, T] float64; NaN where fewer than two contexts count, or f_j is
        constant at one of the two positions."""
        mean_JTU, square_JTU, product_JTU = self._sums / self._n_TT
        variance = square_JTU - mean_JTU.square()
        variance[variance <= _CONSTANT * square_JTU] = torch.nan
        covariance = product_JTU - mean_JTU * mean_JTU.transpose(1, 2)
        r = covariance * variance.rsqrt() * variance.transpose(1, 2).rsqrt()
        r[:, self._n_TT < 2] = torch.nan
        return r.clamp_(-1, 1)


def diagonal_means(correlation: Tensor) -> Tensor:
    """Mean of each diagonal of [J, T, T]: entry d is the mean over t of R(t, t + d), [J, T].

    NaN entries are left out; NaN where a whole diagonal is undefined.
    """
    n_positions = correlation.shape[-1]
    means = [correlation.diagonal(d, 1, 2).nanmean(dim=1) for d in range(n_positions)]
    return torch.stack(means, dim=1)


def toeplitz_share(correlation: Tensor) -> Tensor:
    """How far R(t, u) depends on u - t only: [J], 1 for a stationary feature.

    Share of the variance of the entries above the diagonal of [J, T, T] that the diagonal means
    explain (1 - residual / total sum of squares, undefined entries left out). NaN if the entries
    do not vary. Noise lowers it: with N contexts each entry has variance about (1 - R^2)^2 / N,
    so a feature without any memory has a share near 2 / T, and few contexts prove nothing.
    """
    n_positions = correlation.shape[-1]
    t, u = torch.triu_indices(n_positions, n_positions, offset=1)
    entries = correlation[:, t, u]
    residual = entries - diagonal_means(correlation)[:, u - t]
    total = entries - entries.nanmean(dim=1, keepdim=True)
    total_squares = total.square().nansum(dim=1)
    explained = 1 - residual.square().nansum(dim=1) / total_squares
    return torch.where(total_squares > _CONSTANT, explained, torch.nan)
