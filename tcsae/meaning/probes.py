"""Probes: what can be read from few features of an SAE, and from how many tokens of them."""

from __future__ import annotations

from tcsae.config import Measured
from tcsae.meaning.held_text import Findings, HeldText
from tcsae.sae.base import SparseAutoencoder


def probes(sae: SparseAutoencoder, text: HeldText, config: Measured) -> Findings:
    return Findings({})
