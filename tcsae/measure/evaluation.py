"""Measures a saved SAE on held-out contexts: SAEBench's core metrics and the consistency suite.

What is measured is the SAE as saved, on raw activations in float32; masked tokens (special, first,
massive) enter no mean, and keep their original activation when the SAE is spliced into the model.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcsae.base.files import make_folder, save_tensors, write_json
from tcsae.base.json_numbers import plain
from tcsae.base.labels import SINGLES, spread_text, window_part
from tcsae.base.progress import Progress
from tcsae.base.run_files import EvalFiles
from tcsae.base.signals import StopRequest
from tcsae.base.stages import stage
from tcsae.config import Measured, run_id
from tcsae.data.activation_model import ActivationModel
from tcsae.data.batches import ActivationBatches, Batch
from tcsae.data.layout import layout_of
from tcsae.data.synthetic_model import SyntheticModel
from tcsae.measure.truth import Truth, on_truth
from tcsae.metrics.layout import LayoutShare
from tcsae.metrics.norm_limits import NormLimits, caution
from tcsae.metrics.reconstruction import (
    ForwardScore,
    ModelMetrics,
    ReconstructionMetrics,
    next_token_ce,
    score_forward,
)
from tcsae.metrics.saebench_json import (
    Provenance,
    saebench_core_json,
    saebench_eval_config,
    weight_statistics,
)
from tcsae.metrics.suite import ConsistencySuite
from tcsae.metrics.truth import flat_truth
from tcsae.metrics.units import MAX_BLOCKS, Units
from tcsae.sae.base import SparseAutoencoder

log = logging.getLogger(__name__)

# SAEBench's batch, on which explained_variance_legacy and mse_sae_bench depend.
ENCODE_CONTEXTS = 16
DIGITS = 6
"""What float32 carries, in the lists of consistency.json."""
# Elements of one logits tensor; two are held at a time.
_LOGITS = 2**26


@dataclass(frozen=True)
class Evaluation:
    """What a run's eval/ folder holds."""

    core: dict[str, Any]
    """SAEBench's document (core.json)."""
    consistency: dict[str, Any]
    """The suite's summary, and a list over features for every scalar (consistency.json)."""
    per_feature: dict[str, Tensor]
    """All of the suite's values by feature, curves too (per_feature.safetensors)."""
    per_context: dict[str, Tensor]
    """Sums of each held-out context, the document it is from, and which went through the model, to
    pair runs by (per_context.safetensors)."""
    draws: dict[str, Tensor]
    """The suite's draws of the error of each metric, for the same purpose (draws.safetensors)."""
    by_density: dict[str, Tensor]
    """Sums over features of alike density, of all documents and without each block of them, for a
    comparison at equal density (by_density.safetensors)."""
    truth: Truth | None = None
    """Of a synthetic world: what was found of its features (truth.json, truth.safetensors)."""

    def write(self, folder: Path) -> None:
        files = EvalFiles(make_folder(folder))
        save_tensors(files.per_feature, self.per_feature, {})
        save_tensors(files.per_context, self.per_context, {})
        save_tensors(files.draws, self.draws, {})
        save_tensors(files.by_density, self.by_density, {})
        if self.truth is not None:
            save_tensors(files.truth_per_feature, self.truth.per_feature, {})
            write_json(files.truth, self.truth.summary)
        write_json(files.consistency, self.consistency)
        write_json(files.core, self.core)

    @property
    def headline(self) -> dict[str, Any]:
        """Flat names and values of what people look at first."""
        groups = self.core["eval_result_metrics"]
        values = {f"eval/{k}": v for group in groups.values() for k, v in group.items()}
        for name, entry in self.consistency["summary"]["metrics"].items():
            values[f"eval/{name}"] = entry["energy_weighted"]
            if window_part(name):
                values[f"eval/{name}_median"] = entry["median"]
                values[f"eval/{name}_q99"] = entry["q99"]
        for name in SINGLES:
            if name in self.consistency["summary"]:
                values[f"eval/{name}"] = self.consistency["summary"][name]["value"]
        if self.truth is not None:
            values |= {f"eval/{k}": v for k, v in flat_truth(self.truth.summary).items()}
        return values

    def lines(self) -> list[str]:
        """The headline as text, with intervals where there are some."""
        groups = self.core["eval_result_metrics"]
        shown = [
            ("explained variance", "reconstruction_quality", "explained_variance"),
            ("l2 ratio", "shrinkage", "l2_ratio"),
            ("L0", "sparsity", "l0"),
            ("share of live features", "misc_metrics", "frac_alive"),
            ("CE loss score", "model_performance_preservation", "ce_loss_score"),
            ("KL div score", "model_behavior_preservation", "kl_div_score"),
        ]
        out = [
            f"{label:<28} {_number(groups[group][key])}"
            for label, group, key in shown
            if self.truth is None or not group.startswith("model_")
        ]
        if self.truth is not None:
            out += _truth_lines(self.truth.summary)
        summary = self.consistency["summary"]
        for name, label in (
            ("C_8", "window consistency C_8"),
            ("L_8", "local consistency L_8"),
            ("D_8", "document part D_8"),
            ("L_8_sparse", "L_8 of sparse features"),
            ("rho_1", "autocorrelation rho_1"),
            ("tau_int", "correlation time (tokens)"),
            ("omega_squared", "position share omega^2"),
        ):
            if (entry := summary["metrics"].get(name)) is not None:
                line = _line(label, entry["energy_weighted"], entry["energy_weighted_interval"])
                spread = spread_text(entry) if name in ("C_8", "L_8") else ""
                out.append(f"{line}  ({spread})" if spread else line)
        if (entry := summary.get("edge_energy")) is not None:
            out.append(_line("edge energy", entry["value"], entry["interval"]))
        return out


