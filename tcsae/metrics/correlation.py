"""Pearson correlation between features, at one position or at a distance of up to K positions.

Shapes: B contexts, T positions, F features, P counted pairs of positions, N counted positions,
K largest lag, k partners kept per feature.

For a lag k >= 0 the counted pairs are (t, t + k) in one context with both positions valid and in
one segment. R_ij(k) is Pearson's coefficient of f_i(t) and f_j(t + k) over those pairs, with the
means and variances of those same pairs, so it lies in [-1, 1]; R_ij(-k) = R_ji(k). A lag k > 0
in `lags[i, j]` means that feature j lags feature i: j does what i did, k positions later.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from tcsae.metrics.masks import checked_masks, pair_mask, require_shape

# Sparse products win below this share of non-zeros (measured: 10 ns against .01 ns a product).
SPARSE_BELOW = 0.03
# Rows of a [F, F] matrix worked on at a time, to bound temporaries.
_BLOCK_ROWS = 512
# Product matrices that `feature_correlation` holds at once.
_PRODUCT_BYTES = 2**30
# A variance below this share of the squared mean is rounding: the feature is constant.
_CONSTANT = 1e-12


class LaggedCorrelation(NamedTuple):
    """Largest (signed) Pearson coefficient of every pair of features over the lags looked at."""

    values: Tensor
    """[F, F], symmetric, in [-1, 1]; NaN where a feature is dead or constant."""
    lags: Tensor
    """[F, F] int16, antisymmetric: feature j lags feature i by `lags[i, j]` positions."""


class TopPartners(NamedTuple):
    """The k most correlated partners of every feature, best first."""

    partners: Tensor
    """[F, k] int64, feature numbers; -1 where a feature has fewer partners."""
    values: Tensor
    """[F, k] float32, the largest Pearson coefficient over the lags; NaN where partner is -1."""
    lags: Tensor
    """[F, k] int16: the partner lags the feature by that many positions."""


def _pair_rows(segments: Tensor, valid: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Rows b * T + t and b * T + t + lag of the counted pairs, each [P]."""
    lag = min(lag, valid.shape[1])
    context, position = pair_mask(segments, valid, lag).nonzero(as_tuple=True)
    heads = context * valid.shape[1] + position
    return heads, heads + lag


def _blocks(n: int, size: int = _BLOCK_ROWS) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@dataclass
class _Marginal:
    """Mean and centred sum of squares of every column over n rows, float64 [F] each."""

    mean: Tensor
    squares: Tensor

    @classmethod
    def of_csr(cls, rows_PF: sparse.csr_matrix) -> _Marginal:
        n = rows_PF.shape[0]
        mean = torch.from_numpy(np.ravel(rows_PF.sum(axis=0)) / n)
        squares = torch.from_numpy(np.ravel(rows_PF.power(2).sum(axis=0)))
        return cls(mean, (squares - n * mean.square()).clamp_(min=0))

    def inverse_scale(self, n: int) -> Tensor:
        """1 / sqrt(squares); NaN for a constant feature."""
        varies = self.squares > _CONSTANT * n * self.mean.square()
        return torch.where(varies, self.squares.rsqrt(), torch.nan)


def to_csr(rows_NF: Tensor, valid_N: Tensor | None = None) -> sparse.csr_matrix:
    """Non-zeros of dense rows as a float64 CSR matrix; rows that are not valid become empty."""
    row, column = rows_NF.detach().nonzero(as_tuple=True)
    if valid_N is not None:
        row, column = row[valid_N[row]], column[valid_N[row]]
    values = rows_NF.detach()[row, column].double().cpu().numpy()
    indptr = np.zeros(len(rows_NF) + 1, dtype=np.int64)
    np.cumsum(torch.bincount(row, minlength=len(rows_NF)).cpu().numpy(), out=indptr[1:])
    entries = (values, column.int().cpu().numpy(), indptr)
    return sparse.csr_matrix(entries, shape=tuple(rows_NF.shape))


