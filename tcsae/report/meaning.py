"""What the instruments of tcsae/meaning found of a run, as its page and its notes show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tcsae.base.labels import interval_text, label, number

HEAD = ("instrument", "number", "value", "interval", "meaning")


def words(meaning: Mapping[str, Any]) -> list[str]:
    """The instruments' own sentences."""
    return [sentence for part in meaning.values() for sentence in part["said"]]


def table(meaning: Mapping[str, Any]) -> list[Sequence[str]]:
    """Rows of HEAD: the headline of each instrument."""
    return [
        (
            instrument,
            label(name).name,
            number(entry["value"]),
            interval_text(entry["interval"]),
            label(name).meaning,
        )
        for instrument, part in meaning.items()
        for name, entry in part["headline"].items()
    ]
