"""A run that has no results yet: what to do about it, in a line."""

from __future__ import annotations

import shlex

import yaml

from tcsae.base.run_files import RunFiles, is_sweep, runs_below
from tcsae.runs.status import RunStatus, run_status


def recorded_overrides(files: RunFiles) -> list[str] | None:
    """What the command line said of a run; None for one that no command line started."""
    if not files.overrides.is_file():
        return None
    overrides = yaml.safe_load(files.overrides.read_text(encoding="utf-8")) or []
    # An experiment may be a sweep by itself; of its jobs this is one.
    has_experiment = any(o.startswith("+experiment=") for o in overrides)
    return [*overrides, "hydra.mode=RUN"] if has_experiment else overrides


def why_not_loaded(files: RunFiles) -> str:
    """Why the folder of `files` is no finished run, and what helps."""
    folder = files.path
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if not files.is_run:
        said = f"{folder} is not a run folder (no {files.config.name} there)"
        within = next(runs_below(folder), None)
        return said if within is None else f"{said}; there are runs below it, such as {within}"
    status = run_status(folder)
    if status.is_here:
        return f"the run in {folder} has not finished: {_far(status)}; wait for it"
    if not files.is_begun:
        return f"the run in {folder} has not begun: it waits for its turn in its sweep"
    again = f"the run in {folder} has not finished: {_far(status)}; "
    if is_sweep(folder.parent):
        return f"{again}its sweep's command goes on: see python -m tcsae.status {folder.parent}"
    overrides = recorded_overrides(files)
    # Only `tcsae.train` keeps checkpoints; its metrics.jsonl comes with the first step.
    if overrides is None or not files.metrics.is_file():
        return f"{again}run its command again to go on"
    command = ["python", "-m", "tcsae.train", *overrides, f"hydra.run.dir={folder}"]
    return f"{again}to go on: {shlex.join(command)}"


def _far(status: RunStatus) -> str:
    """Where it is or stopped."""
    stopped = "it is at work" if status.is_here else "it was stopped"
    if status.said is not None and status.state == "failed" and status.said.message:
        return f"it failed ({status.said.message})"
    if status.planned_steps is None or status.checkpoint is None:
        return stopped
    return f"{stopped}, saved at step {status.checkpoint:,} of {status.planned_steps:,}"