def _products(heads_FP: sparse.csr_matrix, tails_PF: sparse.csr_matrix) -> Tensor:
    """Sum over pairs of head_i * tail_j, float64."""
    n_pairs, n_features = tails_PF.shape
    if tails_PF.nnz < SPARSE_BELOW * n_pairs * n_features:
        return torch.from_numpy((heads_FP @ tails_PF).toarray())
    heads_FP, total = heads_FP.tocsc(), torch.zeros(heads_FP.shape[0], n_features).double()
    for pairs in _blocks(n_pairs, 4096):
        heads = torch.from_numpy(heads_FP[:, pairs].toarray())
        total.addmm_(heads, torch.from_numpy(tails_PF[pairs].toarray()))
    return total


@dataclass
class _LagMoments:
    """Sums over the counted pairs of one lag, centred batch by batch and merged as Chan, Golub
    and LeVeque (1979): float32 stays right for features with a large mean."""

    product_FF: Tensor
    head: _Marginal
    tail: _Marginal
    n: int = 0

    @classmethod
    def zeros(cls, n_features: int, dtype: torch.dtype, device: torch.device) -> _LagMoments:
        product = torch.zeros(n_features, n_features, dtype=dtype, device=device)
        zeros = torch.zeros(4, n_features, dtype=torch.float64, device=device)
        return cls(product, _Marginal(zeros[0], zeros[1]), _Marginal(zeros[2], zeros[3]))

    def absorb(self, n: int, head: _Marginal, tail: _Marginal) -> None:
        """Take in the marginals of n pairs; their own centred product is added apart."""
        weight = self.n * n / (self.n + n)
        steps = head.mean - self.head.mean, tail.mean - self.tail.mean
        self.product_FF.addr_(*(s.to(self.product_FF.dtype) for s in steps), alpha=weight)
        self.n += n
        for mine, theirs, step in zip((self.head, self.tail), (head, tail), steps, strict=True):
            mine.squares += theirs.squares + weight * step.square()
            mine.mean += step * (n / self.n)

    def add_dense(self, heads_PF: Tensor, tails_PF: Tensor) -> None:
        dtype = self.product_FF.dtype

        def centred(rows: Tensor) -> tuple[Tensor, _Marginal]:
            mean = rows.mean(dim=0, dtype=torch.float64)
            wide = rows.to(torch.promote_types(rows.dtype, dtype))
            rows = (wide - mean.to(wide.dtype)).to(dtype)
            return rows, _Marginal(mean, rows.square().sum(dim=0, dtype=torch.float64))

        (heads, head), (tails, tail) = centred(heads_PF), centred(tails_PF)
        self.absorb(len(heads), head, tail)
        self.product_FF.addmm_(heads.T, tails)

    def add_sparse(self, heads_PF: sparse.csr_matrix, tails_PF: sparse.csr_matrix) -> None:
        n, heads_FP = heads_PF.shape[0], heads_PF.T.tocsr()
        head, tail = map(_Marginal.of_csr, (heads_PF, tails_PF))
        self.absorb(n, head, tail)
        for rows in _blocks(len(self.product_FF)):
            product = _products(heads_FP[rows], tails_PF)
            product.addr_(head.mean[rows], tail.mean, alpha=-n)
            self.product_FF[rows] += product.to(self.product_FF.dtype)

    def plus(self, other: _LagMoments) -> _LagMoments:
        """The sums over the pairs of both, in memory of their own."""
        merged = deepcopy(self)
        if other.n:
            merged.absorb(other.n, other.head, other.tail)
            merged.product_FF += other.product_FF
        return merged

    def pearson(self, rows: slice, *, swapped: bool) -> Tensor:
        """R_ij(lag), or with `swapped` R_ij(-lag), for i in rows: [rows, F]; -inf if undefined."""
        product = self.product_FF[:, rows].T if swapped else self.product_FF[rows]
        head, tail = (self.tail, self.head) if swapped else (self.head, self.tail)
        r = product * head.inverse_scale(self.n)[rows, None].to(product.dtype)
        r *= tail.inverse_scale(self.n).to(product.dtype)
        return r.clamp_(-1, 1).nan_to_num_(nan=-torch.inf)