def _truth_lines(summary: dict[str, Any]) -> list[str]:
    parts = {"true features": summary["all"], "slow ones": summary.get("slow")}
    lines = [
        f"{f'{name} found':<28} {_number(part['found'])}  ({part['n_found']} of {part['n']}; "
        f"F1 {_number(part['f1'])}, pieces a run {_number(part['pieces'])}, lag "
        f"{_number(part['lag'])})"
        for name, part in parts.items()
        if part is not None
    ]
    mcc, null = _number(summary["mcc"]), _number(summary["mcc_random"])
    return [f"{'MCC of decoder directions':<28} {mcc}  (random ones {null})", *lines]


def _line(label: str, value: float | None, interval: Sequence[float | None]) -> str:
    low, high = interval
    band = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
    return f"{label:<28} {_number(value)}{band}"


def _number(value: float | None) -> str:
    return "  n/a" if value is None else f"{value:.3f}"


@torch.inference_mode()
def evaluate(
    sae: SparseAutoencoder,
    config: Measured,
    model: ActivationModel,
    batches: ActivationBatches,
    stop: StopRequest,
    sae_cfg: dict[str, Any],
    behaviour: ModelMetrics,
) -> Evaluation:
    """Everything that is measured at the end of a run.

    `sae_cfg` is the exported cfg.json, `behaviour` what `on_the_model` found for this SAE.

    Raises Interrupted if a signal comes.
    """
    sae = sae.to(batches.device).eval()
    units = held_out_units(batches)
    layout = None if model.no_model is not None else _layout(model, batches)
    seen = on_activations(sae, config, batches, units, stop, layout)
    evaluation = _evaluation(sae, config, model, batches, units, sae_cfg, behaviour, *seen)
    if isinstance(model, SyntheticModel):
        with stage("truth"):
            truth = on_truth(sae, model.world, batches, stop)
        return replace(evaluation, truth=truth)
    return evaluation


