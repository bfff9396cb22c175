from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tcsae.metrics.suite import ConsistencySuite
from tcsae.metrics.units import (
    MAX_BLOCKS,
    Units,
    interval,
    jackknife_draws,
    jackknife_interval,
    multipliers,
)
from tests.metrics import synthetic
from tests.metrics.synthetic import seeded


def left_out(values: torch.Tensor) -> torch.Tensor:
    return (values.sum(0) - values) / (len(values) - 1)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=120), seed=st.integers(0, 99))
def test_blocks_are_whole_documents_and_about_alike(sizes: list[int], seed: int) -> None:
    named = [name for name, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(len(named), generator=seeded(seed)).tolist()
    units = Units([f"document {named[i]}" for i in order])
    assert units.n_documents == len(sizes) and len(units) == len(named)
    assert units.n_blocks == min(len(sizes), MAX_BLOCKS) == len(units.block.unique())
    for document in range(len(sizes)):
        assert len(units.block[units.document == document].unique()) == 1
    if len(sizes) > MAX_BLOCKS:
        filled = torch.bincount(units.block)
        assert filled.max() - filled.min() <= max(sizes)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=20), n=st.integers(1, 60))
def test_a_few_contexts_are_of_as_many_documents_as_can_be(sizes: list[int], n: int) -> None:
    units = Units([name for name, size in enumerate(sizes) for _ in range(size)])
    chosen = units.spread(n)
    assert len(chosen) == min(n, sum(sizes)) == len(chosen.unique())
    assert chosen.tolist() == sorted(chosen.tolist())
    taken = torch.bincount(units.document[chosen], minlength=len(sizes))
    most = int(taken.max())
    # A second context of any only when every document has given one, and so on.
    assert all(t >= min(most - 1, size) for t, size in zip(taken.tolist(), sizes, strict=True))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=90), seed=st.integers(0, 9))
def test_halves_are_of_whole_documents_and_alike_in_size(sizes: list[int], seed: int) -> None:
    units = Units([name for name, size in enumerate(sizes) for _ in range(size)])
    half = units.halves(seed)
    assert torch.equal(half, units.halves(seed))
    for document in range(len(sizes)):
        assert len(half[units.document == document].unique()) == 1
    counts = torch.bincount(units.block)
    assert abs(int(half.sum()) - int((~half).sum())) <= int(counts.max())


def test_sums_without_each_block_are_those_of_the_others() -> None:
    units = Units([0, 0, 1, 2, 2, 2])
    value = torch.rand(6, 3, generator=seeded())
    found = units.without_each(value)
    assert torch.allclose(found[0], value.sum(0))
    for block in range(3):
        assert torch.allclose(found[1 + block], value[units.block != block].sum(0))
    some = torch.tensor([0, 3])
    found = units.without_each(value[some], some)
    assert torch.allclose(found[1], value[3]) and torch.allclose(found[2], value[some].sum(0))


@pytest.mark.parametrize("n", [16, 40])
def test_draws_of_a_mean_have_students_interval(n: int) -> None:
    values = synthetic.white_noise(n, generator=seeded(n))
    expected = stats.t.interval(0.95, n - 1, float(values.mean()), stats.sem(values.numpy()))
    draws = jackknife_draws(left_out(values), values.mean(), 4000)
    found = [float(end) for end in interval(draws, values.mean(), 0.95)]
    width = expected[1] - expected[0]
    assert found == pytest.approx(expected, abs=0.04 * width)


def test_draws_of_two_runs_leave_the_same_documents_out() -> None:
    shared = 5 * synthetic.white_noise(40, generator=seeded(1))
    first, second = (shared + synthetic.white_noise(40, generator=seeded(s)) for s in (2, 3))
    draws = [jackknife_draws(left_out(v), v.mean(), 2000) for v in (first, second)]
    low, high = interval(draws[0] - draws[1], first.mean() - second.mean(), 0.95)
    error = float((first - second).std()) / math.sqrt(40)
    assert float(high - low) == pytest.approx(2 * stats.t.ppf(0.975, 39) * error, rel=0.05)
    assert torch.equal(multipliers(40, 2000), multipliers(40, 2000))


def covered(n: int, sigma: float, trials: int = 600) -> float:
    g, truth = seeded(n), math.exp(sigma**2 / 2) if sigma else 0.0
    held = 0
    for _ in range(trials):
        values = synthetic.white_noise(n, generator=g)
        values = (sigma * values).exp() if sigma else values
        low, high = jackknife_interval(left_out(values), values.mean(), 0.95)
        held += bool(low <= truth <= high)
    return held / trials