class FeatureCorrelation:
    """Pearson correlation of all pairs of features over lags -K..K, one batch at a time.

    Holds an [F, F] matrix per lag 0..K in `dtype` (float32: 191 MB for 2304 features and K = 8,
    1.07 GB a lag for 16k). Too much: several passes with `min_lag`, joined by `larger_of`. Lag 0
    is held once more where `update` is told of two halves of the contexts.
    """

    def __init__(
        self,
        n_features: int,
        max_lag: int = 0,
        dtype: torch.dtype = torch.float32,
        *,
        min_lag: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= min_lag <= max_lag:
            raise ValueError(f"need 0 <= min_lag <= max_lag, not {min_lag} and {max_lag}")
        self.n_features, self.dtype, self.device = n_features, dtype, torch.device(device)
        self.lags = range(min_lag, max_lag + 1)
        self.reset()

    def reset(self) -> None:
        self._moments = {
            lag: _LagMoments.zeros(self.n_features, self.dtype, self.device) for lag in self.lags
        }
        # Lag 0 of the contexts of the second half; `_moments[0]` has the others.
        self._second_half: _LagMoments | None = None

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
        require_shape(features, self.n_features)
        segments, valid = checked_masks(features, segments, valid)
        rows_NF = features.detach().flatten(0, 1).to(self.device)
        share = rows_NF.count_nonzero().item() / max(rows_NF.numel(), 1)
        codes = to_csr(rows_NF) if self.device.type == "cpu" and share < SPARSE_BELOW else None
        for lag in self.lags:
            for moments, counted in self._halves(lag, valid, half):
                heads, tails = (r.to(self.device) for r in _pair_rows(segments, counted, lag))
                if len(heads) == 0:
                    continue
                if codes is not None:
                    moments.add_sparse(codes[heads.numpy()], codes[tails.numpy()])
                else:
                    moments.add_dense(rows_NF[heads], rows_NF[tails])

    def _halves(
        self, lag: int, valid: Tensor, half: Tensor | None
    ) -> list[tuple[_LagMoments, Tensor]]:
        """Which sums take which positions [B, T]."""
        if lag > 0 or half is None:
            return [(self._moments[lag], valid)]
        if self._second_half is None:
            self._second_half = _LagMoments.zeros(self.n_features, self.dtype, self.device)
        second = half.to(valid.device)[:, None]
        return [(self._moments[0], valid & ~second), (self._second_half, valid & second)]

    def compute_halves(self) -> tuple[Tensor, Tensor]:
        """Zero-lag coefficients [F, F] of the two halves of the contexts, each on its own.

        NaN in a half in which one of the two features does not vary.
        """
        shape = (self.n_features, self.n_features)
        found = []
        for moments in (self._moments[0], self._second_half):
            if moments is None or moments.n < 2:
                found.append(torch.full(shape, torch.nan, dtype=self.dtype, device=self.device))
            else:
                r = moments.pearson(slice(0, self.n_features), swapped=False)
                found.append(r.masked_fill_(r == -torch.inf, torch.nan))
        return found[0], found[1]

    def compute(self, max_lag: int | None = None) -> LaggedCorrelation:
        """Largest coefficient over the lags up to `max_lag` (default: all), with its lag.

        Of equal ones the one at the smaller distance. The diagonal of a feature that varies is 1
        at lag 0. Dead and constant features, and fewer than two pairs, give NaN at lag 0.
        """
        shape = (self.n_features, self.n_features)
        values = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.device)
        lags = torch.zeros(shape, dtype=torch.int16, device=self.device)
        moments_of = dict(self._moments)
        if self._second_half is not None:
            moments_of[0] = moments_of[0].plus(self._second_half)
        known = {lag: moments for lag, moments in moments_of.items() if moments.n > 1}
        for rows in _blocks(self.n_features):
            for lag in (k for k in known if max_lag is None or k <= max_lag):
                for swapped in (False, True) if lag else (False,):
                    r = known[lag].pearson(rows, swapped=swapped)
                    better = r > values[rows]
                    values[rows] = torch.where(better, r, values[rows])
                    lags[rows].masked_fill_(better, -lag if swapped else lag)
        if 0 in known:
            values.diagonal().masked_fill_(values.diagonal() > -torch.inf, 1.0)
            lags.fill_diagonal_(0)
        values.masked_fill_(values == -torch.inf, torch.nan)
        return LaggedCorrelation(_mirrored(values, 1), _mirrored(lags, -1))


