"""`report.html` of a run.

Shapes: F = d_sae features, T positions, M cells of the correlation picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tcsae.base.labels import (
    HEADLINE,
    from_documents,
    interval_text,
    interval_words,
    label,
    number,
    spread_text,
    window_part,
)
from tcsae.base.run_files import FEATURES_FOLDER
from tcsae.measure.analysis import Analysis
from tcsae.metrics.truth import flat_truth
from tcsae.report import meaning, norm_limits, plots, truth
from tcsae.report.contents import NO_ANALYSIS, Contents, binned
from tcsae.report.feature_table import FeatureTable
from tcsae.report.memory_figures import memory_figures
from tcsae.report.origin import origin
from tcsae.report.page import write_page
from tcsae.report.passage import NO_PASSAGE, Passage
from tcsae.report.plots import Curve
from tcsae.report.rows import row_of
from tcsae.report.siblings import siblings
from tcsae.report.side_folder import features_beside
from tcsae.runs.folder import LoadedRun

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_TRAINING = {
    "explained variance": ("explained_variance",),
    "L0": ("l0",),
    "consistency within windows, in the batch": ("window_consistency",),
    "share of dead features": ("dead_share",),
    "learning rate": ("lr",),
}
_DISTRIBUTIONS = ("rho_1", "tau_int", "omega_squared", "run_length", "density")
_POSITION_BOUND = 30


def write_run_page(run: LoadedRun, path: Path) -> Path:
    """The page of a loaded run, into a file; of a large one with a folder of features beside it.

    Whole or not at all: the folder comes first, and an earlier page's goes last.
    """
    contents = Contents.of(run)
    table = FeatureTable(contents)
    passage = Passage.of(contents.analysis)
    with features_beside(table, path.with_name(FEATURES_FOLDER)) as features:
        return write_page(
            path,
            "run.html.j2",
            run.folder.resolve().name,
            _context(contents) | {"beside": features.get("folder")},
            run_figures(contents),
            {"features": features, "document": None if passage is None else passage.data()},
        )


def _document(contents: Contents) -> dict[str, Any] | None:
    """The raster over the document."""
    passage = Passage.of(contents.analysis)
    if passage is None:
        return None
    rows = [
        row_of(passage.strip(run.feature), f"{run.length} in a row")
        for run in passage.longest_lived()
    ]
    return {"n_tokens": len(passage), "n_contexts": passage.n_contexts, "rows": rows}


# ---------------------------------------------------------------- figures


def run_figures(contents: Contents) -> dict[str, Figure]:
    """Every figure of the page by name; those that have nothing to show are left out."""
    figures = _training_figures(contents.run.metrics)
    curve = contents.summary["autocorrelation"]
    if any(value is not None for value in curve["rho"]):
        line = Curve("rho", curve["lags"], curve["rho"], curve["low"], curve["high"])
        figures["autocorrelation"] = plots.autocorrelation([line])
    figures |= memory_figures(contents)
    if contents.live.any():
        figures |= _distribution_figures(contents) | _position_figures(contents)
    if contents.analysis is not None:
        figures |= _analysis_figures(contents.analysis)
    return figures


def _training_figures(lines: list[dict[str, Any]]) -> dict[str, Figure]:
    if not lines:
        return {}
    terms = [k for k in lines[0] if k.startswith("loss/") and any(line.get(k) for line in lines)]
    panels = {"loss": tuple(terms)} | _TRAINING
    x = [line["step"] for line in lines]
    figures = {}
    for index, (title, names) in enumerate(panels.items()):
        curves = [
            Curve(name.removeprefix("loss/"), x, [line.get(name) for line in lines])
            for name in names
        ]
        kind = {"type": "log"} if title == "loss" else {"rangemode": "tozero"}
        figures[f"training-{index}"] = plots.lines(
            curves, "step", "", height=240, yaxis={"title": {"text": ""}, **kind}
        )
    return figures


def _distribution_figures(contents: Contents) -> dict[str, Figure]:
    metrics = contents.summary["metrics"]
    figures = {}
    for name in _distributions(contents):
        if name not in contents.values:
            continue
        values = contents.values[name][contents.live].astype(float)
        marks = {
            "median": metrics[name]["median"],
            "energy-weighted mean": metrics[name]["energy_weighted"],
        }
        title = name
        if name == "density":
            values, title = np.log10(values), "log10 density"
            marks = {k: v and float(np.log10(v)) for k, v in marks.items()}
        figures[f"distribution-{name}"] = plots.histogram(values, title, marks)
    return figures


def _distributions(contents: Contents) -> list[str]:
    window = contents.local_window
    local = [] if window is None else [f"L_{window}"]
    return [name for name in (contents.window_metric, *local, *_DISTRIBUTIONS) if name]


def _position_figures(contents: Contents) -> dict[str, Figure]:
    rate_TF, live = contents.values["profile_rate"], contents.live
    omega = np.where(live, np.nan_to_num(contents.values["omega_squared"]), -np.inf)
    order = np.argsort(-omega, kind="stable")[: live.sum()]
    groups = {
        "live features": order,
        "the tenth most bound to positions": order[: max(1, len(order) // 10)],
    }
    curves = plots.profiles(rate_TF, groups)
    figures = {"profile": plots.lines(curves, "position", "firing rate / its mean", height=320)}
    bound = order[:_POSITION_BOUND]
    bound = bound[omega[bound] > 0]
    if len(bound):
        positions, rate = binned(rate_TF[:, bound])
        relative = rate / np.nanmax(rate, axis=0)
        names = [f"{feature}" for feature in bound.tolist()]
        figures["position-bound"] = plots.heat_map(
            relative.T.astype(np.float32),
            positions,
            names,
            "position",
            "feature",
            colour_title="rate / largest",
            height=120 + 16 * len(bound),
            yaxis={"type": "category", "autorange": "reversed", "title": {"text": "feature"}},
        )
    return figures


def _analysis_figures(analysis: Analysis) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    tensors = {name: value.numpy() for name, value in analysis.correlation.items()}
    clusters = analysis.specialization["clusters"]
    if len(tensors["mean"]):
        figures["correlation"] = _correlation(tensors, clusters)
    columns = analysis.specialization["features"]
    placed = np.array([i for i, x in enumerate(columns["x"]) if x is not None], dtype=np.int32)
    if len(placed):
        figures["clusters"] = _map(columns, clusters, placed)
    for index, feature in enumerate(tensors["position_features"].tolist()[:3]):
        r_TT = tensors["position_correlation"][index]
        r_TT = np.where(np.eye(len(r_TT), dtype=bool), np.nan, r_TT)
        places = [str(t) for t in range(len(r_TT))]
        figures[f"by-position-{index}"] = plots.correlation_map(r_TT, places, [], height=330)
        figures[f"by-position-{index}"].update_layout(
            xaxis={"title": {"text": f"position, feature {feature}"}},
        )
    return figures


def _correlation(tensors: dict[str, np.ndarray], clusters: list[dict[str, Any]]) -> Figure:
    of_cell = tensors["cell_cluster"].tolist()
    edges = tensors["edges"].tolist()
    names = []
    for cell, cluster in enumerate(of_cell):
        members = tensors["order"][edges[cell] : edges[cell + 1]].tolist()
        listed = ", ".join(map(str, members[:4])) + (", ..." if len(members) > 4 else "")
        family = f"cluster {cluster} {clusters[cluster]['name']}" if cluster >= 0 else "no cluster"
        names.append(f"{listed} ({family})")
    borders = [m for m in range(1, len(of_cell)) if of_cell[m] != of_cell[m - 1]]
    return plots.correlation_map(tensors["mean"], names, borders)


def _map(columns: dict[str, Any], clusters: list[dict[str, Any]], placed: np.ndarray) -> Figure:
    hover = []
    for i in placed.tolist():
        cluster = columns["cluster"][i]
        family = f"cluster {cluster}: {clusters[cluster]['name']}" if cluster >= 0 else "no cluster"
        tokens = " ".join(f"“{visible(text)}”" for text in columns["top_tokens"][i])
        hover.append([f"feature {i}, {family}", tokens, f"rho_1 {number(columns['rho_1'][i])}"])
    points = np.array([[columns["x"][i], columns["y"][i]] for i in placed], dtype=np.float32)
    labels = np.array([columns["cluster"][i] for i in placed])
    names = [f"{c['cluster']}: {c['name']}" for c in clusters]
    return plots.cluster_map(points, labels, names, placed, hover)


def visible(text: str) -> str:
    """A token alone with its white space shown."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


