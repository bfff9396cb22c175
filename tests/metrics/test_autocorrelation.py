from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tsa.stattools import acovf
from torch import Tensor

from tcsae.metrics.autocorrelation import (
    Autocorrelation,
    autocorrelation,
    correlation_length,
    integrated_time,
    window_consistency,
)
from tcsae.metrics.units import Units
from tests.metrics import synthetic
from tests.metrics.synthetic import seeded


def slow_covariance(
    f: Tensor, max_lag: int, segments: Tensor, valid: Tensor, document: Tensor
) -> Tensor:
    """The definition, pair by pair; products of means over pairs of different documents, and every
    document about the mean over the tokens of the others."""
    x = torch.where(valid[..., None], f.double() - f[valid].double().mean(0), 0.0)
    apart_NN = (document[:, None] != document).double()
    others = torch.zeros(len(f), f.shape[2], dtype=torch.float64)
    for n in range(len(f)):
        rest = valid & (document != document[n])[:, None]
        others[n] = x[rest].sum(0) / rest.sum().clamp(min=1)
    covariance = []
    for lag in range(max_lag + 1):
        total, n_pairs = torch.zeros(f.shape[2], dtype=torch.float64), 0
        for t in range(f.shape[1] - lag):
            u = t + lag
            pair = valid[:, t] & valid[:, u] & (segments[:, t] == segments[:, u])
            total += (x[pair, t] * x[pair, u]).sum(0)
            n_pairs += int(pair.sum())
            both_NN = valid[:, t, None].double() * valid[:, u].double() * apart_NN
            if both_NN.sum() > 0:
                means = torch.einsum("nm,nf,mf->f", both_NN, x[:, t], x[:, u])
                means -= torch.einsum("nm,nf,nf->f", both_NN, x[:, t], others)
                means -= torch.einsum("nm,mf,mf->f", both_NN, x[:, u], others)
                total -= int(pair.sum()) * means / both_NN.sum()
            total -= ((x[pair, t] + x[pair, u]) * others[pair]).sum(0)
        covariance.append(total / n_pairs if n_pairs else total * torch.nan)
    return torch.stack(covariance)


def slow_autocorrelation(
    f: Tensor, max_lag: int, segments: Tensor, valid: Tensor, document: Tensor | None = None
) -> Tensor:
    document = torch.arange(len(f)) if document is None else document
    c = slow_covariance(f, max_lag, segments, valid, document)
    told = any(len(document[valid[:, t]].unique()) > 1 for t in range(f.shape[1]))
    return c / torch.where((c[0] > 1e-12) & told, c[0], torch.nan)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_ar1_has_its_known_autocorrelation_and_window_consistency() -> None:
    f = synthetic.ar1(16384, 128, 4, 0.95, seeded())
    rho = autocorrelation(f, 32)
    truth = torch.tensor([0.950, 0.663, 0.194], dtype=torch.float64)
    assert (rho[[1, 8, 32]] - truth[:, None]).abs().max() < 0.01
    for window in (2, 8, 32):
        known = synthetic.ar1_window_consistency(0.95, window)
        assert (window_consistency(rho, window) - known).abs().max() < 0.01


def test_ar1_has_its_known_times() -> None:
    rho = autocorrelation(synthetic.ar1(8192, 128, 4, 0.8, seeded(1)), 64)
    assert (integrated_time(rho) - 1.8 / 0.2).abs().max() < 0.3
    length = correlation_length(rho)
    assert (length.values + 1 / math.log(0.8)).abs().max() < 0.1
    assert not length.censored.any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_contexts=st.integers(1, 6),
    n_positions=st.integers(2, 9),
    invalid=st.floats(0, 0.7),
    boundary=st.floats(0, 0.5),
)
def test_agrees_with_the_definition_pair_by_pair(
    seed: int, n_contexts: int, n_positions: int, invalid: float, boundary: float
) -> None:
    g = seeded(seed)
    f = synthetic.white_noise(n_contexts, n_positions, 3, generator=g).relu()
    segments, valid = synthetic.random_masks(
        n_contexts, n_positions, g, invalid=invalid, boundary=boundary
    )
    expected = slow_autocorrelation(f, n_positions - 1, segments, valid)
    assert same(autocorrelation(f, n_positions - 1, segments=segments, valid=valid), expected)


