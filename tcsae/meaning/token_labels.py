"""The labels of held-out tokens: documents are read again and found in contexts by their tokens.

So labels need nothing in the store, and any run, old or loaded, has them. Shapes: N contexts, T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tcsae.config import DatasetConfig
from tcsae.data.contexts import Contexts
from tcsae.data.labelled import Labelled, labelled_documents, why_none
from tcsae.data.sides import BATCH_CHARS

KEY = 12
"""Tokens in a row that find a document; a segment of fewer has no labels."""
TRIES = (0, 8, 16)
"""Where in a segment the key stands: the first tokens of a text that was cut are other ones."""
Place = tuple[int, int, int]
"""(context, first position, end) of a segment without its BOS."""


@dataclass
class Label:
    """One kind of label over the held-out tokens."""

    name: str
    kind: str
    """document, stretch or word: of all of a document, of long stretches, of the last token of a
    word."""
    classes: list[str] = field(default_factory=list)
    value: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """[N, T], index into `classes`; -1: none."""

    def number(self, value: str) -> int:
        if value not in self.classes:
            self.classes.append(value)
        return self.classes.index(value)


@dataclass
class TokenLabels:
    """What is known of the tokens of the held-out contexts, [N, T] each."""

    document: np.ndarray
    """Number of the document (of the segment where short ones share a context); -1: BOS."""
    group: np.ndarray
    """Number of what stays together in the split (the play); -1: not known."""
    hidden: np.ndarray
    """Tokens that say a label in so many words."""
    labels: list[Label]
    said: str | None = None
    """Why there are none."""


def token_labels(
    contexts: Contexts, cfg: DatasetConfig, tokenizer: Any, fields: Sequence[str]
) -> TokenLabels:
    """Labels of held-out `contexts` of the dataset; `fields`: evaluation.label_fields.

    Raises UserError for a field that rows do not have, or that holds no label.
    """
    ids = contexts.ids.numpy()
    segments = list(_segments(contexts))
    shape = ids.shape
    found = TokenLabels(
        document=np.full(shape, -1, dtype=np.int64),
        group=np.full(shape, -1, dtype=np.int64),
        hidden=np.zeros(shape, dtype=bool),
        labels=[],
    )
    _number_documents(contexts, segments, found.document)
    wanted = _Wanted(ids, segments)
    groups: dict[str, int] = {}
    by_name: dict[str, Label] = {}
    known = labelled_documents(cfg, fields, frozenset(contexts.groups))
    for batch in _batches(known):
        encoded = _encode(tokenizer, [labelled.document.text for labelled in batch])
        for labelled, (tokens, offsets) in zip(batch, encoded, strict=True):
            for context, position, first, n in wanted.places(tokens):
                at = slice(position, position + n)
                group = groups.setdefault(labelled.document.group, len(groups))
                found.group[context, at] = group
                spans = offsets[first : first + n]
                found.hidden[context, at] = _inside(spans, labelled.hidden)
                _label(labelled, spans, context, at, by_name, shape)
    found.labels = list(by_name.values())
    if not found.labels:
        found.said = why_none(cfg, fields)
    return found


def _segments(contexts: Contexts) -> Iterator[Place]:
    for number, row in enumerate(contexts.segments.numpy()):
        edges = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
        # A boundary token opens its segment.
        yield from ((number, int(a) + 1, int(b)) for a, b in zip(edges, edges[1:], strict=False))


def _number_documents(contexts: Contexts, segments: Sequence[Place], out: np.ndarray) -> None:
    own = contexts.documents.numpy()
    alone = np.bincount([context for context, _, _ in segments], minlength=len(own)) == 1
    numbers: dict[tuple[int, int], int] = {}
    for context, start, end in segments:
        key = (int(own[context]), -1) if alone[context] else (int(own[context]), start)
        out[context, start:end] = numbers.setdefault(key, len(numbers))


def _batches(documents: Iterator[Labelled]) -> Iterator[list[Labelled]]:
    batch: list[Labelled] = []
    chars = 0
    for labelled in documents:
        if labelled.document.ids is not None:
            continue  # had as tokens: there are no characters to label
        batch.append(labelled)
        chars += labelled.document.n_chars
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids [n], (start, end) of each [n, 2]) of each text, as `token_ids` has them."""
    made = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [
        (np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2))
        for ids, offsets in zip(made["input_ids"], made["offset_mapping"], strict=True)
    ]


class _Wanted:
    """Segments that are looked for, by keys of `KEY` tokens."""

    def __init__(self, ids: np.ndarray, segments: Sequence[Place]) -> None:
        self.ids, self.segments = ids, list(segments)
        self._left = set(range(len(self.segments)))
        self._by_key: dict[bytes, list[tuple[int, int]]] = {}
        for number, (context, start, end) in enumerate(self.segments):
            for offset in TRIES:
                if start + offset + KEY <= end:
                    key = ids[context, start + offset : start + offset + KEY].astype(np.int64)
                    self._by_key.setdefault(key.tobytes(), []).append((number, offset))
        first = np.array([np.frombuffer(key, dtype=np.int64)[0] for key in self._by_key])
        self._starts = np.unique(first)

    def places(self, tokens: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """(context, position, first token of the document, tokens) of what is found of these."""
        likely = np.flatnonzero(np.isin(tokens[: len(tokens) - KEY + 1], self._starts))
        for at in likely.tolist():
            for number, offset in self._by_key.get(tokens[at : at + KEY].tobytes(), ()):
                if number not in self._left:
                    continue
                context, start, end = self.segments[number]
                there = self.ids[context, start + offset : end]
                n = min(len(there), len(tokens) - at)
                same = there[:n] == tokens[at : at + n]
                if not same.all() or n < len(there):
                    continue  # another text that begins alike
                self._left.discard(number)
                yield context, start + offset, at, n


def _inside(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens share a character with one of the spans."""
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        low = np.searchsorted(offsets[:, 1], start, side="right")
        high = np.searchsorted(offsets[:, 0], end, side="left")
        inside[low:high] = True
    return inside


def _label(
    labelled: Labelled,
    offsets: np.ndarray,
    context: int,
    at: slice,
    by_name: dict[str, Label],
    shape: tuple[int, ...],
) -> None:
    def rows(name: str, kind: str) -> tuple[Label, np.ndarray]:
        if name not in by_name:
            by_name[name] = Label(name, kind, value=np.full(shape, -1, dtype=np.int64))
        return by_name[name], by_name[name].value[context, at]

    for name, value in labelled.labels.items():
        label, row = rows(name, "document")
        row[:] = label.number(value)
    last = offsets[:, 1] - 1
    for kind, known in (("stretch", labelled.stretches), ("word", labelled.words)):
        for name, spans in known.items():
            label, row = rows(name, kind)
            for start, end, value in spans:
                low = np.searchsorted(last, start if kind == "stretch" else end - 1, side="left")
                high = np.searchsorted(last, end, side="left")
                if kind == "word":
                    high = min(high, low + 1)
                row[low:high] = label.number(value)
