"""Every form in which people have text, packed ones too, and what is said of broken ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tcsae.base.errors import UserError
from tcsae.data.corpora import FilesCorpus

TEXTS = ["one, with a comma", "zwei\nLinien", "trois \U0001f600"]


def texts_of(path: Path, field: str = "text") -> list[str]:
    return [d.text for d in FilesCorpus.from_path(path, field, "train").documents()]


def table(separator: str) -> bytes:
    rows = "".join(f'{n}{separator}"{text}"\r\n' for n, text in enumerate(TEXTS))
    return f"\ufeffn{separator}text\r\n{rows}".encode()


ROWS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FORMS = {
    "a.ndjson": ROWS,
    "a.jsonl": ROWS,
    "a.json": json.dumps(TEXTS).encode(),
    "b.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "c.json": json.dumps({"version": 1, "data": [{"text": text} for text in TEXTS]}).encode(),
    "a.csv": table(","),
    "a.tsv": table("\t"),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts(name: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / (name + packed)
    path.write_bytes(PACKED[packed](FORMS[name]))
    assert texts_of(path) == TEXTS
    assert texts_of(tmp_path) == TEXTS


def test_a_packed_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a story\r\nof two lines"))
    assert texts_of(tmp_path) == ["a story\nof two lines"]


def test_zstd_is_read_or_says_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    try:
        import zstandard
    except ImportError:
        path.write_bytes(b"\x28\xb5\x2f\xfd")
        with pytest.raises(UserError, match="pip install zstandard"):
            texts_of(path)
    else:
        path.write_bytes(zstandard.compress(ROWS))
        assert texts_of(path) == TEXTS


def test_a_nested_field_and_a_conversation(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
    ]
    row = {"meta": {"body": "inside"}, "messages": talk, "a.b": "as it is"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    pq.write_table(pa.table({"meta": [{"body": "inside"}]}), tmp_path / "b.parquet")
    assert texts_of(tmp_path / "a.jsonl", "meta.body") == ["inside"]
    assert texts_of(tmp_path / "b.parquet", "meta.body") == ["inside"]
    assert texts_of(tmp_path / "a.jsonl", "a.b") == ["as it is"]
    assert texts_of(tmp_path / "a.jsonl", "messages") == ["user: Why?\n\nassistant: Because."]
    with pytest.raises(UserError, match=r"no field meta.no: set dataset.text_field to one of meta"):
        texts_of(tmp_path / "a.jsonl", "meta.no")


def test_a_settings_file_beside_texts_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a story")
    (tmp_path / "settings.json").write_text('{"seed": 1}')
    (tmp_path / "scores.csv").write_text("a,b\n1,2\n")
    assert texts_of(tmp_path) == ["a story"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "scores.csv").write_text("text\nin a table\n")
    assert texts_of(tmp_path) == ["in a table"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.gz", gzip.compress(ROWS, mtime=0)[:-12], "is not a whole gz file"),
        ("a.txt.gz", b"no gzip at all", "is not a whole gz file"),
        ("a.csv.xz", lzma.compress(table(","))[:-9], "is not a whole xz file"),
        ("a.json.bz2", b"BZh9 and no more", "is not a whole bz2 file"),
        ("a.csv", b"n,body\n1,x\n", "no field text: set dataset.text_field to one of n, body"),
        ("a.csv", "text\nna\u00efve\n".encode("latin-1"), "is not a whole csv file"),
        ("a.json", b"[1, 2", "is not JSON"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.json", b'"one text"', "is no list of texts or of objects"),
        ("a.json", b"[3]", "entry 0 has no field text"),
        ("a.ndjson", b'{"text": ["a", "b"]}\n', "holds list, not text"),
    ],
)
def test_what_is_broken_is_one_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        texts_of(tmp_path / name)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)


def test_documents_of_one_file_come_apart_at_known_separators(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "a.txt").write_text("one <s>x</s> HTML\n</s>\ntwo\n  </s>  \nthree\n</s>")
    (tmp_path / "b.txt").write_text("four<|endoftext|>five\n<|endoftext|>\n")
    documents = list(FilesCorpus.from_path(tmp_path, "text", "train").documents())
    assert [d.text for d in documents] == ["one <s>x</s> HTML", "two", "three", "four", "five"]
    assert [d.id for d in documents][:2] == ["a.txt#0", "a.txt#1"]
    assert "documents end at a separator (4 in its first MB)" in caplog.text
    assert "blank" not in caplog.text


def test_a_separator_of_ones_own_and_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n=====\ntwo<|endoftext|>three")
    corpus = FilesCorpus.from_path(tmp_path, "text", "train", "\n=====\n")
    assert [d.text for d in corpus.documents()] == ["one", "two<|endoftext|>three"]
    whole = FilesCorpus.from_path(tmp_path, "text", "train", None)
    assert len(list(whole.documents())) == 1
    assert len({c.fingerprint() for c in (corpus, whole)}) == 2