# ---------------------------------------------------------------- words and tables


def _context(contents: Contents) -> dict[str, Any]:
    run, config = contents.run, contents.run.config
    return {
        "run": run.final_info,
        "model_words": contents.model_words,
        "truth": _truth(contents),
        "meaning": _instruments(contents),
        "config": config,
        "config_text": json.dumps(config.dump(), indent=2),
        "command": contents.command(),
        "summary": contents.summary,
        "from_documents": from_documents(contents.summary),
        "interval_words": interval_words(contents.summary),
        "tiles": _tiles(contents),
        "missing": contents.missing(),
        "core_rows": _core_rows(contents),
        "norm_limits": {
            "head": norm_limits.HEAD,
            "rows": norm_limits.table(contents),
            "caption": norm_limits.CAPTION,
            "caution": norm_limits.caution(contents),
        },
        "consistency_rows": _consistency_rows(contents),
        "window_metric": contents.window_metric,
        "distributions": _distributions(contents),
        "layout_words": contents.layout_words(),
        "single_rows": _single_rows(contents),
        "shares_window": contents.summary.get("shares_window"),
        "training": ["loss", *_TRAINING],
        "origin": origin(run),
        "siblings": siblings(run.folder),
        "analysis": _analysis_context(contents.analysis),
        "no_analysis": NO_ANALYSIS,
        "document": _document(contents),
        "no_document": NO_ANALYSIS if contents.analysis is None else NO_PASSAGE,
        "visible": visible,
    }