@stage("intervals")
def _evaluation(
    sae: SparseAutoencoder,
    config: Measured,
    model: ActivationModel,
    batches: ActivationBatches,
    units: Units,
    sae_cfg: dict[str, Any],
    behaviour: ModelMetrics,
    reconstruction: ReconstructionMetrics,
    suite: ConsistencySuite,
    limits: NormLimits,
    layout: LayoutShare | None,
) -> Evaluation:
    """What was accumulated, as numbers with intervals."""
    by_limit = limits.compute()
    through_model = model_contexts(config, units)
    if config.evaluation.intervals:
        log.info(f"intervals: all metrics again without each of {units.n_documents} documents")
    core = saebench_core_json(
        reconstruction.compute(),
        behaviour.compute(),
        reconstruction.compute_features(),
        weight_statistics(sae.W_enc, sae.W_dec, sae.b_enc),
        Provenance(
            eval_config=_eval_config(config, model, len(batches)),
            eval_id=str(uuid.uuid4()),
            datetime_epoch_millis=int(time.time() * 1000),
            sae_cfg_dict=sae_cfg,
            sae_lens_release_id=f"tcsae/{run_id(config)}",
        ),
        intervals=reconstruction.compute_intervals(units=units)
        | behaviour.compute_intervals(units=units.subset(through_model)),
        no_model=model.no_model,
        unstructured={
            "explained_variance_by_norm_limit": by_limit,
            "norm_limit_caution": caution(by_limit, config.dataset.norm_filter),
        },
    )
    per_feature, summary = suite.per_feature(), suite.summary()
    if layout is not None:
        per_feature["layout_share"] = layout.compute()
        summary["layout"] = layout.summary(per_feature["c0"])
    scalars = {k: plain(v, DIGITS) for k, v in per_feature.items() if v.ndim == 1}
    return Evaluation(
        core=core,
        consistency={"summary": summary, "per_feature": scalars},
        per_feature={k: v.float() if v.is_floating_point() else v for k, v in per_feature.items()},
        per_context=_per_context(reconstruction, behaviour)
        | {"document": units.document, "model_context": through_model},
        draws={name: value.float() for name, value in suite.draws().items()},
        by_density={name: value.float() for name, value in suite.by_density().items()},
    )


def _per_context(
    reconstruction: ReconstructionMetrics, behaviour: ModelMetrics
) -> dict[str, Tensor]:
    named = {"reconstruction": reconstruction, "model": behaviour}
    return {f"{kind}.{k}": v for kind, m in named.items() for k, v in m.context_sums().items()}


def held_out_units(batches: ActivationBatches) -> Units:
    """The documents of the held-out contexts: one object for all that is measured on them."""
    return Units(batches.source.contexts.documents)


def model_contexts(config: Measured, units: Units) -> Tensor:
    """Which held-out contexts go through the model: of as many documents as can be."""
    return units.spread(config.evaluation.model_contexts)


