"""The SAEBench document against its schema, and the weight statistics against brute force."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, create_model
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from tcsae.metrics import saebench_json
from tcsae.metrics.reconstruction import (
    ModelMetrics,
    ReconstructionMetrics,
    next_token_ce,
    score_forward,
)
from tcsae.metrics.saebench_json import (
    Provenance,
    WeightStatistics,
    frequency_metrics,
    max_cosine_sim,
    saebench_core_json,
    saebench_eval_config,
    weight_statistics,
)

B, T, D, F, V = 18, 8, 6, 10, 13


def model_of(name: str, kind: type, fields: str) -> type[BaseModel]:
    """A model whose fields are all required and of one type."""
    return create_model(name, **{field: (kind, ...) for field in fields.split()})


# The fields of sae-bench 0.6.0's CoreEvalOutput, all required, none of its numbers nullable.
Metrics = create_model(
    "Metrics",
    model_behavior_preservation=model_of(
        "Behavior", float, "kl_div_score kl_div_with_ablation kl_div_with_sae"
    ),
    model_performance_preservation=model_of(
        "Performance",
        float,
        "ce_loss_score ce_loss_with_ablation ce_loss_with_sae ce_loss_without_sae",
    ),
    reconstruction_quality=model_of(
        "Quality", float, "explained_variance explained_variance_legacy mse cossim"
    ),
    shrinkage=model_of(
        "Shrinkage", float, "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias"
    ),
    sparsity=model_of("Sparsity", float, "l0 l1"),
    token_stats=model_of(
        "Tokens", int, "total_tokens_eval_reconstruction total_tokens_eval_sparsity_variance"
    ),
    misc_metrics=model_of(
        "Misc",
        float,
        "freq_over_1_percent freq_over_10_percent normalized_freq_over_1_percent "
        "normalized_freq_over_10_percent average_max_encoder_cosine_sim "
        "average_max_decoder_cosine_sim frac_alive",
    ),
)
Feature = create_model(
    "Feature",
    __base__=model_of(
        "FeatureFloats",
        float,
        "feature_density consistent_activation_heuristic encoder_bias encoder_norm "
        "encoder_decoder_cosine_sim max_decoder_cosine_sim max_encoder_cosine_sim",
    ),
    index=(int, ...),
)
EvalConfig = create_model(
    "EvalConfig",
    **{name: (str, ...) for name in ("model_name", "llm_dtype", "dataset")},
    **{
        name: (int, ...)
        for name in (
            "batch_size_prompts",
            "n_eval_reconstruction_batches",
            "n_eval_sparsity_variance_batches",
            "context_size",
        )
    },
    **{
        name: (bool, ...)
        for name in (
            "compute_kl",
            "compute_ce_loss",
            "compute_l2_norms",
            "compute_sparsity_metrics",
            "compute_variance_metrics",
            "compute_featurewise_density_statistics",
            "compute_featurewise_weight_based_metrics",
            "exclude_special_tokens_from_reconstruction",
            "verbose",
        )
    },
)


class CoreEvalOutput(BaseModel):
    eval_type_id: str
    eval_config: EvalConfig
    eval_id: str
    datetime_epoch_millis: int
    eval_result_metrics: Metrics
    eval_result_details: list[Feature]
    sae_bench_commit_hash: str
    sae_lens_id: str | None
    sae_lens_release_id: str | None
    sae_lens_version: str | None
    sae_cfg_dict: dict[str, Any] | None
    eval_result_unstructured: Any | None


def document(
    x_hat_scale: float = 0.9,
    bias: float = 1.0,
    dead: tuple[int, ...] = (0, 3),
    valid: bool = True,
    contexts: int = B,
    weights: WeightStatistics | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The document of a small random SAE."""
    rng = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(contexts, T, D, generator=rng)
    features = (torch.randn(contexts, T, F, generator=rng) - 1).relu()
    features[..., list(dead)] = 0
    counted = torch.full((contexts, T), valid)
    reconstruction = ReconstructionMetrics(D, F)
    reconstruction.update(x, x_hat_scale * x + bias, features, valid=counted)
    clean = torch.randn(contexts, T, V, generator=rng)
    model = ModelMetrics()
    tokens = torch.randint(V, (contexts, T), generator=rng)
    sae, ablated = (
        score_forward(clean, changed, tokens, counted)
        for changed in (0.8 * clean, torch.zeros_like(clean))
    )
    model.add(next_token_ce(clean, tokens, counted), sae, ablated, keep=counted)
    W_enc, W_dec = torch.randn(D, F, generator=rng), torch.randn(F, D, generator=rng)
    return saebench_core_json(
        reconstruction.compute(),
        model.compute(),
        reconstruction.compute_features(),
        weights or weight_statistics(W_enc, W_dec, torch.zeros(F)),
        provenance(),
        intervals={**reconstruction.compute_intervals(), **model.compute_intervals()},
        **options,
    )


