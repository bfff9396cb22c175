from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.metrics.activity import Activity, ActivityResult, Smoothness, smoothness
from tcsae.metrics.units import Units
from tests.metrics import synthetic
from tests.metrics.synthetic import seeded


def measured(
    f: Tensor, segments: Tensor | None = None, valid: Tensor | None = None, n_blocks: int = 64
) -> ActivityResult:
    accumulator = Activity(f.shape[2], f.shape[1], n_blocks=n_blocks)
    accumulator.update(f, segments=segments, valid=valid)
    return accumulator.compute()


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


def slow_activity(f: Tensor, segments: Tensor, valid: Tensor) -> dict[str, list[float]]:
    """Token by token and pair by pair."""
    rows: dict[str, list[float]] = {
        name: [] for name in ("density", "mean_activation", "persistence", "run_length")
    }
    for j in range(f.shape[2]):
        tokens = [f[n, t, j].item() for n, t in valid.nonzero().tolist()]
        amplitudes = [x for x in tokens if x > 0]
        pairs = [
            (f[n, t, j].item() > 0, f[n, t + 1, j].item() > 0)
            for n in range(f.shape[0])
            for t in range(f.shape[1] - 1)
            if valid[n, t] and valid[n, t + 1] and segments[n, t] == segments[n, t + 1]
        ]
        from_on = [after for before, after in pairs if before]
        from_off = [after for before, after in pairs if not before]
        rows["density"].append(ratio(len(amplitudes), len(tokens)))
        rows["mean_activation"].append(ratio(sum(amplitudes), len(amplitudes)))
        rows["persistence"].append(
            ratio(sum(from_on), len(from_on)) - ratio(sum(from_off), len(from_off))
        )
        rows["run_length"].append(ratio(len(from_on), len(from_on) - sum(from_on)))
    return rows


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    density=st.floats(0, 1),
    invalid=st.floats(0, 0.6),
    boundary=st.floats(0, 0.5),
)
def test_agrees_with_counting_token_by_token(
    seed: int, density: float, invalid: float, boundary: float
) -> None:
    g = seeded(seed)
    f = synthetic.token_local(5, 8, 2, density, g)
    segments, valid = synthetic.random_masks(5, 8, g, invalid=invalid, boundary=boundary)
    result = measured(f, segments, valid)
    for name, expected in slow_activity(f, segments, valid).items():
        assert same(getattr(result, name), torch.tensor(expected, dtype=torch.float64)), name


@pytest.mark.parametrize(("on", "off"), [(5, 3), (1, 9), (20, 20)])
def test_runs_of_known_length_are_measured_right_though_contexts_cut_them(
    on: int, off: int
) -> None:
    f = synthetic.periodic_runs(3000, 32, 3, on, off, seeded())
    result = measured(f)
    assert (result.run_length / on - 1).abs().max() < 0.03
    assert (result.persistence - (1 - 1 / on - 1 / off)).abs().max() < 0.01
    assert (result.density - on / (on + off)).abs().max() < 0.02


def test_runs_of_varying_length_are_measured_right_though_segments_cut_them() -> None:
    g = seeded(1)
    f = synthetic.markov_runs(3000, 48, 3, 0.9, 0.97, g)
    segments, valid = synthetic.random_masks(3000, 48, g, invalid=0.05, boundary=0.1)
    result = measured(f, segments, valid)
    assert (result.run_length / 10 - 1).abs().max() < 0.04
    assert (result.persistence - 0.87).abs().max() < 0.01


def test_runs_that_no_edge_cuts_have_exactly_their_length() -> None:
    f = torch.zeros(2, 12, 1)
    f[0, 2:5] = 1.0
    f[1, 1:8] = 2.0
    assert measured(f).run_length.item() == 5.0


