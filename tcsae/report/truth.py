"""What a run on a synthetic world says of the true features, as its page and its notes show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tcsae.base.labels import label, number
from tcsae.metrics.truth import FOUND_COSINE, MEANS, OF_RUNS

TILES = ("truth_mcc", "truth_found", "truth_found_slow", "truth_recall_with_child")
_COLUMNS = (*MEANS, *OF_RUNS)


def _short(name: str) -> str:
    return label(f"truth_{name}").name.removeprefix("Truth: ")


HEAD = ("true features", "number", *map(_short, _COLUMNS))
CAPTION = (
    "Every true feature is matched with one of the SAE's by decoder cosine (Hungarian); means over "
    "true features. "
    + "; ".join(f"{_short(n)}: {label(f'truth_{n}').meaning}" for n in _COLUMNS)
    + "."
)
_BEST = {name: 1.0 for name in (*MEANS, "pieces")}


def table(truth: Mapping[str, Any]) -> list[Sequence[str]]:
    """Rows of HEAD: all, the slow ones, every class, and the best that can be."""
    parts = {"all": truth["all"]}
    if "slow" in truth:
        parts["slow"] = truth["slow"]
    parts |= truth["by_class"]
    rows: list[Sequence[str]] = [
        (name, f"{part['n']:,}", *(number(part[column]) for column in _COLUMNS))
        for name, part in parts.items()
    ]
    best = (number(_BEST.get(column, 0.0)) for column in _COLUMNS)
    return [*rows, ("the oracle", f"{truth['n_true']:,}", *best)]


def words(truth: Mapping[str, Any]) -> list[str]:
    """What there is beside the table, in sentences."""
    found, oracle = truth["all"], truth["oracle"]
    said = [
        f"{found['n_found']:,} of {found['n']:,} true features are found (a match with a decoder "
        f"cosine above {FOUND_COSINE:g}). The mean cosine of all matches (MCC) is "
        f"{number(truth['mcc'])}; as many random directions have {number(truth['mcc_random'])}."
    ]
    if (matched := truth["n_features_matched"]) < truth["n_true"]:
        said.append(
            f"The SAE has features for {matched:,} of them only: the others count as not found, "
            "with cosine and F1 0."
        )
    if absorbed := truth.get("absorption"):
        said.append(
            f"Absorption: a parent's match is on at {_percent(absorbed['recall_without_child'])} "
            "of the parent's tokens without a child, and at "
            f"{_percent(absorbed['recall_with_child'])} of those with one."
        )
    said.append(
        f"An oracle that knows the dictionary explains {number(oracle['explained_variance'])} of "
        f"the variance with {number(oracle['l0'])} features a token; the rest is noise."
    )
    return said


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.0f} %"
