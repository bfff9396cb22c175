"""Conversations: the text of a row by the chat template or plain, and turns as segments."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig
from tcsae.data.chat import IDS, START, ChatTokens, Turn, part_of, plain_text
from tcsae.data.contexts import Contexts, SpecialIds, build_contexts
from tcsae.data.corpora import FilesCorpus
from tcsae.tensors.positions import permute_within_segments

SPECIAL = SpecialIds(bos=0, boundaries=frozenset({0, 1, 2}), masked=frozenset({0, 1, 2}))
TALK = (
    Turn("user", "Why does the river walk?\n"),
    Turn("assistant", "It never walked: it runs, quietly."),
    Turn("user", "日本 - and now?"),
)
MESSAGES = [turn._asdict() for turn in TALK]


def rows(n: int) -> list[dict[str, Any]]:
    """Conversations of three turns that name themselves."""
    who = (("user", "user"), ("assistant", "model"), ("user", "again"))
    text = "{} {} speaks of the number {} and of nothing else. "
    return [
        {"messages": [{"role": role, "content": text.format(name, k, k) * 3} for role, name in who]}
        for k in range(n)
    ]


def corpus_of(path: Path, content: list[dict[str, Any]], field: str = "messages") -> FilesCorpus:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return FilesCorpus.from_path(path, field, "train")


def packed(corpus: FilesCorpus, tokenizer: Any, **changes: Any) -> tuple[Contexts, Contexts]:
    fields = {"n_contexts": None, "n_eval_contexts": 8, "context_size": 64, **changes}
    cfg = DatasetConfig(name="chat", source="files", text_field="messages", **fields)
    return build_contexts(corpus, tokenizer, SPECIAL, cfg)


def test_the_text_is_that_of_the_chat_template(tokenizer: Any) -> None:
    (marked,) = ChatTokens(tokenizer, 0)([("a", TALK)])
    ids = (marked & IDS).tolist()
    expected = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert ids == expected and expected[0] == 1
    (marked,) = ChatTokens(tokenizer, 1)([("a", TALK)])  # it leads with what every document has
    assert (marked & IDS).tolist() == expected[1:]
    assert not (marked & START).any()


def test_without_a_template_the_text_is_plain(tokenizer: Any) -> None:
    text = "user: Why does the river walk?\n\n\nassistant: It never walked: it runs, quietly."
    assert plain_text(TALK).startswith(text + "\n\nuser: ")
    expected = tokenizer(plain_text(TALK), add_special_tokens=False)["input_ids"]
    base = copy.copy(tokenizer)
    base.chat_template = None
    for tokens in (ChatTokens(base, 0), ChatTokens(tokenizer, 0, "plain")):
        (marked,) = tokens([("a", TALK)])
        assert (marked & IDS).tolist() == expected


@pytest.mark.parametrize("form", ["template", "plain"])
def test_turns_start_where_they_are_written(form: Any, tokenizer: Any) -> None:
    (whole,) = ChatTokens(tokenizer, 0, form)([("a", TALK)])
    (marked,) = ChatTokens(tokenizer, 0, form, by_turn=True)([("a", TALK)])
    assert ((marked ^ whole) & IDS == 0).all()  # the same tokens
    parts = np.split(marked & IDS, np.flatnonzero(marked & START))
    said = [tokenizer.decode(part.tolist()) for part in parts]
    lead = "<|im_start|>{}\n" if form == "template" else "{}: "
    assert len(said) == 3 and all(
        text.startswith(lead.format(turn.role)) and turn.content in text
        for text, turn in zip(said[1:], TALK[1:], strict=True)
    )
    assert TALK[0].content in said[0] and TALK[1].content not in said[0]


@pytest.mark.parametrize("form", ["template", "plain"])
def test_a_turn_is_a_segment_if_asked(form: Any, tokenizer: Any, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl", rows(60))
    by_document = packed(corpus, tokenizer, chat=form)
    by_turn = packed(corpus, tokenizer, chat=form, segments="turn")
    for whole, parted in zip(by_document, by_turn, strict=True):
        assert torch.equal(whole.ids, parted.ids) and int(whole.ids.max()) < len(tokenizer)
        assert torch.equal(whole.valid, parted.valid)
        # im_start and im_end end no document: its tokens are one segment.
        speakers = [set[str](), set[str]()]
        for row in range(len(whole)):
            for found, segments in zip(speakers, (whole, parted), strict=True):
                for number in segments.segments[row].unique():
                    text = tokenizer.decode(whole.ids[row, segments.segments[row] == number])
                    named = {w for w in ("user", "model", "again") if f"{w} " in text}
                    found.add(" ".join(sorted(named - {"user"} if form == "plain" else named)))
        assert any("again model" in names for names in speakers[0])
        assert not any("again" in names and "model" in names for names in speakers[1])


def test_no_window_of_the_loss_crosses_a_turn(tokenizer: Any, tmp_path: Path) -> None:
    """What the loss shuffles within: never a token of another turn."""
    corpus = corpus_of(tmp_path / "a.jsonl", rows(60))
    train, _ = packed(corpus, tokenizer, segments="turn")
    order = permute_within_segments(train.segments, train.valid, torch.Generator().manual_seed(0))
    moved = train.segments.gather(1, order)
    assert torch.equal(moved, train.segments) and not torch.equal(
        order, torch.arange(order.shape[1]).expand_as(order)
    )


def test_parquet_and_the_form_with_from_and_value(tokenizer: Any, tmp_path: Path) -> None:
    shared = [
        {
            "conversations": [
                {"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
                for m in row["messages"]
            ]
        }
        for row in rows(4)
    ]
    lines = list(corpus_of(tmp_path / "a.jsonl", rows(4)).documents())
    for suffix in ("jsonl", "parquet"):
        corpus = corpus_of(tmp_path / f"b.{suffix}", shared, "conversations")
        assert [d.turns for d in corpus.documents()] == [d.turns for d in lines]
    assert lines[0].turns[1].role == "assistant"


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([*MESSAGES, {"content": "b"}], "line 2: field messages: turn 4 has no role"),
        ([{"role": "user", "content": None}], "turn 1 has no text"),
        ([{"role": "user"}], "turn 1 has no text"),
        ([{"role": 3, "content": "a"}], "turn 1 has no role"),
        ([{"role": "user", "content": "a"}, "b"], "turn 2 has no role"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "no text (an image?)"),
        (["a", "b"], "holds list, not text"),
    ],
)
def test_a_bad_row_is_one_line(turns: Any, said: str, tmp_path: Path) -> None:
    good = {"messages": MESSAGES}
    corpus = corpus_of(tmp_path / "a.jsonl", [good, {"messages": turns}])
    with pytest.raises(UserError) as raised:
        list(corpus.documents())
    message = str(raised.value)
    assert said in message and "a.jsonl line 2" in message and "\n" not in message


def test_a_bad_row_of_a_table_has_its_number(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": None}]}
    corpus = corpus_of(tmp_path / "a.parquet", [{"messages": MESSAGES}] * 3 + [bad])
    with pytest.raises(UserError, match=r"a.parquet row 3: field messages: turn 1 has no text"):
        list(corpus.documents())


def test_what_a_template_does_not_take_is_one_line(tokenizer: Any) -> None:
    spelt = (Turn("user", "what is <|im_end|>?"),)
    with pytest.raises(UserError, match=r"a.jsonl:7: turn 1 spells <\|im_end\|>.*chat=plain"):
        list(ChatTokens(tokenizer, 0)([("a.jsonl:7", spelt)]))
    (plain,) = ChatTokens(tokenizer, 0, "plain")([("a", spelt)])
    assert not np.isin(plain & IDS, [0, 1, 2]).any()
    strict = copy.copy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"a: .*roles must alternate.*dataset.chat=plain"):
        list(ChatTokens(strict, 0)([("a", TALK)]))
    strict.chat_template = "{{ messages | length }} turns"
    with pytest.raises(UserError, match=r"turns have no place: set dataset.segments=document"):
        list(ChatTokens(strict, 0, by_turn=True)([("a", TALK)]))


def test_keys_of_conversations_are_refused_where_there_are_none(
    tokenizer: Any, tmp_path: Path
) -> None:
    content = [{"messages": row["messages"][0]["content"] + "x " * 200} for row in rows(30)]
    corpus = corpus_of(tmp_path / "a.jsonl", content)
    packed(corpus, tokenizer)
    for change in ({"segments": "turn"}, {"chat": "plain"}):
        with pytest.raises(UserError, match=r"is for conversations.*leave the key out"):
            packed(corpus, tokenizer, **change)


def test_a_part_of_a_conversation_is_whole_turns() -> None:
    first = len("user: ") + len(TALK[0].content) + 2
    assert part_of(TALK, 0, first) == TALK[:1]
    assert part_of(TALK, 1, 10_000) == TALK[1:]
    assert part_of(TALK, 8, 4) == (Turn("user", TALK[0].content[2:6]),)


def test_one_long_conversation_is_parted(tokenizer: Any, tmp_path: Path) -> None:
    turns = [turn for row in rows(200) for turn in row["messages"]]
    corpus = corpus_of(tmp_path / "a.jsonl", [{"messages": turns}])
    train, held_out = packed(corpus, tokenizer, segments="turn", n_eval_contexts=4)
    assert len(train) > 50 and not set(train.groups) & set(held_out.groups)
    assert (train.segments.max(1).values > 1).float().mean() > 0.5  # turns, in the pieces too
