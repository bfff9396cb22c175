"""What both sides of the split share: which documents are kept, and how they are tokenised."""

from __future__ import annotations

import abc
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tcsae.data.documents import Document

BATCH_CHARS = 1_000_000
"""Text given to the tokenizer at once: enough to use every core, little enough to hold."""


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, no special ones added: the one way from text to what is trained on."""
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        # Text that spells <|endoftext|> must not become a boundary between documents.
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return ids


@dataclass
class Sample:
    """The documents that come first in the drawn order, and no more text than `budget` asks.

    So a sample of a corpus that does not fit in memory takes one pass and the sample's memory.
    """

    budget: float
    """Characters."""
    counted: float = math.inf
    """Characters of one document that count."""
    chars: int = 0
    dropped: bool = False
    _heap: list[tuple[int, str, Document]] = field(default_factory=list)

    def _size(self, document: Document) -> int:
        return int(min(len(document.text), self.counted))

    def add(self, rank: int, document: Document) -> None:
        heapq.heappush(self._heap, (-rank, document.id, document))
        self.chars += self._size(document)
        while self.chars - self._size(self._heap[0][2]) >= self.budget:
            self.chars -= self._size(heapq.heappop(self._heap)[2])
            self.dropped = True

    def in_order(self) -> Iterator[Document]:
        return (document for _, _, document in sorted(self._heap, key=lambda kept: -kept[0]))


class Side(abc.ABC):
    """The documents of one side of the split, tokenised in batches until it holds enough.

    Args:
        n_contexts: contexts asked for; None: all there are.
        size: tokens a context, BOS included.
        tokenizer: Hugging Face fast tokenizer.
        bos: the id that leads a context and stands between two documents.
    """

    name: str
    counted_tokens: float = math.inf
    """Tokens of one document that bring the side nearer to being full."""

    def __init__(self, n_contexts: int | None, size: int, tokenizer: Any, bos: int) -> None:
        self.n_contexts = n_contexts
        self.size = size
        self.bos = bos
        self.chars_per_token = 8
        """A guess, raised where the text kept by it was too little."""
        self._tokenizer = tokenizer
        self.clear()

    def clear(self) -> None:
        self.n_tokens = 0
        """Of the documents taken and the BOS after each."""
        self._pending: list[Document] = []
        self._pending_chars = self._pending_counted = 0.0

    # ------------------------------------------------------------ what the two do differently

    @abc.abstractmethod
    def rank(self, document: Document) -> int:
        """Its place in the drawn order: lower ones come first."""

    @abc.abstractmethod
    def missing_tokens(self) -> float:
        """Tokens that are probably enough; 0 or less: the side is full."""

    @abc.abstractmethod
    def take(self, document: Document, ids: np.ndarray) -> None:
        """Take a document's tokens, int32 [one or more]."""

    @abc.abstractmethod
    def contexts_so_far(self) -> int:
        """Contexts gathered, those asked for at most."""

    @abc.abstractmethod
    def packed(self) -> tuple[np.ndarray, np.ndarray, set[str]]:
        """Contexts int32 [N, T], the document of each int64 [N], and the groups they are from."""

    def shortened(self, document: Document) -> Document:
        """The document without text that would surely not be used."""
        return document

    def enough(self, *, dropped: bool) -> bool:
        """Whether reading with a higher `chars_per_token` would change nothing.

        `dropped`: whether documents were left out for their place in the order.
        """
        return self.full or not dropped

    # ------------------------------------------------------------------------------ the same

    @property
    def full(self) -> bool:
        return self.missing_tokens() <= 0

    def sample(self) -> Sample:
        """An empty sample, of the size that is needed by the present guess; starts anew."""
        self.clear()
        chars = self.chars_per_token
        return Sample(self.missing_tokens() * chars, self.counted_tokens * chars)

    def fill(self, sample: Sample, report: Callable[[], None]) -> bool:
        """Take the documents of a sample in order; False: it has to be drawn again, larger."""
        for document in sample.in_order():
            if self.full:
                break
            if self.add(document):
                report()
        self.flush()
        report()
        return self.enough(dropped=sample.dropped) or self.widen()

    def widen(self) -> bool:
        """Raise the guess; False, as what was read is not enough."""
        self.chars_per_token *= 8
        return False

    def add(self, document: Document) -> bool:
        """Take a document; whether that led to tokens, and so to progress."""
        self._pending.append(document)
        self._pending_chars += len(document.text)
        self._pending_counted += min(len(document.text), 4 * self.counted_tokens)
        # Near the end a batch is no larger than what is probably still missing.
        few = self._pending_counted < 4 * self.missing_tokens()
        if few and self._pending_chars < BATCH_CHARS:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Tokenise what is pending."""
        if not self._pending:
            return
        all_ids = token_ids(self._tokenizer, [document.text for document in self._pending])
        for document, ids in zip(self._pending, all_ids, strict=True):
            if ids:
                self.n_tokens += len(ids) + 1
                self.take(document, np.array(ids, dtype=np.int32))
        self._pending, self._pending_chars, self._pending_counted = [], 0.0, 0.0