@pytest.mark.parametrize(("n", "sigma"), [(16, 0.0), (32, 0.0), (16, 0.5), (32, 1.0), (64, 1.0)])
def test_intervals_of_a_mean_hold_it_however_skewed_documents_are(n: int, sigma: float) -> None:
    """Lognormal: Student's t alone holds the mean in .89 of the trials at 32 documents, sigma 1."""
    assert 0.92 <= covered(n, sigma) <= 0.98


def test_the_error_of_a_share_that_is_nothing_is_not_counted_twice() -> None:
    """omega^2 of features without position: the interval's error beside the spread of trials."""
    g = seeded(5)
    found, errors = [], []
    for _ in range(150):
        f = synthetic.white_noise(64, 1, 12, generator=g) + synthetic.ar1(64, 16, 12, 0.7, g)
        suite = ConsistencySuite(12, 16, windows=(2,))
        suite.update(f + 9)
        entry = suite.summary()["metrics"]["omega_squared"]
        low, high = entry["energy_weighted_interval"]
        found.append(entry["energy_weighted"])
        errors.append((high - low) / 2 / stats.t.ppf(0.975, 63))
    spread = torch.tensor(found).std().item()
    assert torch.tensor(errors).square().mean().sqrt().item() == pytest.approx(spread, rel=0.2)


def test_few_documents_have_no_interval_whatever_their_contexts() -> None:
    f = synthetic.ar1(60, 16, 4, 0.5, seeded(6)) + 5
    for n_documents, known in ((15, False), (16, True)):
        suite = ConsistencySuite(
            4, 16, windows=(2,), units=Units([i % n_documents for i in range(60)])
        )
        suite.update(f)
        summary = suite.summary()
        assert summary["n_documents"] == n_documents and summary["n_contexts"] == 60
        assert (summary["metrics"]["C_2"]["energy_weighted_interval"][0] is not None) is known
        assert known or "from 15 documents: too few" in summary["interval_reason"]
        assert bool(suite.draws()) is known and bool(suite.by_density()) is known


@pytest.mark.parametrize("often", [4, 16])
def test_medians_do_not_move_with_the_number_of_contexts(often: int) -> None:
    """Runs of 3 on average in `often` of 256 contexts: with few of them .51 for .66."""
    medians = {}
    for n_contexts in (256, 1024, 4096):
        g, t = seeded(often), torch.arange(64)[None, :, None]
        draw = lambda g=g, n=n_contexts: torch.rand(n, 1, 100, generator=g)  # noqa: E731
        on, start = draw() < often / 256, (draw() * 64).long()
        length = (draw().log() / math.log(1 - 1 / 3)).floor() + 1
        f = (on & (t >= start) & (t < start + length)) * -draw().log()
        suite = ConsistencySuite(100, 64, max_lag=16, windows=(8,), n_blocks=0)
        suite.update(f)
        summary = suite.summary()
        assert summary["seen_contexts"] == 20
        medians[n_contexts] = summary["metrics"]["rho_1"]["median"]
    known = [value for value in medians.values() if value is not None]
    assert medians[4096] is not None and len(known) >= 2
    assert known == pytest.approx([0.66] * len(known), abs=0.07)
    assert often > 4 or medians[256] is None, "16 of 256 contexts are 16, 4 are 4"


def test_a_feature_that_happened_to_be_strong_weighs_no_more_for_it() -> None:
    """All of one law: energy-weighted density .0014, mean activation 1.0, run length 3.0."""
    found = {name: [] for name in ("density", "mean_activation", "run_length")}
    for seed in range(6):
        g, t = seeded(seed), torch.arange(64)[None, :, None]
        draw = lambda g=g: torch.rand(128, 1, 200, generator=g)  # noqa: E731
        on, start = draw() < 8 / 256, (draw() * 64).long()
        length = (draw().log() / math.log(1 - 1 / 3)).floor() + 1
        suite = ConsistencySuite(200, 64, max_lag=1, windows=(2,))
        suite.update((on & (t >= start) & (t < start + length)) * -draw().log())
        metrics = suite.summary()["metrics"]
        for name, values in found.items():
            values.append(metrics[name]["energy_weighted"])
    means = {name: sum(values) / 6 for name, values in found.items()}
    assert means["density"] == pytest.approx(0.00143, rel=0.08)
    assert means["mean_activation"] == pytest.approx(1.0, rel=0.08)
    assert means["run_length"] == pytest.approx(3.0, rel=0.08)
