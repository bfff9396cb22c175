"""What a run folder holds, in the form that its page and its notes need.

Shapes: F = d_sae features, K lags, T positions, R rows of the page's table of features, k top
contexts per feature, C contexts shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from tcsae.base.json_numbers import plain
from tcsae.base.labels import SINGLES, label, listed, local_names, local_window, window_part
from tcsae.base.run_files import RunFiles
from tcsae.config import LoadedConfig
from tcsae.config.compose import override_value
from tcsae.data.token_text import pieces
from tcsae.measure.analysis import Analysis
from tcsae.metrics.layout import LAYOUT_SHARE
from tcsae.report.neighbours import neighbours
from tcsae.report.page import packed
from tcsae.report.runs import flat
from tcsae.runs.folder import LoadedRun

MAX_ROWS = 4096
"""Features on the page: with more than these, those with the most energy."""
MAX_BINS = 128
"""Places along the context in a feature's profile; longer contexts are averaged down."""
MAX_ACTIVATIONS = 2_000_000
"""Activations in top contexts, 4 bytes each in the page."""
MISSING = -32768
DIGITS = 4
"""Of a number in the table."""

_NUMBER_GROUPS = ("layer", "window", "lambda")
OLDER = (
    "Document and local part, nested shares and energy by position: evaluated by an older version. "
    "Its omega² is too low for features that last (run its command again with rerun=true)"
)
NO_ANALYSIS = "not there: this run has no analysis/ folder"

_COLUMNS = (
    "density",
    "rho_1",
    "tau_int",
    "run_length",
    "persistence",
    "omega_squared",
    "mutual_information_share",
    "layout_share",
    "token_entropy",
    "amplitude_cv",
    "mean_activation",
    "c0",
    "max_decoder_cosine_sim",
)


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

    def features_shown(self) -> np.ndarray:
        """Numbers of the features on the page, ascending, [R]."""
        energy = np.where(self.live, np.nan_to_num(self.values["c0"]), -1.0)
        return np.sort(np.argsort(-energy, kind="stable")[:MAX_ROWS])

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
        recorded = RunFiles(self.run.folder).overrides
        if recorded.is_file():
            overrides = yaml.safe_load(recorded.read_text(encoding="utf-8")) or []
            # An experiment may be a sweep by itself; of its jobs this is one.
            has_experiment = any(o.startswith("+experiment=") for o in overrides)
            return [*overrides, "hydra.mode=RUN"] if has_experiment else overrides
        # A run that was not started by the command.
        return self._every_key()

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


# ---------------------------------------------------------------- the table of features


def feature_data(contents: Contents) -> dict[str, Any]:
    """What the page's script needs for the table, and for one feature at a time."""
    ids = contents.features_shown()
    specialization = contents.analysis and contents.analysis.specialization
    columns = specialization["features"] if specialization else {}
    clusters = specialization["clusters"] if specialization else []
    values = _scalars(contents, ids)
    text = [("id", "Feature", "number in the dictionary")]
    if specialization:
        text += [
            ("tokens", "Tokens", "that set the feature apart, best first"),
            ("cluster", "Cluster", "of features that fire together"),
        ]
    shown = [{"key": k, "name": n, "meaning": m, "text": True} for k, n, m in text]
    for name in values:
        shown.append({"key": name, "name": _column_name(name), "meaning": label(name).meaning})
    window = contents.window_metric
    return {
        "ids": ids,
        "live": contents.live[ids],
        "columns": shown,
        "first_sort": window if window in values else "density",
        "values": values,
        "tokens": _chosen(columns.get("top_tokens"), ids, []),
        "cluster": _chosen(columns.get("cluster"), ids, -1),
        "cluster_names": [c["name"] for c in clusters],
        "curves": _curves(contents, ids),
        "pairs": _pairs(contents.analysis),
        "lens": _lens(contents.analysis, ids),
        "neighbours": neighbours(contents.run.sae.W_dec, ids, contents.analysis),
        **_top(contents.analysis, ids),
    }


def _column_name(name: str) -> str:
    short = {
        "mutual_information_share": "pos. info",
        "omega_squared": "omega²",
        "layout_share": "layout",
        "token_entropy": "token entropy",
        "amplitude_cv": "amplitude CV",
        "mean_activation": "mean act.",
        "c0": "energy",
        "max_decoder_cosine_sim": "nearest cos",
        "run_length": "run length",
    }
    return short.get(name, name)


def _chosen(column: list[Any] | None, ids: np.ndarray, default: Any) -> list[Any]:
    return [default] * len(ids) if column is None else [column[i] for i in ids.tolist()]


def _scalars(contents: Contents, ids: np.ndarray) -> dict[str, list[float | None]]:
    """Columns of numbers, those there are, for the features shown."""
    rows = contents.run.core["eval_result_details"]
    of_run: dict[str, Any] = dict(contents.values)
    of_run["max_decoder_cosine_sim"] = [row["max_decoder_cosine_sim"] for row in rows]
    if contents.analysis is not None:
        of_run["token_entropy"] = contents.analysis.specialization["features"]["token_entropy"]
    names = [*contents.memory_metrics, *_COLUMNS]
    return {n: plain(_chosen(list(of_run[n]), ids, None), DIGITS) for n in names if n in of_run}


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


def _curves(contents: Contents, ids: np.ndarray) -> dict[str, Any]:
    """rho in ten thousandths as int16, firing rate in 255ths of the feature's largest as uint8."""
    rho_RK = contents.values["rho"][:, ids].T
    coded = np.where(np.isfinite(rho_RK), np.nan_to_num(rho_RK) * 10000, MISSING).round()
    positions, rate = binned(contents.values["profile_rate"][:, ids])
    rate_RT = np.nan_to_num(rate.T)
    top_R = rate_RT.max(axis=1, initial=0.0)
    levels = rate_RT / np.where(top_R > 0, top_R, 1.0)[:, None]
    return {
        "rho": packed(coded.clip(-32768, 32767).astype(np.int16)) | {"missing": MISSING},
        "rate": packed((levels * 255).round().astype(np.uint8)) | {"missing": None},
        "rate_scale": plain(top_R, DIGITS),
        "positions": positions,
    }


