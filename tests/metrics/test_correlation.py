"""Correlation between features, against numpy and against what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.metrics import correlation as correlation_module
from tcsae.metrics.correlation import (
    FeatureCorrelation,
    SparseFeatureCorrelation,
    feature_correlation,
    larger_of,
)

Masks = dict[str, Tensor]


def random_batch(
    seed: int, n_contexts: int = 6, n_positions: int = 11, n_features: int = 5, density: float = 0.6
) -> tuple[Tensor, Masks]:
    rng = np.random.default_rng(seed)
    shape = (n_contexts, n_positions)
    values = rng.exponential(size=(*shape, n_features))
    values *= rng.random((*shape, n_features)) < density
    segments = (rng.random(shape) < 0.2).cumsum(axis=1)
    masks = {
        "segments": torch.from_numpy(segments),
        "valid": torch.from_numpy(rng.random(shape) < 0.8),
    }
    return torch.from_numpy(values), masks


def pearson_by_loops(features: Tensor, lag: int, masks: Masks) -> np.ndarray:
    """numpy.corrcoef over the pairs of one lag, collected one by one: [F, F]."""
    f, valid, segments = features.numpy(), masks["valid"].numpy(), masks["segments"].numpy()
    heads, tails = [], []
    for n in range(f.shape[0]):
        for t in range(f.shape[1] - lag):
            u = t + lag
            if valid[n, t] and valid[n, u] and segments[n, t] == segments[n, u]:
                heads.append(f[n, t])
                tails.append(f[n, u])
    n_features = f.shape[2]
    if len(heads) < 2:
        return np.full((n_features, n_features), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.corrcoef(np.array(heads).T, np.array(tails).T)
    return both[:n_features, n_features:]


def largest_by_loops(features: Tensor, max_lag: int, masks: Masks) -> np.ndarray:
    signed = [pearson_by_loops(features, lag, masks) for lag in range(max_lag + 1)]
    signed += [r.T for r in signed[1:]]
    return np.max(np.where(np.isnan(signed), -np.inf, signed), axis=0)


@given(seed=st.integers(0, 10**6), max_lag=st.integers(0, 13), density=st.sampled_from([0.02, 0.7]))
@settings(max_examples=40, deadline=None)
def test_largest_lagged_coefficient_equals_numpy_over_counted_pairs(
    seed: int, max_lag: int, density: float
) -> None:
    features, masks = random_batch(seed, density=density)
    values, _ = feature_correlation(features, max_lag, **masks)
    expected = largest_by_loops(features, max_lag, masks)
    known = np.isfinite(expected)
    assert np.array_equal(~values.isnan().numpy(), known)
    np.testing.assert_allclose(values.numpy()[known], expected[known], atol=1e-9)


def test_zero_lag_equals_numpy_corrcoef_of_the_valid_positions() -> None:
    features, masks = random_batch(3)
    values, lags = feature_correlation(features, valid=masks["valid"])
    expected = np.corrcoef(features[masks["valid"]].numpy().T)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-12)
    assert lags.count_nonzero() == 0


def delayed_copies(delay: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(20, 60, 1, generator=generator, dtype=dtype)
    other = torch.rand(20, 60, 1, generator=generator, dtype=dtype)
    return torch.cat([source, source.roll(delay, dims=1), other], dim=2)


@pytest.mark.parametrize("delay", [1, 3, 5])
def test_a_delayed_copy_is_found_at_its_lag_with_its_sign(delay: int) -> None:
    features = delayed_copies(delay)
    # roll brings the end of the context to its start: those positions hold no copy.
    valid = (torch.arange(60) >= delay).expand(20, 60)
    values, lags = feature_correlation(features, max_lag=6, valid=valid)
    assert values[0, 1] == pytest.approx(1, abs=1e-12)
    assert lags[0, 1] == delay
    assert lags[1, 0] == -delay
    assert values[0, 2] < 0.2
    assert feature_correlation(features, max_lag=delay - 1, valid=valid).values[0, 1] < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_values_are_symmetric_and_lags_antisymmetric_even_with_ties(seed: int) -> None:
    # The same read backwards, so that the coefficients at k and at -k are equal.
    half = torch.randint(2, (4, 8, 3), generator=torch.Generator().manual_seed(seed)).double()
    features = torch.cat([half, half.flip(1)], dim=1)
    values, lags = feature_correlation(features, max_lag=4)
    assert lags.count_nonzero() > 0
    assert torch.equal(values, values.T)
    assert torch.equal(lags, -lags.T)
    assert torch.equal(values.diagonal(), torch.ones(3).double())
    assert lags.diagonal().count_nonzero() == 0


def test_a_pair_across_documents_does_not_count() -> None:
    features = delayed_copies(1)[:, :2]
    documents = torch.tensor([0, 1]).expand(20, 2)
    alone = feature_correlation(features, max_lag=1, segments=documents)
    assert torch.equal(alone.values, feature_correlation(features, segments=documents).values)
    assert feature_correlation(features, max_lag=1).lags[0, 1] == 1


def test_dead_and_constant_features_have_no_coefficient() -> None:
    features, masks = random_batch(1)
    features[..., 1] = 0
    features[..., 2] = 5.3
    for dtype in (torch.float32, torch.float64):
        values, lags = feature_correlation(features.to(dtype), 3, **masks)
        missing = values.isnan()
        assert missing[1].all() and missing[2].all() and missing[:, 1].all() and missing[:, 2].all()
        assert missing.sum() == 2 * 5 + 2 * 3
        assert lags[missing].count_nonzero() == 0


def test_a_constant_among_sparse_codes_has_no_coefficient() -> None:
    features, masks = random_batch(2, n_contexts=64, n_features=60, density=0.01)
    features[..., 7] = 5.3
    for values in (
        feature_correlation(features, 2, **masks).values,
        feature_correlation(features.float(), 2, **masks).values,
    ):
        assert values[7].isnan().all()
        assert (~values.isnan()).sum() >= 50**2


def test_a_large_mean_does_not_spoil_float32() -> None:
    features, masks = random_batch(5, n_contexts=64)
    expected = feature_correlation(features, 2, **masks).values
    shifted = (features + 1000).float()
    np.testing.assert_allclose(feature_correlation(shifted, 2, **masks).values, expected, atol=2e-4)


def test_bfloat16_codes_give_the_coefficients_of_their_values() -> None:
    features, masks = random_batch(6, n_contexts=64)
    rounded = features.bfloat16()
    values = feature_correlation(rounded, 2, **masks).values
    assert values.dtype == torch.float32
    expected = feature_correlation(rounded.double(), 2, **masks).values
    np.testing.assert_allclose(values, expected, atol=1e-5)


@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    density=st.sampled_from([0.02, 0.7]),
)
@settings(max_examples=30, deadline=None)
def test_any_split_equals_all_at_once(seed: int, cuts: list[int], density: float) -> None:
    features, masks = random_batch(seed, density=density)
    bounds = sorted({0, *cuts, len(features)})
    parts = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    whole = FeatureCorrelation(5, 3, torch.float64)
    split = FeatureCorrelation(5, 3, torch.float64)
    whole.update(features, **masks)
    for part in parts:
        some = {name: mask[part] for name, mask in masks.items()}
        split.update(features[part], **some)
    theirs, ours = split.compute().values, whole.compute().values
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0, equal_nan=True)
    whole.reset()
    assert whole.compute().values.isnan().all()


def test_one_state_also_answers_for_smaller_lags() -> None:
    features, masks = random_batch(8)
    accumulator = FeatureCorrelation(5, 4, torch.float64)
    accumulator.update(features, **masks)
    expected = feature_correlation(features, 0, **masks)
    assert torch.equal(accumulator.compute(max_lag=0).values, expected.values)


def test_passes_over_blocks_of_lags_join_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    features, masks = random_batch(9)
    expected = feature_correlation(features, 4, **masks)
    passes = [
        FeatureCorrelation(5, high, torch.float64, min_lag=low) for low, high in ((0, 1), (2, 4))
    ]
    for accumulator in passes:
        accumulator.update(features, **masks)
    joined = larger_of(passes[0].compute(), passes[1].compute())
    monkeypatch.setattr(correlation_module, "_PRODUCT_BYTES", 1)
    for result in (joined, feature_correlation(features, 4, **masks)):
        torch.testing.assert_close(result.values, expected.values)
        assert torch.equal(result.lags, expected.lags)


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    features, masks = random_batch(10, density=0.02)
    dense, _ = random_batch(10)
    expected = [feature_correlation(f, 3, **masks).values for f in (features, dense)]
    monkeypatch.setattr(correlation_module._blocks, "__defaults__", (2,))
    for f, values in zip((features, dense), expected, strict=True):
        again = feature_correlation(f, 3, **masks).values
        torch.testing.assert_close(again, values, equal_nan=True)


def test_bad_arguments_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="min_lag <= max_lag"):
        feature_correlation(torch.ones(2, 4, 3), max_lag=-1)
    with pytest.raises(ValueError, match="features"):
        feature_correlation(torch.ones(4, 3))
    with pytest.raises(ValueError, match="features"):
        FeatureCorrelation(2).update(torch.ones(2, 4, 3))


@given(seed=st.integers(0, 10**6), max_lag=st.integers(0, 4), density=st.sampled_from([0.02, 0.5]))
@settings(max_examples=25, deadline=None)
def test_sparse_partners_are_the_largest_entries_of_the_dense_rows(
    seed: int, max_lag: int, density: float
) -> None:
    features, masks = random_batch(seed, n_contexts=12, n_features=9, density=density)
    dense = feature_correlation(features, max_lag, **masks).values.clone()
    accumulator = SparseFeatureCorrelation(9, max_lag)
    accumulator.update(features, **masks)
    partners, values, lags = accumulator.compute(top_k=4)
    dense.fill_diagonal_(torch.nan)
    expected = dense.nan_to_num(nan=-torch.inf).topk(4).values
    expected = expected.masked_fill(expected == -torch.inf, torch.nan).float()
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0, equal_nan=True)
    found = partners >= 0
    assert torch.equal(found, ~values.isnan())
    assert lags.abs().max() <= max_lag and lags[~found].count_nonzero() == 0
    at_partner = dense.gather(1, partners.clamp(min=0))[found]
    torch.testing.assert_close(values[found], at_partner.float(), atol=1e-6, rtol=0)
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in partners)


def test_sparse_accumulator_finds_a_delayed_copy_in_any_batches() -> None:
    features = delayed_copies(3)
    valid = (torch.arange(60) >= 3).expand(20, 60)
    whole, split = (SparseFeatureCorrelation(3, 4) for _ in range(2))
    whole.update(features, valid=valid)
    split.update(features[:7], valid=valid[:7])
    split.update(features[7:], valid=valid[7:])
    expected = whole.compute(top_k=2)
    assert expected.partners[:2, 0].tolist() == [1, 0]
    assert expected.lags[:2, 0].tolist() == [3, -3]
    for theirs, ours in zip(split.compute(top_k=2), expected, strict=True):
        torch.testing.assert_close(theirs, ours)
    whole.reset()
    assert (whole.compute(top_k=2).partners == -1).all()


def test_sparse_coefficients_of_chosen_pairs_are_exact() -> None:
    features, masks = random_batch(12)
    accumulator = SparseFeatureCorrelation(5)
    accumulator.update(features, **masks)
    first, second = torch.tensor([0, 1, 4]), torch.tensor([3, 2, 0])
    expected = feature_correlation(features, **masks).values[first, second]
    torch.testing.assert_close(accumulator.of_pairs(first, second), expected.float())
    assert accumulator.of_pairs(first[:0], second[:0]).shape == (0,)


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_halves_are_what_each_gives_alone_and_leave_the_whole_as_it_is(density: float) -> None:
    g = torch.Generator().manual_seed(0)
    on = torch.rand(40, 30, 12, generator=g) < density
    f_BTF = 5 + on * torch.rand(40, 30, 12, generator=g) if density > 0.1 else on.float()
    f_BTF = f_BTF.double()
    f_BTF[::3, :, 4] = 0.25  # constant in one half
    valid, half = torch.rand(40, 30, generator=g) < 0.9, torch.arange(40) % 3 == 0
    accumulator = FeatureCorrelation(12, 2, torch.float64)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 40)):
        accumulator.update(f_BTF[rows], valid=valid[rows], half=half[rows])
    for found, side in zip(accumulator.compute_halves(), (~half, half), strict=True):
        alone = feature_correlation(f_BTF[side], valid=valid[side]).values
        np.testing.assert_allclose(found, alone, atol=1e-9)
    assert accumulator.compute_halves()[1][4].isnan().all()
    for lag in (0, 2):
        whole = feature_correlation(f_BTF, lag, valid=valid)
        found = accumulator.compute(max_lag=lag)
        np.testing.assert_allclose(found.values, whole.values, atol=1e-9)


def test_without_halves_the_second_is_undefined() -> None:
    accumulator = FeatureCorrelation(3)
    accumulator.update(torch.rand(4, 5, 3))
    first, second = accumulator.compute_halves()
    np.testing.assert_allclose(first, accumulator.compute().values, atol=1e-6)
    assert second.shape == (3, 3) and second.isnan().all()
    accumulator.reset()
    assert accumulator.compute_halves()[0].isnan().all()
