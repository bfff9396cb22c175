from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import f_classif
from sklearn.metrics import mutual_info_score
from torch import Tensor

from tcsae.metrics.position import (
    PositionDependence,
    position_dependence,
    position_information,
)
from tests.metrics import synthetic
from tests.metrics.synthetic import seeded


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), invalid=st.floats(0, 0.5), offset=st.sampled_from([0, 1e3]))
def test_share_of_variance_agrees_with_sklearns_f_test(
    seed: int, invalid: float, offset: float
) -> None:
    g = seeded(seed)
    f = synthetic.white_noise(12, 6, 3, generator=g) + synthetic.position_trend(12, 6, 3) + offset
    valid = torch.rand(12, 6, generator=g) >= invalid
    position = torch.arange(6).expand(12, 6)[valid]
    f_statistic, _ = f_classif(f[valid].numpy(), position.numpy())
    groups, n = len(position.unique()), len(position)
    between, within = torch.from_numpy(f_statistic) * (groups - 1), n - groups
    eta = between / (between + within)
    result = position_dependence(f, valid=valid)
    assert same(result.eta_squared, eta, 1e-6)


def paired_share(f: Tensor, valid: Tensor, own: Tensor, mean: Tensor) -> Tensor:
    """omega^2 about `mean` [F] by going through all pairs of contexts, but those of one `own` [N].

    f [N, T, F], valid [N, T].
    """
    different = own[:, None] != own
    g = torch.where(valid[..., None], f - mean, 0.0)
    at_position = tokens = 0.0
    for t in range(f.shape[1]):
        counted = different & valid[:, t, None] & valid[:, t]
        if counted.any():
            products_F = torch.einsum("if,jf,ij->f", g[:, t], g[:, t], counted.double())
            at_position = at_position + products_F / counted.sum() * valid[:, t].sum()
            tokens += valid[:, t].sum()
    sums_NF, n_N, pairs = g.sum(1), valid.sum(1).double(), different.double()
    overall = torch.einsum("if,jf,ij->f", sums_NF, sums_NF, pairs) / (n_N @ pairs @ n_N)
    between = at_position / tokens - overall
    return between / (g.square().sum((0, 1)) / valid.sum() - overall)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), invalid=st.floats(0, 0.6), offset=st.sampled_from([0, 1e3]))
def test_unbiased_share_agrees_with_going_through_all_pairs_of_contexts(
    seed: int, invalid: float, offset: float
) -> None:
    g = seeded(seed)
    f = synthetic.white_noise(7, 6, 3, generator=g) + synthetic.position_trend(7, 6, 3) + offset
    f += synthetic.white_noise(7, 1, 3, generator=g)
    valid = torch.rand(7, 6, generator=g) >= invalid
    valid[:2, 0] = True
    expected = paired_share(f, valid, torch.arange(7), f[valid].mean(0))
    accumulator = PositionDependence(3, 6)
    for part, mask in zip(f.split(2), valid.split(2), strict=True):
        accumulator.update(part, valid=mask)
    assert same(accumulator.compute().omega_squared, expected, 1e-6)


@pytest.mark.parametrize("n_contexts", [16, 64, 256])
def test_lasting_features_have_no_position_share_on_average(n_contexts: int) -> None:
    """Hays' form was too low by D / N here: .037 at 16 contexts and D .6."""
    g, n = seeded(n_contexts), 400
    kinds = {
        "constant in a context": 0.6**0.5 * synthetic.white_noise(n_contexts, 1, n, generator=g)
        + 0.4**0.5 * synthetic.white_noise(n_contexts, 32, n, generator=g),
        "AR(1)": synthetic.ar1(n_contexts, 32, n, 0.95, g),
        "runs": synthetic.markov_runs(n_contexts, 32, n, 0.9, 0.9, g),
    }
    for name, f in kinds.items():
        omega_F = position_dependence(f).omega_squared
        error = omega_F.std() / n**0.5
        assert abs(omega_F.mean()) < 4 * error + 1e-4, (name, float(omega_F.mean()))
        assert error < 0.1 / n_contexts


@pytest.mark.parametrize("n_contexts", [16, 64, 256])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_known_trend_has_its_share_however_long_the_rest_lasts(
    n_contexts: int, share: float
) -> None:
    g, n = seeded(n_contexts), 400
    trend = synthetic.position_trend(1, 32, 1)
    trend = (trend - trend.mean()) / trend.std(unbiased=False)
    rest = 0.6**0.5 * synthetic.white_noise(n_contexts, 1, n, generator=g)
    rest = rest + 0.4**0.5 * synthetic.white_noise(n_contexts, 32, n, generator=g)
    f = share**0.5 * trend + (1 - share) ** 0.5 * rest
    result = position_dependence(f)
    # The ratio of the sums: a mean of ratios is a little off where v itself is noisy.
    variance_F = f.var((0, 1))
    found = (result.omega_squared * variance_F).sum() / variance_F.sum()
    assert abs(found - share) < 0.02 * (16 / n_contexts) ** 0.5 * (0.2 + share)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.1, 0.9), invalid=st.floats(0, 0.5))
