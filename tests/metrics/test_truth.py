"""Truth metrics: the oracle is perfect, and faults that were planted come out as planted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tcsae.config.synthetic import WorldConfig
from tcsae.data.contexts import segments_of, valid_of
from tcsae.data.synthetic import World, context_ids, document_numbers
from tcsae.metrics.truth import TruthMetrics, match_features, random_cosine


@pytest.fixture(scope="module")
def world() -> World:
    parts: dict[str, Any] = {
        "name": "test",
        "d_in": 16,
        "document_tokens": 31,
        "classes": {
            "token": {"n": 6, "lifetime": 1, "density": 0.1},
            "phrase": {"n": 6, "lifetime": 8.0, "density": 0.2},
        },
        "children": {"of": "phrase", "per_parent": 2, "rate": 0.3},
        "amplitude_noise": 0.2,
    }
    return World(WorldConfig.model_validate(parts))


def metrics_of(world: World, W_dec: Tensor) -> TruthMetrics:
    return TruthMetrics(
        W_dec,
        world.decoder,
        class_of=world.class_of,
        class_names=world.cfg.class_names,
        slow=world.cfg.slow,
        parent=world.parent,
    )


def contexts(world: World, n: int = 60) -> dict[str, Tensor]:
    numbers = document_numbers(n, 0, held_out=True, document_tokens=31)
    ids, _ = context_ids(numbers, 31, 32)
    bos = frozenset({0})
    return {
        "truth": world.codes(ids),
        "segments": segments_of(ids, bos),
        "valid": valid_of(ids, bos),
    }


def test_the_oracle_scores_one(world: World) -> None:
    """Also in another order, at another scale, and among features that are of nothing."""
    draws = torch.Generator().manual_seed(0)
    order = torch.randperm(world.n_true, generator=draws)
    rest = torch.randn(9, 16, generator=draws)
    W_dec = torch.cat([world.decoder[order] * 3.0, rest])
    metrics = metrics_of(world, W_dec)
    given = contexts(world)
    truth = given["truth"]
    features = torch.cat([truth[..., order] / 3.0, torch.zeros(*truth.shape[:2], 9)], dim=-1)
    for half in (slice(0, 30), slice(30, 60)):
        metrics.update(features[half], **{name: value[half] for name, value in given.items()})
    assert metrics.match.equal(order.argsort())
    found = metrics.compute()
    assert found["mcc"] == pytest.approx(1.0, abs=1e-6)
    assert found["absorption"] == {"recall_with_child": 1.0, "recall_without_child": 1.0}
    assert found["slow"]["n"] == 6
    for part in (found["all"], found["slow"], *found["by_class"].values()):
        assert part["n_found"] == part["n"]
        ones = [part[name] for name in ("found", "precision", "recall", "f1", "pieces")]
        zeros = [part[name] for name in ("broken", "missed", "delay", "lag")]
        assert (ones, zeros) == ([1.0] * 5, [0.0] * 4)


def test_a_random_dictionary_scores_its_null(world: World) -> None:
    null = random_cosine(40, world.decoder)
    others = [random_cosine(40, world.decoder, seed) for seed in range(1, 9)]
    assert min(others) - 0.05 < null < max(others) + 0.05
    draws = torch.Generator().manual_seed(7)
    found = metrics_of(world, torch.randn(40, 16, generator=draws)).compute()
    assert found["mcc_random"] == null
    assert abs(found["mcc"] - null) < 0.05
    # More directions to choose from: more by chance.
    assert random_cosine(400, world.decoder) > null + 0.1


def test_the_match_is_the_best_of_all_permutations() -> None:
    """Where taking the nearest one first would be worse."""
    true = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    learnt = torch.tensor([[0.96, 0.28], [0.6, 0.8]])
    match, cosine = match_features(learnt, true)
    assert match.tolist() == [0, 1]
    assert cosine.tolist() == pytest.approx([0.96, 0.96])
    worse = torch.tensor([[0.95, 0.31], [1.0, 0.02], [-1.0, 0.0]])
    assert match_features(worse, true)[0].tolist() == [1, 0]


def test_too_few_features_leave_true_ones_without_a_match() -> None:
    true = torch.eye(3)
    match, cosine = match_features(true[[2]], true)
    assert match.tolist() == [-1, -1, 0]
    assert cosine.tolist() == [0.0, 0.0, 1.0]


# ------------------------------------------------------------------ planted, and counted by hand


def planted(true: list[str], fired: list[str], segments: str, valid: str) -> TruthMetrics:
    """One feature a row of `true`, one context; # is on."""

    def marks(rows: list[str]) -> Tensor:
        return torch.tensor([[c == "#" for c in row] for row in rows]).T[None].float()

    n = len(true)
    metrics = TruthMetrics(
        torch.eye(n),
        torch.eye(n),
        class_of=torch.zeros(n, dtype=torch.int64),
        class_names=["only"],
        slow=[],
        parent=torch.full((n,), -1),
    )
    metrics.update(
        marks(fired),
        marks(true),
        segments=torch.tensor([[int(c) for c in segments]]),
        valid=torch.tensor([[c == "1" for c in valid]]),
    )
    return metrics


