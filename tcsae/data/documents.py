"""What a corpus is: documents with a name and a group, and an identity of their content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from tcsae.data.chat import Turns, part_of, plain_text

CHARS_A_TOKEN = 4
"""Of English text, about; sizes are counted in characters."""
LOCAL_ADVICE = "or use local text: dataset=files dataset.path=FOLDER_OR_FILE"


Content = str | np.ndarray | Turns
"""What a row holds: its text, its tokens int32 [tokens], or the turns of a conversation."""


@dataclass(frozen=True)
class Document:
    """A text that is tokenised whole and never shares a segment with another one."""

    id: str
    """Unique in its corpus."""
    text: str
    group: str
    """What stays together on one side of the train/evaluation split: a play, copies of a text."""
    ids: np.ndarray | None = field(default=None, compare=False)
    """int32 [tokens]; given where the text was had as tokens, and `text` is then empty."""
    turns: Turns = field(default=(), compare=False)
    """Of a conversation, whose `text` is then its plain form (tcsae/data/chat.py)."""

    @classmethod
    def of(cls, id_: str, content: Content) -> Document:
        """The document that a row holds, in one group with copies of it."""
        if isinstance(content, np.ndarray):
            return cls(id_, "", content_group(content), content)
        if isinstance(content, str):
            return cls(id_, content, content_group(content))
        text = plain_text(content)
        return cls(id_, text, content_group(text), turns=content)

    @property
    def n_chars(self) -> int:
        """The text's characters; for tokens about as many as their text has."""
        return len(self.text) if self.ids is None else CHARS_A_TOKEN * len(self.ids)

    def part(self, start: int, n_chars: int) -> Document:
        """The document's `n_chars` from character `start` on."""
        if self.turns:
            turns = part_of(self.turns, start, n_chars)
            return replace(self, turns=turns, text=plain_text(turns))
        if self.ids is None:
            return replace(self, text=self.text[start : start + n_chars])
        first = start // CHARS_A_TOKEN
        return replace(self, ids=self.ids[first : first + n_chars // CHARS_A_TOKEN])


class Corpus(Protocol):
    """A text source: its documents and a fingerprint of their content."""

    @property
    def finite(self) -> bool:
        """Whether `documents` ends, and gives the same order every time."""

    def documents(self) -> Iterator[Document]:
        """Every document that holds any text. Raises UserError where the text cannot be had."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what determines the documents."""

    def describe(self) -> str:
        """A few words for a log."""


@runtime_checkable
class Shuffled(Protocol):
    """A corpus whose documents come in an order drawn with a seed of its own."""

    def shuffled_with(self, seed: int) -> Corpus:
        """The same text in the order of another seed."""


HASHES = 2**64


def text_hash(text: str) -> int:
    """A number from 0 to `HASHES` - 1 that hangs on the text alone, SHA-256's first 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


AUTO = "auto"
# What tokenizers have between documents. `</s>` and `<eos>` are other things too (HTML): they count
# on a line of their own.
_KNOWN = re.compile(
    r"\s*(?:<\|endoftext\|>|<\|end_of_text\|>)\s*|\n[ \t]*(?:</s>|<eos>)[ \t]*(?:\n|$)"
)


def parts_of(text: str, separator: str | None) -> list[str]:
    """The documents in a text: at least one, blank ones included. `separator`: AUTO, those that are
    known; None: none; else that text wherever it stands."""
    if separator is None:
        return [text]
    return _KNOWN.split(text) if separator == AUTO else text.split(separator)


def content_group(text: str | np.ndarray) -> str:
    """The same for copies of a text, also where only white space and case differ: they must not
    be trained on and held out both. Of tokens: of the same ids."""
    if isinstance(text, np.ndarray):
        return hashlib.sha256(text.astype("<i4").tobytes()).hexdigest()[:32]
    plain = " ".join(text.casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def parts_digest(parts: Iterator[str | bytes]) -> str:
    """SHA-256 of the parts, each preceded by its length so that no two lists can be confused."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
