"""Layout tokens: by their own text and by their line's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tcsae.data.layout import heading_end, layout_of, layout_spans
from tcsae.data.token_text import Piece, TokenTexts


class _Spelt(TokenTexts):
    """Ids are places in a list of texts."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(tokenizer=None)
        self._spelt = texts

    def _of(self, token: int) -> tuple[str, bytes | None]:
        return self._spelt[token], None


def flagged(texts: list[str], **masks: Any) -> list[str]:
    """The layout tokens of one context of these."""
    ids = torch.arange(len(texts))[None]
    segments = masks.get("segments", torch.ones_like(ids))
    counted = masks.get("counted", torch.ones_like(ids, dtype=torch.bool))
    flags = layout_of(ids, segments, counted, _Spelt(texts))
    return [text for text, flag in zip(texts, flags[0].tolist(), strict=True) if flag]


@pytest.mark.parametrize(
    ("line", "heading"),
    [
        ("ACT II", "ACT II"),
        ("DUKE VINCENTIO", "DUKE VINCENTIO"),
        ("HAMLET. To be, or not", "HAMLET."),
        ("SCENE I. A Room in the castle.", "SCENE I."),
        ("KING LEAR: I will", "KING LEAR:"),
        ("I", ""),
        ("O, I!", ""),
        ("NASA said so", ""),
        ("Enter THESEUS", ""),
        ("U.S. troops", ""),
        ("1603", ""),
        ("国王说话。", ""),
        ("", ""),
    ],
)
def test_headings_are_lines_of_capitals_or_start_so(line: str, heading: str) -> None:
    assert line[: heading_end(line)] == heading


def test_line_ends_and_punctuation_and_headings_are_layout_and_words_are_not() -> None:
    speech = ["\n\n", "HAM", "LET", "\n", "To", " be", ",", " or", " I", "'s", " 12", ".\n", "  "]
    assert flagged(speech) == ["\n\n", "HAM", "LET", "\n", ",", ".\n", "  "]


def test_a_token_over_a_line_end_counts_with_both_lines() -> None:
    assert flagged(["so", ".\nKING", " LEAR", "\n"]) == [".\nKING", " LEAR", "\n"]


def test_lines_end_where_documents_and_special_tokens_are() -> None:
    texts = ["<bos>", "ACT", " II", " of", "<bos>", "ROME", "and", " all"]
    counted = torch.tensor([[False, True, True, True, False, True, True, True]])
    assert flagged(texts, counted=counted) == []
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 4, 4]])
    assert flagged(texts, counted=counted, segments=segments) == ["ACT", " II", "ROME"]


def test_characters_of_two_tokens_are_judged_whole() -> None:
    spans = layout_spans([Piece(0, 2, "—"), Piece(2, 4, "é"), Piece(4, 5, "\u0301")])
    assert spans == [(0, 2)]