def provenance(**changes: Any) -> Provenance:
    fields = {
        "eval_config": saebench_eval_config(
            model_name="gpt2",
            llm_dtype="float32",
            dataset="shakespeare",
            context_size=T,
            batch_size_prompts=16,
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
        ),
        "eval_id": "8f7a0a52-3d2c-4a3a-8f3e-1c1f3b0c9e11",
        "datetime_epoch_millis": 1_760_000_000_000,
        "sae_cfg_dict": {"architecture": "topk", "d_in": D, "d_sae": F},
        "sae_lens_release_id": "gpt2_shakespeare",
    }
    return Provenance(**{**fields, **changes})


def accepted(doc: dict[str, Any]) -> CoreEvalOutput:
    """The document as SAEBench would read it from a file; NaN is no JSON."""
    return CoreEvalOutput.model_validate_json(json.dumps(doc, allow_nan=False))


def test_the_document_has_the_keys_of_sae_bench_and_is_accepted() -> None:
    doc = document()
    assert set(doc) == set(CoreEvalOutput.model_fields)
    assert (doc["eval_type_id"], doc["sae_lens_id"]) == ("core", "custom_sae")
    for name, group in doc["eval_result_metrics"].items():
        assert set(group) == set(Metrics.model_fields[name].annotation.model_fields)
    assert set(doc["eval_config"]) == set(EvalConfig.model_fields)
    read = accepted(doc).model_dump()
    assert read == doc
    assert doc["eval_result_unstructured"]["missing"] == {}


def test_there_is_one_row_per_feature_with_its_own_values() -> None:
    weights = WeightStatistics(*(torch.arange(F) + 100.0 * (i + 1) for i in range(5)))
    doc = document(weights=weights)
    rows = doc["eval_result_details"]
    assert [row["index"] for row in rows] == list(range(F))
    assert set(rows[0]) == set(Feature.model_fields)
    for row in rows:
        for name, column in weights._asdict().items():
            assert row[name] == column[row["index"]]
    misc = doc["eval_result_metrics"]["misc_metrics"]
    assert misc["average_max_decoder_cosine_sim"] == pytest.approx(400 + (F - 1) / 2)
    assert misc["average_max_encoder_cosine_sim"] == pytest.approx(500 + (F - 1) / 2)
    assert misc["frac_alive"] == pytest.approx(0.8)


def test_token_stats_count_the_tokens_behind_the_means() -> None:
    doc = document()
    assert doc["eval_result_metrics"]["token_stats"] == {
        "total_tokens_eval_reconstruction": B * T,
        "total_tokens_eval_sparsity_variance": B * T,
    }
    assert doc["eval_result_unstructured"]["n_predictions"] == B * (T - 1)


