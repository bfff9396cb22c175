"""The choice of held-out contexts: as many documents as can be, no text twice, no seed in it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.base.errors import UserError
from tcsae.base.signals import StopRequest
from tcsae.config import DatasetConfig
from tcsae.data import held_out as module
from tcsae.data.batches import ActivationBatches, Calibration
from tcsae.data.context_cache import MIN_DOCUMENTS, load_or_build_contexts
from tcsae.data.contexts import Contexts, SpecialIds, build_contexts
from tcsae.data.corpora import HubCorpus
from tcsae.data.documents import Document, text_hash
from tcsae.data.held_out import PASSAGE_TOKENS, HeldOut, pieces_of
from tcsae.data.language_model import LanguageModel
from tcsae.data.store import ActivationStore
from tcsae.metrics.units import MIN_UNITS, Units

BOS, T = 0, 9
SPECIAL = SpecialIds(bos=BOS, boundaries=frozenset({BOS}), masked=frozenset({BOS}))
LIMIT = 2**63  # eval_fraction .5


def numbers(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    """A tokenizer: a token a number, a fragment of one at a cut included."""
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


@dataclass(frozen=True)
class Texts:
    """A corpus in memory."""

    texts: tuple[Document, ...]
    finite: bool = True

    def documents(self) -> Iterator[Document]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        return "texts"

    def describe(self) -> str:
        return f"{len(self.texts)} texts"


def named(held_out: bool, start: int = 0) -> Iterator[str]:
    """Names of documents on one side of the split."""
    number = start
    while True:
        if (text_hash(f"d{number}") < LIMIT) == held_out:
            yield f"d{number}"
        number += 1


def corpus_of(lengths: list[int], finite: bool = True) -> tuple[Texts, dict[str, list[int]]]:
    """Held-out documents of these lengths, no token in two, and one document to train on."""
    tokens, first, names = {}, 1, named(held_out=True)
    for length in lengths:
        tokens[next(names)] = list(range(first, first + length))
        first += length
    train = next(named(held_out=False))
    texts = {**tokens, train: [999_999] * 40}
    corpus = Texts(
        tuple(Document(d, " ".join(map(str, ids)), d) for d, ids in texts.items()), finite
    )
    return corpus, tokens


def config(n: int, **changes: Any) -> DatasetConfig:
    fields: dict[str, Any] = {"n_contexts": 1, "eval_fraction": 0.5, "context_size": T}
    return DatasetConfig(name="t", source="files", n_eval_contexts=n, **{**fields, **changes})


def held_out(corpus: Any, n: int, **changes: Any) -> Contexts:
    return build_contexts(corpus, numbers, SPECIAL, config(n, **changes))[1]


def most(lengths: list[int]) -> int:
    """Contexts that are surely there: those of documents that fill one."""
    return sum(length // (T - 1) for length in lengths)


lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=30).filter(most)


def check(contexts: Contexts, tokens: dict[str, list[int]]) -> None:
    """What holds for any choice: whole pieces, no token twice, units as they are named."""
    owner = {token: name for name, ids in tokens.items() for token in ids}
    rows = contexts.ids[:, 1:].tolist()
    text = [token for row in rows for token in row if token != BOS]
    assert len(text) == len(set(text)) and (contexts.ids[:, 0] == BOS).all()
    unit_of: dict[str, int] = {}
    for row, unit in zip(rows, contexts.documents.tolist(), strict=True):
        names = list(dict.fromkeys(owner[token] for token in row if token != BOS))
        assert all(unit_of.setdefault(name, unit) == unit for name in names), "in two units"
        if any(len(tokens[name]) >= T - 1 for name in names):
            start = tokens[names[0]].index(row[0])
            assert row == tokens[names[0]][start : start + T - 1], "one long document alone"
        else:
            parts = " ".join(map(str, row)).split(f" {BOS} ")
            for name, part in zip(names, parts, strict=False):
                ids = [int(token) for token in part.split() if int(token) != BOS]
                assert ids == tokens[name][: len(ids)], "from its first token"
    assert contexts.documents.tolist() == Units(contexts.documents).document.tolist()


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.data(), st.integers(0, 3), st.booleans())
def test_documents_are_as_many_as_can_be_and_share_nothing(
    lengths: list[int], data: st.DataObject, key: int, finite: bool
) -> None:
    corpus, tokens = corpus_of(lengths, finite)
    n = data.draw(st.integers(1, most(lengths)))
    contexts = held_out(corpus, n, eval_key=key)
    check(contexts, tokens)
    assert len(contexts) == n
    long = [length for length in lengths if length >= T - 1]
    assert contexts.n_documents >= min(n, len(long))
    # A document has a second context only where every document has its first.
    per_unit = torch.bincount(contexts.documents)
    if per_unit.max() > 1:
        assert contexts.n_documents >= len(long)
    everything = held_out(corpus, most(lengths), eval_key=key)
    assert contexts.n_documents == min(n, everything.n_documents)
    # The smallest m for which the total reaches n: nobody has one more while another could.
    room = {name: max(len(ids) // (T - 1), 1) for name, ids in tokens.items()}
    owner = {token: name for name, ids in tokens.items() for token in ids}
    for row, unit in zip(contexts.ids.tolist(), contexts.documents.tolist(), strict=True):
        if per_unit[unit] < per_unit.max() - 1:
            assert per_unit[unit] == room[owner[row[1]]]


@settings(max_examples=40, deadline=None)
@given(lengths_of, st.data())
def test_fewer_contexts_are_the_first_of_more(lengths: list[int], data: st.DataObject) -> None:
    corpus, _ = corpus_of(lengths)
    n = data.draw(st.integers(1, most(lengths)))
    more, fewer = held_out(corpus, most(lengths)), held_out(corpus, n)
    assert torch.equal(fewer.ids, more.ids[:n])
    assert torch.equal(fewer.documents, more.documents[:n])


def test_the_choice_hangs_on_the_key_and_on_no_seed() -> None:
    corpus, _ = corpus_of([40] * 30)
    base = held_out(corpus, 20)
    for seed, n_contexts in ((1, 1), (2, 3), (3, None)):
        assert torch.equal(held_out(corpus, 20, seed=seed, n_contexts=n_contexts).ids, base.ids)
    assert torch.equal(held_out(Texts(corpus.texts[::-1]), 20).ids, base.ids)
    other = held_out(corpus, 20, eval_key=1)
    owners = [{int(token) // 40 for token in c.ids[:, 1]} for c in (base, other)]
    assert owners[0] != owners[1], "other documents"
    twice = held_out(corpus, 30, eval_key=1).ids, held_out(corpus, 30).ids
    shared = set(twice[0].flatten().tolist()) & set(twice[1].flatten().tolist())
    assert len(shared) < 200, "and other places in them"


def test_the_first_contexts_are_from_all_over_their_documents() -> None:
    """Mean place of one context in each of 400 documents: .5, with an error of .29 / 20."""
    lengths = [800] * 400
    corpus, _ = corpus_of(lengths)
    place = ((held_out(corpus, 400).ids[:, 1].long() - 1) % 800).double() / (800 - T + 1)
    assert place.mean() == pytest.approx(0.5, abs=4 * 0.29 / 20)
    assert place.min() < 0.03 and place.max() > 0.97


@given(st.integers(1, 40), st.integers(0, 8), st.integers(0, 2**64 - 1))
def test_pieces_are_each_there_once_and_the_first_lie_apart(n: int, rest: int, drawn: int) -> None:
    length = 9
    ids = np.arange(n * length + rest)
    starts = [int(piece[0]) for piece in pieces_of(ids, length, drawn)]
    offset = min(starts)
    assert sorted(starts) == [offset + k * length for k in range(n)] and 0 <= offset <= rest
    if n >= 8:
        apart = abs(starts[1] - starts[0]) // length
        assert min(apart, n - apart) >= n // 5


def test_short_documents_are_packed_and_cut_and_not_continued() -> None:
    corpus, tokens = corpus_of([5] * 24)
    contexts = held_out(corpus, 12)
    check(contexts, tokens)
    # Five tokens, BOS, and two of the next: two documents a context, which are one unit.
    assert contexts.n_documents == 12 and (contexts.segments.max(1).values == 2).all()
    with pytest.raises(UserError, match="gives 12 evaluation contexts of 9 tokens, 13 asked"):
        held_out(corpus, 13)
    with pytest.raises(UserError, match=r"too small: 7 tokens of evaluation text"):
        held_out(corpus_of([3, 3])[0], 1)


def test_a_separator_without_room_behind_it_ends_the_context() -> None:
    corpus, tokens = corpus_of([7] * 8)
    contexts = held_out(corpus, 7)  # the last document has no BOS behind it: a tail
    check(contexts, tokens)
    assert (contexts.ids[:, -1] == BOS).all() and contexts.n_documents == 7


def test_one_document_gives_all_of_them() -> None:
    corpus, tokens = corpus_of([83])
    contexts = held_out(corpus, 10)
    check(contexts, tokens)
    assert contexts.documents.tolist() == [0] * 10
    with pytest.raises(UserError, match=r"set dataset.n_eval_contexts=10, raise"):
        held_out(corpus, 11)


@pytest.mark.parametrize("finite", [True, False])
def test_a_long_document_is_kept_in_part_until_all_of_it_is_needed(
    finite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counting(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        seen.extend(map(len, texts))
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    monkeypatch.setattr(module, "KEPT_CONTEXTS", 2)
    name, train = next(named(held_out=True)), next(named(held_out=False))
    text = "".join(chr(i) for i in range(300, 4300))
    corpus = Texts((Document(name, text, name), Document(train, "a" * 99, train)), finite)
    for n in (3, 400):
        seen.clear()
        contexts = build_contexts(corpus, counting, SPECIAL, config(n))[1]
        assert len(contexts) == n and len(contexts.ids[:, 1:].unique()) == n * (T - 1)
        assert (max(seen) == 2 * T * 8) == (n == 3)


def test_documents_are_taken_from_a_heap_until_there_are_enough() -> None:
    """Far more text than is kept: as many documents as contexts, and of the order's first."""
    corpus, tokens = corpus_of([5, 30] * 400)
    few = held_out(corpus, 16)
    check(few, tokens)
    assert few.n_documents == 16
    assert torch.equal(few.ids, held_out(corpus, 300).ids[:16])


