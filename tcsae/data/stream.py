"""The activations of one job, or of a bank of jobs that share them: contexts, harvest, scale."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tcsae.base.files import tensors_digest
from tcsae.base.signals import StopRequest
from tcsae.config import Measured
from tcsae.data.activation_model import ActivationModel
from tcsae.data.batches import ActivationBatches, Calibration, calibrate
from tcsae.data.context_cache import load_or_build_contexts
from tcsae.data.contexts import Contexts, contexts_of
from tcsae.data.corpora import text_identity
from tcsae.data.devices import choose_device
from tcsae.data.labelled import check_labels
from tcsae.data.language_model import LanguageModel
from tcsae.data.store import ActivationStore, KeptSource, ReadSource, StreamSource
from tcsae.data.synthetic_model import SyntheticModel
from tcsae.data.vectors_model import VectorsModel

log = logging.getLogger(__name__)

MOST_KEPT_BYTES = 2**30
"""Largest held-out activations that are kept in memory for all that is measured on them."""


@dataclass(frozen=True)
class Stream:
    """Training and held-out activations of one job (or of a bank of jobs that share them)."""

    model: ActivationModel
    train: ActivationBatches
    evaluation: ActivationBatches
    text: str | None
    """Of local files, by their content."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What the first run measured here has made for all of a bank, by whoever made it."""
    one_by_one: threading.RLock = field(default_factory=threading.RLock)
    """For `kept`, and for whatever runs the model: several runs may be measured at a time."""

    @property
    def device(self) -> str:
        """Where the batches are, and so the SAE; the model may be elsewhere."""
        return self.train.device

    @property
    def sides(self) -> tuple[ActivationBatches, ActivationBatches]:
        """What is trained on, and what is held out."""
        return self.train, self.evaluation

    @cached_property
    def passage(self) -> ActivationBatches | None:
        """One held-out document as it stands, for pictures: no metric is of it. None: contexts that
        an older version packed have none."""
        ids = self.evaluation.source.contexts.passage
        if not len(ids):
            return None
        source = KeptSource(self.model, contexts_of(ids, self.model.special_ids))
        return ActivationBatches(source, self.train.calibration, self.device)

    def read_once(self, stop: StopRequest, *, for_threads: bool = False) -> Stream:
        """The same with the held-out activations in memory, if they are not too many: read, or
        computed, once for all passes over them, which may then be in several threads."""
        batches, source = self.evaluation, self.evaluation.source
        if source.is_read and not for_threads:
            return self
        if source.contexts.ids.numel() * self.model.d_in * 4 > MOST_KEPT_BYTES:
            return self
        kept = ReadSource(source, self.model.cfg.forward_contexts, stop)
        evaluation = ActivationBatches(kept, batches.calibration, batches.device)
        made = replace(self, evaluation=evaluation)
        # Of the model, which one thread alone may run.
        if for_threads and made.passage is not None:
            made.passage.source.activations(torch.arange(1))
        return made

    @property
    def is_in_memory(self) -> bool:
        """Whether several threads may read the held-out activations."""
        return isinstance(self.evaluation.source, ReadSource)

    @cached_property
    def content(self) -> dict[str, str]:
        """Names of what was really read, whatever paths the config has."""
        parts = {"training_contexts": self.train, "held_out_contexts": self.evaluation}
        ids = {name: {"ids": part.source.contexts.ids} for name, part in parts.items()}
        text = {} if self.text is None else {"text": self.text}
        digests = {name: tensors_digest(tensors) for name, tensors in ids.items()}
        return {"weights": self.model.content, **digests, **text}


def open_model(config: Measured) -> ActivationModel:
    """The language model of the config, or what is in its place; UserError if there is none."""
    if config.model.world is not None:
        return SyntheticModel(config.model, config.layer)
    if config.model.is_given:
        return VectorsModel(config.model, config.dataset, config.layer)
    also = config.store.also if config.store.mode == "disk" else ()
    return LanguageModel(config.model, config.layer, also)


def open_stream(
    config: Measured, stop: StopRequest, model: ActivationModel | None = None
) -> Stream:
    """Pack the contexts, harvest (or stream) the activations, and compute masks and scale.

    `model`: that of the config, where it is at hand already.
    """
    if "probes" in config.evaluation.meaning:
        check_labels(config.dataset, config.evaluation.label_fields)
    sae_device = _sae_device(config)
    model, contexts = open_contexts(config, stop, model)
    root = _root(config)
    sources: list[Any] = []
    for what, part in zip(("harvest", "harvest (held-out)"), contexts, strict=True):
        if config.store.mode == "stream":
            sources.append(StreamSource(model, part))
            continue
        store = ActivationStore(root, model, part, config.store.shard_contexts)
        store.harvest(stop, what)
        sources.append(store)
    calibration = calibrate(sources[0], config.dataset.norm_filter)
    log.info(
        f"{len(contexts[0].ids)} training and {len(contexts[1].ids)} held-out contexts; median "
        f"norm {calibration.median_norm:.4g}, {100 * calibration.massive_share:.2f} % massive "
        "tokens left out"
    )
    device = sae_device or model.device
    train, evaluation = (ActivationBatches(s, calibration, device) for s in sources)
    return Stream(model, train, evaluation, text_identity(config.dataset))


def open_held_out(
    config: Measured, norm_limit: float, stop: StopRequest
) -> tuple[ActivationModel, ActivationBatches]:
    """The held-out side alone, for a finished run: nothing of the training side is harvested.

    norm_limit: that of the run, beyond which a token is massive.
    """
    sae_device = _sae_device(config)
    model = open_model(config)
    root = _root(config)
    _, (_, contexts) = open_contexts(config, stop, model)
    source: Any = StreamSource(model, contexts)
    if config.store.mode == "disk":
        source = ActivationStore(root, model, contexts, config.store.shard_contexts)
        source.harvest(stop, "harvest (held-out)")
    unknown = Calibration(math.nan, norm_limit, math.nan, torch.empty(0, model.d_in))
    return model, ActivationBatches(source, unknown, sae_device or model.device)


def open_contexts(
    config: Measured, stop: StopRequest, model: ActivationModel | None = None
) -> tuple[ActivationModel, tuple[Contexts, Contexts]]:
    """The model, its weights found or fetched but not loaded, and training and held-out contexts.

    Raises UserError for weights or text that cannot be had.
    """
    model = model or open_model(config)
    if isinstance(model, SyntheticModel | VectorsModel):
        return model, model.contexts(config.dataset)
    assert isinstance(model, LanguageModel)
    return model, load_or_build_contexts(config.dataset, model, _root(config), stop)


def _sae_device(config: Measured) -> str | None:
    """None: where the model is. UserError if it is not there, before anything is loaded."""
    wanted = config.sae_device
    return None if wanted is None else choose_device(wanted, "training.device")


def _root(config: Measured) -> Path:
    return Path(config.store.dir).expanduser()
