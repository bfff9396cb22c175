"""The share of held-out contexts that was trained on, against texts whose share is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.data import seen
from tcsae.data.contexts import Contexts
from tcsae.data.seen import share_seen

T = 64


def contexts(rows: np.ndarray) -> Contexts:
    ids = torch.from_numpy(rows.astype(np.int32))
    ids[:, 0] = 0
    return Contexts(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool), ())


def text(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(1, 50_000, size=(n, T))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(0, 10_000), st.integers(1, 9))
def test_copies_are_counted_wherever_they_are_cut(n: int, seed: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    held_out = text(rng, 20)
    # The copied text stands in training contexts that are cut elsewhere.
    stream = np.concatenate([text(rng, 3)[:, :-1].ravel(), held_out[:n, 1:].ravel()])
    shift = rng.integers(1, 10)
    length = (len(stream) - shift) // (T - 1) * (T - 1)
    cut = stream[shift : shift + length].reshape(-1, T - 1)
    rows = np.concatenate([np.zeros((len(cut), 1)), cut], axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "_CHUNK", chunk)
        share = share_seen(contexts(rows), contexts(held_out))
    # The last one may have been cut off.
    assert max(n - 1, 0) / 20 <= share <= n / 20


def test_a_context_half_of_which_was_seen_counts_and_less_does_not() -> None:
    rng = np.random.default_rng(0)
    held_out, train = text(rng, 2), text(rng, 1)
    for row, n in enumerate((32, 31)):  # of 63 tokens
        copy = train.copy()
        copy[0, 1 : 1 + n] = held_out[row, 1 : 1 + n]
        share = share_seen(contexts(copy), contexts(held_out[row : row + 1]))
        assert share == (1.0 if n >= T / 2 else 0.0)


def test_phrases_in_common_do_not_count() -> None:
    """Fifteen tokens in a row, over and over, but never sixteen."""
    rng = np.random.default_rng(1)
    held_out, train = text(rng, 4), text(rng, 4)
    for start in range(1, T - 15, 16):
        train[:, start : start + 15] = held_out[:, start : start + 15]
    assert share_seen(contexts(train), contexts(held_out)) == 0.0


def test_ids_that_differ_in_one_place_are_not_the_same() -> None:
    """Also where ids are 0 or even: the numbers of runs must not lose their high places."""
    held_out = np.full((1, T), 2)
    train = held_out.copy()
    train[0, 8::8] = 4  # no 16 in a row are equal
    assert share_seen(contexts(train), contexts(held_out)) == 0.0
    assert share_seen(contexts(held_out), contexts(held_out)) == 1.0


@pytest.mark.parametrize("size", [3, 8, 16, 33])
def test_a_copy_is_found_in_short_contexts_wherever_it_is_cut(size: int) -> None:
    rng = np.random.default_rng(size)
    stream = rng.integers(1, 50_000, size=40 * (size - 1))
    held_out = np.insert(stream.reshape(-1, size - 1), 0, 0, axis=1)[1:-1]
    for shift in range(1, size - 1):
        cut = stream[shift : shift - (size - 1)].reshape(-1, size - 1)
        assert share_seen(contexts(np.insert(cut, 0, 0, axis=1)), contexts(held_out)) == 1.0
