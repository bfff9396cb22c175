from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap as scipy_bootstrap

from tcsae.metrics.bootstrap import interval, median, resampling_weights, weighted_mean
from tcsae.metrics.suite import ConsistencySuite
from tests.metrics import synthetic
from tests.metrics.synthetic import seeded


def test_each_resample_draws_as_many_blocks_as_there_are_and_no_empty_one() -> None:
    weights = resampling_weights(n_used=10, n_blocks=16, n_boot=500, seed=0)
    assert weights.shape == (500, 16)
    assert (weights.sum(1) == 10).all()
    assert (weights[:, 10:] == 0).all()
    assert (weights[:, :10].mean(0) - 1).abs().max() < 0.2


def test_resamples_are_repeatable_and_differ_by_seed() -> None:
    first = resampling_weights(10, 10, 50, seed=3)
    assert torch.equal(first, resampling_weights(10, 10, 50, seed=3))
    assert not torch.equal(first, resampling_weights(10, 10, 50, seed=4))


def test_interval_of_a_mean_is_scipys_percentile_interval() -> None:
    values = synthetic.white_noise(64, generator=seeded())
    weights = resampling_weights(64, 64, 20_000, seed=1).double()
    low, high = interval(weights @ values / 64, values.mean(), 0.95)
    theirs = scipy_bootstrap(
        (values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=0
    ).confidence_interval
    assert low.item() == pytest.approx(theirs.low, abs=0.01)
    assert high.item() == pytest.approx(theirs.high, abs=0.01)


def test_an_interval_of_draws_lies_about_the_estimate() -> None:
    draws = synthetic.white_noise(4000, generator=seeded(1)) + 5.0
    low, high = interval(draws, torch.tensor(1.0, dtype=torch.float64), 0.9)
    assert low.item() == pytest.approx(1 - 1.645, abs=0.1)
    assert high.item() == pytest.approx(1 + 1.645, abs=0.1)


def test_median_and_weighted_mean_are_numpys_with_missing_values_left_out() -> None:
    values = synthetic.white_noise(5, 8, generator=seeded(2))
    values[0, :3] = torch.nan
    values[1, 0] = torch.nan
    weights = torch.rand(5, 8, generator=seeded(3), dtype=torch.float64)
    assert np.allclose(median(values), np.nanmedian(values.numpy(), axis=1))
    masked = np.ma.masked_invalid(values.numpy())
    expected = np.ma.average(masked, axis=1, weights=weights.numpy())
    assert np.allclose(weighted_mean(values, weights), expected)


def test_intervals_of_window_consistency_cover_the_truth_about_as_often_as_they_say() -> None:
    phi, truth = 0.9, synthetic.ar1_window_consistency(0.9, 8)
    g = seeded(5)
    covered = {"energy_weighted_interval": 0, "median_interval": 0}
    for repetition in range(60):
        suite = ConsistencySuite(6, 48, windows=(8,), n_boot=300, seed=repetition)
        # Kept on by the offset: a feature is live if it fires.
        suite.update(synthetic.ar1(80, 48, 6, phi, g) + 10.0)
        entry = suite.summary()["metrics"]["C_8"]
        for name in covered:
            low, high = entry[name]
            covered[name] += low <= truth <= high
    assert all(51 <= count <= 60 for count in covered.values()), covered


def test_intervals_shrink_with_the_square_root_of_the_contexts() -> None:
    g = seeded(6)
    widths = []
    for n_contexts in (100, 1600):
        found = []
        # An error from 64 blocks is itself known to a tenth.
        for _ in range(8):
            suite = ConsistencySuite(4, 32, windows=(4,))
            suite.update(synthetic.ar1(n_contexts, 32, 4, 0.8, g) + 10.0)
            low, high = suite.summary()["metrics"]["C_4"]["energy_weighted_interval"]
            found.append(high - low)
        widths.append(sum(found) / 8)
    assert 3.5 < widths[0] / widths[1] < 4.6
