"""One long text: parted, held out in part, with nothing of one side beside the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig
from tcsae.data.contexts import SpecialIds, build_contexts
from tcsae.data.corpora import FilesCorpus
from tcsae.data.documents import content_group
from tcsae.data.one_text import GAP, PIECES, SHORTEST, PartedText

T = 16
SPECIAL = SpecialIds(bos=0, boundaries=frozenset({0}), masked=frozenset({0}))
CONFIG = DatasetConfig(
    name="book", source="files", n_contexts=None, n_eval_contexts=40, context_size=T
)


def numbers(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def book(folder: Path, words: int) -> FilesCorpus:
    """A text in which every word is its own number."""
    path = folder / "book.txt"
    path.write_text(" ".join(str(n) for n in range(100_000, 100_000 + words)))
    return FilesCorpus.from_path(path, "text", "train")


def test_both_sides_are_of_the_text_with_a_gap_between(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, held_out = build_contexts(book(tmp_path, 60_000), numbers, SPECIAL, CONFIG)
    sides = [set(part.ids[:, 1:].flatten().tolist()) - {0} for part in (train, held_out)]
    assert not sides[0] & sides[1]
    assert held_out.n_documents >= 4 and len(held_out) == 40
    # A word of the text is 7 characters with its space: none of one side within a gap of the other.
    distance = min(abs(a - b) for a in sides[0] for b in (min(sides[1]), max(sides[1])))
    assert distance * 7 >= GAP - 7
    assert "is one document: it is parted into" in caplog.text


@settings(max_examples=30, deadline=None)
@given(st.integers(2 * SHORTEST, 40 * SHORTEST), st.booleans())
def test_pieces_are_in_order_and_a_gap_apart(length: int, spaces: bool) -> None:
    text = ("the old river " if spaces else "\u5ddd\u6d41\u308c") * length
    text = text[:length]

    class One:
        finite = True

        def documents(self) -> Any:
            from tcsae.data.documents import Document

            yield Document("one", text, content_group(text))

    pieces = PartedText.from_corpus(One())  # type: ignore[arg-type]
    assert pieces is not None and pieces.n == min(PIECES, length // SHORTEST)
    documents = list(pieces.documents())
    assert len(documents) == pieces.n == len({d.group for d in documents})
    kept = sum(len(d.text) for d in documents)
    assert length - pieces.n * 3 * GAP <= kept <= length - (pieces.n - 1) * GAP
    if spaces:
        whole = {"the", "old", "river"}
        assert {word for d in documents[:-1] for word in d.text.split()} == whole


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too short to be parted.*two files"):
        build_contexts(book(tmp_path, 1000), numbers, SPECIAL, CONFIG)


def test_copies_of_the_one_text_are_no_other_text(tmp_path: Path) -> None:
    book(tmp_path, 60_000)
    (tmp_path / "copy.txt").write_text((tmp_path / "book.txt").read_text().replace(" ", "\n"))
    both = FilesCorpus.from_path(tmp_path, "text", "train")
    train, held_out = build_contexts(both, numbers, SPECIAL, CONFIG)
    sides = [set(part.ids[:, 1:].flatten().tolist()) - {0} for part in (train, held_out)]
    assert not sides[0] & sides[1]