def test_a_boundary_between_documents_neither_joins_nor_ends_a_run() -> None:
    f = torch.tensor([0.0, 1, 1, 1, 1, 0, 0, 0])[None, :, None]
    segments = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])[None]
    assert measured(f).run_length.item() == 4.0
    assert measured(f, segments).run_length.item() == 3.0


def test_token_local_features_have_no_persistence() -> None:
    result = measured(synthetic.token_local(2000, 64, 3, 0.1, seeded(2)))
    assert result.persistence.abs().max() < 0.01
    assert (result.density - 0.1).abs().max() < 0.005
    assert (result.mean_activation - 1.0).abs().max() < 0.01
    assert (result.amplitude_cv - 12**-0.5).abs().max() < 0.01


def test_amplitude_is_that_of_the_tokens_on_which_the_feature_is_on() -> None:
    f = torch.tensor([[0.0, 2, 4, 0, 6, 0], [0, 0, 0, 3, 5, 0]])[..., None]
    result = measured(f)
    assert result.mean_activation.item() == 4.0
    # The squared mean from the two pairs of different contexts: (2 + 4 + 6) / 3 times (3 + 5) / 2.
    square = (4 + 16 + 36 + 9 + 25) / 5
    assert abs(result.amplitude_cv.item() - (square - 16) ** 0.5 / 4) < 1e-12
    assert measured(f[:1]).amplitude_cv.isnan(), "one context shows no spread between contexts"


@pytest.mark.parametrize("often", [1, 4])
@pytest.mark.parametrize("n_contexts", [64, 256, 1024])
def test_the_share_of_live_features_does_not_hang_on_the_number_of_contexts(
    often: int, n_contexts: int
) -> None:
    """All of them fire, each in `often` of 256 contexts."""
    g = seeded(often + n_contexts)
    accumulator = Activity(4000)
    accumulator.update((torch.rand(n_contexts, 1, 4000, generator=g) < often / 256).float())
    seen = float(accumulator.compute().frac_alive)
    share = accumulator.live_share()
    assert share.reason is None
    assert seen == pytest.approx(1 - (1 - often / 256) ** n_contexts, abs=0.03)
    assert float(share.value[0]) == pytest.approx(1, abs=0.12 if seen < 0.3 else 0.04)


def test_the_share_of_live_features_is_chaos_by_hand_and_by_documents() -> None:
    f = torch.zeros(6, 1, 6)
    seen_in = {0: [0, 1, 2], 1: [3], 2: [4], 3: [0, 5], 4: [2, 3]}
    for feature, contexts in seen_in.items():
        f[contexts, 0, feature] = 1.0
    alone = Activity(6)
    alone.update(f)
    # Seen in one context 2 features, in two 2, in any 5: 5 + 5/6 * 2^2 / (2 * 2), of 6.
    assert float(alone.live_share().value[0]) == pytest.approx((5 + 5 / 6) / 6)
    # Contexts 0 and 1, 2 and 3, 4 and 5 of one document: in one 3 features, in two 2.
    paired = Activity(6, units=Units([0, 0, 1, 1, 2, 2]))
    paired.update(f)
    assert float(paired.live_share().value[0]) == pytest.approx(min(5 + 2 / 3 * 9 / 4, 6) / 6)
    rare = Activity(100)
    rare.update(torch.eye(100)[:20, None])
    assert "cannot tell: 20 features" in str(rare.live_share().reason)


def test_dead_and_always_on_features_have_no_persistence_to_speak_of() -> None:
    f = torch.zeros(4, 8, 3)
    f[..., 1] = 0.7
    f[0, 3, 2] = 1.0
    result = measured(f)
    assert result.density.tolist()[:2] == [0.0, 1.0]
    assert result.mean_activation.isnan().tolist() == [True, False, False]
    assert result.persistence.isnan().tolist() == [True, True, False]
    assert result.run_length.isnan().tolist() == [True, True, False]
    assert abs(result.frac_alive.item() - 2 / 3) < 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n_parts=st.integers(1, 10), n_blocks=st.integers(1, 12))
