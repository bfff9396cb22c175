"""The document SAEBench's "core" evaluation writes, and the weight statistics it carries.

Names, grouping and formulas follow sae-bench 0.6.0 (`evals/core/eval_output.py`, `main.py`) so that
a run can be laid beside published ones. Shape legend: D = d_in, F = d_sae features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Elements of one block of cosine similarities: 64 MB in float32, 256 rows at 65,536 features.
_COSINE_BLOCK = 2**24

_GROUPS: dict[str, tuple[str, ...]] = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ),
}

_NO_TOKENS = "no valid token was seen"
_NOT_FINITE = "not a finite number"
_NO_OTHER_FEATURE = "there is no other feature, or the weights are not finite"
# Why a metric can be undefined although tokens were seen.
_REASONS = {
    "kl_div_score": "ablation does not change the predictions, or the logits are not finite",
    "ce_loss_score": "ablation does not change the cross-entropy, or the logits are not finite",
    "explained_variance": "the activations do not vary, or are not finite",
    "explained_variance_legacy": "a token equals the mean of its batch, or is not finite",
    "relative_reconstruction_bias": "the reconstructions are zero, or are not finite",
    **dict.fromkeys(("max_encoder_cosine_sim", "max_decoder_cosine_sim"), _NO_OTHER_FEATURE),
    "intervals": "fewer than 16 documents, or undefined without some of them",
    "average_max_encoder_cosine_sim": _NO_OTHER_FEATURE,
    "average_max_decoder_cosine_sim": _NO_OTHER_FEATURE,
}


class WeightStatistics(NamedTuple):
    """What the weights say of each feature, [F] each, named as SAEBench's feature rows."""

    encoder_bias: Tensor
    encoder_norm: Tensor
    encoder_decoder_cosine_sim: Tensor
    max_decoder_cosine_sim: Tensor
    max_encoder_cosine_sim: Tensor


@torch.no_grad()
def weight_statistics(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor) -> WeightStatistics:
    """Norms and cosines of the encoder and decoder directions.

    The cosine with a zero direction is 0. (SAEBench's encoder_decoder_cosine_sim is NaN there.)

    Args:
        W_enc: [d_in, d_sae].
        W_dec: [d_sae, d_in], of any norm.
        b_enc: [d_sae]; b_mag for a gated SAE.
    """
    dtype = torch.promote_types(W_enc.dtype, torch.float32)
    enc_FD, dec_FD = W_enc.T.to(dtype), W_dec.to(dtype)
    return WeightStatistics(
        encoder_bias=b_enc,
        encoder_norm=enc_FD.norm(dim=-1),
        encoder_decoder_cosine_sim=functional.cosine_similarity(enc_FD, dec_FD, dim=-1),
        max_decoder_cosine_sim=max_cosine_sim(dec_FD),
        max_encoder_cosine_sim=max_cosine_sim(enc_FD),
    )


