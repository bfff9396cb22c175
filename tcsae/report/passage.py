"""One held-out document as it stands, and what fires along it: from a run's analysis.

Shapes: P places (every context with its BOS), n activations, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from tcsae.base.json_numbers import plain
from tcsae.data.token_text import Piece, pieces
from tcsae.measure.analysis import Analysis
from tcsae.measure.strips import Strip
from tcsae.report.page import packed

RASTER_ROWS = 30
DENSE = 0.5
"""Share of the tokens from which on a feature is always on rather than long-lived."""
MAX_ACTIVATIONS = 1_000_000
"""In a part of a page (5 bytes each); beyond, only those of the raster."""
NO_PASSAGE = (
    "not there: the analysis is of an older version, or of contexts that it packed (clear the "
    "store's contexts/ and run its command again with rerun=true)"
)


class Run(NamedTuple):
    """Neighbouring valid places at which a feature is on."""

    feature: int
    start: int
    """Its first place, of P."""
    length: int
    """In valid places, others passed over."""


@dataclass(frozen=True, eq=False)
class Passage:
    """The document of an analysis that has one."""

    analysis: Analysis

    @classmethod
    def of(cls, analysis: Analysis | None) -> Passage | None:
        return cls(analysis) if analysis is not None and analysis.document else None

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self.analysis.document.items()}

    def __len__(self) -> int:
        return len(self._arrays["ids"])

    @property
    def n_contexts(self) -> int:
        return int(self._arrays["n_contexts"])

    @cached_property
    def tokens(self) -> list[str]:
        """P texts, each of one token alone."""
        texts = self.analysis.top_tokens["tokens"]
        return [texts[str(i)] for i in self._arrays["ids"].tolist()]

    @cached_property
    def pieces(self) -> list[Piece]:
        """The text to be read."""
        known = self.analysis.top_tokens.get("parts", {})
        parts = [known.get(str(i)) for i in self._arrays["ids"].tolist()]
        return pieces(self.tokens, [None if p is None else bytes.fromhex(p) for p in parts])

    @cached_property
    def runs(self) -> list[Run]:
        """The longest run of every feature that is on somewhere, by feature."""
        arrays = self._arrays
        feature, at, _ = self._by_feature
        if not len(at):
            return []
        place = np.cumsum(arrays["valid"]) - 1  # among the valid ones
        begins = np.diff(feature, prepend=-1) != 0
        begins |= np.diff(place[at], prepend=-2) != 1
        first = np.flatnonzero(begins)
        length = np.diff(np.append(first, len(at)))
        best: dict[int, Run] = {}
        for start, n in zip(first.tolist(), length.tolist(), strict=True):
            found = Run(int(feature[start]), int(at[start]), n)
            if found.feature not in best or n > best[found.feature].length:
                best[found.feature] = found
        return list(best.values())

    def longest_lived(self, n: int = RASTER_ROWS) -> list[Run]:
        """The features with the longest runs, those that are nearly always on left out, in the
        order in which the runs begin."""
        counts = np.bincount(self._arrays["feature"], minlength=1)
        most = DENSE * self._arrays["valid"].sum()
        kept = [run for run in self.runs if counts[run.feature] <= most and run.length > 1]
        longest = sorted(kept, key=lambda run: (-run.length, run.feature))[:n]
        return sorted(longest, key=lambda run: (run.start, run.feature))

    def strip(self, feature: int, heading: str = "") -> Strip:
        """One feature along the document."""
        arrays = self._arrays
        mine = arrays["feature"] == feature
        values = torch.zeros(len(self))
        values[torch.from_numpy(arrays["at"][mine]).long()] = torch.from_numpy(
            arrays["value"][mine].astype(np.float32)
        )
        valid = torch.from_numpy(arrays["valid"])
        return Strip(feature, values, self.tokens, self.pieces, valid, heading)

    def n_on(self, n_features: int) -> torch.Tensor:
        """[F] valid places at which each feature is on."""
        return torch.bincount(self.analysis.document["feature"].long(), minlength=n_features)

    def same_text(self, other: Passage) -> bool:
        """Whether both are of the same tokens, and the same of them count."""
        mine, theirs = (p._arrays for p in (self, other))
        return all(np.array_equal(mine[name], theirs[name]) for name in ("ids", "valid"))

    def data(self) -> dict[str, Any]:
        """For the page's script: the text piece by piece, and what fires of the raster."""
        raster = [run.feature for run in self.longest_lived()]
        return {
            "texts": [piece.text for piece in self.pieces],
            "stops": packed(np.array([p.stop for p in self.pieces], dtype=np.int32)),
            "valid": packed(self._arrays["valid"].astype(np.uint8)),
            "raster": raster,
            "own": self.marks(raster),
        }

    def marks(self, features: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """For the page's script: what fires of `features`, in 255ths of each one's largest value;
        `count` says how many activations each has."""
        by_feature, at, value = self._by_feature
        wanted = np.asarray(features, dtype=np.int64)
        start = np.searchsorted(by_feature, wanted)
        count = np.searchsorted(by_feature, wanted, side="right") - start
        if count.sum() > MAX_ACTIVATIONS:
            raster = [run.feature for run in self.longest_lived()]
            count = np.where(np.isin(wanted, raster), count, 0)
        row = np.repeat(np.arange(len(wanted)), count)
        place = np.arange(count.sum()) + np.repeat(start - (count.cumsum() - count), count)
        peak = np.zeros(len(wanted), dtype=np.float32)
        np.maximum.at(peak, row, value[place])
        level = (value[place] / peak[row] * 255).clip(1, 255).round()
        return {
            "count": packed(count.astype(np.int32)),
            "at": packed(at[place].astype(np.int32)),
            "level": packed(level.astype(np.uint8)),
            "peak": plain(peak, 4),
        }

    @cached_property
    def _by_feature(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(feature, place, value) of every activation, by feature and then by place."""
        arrays = self._arrays
        order = np.lexsort((arrays["at"], arrays["feature"]))
        value = arrays["value"][order].astype(np.float32)
        return arrays["feature"][order], arrays["at"][order], value
