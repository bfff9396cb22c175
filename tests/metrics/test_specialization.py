"""Clusters of features: planted ones come back, noise is called noise."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor

from tcsae.metrics.specialization import (
    Specialization,
    cluster_features,
    direction_graph,
    firing_graph,
    layout,
    shuffle_contexts,
)
from tcsae.metrics.top_contexts import FiringPatterns, Firings
from tcsae.metrics.units import Units

FAMILY = np.repeat(np.arange(6), 20)


def firings_of(on_BTF: Tensor, valid: Tensor | None = None) -> Firings:
    patterns = FiringPatterns(on_BTF.shape[2])
    patterns.update(on_BTF.float(), valid=valid)
    return patterns.compute()


def planted(seed: int = 0) -> Tensor:
    """Six families of 20 features: each family has its moments, each feature joins in at random."""
    rng = np.random.default_rng(seed)
    moments = rng.random((40, 50, 6)) < 0.08
    joins = rng.random((40, 50, 120)) < 0.5
    stray = rng.random((40, 50, 120)) < 0.01
    return torch.from_numpy((moments[..., FAMILY] & joins) | stray)


def noise(seed: int = 0, n_features: int = 120) -> Tensor:
    rng = np.random.default_rng(seed)
    density = np.exp(rng.uniform(np.log(0.02), np.log(0.2), n_features))
    return torch.from_numpy(rng.random((40, 50, n_features)) < density)


def decoder(seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, 32))
    return torch.from_numpy(centres[FAMILY] + rng.normal(size=(120, 32))).float()


@pytest.fixture(scope="module")
def clusters() -> Specialization:
    return cluster_features(firings_of(planted()), decoder())


def test_planted_families_come_back(clusters: Specialization) -> None:
    assert adjusted_rand_score(FAMILY, clusters.labels) > 0.9
    assert clusters.summary["n_clusters"] == 6
    assert clusters.summary["cluster_sizes"] == [20] * 6


def test_planted_families_pass_every_check(clusters: Specialization) -> None:
    summary = clusters.summary
    assert summary["ari_seeds"] > 0.9
    assert summary["ari_halves"] > 0.9
    assert summary["significant"] is True
    assert summary["null_rewired"]["mean"] < 0.5 * summary["modularity"]
    assert summary["modularity_excess"] > 0.5 * summary["modularity"]
    assert summary["null_shuffled"]["mean"] < 0.5 * summary["modularity"]
    json.dumps(summary, allow_nan=False)


def test_agreement_with_the_decoder_is_the_adjusted_mutual_information(
    clusters: Specialization,
) -> None:
    expected = adjusted_mutual_info_score(clusters.labels, clusters.decoder_labels)
    assert clusters.summary["ami_decoder"] == pytest.approx(expected)
    assert expected > 0.9
    unrelated = decoder()[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    other = cluster_features(firings_of(planted()), unrelated, n_seeds=2, n_nulls=2)
    assert abs(other.summary["ami_decoder"]) < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_not_significant(seed: int) -> None:
    summary = cluster_features(firings_of(noise(seed)), seed=seed).summary
    assert summary["significant"] is False
    assert summary["null_shuffled"]["p"] > 0.01
    assert summary["ari_halves"] < 0.2
    json.dumps(summary, allow_nan=False)


def test_features_that_fire_in_runs_of_their_own_are_not_significant() -> None:
    rng = np.random.default_rng(0)
    on = rng.random((40, 50, 120)) < 0.05
    stays = rng.random((40, 50, 120)) < 0.8
    for t in range(1, 50):
        on[:, t] = np.where(stays[:, t], on[:, t - 1], on[:, t])
    summary = cluster_features(firings_of(torch.from_numpy(on))).summary
    assert summary["null_rewired"]["p"] < 0.01
    assert summary["significant"] is False
    assert abs(summary["modularity_excess"]) < 0.02


def test_planted_families_with_shuffled_contexts_are_not_significant() -> None:
    firings = firings_of(planted())
    shuffled = firings._replace(pattern=shuffle_contexts(firings, seed=99))
    assert cluster_features(shuffled).summary["significant"] is False


def test_one_seed_gives_one_answer_whatever_the_global_generator(clusters: Specialization) -> None:
    random.seed(5)
    np.random.seed(5)
    again = cluster_features(firings_of(planted()), decoder())
    assert torch.equal(again.labels, clusters.labels)
    assert again.summary == clusters.summary


@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.02, 0.3]), k=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_graph_joins_the_nearest_neighbours_by_brute_force_phi(
    seed: int, density: float, k: int
) -> None:
    rng = np.random.default_rng(seed)
    on = rng.random((10, 30, 12)) < density
    rows = on.reshape(-1, 12)
    graph = firing_graph(firings_of(torch.from_numpy(on)).pattern, k, min_firings=3)
    features = np.flatnonzero(rows.sum(axis=0) >= 3)
    assert graph.features.tolist() == features.tolist()
    expected: dict[tuple[int, int], float] = {}
    for i in features:
        phi = {}
        for j in features:
            if i != j:
                n11, n1, n2 = (rows[:, i] & rows[:, j]).sum(), rows[:, i].sum(), rows[:, j].sum()
                phi[j] = (300 * n11 - n1 * n2) / np.sqrt(n1 * (300 - n1) * n2 * (300 - n2))
        # Equal coefficients at the edge of the k may go either way: they are let in below.
        edge = sorted(phi.values(), reverse=True)[:k][-1] if phi else 0
        expected |= {
            (min(i, j), max(i, j)): p for j, p in phi.items() if p >= edge - 1e-6 and p > 1e-6
        }
    found = {
        (int(features[a]), int(features[b])): w
        for (a, b), w in zip(graph.edges.tolist(), graph.weights.tolist(), strict=True)
    }
    assert found.keys() <= expected.keys()
    assert all(w == pytest.approx(expected[pair], abs=1e-5) for pair, w in found.items())
    for i in features:
        strong = {p for p, w in expected.items() if i in p and w > 0}
        assert sum(i in pair for pair in found) >= min(k, len(strong) and 1)


def test_shuffled_contexts_keep_what_each_feature_does_inside_a_context() -> None:
    on = noise(3, n_features=6)
    firings = firings_of(on)
    shuffled = shuffle_contexts(firings, seed=0).toarray().reshape(40, 50, 6)
    assert np.array_equal(shuffled.sum(axis=0), on.sum(dim=0))
    for j in range(6):
        before = sorted(map(bytes, on[..., j].numpy().astype(np.uint8)))
        assert sorted(map(bytes, shuffled[..., j].astype(np.uint8))) == before
    assert not np.array_equal(shuffled, on)


def documents_of(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def rates_by_document(document: Tensor, seed: int, spread: float = 1.0) -> Tensor:
    """[contexts, 64, 120], independent features, each with a rate of its own in each document."""
    g = torch.Generator().manual_seed(seed)
    normal = spread * torch.randn(int(document.max()) + 1, 1, 120, generator=g)
    rate = 0.03 * (normal - spread**2 / 2).exp()[document]
    return torch.rand(len(document), 64, 120, generator=g) < rate.clamp(max=0.9)


def test_shuffled_documents_go_whole() -> None:
    document = torch.arange(40) % 10  # contexts of a document need not lie side by side
    on = noise(3, n_features=6)
    shuffled = shuffle_contexts(firings_of(on), seed=0, documents=document).toarray()
    before, after = (x.reshape(40, 50, 6) for x in (on.numpy().astype(int), shuffled.astype(int)))
    for j in range(6):
        whole = [[x[document == d][..., j].tobytes() for d in range(10)] for x in (before, after)]
        assert sorted(whole[0]) == sorted(whole[1]) and whole[0] != whole[1]
    assert not np.array_equal(after[..., 0].argsort(), after[..., 1].argsort())


def test_documents_that_differ_in_length_are_cut_to_those_they_are_exchanged_with() -> None:
    document = documents_of([20] * 6 + [18] * 2 + [5] * 8)
    on = torch.zeros(len(document), 3, 2)
    on[torch.arange(len(document)), 1] = 1  # every context once, both features
    shuffled = shuffle_contexts(firings_of(on), seed=1, documents=document)
    left = shuffled.toarray().reshape(len(document), 3, 2)
    # 8 documents of 18 contexts kept, 8 of 5: nothing lands anywhere else.
    assert np.array_equal(left.sum(axis=(0, 1)), [8 * 18 + 8 * 5] * 2)
    kept = np.bincount(document, left[:, 1, 0])
    assert kept.tolist() == [18] * 8 + [5] * 8


@pytest.mark.parametrize("n_documents", [128, 64, 32, 16])
def test_rates_by_document_make_no_clusters(n_documents: int) -> None:
    document = torch.arange(128) // (128 // n_documents)
    told = [
        cluster_features(
            firings_of(rates_by_document(document, seed)), documents=document, seed=seed
        ).summary
        for seed in range(4)
    ]
    assert sum(summary["significant"] for summary in told) <= 1
    assert abs(np.mean([summary["modularity_excess"] for summary in told])) < 0.012
    assert abs(np.mean([summary["ari_halves"] for summary in told])) < 0.02
    assert {summary["n_documents"] for summary in told} == {n_documents}


def test_rates_by_document_make_clusters_where_contexts_are_taken_for_documents() -> None:
    document = torch.arange(128) // 8
    firings = firings_of(rates_by_document(document, 0))
    wrong = cluster_features(firings).summary
    assert wrong["significant"] is True and wrong["modularity_excess"] > 0.05


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_documents_of_unequal_length_make_no_clusters(spread: float) -> None:
    lengths = np.random.default_rng(4).geometric(0.15, 24)
    document = documents_of(lengths.tolist())
    told = [
        cluster_features(
            firings_of(rates_by_document(document, seed, spread)), documents=document, seed=seed
        ).summary
        for seed in range(4)
    ]
    assert sum(summary["significant"] for summary in told) <= 1
    assert abs(np.mean([summary["modularity_excess"] for summary in told])) < 0.02
    assert 0.5 < told[0]["contexts_exchanged"] < 1


def test_planted_families_pass_with_documents_of_unequal_length() -> None:
    document = documents_of([4] * 3 + [3] * 4 + [2] * 4 + [1] * 8)
    summary = cluster_features(firings_of(planted()), documents=Units(document[:40])).summary
    # Exchanged among 4, a quarter of the documents stay in line: the excess errs downwards.
    assert summary["significant"] is True and summary["modularity_excess"] > 0.15
    assert summary["ari_halves"] > 0.9


def test_few_documents_cannot_tell() -> None:
    document = torch.arange(40) % 15
    summary = cluster_features(firings_of(planted()), documents=document).summary
    assert summary["n_clusters"] == 6 and summary["null_rewired"]["p"] < 0.01
    for name in ("ari_halves", "null_shuffled", "modularity_excess", "significant"):
        assert summary[name] is None
        assert "cannot tell: the contexts are from 15 documents" in summary[f"{name}_reason"]
    json.dumps(summary, allow_nan=False)


def test_contexts_of_unknown_document_are_refused() -> None:
    with pytest.raises(ValueError, match="documents of 39 contexts for firings in 40"):
        cluster_features(firings_of(planted()), documents=torch.arange(39))


def test_shuffled_contexts_stay_on_counted_positions() -> None:
    valid = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) < 0.8
    firings = firings_of(noise(3), valid)
    shuffled = shuffle_contexts(firings, seed=0)
    assert shuffled.shape == firings.pattern.shape
    assert 0.7 < shuffled.sum() / firings.pattern.sum() < 0.9
    assert shuffled.max() == 1


def test_features_that_fire_too_seldom_stay_out() -> None:
    on = planted()
    on[..., 3] = False
    on[..., 7] = False
    on[0, :5, 7] = True
    on[..., 11] = True
    result = cluster_features(firings_of(on), n_seeds=2, n_nulls=2)
    assert result.labels[[3, 7, 11]].tolist() == [-1, -1, -1]
    assert (result.labels >= 0).sum() == 117
    assert result.summary["ami_decoder"] is None and result.summary["ami_decoder_reason"]


@pytest.mark.parametrize(
    "on_BTF",
    [
        torch.zeros(4, 30, 10),
        torch.zeros(0, 30, 10),
        torch.zeros(4, 30, 0),
        torch.ones(4, 30, 10),
        torch.eye(10).repeat(30, 1)[None],
    ],
    ids=["all dead", "no context", "no feature", "always on", "never together"],
)
def test_nothing_to_cluster_is_said_in_words(on_BTF: Tensor) -> None:
    result = cluster_features(firings_of(on_BTF), torch.ones(on_BTF.shape[2], 3))
    assert (result.labels == -1).all() and result.labels.shape == (on_BTF.shape[2],)
    summary = result.summary
    assert summary["n_clusters"] == 0
    for name in ("modularity", "ari_seeds", "ari_halves", "significant", "ami_decoder"):
        assert summary[name] is None and summary[f"{name}_reason"]
    json.dumps(summary, allow_nan=False)
    features, points = layout(result.graph)
    assert features.shape == (0,) and points.shape == (0, 2)


def test_one_context_leaves_out_what_needs_several() -> None:
    on = planted().flatten(0, 1)[None]
    summary = cluster_features(firings_of(on)).summary
    assert summary["n_clusters"] == 6
    for name in ("ari_halves", "null_shuffled", "significant"):
        assert summary[name] is None and "context" in summary[f"{name}_reason"]
    json.dumps(summary, allow_nan=False)


def test_two_features_that_always_fire_together_are_a_cluster() -> None:
    on = noise(0, n_features=2)[..., :1].repeat(1, 1, 2)
    result = cluster_features(firings_of(on), torch.ones(2, 3))
    assert result.labels.tolist() == [0, 0]
    assert result.summary["significant"] is False
    json.dumps(result.summary, allow_nan=False)
    assert layout(result.graph)[1].isfinite().all()


def test_too_few_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        cluster_features(firings_of(planted()), n_nulls=1)


def test_direction_graph_joins_rows_by_cosine_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcsae.metrics.specialization._BLOCK_ROWS", 4)
    W_dec = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    features = torch.tensor([0, 2, 3, 5, 6, 7, 8, 9, 11])
    graph = direction_graph(W_dec, features, k=2)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T)[features][:, features].numpy()
    expected = set()
    for i, row in enumerate(cosine):
        best = [j for j in np.argsort(-row) if j != i][:2]
        expected |= {(min(i, int(j)), max(i, int(j))) for j in best if row[j] > 0}
    assert set(map(tuple, graph.edges.tolist())) == expected
    np.testing.assert_allclose(graph.weights, cosine[tuple(graph.edges.T)], atol=1e-6)


def test_the_picture_keeps_families_together_and_does_not_move(clusters: Specialization) -> None:
    features, points = layout(clusters.graph)
    assert points.shape == (120, 2) and points.isfinite().all()
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    nearest = features[distance.argmin(dim=1)]
    assert (FAMILY[nearest] == FAMILY[features]).mean() > 0.95
    random.seed(1)
    assert torch.equal(layout(clusters.graph)[1], points)


def test_a_higher_resolution_gives_more_clusters_numbered_by_size() -> None:
    firings = firings_of(noise())
    coarse, fine = (cluster_features(firings, resolution=value) for value in (1.0, 3.0))
    assert fine.summary["n_clusters"] > coarse.summary["n_clusters"] > 0
    sizes = torch.bincount(fine.labels[fine.labels >= 0])
    assert sizes.tolist() == fine.summary["cluster_sizes"]
    assert (sizes.diff() <= 0).all() and sizes.min() >= 2
