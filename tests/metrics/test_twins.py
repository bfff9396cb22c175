"""Position twins: those that were planted, and none among features without position."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.metrics.correlation import SparseFeatureCorrelation, feature_correlation
from tcsae.metrics.redundancy import position_twins, twins_report
from tcsae.metrics.top_contexts import FiringPatterns, Firings
from tcsae.metrics.twins import PositionTwins, _discoveries

T, PAIRS = 64, 60


def firings_of(f_BTF: Tensor) -> Firings:
    patterns = FiringPatterns(f_BTF.shape[2])
    patterns.update(f_BTF)
    return patterns.compute()


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
    values = feature_correlation(f_BTF).values
    pairs = position_twins(values, W_dec, profiles, firings=firings_of(f_BTF))
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0], [1])
    assert pairs.correlation[0] < 0
    assert pairs.cosine[0] > 0.7
    report = twins_report(pairs, torch.tensor([1, 1, 1, 1, 1, 1, 0]).bool())
    assert (report["n_pairs"], report["n_features"], report["twinned_share"]) == (1, 2, 2 / 6)
    assert (report["n_candidates"], report["n_cannot_tell"]) == (1, 0)
    json.dumps(report, allow_nan=False)


def test_position_twins_of_a_sparse_accumulator() -> None:
    f_BTF, W_dec, profiles = twins_family()
    accumulator = SparseFeatureCorrelation(7)
    accumulator.update(f_BTF)
    pairs = position_twins(accumulator.of_pairs, W_dec, profiles, firings=firings_of(f_BTF))
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0], [1])


def test_without_firings_nothing_can_be_told() -> None:
    f_BTF, W_dec, profiles = twins_family()
    pairs = position_twins(feature_correlation(f_BTF).values, W_dec, profiles)
    report = twins_report(pairs, torch.ones(7).bool())
    assert (report["n_pairs"], report["n_candidates"], report["n_cannot_tell"]) == (0, 1, 1)
    assert report["twinned_share"] is None
    assert "were not given" in report["twinned_share_reason"]


def test_features_that_fire_together_are_no_position_twins() -> None:
    f_BTF, W_dec, profiles = twins_family()
    pairs = position_twins(
        lambda first, _: torch.full((len(first),), 0.5), W_dec, profiles, firings=firings_of(f_BTF)
    )
    assert len(pairs.first) == pairs.n_candidates == 0


def stationary(n_contexts: int, density: float, run: float, per_document: int) -> Tensor:
    """[contexts, T, 2 PAIRS], on and off with one law at every position; a document's contexts
    have their runs at about the same places."""
    g = torch.Generator().manual_seed(1)
    shape = (n_contexts // per_document, 2 * PAIRS)
    on, rows = torch.rand(*shape, generator=g) < density, []
    for _ in range(T):
        rows.append(on)
        u = torch.rand(*shape, generator=g)
        on = torch.where(on, u > 1 / run, u < density / run / (1 - density))
    f_BTF = torch.stack(rows, 1).repeat_interleave(per_document, 0).float()
    if per_document > 1:
        f_BTF *= torch.rand(f_BTF.shape, generator=g) < 0.8
    return f_BTF


def told(f_BTF: Tensor, per_document: int = 1) -> tuple[PositionTwins, dict[str, Any]]:
    g = torch.Generator().manual_seed(2)
    W = normalize(torch.randn(PAIRS, 128, generator=g), dim=1)
    near = normalize(torch.randn(PAIRS, 128, generator=g), dim=1)
    W_dec = torch.stack([W, W + 0.5 * near], 1).flatten(0, 1)
    found = position_twins(
        feature_correlation(f_BTF).values,
        W_dec,
        f_BTF.mean(0),
        firings=firings_of(f_BTF),
        documents=torch.arange(len(f_BTF)) // per_document,
    )
    return found, twins_report(found, f_BTF.any(1).any(0))


LAWS = [
    (256, 0.001, 1.001, 1),
    (256, 0.005, 1.001, 1),
    (256, 0.02, 16, 1),
    (1024, 0.01, 32, 1),
    (1024, 0.01, 8, 4),
    (512, 0.02, 8, 8),
    (64, 0.02, 1.001, 1),
]


@pytest.mark.parametrize(("n_contexts", "density", "run", "per_document"), LAWS)
def test_features_without_position_have_no_twins(
    n_contexts: int, density: float, run: float, per_document: int
) -> None:
    found, report = told(stationary(n_contexts, density, run, per_document), per_document)
    assert report["twinned_share"] is None or report["twinned_share"] <= 0.02
    assert len(found.first) <= 1


@pytest.mark.parametrize(("n_contexts", "density", "run", "per_document"), LAWS[1:5])
def test_twins_that_split_the_context_are_found(
    n_contexts: int, density: float, run: float, per_document: int
) -> None:
    f_BTF = stationary(n_contexts, 2 * density, run, per_document)
    f_BTF[:, : T // 2, ::2] = 0
    f_BTF[:, T // 2 :, 1::2] = 0
    found, report = told(f_BTF, per_document)
    assert isinstance(report["twinned_share"], float) and report["twinned_share"] >= 0.88
    pairs = zip(found.first.tolist(), found.second.tolist(), strict=True)
    assert all(j == i + 1 and i % 2 == 0 for i, j in pairs)


def test_documents_are_dealt_and_not_their_contexts() -> None:
    """Eight contexts alike in each of 32 documents: as contexts they would all be twins."""
    f_BTF = stationary(256, 0.02, 16, 8)
    found, report = told(f_BTF, 8)
    assert len(found.first) == 0
    apart = told(f_BTF, 1)[0]
    assert len(apart.first) > 5
    assert found.n_cannot_tell > apart.n_cannot_tell


def test_pairs_in_too_few_documents_cannot_be_told() -> None:
    f_BTF = torch.zeros(64, T, 2 * PAIRS)
    f_BTF[:4, 5, ::2] = 1
    f_BTF[4:8, 50, 1::2] = 1
    found, report = told(f_BTF)
    assert found.n_candidates >= PAIRS and found.n_cannot_tell == found.n_candidates
    assert report["twinned_share"] is None
    assert "too few documents" in str(report["twinned_share_reason"])
    json.dumps(report, allow_nan=False)


def test_false_discoveries_are_held_down_as_benjamini_and_hochberg() -> None:
    p = np.array([0.5, 0.0001, np.nan, 0.004, 0.9])
    assert _discoveries(p).tolist() == [False, True, False, True, False]
    assert not _discoveries(np.full(3, np.nan)).any()
    even = np.random.default_rng(0).random((2000, 200))
    assert np.mean([_discoveries(row).any() for row in even]) < 0.02
