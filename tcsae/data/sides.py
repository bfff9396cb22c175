"""What both sides of the split share: which documents are kept, and how they are tokenised."""

from __future__ import annotations

import abc
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tcsae.base.errors import UserError
from tcsae.data.chat import ChatTokens
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
        return int(min(document.n_chars, self.counted))

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
        chat: makes tokens of conversations; None: as by default.
    """

    name: str
    counted_tokens: float = math.inf
    """Tokens of one document that bring the side nearer to being full."""

    def __init__(
        self,
        n_contexts: int | None,
        size: int,
        tokenizer: Any,
        bos: int,
        chat: ChatTokens | None = None,
    ) -> None:
        self.n_contexts = n_contexts
        self.size = size
        self.bos = bos
        self.chars_per_token = 8
        """A guess, raised where the text kept by it was too little."""
        self._tokenizer = tokenizer
        self._chat = chat or ChatTokens(tokenizer, bos)
        self.clear()

    def clear(self) -> None:
        self.n_tokens = 0
        """Of the documents taken and the BOS after each."""
        self.tokens_given = False
        """Whether documents came as tokens."""
        self.chats = 0
        """Documents that came as conversations."""
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
        """Take a document's tokens, int32 [one or more], of conversations marked ones (chat.py)."""

    @abc.abstractmethod
    def contexts_so_far(self) -> int:
        """Contexts gathered, those asked for at most."""

    @abc.abstractmethod
    def packed(self) -> tuple[np.ndarray, np.ndarray, set[str]]:
        """Contexts int32 [N, T] of tokens as `take` had them, the document of each int64 [N], and
        the groups they are from."""

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
        self._pending_chars += document.n_chars
        self._pending_counted += min(document.n_chars, 4 * self.counted_tokens)
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
        for document, ids in zip(self._pending, self._tokens(self._pending), strict=True):
            if len(ids):
                self.n_tokens += len(ids) + 1
                self.take(document, ids)
        self._pending, self._pending_chars, self._pending_counted = [], 0.0, 0.0

    def _tokens(self, documents: list[Document]) -> Iterator[np.ndarray]:
        """The tokens of each document, int32 [none or more]."""
        texts = [d.text for d in documents if d.ids is None and not d.turns]
        tokenised = iter(token_ids(self._tokenizer, texts) if texts else ())
        talks = self._chat([(d.id, d.turns) for d in documents if d.turns])
        for document in documents:
            if document.turns:
                self.chats += 1
                yield next(talks)
            elif document.ids is None:
                yield np.array(next(tokenised), dtype=np.int32)
            else:
                self.tokens_given = True
                yield self._without_frame(document, document.ids)

    def _without_frame(self, document: Document, ids: np.ndarray) -> np.ndarray:
        """Given tokens less the BOS that leads them and the padding at either end."""
        known = len(self._tokenizer)
        if len(ids) and ids.max() >= known:
            raise UserError(
                f"{document.id}: token {ids.max()} is beyond the {known} of the model's tokenizer: "
                "these tokens are another tokenizer's; give text, or set model to the one they "
                "were made for"
            )
        frame = {self.bos, self._tokenizer.pad_token_id}
        inner = np.flatnonzero(~np.isin(ids, [id_ for id_ in frame if id_ is not None]))
        return ids[inner[0] : inner[-1] + 1] if len(inner) else ids[:0]