def test_intervals_and_further_values_stand_in_the_unstructured_part() -> None:
    doc = document(unstructured={"massive_share": 0.0014})
    extras = doc["eval_result_unstructured"]
    low, high = extras["intervals"]["explained_variance"]
    value = doc["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
    assert low < value < high
    assert extras["massive_share"] == 0.0014
    assert extras["mse_sae_bench"] > 0


def test_an_sae_with_every_feature_dead_has_a_complete_and_accepted_document() -> None:
    doc = document(x_hat_scale=0.0, dead=tuple(range(F)))
    misc = accepted(doc).model_dump()["eval_result_metrics"]["misc_metrics"]
    assert misc["frac_alive"] == misc["normalized_freq_over_1_percent"] == 0.0
    assert doc["eval_result_unstructured"]["missing"] == {}
    heuristic = [row["consistent_activation_heuristic"] for row in doc["eval_result_details"]]
    assert heuristic == [0.0] * F


def test_an_undefined_metric_is_null_with_its_reason_and_sae_bench_refuses_null() -> None:
    doc = document(x_hat_scale=0.0, bias=0.0)
    path = "eval_result_metrics.shrinkage.relative_reconstruction_bias"
    assert doc["eval_result_metrics"]["shrinkage"]["relative_reconstruction_bias"] is None
    missing = doc["eval_result_unstructured"]["missing"]
    assert missing[path] == "the reconstructions are zero, or are not finite"
    with pytest.raises(ValidationError, match=path):
        accepted(doc)


def test_minus_one_for_undefined_metrics_is_accepted_with_the_reason_kept() -> None:
    doc = document(x_hat_scale=0.0, bias=0.0, undefined=-1.0)
    read = accepted(doc).model_dump()
    assert read["eval_result_metrics"]["shrinkage"]["relative_reconstruction_bias"] == -1.0
    assert (
        doc["eval_result_unstructured"]["intervals"]["relative_reconstruction_bias"] == [None] * 2
    )
    path = "eval_result_metrics.shrinkage.relative_reconstruction_bias"
    assert path in doc["eval_result_unstructured"]["missing"]


def test_without_a_valid_token_every_measured_number_is_null_for_that_reason() -> None:
    doc = document(valid=False)
    json.dumps(doc, allow_nan=False)
    metrics = doc["eval_result_metrics"]
    missing = doc["eval_result_unstructured"]["missing"]
    weights_only = {"average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim"}
    for group in metrics.keys() - {"token_stats"}:
        for name in metrics[group].keys() - weights_only:
            assert metrics[group][name] is None
            path = f"eval_result_metrics.{group}.{name}"
            assert missing[path] == "no valid token was seen"
    assert set(metrics["token_stats"].values()) == {0}
    assert doc["eval_result_details"][2]["feature_density"] is None
    assert missing["eval_result_details.2.feature_density"] == "no valid token was seen"


def test_one_context_has_metrics_but_null_intervals() -> None:
    doc = document(contexts=1)
    accepted(doc)
    extras = doc["eval_result_unstructured"]
    assert extras["intervals"]["mse"] == [None, None]
    reason = extras["missing"]["eval_result_unstructured.intervals.mse.0"]
    assert reason.startswith("fewer than 16 documents")


def test_weights_that_are_not_finite_leave_nulls_and_not_nan() -> None:
    weights = WeightStatistics(*(torch.full((F,), math.nan) for _ in range(5)))
    doc = document(weights=weights)
    json.dumps(doc, allow_nan=False)
    missing = doc["eval_result_unstructured"]["missing"]
    assert missing["eval_result_details.4.encoder_norm"] == "not a finite number"
    assert doc["eval_result_details"][4]["encoder_norm"] is None
    assert doc["eval_result_metrics"]["misc_metrics"]["average_max_encoder_cosine_sim"] is None


def test_infinity_in_the_saes_config_becomes_null_too() -> None:
    cfg = {"d_in": D, "metadata": {"threshold": [1.0, math.inf]}}
    doc = saebench_core_json(
        *measurements_of_zeros(), provenance(sae_cfg_dict=cfg, sae_lens_id=None)
    )
    assert doc["sae_cfg_dict"]["metadata"]["threshold"] == [1.0, None]
    assert "sae_cfg_dict.metadata.threshold.1" in doc["eval_result_unstructured"]["missing"]
    assert doc["sae_lens_id"] is None


def measurements_of_zeros() -> tuple[
    dict[str, float], dict[str, float], dict[str, Tensor], WeightStatistics
]:
    reconstruction = ReconstructionMetrics(D, 2)
    zeros = torch.zeros(1, T, D)
    every = torch.ones(1, T, dtype=torch.bool)
    reconstruction.update(zeros, zeros, torch.zeros(1, T, 2), valid=every)
    model = ModelMetrics()
    logits, tokens = torch.zeros(1, T, V), torch.zeros(1, T, dtype=torch.long)
    same = score_forward(logits, logits, tokens, every)
    model.add(next_token_ce(logits, tokens, every), same, same, keep=every)
    weights = weight_statistics(torch.eye(D, 2), torch.eye(2, D), torch.zeros(2))
    return reconstruction.compute(), model.compute(), reconstruction.compute_features(), weights


def brute_max_cosine(vectors: np.ndarray) -> np.ndarray:
    similarity = cosine_similarity(vectors)
    np.fill_diagonal(similarity, -np.inf)
    return similarity.max(1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 30),
    width=st.integers(1, 9),
    block=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_the_largest_cosine_equals_sklearns_in_blocks_of_any_size(
    n: int, width: int, block: int, seed: int
) -> None:
    vectors = np.random.default_rng(seed).normal(size=(n, width)) * 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saebench_json, "_COSINE_BLOCK", block)
        got = max_cosine_sim(torch.from_numpy(vectors))
    np.testing.assert_allclose(got.numpy(), brute_max_cosine(vectors), atol=1e-12)