def _tiles(contents: Contents) -> list[dict[str, str]]:
    def tile(name: str, value: float | None, interval: Any, reason: str) -> dict[str, str]:
        said = label(name)
        return {
            "name": said.name,
            "value": number(value),
            "interval": interval_text(interval),
            "meaning": said.meaning,
            "reason": reason if value is None else "",
        }

    core, metrics = contents.core, contents.summary["metrics"]
    tiles = [tile(n, core[n], contents.intervals.get(n), contents.core_reason(n)) for n in HEADLINE]
    if contents.truth is not None:
        found = flat_truth(contents.truth)
        tiles += [tile(n, found[n], None, "") for n in truth.TILES if n in found]
    n_live, n_features = (f"{contents.summary[key]:,}" for key in ("n_live", "n_features"))
    tiles[HEADLINE.index("frac_alive")]["meaning"] = (
        f"{n_live} of {n_features} fired at least once on held-out text"
    )
    for name in (*contents.memory_metrics, "rho_1", "tau_int", "omega_squared"):
        if name in metrics:
            entry = metrics[name]
            value, band = entry["energy_weighted"], entry["energy_weighted_interval"]
            tiles.append(tile(name, value, band, entry["reason"] or ""))
            if window_part(name) and (spread := spread_text(entry)):
                tiles[-1]["meaning"] += f"; {spread}"
    for name in ("live_share", "edge_energy"):
        if (entry := contents.singles.get(name)) is not None:
            tiles.append(tile(name, entry["value"], entry["interval"], entry["reason"] or ""))
    if contents.analysis is not None:
        redundancy = contents.analysis.redundancy
        for part, name in (("redundant", "redundant_share"), ("twins", "twinned_share")):
            entry = redundancy[part]
            tiles.append(tile(name, entry[name], None, entry.get(f"{name}_reason", "")))
    return tiles


def _instruments(contents: Contents) -> dict[str, Any] | None:
    found = contents.run.meaning
    if not found:
        return None
    return {"words": meaning.words(found), "head": meaning.HEAD, "rows": meaning.table(found)}


def _truth(contents: Contents) -> dict[str, Any] | None:
    if contents.truth is None:
        return None
    rows = truth.table(contents.truth)
    return {"words": truth.words(contents.truth), "head": truth.HEAD, "rows": rows} | {
        "caption": truth.CAPTION
    }


def _core_rows(contents: Contents) -> list[list[str]]:
    return [
        [
            label(name).name,
            number(value) if value is not None else contents.core_reason(name),
            interval_text(contents.intervals.get(name)),
            label(name).meaning,
        ]
        for name, value in contents.core.items()
    ]


def _consistency_rows(contents: Contents) -> list[list[str]]:
    rows = []
    for name, entry in contents.summary["metrics"].items():
        numbers = [number(entry[key]) for key in ("energy_weighted", "median")]
        weighted = interval_text(entry["energy_weighted_interval"])
        middle = interval_text(entry["median_interval"])
        quartiles = f"{number(entry['q25'])} to {number(entry['q75'])}" if entry["n"] else "n/a"
        rows.append(
            [
                label(name).name,
                numbers[0],
                weighted,
                numbers[1],
                middle,
                quartiles,
                number(entry.get("q99")),
                number(entry["mean"]),
                f"{entry['n']:,}",
                _meaning(name, entry),
            ]
        )
    return rows


def _meaning(name: str, entry: Mapping[str, Any]) -> str:
    """What a metric means, or why it has no mean, and how much of it could not be measured."""
    said = entry["reason"] or label(name).meaning
    if n := entry.get("n_censored"):
        said += f"; {n:,} features last longer than could be measured and are in no mean"
    return said


def _single_rows(contents: Contents) -> list[list[str]]:
    return [
        [
            label(name).name,
            number(entry["value"]),
            interval_text(entry["interval"]),
            entry["reason"] or label(name).meaning,
        ]
        for name, entry in contents.singles.items()
    ]


def _analysis_context(analysis: Analysis | None) -> dict[str, Any] | None:
    if analysis is None:
        return None
    specialization = analysis.specialization
    checks = ("modularity", "modularity_excess", "ari_seeds", "ari_halves", "ami_decoder")
    summary = specialization["summary"]
    return {
        "redundancy": analysis.redundancy,
        "clusters": specialization["clusters"],
        "summary": summary,
        "tokens": specialization["features"]["top_tokens"],
        "check_rows": [
            [
                label(name).name,
                number(summary[name]),
                summary.get(f"{name}_reason") or label(name).meaning,
            ]
            for name in checks
        ],
        "by_position": analysis.redundancy["position_correlation"],
    }
