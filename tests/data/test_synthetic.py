"""Synthetic worlds: what was asked for is what is drawn, whoever asks and with whatever else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tcsae.config import DatasetConfig, ModelConfig
from tcsae.config.synthetic import WorldConfig
from tcsae.data.batches import ActivationBatches, calibrate
from tcsae.data.store import StreamSource
from tcsae.data.synthetic import BOS, World, context_ids, document_numbers
from tcsae.data.synthetic_model import SyntheticModel

L = 63


def world(**changes: Any) -> World:
    """Every kind of feature, few of each."""
    parts: dict[str, Any] = {
        "name": "test",
        "d_in": 24,
        "document_tokens": L,
        "classes": {
            "token": {"n": 8, "lifetime": 1, "density": 0.05},
            "phrase": {"n": 8, "lifetime": 8.0, "density": 0.2, "amplitude": 0.6},
            "sentence": {"n": 8, "lifetime": 32.0, "shape": 4, "density": 0.3},
            "document": {"n": 8, "lifetime": "document", "density": 0.25, "amplitude": 2.0},
        },
        "children": {"of": "phrase", "per_parent": 2, "rate": 0.3},
        "position": {"n": 6, "width": 3, "rate": 0.75},
        "amplitude_noise": 0.2,
        "noise": 0.1,
    }
    return World(WorldConfig.model_validate({**parts, **changes}))


def ids_of(n: int, *, size: int = L + 1, held_out: bool = False, tokens: int = L) -> Tensor:
    numbers = document_numbers(n, 0, held_out=held_out, document_tokens=tokens)
    return context_ids(numbers, tokens, size)[0]


def runs(on_TF: Tensor) -> np.ndarray:
    """Lengths of all runs that begin and end inside, of all features."""
    found = []
    for column in on_TF.T.numpy().astype(int):
        steps = np.diff(column)
        starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        ends = ends[np.searchsorted(ends, starts[0]) :] if len(starts) else ends[:0]
        found.append(ends - starts[: len(ends)])
    return np.concatenate(found)


@pytest.fixture(scope="module")
def drawn() -> tuple[World, Tensor]:
    """A world, and which features are on in 2,000 contexts of one document, BOS left out."""
    made = world()
    return made, made.codes(ids_of(2000))[:, 1:] > 0


def test_each_class_is_on_as_often_as_asked(drawn: tuple[World, Tensor]) -> None:
    made, on_BTF = drawn
    share_BF = on_BTF.double().mean(1)
    found_F, error_F = share_BF.mean(0), share_BF.std(0) / len(share_BF) ** 0.5
    asked_F = made.density
    known = ~asked_F.isnan()
    assert known.sum() == 48
    assert ((found_F - asked_F)[known].abs() < 4.5 * error_F[known]).all()


def test_runs_last_as_long_as_asked() -> None:
    # One document of many tokens: no run is cut but the last.
    n = 150_000
    made = world(
        document_tokens=n,
        classes={
            "token": {"n": 2, "lifetime": 1, "density": 0.05},
            "phrase": {"n": 2, "lifetime": 8.0, "density": 0.2},
            "sentence": {"n": 2, "lifetime": 32.0, "shape": 4, "density": 0.3},
        },
        children=None,
        position=None,
    )
    on_TF = made.codes(ids_of(1, size=n + 1, tokens=n))[0, 1:] > 0
    tokens, phrases, sentences = (
        runs(on_TF[:, made.members(name)]) for name in ("token", "phrase", "sentence")
    )
    for lengths, mean in ((tokens, 1 / 0.95), (phrases, 8.0), (sentences, 32.0)):
        assert abs(lengths.mean() - mean) < 4.5 * lengths.std() / len(lengths) ** 0.5
    # Variances of the geometric law, m (m - 1), and of four of mean 8 in a row.
    assert phrases.var() == pytest.approx(8 * 7, rel=0.15)
    assert sentences.var() == pytest.approx(4 * 8 * 7, rel=0.15)
    assert phrases.min() == 1
    assert sentences.min() >= 4


def test_the_start_of_a_document_is_like_its_end(drawn: tuple[World, Tensor]) -> None:
    made, on_BTF = drawn
    slow_BTF = on_BTF[..., made.members("sentence")]
    first, last = (slow_BTF[:, t].double().mean() for t in (0, L - 1))
    assert abs(first - last) < 0.03
    # What the first states are must not be what the first moves are.
    stays = (slow_BTF[:, 0] & slow_BTF[:, 1]).sum() / slow_BTF[:, 0].sum()
    assert stays.item() == pytest.approx(1 - 1 / 32, abs=0.01)


def test_document_features_last_a_document(drawn: tuple[World, Tensor]) -> None:
    made, on_BTF = drawn
    on_BTF = on_BTF[..., made.members("document")]
    assert (on_BTF == on_BTF[:, :1]).all()


def test_children_fire_under_their_parent_alone(drawn: tuple[World, Tensor]) -> None:
    made, on_BTF = drawn
    children = made.members("child")
    parents = made.parent[children]
    assert parents.tolist() == [8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15]
    parent_BTC, child_BTC = on_BTF[..., parents], on_BTF[..., children]
    assert not (child_BTC & ~parent_BTC).any()
    rate = child_BTC.sum() / parent_BTC.sum()
    assert rate.item() == pytest.approx(0.3, abs=0.005)
    # By themselves: a child at one token says nothing of the next, nor of its sibling.
    again = (child_BTC[:, 1:] & child_BTC[:, :-1]).sum() / (
        child_BTC[:, :-1] & parent_BTC[:, 1:]
    ).sum()
    both = (child_BTC[..., ::2] & child_BTC[..., 1::2]).sum() / child_BTC[..., ::2].sum()
    assert again.item() == pytest.approx(0.3, abs=0.01)
    assert both.item() == pytest.approx(0.3, abs=0.01)


def test_position_bound_features_fire_in_their_band_alone(drawn: tuple[World, Tensor]) -> None:
    made, on_BTF = drawn
    rate_TF = on_BTF[..., made.members("position")].double().mean(0)
    bands = [range(3), range(60, 63), range(3, 6), range(57, 60), range(6, 9), range(54, 57)]
    for feature, band in enumerate(bands):
        inside = torch.tensor([t in band for t in range(L)])
        assert (rate_TF[~inside, feature] == 0).all()
        assert (rate_TF[inside, feature] - 0.75).abs().max() < 0.05


def test_bands_are_of_the_context_not_of_the_document() -> None:
    made = world(document_tokens=20)
    codes_BTF = made.codes(ids_of(300, tokens=20))
    early_TF = (codes_BTF[..., made.members("position")] > 0).double().mean(0)
    assert (early_TF[1:4, 0] > 0.5).all()
    assert (early_TF[4:, 0] == 0).all()


def test_correlation_is_as_asked() -> None:
    c, topics = 0.5, 4
    classes = {"document": {"n": 30, "lifetime": "document", "density": 0.15}}
    made = world(
        classes=classes,
        children=None,
        position=None,
        topics=topics,
        correlation=c,
        document_tokens=1,
    )
    on_DF = (made.codes(ids_of(30_000, size=2, tokens=1))[:, 1] > 0).double()
    assert (on_DF.mean(0) - 0.15).abs().max() < 0.015
    covariance_FF = torch.cov(on_DF.T)
    same = made.topic[:, None] == made.topic
    off = ~torch.eye(30, dtype=torch.bool)
    # p^2 (E[r r'] - 1), r = 1 + c (K - 1) in the topic and 1 - c elsewhere.
    assert covariance_FF[same & off].mean().item() == pytest.approx(0.15**2 * c**2 * 3, rel=0.05)
    assert covariance_FF[~same].mean().item() == pytest.approx(-(0.15**2) * c**2, rel=0.1)


def test_amplitudes_and_noise() -> None:
    made = world()
    codes_BTF = made.codes(ids_of(400))
    for name, amplitude in (("phrase", 0.6), ("document", 2.0), ("child", 1.0)):
        values = codes_BTF[..., made.members(name)]
        values = values[values > 0]
        assert values.mean().item() == pytest.approx(amplitude, rel=0.01)
        assert values.std().item() == pytest.approx(0.2 * amplitude, rel=0.05)
        assert values.min() >= 0.1 * amplitude * 0.999
    noise = made.activations(ids_of(400)) - codes_BTF @ made.decoder
    squares = noise[:, 1:].square().sum(-1)
    assert squares.mean().item() == pytest.approx(0.1**2, rel=0.02)


def test_directions_have_norm_one_and_are_random() -> None:
    made = world()
    assert made.decoder.norm(dim=-1).allclose(torch.ones(made.n_true))
    cosine = made.decoder @ made.decoder.T
    off = cosine[~torch.eye(made.n_true, dtype=torch.bool)]
    assert off.square().mean().item() == pytest.approx(1 / 24, rel=0.1)


def test_massive_tokens_are_at_the_edges() -> None:
    made = world(massive=0.5, massive_norm=40.0)
    norm_BT = made.activations(ids_of(400)).norm(dim=-1)
    assert norm_BT[:, 0].allclose(torch.tensor(40.0))
    is_massive = norm_BT[:, 1:] > 20
    assert not is_massive[:, 1:-1].any()
    assert not (is_massive[:, 0] & is_massive[:, -1]).any()
    for edge in (0, -1):
        assert is_massive[:, edge].double().mean().item() == pytest.approx(0.25, abs=0.08)


# --------------------------------------------------------------------------- the same for everybody


def test_alone_a_document_is_what_it_is_in_a_batch() -> None:
    ids_BT = ids_of(7)
    together = world(massive=0.3).activations(ids_BT)
    again = world(massive=0.3)
    for row in (3, 0, 6):
        assert again.codes(ids_BT[row : row + 1]).equal(world().codes(ids_BT)[row : row + 1])
        # Of the product with the directions, BLAS may sum in another order.
        assert again.activations(ids_BT[row : row + 1])[0].allclose(together[row], atol=1e-6)


def test_a_cut_document_is_a_part_of_the_whole() -> None:
    whole = world(position=None).codes(ids_of(4))
    pieces = world(position=None).codes(ids_of(4, size=22))
    assert pieces.shape[:2] == (12, 22)
    assert pieces[:, 1:].reshape(4, L, -1).equal(whole[:, 1:])


def test_other_seeds_and_other_documents_are_others() -> None:
    ids_BT = ids_of(3)
    first, other = world(), world(seed=1)
    assert not first.decoder.allclose(other.decoder)
    assert not first.codes(ids_BT).equal(other.codes(ids_BT))
    rows = first.codes(ids_BT)
    assert not rows[0].equal(rows[1])


def test_no_document_is_on_both_sides() -> None:
    sides = [
        set(document_numbers(500, key, held_out=held_out, document_tokens=L).tolist())
        for key in (0, 1)
        for held_out in (False, True)
    ]
    assert len(set().union(*sides)) == 4 * 500


# --------------------------------------------------------------------------------------- contexts


def test_short_documents_share_a_context_and_none_is_in_two() -> None:
    numbers = torch.tensor([5, 9, 7, 11])
    ids, units = context_ids(numbers, 4, 8)
    first = [BOS, 21, 22, 23, 24, BOS, 37, 38]
    assert ids.tolist() == [first, [BOS, 29, 30, 31, 32, BOS, 45, 46]]
    assert units.tolist() == [0, 1]


def test_long_documents_give_whole_contexts() -> None:
    ids, units = context_ids(torch.tensor([0, 2]), 7, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 15, 16, 17], [0, 18, 19, 20]]
    assert units.tolist() == [0, 0, 1, 1]


# --------------------------------------------------------------------- in a language model's place


def model_of(cfg: WorldConfig) -> SyntheticModel:
    return SyntheticModel(ModelConfig(name="test", world=cfg, device="cpu"), None)


def test_massive_tokens_are_left_out_as_those_of_a_language_model() -> None:
    model = model_of(world(massive=0.5, massive_norm=60.0).cfg)
    data = DatasetConfig(
        name="test",
        source="synthetic",
        context_size=L + 1,
        n_contexts=200,
        n_eval_contexts=20,
    )
    train, held_out = model.contexts(data)
    assert (len(train), len(held_out), held_out.n_documents) == (200, 20, 20)
    source = StreamSource(model, train)
    calibration = calibrate(source, data.norm_filter)
    assert calibration.massive_share == pytest.approx(0.5 / L, rel=0.2)
    batch = ActivationBatches(source, calibration, "cpu").batch(torch.arange(200))
    is_massive = batch.not_special & ~batch.valid
    assert is_massive[:, [1, -1]].sum() == is_massive.sum()
    # Half of 200 documents, as drawn.
    assert is_massive.sum().item() == pytest.approx(100, abs=25)
    assert not batch.valid[:, 0].any()


def test_what_is_shown_of_a_token_is_its_strongest_feature() -> None:
    model = model_of(world(amplitude_noise=0.0).cfg)
    ids_BT = ids_of(20)
    shown_BT, texts = model.shown(ids_BT), model.texts()
    assert shown_BT.max() < model.vocabulary
    assert {texts(int(i)) for i in shown_BT[:, 0]} == {"BOS"}
    codes_BTF = model.world.codes(ids_BT)
    is_quiet = (codes_BTF[:, 1:] == 0).all(-1)
    assert (shown_BT[:, 1:] == 1).equal(is_quiet)
    documents = codes_BTF[..., model.world.members("document")].argmax(-1)
    # Amplitude 2, against 1 and .6 of the others.
    strongest = codes_BTF.max(-1).values == 2
    named = [texts(int(i)) for i in shown_BT[strongest]]
    assert named == [f"document {j} " for j in documents[strongest].tolist()]


def test_another_world_is_another_store() -> None:
    contents = {model_of(world(**c).cfg).content for c in ({}, {"seed": 1}, {"noise": 0.2})}
    assert len(contents) == 3


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"children": {"of": "token", "per_parent": 1, "rate": 0.2}}, "must be a slow class"),
        ({"children": {"of": "none", "per_parent": 1, "rate": 0.2}}, "document, phrase, sentence"),
        ({"topics": 9, "correlation": 0.9}, "lower it, or correlation, or topics"),
        ({"classes": {"child": {"n": 1, "lifetime": 1, "density": 0.1}}}, "cannot be called child"),
        ({"classes": {"a": {"n": 1, "lifetime": 2.0, "density": 0.9}}}, "are on 0.667 of the time"),
        ({"classes": {"a": {"n": 1, "lifetime": 2.0, "density": 0.1, "shape": 3}}}, "at most"),
        ({"classes": {}}, "at least 1 item"),
    ],
)
def test_a_world_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        world(**changes)


def test_bands_must_fit_into_a_context() -> None:
    made = world().cfg
    made.check_contexts(19)
    with pytest.raises(ValueError, match="need contexts of 19 tokens"):
        made.check_contexts(18)
