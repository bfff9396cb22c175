"""What probes are asked, and on which tokens they learn and are tried: of the text alone, the same
for every SAE on it.

An item is a stretch of tokens with one label; a reading averages it: one token, `WINDOW` of them,
all. Splits hold out whole documents, but for the context probe, whose classes are documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from tcsae.meaning.token_labels import Label, TokenLabels

SPLITS = 3
WINDOW = 8
"""Tokens of the middle reading, whatever the window of the loss: runs stay comparable."""
GAP = 16
"""Tokens left out between the two halves of a document."""
CONTEXT_CLASSES = 32
CLASSES = 32
"""The classes with the most documents."""
MIN_TOKENS = 48
"""Of a document, to be a class of the context probe."""
MIN_ITEM = 8
"""Tokens of a stretch, to be read."""
SAMPLES = 1200
"""Of each side of a split, evenly spaced over the documents."""


@dataclass(frozen=True)
class Item:
    """Tokens that have one label."""

    tokens: np.ndarray
    """Places among all held-out tokens, in order. Of a word: those of its document up to it."""
    label: int
    document: int


@dataclass(frozen=True)
class Split:
    train: list[Item]
    test: list[Item]


@dataclass(frozen=True)
class Task:
    """One thing to be read from the features."""

    name: str
    kind: str
    """context; or document, stretch or word, as of `Label`."""
    classes: list[str]
    splits: list[Split]

    @property
    def readings(self) -> dict[str, int | None]:
        """{reading: tokens averaged; None: all of the item}."""
        few: dict[str, int | None] = {"token": 1, "window": WINDOW}
        return few if self.kind == "word" else {**few, "document": None}


@dataclass(frozen=True)
class Sampled:
    """A side of a split, read."""

    average: csr_matrix
    """[samples, all tokens]; times codes it is what the probe sees."""
    label: np.ndarray
    document: np.ndarray


def sampled(task: Task, items: Sequence[Item], size: int | None) -> Sampled:
    """Averages over `size` tokens of the items, at most `SAMPLES`; None: of all of each item.

    An item that is shorter is averaged whole.
    """
    pieces = [
        (piece, item) for item in items for piece in _pieces(item.tokens, size, task.kind == "word")
    ]
    if len(pieces) > SAMPLES:
        places = np.linspace(0, len(pieces) - 1, SAMPLES).round().astype(int)
        pieces = [pieces[place] for place in places]
    lengths = np.array([len(piece) for piece, _ in pieces])
    indptr = np.r_[0, lengths.cumsum()]
    columns = np.concatenate([piece for piece, _ in pieces])
    values = np.repeat(1.0 / lengths, lengths).astype(np.float32)
    n_tokens = 1 + int(columns.max())
    return Sampled(
        csr_matrix((values, columns, indptr), shape=(len(pieces), n_tokens)),
        np.array([item.label for _, item in pieces]),
        np.array([item.document for _, item in pieces]),
    )


def _pieces(tokens: np.ndarray, size: int | None, is_word: bool) -> Iterator[np.ndarray]:
    if is_word:
        yield tokens[-(size or len(tokens)) :]
    elif size is None or len(tokens) < size:
        yield tokens
    else:
        n = len(tokens) // size
        yield from tokens[: n * size].reshape(n, size)


def make_tasks(labels: TokenLabels, counted: np.ndarray) -> tuple[list[Task], list[str]]:
    """All that the text has, and a sentence for each thing that it has not.

    counted: [contexts, T] bool, tokens that are read.
    """
    counted = (counted & ~labels.hidden).ravel()
    document = np.where(counted, labels.document.ravel(), -1)
    tasks, said = [], []
    by_document = _by_number(document)
    made: list[Task | str] = [_context(by_document)]
    made += [_of_label(label, labels, document) for label in labels.labels]
    for found in made:
        if isinstance(found, Task):
            tasks.append(found)
        else:
            said.append(found)
    if labels.said:
        said.append(f"no probe of labels: {labels.said}")
    return tasks, said


def _by_number(number: np.ndarray) -> dict[int, np.ndarray]:
    """{number: its places in order}, without -1."""
    order = np.argsort(number, kind="stable")
    found, starts = np.unique(number[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(k): part for k, part in zip(found, parts, strict=True) if k >= 0}


def _context(by_document: dict[int, np.ndarray]) -> Task | str:
    """Which document a token is from: learned in its first half, tried in its second."""
    known = [(d, tokens) for d, tokens in by_document.items() if len(tokens) >= MIN_TOKENS]
    n = min(CONTEXT_CLASSES, len(known) // SPLITS)
    if n < 2:
        return (
            f"no probe of the context: {len(known)} held-out documents have {MIN_TOKENS} tokens, "
            f"and it takes {2 * SPLITS}: give more documents, or raise dataset.n_eval_contexts"
        )
    drawn = np.random.default_rng(0).permutation(len(known))
    splits = []
    for number in range(SPLITS):
        train, test = [], []
        for label, place in enumerate(drawn[number * n : (number + 1) * n]):
            d, tokens = known[place]
            middle = len(tokens) // 2
            train.append(Item(tokens[: middle - GAP // 2], label, d))
            test.append(Item(tokens[middle + GAP // 2 :], label, d))
        splits.append(Split(train, test))
    return Task("context", "context", [f"{i}" for i in range(n)], splits)


def _of_label(label: Label, labels: TokenLabels, document: np.ndarray) -> Task | str:
    value = np.where(document >= 0, label.value.ravel(), -1)
    items = list(_items(label, value, document))
    if not items:
        return f"no probe of {label.name}: no held-out token has it"
    group = labels.group.ravel()
    unit = _units(label, items, group)
    if (kept := _kept_classes(items, unit, label)) is None:
        found = sorted({item.label for item in items})
        if len(found) == 1:
            return (
                f"no probe of {label.name}: it has 1 class in the held-out text "
                f"({label.classes[found[0]]}), which is nothing to tell apart: name another label, "
                "or hold out documents of other classes too"
            )
        return (
            f"no probe of {label.name}: it has {len(found)} classes in the held-out text, and "
            f"takes 2 that are each in {SPLITS} documents or more (plays, where it is of plays): "
            "give more documents, or raise dataset.eval_fraction and dataset.n_eval_contexts"
        )
    number = {old: new for new, old in enumerate(kept)}
    chosen = [
        (Item(item.tokens, number[item.label], item.document), u)
        for item, u in zip(items, unit, strict=True)
        if item.label in number
    ]
    splits = list(_splits(chosen, by_class=label.kind == "document"))
    return Task(label.name, label.kind, [label.classes[old] for old in kept], splits)


def _items(label: Label, value: np.ndarray, document: np.ndarray) -> Iterator[Item]:
    if label.kind == "word":
        places = np.flatnonzero(value >= 0)
        most = SAMPLES * SPLITS
        if len(places) > most:
            places = places[np.linspace(0, len(places) - 1, most).round().astype(int)]
        of_document = _by_number(document)
        for place in places.tolist():
            d = int(document[place])
            before = of_document[d]
            end = int(np.searchsorted(before, place)) + 1
            yield Item(before[max(0, end - WINDOW) : end], int(value[place]), d)
        return
    both = np.where(value >= 0, document * (1 + int(value.max(initial=0))) + value, -1)
    for tokens in _by_number(both).values():
        if len(tokens) >= MIN_ITEM:
            yield Item(tokens, int(value[tokens[0]]), int(document[tokens[0]]))


def _units(label: Label, items: Sequence[Item], group: np.ndarray) -> list[int]:
    """What is held out as a whole with each item: its document; its group (the play) where the
    label is of groups and does not name them, or a group would be known again by its other half.
    """
    if label.kind == "document":
        pairs = {(int(group[item.tokens[0]]), item.label) for item in items}
        groups, classes = ({pair[i] for pair in pairs} for i in (0, 1))
        if len(pairs) == len(groups) > len(classes):
            return [int(group[item.tokens[0]]) for item in items]
    return [item.document for item in items]


def _kept_classes(items: Sequence[Item], unit: Sequence[int], label: Label) -> list[int] | None:
    """Classes in enough units, those in most first; None: fewer than two."""
    seen: dict[int, set[int]] = {}
    for item, u in zip(items, unit, strict=True):
        seen.setdefault(item.label, set()).add(u)
    enough = [c for c, units in seen.items() if len(units) >= SPLITS]
    enough.sort(key=lambda c: (-len(seen[c]), label.classes[c]))
    return enough[:CLASSES] if len(enough) > 1 else None


def _splits(items: Sequence[tuple[Item, int]], *, by_class: bool) -> Iterator[Split]:
    """Every unit is tried in one split and learned from in the others.

    by_class: the units of each class are dealt evenly; otherwise a unit has many classes.
    """
    kind = {u: item.label if by_class else 0 for item, u in items}
    place, dealt = {}, 0
    generator = np.random.default_rng(0)
    for label in sorted(set(kind.values())):
        units = sorted(u for u, own in kind.items() if own == label)
        for u in generator.permutation(units).tolist():
            place[u] = dealt % SPLITS
            dealt += 1
    for number in range(SPLITS):
        train = [item for item, u in items if place[u] != number]
        test = [item for item, u in items if place[u] == number]
        known = {item.label for item in train}
        test = [item for item in test if item.label in known]
        if train and test:
            yield Split(train, test)
