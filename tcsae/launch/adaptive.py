"""hydra/sweeper=optuna: points chosen batch by batch from what the jobs before came to.

The jobs are those of any sweep: the same launchers, the same folder, known by their run ids. What
is Optuna's own is in tcsae/launch/study.py.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus

from tcsae.base.errors import SweepFailed, UserError
from tcsae.base.files import read_json
from tcsae.base.labels import number
from tcsae.base.log import console
from tcsae.base.printable import printable
from tcsae.base.ranks import here
from tcsae.base.run_files import STUDY_FILE, RunFiles, is_sweep
from tcsae.config import Config, run_id
from tcsae.config.launcher import checked
from tcsae.config.sweeper import AdaptiveOptions
from tcsae.launch.launcher import GridLauncher, plain
from tcsae.launch.objective import Constraint, constraint_of, full_key, number_at
from tcsae.launch.search_space import Space, space_of
from tcsae.launch.study import (
    again,
    best_of,
    ended,
    latest,
    optuna,
    seed_sampler,
    study_in,
    study_in_memory,
    tell,
    tell_none,
)
from tcsae.launch.sweeper import LaunchingSweeper, as_written
from tcsae.report.trials import Column, Row, Trials, write_trials

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger(__name__)

BASELINE = "baseline"
"""The study's user attribute with the numbers that constraints compare with."""


@dataclass(frozen=True)
class Asked:
    """What a search is for."""

    objective: str
    """A whole key."""
    direction: str
    constraints: tuple[Constraint, ...]
    baseline: tuple[str, ...]
    """Overrides of the job that constraints compare with; empty: none."""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.objective, *(c.key for c in self.constraints))))


