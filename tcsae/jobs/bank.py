"""Jobs: their folders, their identity, their stages; one alone, or a bank on one stream.

Stages: contexts -> harvest -> train -> save `sae/` -> evaluate -> analyse -> `final_info.json`,
which marks the run as finished -> the pages made from all that. The same config finds the same
folder: it goes on where it was interrupted, and is not repeated once finished.

The jobs of a bank share the activations and the order of batches, and nothing else: each has its
own folder, checkpoint and W&B run, ends with the very weights it would have alone, and fails alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tcsae.base.allocator import give_back, keep_large_blocks
from tcsae.base.errors import Interrupted
from tcsae.base.progress import Progress, listening
from tcsae.base.signals import StopRequest, stop_on_signal
from tcsae.base.stages import Seconds, account, stage, timing
from tcsae.config import Config, shared_by_a_bank
from tcsae.data.stream import Stream, open_stream
from tcsae.jobs.job import (
    Claimed,
    Examined,
    Job,
    Outcome,
    Scored,
    Trained,
    Training,
    begin,
    finish,
    keep,
)
from tcsae.jobs.side_by_side import at_once, side_by_side, tell
from tcsae.measure.evaluation import on_the_model
from tcsae.training.share import Share
from tcsae.training.trainer import train_bank

log = logging.getLogger(__name__)

Before = TypeVar("Before", Claimed, Training, Examined)
After = TypeVar("After")


def run(config: Config, folder: Path, share: Share | None = None) -> dict[str, Any]:
    """Run the job in `folder`, or what is left of it; returns the content of final_info.json.

    With `share` the other ranks train along (jobs/along.py).

    Raises:
        UserError: what the user can mend, in one line.
        Interrupted: a signal came; calling it again goes on.
    """
    with stop_on_signal() as stop:
        outcome = run_bank([(config, folder)], stop, share)[0]
    if outcome.error is not None:
        raise outcome.error
    assert outcome.info is not None
    return outcome.info


def run_bank(
    jobs: Sequence[tuple[Config, Path]], stop: StopRequest, share: Share | None = None
) -> list[Outcome]:
    """Train the jobs side by side on one stream; returns one outcome a job, in their order.

    A job that fails leaves the others alone; what they share (the stream) fails them all.

    Raises:
        ValueError: the jobs do not agree in model, layer, hook, dataset and batch_contexts.
        Interrupted: a signal came; every job has saved, and calling it again goes on.
    """
    _check_agreement([config for config, _ in jobs])
    bank = [Job(config, Path(folder)) for config, folder in jobs]
    with contextlib.ExitStack() as held:
        for job in bank:
            with job.guarded():
                job.claim(held)
        waiting = [job for job in bank if job.outcome is None]
        try:
            if waiting:
                _work(waiting, stop, share)
        except Interrupted:
            raise
        except Exception as error:
            for job in waiting:
                job.fail(error)
        finally:
            for job in waiting:
                job.close()
    return [job.outcome for job in bank if job.outcome is not None]


def _check_agreement(configs: Sequence[Config]) -> None:
    """The first config opens the stream: it must be that of all."""
    wanted = [shared_by_a_bank(config) for config in configs]
    for other in wanted[1:]:
        different = [name for name, value in other.items() if value != wanted[0][name]]
        if different:
            raise ValueError(f"the jobs of a bank must agree in {', '.join(different)}")


def _work(bank: list[Job], stop: StopRequest, share: Share | None) -> None:
    started = time.monotonic()
    keep_large_blocks()
    for job in bank:
        job.state.begin()
        job.state.stage("load the model")
    with timing() as shared:
        stream, scored, n_at_once = _share(bank, stop, share)
    for phase in side_by_side(scored, stream, n_at_once, stop):
        job, own = phase.job, phase.seconds
        with listening(partial(tell, [job])), timing() as rest:
            spent = partial(_spent, shared, own, rest, len(bank))
            _each([phase], partial(finish, stream, started, spent))


def _spent(shared: Seconds, own: Seconds, rest: Seconds, n_jobs: int) -> dict[str, Any]:
    return account(shared, {**own, **rest}, n_jobs)


def _share(
    bank: list[Job], stop: StopRequest, share: Share | None
) -> tuple[Stream, list[Scored], int]:
    """What the jobs share: everything but their own measurements, and how many of these are to be
    made at the same time."""
    with listening(partial(tell, bank)):
        with stage("harvest"):
            stream = open_stream(bank[0].config, stop)
        training = _each([Claimed(job) for job in bank], partial(begin, stream))
    with listening(partial(_tell_training, training)), stage("train"):
        _train(training, stream, stop, share)
    with listening(partial(tell, [phase.job for phase in training])):
        trained = _each(training, partial(keep, stream))
        give_back()
        n_at_once = at_once([phase.job.config for phase in trained], stream.device)
        with stage("harvest"):
            stream = stream.read_once(stop, for_threads=n_at_once > 1)
        with stage("evaluate model"):
            return stream, _measure_behaviour(trained, stream, stop), n_at_once


def _each(phases: list[Before], step: Callable[[Before], After]) -> list[After]:
    """The next phase of every job, by `step`. A job that has an outcome then is closed instead.

    Takes the phases out of the list, so that what only they hold (an optimizer, say) is let go.
    """
    made = []
    while phases:
        phase = phases.pop(0)
        job = phase.job
        if job.outcome is None:
            with job.guarded():
                made.append(step(phase))
        if job.outcome is not None:
            job.close()
    return made


def _train(
    training: Sequence[Training], stream: Stream, stop: StopRequest, share: Share | None
) -> None:
    try:
        train_bank([phase.seat for phase in training], stream.train, stop, share)
    finally:
        for phase in training:
            if phase.seat.error is not None:
                phase.job.fail(phase.seat.error)


def _measure_behaviour(trained: list[Trained], stream: Stream, stop: StopRequest) -> list[Scored]:
    """What the language model does with each SAE in it; its own passes serve all of them."""
    stop.check()
    measured: dict[int, Scored] = {}
    numbers = [phase.job.config.evaluation.model_contexts for phase in trained]
    for n_contexts in dict.fromkeys(numbers):
        chosen = [i for i, number in enumerate(numbers) if number == n_contexts]
        saes, config = [trained[i].sae for i in chosen], trained[chosen[0]].job.config
        found = on_the_model(saes, config, stream.model, stream.evaluation, stop)
        for i, behaviour in zip(chosen, found, strict=True):
            measured[i] = Scored(trained[i].job, trained[i], behaviour)
    return [measured[i] for i in range(len(trained))]


def _tell_training(training: Sequence[Training], progress: Progress) -> None:
    """As `tell`, of a bank in which some have failed while the others train on."""
    for phase in training:
        if phase.seat.error is not None:
            phase.job.say_failed(phase.seat.error)
    tell([phase.job for phase in training if phase.seat.error is None], progress)