def test_information_agrees_with_sklearns_and_is_cut_by_what_is_chance(
    seed: int, density: float, invalid: float
) -> None:
    g = seeded(seed)
    f = synthetic.token_local(20, 5, 1, density, g)
    f[0, 0], f[1, 1] = 1.0, 0.0
    valid = torch.rand(20, 5, generator=g) >= invalid
    valid[:2, :2] = True
    position, fires = torch.arange(5).expand(20, 5)[valid], (f[..., 0] > 0)[valid]
    on_NT = ((f[..., 0] > 0) & valid).double()
    counts_T, fires_T = valid.sum(0).double(), on_NT.sum(0)
    seen, entropy = position_information(fires_T[:, None], counts_T)
    assert abs(seen.item() - mutual_info_score(position.numpy(), fires.numpy())) < 1e-9
    p = fires.double().mean()
    assert abs(entropy.item() + float(p * p.log() + (1 - p) * (1 - p).log())) < 1e-9
    # The variance of the rates as it is seen, and from pairs of different contexts.
    as_seen = (counts_T * (fires_T / counts_T.clamp(min=1) - p) ** 2).sum() / counts_T.sum()
    pairs_T = counts_T**2 - valid.double().square().sum(0)
    told_T = pairs_T > 0
    at_T = (fires_T**2 - on_NT.square().sum(0)) / pairs_T.clamp(min=1)
    overall = (on_NT.sum() ** 2 - on_NT.sum(1).square().sum()) / (
        valid.sum() ** 2 - valid.sum(1).square().sum()
    )
    between = (counts_T * at_T)[told_T].sum() / counts_T[told_T].sum() - overall
    result = position_dependence(f, valid=valid)
    assert abs(result.mutual_information.item() - float(seen[0] * between / as_seen)) < 1e-9
    share = float(seen[0] * between / as_seen / entropy[0])
    assert abs(result.mutual_information_share.item() - share) < 1e-9


@pytest.mark.parametrize("n_contexts", [16, 64, 256])
@pytest.mark.parametrize(("density", "length"), [(0.3, 1.001), (0.02, 16), (0.005, 16), (0.1, 64)])
def test_information_of_features_without_position_is_nothing_on_average(
    n_contexts: int, density: float, length: float
) -> None:
    """Miller's correction is .012 too much at 16 contexts for features that last."""
    g, n = seeded(n_contexts), 400
    f = synthetic.markov_runs(
        n_contexts, 64, n, 1 - 1 / length, 1 - density / length / (1 - density), g
    )
    information_F = position_dependence(f).mutual_information
    known_F = information_F[information_F.isfinite()]
    error = float(known_F.std()) / len(known_F) ** 0.5
    assert abs(float(known_F.mean())) < 4 * error + 1e-4


def test_information_of_a_known_dependence_is_right() -> None:
    p_T = torch.linspace(0.1, 0.8, 8).double()
    f = (torch.rand(4000, 8, 20, generator=seeded(4)) < p_T[:, None]).float()

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log())

    truth = float(entropy(p_T.mean()) - entropy(p_T).mean())
    found = position_dependence(f).mutual_information
    assert float(found.mean()) == pytest.approx(truth, rel=0.01)


def test_a_pure_trend_is_all_position() -> None:
    result = position_dependence(synthetic.position_trend(50, 32, 2))
    assert (result.eta_squared - 1).abs().max() < 1e-9
    assert (result.omega_squared - 1).abs().max() < 1e-9
    assert same(result.profile_mean[:, 0], synthetic.position_trend(1, 32, 1)[0, :, 0])


def test_a_feature_that_owns_half_the_positions_carries_the_whole_entropy() -> None:
    f = torch.zeros(400, 16, 1)
    f[:, 8:] = 1.0
    result = position_dependence(f)
    assert abs(result.mutual_information.item() - math.log(2)) < 0.002
    assert abs(result.mutual_information_share.item() - 1) < 0.002
    assert result.profile_rate[:, 0].tolist() == [0.0] * 8 + [1.0] * 8