def test_agrees_with_statsmodels_on_missing_values_and_segments() -> None:
    """Of features whose mean is 0 for certain the products are statsmodels'; what is taken off for
    the means is within its error of nothing."""
    g = seeded(2)
    f = synthetic.ar1(400, 40, 1, 0.7, g)[..., 0]
    segments, valid = synthetic.random_masks(400, 40, g)
    masked = torch.where(valid, f, torch.nan).numpy()
    sums, pairs = np.zeros(11), np.zeros(11)
    for n in range(400):
        for segment in segments[n].unique():
            series = np.where(segments[n] == segment, masked[n], np.nan)
            seen = np.isfinite(series).astype(float)
            counts = np.array([(seen[: 40 - k] * seen[k:]).sum() for k in range(11)])
            if counts[0]:
                theirs = acovf(series, adjusted=True, demean=False, missing="conservative", nlag=10)
                sums += np.where(counts > 0, theirs * counts, 0.0)
                pairs += counts
    expected = torch.from_numpy(sums / pairs)
    rho = autocorrelation(f[..., None], 10, segments=segments, valid=valid)[:, 0]
    assert (rho - expected / expected[0]).abs().max() < 0.02


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    invalid=st.floats(0, 0.5),
    n_documents=st.sampled_from([2, 3, 4, 6]),
)
def test_contexts_of_one_document_never_meet(seed: int, invalid: float, n_documents: int) -> None:
    g = seeded(seed)
    f = synthetic.white_noise(12, 6, 3, generator=g).relu() + 2
    segments, valid = synthetic.random_masks(12, 6, g, invalid=invalid, boundary=0.2)
    valid[:, 0] = True
    document = torch.arange(12) % n_documents
    accumulator = Autocorrelation(3, 6, 4, units=Units(document))
    for part in (slice(0, 4), slice(4, 12)):
        accumulator.update(f[part], segments=segments[part], valid=valid[part])
    expected = slow_covariance(f, 4, segments, valid, document)
    energy = expected[0].clamp(min=0)
    found = accumulator.covariances()
    known = energy > 1e-6
    assert same(found[0][:, known], expected[:, known], 1e-8)
    whole = Autocorrelation(3, 6, 4, units=Units(document))
    whole.update(f)
    everything = torch.ones(12, 6, dtype=torch.bool)
    if n_documents > 2:
        for out in range(n_documents):
            kept = document != out
            left = slow_covariance(
                f[kept], 4, torch.zeros(12, 6)[kept], everything[kept], document[kept]
            )
            assert same(whole.covariances()[1 + out], left, 1e-8), "without masks exact"


@pytest.mark.parametrize("n_documents", [4, 16])
def test_means_of_few_alike_documents_take_nothing_away(n_documents: int) -> None:
    """Half of the variance lasts a document of 8 contexts: .36 of 4 documents with plain means."""
    g, n = seeded(n_documents), 2000
    level = synthetic.white_noise(n_documents, 1, n, generator=g).repeat_interleave(8, 0)
    f = level + synthetic.white_noise(8 * n_documents, 12, n, generator=g)
    document = torch.arange(n_documents).repeat_interleave(8)
    accumulator = Autocorrelation(n, 12, 6, units=Units(document))
    accumulator.update(f)
    c = accumulator.covariance()
    pooled = c.sum(1) / c[0].sum()
    assert (pooled[1:] - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("n_contexts", [8, 32])
def test_packed_documents_do_not_shrink_long_lags(n_contexts: int) -> None:
    """The pair (t, t + k) counts in a few of the contexts: .42 at 8 contexts with plain means."""
    g, n, t = seeded(n_contexts), 2000, 48
    segments = (torch.rand(n_contexts, t, generator=g) < 1 / 20).cumsum(1)
    valid = torch.rand(n_contexts, t, generator=g) < 0.8
    level = synthetic.white_noise(n_contexts, t, n, generator=g)
    level = level.gather(1, segments[..., None].expand(-1, -1, n))
    f = level + synthetic.white_noise(n_contexts, t, n, generator=g)
    accumulator = Autocorrelation(n, t, 24)
    accumulator.update(f, segments=segments, valid=valid)
    c = accumulator.covariance()
    pooled = c.sum(1) / c[0].sum()
    assert (pooled[[1, 8, 24]] - 0.5).abs().max() < 0.015


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n_parts=st.integers(1, 12), offset=st.sampled_from([0, 1e4]))
def test_any_split_into_batches_equals_all_at_once(seed: int, n_parts: int, offset: float) -> None:
    g = seeded(seed)
    f = synthetic.ar1(12, 10, 3, 0.5, g) + offset
    segments, valid = synthetic.random_masks(12, 10, g)
    expected = autocorrelation(f, 6, segments=segments, valid=valid)
    sizes = synthetic.random_splits(12, n_parts, g)
    split = Autocorrelation(3, 10, 6)
    for batch in zip(f.split(sizes), segments.split(sizes), valid.split(sizes), strict=True):
        split.update(batch[0], segments=batch[1], valid=batch[2])
    assert same(split.compute(), expected, 1e-6)
    assert split.n_contexts == 12


