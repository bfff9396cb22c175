"""The sweeper: the grid of a --multirun command or of a preset, checked whole before it begins."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig

from tcsae.base.errors import SweepFailed, UserError


class LaunchingSweeper(Sweeper):
    """A sweeper with the launcher that Hydra's config names."""

    def __init__(self) -> None:
        self.launcher: Any = None
        self.context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )


class GridSweeper(LaunchingSweeper):
    """Every combination of `params` and of the command line's lists, for every one of `points`.

    Args:
        params: override -> its values as on the command line ("0,0.3,1"); for presets.
        points: overrides in one string each ("window=8 lambda=0.1"), in which lists may stand
            too; the grid is made once for each of them. The command line wins over `params`.
        max_batch_size: so many jobs are launched at a time; None: all.
    """

    def __init__(
        self,
        params: DictConfig | None = None,
        points: Sequence[str] | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        self.params = dict(params or {})
        self.points = list(points or []) or [""]
        if max_batch_size is not None and max_batch_size < 1:
            raise UserError(f"hydra.sweeper.max_batch_size = {max_batch_size}: must be 1 or more")
        super().__init__()
        self.max_batch_size = max_batch_size

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Raises SweepFailed, after everything else has ended, if a job failed."""
        jobs, results = self.grid(arguments), []
        size = self.max_batch_size or len(jobs)
        for first in range(0, len(jobs), size):
            self.launcher.more_to_come = first + size < len(jobs)
            results += self.launcher.launch(jobs[first : first + size], initial_job_idx=first)
        failed = [result for result in results if result.status == JobStatus.FAILED]
        if failed:
            raise SweepFailed(f"{len(failed)} of {len(results)} jobs did not finish")
        return [results]

    def grid(self, arguments: Sequence[str]) -> list[list[str]]:
        """One list of overrides a job, each job once."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        assert self.context is not None
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        preset = [f"{key!s}={as_written(value)}" for key, value in self.params.items()]
        jobs: dict[tuple[str, ...], None] = {}
        for point in self.points:
            parsed = parser.parse_overrides([*preset, *shlex.split(point), *arguments])
            for job in BasicSweeper.split_arguments(parsed, None)[0]:
                jobs[tuple(job)] = None
        if not jobs:
            raise HydraException("the grid has no job")
        return [list(job) for job in jobs]


def as_written(value: Any) -> str:
    """A preset's value as it would stand on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | ListConfig) else str(value)
