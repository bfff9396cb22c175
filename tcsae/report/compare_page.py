"""`report.html` of a comparison: every stream by itself, each variant beside its baseline."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tcsae.base.labels import SPREAD, difference_text, interval_text, label, number, window_part
from tcsae.base.run_files import RunFiles
from tcsae.report import plots
from tcsae.report.changed import changed_blocks
from tcsae.report.comparison import Comparison
from tcsae.report.gain import CAPTION as GAIN_CAPTION
from tcsae.report.gain import HEAD as GAIN_HEAD
from tcsae.report.gain import gain_table, gain_words
from tcsae.report.index_page import link
from tcsae.report.memory_figures import energy_curves
from tcsae.report.notes import density_verdict, stream_words, verdicts
from tcsae.report.page import write_page
from tcsae.report.plots import Curve, Point
from tcsae.report.seed_noise import (
    SEED_NOISE_HEADER,
    SEED_NOISE_LEAD,
    seed_mark,
    seed_noise_row,
    seed_noise_words,
)
from tcsae.report.stability import stability_words

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Group = Mapping[str, Any]

MAX_CURVES = 12
"""Curves in one figure; with more settings, those with the largest C_W and the baselines."""


def write_compare_report(comparison: Comparison, path: Path) -> Path:
    """Write the page of a comparison into the file `path`."""
    content = comparison.to_json()
    figures: dict[str, Figure] = {}
    streams = []
    for stream in content["streams"]:
        groups = [g for g in content["groups"] if g["stream"] == stream["id"]]
        grids = [g for g in content["grids"] if g["stream"] == stream["id"]]
        drawn = stream_figures(groups, grids, content)
        figures |= {f"s{stream['id']}-{name}": figure for name, figure in drawn.items()}
        streams.append(_stream_context(stream, groups, grids, content))
    pages = [link(RunFiles(run["folder"]).report, path.parent) for run in content["runs"]]
    context: dict[str, Any] = {"content": content, "streams": streams, "pages": pages}
    context["command"] = _command(content)
    n_used = sum(run["status"] == "used" for run in content["runs"])
    title = f"{n_used} runs compared"
    return write_page(path, "compare.html.j2", title, context, figures, {})


def _command(content: Mapping[str, Any]) -> str:
    folders = [run["folder"] for run in content["runs"]]
    return shlex.join(["python", "-m", "tcsae.compare", *folders])


def _headline(content: Mapping[str, Any]) -> list[str]:
    """The narrow table's metrics but for L0, which is what is matched."""
    return [name for name in content["headline"] if name != "l0"]


def _window_metric(content: Mapping[str, Any]) -> str | None:
    window = content["headline_window"]
    return None if window is None else f"C_{window}"


# ---------------------------------------------------------------- figures


def stream_figures(
    groups: Sequence[Group], grids: Sequence[Mapping[str, Any]], content: Mapping[str, Any]
) -> dict[str, Figure]:
    """Every figure of one stream: planes, curves, differences, heat maps of the headline."""
    figures = _planes(groups, _window_metric(content)) | _curves(groups, content)
    figures |= _gain_figures(groups)
    for name in _headline(content):
        if (forest := _forest(groups, name)) is not None:
            figures[f"delta-{name}"] = forest
    for index, grid in enumerate(grids):
        for name in _headline(content):
            figures[f"grid-{index}-{name}"] = heat_map(grid, name, groups)
    return figures


def _point(group: Group, x: str, y: str, colour: str | None) -> Point | None:
    metrics = group["metrics"]
    across, up = metrics.get(x), metrics.get(y)
    if across is None or up is None or across["value"] is None or up["value"] is None:
        return None
    shade = metrics.get(colour, {}).get("value") if colour else None
    return Point(
        group["label"],
        across["value"],
        up["value"],
        (across["low"], across["high"]),
        (up["low"], up["high"]),
        shade,
        group=str(group["arm"]),
    )


def _planes(groups: Sequence[Group], window: str | None) -> dict[str, Figure]:
    """L0 against explained variance against C_W, as two planes."""
    figures = {}
    wanted = [("pareto", "l0", "explained_variance", window)]
    if window is not None:
        wanted.append(("trade", "explained_variance", window, "l0"))
    for name, x, y, colour in wanted:
        found = (_point(group, x, y, colour) for group in groups)
        points = [point for point in found if point is not None]
        if points:
            shade = label(colour).name if colour else ""
            titles = (label(x).name, label(y).name)
            figures[name] = plots.plane(
                points, *titles, colour_title=shade, labels=True, joined=name == "pareto"
            )
    return figures


