"""Labels of a text where its source has them: for probes, which ask what features know.

A label is of a whole document (the play, a field of a row) or of a stretch of its characters (the
speaker, the part of speech). Nothing here is kept in a store: the documents are read again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig
from tcsae.data.corpora import FilesCorpus, open_corpus
from tcsae.data.documents import Document
from tcsae.data.plays import PlaysCorpus
from tcsae.data.readers import READERS, ROWS, kind_of

Span = tuple[int, int, str]
"""(start, end, label), characters of the document's text."""
MIN_NAME = 3
"""Letters of a word of a name, below which it is none ("OF")."""


@dataclass(frozen=True)
class Labelled:
    """A document with what is known of it."""

    document: Document
    labels: Mapping[str, str] = field(default_factory=dict)
    """{label: value} of all of it."""
    stretches: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    """{label: spans} of long stretches: all tokens in one have its value."""
    words: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    """{label: spans} of single words: the token that ends one has its value."""
    hidden: Sequence[tuple[int, int]] = ()
    """What says a label in so many words: its tokens do not count."""


def labelled_documents(
    cfg: DatasetConfig, fields: Sequence[str], groups: Container[str]
) -> Iterator[Labelled]:
    """The documents of some groups with their labels; those without any are left out.

    Args:
        fields: of the rows of files: `evaluation.label_fields`.
        groups: of documents (`Contexts.groups`).

    Raises:
        UserError: a field that rows do not have, or whose value is neither a label nor spans.
    """
    if cfg.source not in ("wheel", "files"):
        return
    corpus = open_corpus(cfg)
    if isinstance(corpus, PlaysCorpus):
        found = _of_plays(corpus, groups)
    elif isinstance(corpus, FilesCorpus) and fields:
        found = _of_rows(corpus, fields, groups)
    else:
        return
    yield from found


LOOKED_AT = 1000
"""Rows in which a field of labels must be seen before a run begins."""


def check_labels(cfg: DatasetConfig, fields: Sequence[str]) -> None:
    """Before anything is loaded: whether rows of the text have `evaluation.label_fields`.

    Raises UserError for plain text, a field that none of the first rows has, and a value there that
    is neither a label nor spans. Of a text that has no such fields nothing is asked.
    """
    if cfg.source != "files" or not fields:
        return
    corpus = open_corpus(cfg)
    assert isinstance(corpus, FilesCorpus)
    paths = _with_rows(corpus, fields[0])
    for name in fields:
        values = itertools.chain.from_iterable(_labels_in(path, name) for path in paths)
        looked = list(itertools.islice(values, LOOKED_AT))
        if all(value is None for value in looked):
            raise UserError(
                f"evaluation.label_fields={name}: none of the first {len(looked):,} rows of "
                f"{corpus.root} has it{_others(paths[0], name)}: name a field of labels"
            )


def _with_rows(corpus: FilesCorpus, name: str) -> list[Path]:
    """The files that have rows. Raises UserError, which names the field, where none has."""
    paths = [path for path in corpus.files if kind_of(path) in ROWS]
    if not paths:
        raise UserError(
            f"evaluation.label_fields={name}: {corpus.root} is plain text, which has no fields: "
            "leave the key out, or give rows (jsonl, csv, parquet)"
        )
    return paths


def _labels_in(path: Path, name: str) -> Iterator[str | list[Span] | None]:
    """Of every row of a file, None where it has no such label."""
    try:
        yield from READERS[kind_of(path)](path, name, row_label)
    except UserError as error:
        said = str(error).replace("dataset.text_field", "evaluation.label_fields")
        raise UserError(said) from None


def _others(path: Path, name: str) -> str:
    """The other fields of the first row, where they are read with it."""

    def names(row: Any, where: str, name: str) -> list[str]:
        return [str(key) for key in row if key != name] if isinstance(row, dict) else []

    found: list[str] = next(READERS[kind_of(path)](path, name, names), [])
    return f" (there are {', '.join(found)})" if found else ""


