"""What the consistency suite measures, of all documents and without each block of them.

Every metric of a feature, and every mean and median over features, is a table of rows: the first
of all documents, the others without one block. The first row is what is reported, the others are
its error. `suite` puts them into words.

Shapes: B contexts of a batch, T positions, F features, K = max_lag, G blocks of documents,
R = 1 + G rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tcsae.metrics.accumulator import median, weighted_mean
from tcsae.metrics.activity import Activity, Smoothness
from tcsae.metrics.autocorrelation import (
    Autocorrelation,
    correlation_length,
    integrated_time,
    integrated_time_censored,
    normalised,
    window_consistency,
)
from tcsae.metrics.document import LongLags, long_lags
from tcsae.metrics.position import PositionDependence
from tcsae.metrics.position_sums import PositionSums
from tcsae.metrics.units import MAX_BLOCKS, MIN_UNITS, Units, jackknife_draws, too_few
from tcsae.metrics.windows import (
    document_left_out,
    made_of_windows,
    shares_window,
    weighed,
    window_metric_names,
    windows_left_out,
)

SEEN_CONTEXTS = 20
"""Medians, quartiles and means are over features that are on in so many contexts (or in half of
them, if that is less): a ratio of a feature that was seen in few is too low."""
MOST_CENSORED = 0.01
"""Largest share of the energy in features that could not be measured to the end, with which a mean
over the others is still given."""

FROM_RHO = ("correlation_length", "tau_int")
FROM_POSITION = ("eta_squared", "omega_squared", "mutual_information", "mutual_information_share")
SHARES = ("share_position", "share_document", "share_window", "share_flicker")
FROM_ACTIVITY = ("persistence", "run_length", "density", "mean_activation", "amplitude_cv")
INFORMATION = ("mutual_information", "mutual_information_share")
OF_SEEN = (*FROM_RHO, *INFORMATION)
"""Not linear in the sums of a feature: their weighted means too are over features seen enough."""

SMOOTHNESS = ("smoothness", "smoothness_first_group", "smoothness_second_group")

CENSORED = {
    "correlation_length": "rho stays above 1 / e within {max_lag} lags",
    "tau_int": "the sum of rho does not settle within {max_lag} lags",
    "run_length": "no run of on was seen to end",
}


def seen_contexts(n_contexts: int) -> int:
    """In how many of so many contexts a feature must be on to count as seen often enough."""
    return min(SEEN_CONTEXTS, max(1, math.ceil(n_contexts / 2)))


class SuiteRows:
    """The sums of `ConsistencySuite`, and everything that is worked out from them.

    See there for the arguments.
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int,
        *,
        max_lag: int | None = None,
        windows: Sequence[int] = (2, 4, 8, 16, 32),
        n_blocks: int = MAX_BLOCKS,
        seed: int = 0,
        n_boot: int = 1000,
        groups: Sequence[int] = (),
        units: Units | None = None,
    ) -> None:
        if min(windows, default=2) < 2:
            raise ValueError(f"windows must be 2 positions or more, not {min(windows)}")
        self.n_features = n_features
        self.max_lag = n_positions // 4 if max_lag is None else max_lag
        self.windows = tuple(windows)
        self.seed = seed
        self.n_boot = n_boot
        self.units = units
        self._intervals_wanted = n_blocks > 0
        n_blocks = n_blocks or MAX_BLOCKS
        self._sums = PositionSums(n_features, n_positions, units=units, n_blocks=n_blocks)
        self._memory = Autocorrelation(n_features, n_positions, self.max_lag, sums=self._sums)
        self._position = PositionDependence(n_features, n_positions, memory=self._memory)
        bands = {w: long_lags(w, n_positions) for w in self.windows}
        self._bands = {w: (first, last) for w, (first, last) in bands.items() if first <= last}
        self._long = LongLags(
            n_features, n_positions, tuple(self._bands.values()), memory=self._memory
        )
        self._activity = Activity(n_features, n_positions, units=units, n_blocks=n_blocks)
        n_first = groups[0] if len(groups) > 1 else 0
        self._smoothness = Smoothness(n_features, n_first=n_first, units=units, n_blocks=n_blocks)

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
        for added in self._sums.add(features, segments=segments, valid=valid):
            for metric in (self._memory, self._position, self._long):
                metric.add(added)
        self._activity.update(features, segments=segments, valid=valid)
        if inputs is not None:
            self._smoothness.update(features, inputs, segments=segments, valid=valid)
        self._forget()

    def reset(self) -> None:
        """Forget every batch."""
        for metric in (self._memory, self._position, self._long, self._activity, self._smoothness):
            metric.reset()
        self._forget()

    def _forget(self) -> None:
        """What was worked out for the contexts so far."""
        for name in (
            *("_all_rows", "_crossed", "_estimates", "_draws", "_once", "_rows_once"),
            "_per_feature",
        ):
            self.__dict__.pop(name, None)

    @property
    def n_contexts(self) -> int:
        """Contexts seen."""
        return self._sums.n_contexts

    @property
    def n_documents(self) -> int:
        """Documents seen."""
        return self.n_contexts if self.units is None else self.units.n_documents

    # ---------------------------------------------------------- of all, and without each block

    @cached_property
    def _all_rows(self) -> dict[str, Tensor]:
        """The metrics of single features, [R, F] (rho [R, K + 1, F]; eta_squared [1, F])."""
        deletions = self._interval_reason() is None
        covariance_RKF = self._memory.covariances(deletions)
        energy_RF = covariance_RKF[:, 0]
        values = {"rho": normalised(covariance_RKF), "c0": energy_RF}
        values |= self._of_memory(values["rho"])
        values |= self._activity.rows(deletions) | self._position.shares(deletions)
        varying_RF = torch.where(energy_RF > 0, energy_RF, torch.nan)
        document_RLF = self._long.covariances(deletions) / varying_RF[:, None]
        usable, shares_at = self._usable_windows(), self._shares_window()
        values |= made_of_windows(values, document_RLF, list(self._bands), usable, shares_at)
        return values

    @cached_property
    def _draws(self) -> dict[str, Tensor]:
        return {
            name: jackknife_draws(value[1:], value[0], self.n_boot, self.seed)
            for name, value in self._rows_once.items()
            if name != "eta_squared" and value[0].isfinite().any()
        }

    @cached_property
    def _rows_once(self) -> dict[str, Tensor]:
        """`_estimates`, whose spread is that of the error; one row without intervals."""
        found = dict(self._estimates)
        if self._interval_reason():
            return {name: value[:1] for name, value in found.items()}
        for name in (*INFORMATION, "omega_squared", *({"share_position"} & set(found))):
            value = found[name]
            middle = value[1:].mean(0)
            found[name] = torch.cat([value[:1], middle + self._once[name] * (value[1:] - middle)])
        found["eta_squared"] = found["eta_squared"][:1]
        return found

    @cached_property
    def _once(self) -> dict[str, Tensor]:
        """What errors of shares of position are multiplied by, for they are counted twice by the
        jackknife in part (`PositionDependence.counted_twice`)."""
        rows, estimates = self._all_rows, self._estimates
        live_F = rows["density"][0] > 0
        energy_F = torch.where(live_F, rows["c0"][0].nan_to_num(nan=0.0), 0.0)
        seen_F = self._seen(self._activity.contexts_on())
        twice = self._position.counted_twice(energy_F, seen_F)
        found = {name: _less(estimates[name][1:, 0], twice[name]) for name in INFORMATION}
        of_mean = _less(estimates["omega_squared"][1:, 0], twice["omega_squared_mean"])
        found |= dict.fromkeys(("omega_squared", "share_position"), of_mean)
        found["omega_squared_by_feature"] = _less(rows["omega_squared"][1:], twice["omega_squared"])
        return found

    def _of_memory(self, rho: Tensor) -> dict[str, Tensor]:
        """The metrics that follow from the autocorrelation [..., K + 1, F]."""
        values = {"rho_1": rho[..., 1, :]} if self.max_lag else {}
        values |= {f"C_{w}": window_consistency(rho, w) for w in self._usable_windows()}
        values["correlation_length"] = correlation_length(rho).values
        values["tau_int"] = integrated_time(rho)
        return values

    @cached_property
    def _estimates(self) -> dict[str, Tensor]:
        """What is summarised, of all documents and without each block of them: weighted mean and
        median [R, 2], the curve [R, K + 1], single numbers [R]."""
        rows = self._all_rows
        live_F = rows["density"][0] > 0
        seen_F = live_F & self._seen(self._activity.contexts_on())
        found = {
            name: torch.stack(
                [self._weighted(name, rows, live_F, seen_F), self._median(name, rows, seen_F)], 1
            )
            for name in self._metric_names()
        }
        energy_RF = rows["c0"][:, live_F]
        rho_RKF = rows["rho"][..., live_F].nan_to_num(nan=0.0)
        curve_RK = (rho_RKF * energy_RF[:, None]).sum(-1) / energy_RF.sum(-1, keepdim=True)
        unknown_K = rows["rho"][0][:, live_F].isnan().all(-1)
        found["autocorrelation"] = curve_RK.masked_fill(unknown_K, torch.nan)
        found["edge_energy"] = self._position.edge_energy(len(energy_RF) > 1)
        live = self._activity.live_share(len(energy_RF) > 1)
        found["live_share"] = live.value if live.reason is None else live.value * torch.nan
        if self._smoothness.n_contexts:
            parts = self._smoothness.rows().unbind(1)
            found |= dict(zip(SMOOTHNESS, parts, strict=False))
        return found

    def _weighted(
        self, name: str, rows: Mapping[str, Tensor], live_F: Tensor, seen_F: Tensor
    ) -> Tensor:
        """Energy-weighted mean over features, [R]."""
        if name in FROM_ACTIVITY and self._sums.n_used > 1:
            weighted_R = self._crossed[name]
        else:
            counted_F = seen_F if name in OF_SEEN else live_F
            value_RF, weights_RF = weighed(name, rows, rows["c0"], rows["density"][0])
            value_RF = value_RF.masked_fill(~counted_F | self._censored(name), torch.nan)
            weights_RF = weights_RF[: len(value_RF)]
            weighted_R = weighted_mean(value_RF, weights_RF)
        if self._censored_energy(name) > MOST_CENSORED:
            return torch.full_like(weighted_R, torch.nan)
        return weighted_R

    @cached_property
    def _crossed(self) -> dict[str, Tensor]:
        """Means of what is measured from single firings, [R] each: weights from one half of the
        documents, values from the other, and back; less the bias that ratios of half of the
        documents have, by the jackknife (Quenouille 1956)."""
        sides = self._halves()
        weights = [self._memory.energies(side).clamp(min=0.0) for side in sides]
        values = [self._activity.rows(True, side) for side in sides]
        found = {}
        for name in FROM_ACTIVITY:
            there, back = (weighted_mean(values[i][name], weights[1 - i]) for i in (0, 1))
            both_R = (there + back) / 2
            bias = (self._sums.n_used - 1) * (both_R[1:].mean() - both_R[0])
            found[name] = both_R - bias.nan_to_num(nan=0.0)
            if self._interval_reason() is not None:
                found[name] = found[name][:1]
        return found

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Blocks of one half of the documents and of the other, [G] bool each."""
        n_used = self._sums.n_used
        first_G = torch.arange(n_used) % 2 == 0
        if self.units is not None:
            first_G.index_copy_(0, self.units.block, self.units.halves())
        return first_G, ~first_G

    def _median(self, name: str, rows: Mapping[str, Tensor], seen_F: Tensor) -> Tensor:
        """Median over the features that were seen enough, [R]. Without a block it moves as those
        features do that could be the one in the middle, as far as their own errors tell: the
        jackknife of a median itself is of no use (Efron 1979)."""
        value_RF, _ = weighed(name, rows, rows["c0"], rows["density"][0])
        value_RF = self._up_to_censored(name, value_RF)[:, seen_F]
        value_RF = value_RF[:, ~value_RF[0].isnan()]
        n_rows, n_known = value_RF.shape
        if not n_known:
            return value_RF.new_full((n_rows,), torch.nan)
        middle = median(value_RF[0])
        if n_rows == 1 or not middle.isfinite():
            return middle.expand(n_rows)
        moved_RF = (value_RF - value_RF[0]).nan_to_num(nan=0.0)
        error = moved_RF[1:].std(0, unbiased=False).median() * (n_rows - 2) ** 0.5
        # Half of the error: of features of one law the median then has the error that it should.
        near_F = (2 * (value_RF[0] - middle) / error.clamp(min=1e-30)).square()
        return middle + moved_RF @ torch.softmax(-near_F.nan_to_num(nan=torch.inf) / 2, 0)

    def _up_to_censored(self, name: str, value_RF: Tensor) -> Tensor:
        return value_RF.masked_fill(self._censored(name), torch.inf)

    # ------------------------------------------------------------------ what could be measured

    def _seen_contexts(self) -> int:
        return seen_contexts(self.n_contexts)

    def _seen(self, contexts_on_F: Tensor) -> Tensor:
        return contexts_on_F >= self._seen_contexts()

    def _censored(self, name: str) -> Tensor:
        """Live features that last longer than could be measured, [F] bool."""
        rows = self._all_rows
        if name == "tau_int":
            return integrated_time_censored(rows["rho"][0])
        if name == "correlation_length":
            return correlation_length(rows["rho"][0]).censored
        if name == "run_length":
            # Of one that was seen a few times nothing says that it lasts.
            return self._seen(self._activity.contexts_on()) & rows["run_length"][0].isnan()
        return torch.zeros_like(rows["density"][0], dtype=torch.bool)

    def _censored_energy(self, name: str) -> float:
        """Share of the energy of live features in those, and in those that may well be."""
        if name not in CENSORED:
            return 0.0
        rows = self._all_rows
        limit = {"tau_int": self.max_lag / 5, "correlation_length": self.max_lag}
        beyond_F = self._censored(name)
        if name in limit and len(rows[name]) > 1:
            n_blocks = len(rows[name]) - 1
            error_F = rows[name][1:].std(0, unbiased=False) * (n_blocks - 1) ** 0.5
            beyond_F = beyond_F | (rows[name][0] + 2 * error_F >= limit[name])
        counted_F = rows["density"][0] > 0
        if name in OF_SEEN:
            counted_F = counted_F & self._seen(self._activity.contexts_on())
        energy_F = torch.where(counted_F, rows["c0"][0].nan_to_num(nan=0.0), 0.0)
        total = float(energy_F.sum())
        return float(energy_F[beyond_F].sum()) / total if total > 0 else 0.0

    def _low(self, value_RF: Tensor) -> Tensor:
        """Low end of the 95 % interval of every feature, [F]; NaN without intervals."""
        from scipy.stats import t

        n_blocks = len(value_RF) - 1
        if n_blocks < 2:
            return torch.full_like(value_RF[0], torch.nan)
        error_F = value_RF[1:].std(0, unbiased=False) * (n_blocks - 1) ** 0.5
        error_F *= self._once["omega_squared_by_feature"]
        return value_RF[0] - float(t.ppf(0.975, n_blocks - 1)) * error_F

    def _shares_window(self) -> int | None:
        left_out = self._document_left_out()
        return shares_window([w for w in self._usable_windows() if w not in left_out])

    def _document_left_out(self) -> dict[int, str]:
        pairs = dict(zip(self._bands, self._long.pairs().tolist(), strict=True))
        return document_left_out(self._usable_windows(), self._sums.n_positions, pairs)

    def _metric_names(self) -> list[str]:
        windows = window_metric_names(self._usable_windows())
        windows += SHARES if self._shares_window() is not None else ()
        first = ["rho_1"] if self.max_lag else []
        return [*first, *windows, *FROM_RHO, *FROM_POSITION, *FROM_ACTIVITY]

    def _usable_windows(self) -> list[int]:
        left_out = self._windows_left_out()
        return [w for w in self.windows if w not in left_out]

    def _windows_left_out(self) -> dict[int, str]:
        return windows_left_out(self.windows, self.max_lag, self._memory.pairs())

    def _interval_reason(self) -> str | None:
        if not self._intervals_wanted:
            return "none were asked for (evaluation.intervals=false)"
        if self.n_documents < MIN_UNITS:
            return too_few(self.n_documents)
        if not (self._activity.compute().density > 0).any():
            return "no feature fired on a valid token"
        return None


def _less(deleted: Tensor, too_much: Tensor) -> Tensor:
    """Square root of the share of the jackknife's variance that is left without `too_much`; half of
    the variance at least, which is all that can be counted twice."""
    n_blocks = len(deleted)
    variance = deleted.var(0, unbiased=False) * (n_blocks - 1)
    share = 1.0 - too_much / torch.where(variance > 0, variance, torch.nan)
    return share.nan_to_num(nan=1.0).clamp(0.5, 1.0).sqrt()
