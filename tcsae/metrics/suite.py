"""All consistency metrics of a set of SAE features in one pass, per feature and summarised.

Shapes: B contexts of a batch, T positions, F features, K = max_lag, G bootstrap blocks,
R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tcsae.base.json_numbers import plain
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
    median,
    resampling_weights,
    weighted_mean,
)
from tcsae.metrics.document import LongLags, long_lags, resampled
from tcsae.metrics.position import EDGE, PositionDependence
from tcsae.metrics.summarise import curve, over_features, single
from tcsae.metrics.windows import (
    SPARSE,
    document_left_out,
    made_of_windows,
    shares_window,
    weighed,
    window_metric_names,
    windows_left_out,
)

_FROM_RHO = ("correlation_length", "tau_int")
_FROM_POSITION = ("eta_squared", "omega_squared", "mutual_information", "mutual_information_share")
_SHARES = ("share_position", "share_document", "share_window", "share_flicker")
_FROM_ACTIVITY = ("persistence", "run_length", "density", "mean_activation", "amplitude_cv")

_SMOOTHNESS = ("smoothness", "smoothness_first_group", "smoothness_second_group")

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

    Memory at T = 128, K = 32, F = 2304, 64 blocks: 600 MB, in proportion to F (see the
    accumulators for the terms); n_blocks=0 leaves 190 MB and no intervals.

    Args:
        n_features: F.
        n_positions: T.
        max_lag: K; None: T // 4.
        windows: W of every window consistency to report; those that need lags beyond K, or lags
            at which no pair was seen, are left out with the reason.
        n_blocks: G.
        seed: of the bootstrap.
        n_boot: R.
        groups: sizes of the groups of features of an SAE that has some, in order; smoothness is
            then also given for the first and for the rest.

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
        groups: Sequence[int] = (),
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
        n_first = groups[0] if len(groups) > 1 else 0
        self._smoothness = Smoothness(n_features, n_blocks=n_blocks, n_first=n_first)
        bands = {w: long_lags(w, n_positions) for w in self.windows}
        self._bands = {w: (first, last) for w, (first, last) in bands.items() if first <= last}
        self._long = LongLags(
            n_features, n_positions, tuple(self._bands.values()), n_blocks=n_blocks
        )
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
        for accumulator in (self._autocorrelation, self._position, self._activity, self._long):
            accumulator.update(features, segments=segments, valid=valid)
        if inputs is not None:
            self._smoothness.update(features, inputs, segments=segments, valid=valid)
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
        `rho_1`, `C_W`, `D_W` and `L_W` (see `document`) for every window, `share_position`,
        `share_document`, `share_window`, `share_flicker` (at the summary's `shares_window`),
        `correlation_length` (and bool `correlation_length_censored`), `tau_int`, `persistence`,
        `run_length`, `eta_squared`, `omega_squared`, `mutual_information`,
        `mutual_information_share`, `density`, `mean_activation`, `amplitude_cv`, and `smoothness`
        if inputs were given. Further `rho` [K + 1, F], `profile_rate` and `profile_mean` [T, F].
        Units are those of the functions and results of the same names.
        """
        covariance_KF = self._autocorrelation.covariance()
        values = {"rho": normalised(covariance_KF), "c0": covariance_KF[0]}
        values |= self._memory(values["rho"])
        values["correlation_length_censored"] = correlation_length(values["rho"]).censored
        activity = self._activity.compute()._asdict()
        del activity["frac_alive"]
        values |= activity | self._position.compute()._asdict()
        values |= self._document(values, self._long.compute())
        if self._smoothness.n_contexts:
            values["smoothness"] = self._smoothness.compute().per_feature
        return values

    def draws(self) -> dict[str, Tensor]:
        """The bootstrap resamples that the intervals are read from.

        Returns:
            For every metric that has a value [R, 2]: energy-weighted mean and median over the live
            features. `autocorrelation` [R, K + 1]: the energy-weighted curve. [R]: `edge_energy`,
            and `smoothness` (and of groups), if inputs were given. Empty if there are no intervals
            to be had (see `summary`).
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
        median, quartiles, 99th percentile, mean and energy-weighted mean (weight c_j(0)) over the
        live features that have a value, their number n, and the intervals of the energy-weighted
        mean and of the median. L_W is weighted by c_j(0) (1 - D_j), which makes it the ratio of
        the weighted sums of C_W - D and of 1 - D: a feature without anything but its document has
        no local part. `C_W_sparse` and `L_W_sparse` are the same over the features on at less than
        10 % of the valid tokens.

        `autocorrelation` is the energy-weighted curve sum_j c_j(k) / sum_j c_j(0) with its band,
        lag by lag; `energy_by_position` [T] and `edge_energy` are those of `PositionDependence`.
        `reason` says why something is None, `interval_reason` why an interval is.

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
            "windows_left_out": {str(w): why for w, why in self._windows_left_out().items()},
            "level": level,
            "n_boot": self.n_boot if draws else 0,
            "n_blocks": self._n_used(),
            "interval_reason": self._interval_reason(),
            "shares_window": self._shares_window(),
            "metrics": {
                name: self._summarised(name, values, live_F, draws.get(name), level)
                for name in self._metric_names()
            },
            "autocorrelation": self._curve(values, live_F, draws, level),
            "energy_by_position": plain(self._position.energy_by_position()),
            "edge_energy": single(
                self._position.edge_energy(),
                draws.get("edge_energy"),
                level,
                f"no energy, or no valid token, before or from position {EDGE} on",
            ),
            **self._smoothness_summary(draws, level),
        }

    def _accumulators(self) -> tuple[Accumulator, ...]:
        parts = (self._autocorrelation, self._position, self._activity)
        return (*parts, self._long, self._smoothness)

    def _memory(self, rho: Tensor) -> dict[str, Tensor]:
        """The metrics that follow from the autocorrelation [..., K + 1, F]."""
        values = {"rho_1": rho[..., 1, :]} if self.max_lag else {}
        values |= {f"C_{w}": window_consistency(rho, w) for w in self._usable_windows()}
        values["correlation_length"] = correlation_length(rho).values
        values["tau_int"] = integrated_time(rho)
        return values

    def _document(self, values: dict[str, Tensor], document: Tensor) -> dict[str, Tensor]:
        """D_W, L_W and the nested shares [..., F] from C_W, omega^2 and `LongLags` [..., L, F]."""
        usable, shares_at = self._usable_windows(), self._shares_window()
        return made_of_windows(values, document, list(self._bands), usable, shares_at)

    def _shares_window(self) -> int | None:
        left_out = self._document_left_out()
        return shares_window([w for w in self._usable_windows() if w not in left_out])

    def _document_left_out(self) -> dict[int, str]:
        pairs = dict(zip(self._bands, self._long.pairs().tolist(), strict=True))
        return document_left_out(self._usable_windows(), self._position.n_positions, pairs)

    def _metric_names(self) -> list[str]:
        windows = window_metric_names(self._usable_windows())
        windows += _SHARES if self._shares_window() is not None else ()
        first = ["rho_1"] if self.max_lag else []
        return [*first, *windows, *_FROM_RHO, *_FROM_POSITION, *_FROM_ACTIVITY]

    def _usable_windows(self) -> list[int]:
        left_out = self._windows_left_out()
        return [w for w in self.windows if w not in left_out]

    def _windows_left_out(self) -> dict[int, str]:
        return windows_left_out(self.windows, self.max_lag, self._autocorrelation.pairs())

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
        density_F = self._activity.compute().density
        live_F = density_F > 0
        long_sums = self._long.block_sums()
        for weights in weights_RG.to(sums_GKF.device).split(_RESAMPLES_AT_ONCE):
            drawn = (weights @ sums_GKF.flatten(1)).unflatten(1, sums_GKF.shape[1:])
            c_RKF = drawn / (weights @ pairs_GK)[..., None]
            c_RKF = torch.where(varying_F, c_RKF, 0.0)[..., live_F]
            values = self._memory(normalised(c_RKF))
            others = self._position.resample(weights) | self._activity.resample(weights)
            values |= {name: value[:, live_F] for name, value in others.items()}
            drawn_RLF = resampled(*long_sums, weights)[..., live_F]
            values |= self._document(values, drawn_RLF)
            yield self._averaged(values, c_RKF, density_F[live_F]) | self._singles(weights)

    def _averaged(
        self, values: dict[str, Tensor], c_RKF: Tensor, density_F: Tensor
    ) -> dict[str, Tensor]:
        """The part of `draws` that is about single features, from resamples over live ones."""
        energy_RF = c_RKF[:, 0]
        part = {}
        for name in self._metric_names():
            value, weights = weighed(name, values, energy_RF, density_F)
            if value.isfinite().any():
                part[name] = torch.stack([weighted_mean(value, weights), median(value)], 1).double()
        part["autocorrelation"] = (c_RKF.sum(-1) / energy_RF.sum(-1)[:, None]).double()
        return part

    def _singles(self, weights_RG: Tensor) -> dict[str, Tensor]:
        """The part of `draws` that has one number for all features."""
        part = {}
        if self._position.edge_energy().isfinite():
            part["edge_energy"] = self._position.resample_edge_energy(weights_RG).double()
        if self._smoothness.n_contexts:
            drawn_RP = self._smoothness.resample(weights_RG)
            part |= dict(zip(_SMOOTHNESS, drawn_RP.unbind(1), strict=False))
        return part

    def _summarised(
        self,
        name: str,
        values: dict[str, Tensor],
        live_F: Tensor,
        draws_R2: Tensor | None,
        level: float,
    ) -> dict[str, Any]:
        """One entry of `metrics`."""
        value_F, weights_F = weighed(name, values, values["c0"], values["density"])
        entry = over_features(value_F[live_F], weights_F[live_F], draws_R2, level)
        entry["reason"] = None
        if entry["energy_weighted"] is None:
            entry["reason"] = self._reason(name, int(live_F.sum()), entry["n"])
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
        missing = self._document_left_out().items()
        left_out = {f"{part}_{w}": why for w, why in missing for part in "DL"}
        if (plain := name.removesuffix("_sparse")) in left_out:
            return left_out[plain]
        if plain != name and not n_known:
            return (
                f"no live feature that varies is on at less than {100 * SPARSE:.0f} % of the tokens"
            )
        if n_known:
            return "no energy-weighted mean: no live feature varies about its position means"
        return "no live feature varies about its position means"

    def _curve(
        self, values: dict[str, Tensor], live_F: Tensor, draws: dict[str, Tensor], level: float
    ) -> dict[str, Any]:
        energy_F = values["c0"][live_F]
        found = curve(values["rho"][:, live_F], energy_F, draws.get("autocorrelation"), level)
        reason = None
        if all(rho is None for rho in found["rho"]):
            reason = self._reason("autocorrelation", len(energy_F))
        elif None in found["rho"]:
            reason = "null at lags without a pair of valid tokens in one segment"
        return found | {"reason": reason}

    def _smoothness_summary(self, draws: dict[str, Tensor], level: float) -> dict[str, Any]:
        """T-SAE's smoothness: one number for all features, with its interval; of an SAE with
        groups also for the first and for the rest."""
        names = _SMOOTHNESS if self._smoothness.n_first else _SMOOTHNESS[:1]
        if not self._smoothness.n_contexts:
            nothing = torch.tensor(torch.nan)
            why = "the inputs of the SAE were not given"
            return {name: single(nothing, None, level, why) for name in names}
        result = self._smoothness.compute()
        values = [result.value, *result.groups]
        why = "no context had an active feature and two valid neighbours"
        return {
            name: single(value, draws.get(name), level, why)
            for name, value in zip(names, values, strict=True)
        }
