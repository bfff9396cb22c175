"""What a run folder holds, in the form that its page and its notes need.

Shapes: F = d_sae features, K lags, T positions.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tcsae.base.labels import SINGLES, label, listed, local_names, local_window, window_part
from tcsae.base.run_files import RunFiles
from tcsae.config import LoadedConfig
from tcsae.config.compose import override_value
from tcsae.measure.analysis import Analysis
from tcsae.metrics.layout import LAYOUT_SHARE
from tcsae.report.runs import flat
from tcsae.runs.folder import LoadedRun
from tcsae.runs.unfinished import recorded_overrides

MAX_BINS = 128
"""Places along the context in a feature's profile; longer contexts are averaged down."""

_NUMBER_GROUPS = ("layer", "window", "lambda")
OLDER = (
    "Document and local part, nested shares and energy by position: evaluated by an older version. "
    "Its omega² is too low for features that last (run its command again with rerun=true)"
)
NO_ANALYSIS = "not there: this run has no analysis/ folder"


@dataclass(frozen=True)
class Contents:
    """A finished run with its curves and, if it was made, its analysis."""

    run: LoadedRun
    values: dict[str, np.ndarray]
    """Per feature: scalars [F], `rho` [K + 1, F], `profile_rate` and `profile_mean` [T, F]."""
    analysis: Analysis | None

    @classmethod
    def of(cls, run: LoadedRun) -> Contents:
        """Raises UserError if a file of the run is damaged."""
        values = {name: value.numpy() for name, value in run.per_feature.items()}
        return cls(run, values, run.analysis)

    @property
    def summary(self) -> dict[str, Any]:
        return self.run.consistency["summary"]

    @property
    def core(self) -> dict[str, float | None]:
        """All of SAEBench's metrics by name."""
        groups = self.run.core["eval_result_metrics"].values()
        return {name: value for group in groups for name, value in group.items()}

    @property
    def intervals(self) -> dict[str, list[float | None]]:
        return self.run.core["eval_result_unstructured"]["intervals"]

    def core_reason(self, name: str) -> str:
        """Why a core metric is null."""
        missing = self.run.core["eval_result_unstructured"]["missing"]
        found = (why for path, why in missing.items() if path.endswith(f".{name}"))
        return next(found, "no reason was recorded")

    @property
    def window_metric(self) -> str | None:
        """The C_W to put first: that of the loss's window if it was measured, else of 8 or less."""
        measured = self.summary["windows"]
        window = self.run.config.window
        if window in measured:
            return f"C_{window}"
        fitting = [w for w in measured if w <= 8] or measured[:1]
        return f"C_{max(fitting)}" if fitting else None

    @property
    def local_window(self) -> int | None:
        """The W of the L_W, D_W and L_W of sparse features to show; None if none was measured."""
        metrics = self.summary["metrics"]
        known = [n for n, entry in metrics.items() if entry["energy_weighted"] is not None]
        part = window_part(self.window_metric or "")
        return local_window(known, part.window if part else None)

    @property
    def memory_metrics(self) -> list[str]:
        """C_W, L_W, D_W and L_W of sparse features, those there are."""
        names = [self.window_metric, *local_names(self.local_window)]
        return [name for name in names if name and name in self.summary["metrics"]]

    def layout_words(self, n: int = 10) -> str:
        """How many of the most consistent features are layout, in words; "" if not measured.

        The most consistent: of those seen in enough contexts, the largest L_W (else C_W).
        """
        shares, layout = self.values.get("layout_share"), self.summary.get("layout")
        local = self.local_window
        name = self.window_metric if local is None else f"L_{local}"
        if shares is None or layout is None or name is None or layout["token_share"] is None:
            return ""
        seen = self.live & (self.values["contexts_on"] >= self.summary["seen_contexts"])
        value = np.where(seen, np.nan_to_num(self.values[name], nan=-np.inf), -np.inf)
        first = np.argsort(-value, kind="stable")[:n]
        first = first[np.isfinite(value[first])]
        energy = layout["energy_share"]
        return (
            f"Of the {len(first)} most consistent features (largest {name}, on in "
            f"{self.summary['seen_contexts']} contexts or more) "
            f"{int((shares[first] > LAYOUT_SHARE).sum())} are layout: more than half of their "
            "activation is on line ends, punctuation, headings or names in capitals. Of all "
            f"features {layout['n_features']:,} are"
            + ("" if energy is None else f", with {100 * energy:.0f} % of the variance")
            + f"; of the tokens {100 * layout['token_share']:.0f} %."
            + self._without_layout()
        )

    def _without_layout(self) -> str:
        """Of the embedded plays, where the same text is without names and headings."""
        data = self.run.config.dataset
        if data.source != "wheel" or data.subset is not None:
            return ""
        return (
            " On this text a gain of the temporal loss sits mostly in these (docs/meaning.md has "
            "the shares); dataset=speech is the same plays without them."
        )

    @property
    def singles(self) -> dict[str, dict[str, Any]]:
        """Measured over all features at once: {value, interval, reason} by name."""
        return {name: self.summary[name] for name in SINGLES if name in self.summary}

    @property
    def truth(self) -> dict[str, Any] | None:
        """What was found of a synthetic world; None for a run on a language model."""
        return self.run.final_info.get("truth")

    @property
    def model_words(self) -> str:
        """What the activations are of, in a line."""
        model = self.run.config.model
        if (world := model.world) is not None:
            return f"{model.name}, {world.n_true:,} true features in {world.d_in} dimensions"
        if model.is_given:
            return f"own activations, {self.run.config.dataset.path}"
        return f"{model.name}, block {self.run.final_info['layer']}, {model.hook}"

    @property
    def live(self) -> np.ndarray:
        return self.values["density"] > 0

    def command(self) -> str:
        """The command that repeats the run."""
        source = self.run.config.source if isinstance(self.run.config, LoadedConfig) else None
        if source is None:
            return shlex.join(["python", "-m", "tcsae.train", *self._overrides()])
        what = [source.folder]
        if source.pretrained:
            release, _, sae_id = source.folder.partition(" ")
            what = ["--release", release, "--sae-id", sae_id]
        return shlex.join(["python", "-m", "tcsae.evaluate", *what, *self._overrides()])

    def _overrides(self) -> list[str]:
        recorded = recorded_overrides(RunFiles(self.run.folder))
        return self._every_key() if recorded is None else recorded

    def _every_key(self) -> list[str]:
        """Every key of the config, in groups that set no others."""
        config = self.run.config.dump()
        groups = {"model": "other", "dataset": "files"}
        if isinstance(self.run.config, LoadedConfig):
            del config["sae"], config["source"]  # the folder has them
        else:
            groups["sae"] = config["sae"]["architecture"]
            groups["consistency"] = config["consistency"]["form"]
        if config["layer"] is None:
            del config["layer"]  # the group's own default is the same, and null is no option
        # ++: conf/ does not list every key; groups do not take it.
        keys = (
            f"{'' if key in _NUMBER_GROUPS else '++'}{key}={override_value(value)}"
            for key, value in flat(config)
        )
        return [*(f"{group}={option}" for group, option in groups.items()), *keys]

    def missing(self) -> list[str]:
        """What this run has no value for, each with its reason."""
        absent: dict[str, list[str]] = {}
        for name, value in self.core.items():
            if value is None:
                absent.setdefault(self.core_reason(name), []).append(label(name).name)
        found = [f"{listed(names)}: {reason}" for reason, names in absent.items()]
        by_reason: dict[str, list[str]] = {}
        for name, entry in self.summary["metrics"].items():
            if entry["reason"] and window_part(name) and not name.startswith("C_"):
                by_reason.setdefault(entry["reason"], []).append(label(name).name)
            elif entry["reason"] and not name.endswith("_sparse"):
                found.append(f"{label(name).name}: {entry['reason']}")
        found += [f"{listed(names)}: {reason}" for reason, names in by_reason.items()]
        if "energy_by_position" not in self.summary:
            found.append(OLDER)
        for window, reason in self.summary["windows_left_out"].items():
            found.append(f"{label(f'C_{window}').name}: {reason}")
        for part, entry in (
            ("Intervals of the consistency metrics", self.summary["interval_reason"]),
            ("Autocorrelation", self.summary["autocorrelation"]["reason"]),
            *((label(name).name, entry["reason"]) for name, entry in self.singles.items()),
        ):
            if entry:
                found.append(f"{part}: {entry}")
        if self.analysis is None:
            return [*found, f"Redundancy, clusters and top contexts: {NO_ANALYSIS}"]
        return found + [f"{label(n).name}: {why}" for n, why in _reasons(self.analysis)]


def _reasons(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """(name, reason) of everything in the analysis that is null."""
    redundancy = analysis.redundancy
    parts = (redundancy, redundancy["redundant"], redundancy["twins"])
    for part in (*parts, analysis.specialization["summary"]):
        for name, reason in part.items():
            if name.endswith("_reason") and reason:
                yield name.removesuffix("_reason"), reason
    if analysis.top_tokens["features_reason"]:
        yield "Top contexts", analysis.top_tokens["features_reason"]


def binned(profile: np.ndarray, n_bins: int = MAX_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Middle of each bin [at most n_bins] and mean over its positions, of a profile [T, F].

    NaN (a position that never counts) is left out; a bin of nothing else is NaN.
    """
    n_positions = len(profile)
    if n_positions <= n_bins:
        return np.arange(n_positions), profile
    edges = np.linspace(0, n_positions, n_bins + 1).round().astype(int)
    known = np.isfinite(profile)
    sums = np.add.reduceat(np.where(known, profile, 0.0), edges[:-1])
    with np.errstate(invalid="ignore"):
        means = sums / np.add.reduceat(known.astype(float), edges[:-1])
    return (edges[:-1] + edges[1:] - 1) / 2, means