def _pairs(analysis: Analysis | None) -> list[dict[str, Any]]:
    """Redundant pairs and position twins: rows of [first, second, correlation, cosine, lag]."""
    if analysis is None:
        return []
    tensors = analysis.correlation
    none = tensors["twins"].new_zeros(len(tensors["twins"]))
    kinds = (
        ("Redundant with", "pairs", "pair", tensors["pair_lag"]),
        ("Position twin of", "twins", "twin", none),
    )
    found = []
    for name, pairs, prefix, lag in kinds:
        columns = zip(
            tensors[pairs].tolist(),
            plain(tensors[f"{prefix}_correlation"], DIGITS),
            plain(tensors[f"{prefix}_cosine"], DIGITS),
            lag.tolist(),
            strict=True,
        )
        rows = [[i, j, r, cosine, k] for (i, j), r, cosine, k in columns]
        found.append({"name": name, "rows": rows[:MAX_ROWS]})
    return found


def _fewer_contexts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first few contexts of every feature: as many as MAX_ACTIVATIONS leaves room for."""
    totals = (tensors["rows"] > 0).sum(axis=(0, 2)).cumsum()
    k = max(1, int((totals <= MAX_ACTIVATIONS).sum()))
    return {name: tensors[name][:, :k] for name in ("context", "position", "value", "rows")}


def _lens(analysis: Analysis | None, ids: np.ndarray) -> dict[str, Any] | None:
    """Tokens that a feature raises and lowers: numbers of `vocabulary` [R', k], `row` of R'."""
    if analysis is None or not analysis.logit_lens:
        return None
    tensors = {name: value.numpy() for name, value in analysis.logit_lens.items()}
    known = np.flatnonzero(np.isin(tensors["features"], ids))
    row_of = dict(zip(tensors["features"][known].tolist(), range(len(known)), strict=True))
    both = np.stack([tensors["raised"][known], tensors["lowered"][known]])
    used, inverse = np.unique(both, return_inverse=True)
    raised, lowered = inverse.reshape(both.shape).astype(np.int32)
    return {
        "row": [row_of.get(i, -1) for i in ids.tolist()],
        "vocabulary": [analysis.top_tokens["tokens"][str(token)] for token in used.tolist()],
        "raised": packed(raised),
        "lowered": packed(lowered),
    }


def _joined(analysis: Analysis, ids_CT: np.ndarray) -> list[list[Any]]:
    """Where tokens make whole characters together: rows of [context, start, stop, text]."""
    texts = analysis.top_tokens["tokens"]
    # An analysis of an older version does not say which bytes its tokens have.
    parts = {i: bytes.fromhex(part) for i, part in analysis.top_tokens.get("parts", {}).items()}
    is_part = np.isin(ids_CT, [int(i) for i in parts])
    found = []
    for context in np.flatnonzero(is_part.any(axis=1)).tolist():
        own = [str(token) for token in ids_CT[context].tolist()]
        row = pieces([texts[i] for i in own], [parts.get(i) for i in own])
        found += [[context, *piece] for piece in row if piece.stop - piece.start > 1]
    return found


def _top(analysis: Analysis | None, ids: np.ndarray) -> dict[str, Any]:
    """Top contexts: every context once as numbers of texts, activations sparse in 255ths.

    `joined`: see `_joined`. `count` [R', k] says how many of `at` (position) and `level` belong to
    each (feature, context).
    """
    if analysis is None:
        return {"top": None, "top_reason": f"Top contexts: {NO_ANALYSIS}.", "top_row": []}
    tensors = {name: value.numpy() for name, value in analysis.top_contexts.items()}
    known = np.flatnonzero(np.isin(tensors["features"], ids))
    row_of = dict(zip(tensors["features"][known].tolist(), range(len(known)), strict=True))
    tensors |= _fewer_contexts(tensors)
    rows_RkT = tensors["rows"][known].astype(np.float32)
    peak_R = tensors["value"][known].max(axis=1, initial=0.0)
    level_RkT = (rows_RkT / np.where(peak_R > 0, peak_R, 1.0)[:, None, None] * 255).round()
    # What fired, however weakly, is shown.
    level_RkT = np.where(rows_RkT > 0, level_RkT.clip(1, 255), 0).astype(np.uint8)
    used, inverse = np.unique(tensors["ids"], return_inverse=True)
    texts = analysis.top_tokens["tokens"]
    joined = _joined(analysis, tensors["ids"])
    reason = analysis.top_tokens["features_reason"]
    return {
        "top_row": [row_of.get(i, -1) for i in ids.tolist()],
        "top_reason": reason or "It never fired on held-out text.",
        "top": {
            "vocabulary": [texts[str(token)] for token in used.tolist()],
            "joined": joined,
            "ids": packed(inverse.reshape(tensors["ids"].shape).astype(np.int32)),
            "valid": packed(tensors["valid"].astype(np.uint8)),
            "numbers": tensors["number"],
            "context": packed(tensors["context"][known].astype(np.int32)),
            "position": packed(tensors["position"][known].astype(np.int32)),
            "value": packed(tensors["value"][known].astype(np.float32)),
            "count": packed((level_RkT > 0).sum(axis=2).astype(np.int32)),
            "at": packed(level_RkT.nonzero()[2].astype(np.uint16)),
            "level": packed(level_RkT[level_RkT > 0]),
        },
    }
