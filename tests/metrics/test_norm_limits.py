"""Explained variance by norm limit: planted tokens of large norm, against numpy."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tcsae.metrics.norm_limits import (
    NO_TOKEN,
    NO_VARIANCE,
    NOT_ENCODED,
    TOLERANCE,
    NormLimits,
    caution,
)
from tcsae.metrics.reconstruction import ReconstructionMetrics

B, T, D = 6, 20, 12
MEDIAN = 5.0
PLANTED = {(0, 3): 4.0, (2, 5): 4.0, (1, 1): 8.0, (4, 2): 50.0, (3, 0): 900.0}
"""Norms in medians by place; position 0 is special."""


def planted() -> tuple[Tensor, Tensor, Tensor]:
    """x, x_hat [B, T, D] and the mask of tokens that are not special [B, T]."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(B, T, D, generator=generator) + 0.5
    direction /= direction.norm(dim=-1, keepdim=True)
    times = 0.7 + torch.rand(B, T, generator=generator)  # .7 to 1.7 medians
    for place, factor in PLANTED.items():
        times[place] = factor
    x = direction * times[..., None] * MEDIAN
    x_hat = x + torch.randn(B, T, D, generator=generator)
    x_hat[4, 2] = 0.9 * x[4, 2]
    x_hat[1, 1] = 0  # a near-massive token that is not reconstructed at all
    counted = torch.ones(B, T, dtype=torch.bool)
    counted[:, 0] = False
    counted[5, 7] = False
    return x, x_hat, counted


def by_hand(x: Tensor, x_hat: Tensor, counted: Tensor, limit: float) -> dict[str, float]:
    norm = x.norm(dim=-1).numpy()
    every = counted.numpy()
    chosen = every & (norm <= limit * MEDIAN)
    x_64, e_64 = x.double().numpy(), (x_hat.double() - x.double()).numpy()
    inside = x_64[chosen] - x_64[chosen].mean(0)
    about_all = ((x_64 - x_64[every].mean(0)) ** 2).sum(-1)
    return {
        "explained_variance": 1 - (e_64[chosen] ** 2).sum() / (inside**2).sum(),
        "n_tokens_left_out": int((every & ~chosen).sum()),
        "token_share_left_out": (every & ~chosen).sum() / every.sum(),
        "variance_share_left_out": about_all[every & ~chosen].sum() / about_all[every].sum(),
    }


def measured(own: float = 3.0, encoded: Tensor | None = None) -> list[dict[str, Any]]:
    x, x_hat, counted = planted()
    limits = NormLimits(D, MEDIAN, own)
    seen = counted if encoded is None else encoded
    for rows in torch.arange(B).split(2):
        limits.update(x[rows], x_hat[rows], counted=counted[rows], encoded=seen[rows])
    return limits.compute()


def test_every_limit_has_the_value_that_numpy_gives() -> None:
    rows = measured()
    assert [row["limit"] for row in rows] == [2, 3, 5, 10, None]
    for row in rows:
        hand = by_hand(*planted(), math.inf if row["limit"] is None else row["limit"])
        assert row["reason"] is None
        assert {name: row[name] for name in hand} == pytest.approx(hand, rel=1e-9, abs=1e-12)
    assert [row["n_tokens_left_out"] for row in rows] == [4, 4, 2, 1, 0]
    assert rows[-1]["variance_share_left_out"] == rows[-1]["token_share_left_out"] == 0
    assert rows[0]["variance_share_left_out"] > 0.5


def test_special_tokens_count_at_no_limit() -> None:
    """Position 0 holds a norm of 900 medians: with it "no limit" would see one token alone."""
    x, x_hat, counted = planted()
    other = x.clone(), x_hat.clone()
    for changed in other:
        changed[~counted] = math.nan
    limits = NormLimits(D, MEDIAN, 3)
    limits.update(*other, counted=counted, encoded=counted)
    for row, before in zip(limits.compute(), measured(), strict=True):
        assert row == pytest.approx(before)


def test_the_row_of_the_runs_own_limit_is_its_headline() -> None:
    x, x_hat, counted = planted()
    for own in (3.0, 5.0, 7.5):
        metrics = ReconstructionMetrics(D, 1)
        valid = counted & (x.norm(dim=-1) <= own * MEDIAN)
        metrics.update(x, x_hat, torch.zeros(B, T, 1), valid=valid)
        (row,) = (row for row in measured(own) if row["limit"] == own)
        headline = metrics.compute()["explained_variance"]
        assert row["explained_variance"] == pytest.approx(headline, rel=1e-12)


def test_a_limit_of_ones_own_has_a_row_too() -> None:
    assert [row["limit"] for row in measured(7.5)] == [2, 3, 5, 7.5, 10, None]
    assert [row["limit"] for row in measured(0)] == [2, 3, 5, 10, None]


def test_a_token_at_the_limit_is_within() -> None:
    x = torch.zeros(1, 4, D)
    x[0, :, 0] = torch.tensor([1.0, 1.5, 3.0, math.nextafter(3.0, 4) + 1e-6])
    limits, all_of_it = NormLimits(D, 1.0, 3), torch.ones(1, 4, dtype=torch.bool)
    limits.update(x, x, counted=all_of_it, encoded=all_of_it)
    left_out = {row["limit"]: row["n_tokens_left_out"] for row in limits.compute()}
    assert left_out == {2: 2, 3: 1, 5: 0, 10: 0, None: 0}


