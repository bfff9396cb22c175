"""Features as rows of cells along a text: paths of an SVG, so that a page opens without a script.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tcsae.base.labels import number
from tcsae.measure.strips import Strip

LEVELS = 5
"""Shades of a cell."""


@dataclass(frozen=True)
class Shade:
    """Cells of one shade."""

    level: float
    """0 to 1."""
    path: str
    """For <path d=...>, a cell a unit square."""


@dataclass(frozen=True)
class Row:
    """One feature along the whole text."""

    feature: int
    label: str
    title: str
    n_cells: int
    shades: list[Shade]
    masked: str
    """Path of the tokens that count nowhere."""


def row_of(strip: Strip, label: str = "") -> Row:
    """The row of a strip, its shades relative to the strip's own largest value."""
    scale = strip.largest or 1.0
    level_T = torch.where(strip.valid, strip.values / scale, 0.0).clamp(0, 1)
    shade_T = (level_T * LEVELS).ceil().long()
    shades = [
        Shade(shade / LEVELS, _path(shade_T == shade))
        for shade in range(1, LEVELS + 1)
        if bool((shade_T == shade).any())
    ]
    title = (
        f"feature {strip.feature}: on at {strip.n_on} tokens, at most {strip.longest} in a row, "
        f"peak {number(strip.largest)}"
    )
    masked = _path(~strip.valid)
    return Row(strip.feature, label, title, len(strip), shades, masked)


def _path(chosen: Tensor) -> str:
    """Unit squares at the chosen of T places, neighbours as one."""
    return "".join(f"M{a} 0h{b - a}v1h{a - b}z" for a, b in spans(chosen.tolist()))


def spans(chosen: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, stop) of every stretch of True."""
    found, start = [], None
    for i, yes in enumerate([*chosen, False]):
        if yes and start is None:
            start = i
        elif not yes and start is not None:
            found.append((start, i))
            start = None
    return found
