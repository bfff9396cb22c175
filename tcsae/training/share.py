"""One SAE over several ranks: every one of them trains on some whole contexts of each batch.

The sums that join a batch's tokens are taken over all ranks (tensors/over_ranks.py), gradients too,
so that all make the same step and hold the same weights, bit for bit; beside one process alone only
the order of summing differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from tcsae.base.errors import UserError
from tcsae.base.ranks import Group, Place
from tcsae.base.signals import StopRequest
from tcsae.config import Config
from tcsae.sae.registry import sae_class
from tcsae.tensors.over_ranks import is_shared, largest

LEAST_CONTEXTS = 2
"""Of a rank in a batch: the position term compares contexts."""
STEP_SECONDS = 600.0
"""That a rank may lie behind another, which writes a checkpoint, say."""


@dataclass(frozen=True)
class Share:
    """Which part of every batch is this process's; as it stands, all of it."""

    place: Place = Place()
    ranks: Group | None = None
    group: Any = None
    """torch.distributed's, or None."""

    @classmethod
    def over(cls, ranks: Group) -> Share:
        """Of one of the ranks, which must all come here."""
        import torch.distributed as dist

        place = ranks.place
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("step", ranks.store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=STEP_SECONDS),
        )
        return cls(place, ranks, dist.group.WORLD)

    def of(self, indices: Tensor) -> Tensor:
        """This rank's of a batch's contexts."""
        return indices.tensor_split(self.place.size)[self.place.rank]

    def any_stops(self, stop: StopRequest) -> bool:
        """Whether a signal came to some rank: all save after the same step."""
        if self.group is None:
            return bool(stop)
        return bool(largest(torch.tensor(float(bool(stop)))))

    def in_turn(self, resume: Callable[[], None]) -> None:
        """The first rank resumes, which may remove what is damaged; then the others, before it
        goes on."""
        if self.ranks is None:
            resume()
            return
        if self.place.is_first:
            resume()
        self.ranks.exchange("resumed")
        if not self.place.is_first:
            resume()
        self.ranks.exchange("all resumed")


def why_not_shared(config: Config, size: int) -> str | None:
    """What to say of a run that cannot be trained on parts of a batch; None: it can."""
    consistency, training = config.consistency, config.training
    reasons = {
        f"sae={config.sae.architecture} chooses among all tokens of a batch": not sae_class(
            config.sae.architecture
        ).shares_batches,
        "consistency=shuffled permutes whole batches": consistency.shuffle_positions,
        "consistency.form=batch_history keeps whole batches": consistency.form == "batch_history",
        "sae.revival=resample draws from whole batches": config.sae.revival == "resample",
        "training.compile=true compiles a step of one process": training.compile,
        f"training.batch_contexts = {training.batch_contexts} leaves a rank fewer than "
        f"{LEAST_CONTEXTS}": training.batch_contexts < LEAST_CONTEXTS * size,
    }
    said = [reason for reason, holds in reasons.items() if holds]
    if not said:
        return None
    return (
        f"one SAE over {size} ranks: {'; '.join(said)}: start it in one process (the harvest may "
        "have several: --harvest), or give the ranks SAEs of their own with --multirun"
    )


def check_alike(sae: nn.Module) -> None:
    """Raises UserError if the ranks hold different weights: a machine that computes otherwise."""
    if not is_shared():
        return
    with torch.no_grad():
        sums = torch.stack([value.double().sum() for value in sae.state_dict().values()]).cpu()
        bits = sums.view(torch.int64)
        if bool((largest(bits) != bits).any() | (largest(-bits) != -bits).any()):
            raise UserError(
                "the ranks hold different weights, which should be the same bit for bit: machines "
                "of different kinds, or a defect of one; the last checkpoint is kept"
            )