def _eval_config(config: Measured, model: ActivationModel, n_contexts: int) -> dict[str, Any]:
    n_model = min(config.evaluation.model_contexts, n_contexts)
    return saebench_eval_config(
        model_name=config.model.name,
        llm_dtype=str(model.dtype).removeprefix("torch."),
        dataset=config.dataset.path or config.dataset.name,
        context_size=config.dataset.context_size,
        batch_size_prompts=ENCODE_CONTEXTS,
        n_eval_reconstruction_batches=-(-n_model // ENCODE_CONTEXTS),
        n_eval_sparsity_variance_batches=-(-n_contexts // ENCODE_CONTEXTS),
    ) | {"hook_name": model.hook_name, **config.evaluation.model_dump(mode="json")}


@stage("evaluate features")
def on_activations(
    sae: SparseAutoencoder,
    config: Measured,
    batches: ActivationBatches,
    units: Units,
    stop: StopRequest,
    layout: Tensor | None = None,
) -> tuple[ReconstructionMetrics, ConsistencySuite, NormLimits, LayoutShare | None]:
    """Accumulate every metric in one pass over the held-out activations. Raises Interrupted.

    `layout` [N, T] bool says which tokens are layout; None: that is not asked.
    """
    cfg, size = config.evaluation, config.dataset.context_size
    reconstruction = ReconstructionMetrics(sae.d_in, sae.d_sae)
    suite = ConsistencySuite(
        sae.d_sae,
        size,
        max_lag=cfg.max_lag,
        windows=tuple(cfg.windows),
        n_blocks=MAX_BLOCKS if cfg.intervals else 0,
        n_boot=cfg.bootstrap,
        groups=sae.cfg.group_sizes,
        units=units,
    )
    median_norm = batches.calibration.median_norm
    limits = NormLimits(sae.d_in, median_norm, config.dataset.norm_filter)
    shares = None if layout is None else LayoutShare(sae.d_sae)
    done = 0
    with Progress("evaluate features", len(batches) * size) as progress:
        for batch in batches.in_order(ENCODE_CONTEXTS):
            stop.check()
            x = batch.x.float()
            features, x_hat = sae.encode_and_decode(x, segments=batch.segments, valid=batch.valid)
            reconstruction.update(x, x_hat, features, valid=batch.valid)
            # An SAE that reads a token's past has no codes at tokens that are not valid.
            encoded = batch.valid if sae.sequential else batch.not_special
            limits.update(x, x_hat, counted=batch.not_special, encoded=encoded)
            suite.update(features, segments=batch.segments, valid=batch.valid, inputs=x)
            if shares is not None and layout is not None:
                shares.update(features, layout[done : done + len(x)], batch.valid)
            done += len(x)
            progress.update(batch.valid.numel())
    return reconstruction, suite, limits, shares


def _layout(model: ActivationModel, batches: ActivationBatches) -> Tensor:
    contexts = batches.source.contexts
    return layout_of(contexts.ids, contexts.segments, contexts.valid, model.texts())


@torch.inference_mode()
def on_the_model(
    saes: Sequence[SparseAutoencoder],
    config: Measured,
    model: ActivationModel,
    batches: ActivationBatches,
    stop: StopRequest,
) -> list[ModelMetrics]:
    """Cross-entropy and KL with each SAE spliced in, and with the hook's tensor set to zero.

    The model as it is, and with zeros, is run once for all SAEs, and what comes before the hook
    once for all of that; of `config` only
    evaluation.model_contexts and the size of a context matter. Where there is no language model
    no token is counted, and all is NaN. Raises Interrupted if a signal comes.
    """
    if model.no_model is not None:
        return [_no_behaviour(config, batches) for _ in saes]
    language_model: Any = model  # or what stands for one where its work is counted
    saes = [sae.to(batches.device).eval() for sae in saes]
    metrics = [ModelMetrics() for _ in saes]
    chosen = model_contexts(config, held_out_units(batches))
    size = config.dataset.context_size
    at_once = max(1, min(ENCODE_CONTEXTS, _LOGITS // (size * model.vocabulary)))
    # In tokens through the model.
    with Progress("evaluate model", len(chosen) * size * (2 + len(saes))) as progress:
        for batch in batches.in_order(at_once, indices=chosen):
            stop.check()
            with language_model.repeated(batch.ids) as logits:
                clean = logits()
                ids, keep = batch.ids.to(clean.device), batch.valid.to(clean.device)
                ce = next_token_ce(clean, ids, keep)
                ablated = score_forward(clean, logits(torch.zeros_like), ids, keep)
                progress.update(2 * ids.numel())
                for sae, metric in zip(saes, metrics, strict=True):
                    stop.check()
                    changed = score_forward(clean, logits(_splice(sae, batch)), ids, keep)
                    metric.add(ce, changed, ablated, keep=keep)
                    progress.update(ids.numel())
    return metrics


def _no_behaviour(config: Measured, batches: ActivationBatches) -> ModelMetrics:
    """Of the contexts that would go through the model, no token counted."""
    metrics = ModelMetrics()
    n = len(model_contexts(config, held_out_units(batches)))
    nothing = torch.zeros(n, dtype=torch.float64)
    score = ForwardScore(nothing, nothing)
    keep = torch.zeros(n, config.dataset.context_size, dtype=torch.bool)
    metrics.add(nothing, score, score, keep=keep)
    return metrics


def _splice(sae: SparseAutoencoder, batch: Batch) -> Any:
    def replace(x_BTD: Tensor) -> Tensor:
        # The model, or this block of it, may be on another device than the SAE and the batch.
        x = x_BTD.to(sae.device).float()
        reconstructed = sae(x, segments=batch.segments, valid=batch.valid).to(x_BTD)
        return torch.where(batch.valid[..., None].to(x_BTD.device), reconstructed, x_BTD)

    return replace
