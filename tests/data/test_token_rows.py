"""Rows of token ids (input_ids): the same contexts as of the text that they spell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig
from tcsae.data.contexts import SpecialIds, build_contexts
from tcsae.data.corpora import FilesCorpus
from tcsae.data.documents import Document

BOS, PAD = 0, 1
SPECIAL = SpecialIds(bos=BOS, boundaries=frozenset({BOS}), masked=frozenset({BOS, PAD}))
CONFIG = DatasetConfig(
    name="rows", source="files", n_contexts=None, n_eval_contexts=8, context_size=16
)
ROWS = [[100 + n, 200, *range(300 + n, 340 + n)] for n in range(60)]


class Numbers:
    """A tokenizer of text in which every word is its own number."""

    pad_token_id = PAD

    def __len__(self) -> int:
        return 500

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def written(path: Path, rows: list[Any]) -> FilesCorpus:
    table = [{"input_ids": row} for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return FilesCorpus.from_path(path, "input_ids", "train")


class AsText:
    """The same documents, as the text of their numbers."""

    finite = True

    def __init__(self, of: FilesCorpus) -> None:
        self.of = of

    def documents(self) -> Any:
        for document in self.of.documents():
            assert document.ids is not None
            inner = [id_ for id_ in document.ids.tolist() if id_ not in (BOS, PAD)]
            yield Document(document.id, " ".join(map(str, inner)), document.group)

    def fingerprint(self) -> str:
        return "text"

    def describe(self) -> str:
        return "text"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(("before", "after"), [([], []), ([BOS], []), ([PAD, BOS], [PAD, PAD])])
def test_rows_of_tokens_give_the_contexts_of_their_text(
    name: str,
    before: list[int],
    after: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [before + row + after for row in ROWS]
    tokens = written(tmp_path / name, rows)
    got = build_contexts(tokens, Numbers(), SPECIAL, CONFIG)
    assert "tokens are taken as they are" in caplog.text
    wanted = build_contexts(AsText(tokens), Numbers(), SPECIAL, CONFIG)
    for ours, theirs in zip(got, wanted, strict=True):
        assert len(ours) and ours.ids.tolist() == theirs.ids.tolist()
        assert ours.documents.tolist() == theirs.documents.tolist()


def test_copies_of_a_row_are_on_one_side(tmp_path: Path) -> None:
    corpus = written(tmp_path / "a.jsonl", [ROWS[0], ROWS[0], ROWS[1]])
    groups = [document.group for document in corpus.documents()]
    assert groups[0] == groups[1] != groups[2]


def test_one_long_row_is_parted(tmp_path: Path) -> None:
    row = [100 + n % 400 for n in range(40_000)]
    train, held_out = build_contexts(
        written(tmp_path / "a.jsonl", [row]), Numbers(), SPECIAL, CONFIG
    )
    assert len(train) > 100 and held_out.n_documents > 2


def test_a_document_of_tokens_is_cut_by_its_characters() -> None:
    document = Document("a", "", "a", np.arange(100, dtype=np.int32))
    part = document.part(40, 80)
    assert part == replace(document, ids=part.ids) and part.ids is not None
    assert part.ids.tolist() == list(range(10, 30)) and document.n_chars == 400


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([3, -1], "input_ids holds -1, which is no token"),
        ([3, 2**40], "more than 31 bits"),
        ([3, 7.5], "holds list, not text"),
        ([True, False], "holds list, not text"),
        ([[3], [4]], "holds list, not text"),
        ([3, 500], "token 500 is beyond the 500 of the model's tokenizer"),
    ],
)
def test_what_is_no_token_is_one_line(row: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        build_contexts(written(tmp_path / "a.jsonl", [*ROWS, row]), Numbers(), SPECIAL, CONFIG)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_number_too_long_for_python_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "1" * 5000 + "}\n")
    with pytest.raises(UserError, match="line 1 is not JSON .a number too long to be read."):
        list(FilesCorpus.from_path(path, "text", "train").documents())
