"""What the ranks of one command settle first: that they are alike, and who does what."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError
from tcsae.base.ranks import code_digest, gpu_problem, here, join
from tcsae.config import Config, run_id
from tcsae.launch.jobs import GridJob


def check_alone(launcher: str) -> None:
    """Raises UserError where each of several ranks would start processes of its own."""
    if launcher != "here":
        raise UserError(
            f"hydra/launcher={launcher} starts processes of its own, and torchrun or srun has "
            f"started {here().size} already: leave one of the two out"
        )


def speak_less(level: int = logging.WARNING) -> None:
    """Of every rank but the first nothing below `level` is shown: it does much the same."""
    if not here().is_first:
        for handler in logging.getLogger().handlers:
            handler.setLevel(level)


def agree(configs: Sequence[Config], place: Path, problem: str | None = None) -> None:
    """Meet the other ranks; nothing for a process alone.

    Raises UserError, in one of the ranks, if they differ in the jobs, in their folder or in code,
    or if one has no GPU of its own, or the `problem` given.
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
    uses_gpu = any(config.uses_gpu for config in configs)
    group.agree(facts, (gpu_problem() if uses_gpu else None) or problem)


def packs_of_first(
    jobs: Sequence[GridJob], packs: Sequence[Sequence[GridJob]]
) -> list[list[GridJob]]:
    """The packs as the first rank has made them: another may have more memory, or see less."""
    group = join()
    assert group is not None
    numbers = group.exchange([[job.number for job in pack] for pack in packs])[0]
    known = {job.number: job for job in jobs} | {j.number: j for pack in packs for j in pack}
    return [[known[number] for number in pack] for pack in numbers]


def run_shared(config: Config, folder: Path) -> dict[str, Any] | None:
    """`run` of one job; where there are several ranks each trains on its contexts of every batch.

    Returns the content of final_info.json; None in the ranks that only train along.
    """
    from tcsae.jobs.bank import run

    ranks = join()
    if ranks is None:
        return run(config, folder)
    from tcsae.jobs.along import shared, train_along
    from tcsae.training.share import why_not_shared

    agree([config], folder, why_not_shared(config, here().size))
    share = shared(config, folder, ranks)
    if here().is_first:
        return run(config, folder, share)
    if share is not None:
        train_along(config, folder, share)
    return None
