"""A run's folder: claimed for the run that works in it, and read back when that has finished."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError
from tcsae.base.files import Lock, locked, make_folder, read_json, remove_temporaries, write_json
from tcsae.config import Config, LoadedConfig, Measured, parse_any, run_id
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.dictionary_learning import AE_NAME, load_dictionary_learning
from tcsae.sae.formats.saelens import CFG_NAME, WEIGHTS_NAME, load_saelens

EXPORT_MARK = "export.json"
"""The file that only an export has."""


@dataclass(frozen=True)
class LoadedRun:
    """A finished run: its config, its SAE (on raw activations) and what was measured."""

    folder: Path
    config: Config | LoadedConfig
    """LoadedConfig: the SAE was not trained by this run, but loaded."""
    sae: SparseAutoencoder
    final_info: dict[str, Any]
    core: dict[str, Any]
    consistency: dict[str, Any]
    metrics: list[dict[str, float]]
    """The course of training; empty where there was none."""

    @property
    def training_config(self) -> Config:
        """The config of a run that trained its SAE. Raises UserError for one that loaded it."""
        if isinstance(self.config, LoadedConfig):
            raise UserError(
                f"the SAE in {self.folder} was loaded from {self.config.source.folder}, not "
                "trained by that run: share it from there"
            )
        return self.config


# ------------------------------------------------------------------------------- working in it


@contextlib.contextmanager
def owned_folder(folder: Path) -> Iterator[None]:
    """Only one process works in a run folder."""
    with locked(make_folder(folder) / ".lock") as lock:
        if lock is Lock.BUSY:
            raise UserError(f"{folder} is in use by another process: wait for it, or stop it")
        yield


def claim_folder(config: Measured, folder: Path) -> None:
    """The folder is this run's, new or begun before. Raises UserError if it is another's."""
    own = folder / "config.json"
    # A run that was refused before its first checkpoint has nothing to lose.
    has_results = any((folder / name).exists() for name in ("checkpoint", "sae", "final_info.json"))
    if own.is_file() and has_results:
        other = run_id(parse_any(read_json(own)))
        if other != run_id(config):
            raise UserError(
                f"{folder} holds another run ({other}, this is {run_id(config)}): choose another "
                "folder or remove it"
            )
    for part in (folder, *(inner for inner in folder.iterdir() if inner.is_dir())):
        remove_temporaries(part)
    write_json(own, config.dump())


# -------------------------------------------------------------------------------- reading it


def load_run(folder: str | Path) -> LoadedRun:
    """Read a run folder back.

    Raises UserError for a folder that is no run, or of a run that has not finished.
    """
    folder = Path(folder)
    if (folder / EXPORT_MARK).is_file():
        raise UserError(
            f"{folder} is an export, not a run: tcsae.load_sae reads its SAE, and "
            f"`python -m tcsae.evaluate {folder}` makes a run of it"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run folder (no config.json there)")
    if not (folder / "final_info.json").is_file():
        raise UserError(f"the run in {folder} has not finished: run its command again to go on")
    config = parse_any(read_json(folder / "config.json"))
    lines: list[str] = []
    if isinstance(config, Config):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return LoadedRun(
        folder=folder,
        config=config,
        sae=load_sae(folder / "sae"),
        final_info=read_json(folder / "final_info.json"),
        core=read_json(folder / "eval" / "core.json"),
        consistency=read_json(folder / "eval" / "consistency.json"),
        metrics=[json.loads(line) for line in lines],
    )


def load_sae(folder: str | Path) -> SparseAutoencoder:
    """The SAE of a run or an export, or of any folder of SAELens or dictionary_learning.

    Raw activations in and out. Raises UserError if there is none or it is damaged.
    """
    return load_sae_and_cfg(folder)[0]


def load_sae_and_cfg(folder: str | Path) -> tuple[SparseAutoencoder, dict[str, Any], Path]:
    """As `load_sae`, with the content of the SAE's own JSON file, and the file of its weights."""
    folder = Path(folder)
    try:
        if (folder / "sae" / CFG_NAME).is_file():
            folder = folder / "sae"
        elif (folder / AE_NAME).is_file() and not (folder / CFG_NAME).is_file():
            return *load_dictionary_learning(folder), folder / AE_NAME
        return *load_saelens(folder), folder / WEIGHTS_NAME
    except ValueError as error:
        raise UserError(str(error)) from None
