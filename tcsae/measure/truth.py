"""A saved SAE against the world that its activations come from. Fills <run>/eval/truth.*.

truth.json          `Truth.summary`
truth.safetensors   `Truth.per_feature`, [F] each, F true features
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcsae.base.json_numbers import plain
from tcsae.base.progress import Progress
from tcsae.base.signals import StopRequest
from tcsae.data.batches import ActivationBatches
from tcsae.data.synthetic import World
from tcsae.metrics.reconstruction import ReconstructionMetrics
from tcsae.metrics.truth import TruthMetrics
from tcsae.sae.base import SparseAutoencoder

log = logging.getLogger(__name__)

ENCODE_CONTEXTS = 16
DIGITS = 6


@dataclass(frozen=True)
class Truth:
    """What an SAE found of what there is."""

    summary: dict[str, Any]
    """`TruthMetrics.compute`, null where there is nothing; and `oracle`: {explained_variance, l0}
    of the true features themselves, which score 1 everywhere else (pieces 1, and 0 for what is
    better low): the most that can be had in spite of the noise."""
    per_feature: dict[str, Tensor]
    """`TruthMetrics.per_feature`, and `class` [F] int64, index into the summary's `by_class`."""


@torch.inference_mode()
def on_truth(
    sae: SparseAutoencoder, world: World, batches: ActivationBatches, stop: StopRequest
) -> Truth:
    """Match the SAE's features with the world's and follow them over the held-out contexts.

    Raises Interrupted if a signal comes.
    """
    log.info(f"matching {sae.d_sae} features with the {world.n_true} true ones")
    metrics = TruthMetrics(
        sae.W_dec.detach(),
        world.decoder,
        class_of=world.class_of,
        class_names=world.cfg.class_names,
        slow=world.cfg.slow,
        parent=world.parent,
    )
    oracle = ReconstructionMetrics(world.cfg.d_in, world.n_true)
    size = batches.source.contexts.ids.shape[1]
    with Progress("evaluate against the truth", len(batches) * size) as progress:
        for batch in batches.in_order(ENCODE_CONTEXTS):
            stop.check()
            features = sae.encode(batch.x.float(), segments=batch.segments, valid=batch.valid)
            truth = world.codes(batch.ids.cpu())
            masks = {"segments": batch.segments.cpu(), "valid": batch.valid.cpu()}
            metrics.update(features, truth, **masks)
            x = batch.x.float().cpu()
            oracle.update(x, truth @ world.decoder, truth, valid=masks["valid"])
            progress.update(batch.valid.numel())
    best = oracle.compute()
    found = metrics.compute() | {"oracle": {k: best[k] for k in ("explained_variance", "l0")}}
    return Truth(plain(found, DIGITS), metrics.per_feature() | {"class": world.class_of})
