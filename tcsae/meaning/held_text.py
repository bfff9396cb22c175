"""What an instrument is given, and what it gives back.

Shapes: N tokens that count, F = d_sae, D = d_in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from tcsae.base.signals import StopRequest
from tcsae.data.activation_model import ActivationModel
from tcsae.data.batches import ActivationBatches

T = TypeVar("T")


class HeldText:
    """The held-out side of one stream, and what was made of it once for all SAEs on it.

    Batches come as the evaluation has them: BOS, special and massive tokens are not `valid`, x is
    raw, and an SAE that was read back from its folder takes it so.
    """

    def __init__(
        self, model: ActivationModel, batches: ActivationBatches, stop: StopRequest
    ) -> None:
        self.model, self.batches, self.stop = model, batches, stop
        self._kept: dict[str, Any] = {}

    @property
    def documents(self) -> torch.Tensor:
        """The document of each context, [contexts] int64."""
        return self.batches.source.contexts.documents

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives, made for the first SAE and kept for the others. `key`: a name that
        begins with the instrument's, and says all that the value hangs on beside the text."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass(frozen=True)
class Number:
    """A number of an instrument. Where it is of few documents it has no interval."""

    value: float | None
    interval: tuple[float | None, float | None] = (None, None)
    """95 %."""
    replicates: tuple[float, ...] = ()
    """The number without each block of documents, the same blocks in the same order for every SAE
    on one text: of two SAEs the replicates' differences give the interval of the difference."""

    def dump(self) -> dict[str, Any]:
        low, high = self.interval
        pairs = {"replicates": list(self.replicates)} if self.replicates else {}
        return {"value": self.value, "interval": [low, high], **pairs}


@dataclass(frozen=True)
class Findings:
    """What an instrument found of one SAE."""

    headline: dict[str, Number]
    """Few: they stand in final_info.json, notes, comparisons and W&B. Names are not those of any
    other metric, and begin with what they are of (probe_, shift_)."""
    said: list[str] = field(default_factory=list)
    """A sentence each: what the numbers say, and what could not be measured and why."""
    details: dict[str, Any] = field(default_factory=dict)
    """JSON-ready; all else."""

    def dump(self) -> dict[str, Any]:
        return {
            "headline": {name: number.dump() for name, number in self.headline.items()},
            "said": self.said,
            **self.details,
        }
