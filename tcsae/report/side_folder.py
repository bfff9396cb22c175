"""The folder beside a large run's page: its features in parts, read when one is opened.

    report_features/<ten hex digits>/0000.js ...   parts of PART features each
    report_features/<ten hex digits>/words.js      the text around the peaks, to be searched

Each is a script that hands its content to the page, `tcsaeFeatures("0000", {...})`: a page that is
opened as a file may load scripts that lie beside it, and nothing else. The digits are of the
content, so that a page never reads what belongs to another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tcsae.base.files import TEMPORARY_SUFFIX, disk_errors, make_folder
from tcsae.report.feature_table import FeatureTable
from tcsae.report.page import script_json

ONE_FILE_FEATURES = 4096
"""Runs with no more features than this have a page of one file."""
PART = 256
"""Features of a part."""
WORDS = "words"
_DIGITS = 10


@contextlib.contextmanager
def features_beside(table: FeatureTable, folder: Path) -> Iterator[dict[str, Any]]:
    """What the page's script is given of the features; the page is to be written in the block.

    With more than ONE_FILE_FEATURES the parts lie in `folder` when the block begins. What an
    earlier page had there goes when the block has ended well, so that at no time a page lacks its
    parts.
    """
    features = table.index()
    if table.n_features <= ONE_FILE_FEATURES:
        yield features | {"part": table.part(0, table.n_features)}
        shutil.rmtree(folder, ignore_errors=True)  # of a page by an older version
        return
    own = _write_parts(table, folder)
    yield features | {
        "folder": f"{folder.name}/{own.name}",
        "part_size": PART,
        "has_words": (own / f"{WORDS}.js").is_file(),
    }
    for other in folder.iterdir():
        if other != own:
            shutil.rmtree(other, ignore_errors=True)


def _write_parts(table: FeatureTable, folder: Path) -> Path:
    """All parts, under a name of their own once they are whole."""
    make_folder(folder)
    with disk_errors(folder):
        temporary = Path(tempfile.mkdtemp(suffix=TEMPORARY_SUFFIX, dir=folder))
        try:
            digest = hashlib.sha256()
            for name, content in _parts(table):
                text = f'tcsaeFeatures("{name}",{script_json(content)});\n'.encode()
                digest.update(text)
                with open(temporary / f"{name}.js", "wb") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            own = folder / digest.hexdigest()[:_DIGITS]
            if _sizes(own) == _sizes(temporary):  # the same content, written before
                return own
            shutil.rmtree(own, ignore_errors=True)  # somebody has taken from it
            temporary.chmod(folder.stat().st_mode)  # mkdtemp's is for its owner alone
            os.replace(temporary, own)
            return own
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*")}


def _parts(table: FeatureTable) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, first in enumerate(range(0, table.n_features, PART)):
        yield f"{number:04d}", table.part(first, min(first + PART, table.n_features))
    if (words := table.words()) is not None:
        yield WORDS, words
