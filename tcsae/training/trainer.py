"""Trains a bank of SAEs on one stream: every batch is read, masked and scaled once for all."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tcsae.base.errors import Interrupted, UserError
from tcsae.base.progress import Progress
from tcsae.base.run_files import RunFiles
from tcsae.base.signals import StopRequest
from tcsae.config import run_id
from tcsae.data.batches import ActivationBatches, Batch, read_ahead, shuffled_indices
from tcsae.tensors.over_ranks import is_shared, shared_batch
from tcsae.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tcsae.training.member import Member
from tcsae.training.share import Share, check_alike

log = logging.getLogger(__name__)


class ScaledBatch:
    """A batch's activations in float32 by input scale, converted once for a bank."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._by_scale: dict[float, Tensor] = {}

    def x(self, scale: float) -> Tensor:
        if scale not in self._by_scale:
            self._by_scale[scale] = self._batch.x.float() * scale
        return self._by_scale[scale]


class MetricsLog(Protocol):
    """Receives a member's metrics (tcsae/jobs/tracking.py)."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: it is about to be logged again."""
        ...


@dataclass
class Seat:
    """A member with its run folder and its metrics log."""

    member: Member
    folder: Path
    metrics: MetricsLog
    saved_step: int = -1
    seconds: float = 0.0
    """Training time so far, over all sessions."""
    last_metrics: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    """Why the member trains no further; the others of its bank do."""
    writes: bool = True
    """False: of a rank that trains along, whose first one writes."""

    @property
    def steps(self) -> int:
        return self.member.config.steps

    def works_at(self, step: int) -> bool:
        return self.error is None and self.member.step == step < self.steps

    @property
    def checkpoints(self) -> Path:
        return RunFiles(self.folder).checkpoints

    @property
    def last_good(self) -> str:
        """The newest checkpoint, in words."""
        return f"step {self.saved_step}, {self.checkpoints}" if self.saved_step >= 0 else "none yet"

    def save(self) -> None:
        if self.saved_step == self.member.step:
            return
        self.member.check_finite(self.last_good)
        checkpoint = self.member.checkpoint(
            {"seconds": self.seconds, "made_by": self.member.made_by}
        )
        _check_finite_weights(checkpoint, self.last_good)
        check_alike(self.member.sae)
        if self.writes:
            save_checkpoint(self.checkpoints, checkpoint)
        self.saved_step = self.member.step

    def resume(self) -> None:
        checkpoint = load_checkpoint(self.checkpoints, run_id(self.member.config))
        if checkpoint is None:
            self.metrics.rewind(0)
            return
        self.member.restore(checkpoint)
        self.saved_step, self.seconds = checkpoint.step, checkpoint.facts["seconds"]
        self.metrics.rewind(checkpoint.step)
        log.info(f"resuming at step {checkpoint.step} of {self.member.config.steps}")
        before = checkpoint.facts.get("made_by", self.member.made_by)
        if before != self.member.made_by:
            log.warning(
                f"the steps so far were made by {before}, the rest by {self.member.made_by}: the "
                "weights will differ in their last bits from those of a run on one of them"
            )


def _check_finite_weights(checkpoint: Checkpoint, last_good: str) -> None:
    """A finite loss can have a gradient that is not: such weights must not become the last ones."""
    for name, value in checkpoint.tensors.items():
        is_weight = name.startswith(("sae.", "average.", "optimizer."))
        if is_weight and value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(
                f"{name} is not finite after step {checkpoint.step - 1} (term: the gradient); the "
                f"last good checkpoint is kept: {last_good}. Lower training.lr, lambda or the "
                "weight of another term"
            )


def train_bank(
    seats: list[Seat], batches: ActivationBatches, stop: StopRequest, share: Share | None = None
) -> None:
    """Train every member to its last step, from its last checkpoint if there is one.

    The members share the order of data and the batch size, and nothing else: each ends with the
    very weights it would have alone. A member's error (a loss that is not finite, say) is kept in
    `seat.error`; its last good checkpoint stays. With `share` every rank does so at once, on its
    contexts of each batch.

    Raises Interrupted if a signal came; every member has saved.
    """
    share = share or Share()
    if not seats:
        return
    with shared_batch(share.group):
        share.in_turn(partial(_resume_all, seats))
        _train(seats, batches, stop, share)


def _train(seats: list[Seat], batches: ActivationBatches, stop: StopRequest, share: Share) -> None:
    """Every step that is left."""
    config = seats[0].member.config
    size = config.training.batch_contexts
    per_step = size * config.dataset.context_size
    first = min(seat.member.step for seat in seats)
    steps = range(first, max(seat.steps for seat in seats))
    whole = (shuffled_indices(s, size, len(batches), config.dataset.seed) for s in steps)
    progress = Progress("train", steps.stop * per_step, done=first * per_step)
    started = time.monotonic()
    with progress, contextlib.closing(read_ahead(batches, map(share.of, whole))) as ahead:
        for step, batch in zip(steps, ahead, strict=True):
            working = [seat for seat in seats if seat.works_at(step)]
            if all(seat.error for seat in seats):
                return
            scaled = ScaledBatch(batch)
            for seat in working:
                with _own_error(seat):
                    started = _one_step(seat, batch, scaled, started)
            progress.update(per_step, _note(seats[0]))
            if share.any_stops(stop):
                _save_all(seats)
                stop.check()
                raise Interrupted("stopped with the other ranks, everything up to here is saved")
            started = time.monotonic()
    _save_all(seats)


def _resume_all(seats: list[Seat]) -> None:
    for seat in seats:
        with _own_error(seat):
            seat.resume()


@contextlib.contextmanager
def _own_error(seat: Seat) -> Iterator[None]:
    try:
        yield
    except Interrupted:  # of all ranks
        raise
    except Exception as error:
        seat.error = error


def _save_all(seats: list[Seat]) -> None:
    for seat in seats:
        if seat.error is None:
            with _own_error(seat):
                seat.save()


def _one_step(seat: Seat, batch: Batch, scaled: ScaledBatch, started: float) -> float:
    """One step of one member, its log line and its checkpoint. Returns the time it ended."""
    member, cfg = seat.member, seat.member.config.training
    last = member.step + 1 == member.config.steps
    is_logged = (member.step + 1) % cfg.log_every == 0 or last
    metrics = member.train_step(batch, scaled.x(member.scale), is_logged)
    seat.seconds += time.monotonic() - started
    if metrics is not None:
        member.check_finite(seat.last_good)
        tokens = member.step * (member.tokens_a_step if is_shared() else batch.valid.numel())
        metrics |= {"tokens": tokens, "tokens_per_second": tokens / seat.seconds}
        seat.metrics.log(metrics, member.step)
        seat.last_metrics = metrics
    if member.step % cfg.checkpoint_every == 0:
        seat.save()
    return time.monotonic()


def _note(seat: Seat) -> str:
    shown = seat.last_metrics
    if not shown:
        return ""
    return (
        f"loss {shown['loss/total']:.1f}, L0 {shown['l0']:.0f}, "
        f"EV {shown['explained_variance']:.3f}, C_W {shown['window_consistency']:.3f}"
    )
