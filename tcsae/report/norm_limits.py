"""Explained variance by norm limit, as a run's page and notes show it.

Runs measured before it was are shown without it.
"""

from __future__ import annotations

from typing import Any

from tcsae.base.labels import number
from tcsae.metrics.norm_limits import limit_words
from tcsae.report.contents import Contents

HEAD = ("tokens up to", "explained variance", "tokens left out", "their share of the variance")
CAPTION = (
    "Explained variance if only tokens up to a norm count, in multiples of the median norm; "
    "position 0 and special tokens never do. Massive tokens, far beyond the rest, hold nearly all "
    "the variance: the row without a limit says little but how those few are reconstructed."
)


def table(contents: Contents) -> list[list[str]]:
    """A row for every limit, cells as of HEAD; empty for a run that has none."""
    own = contents.run.config.dataset.norm_filter or None
    rows = _extras(contents).get("explained_variance_by_norm_limit", [])
    return [_cells(row, own) for row in rows]


def _cells(row: dict[str, Any], own: float | None) -> list[str]:
    value = row["explained_variance"]
    return [
        limit_words(row["limit"]) + (" (this run's)" if row["limit"] == own else ""),
        number(value) if value is not None else f"n/a: {row['reason']}",
        f"{row['n_tokens_left_out']:,} ({_percent(row['token_share_left_out'])})",
        _percent(row["variance_share_left_out"]),
    ]


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.2f} %"


def caution(contents: Contents) -> str:
    """What is to be kept in mind about the limit; empty if nothing is."""
    said = _extras(contents).get("norm_limit_caution")
    return said["text"] if said else ""


def _extras(contents: Contents) -> dict[str, Any]:
    return contents.run.core["eval_result_unstructured"]