# ------------------------------------------------------------------------------------- streams


class FakeStream:
    def __init__(self, rows: list[str]) -> None:
        self.rows = rows

    def shuffle(self, seed: int, buffer_size: int) -> Iterator[dict[str, str]]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))
        return iter([{"text": self.rows[i]} for i in order])


def test_a_stream_holds_out_the_same_for_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [" ".join(str(1 + 30 * i + k) for k in range(30)) for i in range(400)]
    rows += rows[:200]  # copies are no second document
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: FakeStream(rows))

    def both(seed: int, n: int = 60, key: int = 0) -> tuple[Contexts, Contexts]:
        corpus = HubCorpus("a/b", None, "train", None, "text", seed)
        cfg = config(n, seed=seed, n_contexts=20, eval_key=key)
        return build_contexts(corpus, numbers, SPECIAL, cfg)

    (train_0, held_0), (train_1, held_1) = both(0), both(1)
    assert torch.equal(held_0.ids, held_1.ids) and not torch.equal(train_0.ids, train_1.ids)
    assert not torch.equal(both(0, key=1)[1].ids, held_0.ids)
    assert held_0.n_documents == 60
    assert len(((held_0.ids[:, 1] - 1) // 30).unique()) == 60, "a row each"
    assert torch.equal(both(0, n=30)[1].ids, held_0.ids[:30])
    # The training side is what comes first in the stream's own order.
    mine = [row["text"] for row in FakeStream(rows).shuffle(1, 0)]
    names = {text: hashlib.sha256(text.encode()).hexdigest()[:32] for text in mine}
    first = next(text for text in mine if text_hash(names[text]) >= LIMIT)
    assert train_1.ids[0, 1:].tolist() == [int(word) for word in first.split()[: T - 1]]


def test_a_stream_with_few_documents_takes_more_of_each() -> None:
    corpus, tokens = corpus_of([60] * 5, finite=False)
    contexts = held_out(corpus, 20)
    check(contexts, tokens)
    assert torch.bincount(contexts.documents).tolist() == [4] * 5


# --------------------------------------------------------------------------- cache and warning


def write_rows(path: Path, n: int, words: int = 40) -> Path:
    rows = [json.dumps({"text": f"one two three {number} " * words}) for number in range(n)]
    path.write_text("\n".join(rows))
    return path


def test_the_number_of_documents_is_said_and_is_that_of_the_intervals(
    tiny_gpt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert MIN_DOCUMENTS == MIN_UNITS
    caplog.set_level(logging.INFO)
    for rows, few in ((20, True), (200, False)):
        text = write_rows(tmp_path / f"{rows}.jsonl", rows)
        cfg = small_config(tiny_gpt2, text, dataset__n_eval_contexts="24", layer="1")
        model = LanguageModel(cfg.model, cfg.layer)
        built = []
        for _ in ("packed", "from the cache"):
            caplog.clear()
            built.append(load_or_build_contexts(cfg.dataset, model, tmp_path, StopRequest()))
            said = [r for r in caplog.records if "held-out contexts from" in r.getMessage()]
            (record,) = said
            n = built[-1][1].n_documents
            assert f"24 held-out contexts from {n} documents" in record.getMessage()
            assert (n < MIN_DOCUMENTS) == few
            assert record.levelno == (logging.WARNING if few else logging.INFO)
            assert ("dataset.eval_fraction" in record.getMessage()) == few
        for one, other in zip(*built, strict=True):
            for name in ("ids", "segments", "valid", "documents"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            assert one.documents.dtype == torch.int64 and one.groups == other.groups


def test_the_key_names_the_contexts_and_seeds_share_held_out_activations(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    text = write_rows(tmp_path / "rows.jsonl", 60)
    cfg = small_config(tiny_gpt2, text, layer="1")
    model = LanguageModel(cfg.model, cfg.layer)

    def folders(**changes: int) -> list[str]:
        dataset = cfg.dataset.model_copy(update=changes)
        parts = load_or_build_contexts(dataset, model, tmp_path, StopRequest())
        return [ActivationStore(tmp_path, model, part, 8).folder.name for part in parts]

    base, seed, key = folders(), folders(seed=1), folders(eval_key=1)
    assert base[1] == seed[1] and base[0] != seed[0]
    assert base[0] == key[0] and base[1] != key[1]
    assert len(list(tmp_path.glob("contexts/*"))) == 3


def test_contexts_without_documents_are_each_their_own() -> None:
    ids = torch.zeros(3, 4, dtype=torch.int32)
    assert Contexts(ids, ids.short(), ids.bool(), ()).documents.tolist() == [0, 1, 2]


def test_batches_of_chosen_contexts_come_in_their_order() -> None:
    class Source:
        is_read = True
        contexts = Contexts(
            torch.arange(24, dtype=torch.int32).view(6, 4),
            torch.ones(6, 4, dtype=torch.int16),
            torch.ones(6, 4, dtype=torch.bool),
            (),
        )

        def activations(self, indices: torch.Tensor) -> torch.Tensor:
            return indices[:, None, None].expand(-1, 4, 2).float()

    batches = ActivationBatches(Source(), Calibration(1, 9, 0, torch.zeros(0, 2)), "cpu")
    chosen = torch.tensor([5, 0, 3])
    found = list(batches.in_order(2, chosen))
    assert [b.ids[:, 0].tolist() for b in found] == [[20, 0], [12]]
    assert [b.ids[:, 0].tolist() for b in batches.in_order(2, indices=chosen)] == [[20, 0], [12]]
    assert sum(len(b.ids) for b in batches.in_order(4)) == 6
    assert list(batches.in_order(2, torch.tensor([], dtype=torch.long))) == []


def test_the_passage_is_one_document_as_it_stands() -> None:
    side = HeldOut(asked=40, size=8, tokenizer=None, bos=0, key=0)
    short, long_, longer = (Document(f"{n}", "", f"{n}") for n in range(3))
    first = np.arange(100, 140, dtype=np.int32)
    side.take(short, np.arange(1, 5, dtype=np.int32))
    assert side.passage().tolist() == [[0, 1, 2, 3, 4]]  # shorter than a context
    side.take(long_, first)
    found = side.passage()
    assert found.shape == (5, 8) and (found[:, 0] == 0).all()
    assert found[:, 1:].flatten().tolist() == list(range(100, 135))
    # A longer one takes its place, until it is long enough.
    n = 7 * (PASSAGE_TOKENS // 8)
    side.take(longer, np.arange(200, 200 + 2 * n, dtype=np.int32))
    assert side.passage()[:, 1:].flatten().tolist() == list(range(200, 200 + n))
    side.take(long_, np.arange(9000, 9000 + 3 * n, dtype=np.int32))
    assert side.passage()[0, 1] == 200
    side.clear()
    assert side.passage().shape == (0, 1)