def test_a_reset_forgets_every_batch() -> None:
    f = synthetic.ar1(10, 8, 2, 0.5, seeded())
    full = Autocorrelation(2, 8, 4, n_blocks=3)
    full.update(f)
    full.reset()
    full.update(f[:5])
    once = Autocorrelation(2, 8, 4, n_blocks=3)
    once.update(f[:5])
    assert same(full.compute(), once.compute())


def test_values_at_invalid_positions_change_nothing() -> None:
    g = seeded(3)
    f = synthetic.ar1(16, 12, 2, 0.5, g)
    segments, valid = synthetic.random_masks(16, 12, g)
    rho = autocorrelation(f, 5, segments=segments, valid=valid)
    for garbage in (1e6, torch.nan, torch.inf):
        spoiled = torch.where(valid[..., None], f, garbage)
        assert same(autocorrelation(spoiled, 5, segments=segments, valid=valid), rho)


def test_a_trend_over_positions_is_not_taken_for_memory() -> None:
    g = seeded(4)
    f = synthetic.position_trend(512, 64, 2) + 0.3 * synthetic.white_noise(512, 64, 2, generator=g)
    rho = autocorrelation(f, 8)
    centred = f - f.mean((0, 1))
    naive = (centred[:, 1:] * centred[:, :-1]).mean() / centred.square().mean()
    assert naive > 0.8
    assert rho[1:].abs().max() < 0.02


def test_dead_constant_and_purely_positional_features_have_no_autocorrelation() -> None:
    g = seeded(5)
    f = torch.cat(
        [
            torch.zeros(64, 32, 1, dtype=torch.float64),
            0.1 + 1e-10 * synthetic.white_noise(64, 32, 1, generator=g),
            synthetic.position_trend(64, 32, 1),
            synthetic.ar1(64, 32, 1, 0.5, g),
        ],
        dim=2,
    )
    accumulator = Autocorrelation(4, 32, 8)
    for batch in f.split(10):
        accumulator.update(batch)
    rho = accumulator.compute()
    assert rho[:, :3].isnan().all()
    assert rho[:, 3].isfinite().all()
    assert accumulator.covariance()[0, :3].eq(0).all()
    for result in (integrated_time(rho), window_consistency(rho, 4), correlation_length(rho)[0]):
        assert result[:3].isnan().all() and result[3].isfinite()
    assert not correlation_length(rho).censored[:3].any()


def test_float32_and_bfloat16_features_are_summed_in_float64() -> None:
    f = synthetic.ar1(64, 16, 2, 0.5, seeded(6))
    for dtype in (torch.float32, torch.bfloat16):
        coarse = f.to(dtype)
        assert same(autocorrelation(coarse, 4), autocorrelation(coarse.double(), 4), 1e-12)


def test_a_feature_and_its_delayed_copy_are_equally_consistent() -> None:
    long = synthetic.ar1(4096, 70, 1, 0.9, seeded(7))
    f = torch.cat([long[:, 6:], long[:, :-6]], dim=2)
    rho = autocorrelation(f, 16)
    assert (rho[:, 0] - rho[:, 1]).abs().max() < 0.01


def test_token_local_features_have_no_memory() -> None:
    rho = autocorrelation(synthetic.token_local(2048, 64, 4, 0.05, seeded(8)), 16)
    assert rho[1:].abs().max() < 0.01
    assert (integrated_time(rho) - 1).abs().max() < 0.1
    assert (correlation_length(rho).values - (1 - math.exp(-1))).abs().max() < 0.01


def test_ranking_is_right_where_the_raw_window_variance_is_fooled() -> None:
    g = seeded(9)
    memory = synthetic.ar1(512, 64, 1, 0.95, g)
    f = torch.cat([memory, 0.01 * memory, 0.01 * synthetic.ar1(512, 64, 1, 0.3, g)], dim=2)
    raw = f.unfold(1, 8, 1).var(-1).mean((0, 1))
    assert raw[2] < raw[0], "the shrunken noise looks the most consistent to the raw variance"
    consistency = window_consistency(autocorrelation(f, 16), 8)
    assert consistency[0] > consistency[2] + 0.4
    assert abs(consistency[0] - consistency[1]) < 1e-9