class OptunaSweeper(LaunchingSweeper):
    """Its options are in tcsae/config/sweeper.py."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.given = {key: plain(value) for key, value in options.items()}
        self._baseline: dict[str, float] = {}
        """The baseline's numbers, once it has ended."""

    # ---- what is checked before anything runs ----

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Raises UserError before anything is written, and SweepFailed if a job failed."""
        console()
        options = checked(AdaptiveOptions, self.given, "hydra.sweeper")
        _check_launcher(self.launcher)
        optuna()
        assert self.context is not None
        preset = [f"{key}={as_written(value)}" for key, value in options.params.items()]
        space = space_of([*preset, *arguments], self.context.config_loader)
        asked = self._asked(options, space)
        self._check_axes(space)
        self.launcher.shown_keys = tuple(axis.key.lstrip("+") for axis in space.axes)
        if self.launcher.options.trains_nothing:
            return self._first_batch_only(options, space, asked)
        folder = self.launcher.sweep.path
        try:
            with study_in(folder, options.direction, _about(asked, space)) as study:
                self._search(study, options, space, asked)
                self._end(study, space, asked, folder)
        except UserError:
            _leave_as_found(folder)
            raise
        return []

    def _check_axes(self, space: Space) -> None:
        """Raises UserError for an end of an axis that no job can have, and for an axis that changes
        nothing."""
        base = self._composed(space.at(0)), self._composed(space.at(1))
        for axis in space.axes:
            other = self._composed(space.at(0, axis)), self._composed(space.at(1, axis))
            if all(run_id(a) == run_id(b) for a, b in zip(base, other, strict=True)):
                raise UserError(
                    f"{axis.key}={axis.written} is no axis of a search: {axis.key} has no "
                    "influence on a run's results"
                )

    def _composed(self, overrides: list[str]) -> Config:
        return self.launcher.compose([overrides], 0)[0].config

    def _asked(self, options: AdaptiveOptions, space: Space) -> Asked:
        if options.objective is None:
            raise UserError(
                "hydra.sweeper.objective must be given: a number of final_info.json, as "
                "hydra.sweeper.objective=L_8 or explained_variance"
            )
        config, node = self._composed(space.at(1)), "hydra.sweeper.constraints"
        constraints = tuple(
            constraint_of(full_key(key, config, f"{node}.{key}"), text, f"{node}.{key}")
            for key, text in options.constraints.items()
        )
        uses_baseline = any(constraint.from_baseline for constraint in constraints)
        if uses_baseline != (options.baseline is not None):
            raise UserError(
                "hydra.sweeper.constraints name a baseline: say which job it is, as "
                "hydra.sweeper.baseline='\"lambda=0\"'"
                if uses_baseline
                else "hydra.sweeper.baseline does nothing: no constraint names baseline"
            )
        objective = full_key(options.objective, config, "hydra.sweeper.objective")
        baseline = tuple(shlex.split(options.baseline or ""))
        if baseline:
            self._composed(self._baseline_job(space, baseline))
        return Asked(objective, options.direction, constraints, baseline)

    def _baseline_job(self, space: Space, baseline: Sequence[str]) -> list[str]:
        """Where it says nothing of an axis, the config's own default stands."""
        return [*space.fixed, *baseline]

    # ---- the search ----

    def _first_batch_only(
        self, options: AdaptiveOptions, space: Space, asked: Asked
    ) -> list[Sequence[JobReturn]]:
        study = study_in_memory(options.direction)
        seed_sampler(study, options.seed)
        n = min(options.n_jobs, options.n_trials)
        points = [space.point(study.ask()) for _ in range(n)]
        log.info(f"the first {n} of {options.n_trials} points, as they will be in a new folder")
        return [self.launcher.launch(_each_once(self._with_baseline(points, space, asked)), 0)]

    def _with_baseline(
        self, points: list[list[str]], space: Space, asked: Asked
    ) -> list[list[str]]:
        needs = bool(asked.baseline) and not self._baseline
        return [self._baseline_job(space, asked.baseline), *points] if needs else points

    def _search(self, study: Study, options: AdaptiveOptions, space: Space, asked: Asked) -> None:
        self._baseline = dict(study.user_attrs.get(BASELINE, {}))
        n_again = again(study)
        n_before = sum(map(ended, latest(study)))
        if n_before or n_again:
            log.info(f"the study has {n_before} points, and {n_again} to be done again")
        tried = 0
        while (left := options.n_trials - n_before - tried) > 0:
            n = min(left, options.n_jobs)
            tried += n
            self.launcher.more_to_come = left > n
            seed_sampler(study, options.seed)
            self._batch(study, n, space, asked)
            best = best_of(latest(study), asked.direction)
            said = "none keeps to the constraints yet" if best is None else _best_words(best, asked)
            log.info(f"{n_before + tried} of {options.n_trials} points; {said}")

    def _batch(self, study: Study, n: int, space: Space, asked: Asked) -> None:
        """Choose `n` points, do their jobs, and tell the study what came of them."""
        trials: list[tuple[Trial, list[str]]] = []
        for _ in range(n):
            trial = study.ask()
            point = space.point(trial)
            trial.set_user_attr("overrides", point)
            try:
                self._composed(point)
            except UserError as refused:
                log.warning(f"{refused}; it counts as a point without a value")
                tell_none(study, trial, str(refused))
            else:
                trials.append((trial, point))
        if not trials:
            return
        jobs = _each_once(self._with_baseline([point for _, point in trials], space, asked))
        if repeated := n - len({tuple(point) for _, point in trials}):
            log.info(f"{repeated} of {n} points were refused or are chosen twice")
        first = len(self.launcher.sweep.jobs())
        results = dict(zip(map(tuple, jobs), self.launcher.launch(jobs, first), strict=True))
        if asked.baseline and not self._baseline:
            job = self._baseline_job(space, asked.baseline)
            self._baseline = _baseline_numbers(results[tuple(job)], asked)
            study.set_user_attr(BASELINE, self._baseline)
        n_valued = sum(
            self._tell(study, trial, results[tuple(point)], asked) for trial, point in trials
        )
        finished = [results[tuple(point)].status == JobStatus.COMPLETED for _, point in trials]
        if all(finished) and not n_valued and best_of(latest(study), asked.direction) is None:
            reasons = [t.user_attrs["reason"] for t in study.trials if "reason" in t.user_attrs]
            raise UserError(f"no point has a value: {reasons[-1]}")

    def _tell(self, study: Study, trial: Trial, result: JobReturn, asked: Asked) -> bool:
        """Whether the job has the numbers that were asked for."""
        assert result.working_dir is not None
        folder = Path(result.working_dir)
        trial.set_user_attr("folder", folder.relative_to(self.launcher.sweep.path).as_posix())
        if result.status != JobStatus.COMPLETED:
            tell_none(study, trial, None)
            return False
        info = read_json(RunFiles(folder).final_info)
        found = {key: number_at(info, key) for key in asked.keys}
        values = {key: value for key, value in found.items() if isinstance(value, float)}
        trial.set_user_attr("values", values)
        if missing := [value for value in found.values() if isinstance(value, str)]:
            tell_none(study, trial, missing[0])
            return False
        excess = {
            f"{c.key} {c.written}": c.excess(values[c.key], self._baseline.get(c.key))
            for c in asked.constraints
        }
        tell(study, trial, values[asked.objective], excess)
        return True

    def _end(self, study: Study, space: Space, asked: Asked, folder: Path) -> None:
        """Write and print the table. Raises SweepFailed for jobs that did not finish."""
        trials = latest(study)
        best = best_of(trials, asked.direction)
        page = write_trials(_table(trials, best, space, asked, self._baseline), folder)
        n_failed = sum(not ended(trial) for trial in trials)
        n_kept = sum(trial.state.name == "COMPLETE" for trial in trials)
        lines = [f"{len(trials)} points, {n_kept} with a value: {page}"]
        if best is None:
            lines.append("no point keeps to the constraints")
        else:
            command = shlex.join(["python", "-m", "tcsae.train", *best.user_attrs["overrides"]])
            lines += [_best_words(best, asked), f"  {folder / best.user_attrs['folder']}"]
            lines.append(f"  {command}")
        print(printable("\n".join(lines)), flush=True)
        if n_failed:
            raise SweepFailed(f"{n_failed} of {len(trials)} jobs did not finish")


