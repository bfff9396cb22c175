"""Labels of held-out tokens: where sources have them, and whether each lies on its own token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_tokenizer

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig
from tcsae.data.contexts import Contexts, SpecialIds, build_contexts
from tcsae.data.corpora import open_corpus
from tcsae.data.labelled import check_labels, labelled_documents, speeches
from tcsae.meaning.token_labels import Label, TokenLabels, token_labels

WORDS = [
    "the",
    "dog",
    "cat",
    "house",
    "tree",
    "river",
    "stone",
    "bird",
    "walks",
    "runs",
    "sleeps",
    "sings",
]
VERBS = WORDS[8:]
PLACES = ("north", "south")
SCENE = """Hamlet
ACT I

Enter HAMLET and the Ghost

HAMLET
Speak, I am bound,
good Ghost, to hear.

GHOST
So art thou, hamlet.
"""


def row(number: int, n_words: int) -> dict[str, object]:
    generator = np.random.default_rng(number)
    text, tags = "", []
    for word in generator.choice(WORDS, n_words).tolist():
        tags.append([len(text), len(text) + len(word), "V" if word in VERBS else "N"])
        text += word + " "
    place = {"name": PLACES[number % 2]}
    return {"text": text, "where": place, "number": number % 3, "tags": tags}


def dataset(folder: Path, rows: list[dict[str, object]], **keys: object) -> DatasetConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return DatasetConfig.model_validate(
        {
            **{"name": "files", "source": "files", "path": str(file), "context_size": 32},
            **{"n_contexts": 20, "n_eval_contexts": 40, "eval_fraction": 0.4, **keys},
        }
    )


def held_out(cfg: DatasetConfig) -> Contexts:
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0
    special = SpecialIds(bos, frozenset({bos}), frozenset({bos}))
    return build_contexts(open_corpus(cfg), tokenizer, special, cfg)[1]


def by_name(labels: TokenLabels) -> dict[str, Label]:
    return {label.name: label for label in labels.labels}


@pytest.mark.parametrize("n_words", [150, 12])
def test_every_label_of_a_row_lies_on_its_own_tokens(tmp_path: Path, n_words: int) -> None:
    """Long rows fill contexts, short ones share them."""
    rows = [row(number, n_words) for number in range(300)]
    cfg = dataset(tmp_path, rows)
    contexts, tokenizer = held_out(cfg), tiny_tokenizer()
    found = token_labels(contexts, cfg, tokenizer, ["where.name", "number", "tags"])
    assert found.said is None
    labels = by_name(found)
    assert {n: label.kind for n, label in labels.items()} == {
        "where.name": "document",
        "number": "document",
        "tags": "word",
    }
    assert set(labels["where.name"].classes) == set(PLACES)
    inside = found.document >= 0
    assert (labels["number"].value[inside] >= 0).mean() > 0.8
    seen = 0
    for ids, value in zip(contexts.ids.numpy(), labels["tags"].value, strict=True):
        for place in np.flatnonzero(value >= 0):
            # The token that ends a word; what stands before it is the word's start, if any.
            word = tokenizer.decode(ids[1 : place + 1]).split()[-1]
            known = [w for w in WORDS if w.endswith(word)]
            assert known, word
            assert {labels["tags"].classes[value[place]]} >= {
                "V" if w in VERBS else "N" for w in known[:1]
            }
            seen += 1
    assert seen > 200


def test_segments_that_share_a_context_are_documents_of_their_own(tmp_path: Path) -> None:
    cfg = dataset(tmp_path, [row(number, 12) for number in range(300)])
    contexts = held_out(cfg)
    found = token_labels(contexts, cfg, tiny_tokenizer(), ["number"])
    for segments, documents in zip(contexts.segments.numpy(), found.document, strict=True):
        there = documents >= 0
        pairs = set(zip(segments[there].tolist(), documents[there].tolist(), strict=True))
        assert len(pairs) == len({s for s, _ in pairs}) == len({d for _, d in pairs})


def test_labels_come_from_a_table_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('text,kind,tags\nthe dog,a,"[[0, 3, ""N""]]"\nthe cat,,\n')
    cfg = DatasetConfig(name="files", source="files", path=str(file))
    everything = type("All", (), {"__contains__": lambda self, _: True})()
    first, *others = labelled_documents(cfg, ["kind", "tags"], everything)
    assert (first.labels, first.words) == ({"kind": "a"}, {"tags": [(0, 3, "N")]})
    assert others == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["topic"], "has no label in topic"),
        (["tags.x"], "has no label in tags.x"),
        ([], "the text has no labels: give rows with fields of labels"),
    ],
)
def test_a_text_without_labels_says_what_to_give(
    tmp_path: Path, fields: list[str], said: str
) -> None:
    cfg = dataset(tmp_path, [row(number, 150) for number in range(60)])
    found = token_labels(held_out(cfg), cfg, tiny_tokenizer(), fields)
    assert found.labels == [] and found.said is not None
    assert said in found.said or "no held-out document" in found.said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 2], "not of [start, end, tag]"),
        ([[0, 3, 4]], "not of [start, end, tag]"),
        ([[5, 2, "N"]], "not of [start, end, tag]"),
        ({"a": 1}, "holds dict, no label"),
    ],
)
def test_a_field_that_holds_no_label_is_one_clear_line(
    tmp_path: Path, value: object, said: str
) -> None:
    cfg = dataset(tmp_path, [{"text": "the dog", "bad": value}])
    with pytest.raises(UserError, match="line 1: field bad") as raised:
        list(labelled_documents(cfg, ["bad"], frozenset({"x"})))
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_field_that_no_row_has_is_refused_before_anything_is_loaded(
    tmp_path: Path, kind: str
) -> None:
    frame = pd.DataFrame([{"text": f"the dog {n}", "kind": "a", "empty": None} for n in range(5)])
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_csv(file, index=False) if kind == "csv" else frame.to_parquet(file)
    cfg = DatasetConfig(name="files", source="files", path=str(file))
    check_labels(cfg, ["kind"])
    for field in ("topic", "empty"):
        with pytest.raises(UserError) as raised:
            check_labels(cfg, ["kind", field])
        said = str(raised.value)
        assert "evaluation.label_fields" in said and field in said and "\n" not in said
        # Of a column that is there and empty, parquet reads no other.
        assert "kind" in said or (kind, field) == ("parquet", "empty")


def test_a_label_that_only_later_rows_have_is_found(tmp_path: Path) -> None:
    rows = [{"text": "the dog"}, {"text": "a cat", "kind": "b"}]
    check_labels(dataset(tmp_path, rows), ["kind"])


def test_plain_text_has_no_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the dog")
    cfg = DatasetConfig(name="files", source="files", path=str(tmp_path))
    with pytest.raises(UserError, match=r"evaluation.label_fields=x: .* is plain text"):
        list(labelled_documents(cfg, ["x"], frozenset({"x"})))
    with pytest.raises(UserError, match=r"evaluation.label_fields=x: .* is plain text"):
        check_labels(cfg, ["x"])


def test_who_speaks_in_a_scene_and_what_must_not_count() -> None:
    spans, hidden = speeches(SCENE, frozenset({"HAMLET", "GHOST"}))
    said = [(SCENE[start:end], name) for start, end, name in spans]
    assert said == [
        ("Speak, I am bound,\ngood Ghost, to hear.", "HAMLET"),
        ("So art thou, hamlet.", "GHOST"),
    ]
    left_out = [SCENE[start:end] for start, end in hidden]
    # Names in lower case are words; "I" is too short to be one.
    assert left_out == ["Hamlet\nACT I", "Hamlet", "ACT", "HAMLET", "Ghost", "HAMLET"] + [
        "Ghost",
        "GHOST",
    ]