def test_any_split_into_batches_and_any_merge_equals_all_at_once(
    seed: int, n_parts: int, n_blocks: int
) -> None:
    g = seeded(seed)
    f, x = synthetic.token_local(10, 7, 3, 0.4, g), synthetic.white_noise(10, 7, 4, generator=g)
    masks = synthetic.random_masks(10, 7, g)
    expected = measured(f, *masks, n_blocks=n_blocks)
    smooth = smoothness(f, x, segments=masks[0], valid=masks[1])
    sizes = synthetic.random_splits(10, n_parts, g)
    split, smooth_split = Activity(3, n_blocks=n_blocks), Smoothness(3, n_blocks=n_blocks)
    for part_f, part_x, segments, valid in zip(
        *(tensor.split(sizes) for tensor in (f, x, *masks)), strict=True
    ):
        split.update(part_f, segments=segments, valid=valid)
        smooth_split.update(part_f, part_x, segments=segments, valid=valid)
    for name in ActivityResult._fields:
        assert same(getattr(split.compute(), name), getattr(expected, name), 1e-6), name
    assert all(map(same, smooth_split.compute(), smooth))


def test_values_at_invalid_positions_change_nothing() -> None:
    g = seeded(3)
    f, x = synthetic.token_local(30, 9, 2, 0.4, g), synthetic.white_noise(30, 9, 4, generator=g)
    segments, valid = synthetic.random_masks(30, 9, g)
    expected = measured(f, segments, valid)
    smooth = smoothness(f, x, segments=segments, valid=valid)
    for garbage in (1e6, torch.nan):
        spoiled = torch.where(valid[..., None], f, garbage)
        spoiled_x = torch.where(valid[..., None], x, garbage)
        assert all(map(same, measured(spoiled, segments, valid), expected))
        spoiled_smooth = smoothness(spoiled, spoiled_x, segments=segments, valid=valid)
        assert all(map(same, spoiled_smooth, smooth))


def test_smoothness_is_the_steepest_step_of_the_active_features_context_by_context() -> None:
    g = seeded(4)
    f, x = synthetic.token_local(12, 9, 4, 0.2, g), synthetic.white_noise(12, 9, 3, generator=g)
    segments, valid = synthetic.random_masks(12, 9, g, invalid=0.6)
    contexts, steepest = [], [[] for _ in range(4)]
    for n in range(12):
        pairs = [
            t
            for t in range(1, 9)
            if valid[n, t] and valid[n, t - 1] and segments[n, t] == segments[n, t - 1]
        ]
        slopes = []
        for j in range(4):
            if pairs and (f[n, valid[n], j] > 0).any():
                slope = max(
                    (abs(f[n, t, j] - f[n, t - 1, j]) / (x[n, t] - x[n, t - 1]).norm()).item()
                    for t in pairs
                )
                slopes.append(slope)
                steepest[j].append(slope)
        if slopes:
            contexts.append(sum(slopes) / len(slopes))
    result = smoothness(f, x, segments=segments, valid=valid)
    assert abs(result.value.item() - sum(contexts) / len(contexts)) < 1e-9
    expected = torch.tensor([sum(s) / len(s) for s in steepest], dtype=torch.float64)
    assert same(result.per_feature, expected)


def test_smoothness_skips_steps_without_a_change_of_input_and_scales_with_the_feature() -> None:
    f = torch.tensor([0.0, 1, 3, 9])[None, :, None]
    x = torch.tensor([0.0, 2, 4, 4])[None, :, None]
    assert smoothness(f, x).value.item() == 1.0
    assert smoothness(f / 10, x).value.item() == pytest.approx(0.1)
    assert smoothness(f * 0, x).value.isnan()


def test_inputs_that_do_not_fit_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="inputs must be"):
        smoothness(torch.zeros(2, 4, 3), torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="no batch"):
        Activity(3).compute()