def test_stationary_features_do_not_depend_on_position_however_long_their_memory() -> None:
    g = seeded(1)
    f = torch.cat(
        [synthetic.ar1(4096, 32, 2, 0.95, g), synthetic.markov_runs(4096, 32, 2, 0.9, 0.9, g)], 2
    )
    result = position_dependence(f)
    assert result.omega_squared.abs().max() < 0.002
    assert result.mutual_information.abs().max() < 0.002


def test_unbiased_twin_is_zero_on_average_where_the_plain_share_is_not() -> None:
    f = synthetic.white_noise(8, 32, 4000, generator=seeded(2))
    result = position_dependence(f)
    assert abs(result.eta_squared.mean() - 31 / 255) < 0.002
    assert abs(result.omega_squared.mean()) < 0.002


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n_parts=st.integers(1, 12), offset=st.sampled_from([0, 1e3]))
def test_any_split_into_batches_equals_all_at_once(seed: int, n_parts: int, offset: float) -> None:
    g = seeded(seed)
    f = synthetic.token_local(12, 7, 3, 0.4, g) + offset
    _, valid = synthetic.random_masks(12, 7, g)
    expected = position_dependence(f, valid=valid)
    sizes = synthetic.random_splits(12, n_parts, g)
    split = PositionDependence(3, 7)
    for features, mask in zip(f.split(sizes), valid.split(sizes), strict=True):
        split.update(features, valid=mask)
    for name, value in expected._asdict().items():
        assert same(getattr(split.compute(), name), value, 1e-6), name


def test_values_at_invalid_positions_change_nothing() -> None:
    g = seeded(3)
    f = synthetic.token_local(30, 9, 2, 0.4, g)
    _, valid = synthetic.random_masks(30, 9, g)
    valid[:, 0] = False
    expected = position_dependence(f, valid=valid)
    for garbage in (1e6, torch.nan):
        spoiled = position_dependence(torch.where(valid[..., None], f, garbage), valid=valid)
        assert all(same(a, b) for a, b in zip(spoiled, expected, strict=True))
    assert expected.profile_rate[0].isnan().all(), "no token was valid at position 0"
    assert expected.eta_squared.isfinite().all()


def test_features_that_say_nothing_are_nan_and_never_infinite() -> None:
    f = torch.zeros(20, 8, 3)
    f[..., 1] = 0.7
    f[..., 2] = torch.rand(20, 8, generator=seeded(4))
    result = position_dependence(f)
    assert result.eta_squared.isnan().tolist() == [True, True, False]
    assert result.mutual_information.isnan().tolist() == [True, False, False]
    assert result.mutual_information[1:].tolist() == [0.0, 0.0], "both always fire"
    assert result.mutual_information_share.isnan().all()


def test_a_single_context_says_nothing_about_positions() -> None:
    result = position_dependence(torch.rand(1, 8, 3, generator=seeded(5)))
    assert all(value.isnan().all() for value in result[:4])
    assert result.profile_mean.isfinite().all()


def test_sizes_that_do_not_fit_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="takes features"):
        PositionDependence(3, 8).update(torch.zeros(2, 8, 4))


def test_energy_by_position_is_the_sum_over_features_of_the_mean_square() -> None:
    g = seeded(8)
    f = synthetic.token_local(40, 20, 3, 0.4, g)
    f[:, 1:8] *= 2.0
    _, valid = synthetic.random_masks(40, 20, g)
    valid[:, 0] = False
    accumulator = PositionDependence(3, 20, n_blocks=10)
    for part, mask in zip(f.split(7), valid.split(7), strict=True):
        accumulator.update(torch.where(mask[..., None], part, torch.nan), valid=mask)
    energy_NT = f.square().sum(2) * valid
    rest = energy_NT[:, 8:].sum() / valid[:, 8:].sum()
    curve = accumulator.energy_by_position()
    assert curve[0].isnan()
    assert same(curve[1:], energy_NT.sum(0)[1:] / valid.sum(0)[1:] / rest)
    edge = energy_NT[:, 1:8].sum() / valid[:, 1:8].sum() / rest
    found = accumulator.edge_energy()
    assert same(found[0], edge)
    assert 3.0 < edge < 5.0
    kept = torch.arange(40) % 10 != 3
    near = energy_NT[kept, 1:8].sum() / valid[kept, 1:8].sum()
    far = energy_NT[kept, 8:].sum() / valid[kept, 8:].sum()
    assert same(found[1 + 3], near / far)


def test_energy_at_the_edge_needs_tokens_on_both_sides() -> None:
    short = PositionDependence(2, 6)
    short.update(torch.rand(10, 6, 2, generator=seeded(9)))
    assert short.edge_energy().isnan().all()
    dead = PositionDependence(2, 20)
    dead.update(torch.zeros(10, 20, 2))
    assert dead.edge_energy().isnan().all() and dead.energy_by_position().isnan().all()