def max_cosine_sim(vectors: Tensor) -> Tensor:
    """Each vector's largest cosine with any other one, [F, D] -> [F]; NaN if there is no other.

    Signed: an opposite direction counts as -1. By blocks of rows, above the diagonal only: F^2 D
    multiplications, 64 MB for the block.
    """
    unit_FD = functional.normalize(vectors, dim=-1)
    n_vectors = len(unit_FD)
    best_F = unit_FD.new_full((n_vectors,), -math.inf)
    rows = max(1, _COSINE_BLOCK // n_vectors)
    for start in range(0, n_vectors, rows):
        block = unit_FD[start : start + rows] @ unit_FD[start:].T
        block.diagonal().fill_(-math.inf)
        here, later = best_F[start : start + rows], best_F[start + rows :]
        here.copy_(torch.maximum(here, block.amax(dim=1)))
        later.copy_(torch.maximum(later, block[:, len(here) :].amax(dim=0)))
    return best_F.where(best_F != -math.inf, math.nan)


def frequency_metrics(feature_density: Tensor) -> dict[str, float]:
    """How much of the dictionary fires often, from the density [F] of each feature.

    `freq_over_p_percent`: share of features that fire on more than p % of the tokens.
    `normalized_freq_over_p_percent`: their share of all firings (0 if nothing fires). NaN if a
    density is.
    """
    density_F = feature_density.double()
    total = float(density_F.sum())
    metrics = {}
    for percent in (1, 10):
        over_F = density_F > percent / 100
        share = math.nan if math.isnan(total) else float(over_F.double().mean())
        metrics[f"freq_over_{percent}_percent"] = share
        firings = float(density_F[over_F].sum())
        metrics[f"normalized_freq_over_{percent}_percent"] = firings / total if total else 0.0
    return metrics


def saebench_eval_config(
    *,
    model_name: str,
    llm_dtype: str,
    dataset: str,
    context_size: int,
    batch_size_prompts: int,
    n_eval_reconstruction_batches: int,
    n_eval_sparsity_variance_batches: int,
) -> dict[str, Any]:
    """SAEBench's CoreEvalConfig for an evaluation that computed everything.

    `llm_dtype` is "float32" or "bfloat16"; `batch_size_prompts` counts contexts.
    """
    computed = (
        "compute_kl",
        "compute_ce_loss",
        "compute_l2_norms",
        "compute_sparsity_metrics",
        "compute_variance_metrics",
        "compute_featurewise_density_statistics",
        "compute_featurewise_weight_based_metrics",
        "exclude_special_tokens_from_reconstruction",
    )
    return {
        "model_name": model_name,
        "llm_dtype": llm_dtype,
        "batch_size_prompts": batch_size_prompts,
        "n_eval_reconstruction_batches": n_eval_reconstruction_batches,
        "n_eval_sparsity_variance_batches": n_eval_sparsity_variance_batches,
        "dataset": dataset,
        "context_size": context_size,
        **dict.fromkeys(computed, True),
        "verbose": False,
    }


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What was measured, when and how: the document's fields beside the results."""

    eval_config: Mapping[str, Any]
    """See `saebench_eval_config`; further keys are allowed."""
    eval_id: str
    """A UUID of this evaluation."""
    datetime_epoch_millis: int
    """When it was made."""
    sae_cfg_dict: Mapping[str, Any]
    """The SAE's cfg.json."""
    sae_lens_release_id: str | None
    """The set the SAE belongs to."""
    sae_lens_id: str | None = "custom_sae"
    sae_lens_version: str | None = None
    sae_bench_commit_hash: str = "Unknown"
    """"Unknown" is what SAEBench writes outside a checkout."""


def saebench_core_json(
    reconstruction: Mapping[str, float],
    model: Mapping[str, float],
    features: Mapping[str, Tensor],
    weights: WeightStatistics,
    provenance: Provenance,
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    unstructured: Mapping[str, Any] | None = None,
    no_model: str | None = None,
    undefined: float | None = None,
) -> dict[str, Any]:
    """The whole document, ready for `json.dump(..., allow_nan=False)`.

    NaN and infinity become null, and `eval_result_unstructured.missing` says why, by dotted path
    ("eval_result_metrics.shrinkage.relative_reconstruction_bias"). SAEBench's schema wants a number
    for every metric and refuses null there, so a document with a metric missing is valid JSON but
    not a valid `CoreEvalOutput`; `undefined=-1` writes SAEBench's own stand-in instead, the reason
    still beside it. Dead features alone leave nothing undefined.

    `token_stats` counts the tokens behind the means (SAEBench counts masked ones too).
    `eval_result_unstructured` also has `mse_sae_bench`, `n_predictions` and the intervals.

    Args:
        reconstruction, features: `ReconstructionMetrics.compute()` and `.compute_features()`.
        model: `ModelMetrics.compute()`.
        weights: `weight_statistics(...)`.
        intervals: (low, high) by metric, from `compute_intervals()` of both.
        unstructured: anything else worth keeping, JSON values only.
        no_model: why there is nothing of the model's predictions, where that is so.
        undefined: what stands in the metrics and feature rows for an undefined number.
    """
    reasons = _reasons(reconstruction, model, features)
    if no_model:
        reasons |= dict.fromkeys(model, no_model)
    groups = _metric_groups(reconstruction, model, features, weights)
    rows = _feature_rows(features, weights)
    results, missing = _finite(
        {"eval_result_metrics": groups, "eval_result_details": rows}, reasons, undefined
    )
    extras = {
        "mse_sae_bench": reconstruction["mse_sae_bench"],
        "n_predictions": int(model["n_predictions"]),
        "intervals": dict(intervals or {}),
        **(unstructured or {}),
    }
    rest, missing_rest = _finite(
        {**vars(provenance), "eval_result_unstructured": extras}, reasons, None
    )
    rest["eval_result_unstructured"]["missing"] = missing | missing_rest
    return {"eval_type_id": "core", **results, **rest}


def _metric_groups(
    reconstruction: Mapping[str, float],
    model: Mapping[str, float],
    features: Mapping[str, Tensor],
    weights: WeightStatistics,
) -> dict[str, dict[str, float]]:
    values = {
        **reconstruction,
        **model,
        **frequency_metrics(features["feature_density"]),
        "average_max_encoder_cosine_sim": float(weights.max_encoder_cosine_sim.mean()),
        "average_max_decoder_cosine_sim": float(weights.max_decoder_cosine_sim.mean()),
        "total_tokens_eval_reconstruction": int(model["n_tokens"]),
        "total_tokens_eval_sparsity_variance": int(reconstruction["n_tokens"]),
    }
    return {group: {name: values[name] for name in names} for group, names in _GROUPS.items()}


def _feature_rows(
    features: Mapping[str, Tensor], weights: WeightStatistics
) -> list[dict[str, float]]:
    columns = {
        "feature_density": features["feature_density"],
        "consistent_activation_heuristic": features["consistent_activation_heuristic"],
        **weights._asdict(),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"index": index, **dict(zip(columns, row, strict=True))} for index, row in enumerate(rows)
    ]


def _reasons(
    reconstruction: Mapping[str, float], model: Mapping[str, float], features: Mapping[str, Tensor]
) -> dict[str, str]:
    reasons = dict(_REASONS)
    if reconstruction["n_tokens"] == 0:
        of_density = frequency_metrics(features["feature_density"])
        reasons |= dict.fromkeys((*reconstruction, *features, *of_density), _NO_TOKENS)
    if model["n_predictions"] == 0:
        reasons |= dict.fromkeys(model, _NO_TOKENS)
    return reasons


def _finite(
    tree: Any, reasons: Mapping[str, str], stand_in: float | None
) -> tuple[Any, dict[str, str]]:
    """The tree with `stand_in` for every NaN and infinity, and the reason for each by path."""
    missing: dict[str, str] = {}

    def clean(value: Any, *path: str) -> Any:
        if isinstance(value, Mapping):
            return {name: clean(item, *path, str(name)) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, *path, str(index)) for index, item in enumerate(value)]
        if not isinstance(value, float) or math.isfinite(value):
            return value
        name = "intervals" if "intervals" in path else path[-1]
        missing[".".join(path)] = reasons.get(name, _NOT_FINITE)
        return stand_in

    return clean(tree), missing
