"""The instruments of tcsae/meaning on finished runs, those of one text together."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError
from tcsae.base.files import read_json, tensors_digest, write_json
from tcsae.base.run_files import RunFiles, runs_below
from tcsae.base.signals import StopRequest
from tcsae.config import Measured
from tcsae.data.labelled import check_labels
from tcsae.data.stream import open_held_out
from tcsae.jobs.finish import write_pages
from tcsae.meaning.held_text import HeldText
from tcsae.meaning.measured import INSTRUMENTS, headlines, measure_meaning, write_meaning
from tcsae.runs.folder import LoadedRun, RunFolder

log = logging.getLogger(__name__)


def measure_finished(
    folders: Sequence[Path], instruments: Sequence[str], settings: dict[str, Any], stop: StopRequest
) -> dict[str, dict[str, Any]]:
    """Measure every finished run in or below `folders`; {run folder: content of its meaning.json}.

    Writes each run's eval/meaning.json, its part of final_info.json, and its pages again. Runs of
    one held-out text are measured together.

    Args:
        instruments: names of `INSTRUMENTS`; what others found before stays.
        settings: values of keys of `evaluation` that hold in place of the run's own.

    Raises:
        UserError: no finished run there; an instrument that is not known; a text or weights that
            are others now than when a run was measured.
        Interrupted: a signal came; runs that were measured until then are written.
    """
    if unknown := [name for name in instruments if name not in INSTRUMENTS]:
        raise UserError(
            f"{unknown[0]}: no such instrument; there is {', '.join(sorted(INSTRUMENTS))}"
        )
    if "label_fields" in settings and "probes" not in instruments:
        raise UserError(
            "--labels names what probes learn, and probes are not among --instruments: add them, "
            "or leave it out"
        )
    runs = [_load(path) for path in _finished(folders)]
    for run in runs:
        if unfit := run.config.unfit_instruments(instruments):
            raise UserError(f"{run.folder}: {unfit}")
        if "probes" in instruments:
            fields = settings.get("label_fields", run.config.evaluation.label_fields)
            check_labels(run.config.dataset, fields)
    found = {}
    for group in _by_text(runs):
        text = _open(group[0], stop)
        for run in group:
            stop.check()
            log.info(f"-- {run.folder}")
            evaluation = run.config.evaluation.model_copy(
                update={"meaning": list(instruments), **settings}
            )
            config = run.config.model_copy(update={"evaluation": evaluation})
            found[str(run.folder)] = _measure(run, text, config)
    return found


def _finished(folders: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give runs, sweeps or folders of them")
        here = [path for path in runs_below(folder) if RunFiles(path).is_finished]
        if not here:
            raise UserError(
                f"{folder} has no finished run: train one first, or make one of an SAE from "
                "elsewhere: python -m tcsae.evaluate FOLDER"
            )
        paths += here
    return list(dict.fromkeys(paths))


def _load(path: Path) -> LoadedRun:
    return RunFolder(path).load()


def _by_text(runs: Sequence[LoadedRun]) -> list[list[LoadedRun]]:
    """Runs whose held-out activations and masks are the same, in the order given."""
    groups: dict[str, list[LoadedRun]] = {}
    for run in runs:
        parts = run.config.dump()
        key = [parts["model"], parts["layer"], parts["dataset"], run.final_info.get("norm_limit")]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return list(groups.values())


def _open(run: LoadedRun, stop: StopRequest) -> HeldText:
    limit = run.final_info.get("norm_limit")
    model, batches = open_held_out(run.config, float("inf") if limit is None else limit, stop)
    file = RunFiles(run.folder).content
    known = read_json(file) if file.is_file() else {}
    now = {
        "weights": model.content,
        "held_out_contexts": tensors_digest({"ids": batches.source.contexts.ids}),
    }
    if changed := [name for name, value in now.items() if known.get(name, value) != value]:
        raise UserError(
            f"{run.folder} was measured on other content ({', '.join(changed)} changed since): "
            "restore it, or train the run again"
        )
    return HeldText(model, batches, stop)


def _measure(run: LoadedRun, text: HeldText, config: Measured) -> dict[str, Any]:
    files = RunFiles(run.folder)
    together = write_meaning(files.eval.path, measure_meaning(run.sae, text, config))
    write_json(files.final_info, {**run.final_info, "meaning": headlines(together)})
    write_pages(_load(run.folder))
    return together
