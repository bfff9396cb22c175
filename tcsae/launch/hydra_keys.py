"""Hydra's own keys where ours stand in for its launchers: obeyed, or refused in one line.

A single run is Hydra's: it has no launcher and no sweeper. The jobs of a sweep are not: they run
side by side in processes of ours, into folders and logs that other commands find again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from tcsae.base.errors import UserError
from tcsae.base.run_files import RunFiles

WRITE_NOTHING = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout")
"""What --dry-run, --prepare and --harvest add: of a single run Hydra itself makes a folder, .hydra
and a log."""
_OF_A_SWEEP = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep.")
_FOLDER = RunFiles("").hydra.name


def trains_nothing(launcher: Any) -> bool:
    """Whether it only says what a run would cost, or makes what it needs."""
    return bool(launcher.get("dry_run", False) or launcher.get("prepare"))


def refuse_of_one_run(hydra: Any) -> None:
    """Raises UserError for what only a sweep has a use for."""
    if trains_nothing(hydra.launcher):
        return  # whose cost the launcher's keys are for
    given = [text for text in hydra.overrides.hydra if text.lstrip("+~").startswith(_OF_A_SWEEP)]
    launcher = hydra.runtime.choices.get("hydra/launcher", "here")
    if not given and launcher != "here":
        given = [f"hydra/launcher={launcher}"]
    if given:
        raise UserError(
            f"{', '.join(given)}: it does nothing for one run, which is made in this process: add "
            "--multirun (a sweep may have one job), or leave it out"
        )


def refuse_of_a_sweep(hydra: Any) -> None:
    """Raises UserError for what the jobs of a sweep would not heed."""
    ours = set(WRITE_NOTHING) if trains_nothing(hydra.launcher) else set()
    given = [text for text in hydra.overrides.hydra if text not in ours]
    if said := [*_ignored(hydra, given), *_deaf_callbacks(hydra)]:
        raise UserError("; ".join(said))


def _ignored(hydra: Any, given: list[str]) -> Iterator[str]:
    keys = [text.lstrip("+~").partition("=")[0] for text in given]
    for text, key in zip(given, keys, strict=True):
        # With a sweep.dir it is plain where the jobs lie: one script may serve for both.
        if key == "hydra.run.dir" and "hydra.sweep.dir" not in keys:
            yield f"{text}: the jobs of a sweep lie in hydra.sweep.dir/hydra.sweep.subdir"
        elif key.startswith(("hydra/job_logging", "hydra.job_logging")):
            yield f"{text}: the jobs of a sweep log into train.log in their folders"
    if hydra.job.name != "train":
        yield f"hydra.job.name = {hydra.job.name}: the log of a sweep's job is train.log"
    if hydra.job.chdir:
        yield "hydra.job.chdir = true: the jobs of a sweep share a process, and so a folder"
    if hydra.verbose:
        yield "hydra.verbose: the jobs of a sweep log as they do by default; run one of them alone"
    if hydra.output_subdir not in (None, _FOLDER):
        yield f"hydra.output_subdir = {hydra.output_subdir}: must be {_FOLDER} or null in a sweep"


def _deaf_callbacks(hydra: Any) -> Iterator[str]:
    """Those that want to hear of single jobs, which Hydra does not start here."""
    from hydra.experimental.callback import Callback

    for name, callback in (hydra.callbacks or {}).items():
        if not callback or "_target_" not in callback:
            continue
        kind = get_class(callback["_target_"])
        for event in ("on_job_start", "on_job_end"):
            if getattr(kind, event, None) not in (None, getattr(Callback, event)):
                yield f"hydra.callbacks.{name}: {event} is not called for the jobs of a sweep"


def set_environment(hydra: Any) -> None:
    """hydra.job.env_set, for this process and those that it starts or sends."""
    chosen = OmegaConf.to_container(hydra.job.env_set, resolve=True)
    assert isinstance(chosen, dict)
    os.environ.update({str(name): str(value) for name, value in chosen.items()})


def writes_folder(hydra: Any) -> bool:
    """Whether a job has the folder .hydra (hydra.output_subdir=null: it has none)."""
    return hydra.output_subdir is not None
