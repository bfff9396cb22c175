"""One long text, where there is no other to hold out: pieces of it, with a gap between any two."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tcsae.data.documents import Corpus, Document

GAP = 512
"""Characters left out between two pieces, a context of text or so: what is held out does not begin
in the middle of a sentence that was trained on."""
SHORTEST = 16 * GAP
PIECES = 160
"""Pieces at most. With the default share some 24 of them are held out: enough for intervals."""

_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class PartedText:
    """The pieces of a corpus' one text, each a document with a group of its own."""

    of: Corpus
    n: int
    """Pieces."""
    finite = True

    @classmethod
    def from_corpus(cls, of: Corpus) -> PartedText | None:
        """None: the text is too short to be parted."""
        n = min(PIECES, next(of.documents()).n_chars // SHORTEST)
        return cls(of, n) if n > 1 else None

    def documents(self) -> Iterator[Document]:
        whole = next(self.of.documents())  # any other is a copy of it
        if whole.ids is not None or whole.turns:
            yield from self._of_parts(whole)
            return
        length = len(whole.text) / self.n
        ends = [_after_a_word(whole.text, round(length * k)) for k in range(self.n + 1)]
        for k in range(self.n):
            start = _after_a_word(whole.text, ends[k] + GAP) if k else 0
            text = whole.text[start : ends[k + 1]]
            if text.strip():
                yield Document(f"{whole.id}#{k}", text, f"{whole.group}#{k}")

    def _of_parts(self, whole: Document) -> Iterator[Document]:
        length = whole.n_chars / self.n
        for k in range(self.n):
            start = round(length * k) + GAP * (k > 0)
            part = whole.part(start, round(length * (k + 1)) - start)
            yield replace(part, id=f"{whole.id}#{k}", group=f"{whole.group}#{k}")

    def fingerprint(self) -> str:
        return self.of.fingerprint()

    def describe(self) -> str:
        return f"{self.of.describe()} in {self.n} pieces"


def _after_a_word(text: str, place: int) -> int:
    """The first white space at or after `place`; `place` where none is near."""
    found = _SPACE.search(text, place, place + GAP)
    return found.end() if found else place
