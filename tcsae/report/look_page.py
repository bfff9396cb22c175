"""The page of `python -m tcsae.look`: features of one text as strips, of one run or of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcsae.base.labels import number
from tcsae.measure.analysis import Analysis
from tcsae.measure.strips import Strip, visible
from tcsae.measure.text_features import TextFeatures
from tcsae.report.page import write_page
from tcsae.report.rows import row_of

_SHOWN = ("density", "C_8", "L_8", "rho_1", "run_length")


@dataclass(frozen=True)
class Seen:
    """A text as one SAE has it."""

    name: str
    words: str
    """What the SAE is, in a line."""
    found: TextFeatures
    W_dec: Tensor
    """[F, d_in]."""
    per_feature: Mapping[str, Tensor]
    """What was measured; {} of an SAE that was not."""
    analysis: Analysis | None

    def tokens(self, feature: int) -> list[str]:
        """That set the feature apart, best first; [] where no analysis says."""
        if self.analysis is None:
            return []
        own: list[str] = self.analysis.specialization["features"]["top_tokens"][feature]
        return [visible(text).replace("\n", "") for text in own]

    def facts(self, feature: int) -> str:
        """What was measured of it on held-out text."""
        known = [name for name in _SHOWN if name in self.per_feature]
        values = {name: float(self.per_feature[name][feature]) for name in known}
        return ", ".join(f"{name} {number(value)}" for name, value in values.items())


def counterpart(feature: int, of: Tensor, among: Tensor) -> tuple[int, float]:
    """The feature of `among` [G, d] with the decoder direction nearest to one of `of` [F, d].

    Returns its number and the cosine; the same number first where several are as near.
    """
    own = torch.nn.functional.normalize(of[feature].float(), dim=0)
    cosine = torch.nn.functional.normalize(among.float(), dim=1) @ own
    best = float(cosine.max())
    if feature < len(cosine) and float(cosine[feature]) >= best - 1e-6:
        return feature, float(cosine[feature])
    return int(cosine.argmax()), best


def write_look_page(path: Path, seen: Seen, features: Sequence[int], baseline: Seen | None) -> Path:
    """The page, whole or not at all. Raises UserError where it cannot be written."""
    others = [seen] if baseline is None else [seen, baseline]
    panels: list[dict[str, Any]] = []
    for feature in features:
        sides = [_side(seen, feature, "")]
        if baseline is not None:
            other, cosine = counterpart(feature, seen.W_dec, baseline.W_dec)
            sides.append(_side(baseline, other, f"decoder cosine {number(cosine)}"))
        panels.append({"feature": feature, "sides": sides})
    context = {
        "seen": others,
        "panels": panels,
        "rows": [row_of(panel["sides"][0]["strip"]) for panel in panels],
        "text": [visible(piece.text) for piece in seen.found.pieces],
        "n_tokens": len(seen.found),
        "n_valid": int(seen.found.valid.sum()),
        "n_massive": int(seen.found.massive.sum()),
        "n_contexts": len(seen.found.contexts.unique()),
    }
    return write_page(path, "look.html.j2", f"A text in {seen.name}", context, {}, {})


def _side(seen: Seen, feature: int, said: str) -> dict[str, Any]:
    strip: Strip = seen.found.strip(feature)
    return {
        "strip": strip,
        "row": row_of(strip),
        "said": said,
        "tokens": seen.tokens(feature),
        "facts": seen.facts(feature),
    }
