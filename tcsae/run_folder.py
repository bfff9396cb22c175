"""A finished run read back from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcsae.config import Config, parse
from tcsae.errors import UserError
from tcsae.files import read_json
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.dictionary_learning_format import AE_NAME, load_dictionary_learning
from tcsae.sae.saelens_format import CFG_NAME, load_saelens


@dataclass(frozen=True)
class LoadedRun:
    """A finished run: its config, its SAE (on raw activations) and what was measured."""

    folder: Path
    config: Config
    sae: SparseAutoencoder
    final_info: dict[str, Any]
    core: dict[str, Any]
    consistency: dict[str, Any]
    metrics: list[dict[str, float]]


def load_run(folder: str | Path) -> LoadedRun:
    """Read a run folder back.

    Raises UserError for a folder that is no run, or of a run that has not finished.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run folder (no config.json there)")
    if not (folder / "final_info.json").is_file():
        raise UserError(f"the run in {folder} has not finished: run its command again to go on")
    sae = load_sae(folder / "sae")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return LoadedRun(
        folder=folder,
        config=parse(read_json(folder / "config.json")),
        sae=sae,
        final_info=read_json(folder / "final_info.json"),
        core=read_json(folder / "eval" / "core.json"),
        consistency=read_json(folder / "eval" / "consistency.json"),
        metrics=[json.loads(line) for line in lines],
    )


def load_sae(folder: str | Path) -> SparseAutoencoder:
    """The SAE of a run or an export, or of any folder of SAELens or dictionary_learning.

    Raw activations in and out. Raises UserError if there is none or it is damaged.
    """
    folder = Path(folder)
    try:
        if (folder / "sae" / CFG_NAME).is_file():
            return load_saelens(folder / "sae")[0]
        if (folder / AE_NAME).is_file() and not (folder / CFG_NAME).is_file():
            return load_dictionary_learning(folder)[0]
        return load_saelens(folder)[0]
    except ValueError as error:
        raise UserError(str(error)) from None
