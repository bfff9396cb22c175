"""The temporal loss against the slow, obvious form of itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.consistency import (
    Consistency,
    feature_window_variance,
    permute_within_segments,
    position_variance,
    scale_free_window_variance,
    slow_feature_penalty,
    window_moments,
    window_variance,
)
from tcsae.losses.laplacian import share_in_windows, window_laplacian
from tcsae.tensors.sparse import SparseCodes


def obvious(features: Tensor, window: int, segments: Tensor, valid: Tensor) -> Tensor:
    """Window by window, with torch's own unfold and var."""
    windows = features.unfold(1, window, 1)  # [B, S, F, W]
    segments, valid = segments.unfold(1, window, 1), valid.unfold(1, window, 1)
    counted = valid.all(-1) & (segments == segments[..., :1]).all(-1)
    variances = windows.var(-1, correction=1).sum(-1)
    return variances[counted].sum() / max(int(counted.sum()), 1)


def obvious_document(features: Tensor, segments: Tensor, valid: Tensor) -> Tensor:
    variances = []
    for b in range(len(features)):
        for segment in segments[b].unique():
            chosen = (segments[b] == segment) & valid[b]
            if chosen.sum() >= 2:
                variances.append(features[b][chosen].var(0, correction=1).sum())
    return torch.stack(variances).mean() if variances else features.new_zeros(())


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int, Tensor, Tensor]:
    n_contexts, n_positions = draw(st.integers(1, 4)), draw(st.integers(2, 24))
    window = draw(st.integers(2, n_positions))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (n_contexts, n_positions)
    features = torch.randn(*shape, draw(st.integers(1, 5)), generator=generator)
    features = features.relu() * draw(st.sampled_from([1e-2, 1.0, 1e2]))
    boundaries = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.05, 0.3]))
    valid = torch.rand(shape, generator=generator) >= draw(st.sampled_from([0.0, 0.05, 0.5]))
    return features, window, boundaries.cumsum(1), valid


@settings(max_examples=200, deadline=None)
@given(batches())
def test_closed_form_equals_unfold_var_on_random_segments_and_masks(batch) -> None:
    features, window, segments, valid = batch
    expected = obvious(features.double(), window, segments, valid)
    got = window_variance(features, window, segments=segments, valid=valid)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5 * features.var().item())


@settings(max_examples=100, deadline=None)
@given(batches())
def test_scale_free_form_has_the_value_of_the_plain_form(batch) -> None:
    features, window, segments, valid = batch
    features = features.double()
    expected = obvious(features, window, segments, valid)
    got = scale_free_window_variance(features, window, segments=segments, valid=valid)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_document_windows_hold_the_valid_positions_of_each_document(batch) -> None:
    features, _, segments, valid = batch
    features = features.double()
    got = window_variance(features, "document", segments=segments, valid=valid)
    assert got.item() == pytest.approx(
        obvious_document(features, segments, valid).item(), rel=1e-9, abs=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(batches(), st.booleans())
def test_permutation_moves_valid_positions_within_their_document_only(batch, sparse) -> None:
    _, _, segments, valid = batch
    order = permute_within_segments(segments, valid, torch.Generator().manual_seed(1))
    positions = torch.arange(segments.shape[1]).expand_as(segments)
    assert (order.sort(1).values == positions).all(), "every position exactly once"
    assert (segments.gather(1, order) == segments).all()
    assert (order[~valid] == positions[~valid]).all()
    assert (valid.gather(1, order) == valid).all()


def test_features_and_nothing_else_at_invalid_positions_change_nothing() -> None:
    features = torch.randn(2, 16, 3)
    valid = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) > 0.2
    spoilt = torch.where(valid[..., None], features, torch.full_like(features, 1e9))
    for loss in (window_variance, scale_free_window_variance):
        assert loss(spoilt, 4, valid=valid).item() == pytest.approx(
            loss(features, 4, valid=valid).item(), rel=1e-5
        )