def test_the_largest_cosine_knows_twins_opposites_zeros_and_loners() -> None:
    e = torch.eye(3)
    twins = max_cosine_sim(torch.stack([e[0], 5 * e[0], e[1]]))
    torch.testing.assert_close(twins, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(max_cosine_sim(torch.stack([e[0], -e[0]])), torch.tensor([-1.0] * 2))
    torch.testing.assert_close(max_cosine_sim(torch.stack([0 * e[0], e[0]])), torch.zeros(2))
    assert max_cosine_sim(e[:1]).isnan().all()


def test_weight_statistics_equal_numpy_for_a_decoder_of_any_norm() -> None:
    rng = np.random.default_rng(0)
    W_enc, W_dec, b_enc = (
        rng.normal(size=(8, 20)),
        3 * rng.normal(size=(20, 8)),
        rng.normal(size=20),
    )
    got = weight_statistics(*(torch.from_numpy(array) for array in (W_enc, W_dec, b_enc)))
    np.testing.assert_array_equal(got.encoder_bias, b_enc)
    np.testing.assert_allclose(got.encoder_norm, np.linalg.norm(W_enc, axis=0))
    expected = np.diag(cosine_similarity(W_enc.T, W_dec))
    np.testing.assert_allclose(got.encoder_decoder_cosine_sim, expected)
    np.testing.assert_allclose(got.max_decoder_cosine_sim, brute_max_cosine(W_dec))
    np.testing.assert_allclose(got.max_encoder_cosine_sim, brute_max_cosine(W_enc.T))


def test_weight_statistics_of_bfloat16_parameters_are_float32_and_carry_no_gradient() -> None:
    W_enc = torch.nn.Parameter(torch.randn(8, 20).bfloat16())
    W_dec = torch.nn.Parameter(W_enc.T.detach().clone())
    got = weight_statistics(W_enc, W_dec, torch.zeros(20))
    torch.testing.assert_close(got.encoder_decoder_cosine_sim, torch.ones(20))
    assert got.encoder_norm.dtype == torch.float32
    assert not got.max_encoder_cosine_sim.requires_grad


def test_frequencies_are_shares_of_features_and_of_firings() -> None:
    density = torch.tensor([0.0, 0.005, 0.01, 0.02, 0.1, 0.4], dtype=torch.float64)
    assert frequency_metrics(density) == pytest.approx(
        {
            "freq_over_1_percent": 3 / 6,
            "freq_over_10_percent": 1 / 6,
            "normalized_freq_over_1_percent": 0.52 / 0.535,
            "normalized_freq_over_10_percent": 0.4 / 0.535,
        }
    )


def test_frequencies_of_a_dead_dictionary_are_zero_and_of_unknown_densities_nan() -> None:
    assert set(frequency_metrics(torch.zeros(4)).values()) == {0.0}
    unknown = frequency_metrics(torch.tensor([0.1, math.nan]))
    assert all(math.isnan(value) for value in unknown.values())
