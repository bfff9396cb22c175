"""The points of an adaptive sweep, beside it:

trials.csv     a row per point: axes, values, whether it keeps to the constraints, its job
trials.md      the same to read, the best first
trials.html    the same as a page, with a figure of every axis
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcsae.base.files import write_text
from tcsae.base.labels import markdown_table, number
from tcsae.base.run_files import RunFiles

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STEM = "trials"


@dataclass(frozen=True)
class Column:
    """A number of final_info.json: the first is the objective."""

    key: str
    name: str
    conditions: str
    """What it has to keep to, in words; may be empty."""

    @property
    def head(self) -> str:
        return f"{self.name} {self.conditions}".rstrip()


@dataclass(frozen=True)
class Row:
    """One point."""

    number: int
    axes: tuple[str, ...]
    values: tuple[float | None, ...]
    remark: str
    is_feasible: bool
    is_best: bool
    folder: str | None
    """Of its job, below the sweep's."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Trials:
    direction: str
    axes: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def ranked(self) -> list[Row]:
        """The best first; then those that miss a constraint, then those without a value."""
        sign = -1 if self.direction == "maximize" else 1

        def place(row: Row) -> tuple[bool, bool, float]:
            value = row.values[0]
            return value is None, not row.is_feasible, 0.0 if value is None else sign * value

        return sorted(self.rows, key=place)

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        keys = [column.key for column in self.columns]
        writer.writerow(["trial", *self.axes, *keys, "feasible", "best", "remark", "folder"])
        for row in self.rows:
            values = ["" if value is None else repr(value) for value in row.values]
            flags = [str(flag).lower() for flag in (row.is_feasible, row.is_best)]
            end = [row.remark, row.folder or ""]
            writer.writerow([row.number, *row.axes, *values, *flags, *end])
        return text.getvalue()

    def markdown(self) -> str:
        head = ["trial", *self.axes, *(column.head for column in self.columns), ""]
        rows = [
            [str(row.number), *row.axes, *map(number, row.values), _said(row)]
            for row in self.ranked
        ]
        return f"{self.title}\n\n{markdown_table(head, rows)}\n"

    @property
    def title(self) -> str:
        return f"{self.columns[0].name}, {self.direction}d over {len(self.rows)} points"

    @property
    def best(self) -> Row | None:
        return next((row for row in self.rows if row.is_best), None)


def write_trials(trials: Trials, folder: Path) -> Path:
    """The page, with the two tables written beside it."""
    from tcsae.report.page import write_page

    write_text(folder / f"{STEM}.csv", trials.csv())
    write_text(folder / f"{STEM}.md", trials.markdown())
    figures = _figures(trials)
    best = trials.best
    context = {
        "trials": trials,
        "rows": [(row, _link(folder, row), _said(row)) for row in trials.ranked],
        "charts": [(name, _caption(name)) for name in figures],
        "command": shlex.join(["python", "-m", "tcsae.train", *best.overrides]) if best else None,
    }
    page = folder / f"{STEM}.html"
    return write_page(page, "trials.html.j2", trials.title, context, figures, {})


def _said(row: Row) -> str:
    return "best" if row.is_best else row.remark


def _link(folder: Path, row: Row) -> str | None:
    from tcsae.report.index_page import link

    return None if row.folder is None else link(RunFiles(folder / row.folder).report, folder)


def _caption(name: str) -> str:
    return "In the order in which points were chosen; the line is the best so far." * (
        name == ORDER
    )


ORDER = "order"


def _figures(trials: Trials) -> dict[str, Figure]:
    """The objective over the order of the points and over each axis; filled: constraints kept."""
    valued = [row for row in trials.rows if row.values[0] is not None]
    if not valued:
        return {}
    places: dict[str, list[Any]] = {ORDER: list(range(1, len(valued) + 1))}
    places |= {
        axis: [_number(row.axes[index]) for row in valued] for index, axis in enumerate(trials.axes)
    }
    figures = {name: _scatter(name, x, valued, trials) for name, x in places.items()}
    figures[ORDER].add_scatter(
        x=places[ORDER], y=_best_so_far(valued, trials.direction), mode="lines", line_shape="hv"
    )
    return figures


def _scatter(name: str, x: list[Any], rows: Sequence[Row], trials: Trials) -> Figure:
    from tcsae.report.plots import OKABE_ITO, blank, escaped

    title = "point" if name == ORDER else escaped(name)
    figure = blank(title, escaped(trials.columns[0].name))
    symbols = ["circle" if row.is_feasible else "circle-open" for row in rows]
    words = [
        escaped(" ".join(f"{a}={v}" for a, v in zip(trials.axes, row.axes, strict=True)))
        for row in rows
    ]
    figure.add_scatter(
        x=x,
        y=[row.values[0] for row in rows],
        mode="markers",
        marker={"symbol": symbols, "size": 9, "color": OKABE_ITO[0]},
        text=words,
    )
    return figure


def _best_so_far(rows: Sequence[Row], direction: str) -> list[float | None]:
    pick = max if direction == "maximize" else min
    found: list[float | None] = []
    best: float | None = None
    for row in rows:
        value = row.values[0]
        if row.is_feasible and value is not None:
            best = value if best is None else pick(best, value)
        found.append(best)
    return found


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
