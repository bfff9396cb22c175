"""The SAEBench core accumulators against formulas, other people's code, and known answers."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import log_softmax
from scipy.stats import entropy
from sklearn.metrics import r2_score
from torch import Tensor
from torch.nn import functional

from tcsae.metrics import reconstruction as core
from tcsae.metrics.reconstruction import (
    ModelMetrics,
    ReconstructionMetrics,
    kl_divergence,
    next_token_ce,
    score_forward,
)
from tcsae.metrics.units import Units

B, T, D, F, V = 6, 10, 7, 12, 23
# These two depend on how the contexts were batched, by definition.
BATCH_DEPENDENT = {"mse_sae_bench", "explained_variance_legacy"}


def activations(
    seed: int = 0, scale: float = 1.0, mean: float = 4.0, contexts: int = B
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a decent x_hat, sparse codes (feature 0 dead) and a valid mask, float64."""
    rng = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x = scale * (mean * torch.linspace(-1, 1, D, dtype=torch.float64) + noise(contexts, T, D))
    x_hat = 0.9 * x + 0.3 * scale * noise(contexts, T, D)
    features = scale * (noise(contexts, T, F) - 1).relu()
    features[..., 0] = 0
    valid = torch.rand(contexts, T, generator=rng) > 0.2
    valid[:, 0] = False
    valid[:, 1] = True
    return x, x_hat, features, valid


def measured(x: Tensor, x_hat: Tensor, features: Tensor, valid: Tensor) -> ReconstructionMetrics:
    metrics = ReconstructionMetrics(x.shape[-1], features.shape[-1])
    metrics.update(x, x_hat, features, valid=valid)
    return metrics


def by_hand(x: Tensor, x_hat: Tensor, features: Tensor, valid: Tensor) -> dict[str, float]:
    """One batch by SAEBench's formulas (evals/core/main.py of 0.6.0), where they are right."""
    x, x_hat, f = (tensor[valid].numpy() for tensor in (x, x_hat, features))
    error2 = ((x - x_hat) ** 2).sum(-1)
    norm_in, norm_out = np.linalg.norm(x, axis=-1), np.linalg.norm(x_hat, axis=-1)
    return {
        "mse": (error2 / x.shape[-1]).mean(),
        "mse_sae_bench": (error2 / len(x)).mean(),
        "explained_variance_legacy": (1 - error2 / ((x - x.mean(0)) ** 2).sum(-1)).mean(),
        "cossim": ((x * x_hat).sum(-1) / norm_in / norm_out).mean(),
        "l2_norm_in": norm_in.mean(),
        "l2_norm_out": norm_out.mean(),
        "l2_ratio": (norm_out / norm_in).mean(),
        "relative_reconstruction_bias": (norm_out**2).mean() / (x * x_hat).sum(-1).mean(),
        "l0": (f != 0).sum(-1).mean(),
        "l1": f.sum(-1).mean(),
        "frac_alive": (f != 0).any(0).mean(),
        "n_tokens": len(x),
        "explained_variance": 1 - error2.mean() / x.var(0).sum(),
    }


def explained_variance_of_sae_bench_0_6_0(x: Tensor, x_hat: Tensor) -> float:
    """Where |E x|^2 belongs it has the square of a number: the mean of all squares."""
    residual = (x - x_hat).square().sum(-1).mean()
    return float(1 - residual / (x.square().sum(-1).mean() - x.square().mean() ** 2))


