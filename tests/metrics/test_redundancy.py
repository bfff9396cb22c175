"""Redundant pairs, position twins, effective rank and position-by-position correlation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.metrics.correlation import SparseFeatureCorrelation, feature_correlation
from tcsae.metrics.redundancy import (
    PositionCorrelation,
    diagonal_means,
    effective_rank,
    position_twins,
    profile_overlap,
    redundancy_groups,
    redundancy_report,
    redundant_pairs,
    similar_decoder_pairs,
    toeplitz_share,
    twins_report,
)


def random_codes(n_features: int, seed: int = 0) -> Tensor:
    return torch.rand(30, 24, n_features, generator=torch.Generator().manual_seed(seed)).double()


def family() -> tuple[Tensor, Tensor]:
    """Features 0, 1, 2: one thing, 2 two positions late; 3, 4: another thing; 5 to 8: unrelated;
    0 and 5 share their decoder direction but not their activation; 7 copies 6 but not its row."""
    f_BTF = random_codes(9)
    f_BTF[..., 1] = 2 * f_BTF[..., 0]
    f_BTF[..., 2] = f_BTF[..., 0].roll(2, dims=1)
    f_BTF[..., 4] = f_BTF[..., 3] + 0.01 * f_BTF[..., 4]
    f_BTF[..., 7] = f_BTF[..., 6]
    W_dec = torch.eye(9)
    W_dec[[1, 2, 5]] = W_dec[0] + 0.3 * W_dec[[1, 2, 5]]
    W_dec[4] = 3 * W_dec[3]
    return f_BTF, W_dec


VALID = (torch.arange(24) >= 2).expand(30, 24)


def test_near_copies_form_groups_and_look_alikes_do_not() -> None:
    f_BTF, W_dec = family()
    values, lags = feature_correlation(f_BTF, 3, valid=VALID)
    pairs = redundant_pairs(values, W_dec, lags=lags)
    found = set(zip(*(column.tolist() for column in pairs[:2]), pairs.lag.tolist(), strict=True))
    assert found == {(0, 1, 0), (0, 2, 2), (1, 2, 2), (3, 4, 0)}
    assert redundancy_groups(pairs, 9) == [[0, 1, 2], [3, 4]]
    assert (pairs.cosine > 0.7).all() and (pairs.correlation > 0.9).all()
    assert (pairs.correlation.diff() <= 0).all()
    zero_lag = redundant_pairs(feature_correlation(f_BTF, valid=VALID).values, W_dec)
    assert redundancy_groups(zero_lag, 9) == [[0, 1], [3, 4]]


def test_thresholds_are_obeyed() -> None:
    f_BTF, W_dec = family()
    values = feature_correlation(f_BTF).values
    assert len(redundant_pairs(values, W_dec, cosine_threshold=-1).first) == 3
    assert len(redundant_pairs(values, W_dec, cosine_threshold=0.99).first) == 1
    assert len(redundant_pairs(values, W_dec, correlation_threshold=-2).first) == 7


def test_sparse_partners_give_the_same_pairs() -> None:
    f_BTF, W_dec = family()
    values, lags = feature_correlation(f_BTF, 3, valid=VALID)
    dense = redundant_pairs(values, W_dec, lags=lags)
    accumulator = SparseFeatureCorrelation(9, 3)
    accumulator.update(f_BTF, valid=VALID)
    partners, top_values, top_lags = accumulator.compute(top_k=3)
    sparse = redundant_pairs(top_values, W_dec, lags=top_lags, partners=partners)
    by_number = [
        sorted(zip(*(c.tolist() for c in (p.first, p.second, p.lag)), strict=True))
        for p in (sparse, dense)
    ]
    assert by_number[0] == by_number[1]


def test_a_pair_known_from_its_second_feature_only_has_its_lag_turned() -> None:
    values = torch.tensor([[0.1], [0.2], [0.3], [0.95]])
    partners = torch.tensor([[1], [0], [0], [1]])
    lags = torch.tensor([[0], [0], [0], [-2]], dtype=torch.int16)
    pairs = redundant_pairs(values, torch.ones(4, 2), lags=lags, partners=partners)
    assert (pairs.first.item(), pairs.second.item(), pairs.lag.item()) == (1, 3, 2)


def test_redundant_share_is_what_could_go() -> None:
    f_BTF, W_dec = family()
    f_BTF[..., 8] = 0
    values, lags = feature_correlation(f_BTF, 3, valid=VALID)
    live = (f_BTF > 0).flatten(0, 1).any(dim=0)
    report = redundancy_report(redundant_pairs(values, W_dec, lags=lags), live)
    assert (report["n_live"], report["n_pairs"], report["n_groups"]) == (8, 4, 2)
    assert report["group_sizes"] == [3, 2]
    assert report["redundant_share"] == 3 / 8
    assert report["examples"][0]["features"] in ([0, 1], [0, 2], [1, 2])
    json.dumps(report, allow_nan=False)


def test_a_dead_dictionary_is_reported_without_nan() -> None:
    values = feature_correlation(torch.zeros(2, 5, 4), 2).values
    live, W_dec = torch.zeros(4, dtype=torch.bool), torch.zeros(4, 3)
    report = redundancy_report(redundant_pairs(values, W_dec), live)
    assert report["redundant_share"] is None and report["redundant_share_reason"]
    twins = twins_report(position_twins(values, W_dec, torch.zeros(5, 4)), live)
    assert twins["twinned_share"] is None and twins["twinned_share_reason"]
    json.dumps([report, twins], allow_nan=False)
    assert np.isnan(effective_rank(values))


def twins_family() -> tuple[Tensor, Tensor, Tensor]:
    """0 and 1: one direction, first and second half. 2: that direction, everywhere. 3: first half,
    another direction. 4 and 5: one direction, both in the first half. 6: dead, direction of 0."""
    generator = torch.Generator().manual_seed(1)
    on = torch.rand(200, 20, 7, generator=generator) < 0.3
    early = (torch.arange(20) < 10)[:, None]
    on[..., [0, 3, 4, 5]] &= early
    on[..., [1]] &= ~early
    on[..., 6] = False
    f_BTF = on * torch.rand(200, 20, 7, generator=generator)
    W_dec = torch.eye(7)[[0, 0, 0, 1, 2, 2, 0]] + 0.1 * torch.eye(7)
    return f_BTF, W_dec, on.float().mean(dim=0)


def test_position_twins_are_found_and_nothing_else() -> None:
    f_BTF, W_dec, profiles = twins_family()
    pairs = position_twins(feature_correlation(f_BTF).values, W_dec, profiles)
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0], [1])
    assert pairs.correlation[0] < 0
    assert pairs.cosine[0] > 0.7
    report = twins_report(pairs, torch.tensor([1, 1, 1, 1, 1, 1, 0]).bool())
    assert (report["n_pairs"], report["n_features"], report["twinned_share"]) == (1, 2, 2 / 6)
    json.dumps(report, allow_nan=False)


def test_position_twins_of_a_sparse_accumulator() -> None:
    f_BTF, W_dec, profiles = twins_family()
    accumulator = SparseFeatureCorrelation(7)
    accumulator.update(f_BTF)
    pairs = position_twins(accumulator.of_pairs, W_dec, profiles)
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0], [1])


def test_features_that_fire_together_are_no_position_twins() -> None:
    _, W_dec, profiles = twins_family()
    pairs = position_twins(lambda first, _: torch.full((len(first),), 0.5), W_dec, profiles)
    assert len(pairs.first) == 0


def test_profile_overlap_runs_from_disjoint_to_same() -> None:
    profiles = torch.tensor(
        [[0.2, 0.0, 0.1, 0.0], [0.2, 0.0, 0.1, 0.0], [0.0, 0.5, 0.1, 0.0], [torch.nan] * 4]
    )
    first, second = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 2, 3])
    overlap = profile_overlap(profiles, first, second)
    np.testing.assert_allclose(overlap, [1, 0, 2 / 3, np.nan])


def test_decoder_pairs_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcsae.metrics.redundancy._BLOCK_ROWS", 7)
    W_dec = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    cosine = np.corrcoef(np.hstack([W_dec, -W_dec]))  # of centred rows: the plain cosine
    expected = {(i, j) for i in range(40) for j in range(i + 1, 40) if cosine[i, j] > 0.7}
    first, second, values = similar_decoder_pairs(W_dec)
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected
    np.testing.assert_allclose(values, cosine[first, second], atol=1e-6)


@pytest.mark.parametrize("n_groups", [1, 3, 6])
def test_effective_rank_of_identical_groups_is_their_number(n_groups: int) -> None:
    rank = effective_rank(torch.block_diag(*[torch.ones(4, 4)] * n_groups))
    assert rank == pytest.approx(n_groups)


@given(seed=st.integers(0, 10**6), n_features=st.integers(2, 30))
@settings(max_examples=25, deadline=None)
def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues(
    seed: int, n_features: int
) -> None:
    f_BTF = random_codes(n_features, seed)
    f_BTF[..., 0] = 0
    values = feature_correlation(f_BTF).values
    eigenvalues = np.linalg.eigvalsh(values[1:, 1:].numpy())
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert effective_rank(values) == pytest.approx(expected, rel=1e-9)


def masked_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    features = rng.exponential(size=(12, 7, 4)) * (rng.random((12, 7, 4)) < 0.7)
    segments = (rng.random((12, 7)) < 0.25).cumsum(axis=1)
    valid = rng.random((12, 7)) < 0.8
    return torch.from_numpy(features), torch.from_numpy(segments), torch.from_numpy(valid)


def position_correlation_by_loops(f: Tensor, segments: Tensor, valid: Tensor) -> np.ndarray:
    n_positions = f.shape[1]
    result = np.full((f.shape[2], n_positions, n_positions), np.nan)
    for t in range(n_positions):
        for u in range(n_positions):
            use = valid[:, t] & valid[:, u] & (segments[:, t] == segments[:, u])
            for j in range(f.shape[2]):
                a, b = f[use, t, j].numpy(), f[use, u, j].numpy()
                if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0:
                    result[j, t, u] = np.corrcoef(a, b)[0, 1]
    return result


@given(seed=st.integers(0, 10**6), cut=st.integers(1, 11))
@settings(max_examples=15, deadline=None)
def test_position_by_position_correlation_equals_loops_in_any_split(seed: int, cut: int) -> None:
    f_BTF, segments, valid = masked_batch(seed)
    chosen = [3, 1]
    whole, split = (PositionCorrelation(chosen, 7) for _ in range(2))
    whole.update(f_BTF, segments=segments, valid=valid)
    split.update(f_BTF[:cut], segments=segments[:cut], valid=valid[:cut])
    split.update(f_BTF[cut:], segments=segments[cut:], valid=valid[cut:])
    expected = position_correlation_by_loops(f_BTF[..., chosen], segments, valid)
    np.testing.assert_allclose(whole.compute(), expected, atol=1e-9)
    np.testing.assert_allclose(split.compute(), expected, atol=1e-9)
    whole.reset()
    assert whole.compute().isnan().all()


def autoregression(phi: float, n_contexts: int, n_positions: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n_contexts, n_positions, generator=generator).double()
    f_BT = noise.clone()
    for t in range(1, n_positions):
        f_BT[:, t] = phi * f_BT[:, t - 1] + (1 - phi**2) ** 0.5 * noise[:, t]
    return f_BT


def test_a_stationary_feature_is_toeplitz_and_a_positional_one_is_not() -> None:
    stationary = autoregression(0.8, 4000, 16)
    drifting = stationary.clone()
    # Two halves of a context that do not know of each other.
    drifting[:, 8:] = autoregression(0.8, 4000, 24)[:, 16:].roll(1, dims=0)
    accumulator = PositionCorrelation([0, 1, 2], 16)
    constant = torch.ones_like(stationary)
    accumulator.update(torch.stack([stationary, drifting, constant], dim=2))
    correlation = accumulator.compute()
    means = diagonal_means(correlation)
    np.testing.assert_allclose(means[0], 0.8 ** np.arange(16), atol=0.03)
    share = toeplitz_share(correlation)
    assert share[0] > 0.98
    halves = np.arange(16) // 8
    truth = 0.8 ** abs(np.subtract.outer(np.arange(16), np.arange(16)))
    truth = truth * np.equal.outer(halves, halves)
    np.testing.assert_allclose(correlation[1], truth, atol=0.08)
    assert share[1] == pytest.approx(toeplitz_share(torch.from_numpy(truth)[None]).item(), abs=0.02)
    assert share[1] < 0.8
    assert share[2].isnan() and means[2].isnan().all()


def test_toeplitz_share_is_the_share_a_lag_explains_in_an_analysis_of_variance() -> None:
    matrix = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    t, u = np.triu_indices(6, k=1)
    values, lag = matrix[0].numpy()[t, u], u - t
    within = sum(((values[lag == d] - values[lag == d].mean()) ** 2).sum() for d in range(1, 6))
    expected = 1 - within / ((values - values.mean()) ** 2).sum()
    assert toeplitz_share(matrix).item() == pytest.approx(expected)


def test_one_context_has_no_position_correlation() -> None:
    accumulator = PositionCorrelation([0], 5)
    accumulator.update(torch.rand(1, 5, 1))
    assert accumulator.compute().isnan().all()
    assert toeplitz_share(accumulator.compute()).isnan().all()
