"""Which tokens are the layout of a text rather than what it says: line ends, punctuation, headings.

Shapes: N contexts, T positions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tcsae.data.token_text import Piece, TokenTexts

_END = (".", ":")
"""What a heading or a speaker's name ends with where speech follows on its line."""


def layout_of(ids: Tensor, segments: Tensor, counted: Tensor, texts: TokenTexts) -> Tensor:
    """The layout flag of every token, by its own text and by its line's: [N, T] bool.

    Layout is a token without a letter or a digit (white space, line ends, punctuation), and every
    token of a heading: a line without a small letter ("ACT II", a speaker's name), or the capitals
    that a line starts with up to a full stop or a colon ("HAMLET. To be", "SCENE I. Athens").
    A context is read by itself, so that its first line may be the end of one.

    Args:
        ids, segments: [N, T].
        counted: [N, T] bool; False at special tokens, which are no text and end a line.
        texts: of the tokenizer of `ids`.
    """
    flags = torch.zeros(ids.shape, dtype=torch.bool)
    rows = zip(ids.tolist(), segments.tolist(), counted.tolist(), strict=True)
    for n, (row, segment, is_text) in enumerate(rows):
        starts = [t for t in range(len(row)) if t and segment[t] != segment[t - 1]]
        for first, last in _stretches(is_text, starts):
            for start, stop in layout_spans(texts.pieces(row[first:last])):
                flags[n, first + start : first + stop] = True
    return flags


def _stretches(is_text: Sequence[bool], starts: Sequence[int]) -> list[tuple[int, int]]:
    """Places of one document's text without a special token in between, first and past the last."""
    cuts = sorted({0, *starts, *(t for t, text in enumerate(is_text) if not text), len(is_text)})
    found = []
    for first, last in pairwise(cuts):
        begin = first if is_text[first] else first + 1
        if begin < last:
            found.append((begin, last))
    return found


def layout_spans(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Places of the layout tokens among those of one text, first and past the last."""
    found = [(p.start, p.stop) for p in pieces if not any(map(_is_letter, p.text))]
    line: list[tuple[Piece, int, int]] = []
    text = ""

    def close() -> None:
        nonlocal line, text
        end = heading_end(text)
        found.extend((p.start, p.stop) for p, a, b in line if a < end and b <= end)
        line, text = [], ""

    for piece in pieces:
        head, *rest = piece.text.split("\n")
        line.append((piece, len(text), len(text) + len(head.rstrip())))
        text += head
        if rest:
            close()
            if rest[-1].strip():
                line, text = [(piece, 0, len(rest[-1].rstrip()))], rest[-1]
    close()
    return found


def heading_end(line: str) -> int:
    """Where the heading ends that the line is, or starts with; 0: it is none."""
    small = next((i for i, letter in enumerate(line) if letter.islower()), None)
    if small is None:
        return len(line) if _has_capitals(line) else 0
    before = line[: max(line.rfind(" ", 0, small), 0)]
    words = [(m.start(), m.end()) for m in re.finditer(r"\S+", before)]
    end = next((b for _, b in reversed(words) if before[:b].endswith(_END)), 0)
    return end if _has_capitals(before[:end]) else 0


def _is_letter(character: str) -> bool:
    """Letters, digits, and the marks that are written on letters."""
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _has_capitals(text: str) -> bool:
    """Whether two capitals stand side by side: "I" and "O" alone are words."""
    return any(a.isupper() and b.isupper() for a, b in pairwise(text))