def test_every_metric_of_a_batch_equals_its_formula() -> None:
    batch = activations()
    assert measured(*batch).compute() == pytest.approx(by_hand(*batch), rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("mean", [0.0, 6.0, 300.0])
def test_predicting_the_mean_explains_nothing_at_any_input_scale(scale: float, mean: float) -> None:
    x, _, features, valid = activations(scale=scale, mean=mean, contexts=40)
    prediction = x[valid].mean(0).expand_as(x)
    metrics = ReconstructionMetrics(D, F)
    for rows in (slice(0, 3), slice(3, 40)):
        metrics.update(x[rows], prediction[rows], features[rows], valid=valid[rows])
    assert metrics.compute()["explained_variance"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_a_perfect_reconstruction_explains_everything(scale: float) -> None:
    x, _, features, valid = activations(scale=scale, mean=300.0)
    values = measured(x.float(), x.float(), features, valid).compute()
    assert values["explained_variance"] == 1.0
    assert values["mse"] == 0.0
    assert values["cossim"] == pytest.approx(1.0)
    assert values["l2_ratio"] == values["relative_reconstruction_bias"] == pytest.approx(1.0)


def test_explained_variance_is_the_variance_weighted_r2_of_sklearn() -> None:
    x, x_hat, features, valid = activations(mean=20.0)
    expected = r2_score(x[valid], x_hat[valid], multioutput="variance_weighted")
    values = measured(x, x_hat, features, valid).compute()
    assert values["explained_variance"] == pytest.approx(expected, rel=1e-10)


def test_explained_variance_does_not_cancel_under_a_mean_of_ten_million() -> None:
    x, _, features, valid = activations(mean=0.0, contexts=20)
    x_hat = x + 0.1
    small = measured(x, x_hat, features, valid).compute()["explained_variance"]
    shifted = measured(x + 1e7, x_hat + 1e7, features, valid).compute()["explained_variance"]
    assert shifted == pytest.approx(small, abs=1e-6)


def test_sae_bench_0_6_0_scores_a_mean_predictor_above_a_perfect_one() -> None:
    rng = torch.Generator().manual_seed(0)
    x = 20 + 10 * torch.randn(32, 16, 64, generator=rng, dtype=torch.float64)
    valid = torch.ones(32, 16, dtype=torch.bool)
    features = torch.ones(32, 16, 1)
    mean = x.mean((0, 1)).expand_as(x)
    good = mean + (1 - math.sqrt(0.136)) * (x - mean)
    assert explained_variance_of_sae_bench_0_6_0(x, mean) > 1.0
    assert explained_variance_of_sae_bench_0_6_0(x, good) > 1.0
    ours = [
        measured(x, x_hat, features, valid).compute()["explained_variance"]
        for x_hat in (mean, good)
    ]
    assert ours == pytest.approx([0.0, 0.864], abs=1e-9)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_masked_tokens_enter_nothing_whatever_they_hold(garbage: float) -> None:
    x, x_hat, features, valid = activations(contexts=10)
    clean = measured(x, x_hat, features, valid)
    soiled = [tensor.clone() for tensor in (x, x_hat, features)]
    for tensor in soiled:
        tensor[~valid] = garbage
    dirty = measured(*soiled, valid)
    assert dirty.compute() == clean.compute()
    assert dirty.compute_intervals() == clean.compute_intervals()
    for name, values in clean.compute_features().items():
        torch.testing.assert_close(dirty.compute_features()[name], values)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.sets(st.integers(1, 14), max_size=5),
    mean=st.sampled_from([0.0, 5.0, 1000.0]),
)
def test_any_split_into_batches_gives_the_same_numbers(
    seed: int, cuts: set[int], mean: float
) -> None:
    batch = activations(seed=seed, mean=mean, contexts=18)
    whole = measured(*batch)
    edges = [0, *sorted(cuts), 18]
    split = ReconstructionMetrics(D, F)
    for start, stop in zip(edges, edges[1:], strict=False):
        x, x_hat, features, valid = (tensor[start:stop] for tensor in batch)
        split.update(x, x_hat, features, valid=valid)
    expected = {k: v for k, v in whole.compute().items() if k not in BATCH_DEPENDENT}
    got = split.compute()
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    for name, values in whole.compute_features().items():
        torch.testing.assert_close(split.compute_features()[name], values)
    intervals = whole.compute_intervals()
    for name in expected.keys() & intervals.keys():
        assert split.compute_intervals()[name] == pytest.approx(intervals[name], rel=1e-6)
    torch.testing.assert_close(split.context_sums()["variance2"], whole.context_sums()["variance2"])


def test_sae_benchs_mse_and_legacy_variance_follow_their_batches() -> None:
    batch = activations(mean=1.0)
    halves = [[tensor[rows] for tensor in batch] for rows in (slice(0, 2), slice(2, B))]
    metrics = ReconstructionMetrics(D, F)
    for x, x_hat, features, valid in halves:
        metrics.update(x, x_hat, features, valid=valid)
    weights = [int(half[3].sum()) for half in halves]
    for name in BATCH_DEPENDENT:
        expected = np.average([by_hand(*half)[name] for half in halves], weights=weights)
        assert metrics.compute()[name] == pytest.approx(expected, rel=1e-12)
        assert metrics.compute()[name] != pytest.approx(by_hand(*batch)[name], rel=1e-3)


def test_density_and_consistency_heuristic_count_firings_per_token_and_per_context() -> None:
    x, x_hat, features, valid = activations()
    got = measured(x, x_hat, features, valid).compute_features()
    for j in range(F):
        per_context = [int((features[n, valid[n], j] != 0).sum()) for n in range(B)]
        firing = [count for count in per_context if count]
        assert got["feature_density"][j] == pytest.approx(sum(per_context) / int(valid.sum()))
        heuristic = float(np.mean(firing)) if firing else 0.0
        assert got["consistent_activation_heuristic"][j] == pytest.approx(heuristic)
    assert got["feature_density"][0] == got["consistent_activation_heuristic"][0] == 0.0


def test_negative_codes_count_as_active_and_add_their_size_to_l1() -> None:
    x, x_hat, features, valid = activations()
    positive = measured(x, x_hat, features, valid)
    negative = measured(x, x_hat, -features, valid)
    assert negative.compute() == pytest.approx(positive.compute())


def test_bfloat16_codes_are_summed_in_float32() -> None:
    x, x_hat, _, valid = activations()
    features = torch.full((B, T, 1000), 1.0, dtype=torch.bfloat16)
    features[..., 0] = 1.0 / 128
    values = measured(x, x_hat, features, valid).compute()
    assert values["l1"] == pytest.approx(999 + 1 / 128, rel=1e-7)


def test_a_dead_sae_that_predicts_a_constant_has_every_metric() -> None:
    x, _, features, valid = activations()
    values = measured(x, torch.ones_like(x), torch.zeros_like(features), valid).compute()
    assert all(math.isfinite(value) for value in values.values())
    assert values["l0"] == values["l1"] == values["frac_alive"] == 0.0


def test_a_zero_reconstruction_has_no_bias_and_no_direction() -> None:
    x, _, features, valid = activations()
    values = measured(x, torch.zeros_like(x), features, valid).compute()
    assert math.isnan(values.pop("relative_reconstruction_bias"))
    assert values["cossim"] == values["l2_ratio"] == values["l2_norm_out"] == 0.0
    assert all(math.isfinite(value) for value in values.values())


def test_constant_activations_have_no_explained_variance() -> None:
    _, x_hat, features, valid = activations(contexts=50)
    x = 1e3 / torch.arange(3, 3 + D, dtype=torch.float64).expand_as(x_hat)
    values = measured(x, x_hat, features, valid).compute()
    assert math.isnan(values["explained_variance"])
    assert values["mse"] > 0


def test_without_a_valid_token_every_metric_is_nan_and_later_batches_still_count() -> None:
    x, x_hat, features, valid = activations(mean=50.0)
    metrics = measured(x, x_hat, features, torch.zeros_like(valid))
    values = metrics.compute()
    assert values.pop("n_tokens") == 0.0
    assert all(math.isnan(value) for value in values.values())
    assert metrics.compute_features()["feature_density"].isnan().all()
    metrics.update(x, x_hat, features, valid=valid)
    assert metrics.compute() == pytest.approx(measured(x, x_hat, features, valid).compute())


def test_reset_forgets_everything() -> None:
    metrics = measured(*activations(seed=1, mean=100.0))
    metrics.reset()
    with pytest.raises(ValueError, match="call update"):
        metrics.compute()
    x, x_hat, features, valid = activations(seed=2)
    metrics.update(x, x_hat, features, valid=valid)
    assert metrics.compute() == measured(x, x_hat, features, valid).compute()


def test_a_batch_of_the_wrong_shape_is_refused_by_name() -> None:
    x, x_hat, features, valid = activations()
    metrics = ReconstructionMetrics(D, F)
    with pytest.raises(ValueError, match=r"x_hat must be \[6, 10, 7\] .* not \[6, 10, 6\]"):
        metrics.update(x, x_hat[..., 1:], features, valid=valid)
    with pytest.raises(ValueError, match="features must be"):
        metrics.update(x, x_hat, features[:, 1:], valid=valid)


def test_context_sums_give_explained_variance_and_the_other_means() -> None:
    metrics = measured(*activations(mean=30.0))
    sums = metrics.context_sums()
    assert all(value.shape == (B,) for value in sums.values())
    values = metrics.compute()
    explained = 1 - sums["error2"].sum() / sums["variance2"].sum()
    assert float(explained) == pytest.approx(values["explained_variance"], rel=1e-9)
    assert float(sums["l0"].sum() / sums["n_tokens"].sum()) == pytest.approx(values["l0"])


def test_intervals_of_a_mean_have_the_width_of_its_standard_error() -> None:
    x, x_hat, features, valid = activations(contexts=300)
    valid[:, 1:] = True
    metrics = measured(x, x_hat, features, valid)
    sums = metrics.context_sums()
    expected = 2 * 1.96 * float((sums["l1"] / sums["n_tokens"]).std()) / math.sqrt(300)
    low, high = metrics.compute_intervals()["l1"]
    assert high - low == pytest.approx(expected, rel=0.2)
    assert low < metrics.compute()["l1"] < high


def test_the_interval_of_explained_variance_is_that_of_leaving_documents_out() -> None:
    """By hand: every metric again without each document of two contexts, Student's t; the
    correction for skewness moves the ends, by less than a third of the width here."""
    x, x_hat, features, valid = activations(contexts=60)
    metrics = measured(x, x_hat, features, valid)
    units = Units([i // 2 for i in range(60)])
    left = []
    for document in range(30):
        kept = units.document != document
        one = by_hand(x[kept], x_hat[kept], features[kept], valid[kept])
        left.append(one["explained_variance"])
    error = np.std(left) * math.sqrt(29)
    low, high = metrics.compute_intervals(units=units)["explained_variance"]
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 29) * error, rel=0.15)
    assert low < metrics.compute()["explained_variance"] < high


def test_intervals_repeat_and_narrow_with_their_level() -> None:
    metrics = measured(*activations(contexts=20))
    assert metrics.compute_intervals() == metrics.compute_intervals()
    wide = metrics.compute_intervals(level=0.95)["mse"]
    narrow = metrics.compute_intervals(level=0.5)["mse"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_one_context_alone_has_no_interval() -> None:
    x, x_hat, features, valid = activations()
    valid[1:] = False
    metrics = measured(x, x_hat, features, valid)
    assert math.isfinite(metrics.compute()["explained_variance"])
    ends = metrics.compute_intervals().values()
    assert all(math.isnan(low) and math.isnan(high) for low, high in ends)


def test_an_update_of_32_contexts_takes_well_under_half_a_second() -> None:
    x = torch.randn(32, 128, 576)
    features = (torch.randn(32, 128, 2304) - 2).relu()
    valid = torch.ones(32, 128, dtype=torch.bool)
    metrics = ReconstructionMetrics(576, 2304)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        metrics.update(x, x, features, valid=valid)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def predictions(
    seed: int = 0, contexts: int = B, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Clean, SAE and ablated logits, tokens, and the mask of kept activations; float64."""
    rng = torch.Generator().manual_seed(seed)
    shape = (contexts, T, V)
    clean = spread * torch.randn(shape, generator=rng, dtype=torch.float64)
    sae = clean + 0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)
    tokens = torch.randint(V, (contexts, T), generator=rng)
    masked = torch.rand(contexts, T, generator=rng) < 0.2
    masked[:, 0] = True
    return clean, sae, torch.zeros_like(clean), tokens, masked


def compared(
    clean: Tensor, sae: Tensor, ablated: Tensor, tokens: Tensor, masked: Tensor
) -> ModelMetrics:
    metrics = ModelMetrics()
    add_passes(metrics, clean, sae, ablated, tokens, masked)
    return metrics


def add_passes(
    metrics: ModelMetrics,
    clean: Tensor,
    sae: Tensor,
    ablated: Tensor,
    tokens: Tensor,
    masked: Tensor,
) -> None:
    metrics.add(
        next_token_ce(clean, tokens, ~masked),
        score_forward(clean, sae, tokens, ~masked),
        score_forward(clean, ablated, tokens, ~masked),
        keep=~masked,
    )


def test_cross_entropy_and_divergence_equal_torchs_and_scipys() -> None:
    clean, sae, ablated, tokens, masked = predictions()
    values = compared(clean, sae, ablated, tokens, masked).compute()
    made_from = ~masked[:, :-1]
    for name, logits in [
        ("ce_loss_without_sae", clean),
        ("ce_loss_with_sae", sae),
        ("ce_loss_with_ablation", ablated),
    ]:
        ce = functional.cross_entropy(logits[:, :-1][made_from], tokens[:, 1:][made_from])
        assert values[name] == pytest.approx(float(ce), rel=1e-12)
    for name, logits in [("kl_div_with_sae", sae), ("kl_div_with_ablation", ablated)]:
        p, q = clean[~masked].softmax(-1), logits[~masked].softmax(-1)
        kl = functional.kl_div(q.log(), p, reduction="batchmean")
        assert values[name] == pytest.approx(float(kl), rel=1e-10)
        assert values[name] == pytest.approx(entropy(p, q, axis=-1).mean(), rel=1e-10)
    assert values["n_tokens"] == int((~masked).sum())
    assert values["n_predictions"] == int(made_from.sum())


@pytest.mark.parametrize(
    ("vocabulary", "nats"), [(256_000, 12.4529), (49_152, 10.80267), (262_144, 12.47665)]
)
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(vocabulary: int, nats: float) -> None:
    tokens = torch.tensor([[0, 5, vocabulary - 1]])
    total = next_token_ce(torch.full((1, 3, vocabulary), 3.0), tokens, torch.ones(1, 3).bool())
    assert float(total) / 2 == pytest.approx(math.log(vocabulary), rel=1e-6)
    assert float(total) / 2 == pytest.approx(nats, abs=5e-5)


def test_scores_are_one_for_a_perfect_sae_and_zero_for_one_as_bad_as_ablation() -> None:
    clean, _, ablated, tokens, masked = predictions(spread=1.0)
    tokens = clean.argmax(-1).roll(1, dims=1)
    perfect = compared(clean, clean, ablated, tokens, masked).compute()
    assert (perfect["ce_loss_score"], perfect["kl_div_score"]) == (1.0, 1.0)
    assert perfect["kl_div_with_sae"] == 0.0
    useless = compared(clean, ablated, ablated, tokens, masked).compute()
    assert (useless["ce_loss_score"], useless["kl_div_score"]) == (0.0, 0.0)
    half = compared(clean, 0.5 * clean, ablated, tokens, masked).compute()
    ce_gap = half["ce_loss_with_ablation"] - half["ce_loss_without_sae"]
    assert half["ce_loss_score"] == pytest.approx(
        (half["ce_loss_with_ablation"] - half["ce_loss_with_sae"]) / ce_gap
    )
    assert 0 < half["ce_loss_score"] < 1


def test_scores_are_nan_where_ablation_changes_nothing() -> None:
    clean, sae, _, tokens, masked = predictions()
    values = compared(clean, sae, clean, tokens, masked).compute()
    assert math.isnan(values["ce_loss_score"])
    assert math.isnan(values["kl_div_score"])


def test_divergence_stays_finite_and_right_where_log_of_softmax_underflows() -> None:
    rng = torch.Generator().manual_seed(0)
    clean = torch.empty(2, 5, 100).uniform_(-200, 200, generator=rng)
    changed = torch.empty(2, 5, 100).uniform_(-200, 200, generator=rng)
    log_p, log_q = (log_softmax(t.double().numpy(), axis=-1) for t in (clean, changed))
    exact = (np.exp(log_p) * (log_p - log_q)).sum((-1, -2))
    got = kl_divergence(clean, changed, torch.ones(2, 5, dtype=torch.bool))
    np.testing.assert_allclose(got.numpy(), exact, rtol=1e-5)
    p, q = clean.softmax(-1), changed.softmax(-1)
    assert not (p * (p.log() - q.log())).sum(-1).isfinite().all()


def test_nothing_predicted_from_a_masked_token_counts_but_predicting_one_does() -> None:
    clean, sae, ablated, tokens, masked = predictions()
    expected = compared(clean, sae, ablated, tokens, masked).compute()
    for logits in (clean, sae, ablated):
        logits[masked] = math.nan
    assert compared(clean, sae, ablated, tokens, masked).compute() == expected
    target = int(torch.nonzero(masked[0, 1:] & ~masked[0, :-1])[0])
    tokens[0, target + 1] = (tokens[0, target + 1] + 1) % V
    changed = compared(clean, sae, ablated, tokens, masked).compute()
    assert changed["ce_loss_without_sae"] != expected["ce_loss_without_sae"]


@pytest.mark.parametrize("rows", [1, 7])
def test_working_in_chunks_of_rows_changes_nothing(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = predictions()
    expected = compared(*batch).compute()
    monkeypatch.setattr(core, "_LOGITS_CHUNK", rows * V)
    assert compared(*batch).compute() == pytest.approx(expected, rel=1e-12)


def test_bfloat16_logits_are_worked_in_float32() -> None:
    clean, sae, ablated, tokens, masked = predictions()
    halves = [logits.bfloat16() for logits in (clean, sae, ablated)]
    exact = compared(*(half.double() for half in halves), tokens, masked).compute()
    assert compared(*halves, tokens, masked).compute() == pytest.approx(exact, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.sets(st.integers(1, 11), max_size=4),
)
def test_any_split_of_the_predictions_gives_the_same_numbers(seed: int, cuts: set[int]) -> None:
    batch = predictions(seed=seed, contexts=18)
    whole = compared(*batch)
    edges = [0, *sorted(cuts), 18]
    split = ModelMetrics()
    for start, stop in zip(edges, edges[1:], strict=False):
        add_passes(split, *(tensor[start:stop] for tensor in batch))
    assert split.compute() == pytest.approx(whole.compute(), rel=1e-9)
    for name, ends in whole.compute_intervals().items():
        assert split.compute_intervals()[name] == pytest.approx(ends, rel=1e-9)


def test_a_context_that_is_masked_throughout_changes_no_mean() -> None:
    clean, sae, ablated, tokens, masked = predictions(contexts=18)
    masked[3] = True
    others = [index for index in range(18) if index != 3]
    expected = compared(*(tensor[others] for tensor in (clean, sae, ablated, tokens, masked)))
    got = compared(clean, sae, ablated, tokens, masked)
    assert got.compute() == pytest.approx(expected.compute(), rel=1e-12)
    # A document of which nothing counts is none: the error is that of the others.
    for name, (low, high) in expected.compute_intervals().items():
        ends = got.compute_intervals()[name]
        assert ends[1] - ends[0] == pytest.approx(high - low, rel=0.1), name
    assert got.context_sums()["n_tokens"][3] == 0


def test_with_every_token_masked_the_model_metrics_are_nan() -> None:
    clean, sae, ablated, tokens, masked = predictions()
    values = compared(clean, sae, ablated, tokens, torch.ones_like(masked)).compute()
    assert (values.pop("n_tokens"), values.pop("n_predictions")) == (0.0, 0.0)
    assert all(math.isnan(value) for value in values.values())


def test_intervals_of_cross_entropy_hold_the_estimate_and_the_standard_error() -> None:
    clean, sae, ablated, tokens, masked = predictions(contexts=300)
    masked[:] = False
    metrics = compared(clean, sae, ablated, tokens, masked)
    sums = metrics.context_sums()
    spread = float((sums["ce_loss_with_sae"] / sums["n_predictions"]).std())
    low, high = metrics.compute_intervals()["ce_loss_with_sae"]
    assert high - low == pytest.approx(2 * 1.96 * spread / math.sqrt(300), rel=0.1)
    assert low < metrics.compute()["ce_loss_with_sae"] < high
    low, high = metrics.compute_intervals()["kl_div_score"]
    assert low < metrics.compute()["kl_div_score"] < high
