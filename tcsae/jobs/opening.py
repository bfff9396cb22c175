"""`tcsae.open`: a run, the latest one of a folder, one by its settings, or an SAE of SAELens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.base.run_files import RunFiles, runs_below
from tcsae.config import LoadedConfig
from tcsae.config.mistakes import for_the_user
from tcsae.jobs.foreign import ForeignSAE, composed, from_folder
from tcsae.measure.steering import Steered, steer
from tcsae.measure.text_features import TextFeatures, TextReader, shared_model
from tcsae.report.runs import flat
from tcsae.runs.folder import LoadedRun, load_run
from tcsae.runs.unfinished import why_not_loaded
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.known import is_known


@dataclass(frozen=True, repr=False)
class OpenedSAE:
    """An SAE from elsewhere, with the model it says it was made for. Nothing is measured of it:
    `python -m tcsae.evaluate FOLDER` makes a run of it."""

    folder: Path
    found: ForeignSAE
    config: LoadedConfig

    @property
    def sae(self) -> SparseAutoencoder:
        """On raw activations."""
        return self.found.sae

    @cached_property
    def reader(self) -> TextReader:
        """Raises UserError for a model that is not there or of another width."""
        model = shared_model(self.config.model, self.config.layer)
        if model.d_in != self.sae.d_in:
            raise UserError(
                f"{self.folder}: d_in is {self.sae.d_in}, against {model.d_in} of "
                f"{self.config.model.name} at {model.hook_name}: it was made for another model"
            )
        metadata = self.found.cfg.get("metadata")
        limit = metadata.get("norm_limit") if isinstance(metadata, Mapping) else None
        # Only SAEs of this package say it; elsewhere no token is taken to be massive.
        norm_limit = float(limit) if isinstance(limit, int | float) else math.inf
        return TextReader(self.sae, model, self.config.dataset.context_size, norm_limit)

    def features(self, text: str | Sequence[int] | Tensor, *, parted: bool = False) -> TextFeatures:
        """As `LoadedRun.features`."""
        return self.reader.read(text, parted=parted)

    def steer(
        self,
        prompt: str,
        feature: int,
        strength: float = 2.0,
        *,
        value: float | None = None,
        **how: Any,
    ) -> Steered:
        """As `LoadedRun.steer`, by `value` alone: there is no measured mean to be strong by."""
        if value is None:
            raise UserError(
                f"nothing was measured of {self.folder}, so that a strength has no unit: give the "
                f"value itself (value=, --value), or make a run of it: python -m tcsae.evaluate "
                f"{self.folder}"
            )
        return steer(self.reader, prompt, feature, value, **how)

    def __repr__(self) -> str:
        source = self.found.source
        return "\n".join(
            (
                f"SAE in {self.folder} ({source.library})",
                f"  {source.architecture}, {self.sae.d_sae:,} features of {self.sae.d_in} "
                f"dimensions; made for {source.made_for or 'it does not say what'}",
                f"  read with {self.config.model.name}, layer {self.config.layer}, contexts of "
                f"{self.config.dataset.context_size} tokens",
                f"  not measured: python -m tcsae.evaluate {self.folder} makes a run of it",
                "  .features(text)  .sae",
            )
        )


def open_(folder: str | Path, **settings: Any) -> LoadedRun | OpenedSAE:
    """A finished run; of a folder of runs the latest; of an SAE alone what can be read with it.

    Args:
        folder: of a run, of runs (a sweep, outputs/), an export, or an SAE that `load_sae` reads.
        settings: what the run must have, keys of its config with __ for the dot and `lambda_` for
            lambda: `lambda_=0, sae__k=32`. Of an SAE alone: what it does not say of itself
            (`model__path=...`).

    Raises:
        UserError: nothing finished is there, none has these settings, a key that no run has.
    """
    folder = Path(folder)
    if not folder.is_dir() and not is_known(folder):
        raise UserError(f"{folder} is not a folder: give a run, a folder of runs, or an SAE's")
    wanted = {k.rstrip("_").replace("__", "."): v for k, v in settings.items()}
    files = RunFiles(folder)
    # First: a folder of dictionary_learning has a config.json too.
    if is_known(folder) or files.export_mark.is_file():
        found = from_folder(folder)
        overrides = [f"++{k}={v}" if "." in k else f"{k}={v}" for k, v in wanted.items()]
        return OpenedSAE(folder, found, _composed(found, overrides))
    if files.is_begun:
        _check_settings(folder, wanted)
        return load_run(folder)
    return load_run(_latest(folder, wanted))


def _composed(found: ForeignSAE, overrides: Sequence[str]) -> LoadedConfig:
    try:
        return composed(found, overrides)
    # Hydra's, OmegaConf's and pydantic's, which the commands put into words as well.
    except Exception as error:
        said = for_the_user(error)
        if said is None:
            raise
        raise UserError(said) from None


def _latest(folder: Path, wanted: Mapping[str, Any]) -> Path:
    begun = [run for run in runs_below(folder) if RunFiles(run).is_begun]
    finished = [run for run in begun if RunFiles(run).is_finished]
    if not finished:
        if len(begun) == 1:
            raise UserError(why_not_loaded(RunFiles(begun[0])))
        said = f"{len(begun)} unfinished" if begun else "no"
        raise UserError(
            f"{folder} has {said} runs: "
            + (f"python -m tcsae.status {folder} says more" if begun else "train one first")
        )
    configs = {run: dict(flat(read_json(RunFiles(run).config))) for run in finished}
    for key in wanted:
        if not any(key in config for config in configs.values()):
            raise UserError(f"{key}: no run in {folder} has such a key")
    chosen = [run for run in finished if _has(configs[run], wanted)]
    if not chosen:
        said = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise UserError(f"none of the {len(finished)} finished runs in {folder} has {said}")
    return max(chosen, key=lambda run: RunFiles(run).final_info.stat().st_mtime)


def _check_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    if wanted and not _has(dict(flat(read_json(RunFiles(folder).config))), wanted):
        said = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise UserError(f"the run in {folder} does not have {said}")


def _has(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(key in config and config[key] == value for key, value in wanted.items())
