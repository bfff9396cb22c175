"""All consistency metrics of a set of SAE features in one pass, per feature and summarised.

Shapes: B contexts of a batch, T positions, F features, K = max_lag, G blocks of documents,
R = 1 + G rows: of all documents, and without each block of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tcsae.base.json_numbers import plain
from tcsae.metrics.autocorrelation import correlation_length, integrated_time_censored
from tcsae.metrics.density import N_BINS, bin_and_place, density_bin
from tcsae.metrics.position import EDGE
from tcsae.metrics.suite_rows import (
    CENSORED,
    FROM_ACTIVITY,
    MOST_CENSORED,
    OF_SEEN,
    SMOOTHNESS,
    SuiteRows,
)
from tcsae.metrics.summarise import curve, over_features, single
from tcsae.metrics.windows import SPARSE, weighed

_WITHOUT_VALUE = {
    "run_length": "no run of on was seen to end",
    "amplitude_cv": "no feature was on in two documents",
    "persistence": "no live feature was seen both on and off before a counted neighbour",
    "mutual_information": "no position was seen in two contexts",
    "mutual_information_share": "every live feature always fires",
}
_BIASED = "sampling alone raises it, by about 1 / contexts: omega_squared is without that"


class ConsistencySuite(SuiteRows):
    """Consistency metrics over any number of batches of contexts.

    Intervals are about other documents of the same kind, for these features: everything is
    computed again without each block of whole documents (`units`), and the spread of what comes
    out is the error. Two suites over the same contexts in the same order leave out the same
    documents, so that `draws()` of two SAEs may be subtracted for a paired interval.

    Memory at T = 128, K = 32, F = 2304, 64 blocks: 350 MB, in proportion to F (see the
    accumulators for the terms).

    Args:
        n_features: F.
        n_positions: T.
        max_lag: K; None: T // 4.
        windows: W of every window consistency to report; those that need lags beyond K, or lags
            at which no pair was seen, are left out with the reason.
        n_blocks: G where there are no units; 0: no intervals.
        seed: of the draws.
        n_boot: how many of them.
        groups: sizes of the groups of features of an SAE that has some, in order; smoothness is
            then also given for the first and for the rest.
        units: which contexts, in the order in which they will come, are from one document. None:
            every context is a document of its own.

    Examples:
        >>> suite = ConsistencySuite(n_features=16, n_positions=128)
        >>> suite.update(torch.rand(64, 128, 16))
        >>> suite.summary()["metrics"]["C_8"]["median"]
    """

    def per_feature(self) -> dict[str, Tensor]:
        """Every metric for every feature, float64, NaN where it has no value.

        [F] each: `c0` (variance about the position means, the weight of energy-weighted means),
        `rho_1`, `C_W`, `D_W` and `L_W` (see `document`) for every window, `share_position`,
        `share_document`, `share_window`, `share_flicker` (at the summary's `shares_window`),
        `correlation_length` (and bool `correlation_length_censored`), `tau_int` (and bool
        `tau_int_censored`), `persistence`, `run_length`, `eta_squared`, `omega_squared` (and the
        low end of its 95 % interval, `omega_squared_low`), `mutual_information`,
        `mutual_information_share`, `density`, `contexts_on` (contexts in which it is on),
        `mean_activation`, `amplitude_cv`, and `smoothness` if inputs were given. Further `rho`
        [K + 1, F], `profile_rate` and `profile_mean` [T, F]. Units are those of the functions and
        results of the same names.
        """
        return dict(self._per_feature)

    @cached_property
    def _per_feature(self) -> dict[str, Tensor]:
        rows = self._all_rows
        values = {name: value[0] for name, value in rows.items()}
        values["correlation_length_censored"] = correlation_length(values["rho"]).censored
        values["tau_int_censored"] = integrated_time_censored(values["rho"])
        values["contexts_on"] = self._activity.contexts_on().double()
        values["omega_squared_low"] = self._low(rows["omega_squared"])
        values |= self._position.profiles()
        if self._smoothness.n_contexts:
            values["smoothness"] = self._smoothness.compute().per_feature
        return values

    def draws(self) -> dict[str, Tensor]:
        """Draws of the error around each estimate, that the intervals are read from.

        Returns:
            For every metric that has a value [R, 2]: energy-weighted mean and median over the live
            features (NaN for one without a value). `autocorrelation` [R, K + 1]: the
            energy-weighted curve. [R]: `edge_energy`, `live_share`, and `smoothness` (and of
            groups), if inputs were given. R is n_boot. Empty if there are no intervals to be had
            (see `summary`).
        """
        return {} if self._interval_reason() else self._draws

    def by_density(self) -> dict[str, Tensor]:
        """Sums over the live features of alike density, to compare two SAEs at equal density by.

        Returns:
            For `rho_1`, every `C_W` and `omega_squared` [1 + G, b, 5]: of all documents, and
            without each block; b bins of `density.DENSITY_EDGES`, by the density over all
            documents; sums of e, e y, e x, e x^2 and e x y, with e = c_j(0), y the metric and x
            the log10 density less the lower edge of the bin. Empty without intervals.
        """
        if self._interval_reason():
            return {}
        rows = self._all_rows
        live_F = rows["density"][0] > 0
        bin_F, x_F = bin_and_place(density_bin(rows["density"][0][live_F]))
        energy_RF = rows["c0"][:, live_F].clamp(min=0.0)
        names = [n for n in rows if n in ("rho_1", "omega_squared") or n.startswith("C_")]
        found = {}
        for name in names:
            y_RF = rows[name][:, live_F]
            e_RF = torch.where(y_RF.isfinite(), energy_RF, 0.0)
            y_RF = torch.where(y_RF.isfinite(), y_RF, 0.0)
            terms = torch.stack([e_RF, e_RF * y_RF, e_RF * x_F, e_RF * x_F**2, e_RF * x_F * y_RF])
            sums = terms.new_zeros(*terms.shape[:2], N_BINS)
            found[name] = sums.index_add_(2, bin_F, terms).permute(1, 2, 0).contiguous()
        return found

    def summary(self, level: float = 0.95) -> dict[str, Any]:
        """Everything in numbers that JSON can hold: None where there is no value, with the reason.

        Live features are those that fired on a valid token; how many there are in all is estimated
        in `live_share`. `metrics` has for each metric its median, quartiles, 99th percentile and
        mean over the live features that have a value and were seen in `seen_contexts` contexts,
        their number n, its energy-weighted mean over all live ones, and the intervals of the
        energy-weighted mean and of the median.

        The weight is c_j(0), so that sums over features come before the ratio (rho, C_W, D_W);
        c_j(0) (1 - D_j) for L_W: a feature without anything but its document has no local part;
        the whole variance for omega^2 and the shares. For what is measured from single firings
        (density, run length, ...) the weights are those of one half of the documents and the
        values those of the other, and back, so that no feature weighs more for what it happened to
        do. What could not be measured to the end (`n_censored`) is above all that could in the
        quantiles, and the mean is null where that is more than 1 % of the energy. `C_W_sparse`
        and `L_W_sparse` are over the features on at less than 10 % of the valid tokens.

        `autocorrelation` is the energy-weighted curve sum_j c_j(k) / sum_j c_j(0) with its band,
        lag by lag; `energy_by_position` [T] and `edge_energy` are those of `PositionDependence`.
        `reason` says why something is None, `interval_reason` why an interval is.

        Args:
            level: coverage of the intervals.
        """
        values = self.per_feature()
        live_F = values["density"] > 0
        seen_F = self._seen(values["contexts_on"])
        rows, has_intervals = self._rows_once, self._interval_reason() is None
        pairs_K = self._memory.pairs()
        return {
            "n_features": self.n_features,
            "n_live": int(live_F.sum()),
            "frac_alive": float(live_F.double().mean()),
            "n_seen": int(seen_F.sum()),
            "seen_contexts": self._seen_contexts(),
            "n_documents": self.n_documents,
            "n_contexts": self.n_contexts,
            "n_valid_tokens": int(pairs_K[0]),
            "max_lag": self.max_lag,
            "windows": self._usable_windows(),
            "windows_left_out": {str(w): why for w, why in self._windows_left_out().items()},
            "level": level,
            "n_boot": self.n_boot if has_intervals else 0,
            "n_blocks": self._sums.n_used,
            "interval_reason": self._interval_reason(),
            "shares_window": self._shares_window(),
            "metrics": {
                name: self._summarised(name, values, live_F & seen_F, rows[name], level)
                for name in self._metric_names()
            },
            "autocorrelation": self._curve(rows["autocorrelation"], int(live_F.sum()), level),
            "energy_by_position": plain(self._position.energy_by_position()),
            "live_share": single(
                rows["live_share"],
                level,
                self._activity.live_share(deletions=False).reason or "no token was valid",
            ),
            "edge_energy": single(
                rows["edge_energy"],
                level,
                f"no energy, or no valid token, before or from position {EDGE} on",
            ),
            **self._smoothness_summary(rows, level),
        }

    # -------------------------------------------------------------------------------- in words

    def _summarised(
        self,
        name: str,
        values: dict[str, Tensor],
        counted_F: Tensor,
        rows_R2: Tensor,
        level: float,
    ) -> dict[str, Any]:
        """One entry of `metrics`."""
        value_F, _ = weighed(name, values, values["c0"], values["density"])
        value_F = self._up_to_censored(name, value_F)
        entry = over_features(value_F[counted_F], rows_R2, level)
        entry["reason"] = None
        if entry["energy_weighted"] is None:
            live = int((values["density"] > 0).sum())
            entry["reason"] = self._reason(name, live, int((~value_F.isnan()).sum()))
        if name in CENSORED:
            entry["n_censored"] = int(self._censored(name)[values["density"] > 0].sum())
        if name == "eta_squared":
            entry["interval_reason"] = _BIASED
        return entry

    def _reason(self, name: str, n_live: int, n_known: int = 0) -> str:
        """Why a metric (n_known = 0), or only its energy-weighted mean, has no value."""
        if not n_live:
            return "no feature fired on a valid token"
        if self.n_documents == 1 and name not in FROM_ACTIVITY:
            return "a single context: nothing can be told apart from its position means"
        if (share := self._censored_energy(name)) > MOST_CENSORED:
            why = CENSORED[name].format(max_lag=self.max_lag)
            return f"cannot tell: of features with {100 * share:.0f} % of the energy {why}"
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
        if name in OF_SEEN and n_known:
            return f"cannot tell: no feature was on in {self._seen_contexts()} contexts"
        if n_known:
            return "no energy-weighted mean: no live feature varies about its position means"
        return "no live feature varies about its position means"

    def _curve(self, rows_RK: Tensor, n_live: int, level: float) -> dict[str, Any]:
        found = curve(rows_RK, level)
        reason = None
        if all(rho is None for rho in found["rho"]):
            reason = self._reason("autocorrelation", n_live)
        elif None in found["rho"]:
            reason = "null at lags without a pair of valid tokens in one segment"
        return found | {"reason": reason}

    def _smoothness_summary(self, rows: Mapping[str, Tensor], level: float) -> dict[str, Any]:
        """T-SAE's smoothness: one number for all features, with its interval; of an SAE with
        groups also for the first and for the rest."""
        names = SMOOTHNESS if self._smoothness.n_first else SMOOTHNESS[:1]
        if not self._smoothness.n_contexts:
            why = "the inputs of the SAE were not given"
            return {name: single(torch.full((1,), torch.nan), level, why) for name in names}
        why = "no context had an active feature and two valid neighbours"
        return {name: single(rows[name], level, why) for name in names}
