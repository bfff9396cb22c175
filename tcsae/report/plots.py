"""Plotly figures as pure functions of plain data.

Colours are Okabe and Ito's (readable with any colour vision) and Cividis / RdBu for heat maps;
where many things must be told apart, dashes and symbols vary too. Backgrounds are transparent and
text colours are left to the page, which knows whether it is light or dark. Text that comes from
data is escaped: plotly reads a little HTML in it.

Shapes: K lags, T positions, F features, N points.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C8C")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")

_NAMED_CLUSTERS = 13
_NAMED_POINTS = 12

Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """A named line, with a band around it where one is known."""

    name: str
    x: Sequence[float]
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


@dataclass(frozen=True)
class Point:
    """A named place in a plane; intervals are (low, high)."""

    name: str
    x: float
    y: float
    x_interval: Sequence[float | None] | None = None
    y_interval: Sequence[float | None] | None = None
    colour: float | None = None
    group: str = ""
    """Points of one group share a symbol."""


def escaped(text: str) -> str:
    """Text as plotly shows it, whatever it contains."""
    return html.escape(text, quote=False)


def style(index: int) -> tuple[str, str]:
    """Colour and dash of the index-th line; no two of the first 35 are alike."""
    repeats, colour = divmod(index, len(OKABE_ITO))
    return OKABE_ITO[colour], DASHES[repeats % len(DASHES)]


def blank(x_title: str, y_title: str, *, height: int = 340, **layout: Any) -> Figure:
    """An empty figure in the page's style."""
    import plotly.graph_objects as go

    settings: dict[str, Any] = {
        "template": "none",
        "height": height,
        "margin": {"l": 62, "r": 16, "t": 34, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": {"title": {"text": x_title}},
        "yaxis": {"title": {"text": y_title}},
        "hovermode": "closest",
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        "showlegend": False,
    }
    return go.Figure(layout=settings | layout)


def _band(curve: Curve, colour: str) -> dict[str, Any] | None:
    """A closed area between low and high, at the places where both are known."""
    if curve.low is None or curve.high is None:
        return None
    edges = zip(curve.x, curve.low, curve.high, strict=True)
    known = [(x, low, high) for x, low, high in edges if low is not None and high is not None]
    if not known:
        return None
    x, low, high = zip(*known, strict=True)
    return {
        "type": "scatter",
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": f"{colour}33",
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": escaped(curve.name),
    }


def lines(
    curves: Sequence[Curve], x_title: str, y_title: str, *, markers: bool = False, **layout: Any
) -> Figure:
    """Named lines with their bands; a legend if there are several."""
    figure = blank(x_title, y_title, **layout)
    figure.update_layout(showlegend=len(curves) > 1, hovermode="x unified")
    for index, curve in enumerate(curves):
        colour, dash = style(index)
        if (band := _band(curve, colour)) is not None:
            figure.add_trace(band)
        figure.add_scatter(
            x=list(curve.x),
            y=list(curve.y),
            name=escaped(curve.name),
            legendgroup=escaped(curve.name),
            mode="lines+markers" if markers else "lines",
            marker={"size": 5, "symbol": SYMBOLS[index % len(SYMBOLS)]},
            line={"color": colour, "dash": dash, "width": 2},
            hovertemplate="%{y:.4~g}",
        )
    return figure


def autocorrelation(curves: Sequence[Curve], height: int = 380) -> Figure:
    """rho by lag, lag 0 (always 1) left out so that the rest can be read."""
    cut = [
        Curve(c.name, c.x[1:], c.y[1:], c.low and c.low[1:], c.high and c.high[1:]) for c in curves
    ]
    figure = lines(cut, "lag, tokens", "autocorrelation rho", markers=True, height=height)
    figure.update_yaxes(zeroline=True)
    return figure


def histogram(
    values: np.ndarray, title: str, marks: Mapping[str, float | None], *, n_bins: int = 60
) -> Figure:
    """Distribution over features, with named vertical lines; NaN left out.

    The outer half per cent on either side goes into the outermost bins.
    """
    figure = blank(title, "features", height=260)
    known = values[np.isfinite(values)]
    if not len(known):
        return figure
    low, high = np.quantile(known, [0.005, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(known.clip(low, high), bins=n_bins, range=(low, high))
    figure.add_bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts,
        width=float(edges[1] - edges[0]),
        marker={"color": OKABE_ITO[0], "line": {"width": 0}},
        hovertemplate="%{x:.3~g}: %{y} features<extra></extra>",
    )
    for index, (name, value) in enumerate(marks.items()):
        if value is None or not math.isfinite(value):
            continue
        figure.add_scatter(
            x=[value, value],
            y=[0, int(counts.max())],
            mode="lines",
            name=escaped(name),
            line={"color": OKABE_ITO[4 - index], "dash": DASHES[index + 1], "width": 2},
            hovertemplate=f"{escaped(name)} %{{x:.4~g}}<extra></extra>",
        )
    figure.update_layout(showlegend=True, bargap=0)
    figure.data[0].showlegend = False
    return figure


def heat_map(
    z: np.ndarray,
    x: Iterable[Any],
    y: Iterable[Any],
    x_title: str,
    y_title: str,
    *,
    colour_title: str = "",
    text: Sequence[Sequence[str]] | None = None,
    **layout: Any,
) -> Figure:
    """Values on a grid, light to dark; `text` is written into the cells."""
    figure = blank(x_title, y_title, **layout)
    figure.add_heatmap(
        z=z,
        x=list(x),
        y=list(y),
        colorscale="Cividis",
        colorbar={"title": {"text": colour_title, "side": "right"}, "thickness": 12},
        text=text,
        texttemplate="%{text}" if text else None,
        hoverongaps=False,
        hovertemplate=f"{x_title} %{{x}}<br>{y_title} %{{y}}<br>%{{z:.4~g}}<extra></extra>",
    )
    return figure


def correlation_map(
    r: np.ndarray, names: Sequence[str], borders: Sequence[int], *, height: int = 560
) -> Figure:
    """Correlation matrix [n, n] of features in a given order, lines where a cluster ends.

    The scale ends at the 99.5th percentile of the coefficients off the diagonal.
    """
    n = len(r)
    off = np.abs(r[~np.eye(n, dtype=bool)])
    off = off[np.isfinite(off)]
    top = max(0.05, float(np.quantile(off, 0.995))) if len(off) else 1.0
    figure = blank("", "", height=height, margin={"l": 12, "r": 12, "t": 34, "b": 48})
    figure.add_heatmap(
        z=r.astype(np.float32),
        zmin=-top,
        zmax=top,
        colorscale="RdBu",
        reversescale=True,
        colorbar={"title": {"text": "correlation", "side": "right"}, "thickness": 12},
        x=[escaped(name) for name in names],
        y=[escaped(name) for name in names],
        hovertemplate="%{x}<br>%{y}<br>%{z:.3f}<extra></extra>",
    )
    marks = {"showticklabels": False, "ticks": "", "showgrid": False, "constrain": "domain"}
    figure.update_xaxes(type="category", **marks)
    figure.update_yaxes(type="category", autorange="reversed", scaleanchor="x", **marks)
    thin = {"color": "rgba(120,120,120,0.55)", "width": 0.7}
    for at in (border - 0.5 for border in borders):
        figure.add_shape(type="line", x0=at, x1=at, y0=-0.5, y1=n - 0.5, line=thin)
        figure.add_shape(type="line", y0=at, y1=at, x0=-0.5, x1=n - 0.5, line=thin)
    return figure


def cluster_map(
    points: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    features: np.ndarray,
    hover: Sequence[Sequence[str]],
    *,
    height: int = 560,
) -> Figure:
    """Features in the plane [N, 2], a trace per cluster; `hover` are the lines of each point.

    The largest clusters carry their name.
    Colours repeat after seven clusters with another symbol. Features without a cluster are grey.
    `features` travel as customdata, for the page to open the one that is clicked.
    """
    figure = blank("", "", height=height, margin={"l": 12, "r": 12, "t": 12, "b": 12})
    for index, cluster in enumerate(np.unique(labels).tolist()):
        own = labels == cluster
        alone = cluster < 0
        colour = "#8C8C8C" if alone else OKABE_ITO[cluster % 6]
        symbol = "circle-open" if alone else SYMBOLS[cluster // 6 % len(SYMBOLS)]
        figure.add_scatter(
            x=points[own, 0].round(3),
            y=points[own, 1].round(3),
            mode="markers",
            name="no cluster" if alone else escaped(names[cluster]),
            marker={"size": 6, "color": colour, "symbol": symbol, "opacity": 0.85},
            customdata=features[own],
            text=["<br>".join(map(escaped, hover[i])) for i in np.flatnonzero(own).tolist()],
            hovertemplate="%{text}<extra></extra>",
            legendrank=index,
        )
        if not alone and index < _NAMED_CLUSTERS:
            middle = np.median(points[own], axis=0)
            figure.add_annotation(
                x=float(middle[0]),
                y=float(middle[1]),
                text=escaped(names[cluster]),
                showarrow=False,
                font={"size": 11},
                opacity=0.85,
            )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def profiles(rate_TF: np.ndarray, groups: Mapping[str, np.ndarray]) -> list[Curve]:
    """Firing rate by position over a feature's own mean, averaged over the features of a group.

    Args:
        rate_TF: firing rate by position; NaN at positions that never count.
        groups: name -> numbers (or mask) of its features, all of which fire.
    """
    curves = []
    for name, features in groups.items():
        own = rate_TF[:, features]
        relative = own / np.nanmean(own, axis=0)
        seen = np.isfinite(relative).any(axis=1)
        mean = np.nanmean(relative[seen], axis=1)
        curves.append(Curve(name, np.flatnonzero(seen).tolist(), mean.tolist()))
    return curves


def plane(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    *,
    colour_title: str = "",
    labels: bool = False,
    joined: bool = False,
    height: int = 420,
    **layout: Any,
) -> Figure:
    """Named points with error bars, coloured by a third value where every point has one.

    Args:
        labels: write the names beside the points, if there are at most 12.
        joined: a thin line through the points of a group, from left to right.
    """
    figure = blank(x_title, y_title, height=height, **layout)
    shades = [p.colour for p in points if p.colour is not None]
    coloured = len(shades) == len(points) and len(set(shades)) > 1
    groups = dict.fromkeys(point.group for point in points)
    symbols = {group: SYMBOLS[i % len(SYMBOLS)] for i, group in enumerate(groups)}
    for group in symbols if joined else ():
        own = sorted((p.x, p.y) for p in points if p.group == group)
        if len(own) > 1:
            x, y = zip(*own, strict=True)
            line = {"color": "#808080", "width": 1}
            figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip")
    for index, point in enumerate(points):
        marker: dict[str, Any] = {"size": 12, "symbol": symbols[point.group]}
        marker |= {"line": {"width": 1, "color": "#777"}}
        if coloured:
            marker |= {"color": [point.colour], "coloraxis": "coloraxis"}
        else:
            marker |= {"color": style(index)[0]}
        figure.add_scatter(
            x=[point.x],
            y=[point.y],
            error_x=_error_bar(point.x, point.x_interval),
            error_y=_error_bar(point.y, point.y_interval),
            mode="markers+text" if labels and len(points) <= _NAMED_POINTS else "markers",
            text=[escaped(point.name)],
            textposition=("top right", "bottom right")[index % 2],
            cliponaxis=False,
            name=escaped(point.name),
            marker=marker,
            hovertemplate=f"{escaped(point.name)}<br>{x_title} %{{x:.4~g}}<br>"
            f"{y_title} %{{y:.4~g}}"
            + (f"<br>{colour_title} {point.colour:.4g}" if coloured else "")
            + "<extra></extra>",
        )
    if coloured:
        bar = {"title": {"text": colour_title, "side": "right"}, "thickness": 12}
        ends = {"cmin": min(shades), "cmax": max(shades)}
        figure.update_layout(coloraxis={"colorscale": "Cividis", "colorbar": bar, **ends})
    return figure


def _error_bar(value: float, interval: Sequence[float | None] | None) -> dict[str, Any] | None:
    if not interval or interval[0] is None or interval[1] is None:
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, interval[1] - value)],
        "arrayminus": [max(0.0, value - interval[0])],
        "color": "#808080",
        "thickness": 1.4,
        "width": 3,
    }


def forest(rows: Sequence[Point], x_title: str, *, height: int | None = None) -> Figure:
    """Differences with their intervals, one a row, and the line of no difference."""
    figure = blank(x_title, "", height=height or 90 + 28 * len(rows))
    for row in rows:
        low, high = row.x_interval or (None, None)
        clear = low is not None and high is not None and (low > 0 or high < 0)
        colour = OKABE_ITO[0] if clear else OKABE_ITO[6]
        figure.add_scatter(
            x=[row.x],
            y=[escaped(row.name)],
            error_x=_error_bar(row.x, row.x_interval),
            mode="markers",
            marker={"size": 9, "color": colour, "symbol": "circle" if clear else "circle-open"},
            hovertemplate=f"{escaped(row.name)} %{{x:.4~g}}<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", title={"text": ""}, automargin=True)
    ends = [0.0, *(row.x for row in rows)]
    ends += [end for row in rows for end in row.x_interval or () if end is not None]
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    figure.update_xaxes(zeroline=True, range=[min(ends) - room, max(ends) + room], nticks=5)
    return figure
