"""A run's folder: claimed for the run that works in it, and read back when that has finished."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.files import (
    Lock,
    load_tensors,
    locked,
    make_folder,
    read_json,
    remove_temporaries,
    write_json,
)
from tcsae.base.run_files import RunFiles
from tcsae.config import Config, LoadedConfig, Measured, parse_any, run_id
from tcsae.measure.analysis import Analysis
from tcsae.measure.steering import Steered, steer
from tcsae.measure.text_features import TextFeatures, TextReader, check_feature, shared_model
from tcsae.runs.feature import Feature, feature_of, in_six_lines, table_of
from tcsae.runs.unfinished import why_not_loaded
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.known import LoadedSAE, load_known

if TYPE_CHECKING:
    from pandas import DataFrame

_ADVICE = "run its command again with rerun=true"


@dataclass(frozen=True, repr=False)
class LoadedRun:
    """A finished run: its config, its SAE (on raw activations) and what was measured.

    `features(text)` reads a text as the evaluation read its own, `table()` has a row a feature,
    `feature(j)` is one of them.
    """

    folder: Path
    config: Config | LoadedConfig
    """LoadedConfig: the SAE was not trained by this run, but loaded."""
    sae: SparseAutoencoder
    final_info: dict[str, Any]
    core: dict[str, Any]
    consistency: dict[str, Any]
    metrics: list[dict[str, float]]
    """The course of training; empty where there was none."""

    def features(self, text: str | Sequence[int] | Tensor, *, parted: bool = False) -> TextFeatures:
        """The features of a text, or of token ids, at every token; see `TextReader.read`.

        The same model, hook, BOS, masks and normalisation as in training: values are those of the
        evaluation but for rounding. The language model is loaded at the first call.

        Raises:
            UserError: an empty text or one longer than a context (unless `parted`), weights that
                are not there or no longer what the run was made with.
        """
        return self.reader.read(text, parted=parted)

    def steer(
        self,
        prompt: str,
        feature: int,
        strength: float = 2.0,
        *,
        value: float | None = None,
        tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Steered:
        """Continue a prompt with a feature set at every token, beside the model as it is.

        Args:
            strength: in units of the feature's mean activation where it is on.
            value: in place of it, on the scale of the activations.
            tokens: new ones.
            temperature: 0 takes the likeliest token each time.
            seed: of the draws.

        Raises:
            UserError: as `features` and `steer`; a strength for a feature that never fired.
        """
        check_feature(feature, self.config.sae.d_sae)
        if value is None:
            usual = float(self.per_feature["mean_activation"][feature])
            if not usual > 0:
                raise UserError(
                    f"feature {feature} never fired on the held-out text: a strength has no unit; "
                    "give the value itself (value=, --value)"
                )
            value = strength * usual
        how: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "seed": seed}
        return steer(self.reader, prompt, feature, value, **how)

    def feature(self, number: int) -> Feature:
        """What was measured of one feature, with its top contexts. UserError: no such number."""
        check_feature(number, self.config.sae.d_sae)
        return feature_of(number, self.per_feature, self.analysis)

    def table(self) -> DataFrame:
        """A row a feature: every scalar of the suite, tokens and cluster where they are known.

        Raises UserError without pandas, which is not needed otherwise.
        """
        return table_of(self.per_feature, self.analysis)

    def __repr__(self) -> str:
        return in_six_lines(self.folder, self.config, self.final_info)

    @property
    def training_config(self) -> Config:
        """The config of a run that trained its SAE. Raises UserError for one that loaded it."""
        if isinstance(self.config, LoadedConfig):
            raise UserError(
                f"the SAE in {self.folder} was loaded from {self.config.source.folder}, not "
                "trained by that run: share it from there"
            )
        return self.config

    # Large, and not wanted by everybody: read when first asked for, once. Each raises UserError
    # for a damaged file.

    @cached_property
    def reader(self) -> TextReader:
        """The SAE with the language model of the run. Raises UserError where that is another now,
        or not there."""
        content = RunFiles(self.folder).content
        known = read_json(content) if content.is_file() else {}
        dtype = self.core["eval_config"].get("llm_dtype", self.config.model.dtype)
        model_config = self.config.model.model_copy(update={"dtype": dtype})
        model = shared_model(model_config, self.config.layer)
        if known.get("weights") not in (None, model.weights.identity):
            raise UserError(
                f"{model.weights.folder} holds other weights or another tokenizer than those "
                f"that the run in {self.folder} was made with: restore them"
            )
        size = self.config.dataset.context_size
        return TextReader(self.sae, model, size, self._norm_limit)

    @property
    def _norm_limit(self) -> float:
        """Norm beyond which an activation is massive; infinite where the run does not say."""
        limit = self.final_info.get("norm_limit")
        if "norm_limit" not in self.final_info and isinstance(self.config, Config):
            limit = self.core["sae_cfg_dict"].get("metadata", {}).get("norm_limit")
        return math.inf if limit is None else float(limit)

    @cached_property
    def per_feature(self) -> dict[str, Tensor]:
        """The suite's values, [F] each, and its curves."""
        return load_tensors(RunFiles(self.folder).eval.per_feature, _ADVICE)[0]

    @cached_property
    def per_context(self) -> dict[str, Tensor]:
        """Sums of each held-out context."""
        return load_tensors(RunFiles(self.folder).eval.per_context, _ADVICE)[0]

    @cached_property
    def draws(self) -> dict[str, Tensor]:
        """The suite's draws of the error of each metric; {} in a run of a version without."""
        path = RunFiles(self.folder).eval.draws
        return load_tensors(path, _ADVICE)[0] if path.is_file() else {}

    @cached_property
    def by_density(self) -> dict[str, Tensor]:
        """Sums over features of alike density; {} in a run of a version that kept none."""
        path = RunFiles(self.folder).eval.by_density
        return load_tensors(path, _ADVICE)[0] if path.is_file() else {}

    @cached_property
    def meaning(self) -> dict[str, Any]:
        """What the instruments of tcsae/meaning found, by their names: {headline: {name: {value,
        interval}}, said, ...} each. {} where none was asked for (`python -m tcsae.meaning`)."""
        path = RunFiles(self.folder).eval.meaning
        return read_json(path) if path.is_file() else {}

    @cached_property
    def analysis(self) -> Analysis | None:
        """None where it was not asked for."""
        files = RunFiles(self.folder).analysis
        return Analysis.read(files.path) if files.is_there else None


