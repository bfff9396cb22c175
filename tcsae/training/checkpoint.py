"""Checkpoints: one safetensors file each, whole or absent, the last two kept."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.files import load_tensors, make_folder, remove_temporaries, save_tensors

log = logging.getLogger(__name__)

KEPT = 2
_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def _files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file), newest first."""
    found = [(_NAME.fullmatch(f.name), f) for f in folder.glob("step-*.safetensors")]
    return sorted(((int(m[1]), f) for m, f in found if m), reverse=True)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then remove all but the last `KEPT`."""
    path = make_folder(folder) / f"step-{checkpoint.step:08d}.safetensors"
    facts = {"step": checkpoint.step, **checkpoint.facts}
    save_tensors(path, checkpoint.tensors, {"facts": json.dumps(facts)})
    _remove_older(folder)
    return path


def _remove_older(folder: Path) -> None:
    """All but the last `KEPT`."""
    for _, old in _files(folder)[KEPT:]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, run_id: str) -> Checkpoint | None:
    """The newest whole checkpoint of this run, or None.

    A damaged file is removed with a warning, and the one before it taken. Raises UserError if the
    newest whole one belongs to another config.
    """
    if not folder.is_dir():
        return None
    remove_temporaries(folder)
    for step, path in _files(folder):
        try:
            tensors, metadata = load_tensors(path, "removed; the checkpoint before it is used")
        except UserError as error:
            log.warning(str(error))
            path.unlink()  # left there, it would count as one of the newest `KEPT`
            continue
        facts = json.loads(metadata["facts"])
        if facts["run_id"] != run_id:
            raise UserError(
                f"{path} is of another configuration ({facts['run_id']}, this is {run_id}): "
                "choose another folder or remove it"
            )
        _remove_older(folder)  # a kill between a save and this leaves one more
        return Checkpoint(step, tensors, facts)
    return None