def _check_launcher(launcher: Any) -> None:
    if not isinstance(launcher, GridLauncher):
        raise UserError("hydra/sweeper=optuna goes with hydra/launcher=here, local or slurm")
    if here().size > 1:
        raise UserError(
            "hydra/sweeper=optuna is one process's: leave torchrun or srun out, and spread jobs "
            "with hydra/launcher=local or slurm"
        )
    if not getattr(launcher.options, "wait", True):
        raise UserError(
            "hydra.launcher.wait=false: a search waits for its jobs, to choose the next from what "
            "they came to; leave it out (the same command goes on if this one ends)"
        )


def _about(asked: Asked, space: Space) -> dict[str, Any]:
    """What a study is of: a command that differs in any of it is another search."""
    return {
        "objective": asked.objective,
        "direction": asked.direction,
        "constraints": {c.key: c.written for c in asked.constraints},
        "baseline": list(asked.baseline),
        "axes": {axis.key: axis.written for axis in space.axes},
        "fixed": sorted(space.fixed),
    }


def _baseline_numbers(result: JobReturn, asked: Asked) -> dict[str, float]:
    """Raises UserError if the baseline has not what constraints compare with."""
    if result.status != JobStatus.COMPLETED:
        raise UserError(
            f"the baseline ({' '.join(asked.baseline)}) did not finish, so no constraint can be "
            "looked at; the same command goes on"
        )
    info = read_json(RunFiles(str(result.working_dir)).final_info)
    found = {c.key: number_at(info, c.key) for c in asked.constraints if c.from_baseline}
    if missing := [value for value in found.values() if isinstance(value, str)]:
        raise UserError(f"the baseline's {missing[0]}")
    return {key: float(value) for key, value in found.items()}


def _leave_as_found(folder: Path) -> None:
    """A folder in which nothing was launched is not kept."""
    if not is_sweep(folder) and folder.is_dir():
        for file in folder.glob(f"*{STUDY_FILE}*"):
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _best_words(trial: FrozenTrial, asked: Asked) -> str:
    axes = " ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
    values = trial.user_attrs["values"]
    others = [f"{_end_of(key)} {number(values[key], 4)}" for key in asked.keys[1:]]
    head = f"best: {_end_of(asked.objective)} {number(trial.value, 4)} with {axes}"
    return head + (f" ({', '.join(others)})" if others else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _end_of(key: str) -> str:
    """explained_variance, L_8: what people call a key."""
    parts = key.removesuffix(".value").removesuffix(".energy_weighted").split(".")
    is_statistic = parts[0] == "consistency" and len(parts) == 4
    return ".".join(parts[-2:]) if is_statistic else parts[-1]


def _table(
    trials: Sequence[FrozenTrial],
    best: FrozenTrial | None,
    space: Space,
    asked: Asked,
    baseline: dict[str, float],
) -> Trials:
    columns = tuple(
        Column(key, _end_of(key), _conditions(key, asked, baseline)) for key in asked.keys
    )
    names = tuple(axis.key.lstrip("+") for axis in space.axes)
    n_fixed = len(space.fixed)
    rows = []
    for trial in trials:
        written = trial.user_attrs.get("overrides", [])[n_fixed:]
        values = trial.user_attrs.get("values", {})
        missed = [key for key, by in trial.constraints.items() if by > 0]
        state = "failed: the same command does it again" if not ended(trial) else ""
        rows.append(
            Row(
                number=trial.number,
                axes=tuple(text.partition("=")[2] for text in written),
                values=tuple(values.get(key) for key in asked.keys),
                remark=trial.user_attrs.get("reason", state) or "; ".join(missed),
                is_feasible=trial.state.name == "COMPLETE" and not missed,
                is_best=best is not None and trial.number == best.number,
                folder=trial.user_attrs.get("folder"),
                overrides=tuple(trial.user_attrs.get("overrides", ())),
            )
        )
    return Trials(asked.direction, names, columns, tuple(rows))


def _conditions(key: str, asked: Asked, baseline: dict[str, float]) -> str:
    said = [
        f"{c.written} ({number(c.bound(baseline.get(key)), 4)})" if c.from_baseline else c.written
        for c in asked.constraints
        if c.key == key
    ]
    return ", ".join(said)


def _each_once(jobs: list[list[str]]) -> list[list[str]]:
    return [list(job) for job in dict.fromkeys(map(tuple, jobs))]