class RunFolder(RunFiles):
    """The folder of one run: who works in it, whose it is, and what it holds in the end."""

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Only one process works in a run folder. Makes the folder."""
        make_folder(self.path)
        with locked(self.lock) as lock:
            if lock is Lock.BUSY:
                raise UserError(
                    f"{self.path} is in use by another process: wait for it, or stop it"
                )
            yield

    def claim(self, config: Measured) -> None:
        """The folder is this run's, new or begun before. Raises UserError if it is another's."""
        if self.is_begun and self.has_results:
            other = run_id(parse_any(read_json(self.config)))
            if other != run_id(config):
                raise UserError(
                    f"{self.path} holds another run ({other}, this is {run_id(config)}): choose "
                    "another folder or remove it"
                )
        for part in (self.path, *(inner for inner in self.path.iterdir() if inner.is_dir())):
            remove_temporaries(part)
        write_json(self.config, config.dump())

    def load(self) -> LoadedRun:
        """Read a finished run back. Raises UserError for anything else."""
        if self.export_mark.is_file():
            raise UserError(
                f"{self.path} is an export, not a run: tcsae.load_sae reads its SAE, and "
                f"`python -m tcsae.evaluate {self.path}` makes a run of it"
            )
        if not self.is_begun or not self.is_finished:
            raise UserError(why_not_loaded(self))
        config = parse_any(read_json(self.config))
        lines: list[str] = []
        if isinstance(config, Config):
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return LoadedRun(
            folder=self.path,
            config=config,
            sae=load_sae(self.sae),
            final_info=read_json(self.final_info),
            core=read_json(self.eval.core),
            consistency=read_json(self.eval.consistency),
            metrics=[json.loads(line) for line in lines],
        )


def load_run(folder: str | Path) -> LoadedRun:
    """Read a run folder back.

    Raises UserError for a folder that is no run, or of a run that has not finished.
    """
    return RunFolder(folder).load()


def load_sae(folder: str | Path) -> SparseAutoencoder:
    """The SAE of a run or an export, or of a folder or file that SAELens, dictionary_learning,
    sparsify, Gemma Scope or OpenAI's sparse_autoencoder wrote.

    Raw activations in and out. Raises UserError if there is none or it is damaged.
    """
    return load_any_sae(folder).sae


def load_any_sae(folder: str | Path) -> LoadedSAE:
    """As `load_sae`, with what else is known of it."""
    folder = Path(folder)
    try:
        return load_known(RunFiles(folder).sae if RunFiles(folder).sae_cfg.is_file() else folder)
    except ValueError as error:
        raise UserError(str(error)) from None
