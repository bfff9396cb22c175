"""A feature along a text: in a terminal, in a notebook, and as marks for the pages' templates."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from tcsae.base.labels import number
from tcsae.base.printable import printable
from tcsae.data.token_text import Piece

_BARS = "▁▂▃▄▅▆▇█"
_TERMINAL_WIDTH = 76


def visible(text: str) -> str:
    """A token with its white space shown; a line end stays one as well."""
    return text.replace("\n", "⏎\n").replace("\t", "⇥").replace(" ", "·")


@dataclass(frozen=True)
class Mark:
    """What a page shows of one piece of text."""

    text: str
    level: float
    """0 to 1: its largest activation over the largest of the strip."""
    title: str
    """Tokens, activations and positions, for a pointer that rests on it."""
    masked: bool
    """Left out of every metric: special, first or massive."""


@dataclass(frozen=True)
class Strip:
    """One feature's activation at each token of a text (T tokens)."""

    feature: int
    values: Tensor
    """[T] float32."""
    tokens: list[str]
    """T texts, each of one token alone."""
    pieces: list[Piece]
    """The text to be read: parts of one character together."""
    valid: Tensor
    """[T] bool: neither special nor massive."""
    heading: str = ""
    """What it is, beside the feature's number."""
    scale: float | None = None
    """The activation that is shown as strongest; None: the largest here."""

    def part(self, start: int, stop: int) -> Strip:
        """Places start to stop - 1 on the scale of the whole, and what a character there needs."""
        kept = [p for p in self.pieces if p.stop > start and p.start < stop]
        first, last = (kept[0].start, kept[-1].stop) if kept else (start, start)
        return Strip(
            self.feature,
            self.values[first:last],
            self.tokens[first:last],
            [Piece(p.start - first, p.stop - first, p.text) for p in kept],
            self.valid[first:last],
            self.heading,
            self.scale or self.largest,
        )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def largest(self) -> float:
        """Over the valid tokens; 0: it does not fire."""
        return float(self.values[self.valid].max()) if bool(self.valid.any()) else 0.0

    @property
    def n_on(self) -> int:
        """Valid tokens at which it fires."""
        return int(((self.values > 0) & self.valid).sum())

    @property
    def longest(self) -> int:
        """Most valid tokens in a row at which it fires, masked ones passed over."""
        return longest_run(self.values[self.valid] > 0)

    def marks(self) -> list[Mark]:
        """The text piece by piece."""
        scale = self.scale or self.largest or 1.0
        found = []
        for start, stop, text in self.pieces:
            inside = range(start, stop)
            masked = not bool(self.valid[start:stop].any())
            value = 0.0 if masked else max(float(self.values[i]) for i in inside if self.valid[i])
            level = min(1.0, max(0.0, value / scale))
            said = "; ".join(
                f"{self.tokens[i]!r} {number(float(self.values[i]))} at {i}" for i in inside
            )
            masked_words = "left out of every metric; " if masked else ""
            found.append(Mark(visible(text), level, masked_words + said, masked))
        return found

    def _words(self) -> str:
        heading = f" {self.heading}" if self.heading else ""
        if not self.n_on:
            return f"feature {self.feature}{heading}: it does not fire here"
        return (
            f"feature {self.feature}{heading}: on at {self.n_on} of {int(self.valid.sum())} "
            f"tokens, at most {self.longest} in a row, peak {number(self.largest)}"
        )

    def __repr__(self) -> str:
        """The text in lines, a bar under each token."""
        lines, above, below = [self._words()], "", ""
        for mark in self.marks():
            shown = printable(mark.text.replace("\n", ""))
            if len(above) + len(shown) > _TERMINAL_WIDTH and above:
                lines += [above, below.rstrip()]
                above = below = ""
            bar = _BARS[min(7, int(mark.level * 8))] if mark.level > 0 else " "
            above, below = above + shown, below + bar * len(shown)
        return "\n".join([*lines, above, below.rstrip()])

    def _repr_html_(self) -> str:
        return STYLE + self.html()

    def html(self) -> str:
        """As a piece of HTML, every text escaped; `STYLE` goes with it once a page."""
        return (
            f'<div class="tcsae"><div class="tcsae-head">{escape(self._words())}</div>'
            f'<div class="tcsae-text">{"".join(map(_span, self.marks()))}</div></div>'
        )


STYLE = (
    "<style>.tcsae{margin:6px 0;line-height:1.7}.tcsae-head{font-size:.85em;opacity:.75}"
    ".tcsae-text{white-space:pre-wrap;overflow-wrap:anywhere}"
    ".tcsae-text span{border-radius:3px}.tcsae-text .tcsae-masked{opacity:.5}</style>"
)
"""Of strips in a notebook."""


def _span(mark: Mark) -> str:
    colour = f' style="background:rgba(230,159,0,{0.12 + 0.78 * mark.level:.2f})"'
    style = ' class="tcsae-masked"' if mark.masked else colour if mark.level > 0 else ""
    return f'<span title="{escape(mark.title)}"{style}>{escape(mark.text)}</span><wbr>'


def longest_run(on: Tensor) -> int:
    """Most neighbours in a row that are True, of a bool [T]."""
    off = torch.cat([torch.tensor([-1]), (~on.cpu()).nonzero().flatten(), torch.tensor([len(on)])])
    return int(off.diff().max()) - 1
