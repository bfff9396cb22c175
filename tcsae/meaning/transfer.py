"""Probes learned at the positions of a context's first half and tried at those of its second.

What does not hang on positions loses nothing by that. Beside it, probes learned at the second
half's own positions and tried on the same tokens; and both of the activations themselves, whose
loss an SAE can hardly mend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from tcsae.meaning.held_text import Number
from tcsae.meaning.read_split import (
    HEADLINE_K,
    Prepared,
    Scores,
    all_of,
    few,
    read,
    replicates_of,
    score,
)
from tcsae.meaning.tasks import Item, Split, Task


def across_positions(
    task: Task, codes: csr_matrix, size: int, raw: Mapping[str, Number] | None
) -> dict[str, Any]:
    """{"positions": {first, second, lost, raw_...}}: accuracy at the second half's positions of
    probes of one token, learned at those of either half, and what is lost between the two. {} where
    a half of a split has nothing to learn from or to be tried on.

    Args:
        codes: [tokens, F], contexts of `size` tokens one behind the other.
        raw: what `raw_across_positions` found.
    """
    found = _halves(task, codes, size, lambda data: few(data, HEADLINE_K))
    return {"positions": {**found, **(raw or {})}} if found else {}


def raw_across_positions(task: Task, raw: np.ndarray, size: int) -> dict[str, Number]:
    """The same of the activations [tokens, D], all of them: raw_first, raw_second, raw_lost."""
    found = _halves(task, raw, size, all_of)
    return {f"raw_{name}": number for name, number in found.items()}


def _halves(
    task: Task,
    source: csr_matrix | np.ndarray,
    size: int,
    probe: Callable[[Prepared], np.ndarray],
) -> dict[str, Number]:
    late = [_of_half(split, size, second=True) for split in task.splits]
    replicates = replicates_of(replace(task, splits=late))
    accuracy = {}
    for name in ("first", "second"):
        scores = Scores()
        for split, own in zip(task.splits, late, strict=True):
            learned = own.train if name == "second" else _of_half(split, size).train
            known = {item.label for item in learned}
            if len(known) < 2 or not own.test:
                return {}
            data = read(task, Split(learned, own.test), source, 1)
            score(scores, probe(data), data, replicates)
        right, total = np.sum(scores.sums, axis=0)
        accuracy[name] = right / total
    lost = accuracy["second"] - accuracy["first"]
    return {name: replicates.number(v) for name, v in {**accuracy, "lost": lost}.items()}


def _of_half(split: Split, size: int, *, second: bool = False) -> Split:
    """The tokens of a split at the positions of one half of a context."""

    def of(items: list[Item]) -> list[Item]:
        kept = []
        for item in items:
            tokens = item.tokens[(item.tokens % size >= size // 2) == second]
            if len(tokens):
                kept.append(replace(item, tokens=tokens))
        return kept

    return Split(of(split.train), of(split.test))


def transfer_words(positions: Mapping[str, Number]) -> str:
    """A sentence's part."""

    def percent(name: str) -> str:
        value = positions[name].value
        return "n/a" if value is None else f"{100 * value:.0f} %"

    text = (
        f"learned at the first half of positions and tried at the second {percent('first')}, "
        f"learned there {percent('second')}"
    )
    if "raw_first" in positions:
        text += f" (activations {percent('raw_first')}, {percent('raw_second')})"
    return text
