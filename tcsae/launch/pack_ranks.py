"""Who does what of a pack where its Slurm job has several tasks ("ranks").

The jobs of a pack are spread over the ranks, which harvest one store; each SAE ends as it would
alone. One job by itself is trained by all ranks, each on its contexts of every batch. What is to be
written once the first rank writes.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence

from tcsae.base.errors import UserError
from tcsae.base.ranks import Group, here
from tcsae.base.signals import StopRequest
from tcsae.config.launcher import Options, SlurmOptions
from tcsae.launch.jobs import GridJob
from tcsae.launch.worker import work

log = logging.getLogger(__name__)


def tasks_per_node(options: SlurmOptions) -> int:
    return options.tasks_per_node or max(options.gpus_per_node, 1)


def n_tasks(options: Options) -> int:
    """How many processes do a pack."""
    if not isinstance(options, SlurmOptions):
        return 1
    return options.nodes * tasks_per_node(options)


def trains_together(options: Options, n_jobs: int) -> bool:
    """Whether all ranks train one job, rather than some jobs each.

    It goes by what was asked for, not by what is left to do: a run that is gone on with is summed
    in the order in which it began.

    Args:
        n_jobs: of the whole command, those that are finished among them.
    """
    return n_tasks(options) > 1 and (options.pack == 1 or n_jobs == 1)


def parts(pack: Sequence[GridJob], size: int) -> list[list[GridJob]]:
    """The jobs of every rank; empty for those that have none."""
    return [list(pack[rank::size]) for rank in range(size)]


def check_busy(packs: Sequence[Sequence[GridJob]], options: Options, n_jobs: int) -> None:
    """Raises UserError, before anything is sent, for jobs that ranks cannot share, and where no
    pack has a job for every rank. Where that is so of some packs, or of what is left of a sweep,
    a line says it."""
    tasks = n_tasks(options)
    if tasks == 1 or not packs:
        return
    if trains_together(options, n_jobs):
        return _check_shared([job for pack in packs for job in pack], tasks)
    largest = max(len(pack) for pack in packs)
    idle = f"of {tasks} tasks {tasks - largest} would have no job"
    if largest < tasks and sum(map(len, packs)) == n_jobs:
        raise UserError(
            f"{idle}, as a pack has {largest}: ask for fewer (hydra.launcher.nodes, "
            "tasks_per_node, gpus_per_node), or let all of them train each job "
            "(hydra.launcher.pack=1)"
        )
    if small := [pack for pack in packs if len(pack) < tasks]:
        log.warning(
            f"{len(small)} of {len(packs)} packs have fewer jobs than the {tasks} tasks: those "
            "without one help to harvest, and wait"
        )


def _check_shared(jobs: Sequence[GridJob], tasks: int) -> None:
    from tcsae.training.share import why_not_shared  # torch, which a plan is free of

    for job in jobs:
        if reason := why_not_shared(job.config, tasks):
            raise UserError(
                f"job {job.number} ({job.name}): {reason}; or take hydra.launcher.tasks_per_node=1 "
                "and gpus_per_node=1, or hydra.launcher.pack=auto, which gives each task jobs"
            )


# ------------------------------------------------------------------------------ in the job


def work_over_ranks(
    pack: Sequence[GridJob], together: bool, group: Group, stop: StopRequest
) -> dict[int, str]:
    """Do this rank's part of the pack. Returns what became of the jobs that failed, by number: in
    every rank of all of them, or in the first alone of the one that all have trained.

    Raises:
        UserError: what ends the pack, in one line.
        Interrupted: a signal came, or another rank is gone; all is saved.
    """
    if together:
        return _in_words(_one_by_all(pack[0], group, stop))
    mine = parts(pack, here().size)[here().rank]
    if not mine:
        _harvest_along(pack[0], stop)
    errors = _in_words(work(mine, stop) if mine else {})
    said = group.exchange(sorted(errors.items()), check=stop.check)
    return {number: text for other in said for number, text in other}


def _in_words(errors: dict[int, Exception]) -> dict[int, str]:
    for error in errors.values():
        traceback.print_exception(error)
    return {number: str(error) for number, error in errors.items()}


def _one_by_all(job: GridJob, group: Group, stop: StopRequest) -> dict[int, Exception]:
    from tcsae.jobs.along import shared, train_along

    share = shared(job.config, job.folder, group)
    if here().is_first:
        return work([job], stop, share)
    if share is not None:
        train_along(job.config, job.folder, share, stop)
    return {}


def _harvest_along(job: GridJob, stop: StopRequest) -> None:
    """Of a rank that has no job."""
    from tcsae.data.stream import open_stream

    if job.config.store.mode == "disk":
        open_stream(job.config, stop)
