"""What the ranks of one command settle first: that they are alike, and who does what."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.base.ranks import code_digest, gpu_problem, here, join
from tcsae.base.run_files import RunFiles
from tcsae.config import Config, run_id
from tcsae.launch.jobs import GridJob
from tcsae.launch.prepare import prepare


def check_alone(launcher: str) -> None:
    """Raises UserError where each of several ranks would start processes of its own."""
    if launcher != "here":
        raise UserError(
            f"hydra/launcher={launcher} starts processes of its own, and torchrun or srun has "
            f"started {here().size} already: leave one of the two out"
        )


def only_warnings() -> None:
    """On the terminal, of every rank but the first, which do the same at the same time."""
    if not here().is_first:
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.WARNING)


def agree(configs: Sequence[Config], place: Path) -> None:
    """Meet the other ranks; nothing for a process alone.

    Raises UserError, in one of the ranks, if they differ in the jobs, in their folder or in code,
    or if one has no GPU of its own.
    """
    group = join()
    if group is None:
        return
    stores = [config.store.model_dump(mode="json", exclude={"also"}) for config in configs]
    whole = json.dumps([[run_id(config) for config in configs], stores], sort_keys=True)
    facts = {
        "config": hashlib.sha256(whole.encode()).hexdigest()[:12],
        "number of jobs": str(len(configs)),
        "folder": str(place),
        "code version": code_digest(),
    }
    uses_gpu = any(config.model.device != "cpu" for config in configs)
    group.agree(facts, gpu_problem() if uses_gpu else None)


def packs_of_first(
    jobs: Sequence[GridJob], packs: Sequence[Sequence[GridJob]]
) -> list[list[GridJob]]:
    """The packs as the first rank has made them: another may have more memory, or see less."""
    group = join()
    assert group is not None
    numbers = group.exchange([[job.number for job in pack] for pack in packs])[0]
    known = {job.number: job for job in jobs} | {j.number: j for pack in packs for j in pack}
    return [[known[number] for number in pack] for pack in numbers]


def help_harvest(config: Config, folder: Path) -> None:
    """What the other ranks do for one run, which the first one trains."""
    is_done = RunFiles(folder).is_finished and not config.rerun
    if config.store.mode == "disk" and not is_done:
        prepare([config], "activations")
