"""Names and texts of others, as they may be shown on a terminal."""

from __future__ import annotations

import logging
import re

# Controls but for line ends and tabs, the marks that turn the direction of a line, and the bytes of
# a file's name that are no text, which cannot be printed at all.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""`text` with its control characters as \x1b and the like: none moves a cursor or hides a
    line."""
    return _CONTROL.sub(lambda found: _escaped(found[0]), text)


def visible(text: str) -> str:
    """`printable` for a cell of a table: in one line, and nothing in it without a width."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class PrintableFormatter(logging.Formatter):
    """Of every log, on a terminal and in files (conf/train.yaml names it too)."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
