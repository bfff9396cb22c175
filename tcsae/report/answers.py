"""What a comparison says in a sentence: what the temporal loss changed, and how much is order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tcsae.base.labels import difference_text, label, number
from tcsae.config import AVERAGED
from tcsae.report.controls import control_of, is_control
from tcsae.report.gain import gain_metrics, gain_words
from tcsae.report.seed_noise import seed_mark

SHOWN = 6
"""Settings with a sentence of their own; of more, those whose features last longest."""
_AFTER = ("omega_squared", "explained_variance")

Row = Mapping[str, Any]


def answers(groups: Sequence[Row], metrics: Sequence[str], window: int | None) -> list[str]:
    """A sentence for each setting that is compared with a baseline at its own L0, controls apart.

    Args:
        groups, metrics: as of `Comparison`.
        window: `Comparison.headline_window`.
    """
    lasting = f"C_{window}"
    of_windows = gain_metrics(metrics, window)
    names = [*of_windows, *(name for name in _AFTER if name in metrics)]
    compared = [group for group in groups if group["deltas"] and not is_control(group)]
    rank = {group["id"]: -(_delta(group, lasting) or 0.0) for group in compared}
    chosen = {group["id"] for group in sorted(compared, key=lambda g: rank[g["id"]])[:SHOWN]}
    return [
        _sentence(group, names, control_of(group, groups))
        for group in compared
        if group["id"] in chosen
    ]


def _delta(group: Row, name: str) -> float | None:
    entry = group["deltas"].get(name)
    return None if entry is None else entry["value"]


def _sentence(group: Row, names: Sequence[str], control: Row | None) -> str:
    changes = [said for name in names if (said := _change(group, name)) is not None]
    is_averaged = group["settings"].get("consistency") == AVERAGED
    other = "the same on single tokens" if is_averaged else "the same without the loss"
    text = f"{group['label']}, against {other}: {'; '.join(changes)}."
    if control is not None and control["deltas"] and names:
        text += _by_order(group, control, names)
    # Of the last of the measures of lasting, as above: the local part if there is one.
    where = [said for name in names if (said := gain_words(group, name))]
    return f"{text} {where[-1]}" if where else text


def _change(group: Row, name: str) -> str | None:
    """C_8 0.045 -> 0.086 (+0.041 [0.039, 0.043]); within noise where it is."""
    entry, value = group["deltas"].get(name), group["metrics"][name]["value"]
    if entry is None or entry["value"] is None or value is None:
        return None
    change = difference_text(entry["value"], entry["low"], entry["high"])
    noise = ", within noise" if entry["within_noise"] else ""
    if mark := seed_mark(entry):
        noise += f", {mark}"
    before = value - entry["value"]
    middle = group.get("medians", {}).get(name), group.get("baseline_medians", {}).get(name)
    median = f"; median {number(middle[1])} -> {number(middle[0])}" if None not in middle else ""
    return f"{label(name).name} {number(before)} -> {number(value)} ({change}{noise}{median})"


def _by_order(group: Row, control: Row, names: Sequence[str]) -> str:
    """Of the change in the last of the measures of lasting: local part if there is one."""
    name = next((n for n in names if n.startswith("L_")), names[0])
    own, other = _delta(group, name), _delta(control, name)
    if own is None or other is None:
        return ""
    return (
        f" Of the change in {label(name).name} ({own:+.3f}) the same loss on shuffled positions "
        f"makes {other:+.3f}; {own - other:+.3f} is due to the order of the tokens."
    )