def test_what_was_not_encoded_has_no_value_but_a_reason() -> None:
    """An SAE that reads a token's past, with the run's own limit at 3."""
    x, _, counted = planted()
    rows = measured(encoded=counted & (x.norm(dim=-1) <= 3 * MEDIAN))
    assert [row["explained_variance"] is None for row in rows] == [False, False, True, True, True]
    assert [row["reason"] for row in rows[2:]] == [NOT_ENCODED] * 3
    for row, before in zip(rows, measured(), strict=True):
        assert row["variance_share_left_out"] == before["variance_share_left_out"]
    assert rows[:2] == measured()[:2]


def test_no_token_and_no_variance_are_null_with_a_reason() -> None:
    limits = NormLimits(D, 1.0, 3)
    none = torch.zeros(1, 2, dtype=torch.bool)
    limits.update(torch.ones(1, 2, D), torch.ones(1, 2, D), counted=none, encoded=none)
    empty = limits.compute()
    assert all(row["explained_variance"] is None for row in empty)
    assert {row["reason"] for row in empty} == {NO_TOKEN}
    assert {row["token_share_left_out"] for row in empty} == {None}
    every = ~none
    limits.update(torch.ones(1, 2, D), torch.zeros(1, 2, D), counted=every, encoded=every)
    same = limits.compute()  # norm 3.46
    assert [row["reason"] for row in same] == [NO_TOKEN, NO_TOKEN, *[NO_VARIANCE] * 3]
    json.dumps(empty + same, allow_nan=False)


def test_a_token_that_is_no_number_spoils_only_the_row_without_a_limit() -> None:
    x, x_hat, counted = planted()
    x[0, 4] = math.nan
    limits = NormLimits(D, MEDIAN, 3)
    limits.update(x, x_hat, counted=counted, encoded=counted)
    rows = limits.compute()
    assert [row["reason"] for row in rows] == [None] * 4 + [NO_VARIANCE]
    assert rows[1]["explained_variance"] == pytest.approx(
        by_hand(x, x_hat, counted, 3)["explained_variance"]
    )
    json.dumps(rows, allow_nan=False)


# ---------------------------------------------------------------- the caution


def rows_of(**values: float | None) -> list[dict[str, Any]]:
    """Rows with these explained variances, by "at_3" or "none"; each leaves out less by 10."""
    named = {k: None if k == "none" else float(k.removeprefix("at_")) for k in values}
    return [
        {"limit": named[k], "explained_variance": v, "n_tokens_left_out": 10 * (len(values) - i)}
        for i, (k, v) in enumerate(values.items())
    ]


def test_no_caution_where_the_limits_agree_whatever_massive_tokens_do() -> None:
    rows = rows_of(at_2=0.829, at_3=0.828, at_5=0.828, at_10=0.836, none=0.98)
    assert caution(rows, 3) is None


def test_a_limit_outside_the_gap_is_told() -> None:
    said = caution(rows_of(at_2=0.847, at_3=0.847, at_5=0.847, at_10=0.897, none=0.98), 10)
    assert said is not None and said["decides_the_headline"] and said["limits"] == [5]
    assert "0.897 at this run's limit (10 x the median)" in said["text"]
    assert "0.847 at 5 x the median, which counts 10 tokens fewer" in said["text"]
    assert "handful of near-massive tokens" in said["text"]


def test_limits_further_away_put_only_the_comparison_in_doubt() -> None:
    """Gemma 3 at 3: its own number is sound; beside a run at 10 it says nothing."""
    said = caution(rows_of(at_2=0.847, at_3=0.847, at_5=0.847, at_10=0.897, none=0.98), 3)
    assert said is not None and not said["decides_the_headline"] and said["limits"] == [10]
    assert "counts 20 tokens more" in said["text"] and "handful" not in said["text"]


def test_the_tolerance_is_the_threshold() -> None:
    for excess, expected in ((-1e-6, None), (1e-6, [5.0])):
        value = 0.8 + TOLERANCE + excess
        said = caution(rows_of(at_2=0.8, at_3=0.8, at_5=value, at_10=0.8, none=0.8), 3)
        assert (said and said["limits"]) == expected


def test_a_run_without_a_limit_is_compared_with_the_highest() -> None:
    rows = rows_of(at_2=0.8, at_3=0.8, at_5=0.8, at_10=0.8, none=0.98)
    said = caution(rows, 0)
    assert said is not None and said["decides_the_headline"] and said["limits"] == [10]
    assert "0.980 at this run's limit (no limit)" in said["text"]


def test_a_limit_between_the_usual_ones_has_them_as_neighbours() -> None:
    values = {"at_2": 0.8, "at_3": 0.8, "at_5": 0.8, "at_7": 0.83, "at_10": 0.83, "none": 0.9}
    said = caution(rows_of(**values), 7)
    assert said is not None and said["decides_the_headline"] and said["limits"] == [5]


def test_values_that_are_missing_are_passed_over() -> None:
    rows = rows_of(at_2=0.8, at_3=0.8, at_5=None, at_10=None, none=None)
    assert caution(rows, 3) is None
    assert caution(rows, 10) is None


def test_planted_tokens_raise_it() -> None:
    said = caution(measured(own=10), 10)
    assert said is not None and said["decides_the_headline"]
    np.testing.assert_array_equal(said["limits"], [5])
