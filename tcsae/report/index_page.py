"""`index.html` over a folder: all runs below it in a table, with links to their pages and to those
of the comparisons that they are in. Files of results alone are read, no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.base.labels import number
from tcsae.base.run_files import REPORT, RunFiles, runs_below
from tcsae.config import AVERAGED, LoadedConfig, parse_any
from tcsae.report.page import write_page

INDEX = "index.html"
COMPARISON = "comparison.json"


def write_index(folder: Path) -> Path:
    """Write the page over `folder` into it. Raises UserError where it is none or holds no run."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    runs = [run for run in runs_below(folder) if RunFiles(run).is_begun]
    if not runs:
        raise UserError(f"{folder} holds no run (no config.json in or below it)")
    context = {
        "comparisons": [_comparison(found, folder) for found in _comparisons(folder)],
        "rows": [_row(run, folder) for run in runs],
        "head": HEAD,
        "n_finished": sum(RunFiles(run).is_finished for run in runs),
    }
    title = f"{len(runs)} runs in {folder.resolve().name}"
    return write_page(folder / INDEX, "index.html.j2", title, context, {}, {})


def link(target: Path, start: Path) -> str | None:
    """The address of a file for a page in the folder `start`; None where it is not there."""
    if not target.is_file():
        return None
    relative = os.path.relpath(target.resolve(), start.resolve())
    return quote(Path(relative).as_posix())


def _comparisons(folder: Path) -> Iterator[Path]:
    """Folders with a comparison, links and hidden ones not entered."""
    for root, names, files in os.walk(folder):
        names[:] = sorted(n for n in names if not n.startswith("."))
        if COMPARISON in files:
            yield Path(root)


def _comparison(file: Path, folder: Path) -> dict[str, Any]:
    content = read_json(file / COMPARISON)
    runs = [run for run in content["runs"] if run["status"] == "used"]
    return {
        "name": os.path.relpath(file, folder),
        "href": link(file / REPORT, folder),
        "n_runs": len(runs),
        "answers": content["answers"],
    }


def _row(run: Path, folder: Path) -> dict[str, Any]:
    files = RunFiles(run)
    row: dict[str, Any] = {
        "name": os.path.relpath(run, folder),
        "href": link(files.report, folder),
        "notes": link(files.notes, folder),
        "cells": [],
        "status": "" if files.is_finished else "not finished",
    }
    try:
        row["cells"] = _cells(files)
    except (UserError, LookupError, TypeError, AttributeError) as error:
        row["status"] = f"cannot be read: {error}".splitlines()[0]
    return row


HEAD = (
    *("model", "layer", "text", "SAE", "loss", "window", "lambda", "seed", "explained variance"),
    *("L0", "C_8", "median", "L_8", "median", "omega²"),
)
"""The columns of `cells`."""


def _cells(files: RunFiles) -> list[str]:
    config = parse_any(read_json(files.config))
    cells = [config.model.name, str(config.layer), config.dataset.name]
    cells.append(f"{config.sae.architecture} {config.sae.d_sae:,}")
    if isinstance(config, LoadedConfig):
        cells += ["not trained here", "", "", ""]
    else:
        loss = config.loss_words if config.lambda_ or config.averaged else "none"
        shuffled = " shuffled" if config.consistency.shuffle_positions else ""
        has_loss = loss not in ("none", AVERAGED)
        cells += [f"{loss}{shuffled if has_loss else ''}", str(config.window) if has_loss else ""]
        cells += [f"{config.lambda_:g}" if has_loss else "", str(config.seed)]
    if not files.is_finished:
        return cells + [""] * (len(HEAD) - len(cells))
    info = read_json(files.final_info)
    core = {k: v for group in info["metrics"].values() for k, v in group.items()}
    cells += [number(core.get("explained_variance")), number(core.get("l0"))]
    metrics = info["consistency"]["metrics"]
    for name in ("C_8", "L_8"):
        entry = metrics.get(name, {})
        cells += [number(entry.get("energy_weighted")), number(entry.get("median"))]
    return [*cells, number(metrics.get("omega_squared", {}).get("energy_weighted"))]
