"""The temporal loss against the slow, obvious form of itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.consistency import (
    Consistency,
    feature_window_variance,
    permute_within_segments,
    scale_free_window_variance,
    slow_feature_penalty,
    window_laplacian,
    window_variance,
)
from tcsae.sparse import SparseCodes


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


def test_gradient_of_the_scale_free_form_is_that_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(3, 12, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    segments = (torch.rand(3, 12, generator=generator) < 0.2).cumsum(1)
    valid = torch.rand(3, 12, generator=generator) > 0.1
    mask = {"segments": segments, "valid": valid}

    def formula(f: Tensor) -> Tensor:
        v = f[valid].var(0, correction=0)
        return (v.detach() * feature_window_variance(f, 4, **mask) / v).sum()

    (expected,) = torch.autograd.grad(formula(features), features)
    (got,) = torch.autograd.grad(scale_free_window_variance(features, 4, **mask), features)
    torch.testing.assert_close(got, expected)
    # No component along the scale of a feature: shrinking one does not pay.
    centred = features - features[valid].mean(0)
    along_scale = (centred * got * valid[..., None]).sum((0, 1))
    assert along_scale.abs().max() < 1e-10


def slow_formula(f: Tensor, segments: Tensor, valid: Tensor) -> Tensor:
    """Wiskott and Sejnowski's delta of every feature, half of it, times the mean variance."""
    v = f[valid].var(0, correction=0)
    pair = valid[:, 1:] & valid[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    delta = (f[:, 1:] - f[:, :-1])[pair].square().mean(0) / v
    share = (v.mean() / v.clamp(min=v.mean() / 100)).detach()
    return (share * v.detach() * delta / 2).sum()


@pytest.mark.parametrize("rare", [False, True])
def test_the_slow_form_is_the_adjacent_difference_at_equal_variance(rare: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(3, 12, 5, dtype=torch.float64, generator=generator)
    features *= torch.tensor([1.0, 3.0, 0.2, 10.0, 1e-3 if rare else 2.0])
    features.requires_grad_()
    segments = (torch.rand(3, 12, generator=generator) < 0.2).cumsum(1)
    valid = torch.rand(3, 12, generator=generator) > 0.1
    (expected,) = torch.autograd.grad(slow_formula(features, segments, valid), features)
    loss = slow_feature_penalty(features, segments=segments, valid=valid)
    (got,) = torch.autograd.grad(loss, features)
    assert loss.item() == pytest.approx(slow_formula(features, segments, valid).item())
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
        whole(features[step], **mask)
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    for step in range(steps, len(features)):
        wanted = whole(features[step], **mask)
        assert torch.equal(resumed(features[step], **mask), wanted)
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
)
def test_sparse_codes_give_the_value_and_gradient_of_dense_features(
    seed: int, form: str, window: int | str, shuffle: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    segments = (torch.rand(3, 12, generator=generator) < 0.2).cumsum(1)
    valid = torch.rand(3, 12, generator=generator) > 0.1
    codes = sparse_codes(generator, valid, k=3, d_sae=7)
    dense = codes.dense()
    penalty = Consistency(form, window, shuffle_positions=shuffle)
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


def test_the_trainers_form_equals_the_public_one() -> None:
    features = torch.rand(4, 32, 6, dtype=torch.float64, requires_grad=True)
    segments = (torch.rand(4, 32) < 0.1).cumsum(1)
    valid = torch.rand(4, 32) > 0.1
    kept = torch.where(valid[..., None], features, 0)
    for form, public in (
        ("scale_free", scale_free_window_variance),
        ("window_variance", window_variance),
        ("slow", lambda f, _, **mask: slow_feature_penalty(f, **mask)),
    ):
        ours = Consistency(form, 5)(kept, segments=segments, valid=valid)
        theirs = public(features, 5, segments=segments, valid=valid)
        torch.testing.assert_close(
            torch.autograd.grad(ours, features, retain_graph=True),
            torch.autograd.grad(theirs, features),
        )
        assert ours.item() == pytest.approx(theirs.item())


def test_permuting_the_laplacian_is_permuting_the_positions() -> None:
    features = torch.rand(3, 16, 4, dtype=torch.float64)
    segments = (torch.rand(3, 16) < 0.1).cumsum(1)
    valid = torch.ones(3, 16, dtype=torch.bool)
    control = Consistency("window_variance", 4, shuffle_positions=True)(
        features, segments=segments, valid=valid, generator=torch.Generator().manual_seed(7)
    )
    order = permute_within_segments(segments, valid, torch.Generator().manual_seed(7))
    moved = features.gather(1, order[..., None].expand_as(features))
    expected = window_variance(moved, 4, segments=segments, valid=valid)
    assert control.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("form", ["scale_free", "window_variance", "slow"])
def test_bfloat16_features_give_the_float32_penalty_within_their_rounding(form: str) -> None:
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(16, 64, 50, generator=generator).relu()
    segments = (torch.rand(16, 64, generator=generator) < 0.02).cumsum(1)
    valid = torch.rand(16, 64, generator=generator) > 0.02
    features = torch.where(valid[..., None], features, 0).bfloat16().float().detach()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = features.detach().to(dtype).requires_grad_()
        value = Consistency(form, 8)(leaf, segments=segments, valid=valid)
        value.backward()
        assert leaf.grad is not None
        results.append((value.item(), leaf.grad.float()))
    (exact, gradient), (rounded, rounded_gradient) = results
    assert rounded == pytest.approx(exact, rel=2e-3)
    error = (rounded_gradient - gradient).norm() / gradient.norm()
    assert error < 0.01