def _few(groups: Sequence[Group], content: Mapping[str, Any]) -> list[Group]:
    """The groups whose curves are drawn."""
    window = _window_metric(content)

    def rank(group: Group) -> tuple[bool, float]:
        value = group["metrics"].get(window, {}).get("value")
        return not group["is_baseline"], -(value or 0.0)

    chosen = sorted(groups, key=rank)[:MAX_CURVES]
    return [group for group in groups if group in chosen]


def _curves(groups: Sequence[Group], content: Mapping[str, Any]) -> dict[str, Figure]:
    figures = {}
    few = _few(groups, content)
    rho = [
        Curve(g["label"], c["lags"], c["rho"], c["low"], c["high"])
        for g in few
        if (c := g["curve"])["rho"]
    ]
    if rho:
        figures["autocorrelation"] = plots.autocorrelation(rho)
    energy = [
        Curve(g["label"], e["positions"], e["energy"])
        for g in few
        if (e := g.get("energy_by_position")) and e["positions"]
    ]
    if energy:
        figures["energy"] = energy_curves(energy)
    rate = [Curve(g["label"], p["positions"], p["rate"]) for g in few if (p := g["profile"])]
    if rate:
        figures["profile"] = plots.lines(rate, "position", "firing rate / its mean", height=360)
    figures |= _stability_curves(few, _window_metric(content))
    edges = np.array(few[0]["density"]["edges"])
    middle = ((edges[:-1] + edges[1:]) / 2).tolist()
    used = [i for i in range(len(middle)) if any(g["density"]["share"][i] for g in few)]
    if used:
        x = [middle[i] for i in range(min(used), max(used) + 1)]
        part = slice(min(used), max(used) + 1)
        share = [Curve(g["label"], x, g["density"]["share"][part]) for g in few]
        figures["density"] = plots.lines(share, "log10 density", "share of live features")
        window = _window_metric(content)
        by_density = [Curve(g["label"], x, g["density"]["C"][part]) for g in few]
        if window and any(v is not None for curve in by_density for v in curve.y):
            figures["by-density"] = plots.lines(
                by_density, "log10 density", label(window).name, markers=True
            )
    return figures


def _gain_figures(groups: Sequence[Group]) -> dict[str, Figure]:
    """Cumulative share of the change by number of features, of every setting that has a gain."""
    figures = {}
    for group in groups:
        curves = [
            Curve(label(name).name, entry["curve"]["n"], entry["curve"]["share"])
            for name, entry in group["gain"].get("metrics", {}).items()
            if entry["share"] is not None
        ]
        if curves:
            figures[f"gain-{group['id']}"] = plots.lines(
                curves,
                "features, largest gain first",
                "share of the change",
                markers=True,
                xaxis={"type": "log", "title": {"text": "features, largest gain first"}},
            )
    return figures


def _gains(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {
            "group": g,
            "run": g["gain"]["run"],
            "baseline": g["gain"]["baseline"],
            "reason": g["gain"]["reason"],
            "metrics": [
                {"name": label(name).name, "words": gain_words(g, name), "rows": gain_table(entry)}
                for name, entry in g["gain"]["metrics"].items()
            ],
        }
        for g in groups
        if g["gain"]
    ]


def _stability_curves(few: Sequence[Group], window: str | None) -> dict[str, Figure]:
    """How stable the features are, and how consistent those of one stability."""
    bins = [(g["label"], g["stability"]["by_stability"]) for g in few if _is_stable(g)]
    if not bins:
        return {}
    edges = np.array(bins[0][1]["edges"])
    middle = ((edges[:-1] + edges[1:]) / 2).tolist()
    title = "cosine with the match in other seeds"
    share = [Curve(name, middle, entry["share"]) for name, entry in bins]
    figures = {"stability": plots.lines(share, title, "share of live features")}
    if window and any(v is not None for _, entry in bins for v in entry["C"]):
        C = [Curve(name, middle, entry["C"]) for name, entry in bins]
        y = f"median {label(window).name}"
        figures["by-stability"] = plots.lines(C, title, y, markers=True)
    return figures


def _is_stable(group: Group) -> bool:
    return group["stability"]["reason"] is None


def _forest(groups: Sequence[Group], name: str) -> Figure | None:
    rows = [
        Point(g["label"], entry["value"], 0.0, (entry["low"], entry["high"]))
        for g in groups
        if (entry := g["deltas"].get(name)) and entry["value"] is not None
    ]
    return plots.forest(rows, "difference from the baseline") if rows else None


def heat_map(grid: Mapping[str, Any], name: str, groups: Sequence[Group]) -> Figure:
    """Window x lambda of one metric, of one of the comparison's grids."""
    values, by_id = grid["metrics"][name], {group["id"]: group for group in groups}
    text = [
        [
            "" if value is None else number(value) + _change(by_id[cell], name)
            for value, cell in zip(row, cells, strict=True)
        ]
        for row, cells in zip(values, grid["groups"], strict=True)
    ]
    z = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=np.float32)
    return plots.heat_map(
        z,
        [f"{value:g}" for value in grid["lambdas"]],
        [str(window) for window in grid["windows"]],
        "lambda",
        "window",
        text=text,
        height=130 + 44 * len(values),
        xaxis={"type": "category", "title": {"text": "lambda"}},
        yaxis={"type": "category", "title": {"text": "window"}},
    )