def why_none(cfg: DatasetConfig, fields: Sequence[str]) -> str:
    """What a text without labels lacks, and how to give it some."""
    if cfg.source == "synthetic":
        return "a synthetic world has no labels of text"
    if cfg.source == "activations":
        return "activations of one's own have no text, so no labels"
    if cfg.source == "hub":
        return "a text that streams from the hub has no labels here: use dataset=files"
    if not fields:
        return (
            "the text has no labels: give rows with fields of labels and name them, "
            "evaluation.label_fields=[category,tags]"
        )
    return f"no held-out document has a label in {', '.join(fields)}"


# ---------------------------------------------------------------------- plays


def _of_plays(corpus: PlaysCorpus, groups: Container[str]) -> Iterator[Labelled]:
    known = functools.cache(corpus.names)
    for document in corpus.documents():
        if document.group not in groups:
            continue
        genre, _, play = document.group.partition("/")
        names = known(document.group)
        stretches, hidden = speeches(document.text, names)
        labels = {"genre": genre, "play": play}
        yield Labelled(document, labels, {"speaker": stretches}, hidden=hidden)


def speeches(text: str, names: frozenset[str]) -> tuple[list[Span], list[tuple[int, int]]]:
    """Who says what in a scene, and what must not count: headings, and names wherever they stand.

    A speech goes from the line that is a name to the next blank line. Hidden are all lines above
    the first blank one, words in capitals, and every capitalised word that is a part of a name.
    """
    parts = {w.casefold() for name in names for w in re.findall(r"[^\W\d_]+", name)}
    hidden = [(0, text.find("\n\n"))] if "\n\n" in text else []
    for word in re.finditer(r"[^\W\d_]+", text):
        said = word.group()
        is_name = said[0].isupper() and said.casefold() in parts
        if len(said) >= MIN_NAME and (is_name or said.isupper()):
            hidden.append(word.span())
    spans = []
    for line in re.finditer(r"^(.+)\n(.+(?:\n.+)*)", text, re.MULTILINE):
        if (name := line.group(1).strip()) in names:
            spans.append((*line.span(2), name))
    return spans, hidden


# ---------------------------------------------------------------------- rows of files


def _of_rows(
    corpus: FilesCorpus, fields: Sequence[str], groups: Container[str]
) -> Iterator[Labelled]:
    values = {name: _values(corpus, name) for name in fields}
    for document in corpus.documents():
        if document.group not in groups:
            continue
        row, _, part = document.id.partition("#")
        found = {name: value for name, known in values.items() if (value := known.get(row))}
        labels = {name: value for name, value in found.items() if isinstance(value, str)}
        # Characters are counted from the start of the row's text.
        words = {n: v for n, v in found.items() if not isinstance(v, str) and not part}
        if labels or words:
            yield Labelled(document, labels, words=words)


def _values(corpus: FilesCorpus, name: str) -> dict[str, str | list[Span] | None]:
    """{row's id, as of its document: its label, or its spans}."""
    found: dict[str, str | list[Span] | None] = {}
    for path in _with_rows(corpus, name):
        file = path.relative_to(corpus.root).as_posix()
        for number, value in enumerate(_labels_in(path, name)):
            found[f"{file}:{number}"] = value
    return found


def row_label(row: Any, where: str, name: str) -> str | list[Span] | None:
    """A row's label of that name: its text; or the spans of a list of [start, end, tag] (of a csv,
    such a list as JSON). None where the row has none. Raises UserError for what is neither."""
    value = row
    for part in [name] if isinstance(row, dict) and name in row else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, str) and value.startswith("[["):
        with contextlib.suppress(ValueError):  # a label that begins so
            value = json.loads(value)
    if isinstance(value, list):
        if not all(_is_span(part) for part in value):
            raise UserError(
                f"{where}: field {name} is a list, but not of [start, end, tag]: give characters "
                "of the text and a word, or one label a row"
            )
        return [(start, end, tag) for start, end, tag in value]
    if value is None or value == "":
        return None
    if isinstance(value, str | int | bool | float | np.generic):
        return str(value)
    raise UserError(
        f"{where}: field {name} holds {type(value).__name__}, no label: name fields of text or "
        "numbers, or lists of [start, end, tag], in evaluation.label_fields"
    )


def _is_span(part: Any) -> bool:
    return (
        isinstance(part, list | tuple)
        and len(part) == 3
        and all(type(place) is int for place in part[:2])
        and 0 <= part[0] < part[1]
        and isinstance(part[2], str)
    )