def test_a_large_common_offset_does_not_cancel_in_float32() -> None:
    features = torch.randn(4, 64, 8)
    assert window_variance(features + 1000, 8).item() == pytest.approx(
        window_variance(features.double(), 8).item(), rel=1e-4
    )


def test_no_window_gives_zero_and_zero_gradient() -> None:
    features = torch.randn(1, 8, 2, requires_grad=True)
    valid = torch.tensor([[True, False] * 4])
    loss = window_variance(features, 2, valid=valid)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None and features.grad.abs().max() == 0


def test_laplacian_rows_sum_to_zero_and_it_is_positive_semidefinite() -> None:
    segments = (torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.1).cumsum(1)
    for window in (2, 7, "document"):
        matrix = window_laplacian(window, 20, segments=segments, dtype=torch.float64).matrix
        assert matrix.sum(-1).abs().max() < 1e-12
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12


@pytest.mark.parametrize("window", [2, 5, 12, "document"])
def test_gradient_of_the_plain_form_passes_gradcheck(window) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 12, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    segments = (torch.rand(2, 12, generator=generator) < 0.2).cumsum(1)
    valid = torch.rand(2, 12, generator=generator) > 0.1
    assert torch.autograd.gradcheck(
        lambda f: window_variance(f, window, segments=segments, valid=valid), features
    )


def obvious_windows(window: int | str, segments: Tensor, valid: Tensor) -> list[tuple[int, Tensor]]:
    """(context, positions) of every window."""
    found = []
    for n in range(len(valid)):
        if window == "document":
            for segment in segments[n].unique():
                held = ((segments[n] == segment) & valid[n]).nonzero()[:, 0]
                found += [(n, held)] if len(held) >= 2 else []
            continue
        for start in range(valid.shape[1] - int(window) + 1):
            held = torch.arange(start, start + int(window))
            if valid[n, held].all() and len(segments[n, held].unique()) == 1:
                found.append((n, held))
    return found


def obvious_position_variance(f: Tensor, valid: Tensor) -> Tensor:
    """Over all pairs of different contexts, one by one."""
    kept = torch.where(valid[..., None], f, 0)
    counted = valid.sum(0) >= 2
    n_tokens = int(valid[:, counted].sum())
    at_positions, overall, n_pairs = f.new_zeros(f.shape[2]), f.new_zeros(f.shape[2]), 0
    for t in counted.nonzero()[:, 0]:
        there = valid[:, t].nonzero()[:, 0]
        products = [kept[n, t] * kept[m, t] for n in there for m in there if n != m]
        at_positions = at_positions + len(there) / n_tokens * torch.stack(products).mean(0)
    for n in range(len(f)):
        for m in range(len(f)):
            if n != m:
                overall = overall + kept[n][counted].sum(0) * kept[m][counted].sum(0)
                n_pairs += int(valid[n][counted].sum()) * int(valid[m][counted].sum())
    return at_positions - overall / max(n_pairs, 1)


def some_masks(generator: torch.Generator, shape: tuple[int, int]) -> dict[str, Tensor]:
    segments = (torch.rand(shape, generator=generator) < 0.2).cumsum(1)
    return {"segments": segments, "valid": torch.rand(shape, generator=generator) > 0.1}


