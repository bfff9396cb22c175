"""Top contexts, token statistics and names, against sorting and counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.metrics.top_contexts import (
    FeatureTokens,
    FiringPatterns,
    TokenStatistics,
    TopContexts,
    characteristic_tokens,
    cluster_names,
    firing_units,
)
from tcsae.metrics.units import Units


def random_batch(seed: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    values = rng.exponential(size=(9, 6, 5)) * (rng.random((9, 6, 5)) < 0.3)
    values = np.ceil(values) if ties else values
    values[..., 4] = 0
    return torch.from_numpy(values), torch.from_numpy(rng.random((9, 6)) < 0.8)


def top_by_sorting(f: Tensor, valid: Tensor, k: int) -> list[list[tuple[float, int, int]]]:
    result = []
    for j in range(f.shape[2]):
        best = []
        for n in range(f.shape[0]):
            counted = [(f[n, t, j].item(), t) for t in range(f.shape[1]) if valid[n, t]]
            value, position = max(counted, key=lambda x: (x[0], -x[1]), default=(0.0, -1))
            if value > 0:
                best.append((value, n, position))
        result.append(sorted(best, key=lambda x: (-x[0], x[1]))[:k])
    return result


@given(
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    cuts=st.lists(st.integers(0, 9), max_size=3),
    k=st.integers(1, 11),
)
@settings(max_examples=40, deadline=None)
def test_top_contexts_equal_sorting_in_any_split(
    seed: int, ties: bool, cuts: list[int], k: int
) -> None:
    f_BTF, valid = random_batch(seed, ties)
    bounds = sorted({0, *cuts, 9})
    split = TopContexts(5, k, 6)
    for a, b in zip(bounds, bounds[1:], strict=False):
        split.update(f_BTF[a:b], valid=valid[a:b])
    expected, top = top_by_sorting(f_BTF, valid, k), split.compute()
    for j in range(5):
        columns = (top.value[j], top.context[j], top.position[j])
        found = list(zip(*(column.tolist() for column in columns), strict=True))
        missing = [(0.0, -1, -1)] * (k - len(expected[j]))
        assert found == expected[j] + missing
        for place, (_, n, _) in enumerate(expected[j]):
            shown = torch.where(valid[n], f_BTF[n, :, j], 0)
            assert torch.equal(top.rows[j, place], shown)
        assert top.rows[j, len(expected[j]) :].count_nonzero() == 0


def test_reset_forgets_the_contexts() -> None:
    f_BTF, valid = random_batch(1)
    top = TopContexts(5, 2, 6)
    top.update(f_BTF, valid=valid)
    top.reset()
    assert (top.compute().context == -1).all() and top.n_contexts == 0


def test_another_number_of_features_or_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="features"):
        TopContexts(5, 2, 6).update(torch.zeros(2, 7, 5))
    with pytest.raises(ValueError, match="features"):
        FeatureTokens(5, 10).update(torch.zeros(2, 6, 4), torch.zeros(2, 6).long())


@given(seed=st.integers(0, 10**6), cut=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_firing_patterns_list_every_counted_position(seed: int, cut: int) -> None:
    f_BTF, valid = random_batch(seed)
    whole, split = (FiringPatterns(5) for _ in range(2))
    whole.update(f_BTF, valid=valid)
    split.update(f_BTF[:cut], valid=valid[:cut])
    split.update(f_BTF[cut:], valid=valid[cut:])
    context, position = valid.nonzero(as_tuple=True)
    for firings in (whole.compute(), split.compute()):
        assert np.array_equal(firings.pattern.toarray(), (f_BTF[valid] > 0).numpy())
        assert np.array_equal(firings.context, context) and np.array_equal(
            firings.position, position
        )
    whole.reset()
    assert whole.compute().pattern.shape == (0, 5)


def token_sums(f_BTF: Tensor, tokens: Tensor, valid: Tensor, vocab_size: int) -> TokenStatistics:
    accumulator = FeatureTokens(f_BTF.shape[2], vocab_size)
    accumulator.update(f_BTF, tokens, valid=valid)
    return accumulator.compute()


@given(seed=st.integers(0, 10**6), cut=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_token_statistics_equal_counting_in_any_split(seed: int, cut: int) -> None:
    f_BTF, valid = random_batch(seed)
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 7, (9, 6)))
    split = FeatureTokens(5, 7)
    split.update(f_BTF[:cut], tokens[:cut], valid=valid[:cut])
    split.update(f_BTF[cut:], tokens[cut:], valid=valid[cut:])
    for found in (token_sums(f_BTF, tokens, valid, 7), split.compute()):
        f, v = f_BTF[valid], tokens[valid]
        weight = np.stack([f[v == token].sum(dim=0) for token in range(7)])
        np.testing.assert_allclose(found.weight.toarray(), weight, atol=1e-9)
        assert torch.equal(found.token_counts, torch.bincount(v, minlength=7))
        for j in range(5):
            active = f[:, j][f[:, j] > 0].numpy()
            values = [x[j].item() for x in (found.log_density, found.token_entropy)]
            if len(active) == 0:
                assert np.isnan(values).all()
                continue
            share = weight[:, j][weight[:, j] > 0] / weight[:, j].sum()
            expected = [np.log10(len(active) / len(f)), -(share * np.log(share)).sum()]
            np.testing.assert_allclose(values, expected, atol=1e-7)


def royal_text() -> tuple[TokenStatistics, dict[int, str]]:
    """Token 0 is "the", at half of all positions. Features 0, 1 fire on royal words and a little
    on "the"; feature 2 fires on every token alike; feature 3 never."""
    words = {0: " the", 1: " king", 2: " King", 3: " queen", 4: " fish", 5: " sky", 6: "\n"}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 7, (50, 20), generator=generator)
    tokens[:, ::2] = 0
    f_BTF = torch.zeros(50, 20, 4)
    royal = (tokens >= 1) & (tokens <= 3)
    f_BTF[..., 0] = 3.0 * ((tokens == 1) | (tokens == 2)) + 0.8 * (tokens == 0)
    f_BTF[..., 1] = 2.0 * royal + 0.4 * (tokens == 0)
    f_BTF[..., 2] = 1.0
    return token_sums(f_BTF, tokens, torch.ones(50, 20).bool(), 7), words


def test_clusters_are_named_by_what_sets_them_apart_not_by_common_words() -> None:
    statistics, words = royal_text()
    names = cluster_names(statistics, torch.tensor([0, 0, 1, 2]), words.__getitem__)
    assert sorted(names[0].casefold().split(" / ")) == ["king", "queen"]
    assert names[1] == "cluster 1"
    assert names[2] == "cluster 2"
    most_weight = statistics.weight.toarray()[:, 0].argmax()
    assert words[most_weight] == " the"


def test_token_scores_add_up_to_the_divergence_from_the_background() -> None:
    statistics, _ = royal_text()
    (scores,) = characteristic_tokens(statistics, torch.tensor([0, -1, -1, -1]), n_tokens=7)
    share = statistics.weight.toarray()[:, 0] / statistics.total[0].item()
    background = statistics.token_counts.numpy() / statistics.token_counts.sum().item()
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = share * np.log(share / background)
    assert dict(scores) == pytest.approx({v: parts[v] for v in range(7) if parts[v] > 0})
    assert [score for _, score in scores] == sorted((s for _, s in scores), reverse=True)


def test_no_cluster_has_no_name() -> None:
    statistics, words = royal_text()
    assert cluster_names(statistics, torch.full((4,), -1), words.__getitem__) == []


def test_token_entropy_runs_from_one_token_to_all() -> None:
    tokens = torch.arange(8).repeat(5, 1)
    f_BTF = torch.stack([(tokens == 3) * 2.0, torch.ones(5, 8)], dim=2)
    statistics = token_sums(f_BTF, tokens, torch.ones(5, 8).bool(), 8)
    np.testing.assert_allclose(statistics.token_entropy, [0, np.log(8)], atol=1e-12)
    np.testing.assert_allclose(statistics.log_density, [np.log10(1 / 8), 0])


def test_contexts_of_firings_are_their_own_documents_unless_these_are_given() -> None:
    patterns = FiringPatterns(2)
    patterns.update(torch.ones(6, 3, 2))
    firings = patterns.compute()
    assert firing_units(firings, None).n_documents == 6
    document = torch.tensor([4, 4, 9, 9, 4, 4])
    assert firing_units(firings, document).document.tolist() == [0, 0, 1, 1, 0, 0]
    units = Units(document)
    assert firing_units(firings, units) is units
    with pytest.raises(ValueError, match="documents of 5 contexts for firings in 6"):
        firing_units(firings, document[:5])
    assert firing_units(FiringPatterns(2).compute(), None).n_documents == 0
