"""Autocorrelation of SAE features along the positions of a context, and what follows from it.

Shapes: B contexts of a batch, T positions, F features, K = max_lag, G blocks of documents.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.accumulator import with_deleted
from tcsae.metrics.masks import checked_masks, pair_weights
from tcsae.metrics.position_sums import (
    Added,
    Centring,
    MeanProducts,
    PositionSums,
    pairs_of_blocks,
    scale_without,
)
from tcsae.metrics.units import MAX_BLOCKS, Units

# Features multiplied at a time: the working set then stays in the processor's cache.
_FEATURE_CHUNK = 128


def autocorrelation(
    features: Tensor,
    max_lag: int,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
    units: Units | None = None,
) -> Tensor:
    """Autocorrelation of each feature over positions, pooled over contexts.

    With mu_j(t) the mean of f[:, t, j] over documents, and the pairs of positions (t, t + k) that
    are both valid and in one segment:

        c_j(k)   = mean over counted pairs of f[n, t] f[n, t + k] - mu_j(t) mu_j(t + k)
        rho_j(k) = c_j(k) / c_j(0)

    Centring by position keeps a trend over positions from passing for memory; centring by context
    would push rho down by about (correlation time) / T (Marriott and Pope 1954). The products of
    means are estimated from pairs of different documents (`position_sums`), so that c has no bias
    however few documents there are, however alike the contexts of one are, and however much of a
    lag's pairs masks and segments leave. A position seen in a single document is centred by the
    mean over all tokens; with one document in all every rho is NaN.

    Args:
        features: [B, T, F].
        max_lag: largest lag in positions, below T.
        segments: [B, T], the number of the document within the context. None: one document.
        valid: [B, T] bool. None: every position is valid.
        units: which contexts are from one document. None: each from its own.

    Returns:
        rho, [max_lag + 1, F] float64, no unit. NaN for a feature that does not vary about its
        position means, and at lags without a counted pair.

    Raises:
        ValueError: shapes do not fit, or max_lag is not in 0 .. T - 1.

    Example:
        >>> f_BTF = torch.rand(64, 128, 16)
        >>> autocorrelation(f_BTF, 32).shape
        torch.Size([33, 16])
    """
    checked_masks(features, segments, valid)
    accumulator = Autocorrelation(features.shape[2], features.shape[1], max_lag, units=units)
    accumulator.update(features, segments=segments, valid=valid)
    return accumulator.compute()


class Autocorrelation:
    """`autocorrelation` over any number of batches, exact in one pass.

    Memory: that of `PositionSums`, and 16 G (K + 1) F bytes more (78 MB at G = 64, K = 32,
    F = 2304).

    Args:
        n_features: F.
        n_positions: T.
        max_lag: K, below T.
        units, n_blocks: see `Accumulator`.
        sums: those that are shared with other metrics and updated by their owner, who then calls
            `add`. None: its own.
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int,
        max_lag: int,
        *,
        units: Units | None = None,
        n_blocks: int = MAX_BLOCKS,
        sums: PositionSums | None = None,
    ) -> None:
        if not 0 <= max_lag < n_positions:
            raise ValueError(
                f"max_lag must be 0 to {n_positions - 1} for {n_positions} positions, not {max_lag}"
            )
        self.max_lag = max_lag
        own = PositionSums(n_features, n_positions, units=units, n_blocks=n_blocks)
        self.sums = sums or own
        self._state: dict[str, Tensor] = {}

    @property
    def n_contexts(self) -> int:
        """Contexts seen."""
        return self.sums.n_contexts

    def reset(self) -> None:
        """Forget every batch."""
        self.sums.reset()
        self._state = {}

    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Add a batch: features [B, T, F], segments [B, T], valid [B, T]."""
        for added in self.sums.add(features, segments=segments, valid=valid):
            self.add(added)

    @torch.no_grad()
    def add(self, added: Added) -> None:
        """Add contexts that `sums` has taken in."""
        d_BTF = added.d
        if not self._state:
            self._start(d_BTF)
        early_BKT = pair_weights(added.segments, added.valid, self.max_lag, torch.float64)
        ends_BKT = early_BKT.clone()
        for lag in range(self.max_lag + 1):
            ends_BKT[:, lag, lag:] += early_BKT[:, lag, : d_BTF.shape[1] - lag]
        values = {
            "products": pair_products(d_BTF, early_BKT),
            "ends": torch.bmm(ends_BKT, d_BTF),
            "pairs": early_BKT,
        }
        for name, value in values.items():
            self._state[name].index_add_(0, added.block, value)

    def _start(self, d_BTF: Tensor) -> None:
        blocks, lags, (_, t, f) = self.sums.n_blocks, self.max_lag + 1, d_BTF.shape
        self._state = {
            "products": d_BTF.new_zeros(blocks, lags, f),
            "ends": d_BTF.new_zeros(blocks, lags, f),
            "pairs": d_BTF.new_zeros(blocks, lags, t),
        }
        self._origin_F = self.sums.origin_F

    def compute(self) -> Tensor:
        """rho, [max_lag + 1, F] float64; see `autocorrelation`."""
        return normalised(self.covariance())

    def covariance(self) -> Tensor:
        """c_j(k), [max_lag + 1, F] float64, in squared units of the features.

        c_j(0) is the energy of a feature; it is exactly 0 for one that does not vary, and NaN at
        lags without a counted pair.
        """
        return self.covariances(deletions=False)[0]

    def covariances(self, deletions: bool = True) -> Tensor:
        """`covariance`, and the same without each block, [1 + G, max_lag + 1, F]."""
        sums = self.sums.centred()
        state = self._moved()
        n_used = self.sums.n_used
        products_RKF = with_deleted(state["products"], n_used, deletions)
        pairs_RK = with_deleted(state["pairs"].sum(2), n_used, deletions)
        means_RKF = self._mean_products(sums, deletions)
        products_RKF = products_RKF - self._centring(sums).change(sums)
        c_RKF = (products_RKF - means_RKF) / pairs_RK[..., None]
        energy_RF = c_RKF[:, 0]
        told = self._different(sums["block_counts"])[0].any()
        gone_RF = self.sums.constant(energy_RF) | ~energy_RF.isfinite() | ~told
        c_RKF.masked_fill_(gone_RF[:, None] & (pairs_RK > 0)[..., None], 0.0)
        return c_RKF

    def pairs(self) -> Tensor:
        """Number of counted pairs at every lag, [max_lag + 1] float64; the first is the number
        of valid tokens."""
        self.sums._require_batches()
        return self._state["pairs"].sum((0, 2))

    def position_means(self, deletions: bool = True) -> tuple[Tensor, Tensor]:
        """Of mu_j(t)^2, the mean over tokens, about the mean over all of them: [1 + G, F]; and the
        number of tokens it is the mean over, [1 + G]."""
        sums = self.sums.centred()
        counts_GT = sums["block_counts"]
        seen_T = self._different(counts_GT, 1)[0] > 0
        n_R = with_deleted((counts_GT * seen_T).sum(1), self.sums.n_used, deletions)
        return self._mean_products(sums, deletions, 1)[:, 0] / n_R[:, None], n_R

    def energies(self, kept_G: Tensor) -> Tensor:
        """c_j(0) from some of the blocks, [G] bool, and the same without each block in use:
        [1 + G, F]. May be negative by noise."""
        sums, state = self.sums.centred(), self._moved()
        index = kept_G.nonzero().flatten()
        sums_GTF, counts_GT = sums["block_sums"][index], sums["block_counts"][index]
        different_T = pairs_of_blocks(counts_GT, counts_GT)
        r_T1 = torch.where(different_T > 0, counts_GT.sum(0) / different_T.clamp(min=1), 0.0)[
            :, None
        ]
        total_TF = sums_GTF.sum(0)
        # Block by block, without a second copy of the sums.
        forms = MeanProducts(
            (r_T1 * total_TF.square()).sum(0)[None],
            torch.stack([(r_T1 * S.square()).sum(0, keepdim=True) for S in sums_GTF]),
            torch.stack([(2 * r_T1 * total_TF * S).sum(0, keepdim=True) for S in sums_GTF]),
        )
        total_T = counts_GT.sum(0)
        without_G1 = (different_T - 2 * counts_GT * (total_T - counts_GT)).sum(1, keepdim=True)
        tokens_G1 = counts_GT.sum(1, keepdim=True)
        means_RF = forms.rows(scale_without(tokens_G1, different_T.sum()[None], without_G1))[:, 0]
        products_RF = with_deleted(state["products"][index, 0], len(index), True)
        tokens_R1 = with_deleted(tokens_G1, len(index), True)
        found_RF = (products_RF - means_RF) / tokens_R1
        rows_RF = found_RF[0].repeat(self.sums.n_used + 1, 1)
        rows_RF[index + 1] = found_RF[1:]
        return rows_RF

    def _moved(self) -> dict[str, Tensor]:
        """The sums about the origin that `sums` has now."""
        state, shift_F = self._state, self.sums.origin_F - self._origin_F
        pairs_GK1 = state["pairs"].sum(2)[..., None]
        state["products"] -= (state["ends"] - pairs_GK1 * shift_F) * shift_F
        state["ends"] -= 2 * pairs_GK1 * shift_F
        self._origin_F = self.sums.origin_F
        return state

    def _different(self, counts_GT: Tensor, n_lags: int | None = None) -> Tensor:
        """Pairs of tokens of different blocks at (t, t + k), [K + 1, T]; 0 past the end. Of the
        first `n_lags` lags; None: of all."""
        n_positions, n_lags = counts_GT.shape[1], n_lags or self.max_lag + 1
        different_KT = counts_GT.new_zeros(n_lags, n_positions)
        for lag in range(n_lags):
            n = n_positions - lag
            different_KT[lag, :n] = pairs_of_blocks(counts_GT[:, :n], counts_GT[:, lag:])
        return different_KT

    def _mean_products(
        self, sums: dict[str, Tensor], deletions: bool, n_lags: int | None = None
    ) -> Tensor:
        """Sums over counted pairs of U(t, t + k), [1 + G, K + 1, F]. Of the first `n_lags` lags;
        None: of all."""
        sums_GTF, counts_GT = sums["block_sums"], sums["block_counts"]
        n_used, n_lags = len(counts_GT), n_lags or self.max_lag + 1
        pairs_GKT = self._state["pairs"][:n_used, :n_lags]
        different_KT = self._different(counts_GT, n_lags)
        r_KT = torch.where(different_KT > 0, pairs_GKT.sum(0) / different_KT.clamp(min=1), 0.0)
        total_TF = sums_GTF.sum(0, keepdim=True)
        whole_KF = pair_products(total_TF, r_KT[None])[0]
        r_GKT = r_KT.expand(n_used, -1, -1)
        own_GKF = pair_products(sums_GTF, r_GKT)
        if not deletions:
            return MeanProducts(whole_KF, own_GKF, own_GKF).rows(None)
        # A few blocks at a time: of all at once the sums would be held twice.
        both = [pair_products(S + total_TF, r_GKT[: len(S)]) for S in sums_GTF.split(8)]
        with_whole_GKF = torch.cat(both) - whole_KF - own_GKF
        without_GK = torch.stack(
            [self._without(counts_GT, different_KT, lag) for lag in range(n_lags)], 1
        )
        scale_GK = scale_without(pairs_GKT.sum(2), different_KT.sum(1), without_GK)
        return MeanProducts(whole_KF, own_GKF, with_whole_GKF).rows(scale_GK)

    def _centring(self, sums: dict[str, Tensor]) -> Centring:
        sums_GTF, counts_GT = sums["block_sums"], sums["block_counts"]
        n_used, n_positions = counts_GT.shape
        pairs_KT = self._state["pairs"][:n_used].sum(0)
        different_KT = self._different(counts_GT)
        r_KT = torch.where(different_KT > 0, pairs_KT / different_KT.clamp(min=1), 0.0)
        others_GT = counts_GT.sum(0) - counts_GT
        weights_GKT = torch.zeros(n_used, *r_KT.shape, dtype=r_KT.dtype, device=r_KT.device)
        for lag in range(self.max_lag + 1):
            n = n_positions - lag
            weights_GKT[:, lag, :n] += r_KT[lag, :n] * others_GT[:, lag:]
            weights_GKT[:, lag, lag:] += r_KT[lag, :n] * others_GT[:, :n]
        return Centring(self._state["ends"][:n_used], torch.bmm(weights_GKT, sums_GTF))

    @staticmethod
    def _without(counts_GT: Tensor, different_KT: Tensor, lag: int) -> Tensor:
        """Sum over t of `_different` without each block, [G]."""
        n = counts_GT.shape[1] - lag
        total_T = counts_GT.sum(0)
        here, there = counts_GT[:, :n], counts_GT[:, lag:]
        gone_GT = here * total_T[lag:] + total_T[:n] * there - 2 * here * there
        return (different_KT[lag, :n] - gone_GT).sum(1)


def pair_products(x_BTF: Tensor, weights_BKT: Tensor) -> Tensor:
    """Sum over t of weights[b, k, t] x[b, t, f] x[b, t + k, f], as [B, K + 1, F]."""
    t = x_BTF.shape[1]
    out = x_BTF.new_empty(len(x_BTF), weights_BKT.shape[1], x_BTF.shape[2])
    for x, part in zip(
        x_BTF.split(_FEATURE_CHUNK, dim=2), out.split(_FEATURE_CHUNK, dim=2), strict=True
    ):
        buffer = torch.empty_like(x)
        for lag in range(weights_BKT.shape[1]):
            product = torch.mul(x[:, : t - lag], x[:, lag:], out=buffer[:, : t - lag])
            part[:, lag] = torch.bmm(weights_BKT[:, lag, None, : t - lag], product)[:, 0]
    return out


def normalised(covariance: Tensor) -> Tensor:
    """rho = c(k) / c(0) from covariances [..., K + 1, F]; NaN where c(0) is not positive."""
    energy = covariance[..., :1, :]
    return covariance / torch.where(energy > 0, energy, torch.nan)


def window_consistency(autocorrelation: Tensor, window: int) -> Tensor:
    """C_W, the mean correlation between two different positions of a window.

        C_W = 2 / (W (W - 1)) * sum_{k=1}^{W-1} (W - k) rho_k

    For a stationary feature the unbiased variance within a window of W positions has the mean
    E[s2_W] = var (1 - C_W): C_W is the share of the variance that the window does not see. Unlike
    that variance it does not change when the feature is scaled. 1: constant within windows,
    0: no memory.

    Args:
        autocorrelation: rho, [max_lag + 1, F] (any leading axes).
        window: W, in positions, 2 to max_lag + 1.

    Returns:
        [F], no unit, at most 1. NaN where rho is.

    Raises:
        ValueError: the window is shorter than 2 or needs lags beyond max_lag.
    """
    max_lag = autocorrelation.shape[-2] - 1
    if not 2 <= window <= max_lag + 1:
        raise ValueError(
            f"window {window} needs lags 1 to {window - 1}; the autocorrelation given goes to lag "
            f"{max_lag}. Choose a window of 2 to {max_lag + 1}, or a larger max_lag."
        )
    lags = torch.arange(1, window, dtype=autocorrelation.dtype, device=autocorrelation.device)
    weights = 2.0 * (window - lags) / (window * (window - 1))
    return (weights[:, None] * autocorrelation[..., 1:window, :]).sum(-2)


def integrated_time(autocorrelation: Tensor) -> Tensor:
    """Integrated autocorrelation time tau: how many positions one independent sample is worth.

        tau(M) = 1 + 2 sum_{k=1}^{M} rho_k,  M the first lag with M >= 5 tau(M)

    (Sokal 1997, "Monte Carlo Methods in Statistical Mechanics", section 3). Without such a lag M
    is the largest lag measured, and tau is a lower bound (`integrated_time_censored`); take
    max_lag = T // 4.

    Args:
        autocorrelation: rho, [max_lag + 1, F] (any leading axes).

    Returns:
        [F], in positions: 1 for white noise, (1 + phi) / (1 - phi) for an AR(1) process. NaN
        where rho is.
    """
    tau, settled = _windowed_time(autocorrelation)
    return _at_lag(tau, _first_lag(settled, autocorrelation))


def integrated_time_censored(autocorrelation: Tensor) -> Tensor:
    """Where `integrated_time` is a lower bound only, [F] bool: no lag measured is 5 tau or more."""
    _, settled = _windowed_time(autocorrelation)
    return autocorrelation[..., 0, :].isfinite() & ~settled.any(-2)


def _windowed_time(autocorrelation: Tensor) -> tuple[Tensor, Tensor]:
    """tau(M) for every lag M, and whether M >= 5 tau(M); [..., K + 1, F] both."""
    tau = 2.0 * autocorrelation.cumsum(-2) - 1.0
    lags = torch.arange(tau.shape[-2], device=tau.device)[:, None]
    return tau, lags >= 5.0 * tau


class CorrelationLength(NamedTuple):
    """Length in positions [F], and whether it is only a lower bound [F] bool."""

    values: Tensor
    censored: Tensor


def correlation_length(autocorrelation: Tensor) -> CorrelationLength:
    """First lag at which rho falls under 1 / e, linearly interpolated between lags.

    Args:
        autocorrelation: rho, [max_lag + 1, F] (any leading axes).

    Returns:
        (values, censored), each [F]. In positions: -1 / ln(phi) for an AR(1) process, about .63
        for white noise. A feature that never falls so low within the lags measured gets the
        largest of them and `censored`. NaN, not censored, where rho is NaN.
    """
    level = math.exp(-1)
    below = autocorrelation < level
    first = _first_lag(below, autocorrelation)
    alive = autocorrelation[..., 0, :].isfinite()
    censored = alive & ~below.any(-2)
    after = _at_lag(autocorrelation, first)
    before = _at_lag(autocorrelation, (first - 1).clamp(min=0))
    crossing = first - 1 + (before - level) / (before - after)
    values = torch.where(censored, first.to(crossing.dtype), crossing)
    return CorrelationLength(torch.where(alive, values, torch.nan), censored)


def _first_lag(condition: Tensor, autocorrelation: Tensor) -> Tensor:
    """First lag (axis -2) where the condition holds, else the last one that was measured."""
    lags = torch.arange(autocorrelation.shape[-2], device=autocorrelation.device)[:, None]
    last = (lags * autocorrelation.isfinite()).amax(-2)
    return torch.where(condition.any(-2), condition.int().argmax(-2), last)


def _at_lag(values: Tensor, lag: Tensor) -> Tensor:
    return values.gather(-2, lag.unsqueeze(-2)).squeeze(-2)