def _mirrored(matrix: Tensor, sign: int) -> Tensor:
    """Overwrite the lower triangle with the upper one, so that ties and rounding agree."""
    for rows in _blocks(len(matrix)):
        block = matrix[rows, rows]
        matrix[rows, rows] = block.triu() + sign * block.triu(1).T
        matrix[rows.stop :, rows] = sign * matrix[rows, rows.stop :].T
    return matrix


def larger_of(first: LaggedCorrelation, second: LaggedCorrelation) -> LaggedCorrelation:
    """Entry by entry the larger of two results; `first` wins a tie, and is overwritten."""
    for rows in _blocks(len(first.values)):
        old, new = first.values[rows], second.values[rows]
        better = (new > old) | (old.isnan() & ~new.isnan())
        old.copy_(torch.where(better, new, old))
        first.lags[rows] = torch.where(better, second.lags[rows], first.lags[rows])
    return first


def feature_correlation(
    features: Tensor,
    max_lag: int = 0,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> LaggedCorrelation:
    """Largest signed Pearson coefficient of every pair of features over lags -max_lag..max_lag.

    Args:
        features: codes [B, T, F].
        max_lag: largest distance in positions; 0 compares features at the same position.
        segments: [B, T] document numbers (None: one document a context).
        valid: [B, T], which positions count (None: all).

    Returns:
        values [F, F] (float64 if the features are, else float32) and lags [F, F]:
        `lags[i, j] = k` means f_j(t + k) follows f_i(t). See `FeatureCorrelation.compute`.

    Raises:
        ValueError: features are not three-dimensional, or max_lag is negative.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    n_features = features.shape[-1]
    at_once = max(1, _PRODUCT_BYTES // max(1, n_features**2 * dtype.itemsize))

    def of_lags(low: int) -> LaggedCorrelation:
        high = min(low + at_once - 1, max_lag)
        some = FeatureCorrelation(n_features, high, dtype, min_lag=low, device=features.device)
        some.update(features, segments=segments, valid=valid)
        return some.compute()

    return reduce(larger_of, map(of_lags, range(0, max(max_lag, 0) + 1, at_once)))


def _without_gaps(partners: Tensor, values: Tensor, lags: Tensor) -> TopPartners:
    gap = values == -torch.inf
    lags = lags.masked_fill(gap, 0)
    return TopPartners(partners.masked_fill(gap, -1), values.masked_fill(gap, torch.nan), lags)


def top_partners(
    heads_PF: sparse.csr_matrix, tails_PF: sparse.csr_matrix, top_k: int, lag: int = 0
) -> TopPartners:
    """The top_k (at most F - 1) largest Pearson coefficients of each head column with the others.

    Row p of the two float64 matrices is one counted pair, the tail `lag` positions after the
    head. On 0/1 columns this is the phi coefficient.
    """
    n, n_features = heads_PF.shape
    top_k = max(0, min(top_k, n_features - 1))
    partners = torch.full((n_features, top_k), -1)
    values = torch.full((n_features, top_k), -torch.inf)
    if n > 1 and top_k > 0:
        heads_FP, head, tail = heads_PF.T.tocsr(), *map(_Marginal.of_csr, (heads_PF, tails_PF))
        head_scale, tail_scale = head.inverse_scale(n), tail.inverse_scale(n)
        for rows in _blocks(n_features):
            r = _products(heads_FP[rows], tails_PF).addr_(head.mean[rows], tail.mean, alpha=-n)
            r = r.mul_(head_scale[rows, None]).mul_(tail_scale).float().clamp_(-1, 1)
            r.nan_to_num_(nan=-torch.inf)
            r[torch.arange(len(r)), torch.arange(rows.start, rows.stop)] = -torch.inf
            values[rows], partners[rows] = r.topk(top_k)
    return _without_gaps(partners, values, torch.full_like(partners, lag, dtype=torch.int16))


def _larger_partners(parts: list[TopPartners]) -> TopPartners:
    """The best k of all parts, each partner once, with the largest of its values."""
    partners, values, lags = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    values = values.nan_to_num(nan=-torch.inf)
    # Sorted by value, then by partner: what repeats a partner comes after its best value.
    order = values.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, partners.gather(1, order).argsort(dim=1, stable=True))
    partners, values, lags = (x.gather(1, order) for x in (partners, values, lags))
    repeated = torch.zeros_like(partners, dtype=torch.bool)
    repeated[:, 1:] = partners[:, 1:] == partners[:, :-1]
    values, best = values.masked_fill(repeated, -torch.inf).topk(parts[0].values.shape[1], dim=1)
    return _without_gaps(partners.gather(1, best), values, lags.gather(1, best))


class SparseFeatureCorrelation:
    """The same coefficients for dictionaries too wide for an [F, F] matrix (above 16k features).

    Keeps the non-zero codes (12 bytes each), multiplies them in blocks of rows, and returns each
    feature's `top_k` best partners, with exact values, negative ones included. Dropped: the pairs
    in which neither is in the other's top_k, so a group of more than top_k + 1 loses some links.
    """

    def __init__(self, n_features: int, max_lag: int = 0) -> None:
        self.n_features, self.max_lag = n_features, max_lag
        self.reset()

    def reset(self) -> None:
        self._batches: list[tuple[sparse.csr_matrix, Tensor, Tensor]] = []

    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Take in features [B, T, F], with segments [B, T] int and valid [B, T] bool."""
        require_shape(features, self.n_features)
        segments, valid = checked_masks(features, segments, valid)
        codes = to_csr(features.flatten(0, 1), valid.flatten())
        self._batches.append((codes, segments.cpu(), valid.cpu()))

    def _ends(self, lag: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Codes at the heads and at the tails of the counted pairs, [P, F] each."""
        empty = sparse.csr_matrix((0, self.n_features))
        rows = [(codes, *_pair_rows(segs, valid, lag)) for codes, segs, valid in self._batches]
        heads = sparse.vstack([empty, *(codes[h.numpy()] for codes, h, _ in rows)], format="csr")
        tails = sparse.vstack([empty, *(codes[t.numpy()] for codes, _, t in rows)], format="csr")
        return heads, tails

    def compute(self, top_k: int = 32, max_lag: int | None = None) -> TopPartners:
        """Best partners of every feature over the lags -max_lag..max_lag (default: all)."""
        parts: list[TopPartners] = []
        for lag in range((self.max_lag if max_lag is None else max_lag) + 1):
            heads, tails = self._ends(lag)
            for sign in (1, -1) if lag else (1,):
                ends = (heads, tails) if sign == 1 else (tails, heads)
                parts = [_larger_partners([*parts, top_partners(*ends, top_k, sign * lag)])]
        return parts[0]

    def of_pairs(self, first: Tensor, second: Tensor) -> Tensor:
        """Exact zero-lag coefficients of chosen pairs, [P] float32; NaN where undefined."""
        codes_NF = self._ends(0)[0]
        n, marginal, codes_FN = codes_NF.shape[0], _Marginal.of_csr(codes_NF), codes_NF.T.tocsr()
        product = torch.zeros(len(first), dtype=torch.float64)
        for some in _blocks(len(first), 4096):
            both = codes_FN[first[some].numpy()].multiply(codes_FN[second[some].numpy()])
            product[some] = torch.from_numpy(np.ravel(both.sum(axis=1)))
        centred = product - n * marginal.mean[first] * marginal.mean[second]
        scale = marginal.inverse_scale(n)
        return (centred * scale[first] * scale[second]).float().clamp_(-1, 1)