@pytest.mark.parametrize("variance_over", ["windows", "positions"])
@pytest.mark.parametrize("window", [4, "document"])
@pytest.mark.parametrize("position_weight", [0.0, 0.7])
def test_gradient_of_the_scale_free_form_is_that_of_its_formula(
    variance_over: str, window: int | str, position_weight: float
) -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(3, 12, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = some_masks(generator, (3, 12))
    valid = mask["valid"]

    def formula(f: Tensor) -> Tensor:
        windows = obvious_windows(window, **mask)
        s2 = torch.stack([f[n, held].var(0, correction=1) for n, held in windows]).mean(0)
        # Every window weighs alike, and each of its positions alike within it.
        mean = torch.stack([f[n, held].mean(0) for n, held in windows]).mean(0)
        v = torch.stack([(f[n, held] - mean).square().mean(0) for n, held in windows]).mean(0)
        if variance_over == "positions":
            v = f[valid].var(0, correction=0)
        # As the public form does: the mean over valid tokens is taken out first.
        b = obvious_position_variance(f - f[valid].mean(0).detach(), valid)
        return (v.detach() * (s2 + position_weight * b) / v).sum()

    ours = scale_free_window_variance(
        features, window, variance_over=variance_over, position_weight=position_weight, **mask
    )
    (expected,) = torch.autograd.grad(formula(features), features)
    (got,) = torch.autograd.grad(ours, features)
    assert ours.item() == pytest.approx(formula(features).item())
    torch.testing.assert_close(got * valid[..., None], expected * valid[..., None])


@pytest.mark.parametrize("position_weight", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("window", [2, 5, "document"])
def test_shrinking_a_feature_does_not_pay(window: int | str, position_weight: float) -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(3, 12, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    valid = torch.ones(3, 12, dtype=torch.bool)
    loss = scale_free_window_variance(features, window, position_weight=position_weight)
    (slope,) = torch.autograd.grad(loss, features)
    along_scale = ((features - features[valid].mean(0)) * slope).sum((0, 1))
    assert along_scale.abs().max() < 1e-10


@settings(max_examples=100, deadline=None)
@given(batches())
def test_variance_by_the_windows_measure_is_that_within_and_between_windows(batch) -> None:
    features, window, segments, valid = batch
    features = features.double()
    windows = obvious_windows(window, segments, valid)
    s2, v = window_moments(features, window, segments=segments, valid=valid)
    if not windows:
        assert v.abs().max() == 0
        return
    means = torch.stack([features[n, held].mean(0) for n, held in windows])
    torch.testing.assert_close(v, (window - 1) / window * s2 + means.var(0, correction=0))


@settings(max_examples=60, deadline=None)
@given(batches())
def test_position_variance_equals_its_sum_over_pairs(batch) -> None:
    features, _, _, valid = batch
    features = features.double()
    if len(features) < 2:
        with pytest.raises(ValueError, match="batch of one"):
            position_variance(features, valid=valid)
        return
    centre = features[valid].mean(0) if valid.any() else 0
    expected = obvious_position_variance(features - centre, valid)
    torch.testing.assert_close(position_variance(features, valid=valid), expected)


@settings(max_examples=60, deadline=None)
@given(batches(), st.booleans())
def test_the_share_in_windows_is_that_of_the_positions_some_window_holds(batch, whole) -> None:
    _, window, segments, valid = batch
    window = "document" if whole else window
    held = {
        (n, t) for n, places in obvious_windows(window, segments, valid) for t in places.tolist()
    }
    expected = len(held) / max(int(valid.sum()), 1)
    assert share_in_windows(window, segments, valid) == pytest.approx(expected)


def test_position_variance_without_masks_is_the_written_formula() -> None:
    f = torch.randn(5, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n, t = f.shape[:2]
    sums, contexts, squares = f.sum(0), f.sum(1), f.square().sum((0, 1))
    expected = (sums.square().sum(0) - squares) / (t * n * (n - 1)) - (
        sums.sum(0).square() - contexts.square().sum(0)
    ) / (t * t * n * (n - 1))
    torch.testing.assert_close(position_variance(f), expected)


def lasting_features(n: int, t: int, kind: str, generator: torch.Generator) -> Tensor:
    """[n, t, 1] of variance 1 that do not know their position."""
    noise = torch.randn(n, t, 1, generator=generator, dtype=torch.float64)
    if kind == "noise":
        return noise
    if kind == "constant":
        return noise[:, :1].expand(n, t, 1).clone()
    values = [noise[:, 0]]
    for step in range(1, t):
        values.append(0.95 * values[-1] + (1 - 0.95**2) ** 0.5 * noise[:, step])
    return torch.stack(values, 1)


@pytest.mark.parametrize("kind", ["noise", "constant", "ar"])
@pytest.mark.parametrize("n", [2, 8, 32])
@pytest.mark.parametrize("masked", [False, True])
def test_the_position_term_expects_nothing_of_features_without_a_position(
    kind: str, n: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(n)
    found = []
    for _ in range(400):
        valid = torch.rand(n, 16, generator=generator) > (0.2 if masked else -1)
        features = lasting_features(n, 16, kind, generator) + 3
        found.append(position_variance(features, valid=valid).item())
    found = torch.tensor(found)
    # (What is constant in a context has none, to the last digits, where masks are alike.)
    assert found.mean().abs() < 4 * found.std() / len(found) ** 0.5 + 1e-9


@pytest.mark.parametrize("masked", [False, True])
def test_the_position_term_is_the_variance_between_positions(masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    profile = torch.linspace(0, 2, 16, dtype=torch.float64)[:, None]
    found = []
    for _ in range(300):
        valid = torch.rand(12, 16, generator=generator) > (0.2 if masked else -1)
        features = profile + lasting_features(12, 16, "ar", generator)
        found.append(position_variance(features, valid=valid).item())
    found, true = torch.tensor(found), profile.var(correction=0).item()
    assert abs(found.mean() - true) < 4 * found.std() / len(found) ** 0.5 + 0.01 * true
    # Binding a feature to positions costs: the slope along the profile is above 0.
    features = lasting_features(12, 16, "ar", generator) + profile
    features.requires_grad_()
    (slope,) = torch.autograd.grad(position_variance(features).sum(), features)
    assert (slope.sum(0) * (profile - profile.mean())).sum() > 0


# --------------------------------------------------------------------- what must not pay

N_NOISE, T_NOISE, W_NOISE = 400, 64, 8


def _edge_masks(where: str) -> tuple[Tensor, Tensor, Tensor]:
    """(segments [T], valid [T], the positions beside the edge)."""
    segments, valid = torch.zeros(T_NOISE, dtype=torch.long), torch.ones(T_NOISE, dtype=torch.bool)
    near = torch.zeros(T_NOISE, dtype=torch.bool)
    if where == "first":
        near[: W_NOISE - 1] = True
    elif where == "last":
        near[-W_NOISE + 1 :] = True
    elif where == "document":
        segments[30:] = 1
        near[30 - W_NOISE + 1 : 30 + W_NOISE - 1] = True
    else:
        valid[30] = False
        near[30 - W_NOISE + 1 : 31 + W_NOISE - 1] = True
    return segments, valid, near & valid


def _slope_along_more_amplitude(where: str, **options) -> float:
    """d log(loss) / d log(amplitude beside the edge) for white noise: 0 if it does not pay."""
    segments, valid, near = _edge_masks(where)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N_NOISE, T_NOISE, 8, dtype=torch.float64, generator=generator)
    amplitude = torch.ones(T_NOISE, 1, dtype=torch.float64, requires_grad=True)
    loss = scale_free_window_variance(
        noise * amplitude,
        W_NOISE,
        segments=segments.expand(N_NOISE, -1),
        valid=valid.expand(N_NOISE, -1),
        **options,
    )
    (slope,) = torch.autograd.grad(loss, amplitude)
    return (slope[near].sum() / loss).item()


@pytest.mark.parametrize("where", ["first", "last", "document", "left out"])
def test_more_amplitude_at_the_edges_does_not_pay(where: str) -> None:
    fair = _slope_along_more_amplitude(where)
    first = _slope_along_more_amplitude(where, variance_over="positions")
    assert abs(fair) < 0.002
    assert first < -0.05, "what the first version paid for it: the test can fail"
    with_term = _slope_along_more_amplitude(where, position_weight=1.0)
    assert abs(with_term) < 0.002


def slow_formula(f: Tensor, segments: Tensor, valid: Tensor, over: str) -> Tensor:
    """Wiskott and Sejnowski's delta of every feature, half of it, times the mean variance."""
    held = torch.cat([f[n, pair] for n, pair in obvious_windows(2, segments, valid)])
    v = (held if over == "windows" else f[valid]).var(0, correction=0)
    pair = valid[:, 1:] & valid[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    delta = (f[:, 1:] - f[:, :-1])[pair].square().mean(0) / v
    share = (v.mean() / v.clamp(min=v.mean() / 100)).detach()
    return (share * v.detach() * delta / 2).sum()


@pytest.mark.parametrize("over", ["windows", "positions"])
@pytest.mark.parametrize("rare", [False, True])
def test_the_slow_form_is_the_adjacent_difference_at_equal_variance(rare: bool, over: str) -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(3, 12, 5, dtype=torch.float64, generator=generator)
    features *= torch.tensor([1.0, 3.0, 0.2, 10.0, 1e-3 if rare else 2.0])
    features.requires_grad_()
    segments = (torch.rand(3, 12, generator=generator) < 0.2).cumsum(1)
    valid = torch.rand(3, 12, generator=generator) > 0.1
    (expected,) = torch.autograd.grad(slow_formula(features, segments, valid, over), features)
    loss = slow_feature_penalty(features, segments=segments, valid=valid, variance_over=over)
    (got,) = torch.autograd.grad(loss, features)
    assert loss.item() == pytest.approx(slow_formula(features, segments, valid, over).item())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "penalty", [lambda f: scale_free_window_variance(f, 4), slow_feature_penalty]
)
def test_dead_features_are_left_out(penalty) -> None:
    features = torch.rand(2, 16, 3)
    features[..., 1] = 0
    features.requires_grad_()
    loss = penalty(features)
    loss.backward()
    assert torch.isfinite(loss)
    assert features.grad is not None
    assert torch.isfinite(features.grad).all() and features.grad[..., 1].abs().max() == 0


def test_shuffled_control_loses_what_is_due_to_order() -> None:
    slow = torch.cumsum(torch.randn(64, 128, 4, generator=torch.Generator().manual_seed(5)), 1)
    segments, valid = torch.zeros(64, 128, dtype=torch.long), torch.ones(64, 128, dtype=torch.bool)
    plain = Consistency("window_variance", 8)(slow, segments=segments, valid=valid)
    control = Consistency("window_variance", 8, shuffle_positions=True)(
        slow, segments=segments, valid=valid, generator=torch.Generator().manual_seed(6)
    )
    whole = feature_window_variance(slow, "document").sum()
    assert plain < 0.2 * control
    assert control.item() == pytest.approx(whole.item(), rel=0.05)


def test_batch_history_is_the_variance_over_the_last_batch_means() -> None:
    window, means, got = 3, [], []
    penalty = Consistency("batch_history", window, d_sae=4)
    scaled = Consistency("batch_history", window, d_sae=4, scale_by_window=True)
    for step in range(5):
        features = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(step))
        valid = torch.ones(2, 6, dtype=torch.bool)
        valid[:, 0] = False
        means.append(features[valid].mean(0))
        mask = {"segments": torch.zeros(2, 6), "valid": valid}
        got.append(penalty(features, **mask))
        assert scaled(features, **mask).item() == pytest.approx(got[-1].item() / window)
        penalty.after_step(features, valid=valid)
        scaled.after_step(features, valid=valid)
    assert got[0].item() == 0
    for step in range(1, 5):
        buffer = torch.stack(means[max(0, step - window + 1) : step + 1])
        assert got[step].item() == pytest.approx(buffer.var(0, correction=1).mean().item())


def test_batch_history_sends_gradient_to_the_current_batch_alone() -> None:
    penalty = Consistency("batch_history", 4, d_sae=2)
    mask = {"segments": torch.zeros(1, 5), "valid": torch.ones(1, 5, dtype=torch.bool)}
    first = torch.rand(1, 5, 2, requires_grad=True)
    second = torch.rand(1, 5, 2, requires_grad=True)
    penalty(first, **mask)
    penalty.after_step(first, valid=mask["valid"])
    penalty(second, **mask).backward()
    assert first.grad is None
    assert second.grad is not None and second.grad.abs().min() > 0


@pytest.mark.parametrize("steps", [0, 2, 7])
def test_batch_history_goes_on_with_the_same_bits_from_its_saved_state(steps: int) -> None:
    window, d_sae = 5, 3
    mask = {"segments": torch.zeros(1, 6), "valid": torch.ones(1, 6, dtype=torch.bool)}
    whole, resumed = (Consistency("batch_history", window, d_sae=d_sae) for _ in range(2))
    features = torch.rand(steps + window + 1, 1, 6, d_sae)
    for step in range(steps):
        whole.after_step(features[step], valid=mask["valid"])
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    for step in range(steps, len(features)):
        wanted = whole(features[step], **mask)
        assert torch.equal(resumed(features[step], **mask), wanted)
        for penalty in (whole, resumed):
            penalty.after_step(features[step], valid=mask["valid"])
        assert (wanted > 0) == (step > 0)
    assert whole.filled == resumed.filled == window - 1


@pytest.mark.parametrize("window", [1, 0, -3, 17, 2.0, "words", True])
def test_a_window_that_is_none_is_refused_with_the_range(window) -> None:
    with pytest.raises(ValueError, match="must be 2 to 16 positions"):
        window_variance(torch.zeros(1, 16, 2), window)


def sparse_codes(generator: torch.Generator, valid: Tensor, k: int, d_sae: int) -> SparseCodes:
    n_tokens = valid.numel()
    index = torch.rand(n_tokens, d_sae, generator=generator).argsort(1)[:, :k]
    values = torch.randn(n_tokens, k, generator=generator, dtype=torch.float64).relu()
    values = (values * valid.reshape(-1, 1)).flatten().requires_grad_()
    token = torch.arange(n_tokens).repeat_interleave(k)
    return SparseCodes.of(values, index.flatten(), token, (n_tokens, d_sae), torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["scale_free", "window_variance", "slow"]),
    st.sampled_from([2, 5, 12, "document"]),
    st.booleans(),
    st.sampled_from(["windows", "positions"]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([None, 4]),
)
def test_sparse_codes_give_the_value_and_gradient_of_dense_features(
    seed: int,
    form: str,
    window: int | str,
    shuffle: bool,
    variance_over: str,
    position_weight: float,
    n_features: int | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    segments = (torch.rand(3, 12, generator=generator) < 0.2).cumsum(1)
    valid = torch.rand(3, 12, generator=generator) > 0.1
    codes = sparse_codes(generator, valid, k=3, d_sae=7)
    dense = codes.dense()
    penalty = Consistency(
        form,
        window,
        shuffle_positions=shuffle,
        variance_over=variance_over,
        position_weight=position_weight,
        n_features=n_features,
    )
    results = []
    for features in (dense.view(3, 12, 7), codes):
        value = penalty(
            features,
            segments=segments,
            valid=valid,
            generator=torch.Generator().manual_seed(1),
        )
        (gradient,) = torch.autograd.grad(3 * value, codes.values_M, retain_graph=True)
        results.append((value, gradient * valid.flatten()[codes.token_M]))
    torch.testing.assert_close(results[1], results[0])


FAIR = {"position_weight": 0.7}
PUBLIC = {
    "plain": (window_variance, "window_variance", {}),
    "scale free": (scale_free_window_variance, "scale_free", {}),
    "positions too": (partial(scale_free_window_variance, **FAIR), "scale_free", FAIR),
    "first version": (
        partial(scale_free_window_variance, variance_over="positions"),
        "scale_free",
        {"variance_over": "positions"},
    ),
    "slow": (lambda f, _, **mask: slow_feature_penalty(f, **mask), "slow", {}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_trainers_form_equals_the_public_one(name: str) -> None:
    public, form, options = PUBLIC[name]
    generator = torch.Generator().manual_seed(2)
    features = torch.rand(4, 32, 6, dtype=torch.float64, generator=generator)
    mask = some_masks(generator, (4, 32))
    # The public form takes the mean out, which the position term does not quite ignore.
    features = (features - features[mask["valid"]].mean(0)).requires_grad_()
    kept = torch.where(mask["valid"][..., None], features, 0)
    ours = Consistency(form, 3, **options)(kept, **mask)
    theirs = public(features, 3, **mask)
    torch.testing.assert_close(
        torch.autograd.grad(ours, features, retain_graph=True),
        torch.autograd.grad(theirs, features),
    )
    assert ours.item() == pytest.approx(theirs.item())


@pytest.mark.parametrize("name", ["plain", "positions too", "first version"])
def test_the_control_is_the_loss_of_permuted_positions(name: str) -> None:
    public, form, options = PUBLIC[name]
    generator = torch.Generator().manual_seed(3)
    features = torch.rand(3, 16, 4, dtype=torch.float64, generator=generator)
    mask = some_masks(generator, (3, 16))
    features = torch.where(mask["valid"][..., None], features, 0)
    features = torch.where(mask["valid"][..., None], features - features[mask["valid"]].mean(0), 0)
    features.requires_grad_()
    control = Consistency(form, 2, shuffle_positions=True, **options)(
        features, generator=torch.Generator().manual_seed(7), **mask
    )
    order = permute_within_segments(**mask, generator=torch.Generator().manual_seed(7))
    moved = features.gather(1, order[..., None].expand_as(features))
    expected = public(moved, 2, **mask)
    assert control.item() == pytest.approx(expected.item())
    # What stands at positions that are left out is zero, and its gradient goes nowhere.
    slopes = (torch.autograd.grad(loss, features)[0] for loss in (control, expected))
    torch.testing.assert_close(*(slope * mask["valid"][..., None] for slope in slopes))


def test_a_position_term_of_one_context_is_refused() -> None:
    features = torch.rand(1, 16, 2)
    with pytest.raises(ValueError, match="a batch of one has no pair"):
        scale_free_window_variance(features, 4, position_weight=1.0)


@pytest.mark.parametrize("position_weight", [0.0, 1.0])
@pytest.mark.parametrize("form", ["scale_free", "window_variance", "slow"])
def test_bfloat16_features_give_the_float32_penalty_within_their_rounding(
    form: str, position_weight: float
) -> None:
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(16, 64, 50, generator=generator).relu()
    segments = (torch.rand(16, 64, generator=generator) < 0.02).cumsum(1)
    valid = torch.rand(16, 64, generator=generator) > 0.02
    features = torch.where(valid[..., None], features, 0).bfloat16().float().detach()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = features.detach().to(dtype).requires_grad_()
        penalty = Consistency(form, 8, position_weight=position_weight)
        value = penalty(leaf, segments=segments, valid=valid)
        value.backward()
        assert leaf.grad is not None
        results.append((value.item(), leaf.grad.float()))
    (exact, gradient), (rounded, rounded_gradient) = results
    assert rounded == pytest.approx(exact, rel=2e-3)
    error = ((rounded_gradient - gradient) * valid[..., None]).norm()
    # Of the window variance's gradient: the other forms subtract nearly as much again, so that what
    # is left is smaller and the rounding is not.
    plain = features.detach().clone().requires_grad_()
    window_variance(plain, 8, segments=segments, valid=valid).backward()
    assert plain.grad is not None and error < 0.005 * plain.grad.norm()


def test_the_logs_measure_does_not_hang_on_which_batch_it_sees() -> None:
    """White noise, louder at the first positions: C_W is 0 by the windows' own measure."""
    generator = torch.Generator().manual_seed(0)
    amplitude = torch.ones(64, 1)
    amplitude[:7] = 5.0
    by_windows, by_positions = [], []
    for _ in range(20):
        noise = torch.randn(16, 64, 20, generator=generator) * amplitude
        s2, v = window_moments(noise, 8)
        by_windows.append(1 - (s2.sum() / v.sum()).item())
        by_positions.append(1 - (s2.sum() / noise.flatten(0, 1).var(0).sum()).item())
    assert max(map(abs, by_windows)) < 0.03
    assert min(by_positions) > 0.2, "by positions it reads consistency where there is none"
