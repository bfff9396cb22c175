"""All consistency metrics of a set of SAE features in one pass, per feature and summarised.

Shapes: B contexts of a batch, T positions, F features, K = max_lag, G bootstrap blocks,
R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tcsae.metrics.activity import Activity, Smoothness
from tcsae.metrics.autocorrelation import (
    Autocorrelation,
    correlation_length,
    integrated_time,
    normalised,
    window_consistency,
)
from tcsae.metrics.bootstrap import (
    MIN_BLOCKS,
    Accumulator,
    interval,
    median,
    resampling_weights,
    weighted_mean,
)
from tcsae.metrics.position import PositionDependence

_FROM_RHO = ("correlation_length", "tau_int")
_FROM_POSITION = ("eta_squared", "omega_squared", "mutual_information", "mutual_information_share")
_FROM_ACTIVITY = ("persistence", "run_length", "density", "mean_activation", "amplitude_cv")

_WITHOUT_VALUE = {
    "run_length": "no run of on was seen to end",
    "persistence": "no live feature was seen both on and off before a counted neighbour",
    "mutual_information": "no position was seen in two contexts",
    "mutual_information_share": "every live feature always fires",
}

# Resamples worked on at a time: each holds [T, F] sums.
_RESAMPLES_AT_ONCE = 10


class ConsistencySuite:
    """Consistency metrics over any number of batches of contexts.

    Intervals come from a bootstrap over contexts: blocks of contexts are resampled, the features
    are not. With the same seed and the same contexts in the same order two suites draw the same
    resamples, so that `draws()` of two SAEs may be subtracted for a paired interval.

    Memory at T = 128, K = 32, F = 2304, 64 blocks: 420 MB, in proportion to F (see the
    accumulators for the terms); n_blocks=0 leaves 170 MB and no intervals.

    Args:
        n_features: F.
        n_positions: T.
        max_lag: K; None: T // 4.
        windows: W of every window consistency to report; those that need lags beyond K, or lags
            at which no pair was seen, are left out with the reason.
        n_blocks: G.
        seed: of the bootstrap.
        n_boot: R.

    Example:
        >>> suite = ConsistencySuite(n_features=16, n_positions=128)
        >>> suite.update(torch.rand(64, 128, 16))
        >>> suite.summary()["metrics"]["C_8"]["median"]
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int,
        *,
        max_lag: int | None = None,
        windows: Sequence[int] = (2, 4, 8, 16, 32),
        n_blocks: int = 64,
        seed: int = 0,
        n_boot: int = 1000,
    ) -> None:
        if min(windows, default=2) < 2:
            raise ValueError(f"windows must be 2 positions or more, not {min(windows)}")
        self.n_features = n_features
        self.max_lag = n_positions // 4 if max_lag is None else max_lag
        self.windows = tuple(windows)
        self.n_blocks = n_blocks
        self.seed = seed
        self.n_boot = n_boot
        self._autocorrelation = Autocorrelation(
            n_features, n_positions, self.max_lag, n_blocks=n_blocks
        )
        self._position = PositionDependence(n_features, n_positions, n_blocks=n_blocks)
        self._activity = Activity(n_features, n_positions, n_blocks=n_blocks)
        self._smoothness = Smoothness(n_features, n_blocks=n_blocks)
        self._draws: dict[str, Tensor] | None = None

    def update(
        self,
        features: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> None:
        """Add a batch of whole contexts.

        Args:
            features: [B, T, F].
            segments: [B, T], the number of the document within the context. None: one document.
            valid: [B, T] bool. None: every position is valid.
            inputs: [B, T, d_in], what the SAE was given; needed for smoothness only.
        """
        for accumulator in (self._autocorrelation, self._position, self._activity):
            accumulator.update(features, segments=segments, valid=valid)
        if inputs is not None:
            self._smoothness.update(features, inputs, segments=segments, valid=valid)
        self._draws = None

    def merge(self, other: ConsistencySuite) -> None:
        """Add the batches of `other`, as if they had come after this one's."""
        for mine, theirs in zip(self._accumulators(), other._accumulators(), strict=True):
            mine.merge(theirs)
        self._draws = None

    def reset(self) -> None:
        """Forget every batch."""
        for accumulator in self._accumulators():
            accumulator.reset()
        self._draws = None

    @property
    def n_contexts(self) -> int:
        """Contexts seen."""
        return self._autocorrelation.n_contexts

    def per_feature(self) -> dict[str, Tensor]:
        """Every metric for every feature, float64, NaN where it has no value.

        [F] each: `c0` (variance about the position means, the weight of energy-weighted means),
        `rho_1`, `C_W` for every window, `correlation_length` (and bool
        `correlation_length_censored`), `tau_int`, `persistence`, `run_length`, `eta_squared`,
        `omega_squared`, `mutual_information`, `mutual_information_share`, `density`,
        `mean_activation`, `amplitude_cv`, and `smoothness` if inputs were given. Further `rho`
        [K + 1, F], `profile_rate` and `profile_mean` [T, F]. Units are those of the functions and
        results of the same names.
        """
        covariance_KF = self._autocorrelation.covariance()
        values = {"rho": normalised(covariance_KF), "c0": covariance_KF[0]}
        values |= self._memory(values["rho"])
        values["correlation_length_censored"] = correlation_length(values["rho"]).censored
        activity = self._activity.compute()._asdict()
        del activity["frac_alive"]
        values |= activity | self._position.compute()._asdict()
        if self._smoothness.n_contexts:
            values["smoothness"] = self._smoothness.compute().per_feature
        return values

    def draws(self) -> dict[str, Tensor]:
        """The bootstrap resamples that the intervals are read from.

        Returns:
            For every metric [R, 2]: energy-weighted mean and median over the live features.
            `autocorrelation` [R, K + 1]: the energy-weighted curve. `smoothness` [R], if inputs
            were given. Empty if there are no intervals to be had (see `summary`).
        """
        if self._interval_reason():
            return {}
        if self._draws is None:
            parts = list(self._resampled())
            self._draws = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._draws

    def summary(self, level: float = 0.95) -> dict[str, Any]:
        """Everything in numbers that JSON can hold: None where there is no value, with the reason.

        Live features are those that fired on a valid token. `metrics` has for each metric its
        median, quartiles, mean and energy-weighted mean (weight c_j(0)) over the live features
        that have a value, their number n, and the intervals of the energy-weighted mean and of
        the median. `autocorrelation` is the energy-weighted curve sum_j c_j(k) / sum_j c_j(0)
        with its band, lag by lag. `reason` says why something is None, `interval_reason` why an
        interval is.

        Args:
            level: coverage of the intervals.
        """
        values = self.per_feature()
        live_F = values["density"] > 0
        draws = self.draws()
        pairs_K = self._autocorrelation.pairs()
        return {
            "n_features": self.n_features,
            "n_live": int(live_F.sum()),
            "frac_alive": float(live_F.double().mean()),
            "n_contexts": self.n_contexts,
            "n_valid_tokens": int(pairs_K[0]),
            "max_lag": self.max_lag,
            "windows": self._usable_windows(),
            "windows_left_out": self._windows_left_out(),
            "level": level,
            "n_boot": self.n_boot if draws else 0,
            "n_blocks": self._n_used(),
            "interval_reason": self._interval_reason(),
            "metrics": {
                name: self._summarised(name, values, live_F, draws.get(name), level)
                for name in self._metric_names()
            },
            "autocorrelation": self._curve(values, live_F, draws, level),
            "smoothness": self._smoothness_summary(draws, level),
        }

    def _accumulators(self) -> tuple[Accumulator, ...]:
        return (self._autocorrelation, self._position, self._activity, self._smoothness)

    def _memory(self, rho: Tensor) -> dict[str, Tensor]:
        """The metrics that follow from the autocorrelation [..., K + 1, F]."""
        values = {"rho_1": rho[..., 1, :]} if self.max_lag else {}
        values |= {f"C_{w}": window_consistency(rho, w) for w in self._usable_windows()}
        values["correlation_length"] = correlation_length(rho).values
        values["tau_int"] = integrated_time(rho)
        return values

    def _metric_names(self) -> list[str]:
        windows = [f"C_{w}" for w in self._usable_windows()]
        first = ["rho_1"] if self.max_lag else []
        return [*first, *windows, *_FROM_RHO, *_FROM_POSITION, *_FROM_ACTIVITY]

    def _usable_windows(self) -> list[int]:
        left_out = self._windows_left_out()
        return [w for w in self.windows if str(w) not in left_out]

    def _windows_left_out(self) -> dict[str, str]:
        pairs_K = self._autocorrelation.pairs()
        reasons = {}
        for window in self.windows:
            if window > self.max_lag + 1:
                reasons[str(window)] = (
                    f"needs lags up to {window - 1}; the largest measured is {self.max_lag}"
                )
            elif not pairs_K[1:window].all():
                reasons[str(window)] = (
                    f"needs lags up to {window - 1}; no segment has valid tokens that far apart"
                )
        return reasons

    def _n_used(self) -> int:
        """Blocks that hold a context."""
        return min(self.n_blocks, self.n_contexts)

    def _interval_reason(self) -> str | None:
        if not self.n_blocks:
            return "no bootstrap blocks were kept (n_blocks=0)"
        if self._n_used() < MIN_BLOCKS:
            return (
                f"{self._n_used()} blocks of contexts: too few for an interval, "
                f"which takes at least {MIN_BLOCKS}"
            )
        if not (self._activity.compute().density > 0).any():
            return "no feature fired on a valid token"
        return None

    def _resampled(self) -> Iterator[dict[str, Tensor]]:
        """`draws`, a few resamples at a time."""
        sums_GKF, pairs_GK = self._autocorrelation.block_sums()
        weights_RG = resampling_weights(self._n_used(), self.n_blocks, self.n_boot, self.seed)
        varying_F = self._autocorrelation.covariance()[0] > 0
        live_F = self._activity.compute().density > 0
        for weights in weights_RG.to(sums_GKF.device).split(_RESAMPLES_AT_ONCE):
            drawn = (weights @ sums_GKF.flatten(1)).unflatten(1, sums_GKF.shape[1:])
            c_RKF = drawn / (weights @ pairs_GK)[..., None]
            c_RKF = torch.where(varying_F, c_RKF, 0.0)[..., live_F]
            values = self._memory(normalised(c_RKF))
            others = self._position.resample(weights) | self._activity.resample(weights)
            values |= {name: value[:, live_F] for name, value in others.items()}
            energy_RF = c_RKF[:, 0]
            part = {
                name: torch.stack([weighted_mean(value, energy_RF), median(value)], 1).double()
                for name, value in values.items()
            }
            part["autocorrelation"] = (c_RKF.sum(-1) / energy_RF.sum(-1)[:, None]).double()
            if self._smoothness.n_contexts:
                part["smoothness"] = self._smoothness.resample(weights)
            yield part

    def _summarised(
        self,
        name: str,
        values: dict[str, Tensor],
        live_F: Tensor,
        draws_R2: Tensor | None,
        level: float,
    ) -> dict[str, Any]:
        """One entry of `metrics`."""
        known_F = live_F & values[name].isfinite()
        x, energy = values[name][known_F], values["c0"][known_F]
        found = _numbers(*[torch.nan] * 5)
        weighted = middle = _numbers(torch.nan, torch.nan)
        if len(x):
            quartiles = x.quantile(x.new_tensor([0.25, 0.75]))
            estimate = torch.stack([weighted_mean(x, energy), median(x)])
            found = _numbers(estimate[1], *quartiles, x.mean(), estimate[0])
            if draws_R2 is not None:
                low, high = interval(draws_R2, estimate, level)
                weighted, middle = _numbers(low[0], high[0]), _numbers(low[1], high[1])
        names = ("median", "q25", "q75", "mean", "energy_weighted")
        numbers = dict(zip(names, found, strict=True))
        reason = None
        if numbers["energy_weighted"] is None:
            reason = self._reason(name, int(live_F.sum()), len(x))
        entry: dict[str, Any] = {
            **numbers,
            "n": len(x),
            "energy_weighted_interval": weighted,
            "median_interval": middle,
            "reason": reason,
        }
        if name == "correlation_length":
            entry["n_censored"] = int(values["correlation_length_censored"][live_F].sum())
        return entry

    def _reason(self, name: str, n_live: int, n_known: int = 0) -> str:
        """Why a metric (n_known = 0), or only its energy-weighted mean, has no value."""
        if not n_live:
            return "no feature fired on a valid token"
        if self.n_contexts == 1 and name not in _FROM_ACTIVITY:
            return "a single context: nothing can be told apart from its position means"
        if not n_known and name in _WITHOUT_VALUE:
            return _WITHOUT_VALUE[name]
        if n_known:
            return "no energy-weighted mean: no live feature varies about its position means"
        return "no live feature varies about its position means"

    def _curve(
        self, values: dict[str, Tensor], live_F: Tensor, draws: dict[str, Tensor], level: float
    ) -> dict[str, Any]:
        energy = values["c0"][live_F]
        # A constant feature has no rho; it has no energy either.
        rho_KF = values["rho"][:, live_F][:, energy > 0]
        curve_K = weighted_mean(rho_KF, energy[energy > 0].expand_as(rho_KF))
        low_K = high_K = torch.full_like(curve_K, torch.nan)
        if draws:
            low_K, high_K = interval(draws["autocorrelation"], curve_K, level)
        reason = None
        if not curve_K.isfinite().any():
            reason = self._reason("autocorrelation", len(energy))
        elif not curve_K.isfinite().all():
            reason = "null at lags without a pair of valid tokens in one segment"
        return {
            "lags": list(range(self.max_lag + 1)),
            "rho": _numbers(*curve_K),
            "low": _numbers(*low_K),
            "high": _numbers(*high_K),
            "reason": reason,
        }

    def _smoothness_summary(self, draws: dict[str, Tensor], level: float) -> dict[str, Any]:
        """T-SAE's smoothness: one number for all features, with its interval."""
        empty = {"value": None, "interval": [None, None]}
        if not self._smoothness.n_contexts:
            return empty | {"reason": "the inputs of the SAE were not given"}
        value = self._smoothness.compute().value
        if not value.isfinite():
            return empty | {"reason": "no context had an active feature and two valid neighbours"}
        if not draws:
            return empty | {"value": float(value), "reason": None}
        low, high = interval(draws["smoothness"], value, level)
        return {"value": float(value), "interval": _numbers(low, high), "reason": None}


def _numbers(*values: Tensor | float) -> list[float | None]:
    """Numbers that JSON can hold: None for what is not finite."""
    return [number if math.isfinite(number) else None for number in map(float, values)]