def test_flicker_delay_and_misses_by_hand() -> None:
    metrics = planted(
        # Three runs: in 2 pieces, missed, hit one token late in 1 piece.
        true=["..####..##..###..."],
        fired=["..#.##.......##..."],
        segments="1" * 18,
        valid="1" * 18,
    )
    found = {name: value.item() for name, value in metrics.per_feature().items()}
    assert found["pieces"] == 3 / 2
    assert found["broken"] == 1 / 2
    assert found["missed"] == pytest.approx(1 / 3)
    assert found["delay"] == 1 / 2
    assert (found["recall"], found["precision"]) == (5 / 9, 1.0)
    assert found["f1"] == pytest.approx(2 * 5 / (9 + 5))


def test_lag_by_hand() -> None:
    metrics = planted(
        # Runs that end with their match on: 2 tokens too long, 0, 1 up to the next run.
        true=["##....##..##.##..."],
        fired=["####..##..######.#"],
        segments="1" * 18,
        valid="1" * 18,
    )
    found = {name: value.item() for name, value in metrics.per_feature().items()}
    # The fourth run ends and the match goes on for 1 token; what fires later is another matter.
    assert found["lag"] == (2 + 0 + 1 + 1) / 4
    assert found["pieces"] == 1.0
    assert found["precision"] == pytest.approx(8 / 13)


def test_a_run_ends_with_its_document_and_at_tokens_that_do_not_count() -> None:
    metrics = planted(
        true=["######"],
        fired=["##.###"],
        segments="111222",
        valid="101111",
    )
    found = {name: value.item() for name, value in metrics.per_feature().items()}
    # Tokens 0, 2 and 3 to 5 are three runs; the match is on in the first and the last.
    assert found["missed"] == pytest.approx(1 / 3)
    assert (found["pieces"], found["delay"]) == (1.0, 0.0)
    assert found["recall"] == 4 / 5
    # None of them ends inside its document before a token that counts.
    assert math.isnan(found["lag"])


def test_an_end_of_a_document_is_no_lag() -> None:
    metrics = planted(true=["##.##."], fired=["######"], segments="112222", valid="111111")
    assert metrics.per_feature()["lag"].item() == 1.0


def test_absorption_by_hand() -> None:
    """The parent's match goes out where a child fires."""
    metrics = TruthMetrics(
        torch.eye(3),
        torch.eye(3),
        class_of=torch.tensor([0, 1, 1]),
        class_names=["phrase", "child"],
        slow=["phrase"],
        parent=torch.tensor([-1, 0, 0]),
    )
    parent = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    first, second = torch.tensor([[0, 1, 0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0, 0]])
    truth = torch.stack([parent, first, second], dim=-1)[None].float()
    features = truth.clone()
    features[0, [1, 2, 5], 0] = 0  # of three tokens with a child two, of five without one
    marks = {"segments": torch.ones(1, 10), "valid": torch.ones(1, 10, dtype=torch.bool)}
    metrics.update(features, truth, **marks)
    found = metrics.compute()["absorption"]
    assert found["recall_with_child"] == pytest.approx(1 / 3)
    assert found["recall_without_child"] == 4 / 5


def test_nothing_to_count_is_nan() -> None:
    metrics = planted(true=["....", "##.."], fired=["#...", "...."], segments="1111", valid="1111")
    found = metrics.per_feature()
    for name in ("precision", "recall", "f1", "pieces", "missed", "lag"):
        assert math.isnan(found[name][0])
    assert found["f1"][1] == 0
    assert math.isnan(found["pieces"][1])
    # Means are over the features that have a value.
    assert metrics.compute()["all"]["f1"] == 0
