"""Autocorrelation of SAE features along the positions of a context, and what follows from it.

Shapes: B contexts of a batch, T positions, F features, K = max_lag, G bootstrap blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.bootstrap import Accumulator
from tcsae.metrics.masks import checked_masks, pair_weights, require_shape

# A feature whose standard deviation is under 1e-7 of its root mean square, the resolution of
# float32, is constant as far as anyone can tell.
CONSTANT = 1e-14

# Features multiplied at a time: the working set then stays in the processor's cache.
_FEATURE_CHUNK = 128
# Contexts added at a time, so that memory does not grow with the batch.
_CONTEXT_CHUNK = 64


def autocorrelation(
    features: Tensor,
    max_lag: int,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Autocorrelation of each feature over positions, pooled over contexts.

    With mu_j(t) the mean over contexts of the valid f[:, t, j], and d = f - mu_j(t):

        c_j(k)   = sum of d[n, t] d[n, t + k] over counted pairs / number of counted pairs
        rho_j(k) = c_j(k) / c_j(0)

    A pair counts if both its positions are valid and in one segment. Centring by position keeps
    a trend over positions from passing for memory; centring by context would push rho down by
    about (correlation time) / T (Marriott and Pope 1954). Estimating mu_j(t) from N contexts
    shrinks every c_j(k) by about 1 - 1 / N, which cancels in rho; a position seen in a single
    context adds nothing, and with one context in all every rho is NaN.

    Args:
        features: [B, T, F].
        max_lag: largest lag in positions, below T.
        segments: [B, T], the number of the document within the context. None: one document.
        valid: [B, T] bool. None: every position is valid.

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
    accumulator = Autocorrelation(features.shape[2], features.shape[1], max_lag)
    accumulator.update(features, segments=segments, valid=valid)
    return accumulator.compute()


class Autocorrelation(Accumulator):
    """`autocorrelation` over any number of batches, exact in one pass.

    mu_j(t) is known only at the end, so the sums kept are those that allow centring by it later:
    products, and for every lag and position the sums of f over the pairs that start and end
    there. Everything is taken relative to the position means of the first contexts, so that nothing
    is lost to cancellation.

    Memory: 16 T (K + 1) F bytes (156 MB at T = 128, K = 32, F = 2304), and with blocks
    4 G (T + K + 1) F bytes more (95 MB at G = 64).

    Args:
        n_features: F.
        n_positions: T.
        max_lag: K, below T.
        n_blocks: G, groups of whole contexts whose sums are kept apart for the bootstrap.
            0: none, and no intervals.
    """

    def __init__(
        self, n_features: int, n_positions: int, max_lag: int, *, n_blocks: int = 0
    ) -> None:
        if not 0 <= max_lag < n_positions:
            raise ValueError(
                f"max_lag must be 0 to {n_positions - 1} for {n_positions} positions, not {max_lag}"
            )
        self.n_features = n_features
        self.n_positions = n_positions
        self.max_lag = max_lag
        super().__init__(n_blocks)

    @torch.no_grad()
    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Add a batch: features [B, T, F], segments [B, T], valid [B, T]."""
        require_shape(features, self.n_features, self.n_positions)
        segments, valid = checked_masks(features, segments, valid)
        if not self._state:
            self._start(features[:_CONTEXT_CHUNK], valid[:_CONTEXT_CHUNK])
        parts = (x.split(_CONTEXT_CHUNK) for x in (features, segments, valid))
        for chunk in zip(*parts, strict=True):
            self._add(*chunk)

    def _add(self, features: Tensor, segments: Tensor, valid: Tensor) -> None:
        state = self._state
        d_BTF = torch.where(valid[..., None], features - state["origin"], 0.0)
        early_BKT = pair_weights(segments, valid, self.max_lag, torch.float64)
        late_BKT = torch.zeros_like(early_BKT)
        for lag in range(self.max_lag + 1):
            late_BKT[:, lag, lag:] = early_BKT[:, lag, : self.n_positions - lag]
        products_BKF = pair_products(d_BTF, early_BKT)
        state["products"] += products_BKF.sum(0)
        state["pairs"] += early_BKT.sum(0)
        ends_TKB = torch.cat([early_BKT, late_BKT], 1).permute(2, 1, 0)
        state["ends"].baddbmm_(ends_TKB, d_BTF.transpose(0, 1))
        if self.n_blocks:
            block = self._blocks_of(len(features), d_BTF.device)
            state["block_products"].index_add_(0, block, products_BKF.float())
            state["block_sums"].index_add_(0, block, d_BTF.float())
            state["block_pairs"].index_add_(0, block, early_BKT.float())
        self.n_contexts += len(features)

    def compute(self) -> Tensor:
        """rho, [max_lag + 1, F] float64; see `autocorrelation`."""
        return normalised(self.covariance())

    def covariance(self) -> Tensor:
        """c_j(k), [max_lag + 1, F] float64, in squared units of the features.

        c_j(0) is the energy of a feature; it is exactly 0 for one that does not vary, and NaN at
        lags without a counted pair.
        """
        state = self._require_batches()
        c_KF = self._products_about(self._position_means())
        square_F = self._products_about(-state["origin"])[0]
        c_KF[:, c_KF[0] <= CONSTANT * square_F] = 0.0
        return c_KF / state["pairs"].sum(1)[:, None]

    def pairs(self) -> Tensor:
        """Number of counted pairs at every lag, [max_lag + 1] float64; the first is the number
        of valid tokens."""
        return self._require_batches()["pairs"].sum(1)

    def block_sums(self) -> tuple[Tensor, Tensor]:
        """What the bootstrap over contexts resamples.

        Returns:
            Sums of d[n, t] d[n, t + k] over the counted pairs of each block, [G, K + 1, F], and
            the numbers of those pairs, [G, K + 1]. Centred by mu_j(t) of all the contexts. Added
            over blocks they give the exact sums; a single block is exact when no position is
            masked, else its sums over pair ends are taken in proportion to its position means.
        """
        state = self._require_batches()
        mean_TF = self._position_means()
        sums_GKF = self._block_products_about(mean_TF)
        pairs_GK = state["block_pairs"].sum(2)
        rest_KF = self._products_about(mean_TF) - sums_GKF.sum(0)
        share_GK = pairs_GK / pairs_GK.sum(0).clamp(min=1.0)
        return sums_GKF + (share_GK[..., None] * rest_KF).float(), pairs_GK

    def _start(self, features: Tensor, valid: Tensor) -> None:
        t, f, lags = self.n_positions, self.n_features, self.max_lag + 1
        device = features.device
        f_BTF = torch.where(valid[..., None], features, 0.0).double()
        sums_TF, counts_T1 = f_BTF.sum(0), valid.sum(0)[:, None].double()
        overall_F = sums_TF.sum(0) / counts_T1.sum().clamp(min=1.0)
        origin_TF = torch.where(counts_T1 > 0, sums_TF / counts_T1.clamp(min=1.0), overall_F)
        self._state = {
            "origin": origin_TF,
            "products": origin_TF.new_zeros(lags, f),
            "ends": origin_TF.new_zeros(t, 2 * lags, f),
            "pairs": origin_TF.new_zeros(lags, t),
        }
        if self.n_blocks:
            blocks = self.n_blocks
            self._state |= {
                "block_products": torch.zeros(blocks, lags, f, device=device),
                "block_sums": torch.zeros(blocks, t, f, device=device),
                "block_pairs": torch.zeros(blocks, lags, t, device=device),
            }

    def _position_means(self) -> Tensor:
        """mu_j(t) relative to the origin, [T, F]."""
        counts_T = self._state["pairs"][0].clamp(min=1.0)
        return self._state["ends"][:, 0] / counts_T[:, None]

    def _products_about(self, shift_TF: Tensor) -> Tensor:
        """Sums over counted pairs of (d[t] - shift[t]) (d[t + k] - shift[t + k]), [K + 1, F]."""
        state, lags = self._state, self.max_lag + 1
        products_KF = state["products"].clone()
        for lag in range(lags):
            n = self.n_positions - lag
            early, late = state["ends"][:n, lag], state["ends"][lag:, lags + lag]
            here, there = shift_TF[:n], shift_TF[lag:]
            count = state["pairs"][lag, :n, None]
            products_KF[lag] -= (here * late + there * early - here * there * count).sum(0)
        return products_KF

    def _block_products_about(self, shift_TF: Tensor) -> Tensor:
        """`_products_about` for every block, [G, K + 1, F], with the sums over pair ends taken
        as position mean times number of pairs: keeping them apart would cost G times `ends`."""
        weights_GKT = self._state["block_pairs"]
        counts_GT = weights_GKT[:, 0].clamp(min=1.0)
        mean_GTF = self._state["block_sums"] / counts_GT[..., None]
        before = pair_products(mean_GTF, weights_GKT)
        after = pair_products(mean_GTF - shift_TF.float(), weights_GKT)
        return self._state["block_products"] + after - before


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
    is the largest lag measured, and tau is a lower bound; take max_lag = T // 4.

    Args:
        autocorrelation: rho, [max_lag + 1, F] (any leading axes).

    Returns:
        [F], in positions: 1 for white noise, (1 + phi) / (1 - phi) for an AR(1) process. NaN
        where rho is.
    """
    tau = 2.0 * autocorrelation.cumsum(-2) - 1.0
    lags = torch.arange(tau.shape[-2], device=tau.device)[:, None]
    return _at_lag(tau, _first_lag(lags >= 5.0 * tau, autocorrelation))


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
