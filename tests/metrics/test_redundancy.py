"""Redundant pairs, effective rank and position-by-position correlation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.metrics.correlation import (
    FeatureCorrelation,
    SparseFeatureCorrelation,
    feature_correlation,
)
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
from tcsae.metrics.units import Units


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


def test_profile_overlap_runs_from_disjoint_to_same() -> None:
    profiles = torch.tensor(
        [[0.2, 0.0, 0.1, 0.0], [0.2, 0.0, 0.1, 0.0], [0.0, 0.5, 0.1, 0.0], [torch.nan] * 4]
    )
    first, second = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 2, 3])
    overlap = profile_overlap(profiles, first, second)
    np.testing.assert_allclose(overlap, [1, 0, 2 / 3, np.nan])


def test_decoder_pairs_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcsae.metrics.twins._BLOCK_ROWS", 7)
    W_dec = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    cosine = np.corrcoef(np.hstack([W_dec, -W_dec]))  # of centred rows: the plain cosine
    expected = {(i, j) for i in range(40) for j in range(i + 1, 40) if cosine[i, j] > 0.7}
    first, second, values = similar_decoder_pairs(W_dec)
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected
    np.testing.assert_allclose(values, cosine[first, second], atol=1e-6)


@pytest.mark.parametrize("n_groups", [1, 3, 6])
def test_effective_rank_of_identical_groups_is_their_number(n_groups: int) -> None:
    values = torch.block_diag(*[torch.ones(4, 4)] * n_groups)
    assert effective_rank(values, (values, values)) == pytest.approx(n_groups)


def test_one_matrix_is_not_enough_for_an_effective_rank() -> None:
    assert np.isnan(effective_rank(torch.eye(4)))


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
    assert effective_rank(values, (values, values)) == pytest.approx(expected, rel=1e-9)


def test_effective_rank_is_that_of_the_features_that_vary_in_both_halves() -> None:
    f_BTF = random_codes(7)
    half = torch.arange(30) % 3 == 0
    f_BTF[half, :, 0] = 0
    f_BTF[~half, :, 1] = 1
    r_A, r_B = (feature_correlation(f_BTF[side][..., 2:]).values.numpy() for side in (~half, half))
    shared = sum(r_A[i, j] * r_B[i, j] for i in range(5) for j in range(5) if i != j)
    accumulator = FeatureCorrelation(7, dtype=torch.float64)
    accumulator.update(f_BTF[:11], half=half[:11])
    accumulator.update(f_BTF[11:], half=half[11:])
    values = accumulator.compute().values
    rank = effective_rank(values, accumulator.compute_halves())
    assert rank == pytest.approx(min(25 / (5 + shared), 5))
    eye = torch.eye(3)
    against = 1.5 * eye - 0.5
    assert effective_rank(eye, (against, -against + 2 * eye)) == 3  # noise only: all there are


def lasting(
    n_contexts: int, per_document: int, lasts: float, groups: bool = False
) -> tuple[Tensor, Tensor]:
    """[contexts, 16, 400] of which a share of the variance lasts a document; its halves."""
    g = torch.Generator().manual_seed(3)
    document = torch.arange(n_contexts) // per_document

    def drawn(*shape: int) -> Tensor:
        own = torch.randn(*shape, 400, generator=g)
        if not groups:
            return own
        return 0.5**0.5 * (own + torch.randn(*shape, 100, generator=g).repeat_interleave(4, -1))

    slow = drawn(n_contexts // per_document, 1)[document]
    f_BTF = lasts**0.5 * slow + (1 - lasts) ** 0.5 * drawn(n_contexts, 16)
    return f_BTF, Units(document).halves()


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("lasts", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("n_contexts", "per_document"), [(64, 1), (256, 1), (256, 4), (1024, 4)])
def test_effective_rank_does_not_fall_with_what_lasts(
    n_contexts: int, per_document: int, lasts: float, groups: bool
) -> None:
    f_BTF, half = lasting(n_contexts, per_document, lasts, groups)
    accumulator = FeatureCorrelation(400)
    accumulator.update(f_BTF, half=half)
    rank = effective_rank(accumulator.compute().values, accumulator.compute_halves())
    truth = 400 / 1.75 if groups else 400
    assert rank == pytest.approx(truth, rel=0.08)


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
    half = torch.arange(12) % 2 == 0
    whole.update(f_BTF, segments=segments, valid=valid)
    split.update(f_BTF[:cut], segments=segments[:cut], valid=valid[:cut], half=half[:cut])
    split.update(f_BTF[cut:], segments=segments[cut:], valid=valid[cut:], half=half[cut:])
    expected = position_correlation_by_loops(f_BTF[..., chosen], segments, valid)
    np.testing.assert_allclose(whole.compute(), expected, atol=1e-9)
    np.testing.assert_allclose(split.compute(), expected, atol=1e-9)
    for side, found in zip((~half, half), split.compute_halves(), strict=True):
        alone = position_correlation_by_loops(f_BTF[side][..., chosen], segments[side], valid[side])
        np.testing.assert_allclose(found, alone, atol=1e-9)
    whole.reset()
    assert whole.compute().isnan().all()


def autoregression(phi: float, n_contexts: int, n_positions: int, *features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n_contexts, n_positions, *features, generator=generator).double()
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
    half = torch.arange(4000) % 2 == 0
    accumulator.update(torch.stack([stationary, drifting, constant], dim=2), half=half)
    correlation = accumulator.compute()
    means = diagonal_means(correlation)
    np.testing.assert_allclose(means[0], 0.8 ** np.arange(16), atol=0.03)
    share = toeplitz_share(correlation, accumulator.compute_halves())
    assert share[0] > 0.98
    halves = np.arange(16) // 8
    truth = 0.8 ** abs(np.subtract.outer(np.arange(16), np.arange(16)))
    truth = truth * np.equal.outer(halves, halves)
    np.testing.assert_allclose(correlation[1], truth, atol=0.08)
    assert share[1] == pytest.approx(share_by_loops(truth, truth), abs=0.02)
    assert share[1] < 0.8
    assert share[2].isnan() and means[2].isnan().all()


def share_by_loops(first: np.ndarray, second: np.ndarray) -> float:
    """1 - sum e_A e_B / sum d_A d_B over the entries above the diagonal defined in both."""
    t, u = np.triu_indices(len(first), k=1)
    both = np.isfinite(first[t, u]) & np.isfinite(second[t, u])
    a, b, lag = first[t, u][both], second[t, u][both], (u - t)[both]
    rest = 0.0
    for d in np.unique(lag):
        a_d, b_d = a[lag == d], b[lag == d]
        rest += ((a_d - a_d.mean()) * (b_d - b_d.mean())).sum()
    return float(1 - rest / ((a - a.mean()) * (b - b.mean())).sum())


def test_toeplitz_share_is_the_share_a_lag_explains_in_an_analysis_of_covariance() -> None:
    distance = abs(np.subtract.outer(np.arange(20), np.arange(20)))
    pair = 0.7**distance + 0.1 * np.random.default_rng(0).random((2, 20, 20))
    pair[0, 2, 5] = np.nan
    first, second = torch.from_numpy(pair)
    share = toeplitz_share(second[None], (first[None], second[None]))
    assert share.item() == pytest.approx(share_by_loops(*pair))
    assert toeplitz_share(second[None]).isnan().all()  # one matrix is not enough


@pytest.mark.parametrize("n_contexts", [64, 256, 1024])
@pytest.mark.parametrize(
    ("constant", "phi"), [(0.95, 0.0), (0.6, 0.0), (0.0, 0.0), (0.0, 0.5), (0.0, 0.9)]
)
def test_toeplitz_share_of_stationary_features_is_one_or_cannot_be_told(
    n_contexts: int, constant: float, phi: float
) -> None:
    f_BTJ = (1 - constant) ** 0.5 * autoregression(phi, n_contexts, 48, 6)
    g = torch.Generator().manual_seed(5)
    f_BTJ += constant**0.5 * torch.randn(n_contexts, 1, 6, generator=g)
    accumulator = PositionCorrelation(range(6), 48)
    accumulator.update(f_BTJ, half=torch.arange(n_contexts) % 2 == 0)
    share = toeplitz_share(accumulator.compute(), accumulator.compute_halves())
    if phi == 0:
        assert share.isnan().all()
    else:
        assert share.isfinite().sum() >= 5
        assert share.nanmean() == pytest.approx(1, abs=0.06)


def test_one_context_has_no_position_correlation() -> None:
    accumulator = PositionCorrelation([0], 5)
    accumulator.update(torch.rand(1, 5, 1))
    assert accumulator.compute().isnan().all()
    assert toeplitz_share(accumulator.compute(), accumulator.compute_halves()).isnan().all()
