"""What every launcher does: validate the grid, pack it, run it, and report every job's outcome.

Free of torch and of submitit: Hydra imports its launchers at every start.
"""

from __future__ import annotations

import logging
import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tcsae.base.errors import UserError
from tcsae.base.log import console
from tcsae.base.printable import printable
from tcsae.base.progress import shown
from tcsae.base.ranks import here
from tcsae.base.run_files import OVERRIDES
from tcsae.config import run_id
from tcsae.config.compose import to_config
from tcsae.config.launcher import Options
from tcsae.config.mistakes import for_the_user
from tcsae.jobs.sources import Sources
from tcsae.launch.hydra_keys import refuse_of_a_sweep, set_environment, writes_folder
from tcsae.launch.jobs import GridJob, names_of
from tcsae.launch.plan import packed, plan_lines
from tcsae.launch.prepare import prepare
from tcsae.launch.results import results_of, table
from tcsae.launch.sweep_folder import SweepFolder
from tcsae.launch.together import agree, check_alone, packs_of_first, speak_less

log = logging.getLogger(__name__)

Packs = list[list["GridJob"]]


class GridLauncher(Launcher):
    """A launcher's options come from conf/hydra/launcher/ (tcsae/config/launcher.py)."""

    kind: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        self.given = {key: plain(value) for key, value in options.items()}
        self.context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.more_to_come = False
        """Whether the sweeper will launch further jobs into the folder: no comparison page yet."""
        self.shown_keys: tuple[str, ...] = ()
        """Keys that a job's name has even if those launched with it have the same value."""
        self.n_jobs = 0
        """Of the command, those that are finished already among them."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    # ---- what a launcher has of its own ----

    @property
    @abstractmethod
    def options(self) -> Options:
        """The options, checked. Raises UserError."""

    @abstractmethod
    def processes(self) -> int | None:
        """How many packs run at once; None if that is not known."""

    @property
    def compares(self) -> bool:
        """Whether the comparison page is written when these jobs have ended."""
        return self.options.compare and not self.more_to_come

    def device(self) -> str:
        """What the jobs will run on, for the estimate: "cuda" or "cpu"."""
        return "cuda" if Path("/dev/nvidia0").exists() else "cpu"

    def preflight(self, packs: Packs) -> None:
        """Raises UserError for what makes launching impossible, before anything is written."""
        return

    def in_progress(self, sweep: SweepFolder) -> set[int]:
        """Numbers of the jobs that an earlier command has sent and that have not ended."""
        return set()

    @abstractmethod
    def execute(self, sweep: SweepFolder, packs: Packs) -> dict[int, str] | None:
        """Run the packs to their end; what to say of jobs whose own folder does not say it.

        None if they have been sent and are not waited for.
        """

    # ---- what they share ----

    @property
    def sweep(self) -> SweepFolder:
        assert self.config is not None
        return SweepFolder(Path(self.config.hydra.sweep.dir).absolute())

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; one JobReturn each, whatever became of the others.

        Raises UserError before anything is written or sent if one of them is not valid.
        """
        options, place = self.options, here()
        console()
        if place.size > 1:
            check_alone(self.kind)
            speak_less()
        assert self.config is not None
        refuse_of_a_sweep(self.config.hydra)
        set_environment(self.config.hydra)
        jobs, sweep = self.compose(job_overrides, initial_job_idx), self.sweep
        if not options.dry_run:
            agree([job.config for job in jobs], sweep.path)
        self._say_added(jobs, sweep)
        self.n_jobs = len(jobs)
        finished = [job for job in jobs if job.is_finished and not job.config.rerun]
        sources = Sources()
        for job in finished:
            sources.check(job.config, job.folder, job.files.content)
        before = {job.number for job in finished}
        sent = self.in_progress(sweep) - before
        to_do = [job for job in jobs if job.number not in before | sent]
        packs = packed(_each_once(to_do), options, self.processes(), self.device())
        if place.size > 1 and not options.dry_run:
            packs = packs_of_first(jobs, packs)
        for line in plan_lines(jobs, packs, before, sent, options, sweep, self.device()):
            log.info(line)
        if options.prepare:
            prepare([job.config for pack in packs for job in pack], options.prepare)
        if options.trains_nothing:
            return [self._returned(job, None, None) for job in jobs]
        self.preflight(packs)
        if place.is_first:
            sweep.describe(jobs, self.kind, sys.argv[1:])
        said = self.execute(sweep, packs) if packs or sent else {}
        if said is None:
            return [self._returned(job, None, None) for job in jobs]
        results = results_of(jobs, before, said)
        if not place.is_first:  # the first one says what became of all
            return [self._returned(job, None, None) for job in jobs]
        print(printable(table(results)), flush=True)
        return [
            self._returned(result.job, result.value, None if result.is_good else result.message)
            for result in results
        ]

    def compose(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[GridJob]:
        """The jobs of a grid, every one of them checked. Those that were launched into this folder
        before have the numbers that they had, so that a grid may grow."""
        assert self.context is not None and self.config is not None
        jobs: list[GridJob] = []
        names = names_of(job_overrides, self.shown_keys)
        numbers = _Numbers(self.sweep.jobs(), first)
        for overrides, name in shown(zip(job_overrides, names, strict=True), len(names)):
            try:
                composed = self.context.config_loader.load_sweep_config(
                    self.config, list(overrides)
                )
                self._check_hydra(composed)
                config = to_config(composed)
            except (UserError, HydraException, OmegaConfBaseException) as error:
                line = for_the_user(error)
                raise UserError(f"job {len(jobs) + first} ({name}): {line}") from None
            number = numbers.of(run_id(config))
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
            folder = Path(composed.hydra.sweep.dir) / composed.hydra.sweep.subdir
            config = _named(config, name, Path(composed.hydra.sweep.dir).name)
            files = _hydra_files(composed, overrides)
            files = files if writes_folder(composed.hydra) else {}
            jobs.append(GridJob(number, name, tuple(overrides), config, folder.absolute(), files))
        _check_folders(jobs)
        return jobs

    def _check_hydra(self, composed: DictConfig) -> None:
        """Raises UserError for a job that chooses what only the sweep can have chosen: an option
        among those that are swept has a grid, a launcher or a folder of its own."""
        assert self.config is not None
        for key in ("launcher", "sweeper", "mode", "callbacks", "job.env_set", "sweep.dir"):
            mine, of_the_sweep = (
                OmegaConf.select(config.hydra, key) for config in (composed, self.config)
            )
            if mine != of_the_sweep:
                raise UserError(
                    f"it sets hydra.{key}, which belongs to the whole sweep: an experiment with a "
                    "grid or a launcher of its own is a command of its own, not one of a list"
                )

    def _say_added(self, jobs: Sequence[GridJob], sweep: SweepFolder) -> None:
        before = {job["run_id"] for job in sweep.jobs()}
        new = {run_id(job.config) for job in jobs} - before
        if before and new:
            log.info(f"{len(new)} jobs more, beside the {len(before)} that {sweep.path} has")

    def _returned(self, job: GridJob, value: Any, error: str | None) -> JobReturn:
        status = JobStatus.COMPLETED if error is None else JobStatus.FAILED
        return JobReturn(
            overrides=list(job.overrides),
            working_dir=str(job.folder),
            task_name="train",
            status=status,
            _return_value=value if error is None else UserError(error),
        )


class _Numbers:
    """Numbers of jobs: what a job had before, or the next that no other has."""

    def __init__(self, before: Sequence[dict[str, Any]], first: int) -> None:
        self._before: dict[str, list[int]] = {}
        for job in before:
            self._before.setdefault(job["run_id"], []).append(job["number"])
        self._next = max([first, *(job["number"] + 1 for job in before)])

    def of(self, run_id: str) -> int:
        if self._before.get(run_id):
            return self._before[run_id].pop(0)
        self._next += 1
        return self._next - 1


def _check_folders(jobs: Sequence[GridJob]) -> None:
    """Raises UserError if two jobs that are not the same run would lie in one folder."""
    first: dict[Path, GridJob] = {}
    for job in jobs:
        other = first.setdefault(job.folder, job)
        if run_id(other.config) != run_id(job.config):
            raise UserError(
                f"hydra.sweep.subdir gives jobs {other.number} ({other.name}) and {job.number} "
                f"({job.name}) one folder, {job.folder.name}: leave the key out, or let it hold "
                "what differs, as ${hydra.job.override_dirname} does"
            )


def _each_once(jobs: Sequence[GridJob]) -> list[GridJob]:
    """Without jobs that are the same run as an earlier one (seed=0 and seed=00, say)."""
    return list({job.folder: job for job in reversed(jobs)}.values())[::-1]


def plain(value: Any) -> Any:
    """A value of Hydra's config, in containers of Python's own."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _named(config: Any, name: str, sweep: str) -> Any:
    """What W&B shows of a job of a sweep, unless the user has chosen it."""
    tracking = config.tracking
    if tracking.group is None:
        tracking = tracking.model_copy(update={"group": sweep})
    return config.model_copy(update={"name": config.name or name, "tracking": tracking})


def _hydra_files(composed: DictConfig, overrides: Sequence[str]) -> dict[str, str]:
    """What Hydra itself writes into a job's .hydra folder."""
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    hydra_part = OmegaConf.masked_copy(composed, ["hydra"])
    return {
        "config.yaml": OmegaConf.to_yaml(own),
        "hydra.yaml": OmegaConf.to_yaml(hydra_part),
        OVERRIDES: OmegaConf.to_yaml(OmegaConf.create(list(overrides))),
    }
