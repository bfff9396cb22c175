"""Where the variance of features lies, and where in the context their energy is.

Shapes: F = d_sae features, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tcsae.base.labels import label
from tcsae.report import plots
from tcsae.report.contents import Contents
from tcsae.report.plots import Curve

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHARES = ("share_position", "share_document", "share_window", "share_flicker")
_SPARSE = 0.1


def memory_figures(contents: Contents) -> dict[str, Figure]:
    """The nested shares and the energy by position; neither of a run that did not measure it."""
    figures = {}
    if (rows := share_rows(contents.values, contents.live)) is not None:
        figures["shares"] = stacked_shares(rows)
    energy = contents.summary.get("energy_by_position", [])
    if any(value is not None for value in energy):
        curve = Curve("energy", list(range(len(energy))), energy)
        figures["energy"] = energy_curves([curve])
    return figures


def share_rows(
    values: Mapping[str, np.ndarray], live: np.ndarray
) -> dict[str, Sequence[float]] | None:
    """The nested shares of groups of live features, in the order of `SHARES`; None without.

    Args:
        values: per feature [F]: the shares, density and c0.
        live: [F] bool.
    """
    if any(name not in values for name in SHARES):
        return None
    parts = np.stack([values[name] for name in SHARES])
    known = live & np.isfinite(parts).all(0)
    if not known.any():
        return None
    energy, sparse = values["c0"], values["density"] < _SPARSE
    groups = {
        "all, weighted by variance": (known, energy),
        "sparse (under 10 %), weighted": (known & sparse, energy),
        "dense, weighted": (known & ~sparse, energy),
        "all, each feature alike": (known, np.ones_like(energy)),
    }
    return {
        name: (parts[:, own] @ weights[own] / weights[own].sum()).tolist()
        for name, (own, weights) in groups.items()
        if own.any()
    }


def stacked_shares(rows: Mapping[str, Sequence[float]]) -> Figure:
    """A bar for every group, cut into the four shares of the variance."""
    figure = plots.blank("share of the variance", "", height=140 + 34 * len(rows))
    names = [plots.escaped(name) for name in rows]
    for index, share in enumerate(SHARES):
        figure.add_bar(
            x=[values[index] for values in rows.values()],
            y=names,
            orientation="h",
            name=label(share).name.removeprefix("Variance "),
            marker={"color": plots.OKABE_ITO[index], "line": {"width": 0}},
            hovertemplate=f"{label(share).name} %{{x:.3f}}<extra></extra>",
        )
    # A share may come out a little negative: it then stands to the left of 0.
    figure.update_layout(barmode="relative", showlegend=True)
    figure.update_yaxes(autorange="reversed", automargin=True, title={"text": ""})
    return figure


def energy_curves(curves: Sequence[Curve]) -> Figure:
    """Energy by position, relative to that from position 8 on."""
    return plots.lines(
        curves,
        "position",
        "energy / that from position 8 on",
        height=320,
        yaxis={"title": {"text": "energy / that from position 8 on"}, "rangemode": "tozero"},
    )
