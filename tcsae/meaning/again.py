"""Text that goes through the language model again, and numbers with an interval over documents.

Shapes: C contexts, T positions, D = d_in, R = 1 + blocks of documents: of all, and without each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tcsae.data.contexts import segments_of, valid_of
from tcsae.meaning.held_text import HeldText, Number
from tcsae.metrics.units import Units, jackknife_interval
from tcsae.sae.base import SparseAutoencoder

LEVEL = 0.95
_VALUES_AT_ONCE = 2**25
"""Of codes: 128 MB."""


@dataclass(frozen=True)
class Run:
    """What the model made of some contexts, on the CPU."""

    x: Tensor
    """[C, T, D] raw activations in the model's dtype."""
    segments: Tensor
    """[C, T]."""
    valid: Tensor
    """[C, T] bool: neither special nor massive."""

    def at(self, contexts: Tensor) -> Run:
        return Run(self.x[contexts], self.segments[contexts], self.valid[contexts])


def run_again(text: HeldText, ids_CT: Tensor, at_once: int) -> Run:
    """Contexts through the model as the store's were, `at_once` at a time; tokens beyond the run's
    norm limit are left out here too. Raises Interrupted if a signal comes."""
    parts = []
    for ids in ids_CT.split(at_once):
        text.stop.check()
        parts.append(text.model.activations(ids).cpu())
    special = text.model.special_ids
    return masked(
        torch.cat(parts),
        segments_of(ids_CT, special.boundaries),
        valid_of(ids_CT, special.masked),
        text.batches.calibration.norm_limit,
    )


def masked(x: Tensor, segments: Tensor, not_special: Tensor, norm_limit: float) -> Run:
    valid = not_special & (x.float().norm(dim=-1) <= norm_limit)
    return Run(x, segments, valid)


@torch.inference_mode()
def codes_of(sae: SparseAutoencoder, run: Run) -> tuple[Tensor, Tensor]:
    """Features [C, T, F] and reconstructions [C, T, D], as the evaluation makes them, float32."""
    x = run.x.to(sae.device).float()
    segments, valid = run.segments.to(sae.device), run.valid.to(sae.device)
    features, x_hat = sae.encode_and_decode(x, segments=segments, valid=valid)
    return features.float().cpu(), x_hat.float().cpu()


def few_at_once(n_contexts: int, size: int, d_sae: int) -> Iterator[Tensor]:
    """Indices of contexts, as many at once as codes have room."""
    yield from torch.arange(n_contexts).split(max(1, _VALUES_AT_ONCE // (size * d_sae)))


def number_of(rows_R: Tensor, units: Units) -> Number:
    """The first of R values with an interval by the jackknife over blocks of documents; none with
    few documents, or where it could not be told without some of them."""
    value, others = float(rows_R[0]), rows_R[1:]
    if not math.isfinite(value):
        return Number(None)
    if units.interval_reason is not None or not others.isfinite().all():
        return Number(value)
    low, high = jackknife_interval(others, rows_R[0], LEVEL)
    ends = (float(low), float(high)) if low.isfinite() else (None, None)
    return Number(value, ends, tuple(others.tolist()))


def as_text(number: Number, digits: int = 3) -> str:
    """ "0.912 [0.905, 0.919]"."""
    if number.value is None:
        return "n/a"
    low, high = number.interval
    band = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{number.value:.{digits}f}{band}"