def _change(group: Group, name: str) -> str:
    """Second line of a cell: the difference at matched L0, marked where it is within noise."""
    entry = group["deltas"].get(name)
    if entry is None or entry["value"] is None:
        return ""
    mark = "~ " if entry["within_noise"] else ""
    return f"<br>{mark}{difference_text(entry['value'], None, None)}"


# ---------------------------------------------------------------- tables


def _stream_context(
    stream: Mapping[str, Any],
    groups: Sequence[Group],
    grids: Sequence[Mapping[str, Any]],
    content: Mapping[str, Any],
) -> dict[str, Any]:
    variants = [group for group in groups if not group["is_baseline"]]
    return {
        "prefix": f"s{stream['id']}-",
        "words": stream_words(stream),
        "changed": changed_blocks(groups, content),
        "gains": _gains(groups),
        "gain_head": GAIN_HEAD,
        "gain_caption": GAIN_CAPTION,
        "groups": groups,
        "values": [
            {"group": g, "cells": [_value(g, name) for name in content["headline"]]} for g in groups
        ],
        "spreads": [
            {"group": g, "name": label(name).name, "cells": _spread(g, name)}
            for g in groups
            for name in filter(window_part, content["headline"])
        ],
        "every": [
            {"name": label(name), "cells": [_value(g, name) for g in groups]}
            for name in content["metrics"]
        ],
        "deltas": [
            {"group": g, "cells": [_cell(g["deltas"].get(n), "value") for n in _headline(content)]}
            for g in variants
            if g["deltas"]
        ],
        "density": [
            {"group": g, "name": label(name).name, "entry": entry, "cell": _cell(entry, "delta")}
            for g in variants
            for name, entry in g["density_matched"].items()
        ],
        "verdicts": [{"group": g, "sentences": _sentences(g, content)} for g in variants],
        "stability": [sentence for g in groups for sentence in stability_words(g)],
        "stable": [g for g in groups if _is_stable(g)],
        "seed_noise": [
            seed_noise_row(row) for row in content["seed_noise"] if row["stream"] == stream["id"]
        ],
        "seed_noise_header": SEED_NOISE_HEADER,
        "seed_noise_lead": SEED_NOISE_LEAD,
        "delta_metrics": _headline(content),
        "grids": grids,
        "curves_left_out": max(0, len(groups) - MAX_CURVES),
    }


def _sentences(group: Group, content: Mapping[str, Any]) -> list[str]:
    window = _window_metric(content)
    at_density = density_verdict(group, window) if window else ""
    of_seeds = seed_noise_words(content["seed_noise"], group)
    return [*verdicts(group, content["headline"]), *of_seeds, *filter(None, [at_density])]


def _value(group: Group, name: str) -> dict[str, str]:
    entry = group["metrics"].get(name)
    if entry is None or entry["value"] is None:
        reason = (entry or {}).get("reason") or ""
        return {"value": "n/a", "interval": "", "median": "", "reason": reason}
    band = interval_text((entry["low"], entry["high"]))
    middle = group.get("medians", {}).get(name) if window_part(name) else None
    median = "" if middle is None else f"median {number(middle)}"
    reason = entry["reason"] or ""
    return {"value": number(entry["value"]), "interval": band, "median": median, "reason": reason}


def _spread(group: Group, name: str) -> list[str]:
    """Weighted mean, median and 99th percentile over features."""
    weighted = group["metrics"].get(name, {}).get("value")
    return [number(v) for v in (weighted, *(group.get(s, {}).get(name) for s in SPREAD.values()))]


def _cell(entry: Mapping[str, Any] | None, key: str) -> dict[str, str]:
    """A difference: its number, its interval, and what it comes to in a word."""
    if entry is None or entry[key] is None:
        word = (entry or {}).get("reason") or "not measured"
        return {"value": "n/a", "interval": "", "kind": "noise", "word": word}
    kinds = {True: ("noise", "within noise"), False: ("clear", ""), None: ("noise", "no interval")}
    kind, word = kinds[entry["within_noise"]]
    if entry["smallest"]:
        word = f"{word or 'different'}; {number(entry['smallest'])} would show"
    if mark := seed_mark(entry):
        word = f"{word}; {mark}" if word else mark
    text = difference_text(entry[key], entry["low"], entry["high"])
    value, _, band = text.partition(" ")
    return {"value": value, "interval": band, "kind": kind, "word": word}