@pytest.mark.parametrize("window", [2, 5, 16])
def test_variance_within_windows_is_the_share_that_consistency_leaves(window: int) -> None:
    g = seeded(10)
    f = torch.cat(
        [
            synthetic.ar1(4096, 64, 1, 0.9, g),
            synthetic.markov_runs(4096, 64, 1, 0.8, 0.9, g),
            synthetic.token_local(4096, 64, 1, 0.1, g),
        ],
        dim=2,
    )
    accumulator = Autocorrelation(3, 64, 16)
    accumulator.update(f)
    expected = accumulator.covariance()[0] * (1 - window_consistency(accumulator.compute(), window))
    within = f.unfold(1, window, 1).var(-1).mean((0, 1))
    assert (within / expected - 1).abs().max() < 0.01


def test_integrated_time_is_the_windowed_sum_written_out() -> None:
    g = seeded(11)
    f = torch.cat([synthetic.ar1(20, 40, 3, phi, g) for phi in (-0.4, 0.1, 0.3, 0.6, 0.9)], 2)
    rho = autocorrelation(f, 20)
    for j, tau in enumerate(integrated_time(rho)):
        for last in range(21):
            expected = 1 + 2 * rho[1 : last + 1, j].sum()
            if last >= 5 * expected:
                break
        assert abs(tau - expected) < 1e-12


def test_correlation_length_is_censored_at_the_largest_lag() -> None:
    slow = (0.99 ** torch.arange(9, dtype=torch.float64))[:, None]
    values, censored = correlation_length(slow)
    assert values.item() == 8 and censored.item()
    straight = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)[:, None]
    values, censored = correlation_length(straight)
    assert abs(values.item() - (1 + (0.5 - math.exp(-1)) / 0.4)) < 1e-12
    assert not censored.item()


def test_lags_without_a_pair_are_nan_and_do_not_spoil_the_times() -> None:
    f = synthetic.ar1(200, 12, 2, 0.9, seeded(12))
    segments = (torch.arange(12) // 4).expand(200, 12)
    rho = autocorrelation(f, 8, segments=segments)
    assert rho[:4].isfinite().all() and rho[4:].isnan().all()
    values, censored = correlation_length(rho)
    assert (values == 3).all() and censored.all()
    assert same(integrated_time(rho), integrated_time(rho[:4]))


def test_what_is_left_without_a_block_does_not_hang_on_the_batches() -> None:
    g = seeded(14)
    f = synthetic.ar1(23, 16, 3, 0.6, g)
    segments, valid = synthetic.random_masks(23, 16, g)
    whole, split = (Autocorrelation(3, 16, 5, n_blocks=4) for _ in range(2))
    whole.update(f, segments=segments, valid=valid)
    for part in (slice(0, 10), slice(10, 23)):
        split.update(f[part], segments=segments[part], valid=valid[part])
    assert whole.covariances().shape == (5, 6, 3)
    assert torch.allclose(split.covariances(), whole.covariances(), rtol=1e-8, atol=1e-8)


def test_mistakes_are_refused_in_words() -> None:
    f = torch.zeros(2, 8, 3)
    with pytest.raises(ValueError, match="max_lag must be 0 to 7"):
        autocorrelation(f, 8)
    with pytest.raises(ValueError, match="contexts, positions, features"):
        autocorrelation(f[0], 2)
    with pytest.raises(ValueError, match="valid must be"):
        autocorrelation(f, 2, valid=torch.ones(2, 7))
    with pytest.raises(ValueError, match="window 6 needs lags"):
        window_consistency(torch.ones(5, 3), 6)
    with pytest.raises(ValueError, match="takes features"):
        Autocorrelation(3, 8, 2).update(torch.zeros(2, 9, 3))
    with pytest.raises(ValueError, match="no batch"):
        Autocorrelation(3, 8, 2).compute()


def test_the_public_name_stays_a_function_once_its_module_is_imported() -> None:
    import tcsae.metrics

    assert tcsae.metrics.autocorrelation is autocorrelation
    assert tcsae.metrics.autocorrelation is autocorrelation, "and on the second look"
