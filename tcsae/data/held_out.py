"""The held-out contexts: from as many documents as there are, and few of each.

Contexts of one document are alike, so what is measured is known as well as the number of documents
allows. Which ones are taken hangs on the text and `dataset.eval_key`, never on a seed: runs of all
seeds are measured on the same contexts, and more contexts hold all of fewer.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tcsae.data.chat import IDS, ChatTokens
from tcsae.data.documents import Document, text_hash
from tcsae.data.sides import Side

KEPT_CONTEXTS = 64
"""Contexts' worth of text kept of one document, from a drawn place: one book beside others is not
tokenised whole. Where all documents together are too little for that, more is kept."""


PASSAGE_TOKENS = 1024
"""How much of one document is kept as it stands, to be looked at: about so much, and two contexts
at least where it has them."""


@dataclass(frozen=True)
class _Unit:
    """What is one document for the statistics: a long one, or short ones that share a context."""

    pieces: list[np.ndarray]
    """[T - 1] token ids each, none in two, in the order in which they are taken."""
    groups: set[str]


def pieces_of(ids: np.ndarray, length: int, drawn: int) -> list[np.ndarray]:
    """Consecutive pieces of `length` tokens, in an order in which any first few lie far apart.

    Args:
        ids: [at least `length`].
        drawn: a number of 64 random bits: how many tokens are left out before the first piece
            instead of after the last, and which piece comes first.
    """
    n, rest = divmod(len(ids), length)
    first, offset = drawn % n, (drawn // n) % (rest + 1)
    # The golden section of a circle spreads any number of places; a stride without a common
    # divisor meets each once.
    stride = next(s for s in itertools.count(max(1, round(0.618 * n))) if math.gcd(s, n) == 1)
    places = ((first + k * stride) % n for k in range(n))
    return [ids[offset + p * length : offset + (p + 1) * length] for p in places]


class HeldOut(Side):
    """Documents in the order of hash(key, id), until there are as many as contexts are asked.

    A document that fills a context gives whole contexts of itself. Shorter ones are packed with
    one BOS between them; one that does not fit is cut at the context's end, and its rest is left
    out, so that no document is in two of them. The first context of every document comes before
    the second one of any.

    Args:
        asked: contexts.
        size, tokenizer, bos, chat: as of `Side`.
        key: `dataset.eval_key`.
    """

    name = "evaluation"

    def __init__(
        self,
        asked: int,
        size: int,
        tokenizer: Any,
        bos: int,
        key: int,
        chat: ChatTokens | None = None,
    ) -> None:
        self.asked, self.key = asked, key
        self.counted_tokens = size
        super().__init__(asked, size, tokenizer, bos, chat)

    def clear(self) -> None:
        super().clear()
        self._units: list[_Unit] = []
        self._shared: list[int] = []
        self._shared_groups: set[str] = set()
        self._n_pieces = 0
        self._names: set[str] = set()
        self._cut = False
        self._passage = np.empty(0, dtype=np.int32)

    def _drawn(self, what: str, document: Document) -> int:
        return text_hash(f"{what}:{self.key}:{document.id}")

    def rank(self, document: Document) -> int:
        return self._drawn("held out", document)

    def missing_tokens(self) -> float:
        return self.counted_tokens * (self.asked - len(self._units))

    def contexts_so_far(self) -> int:
        return min(self._n_pieces, self.asked)

    def enough(self, *, dropped: bool) -> bool:
        short = self._n_pieces < self.asked
        return super().enough(dropped=dropped) and not (short and self._cut)

    def shortened(self, document: Document) -> Document:
        most = KEPT_CONTEXTS * self.size * self.chars_per_token
        if document.n_chars <= most:
            return document
        self._cut = True
        start = self._drawn("kept", document) % (document.n_chars - most + 1)
        return document.part(start, most)

    def add(self, document: Document) -> bool:
        # A stream names a text by its content: a copy is no second document.
        if document.id in self._names:
            return False
        self._names.add(document.id)
        return super().add(document)

    def take(self, document: Document, ids: np.ndarray) -> None:
        if self.full:
            return
        if len(self._passage) < min(len(ids), self._passage_length):
            self._passage = ids[: self._passage_length] & IDS
        if len(ids) < self.size - 1:
            self._share(document, ids.tolist())
            return
        pieces = pieces_of(ids, self.size - 1, self._drawn("place", document))
        self._found(_Unit(pieces, {document.group}))

    @property
    def _passage_length(self) -> int:
        return (self.size - 1) * max(2, PASSAGE_TOKENS // self.size)

    def passage(self) -> np.ndarray:
        """int32 [n contexts, T]: one document as it stands, from the place on that was kept of it.

        The first that is long enough, else the longest; one shorter context of a document that is
        shorter. For pictures: its contexts overlap those of `packed`, and no metric is of them.
        """
        length = min(self.size - 1, len(self._passage))
        n = len(self._passage) // length if length else 0
        ids = np.full((n, length + 1), self.bos, dtype=np.int32)
        ids[:, 1:] = self._passage[: n * length].reshape(n, length)
        return ids

    def _found(self, unit: _Unit) -> None:
        self._units.append(unit)
        self._n_pieces += len(unit.pieces)

    def _share(self, document: Document, ids: list[int]) -> None:
        if self._shared:
            self._shared.append(self.bos)
            self._close_if_whole()  # a BOS with nothing behind it; the document opens the next
        room = self.size - 1 - len(self._shared)
        self._shared += ids[:room]
        self._shared_groups.add(document.group)
        self._close_if_whole()

    def _close_if_whole(self) -> None:
        if len(self._shared) == self.size - 1:
            self._found(_Unit([np.array(self._shared, dtype=np.int32)], self._shared_groups))
            self._shared, self._shared_groups = [], set()

    def packed(self) -> tuple[np.ndarray, np.ndarray, set[str]]:
        rounds = itertools.zip_longest(*(unit.pieces for unit in self._units))
        numbered = itertools.chain.from_iterable(map(enumerate, rounds))
        there = ((number, piece) for number, piece in numbered if piece is not None)
        chosen = list(itertools.islice(there, self.asked))
        ids = np.full((len(chosen), self.size), self.bos, dtype=np.int32)
        for row, (_, piece) in zip(ids, chosen, strict=True):
            row[1:] = piece
        documents = np.array([number for number, _ in chosen], dtype=np.int64)
        return ids, documents, set[str]().union(*(self._units[d].groups for d in set(documents)))
