"""Activations of one's own: a file or a folder of .npy or .safetensors, as documents of vectors.

[n, d_in] is one document, or those that `documents` and `positions` say; [n, T, d_in] is n
documents of T vectors. Nothing is ever unpickled, and files are mapped, not read into memory.

Shapes: n vectors of all files, d_in numbers each.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcsae.base.errors import UserError, first_line
from tcsae.base.files import file_digest
from tcsae.data.chat import IDS
from tcsae.data.documents import Document, parts_digest

HOOK = "given"
"""In place of the name of a hook point."""
SUFFIXES = (".npy", ".safetensors")
NAME, DOCUMENTS, POSITIONS = "activations", "documents", "positions"
_BESIDE = (DOCUMENTS, POSITIONS)
FORMS = "give .npy or .safetensors files of float numbers, [vectors, d_in] or [documents, T, d_in]"
_AT_ONCE = 1 << 24
"""Numbers looked at in one go."""


@dataclass(frozen=True)
class _File:
    """The vectors of one file."""

    path: Path
    name: str
    rows: Any
    """[n, d_in], an array or a tensor that is mapped."""
    starts: np.ndarray
    """int64 [documents]: the vector that each begins with."""
    groups: np.ndarray
    """int64 [documents]: the same for parts of one document."""


class Vectors:
    """The vectors of `path`, numbered through all files in the order of their names.

    Raises UserError, in one line that names the file, for what cannot be read or does not fit
    together. Their numbers are not looked at: see `check_numbers`.
    """

    finite = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = [_opened(file, path) for file in _files_of(path)]
        widths: dict[int, _File] = {}
        for file in self._files:
            widths.setdefault(int(file.rows.shape[1]), file)
        if len(widths) > 1:
            said = ", ".join(f"{file.name} {width}" for width, file in list(widths.items())[:3])
            raise UserError(
                f"{path}: vectors of several widths ({said}): give those of one place only"
            )
        (self.d_in,) = widths
        self._first = np.cumsum([0, *(len(file.rows) for file in self._files)])
        self.n = int(self._first[-1])
        if self.n >= IDS:
            raise UserError(f"{path}: {self.n:,} vectors, {IDS - 1:,} at most: give fewer files")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that is read."""

        def parts() -> Iterator[str | bytes]:
            yield "vectors"
            for path in _files_of(self.path):
                for file in (path, *_ids_beside(path)):
                    yield file.name
                    yield file_digest(file)

        return parts_digest(parts())

    def check_numbers(self) -> None:
        """Raises UserError for the first vector that holds no finite numbers."""
        for file in self._files:
            step = max(1, _AT_ONCE // self.d_in)
            for start in range(0, len(file.rows), step):
                finite = np.isfinite(_float32(file.rows[start : start + step])).all(1)
                if not finite.all():
                    bad = start + int(finite.argmin())
                    raise UserError(
                        f"{file.path}: vector {bad} is not finite (NaN or infinity): leave it out"
                    )

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """float32 [..., d_in] of these vectors, int64 [...]."""
        flat = numbers.reshape(-1)
        found = np.empty((len(flat), self.d_in), dtype=np.float32)
        of = np.searchsorted(self._first, flat, side="right") - 1
        for k in np.unique(of):
            here = of == k
            found[here] = _float32(self._files[k].rows[flat[here] - self._first[k]])
        return found.reshape(*numbers.shape, self.d_in)

    # ------------------------------------------------------------------ as a corpus

    def documents(self) -> Iterator[Document]:
        """Each with the numbers of its vectors, from 1, in place of token ids; 0 is the place
        before it."""
        for file, first in zip(self._files, self._first.tolist(), strict=False):
            ends = [*file.starts[1:].tolist(), len(file.rows)]
            edges = zip(file.starts.tolist(), ends, file.groups.tolist(), strict=True)
            for number, (start, end, group) in enumerate(edges):
                ids = np.arange(first + start + 1, first + end + 1, dtype=np.int32)
                yield Document(f"{file.name}:{number}", "", f"{file.name}:{group}", ids)

    def fingerprint(self) -> str:
        return self.digest

    def describe(self) -> str:
        files = "1 file" if len(self._files) == 1 else f"{len(self._files)} files"
        return f"{self.path} ({files}, {self.n:,} vectors of {self.d_in} numbers)"


@functools.lru_cache(maxsize=4)
def _kept(path: str, stamp: tuple[tuple[str, int, int], ...]) -> Vectors:
    return Vectors(Path(path))


def open_vectors(path: str | None) -> Vectors:
    """Those of dataset.path; opened again while no file has changed, the same."""
    if not path:
        raise UserError("dataset=activations: set dataset.path to a folder of vectors; " + FORMS)
    root = Path(path).expanduser()
    read = [f for file in _files_of(root) for f in (file, *_ids_beside(file))]
    stamp = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in read)
    return _kept(str(root), stamp)


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"dataset.path={path}: no such file or folder")
    beside = tuple(f".{name}.npy" for name in _BESIDE)
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [
        file
        for file in inside
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.endswith(beside)
    ]
    if not found:
        raise UserError(f"{path} holds no activations: {FORMS} (pickled ones are not read)")
    return found


def _ids_beside(path: Path) -> list[Path]:
    """X.documents.npy and X.positions.npy of X.npy, where they are."""
    if path.suffix.lower() != ".npy":
        return []
    named = [path.with_name(f"{path.stem}.{name}.npy") for name in _BESIDE]
    return [file for file in named if file.is_file()]


def _opened(path: Path, root: Path) -> _File:
    name = path.relative_to(root).as_posix() if root.is_dir() else path.name
    array, documents, positions = (
        _of_npy(path) if path.suffix.lower() == ".npy" else _of_safetensors(path)
    )
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(f"{path} has shape {list(array.shape)}: {FORMS}")
    per_document = int(array.shape[1]) if array.ndim == 3 else None
    n = int(array.shape[0])
    for ids, what in ((documents, DOCUMENTS), (positions, POSITIONS)):
        if ids is not None and (ids.shape != (n,) or ids.dtype.kind not in "iu"):
            raise UserError(
                f"{path}: {what} must be {n} whole numbers, one for each of its "
                f"{'rows' if per_document is None else 'documents'}; they are "
                f"{ids.dtype} {list(ids.shape)}"
            )
    if per_document is not None and positions is not None:
        raise UserError(f"{path}: positions are for [vectors, d_in], not for [documents, T, d_in]")
    names = np.arange(n) if per_document and documents is None else documents
    new = np.zeros(n, dtype=bool)
    new[0] = True
    if names is not None:
        new[1:] |= names[1:] != names[:-1]
    if positions is not None:
        new[1:] |= positions[1:].astype(np.int64) != positions[:-1].astype(np.int64) + 1
    starts = np.flatnonzero(new)
    groups = starts if names is None else names[starts].astype(np.int64)
    rows = array if per_document is None else array.reshape(-1, array.shape[-1])
    return _File(path, name, rows, starts * (per_document or 1), groups)


def _of_npy(path: Path) -> tuple[Any, Any, Any]:
    array = _npy(path)
    if array.dtype.kind != "f":
        raise UserError(f"{path} holds {array.dtype}, no float numbers: {FORMS}")
    if array.ndim > 1 and not array.flags.c_contiguous:
        raise UserError(f"{path} is in Fortran's order: save np.ascontiguousarray of it")
    beside = {file.name.split(".")[-2]: _npy(file) for file in _ids_beside(path)}
    return array, beside.get(DOCUMENTS), beside.get(POSITIONS)


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    # What numpy raises for a file that is cut, pickled or no array at all.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as an array ({first_line(error)}): {FORMS}"
        ) from None


def _of_safetensors(path: Path) -> tuple[Any, Any, Any]:
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({first_line(error)}): write it again"
        ) from None
    of_vectors = [name for name in tensors if name not in _BESIDE]
    name = NAME if NAME in of_vectors else of_vectors[0] if len(of_vectors) == 1 else None
    if name is None:
        raise UserError(
            f"{path} holds {', '.join(sorted(of_vectors)) or 'nothing'}: name the vectors {NAME} "
            f"(and beside them, if you like, {DOCUMENTS} and {POSITIONS})"
        )
    if not tensors[name].is_floating_point():
        raise UserError(f"{path}: {name} holds {tensors[name].dtype}, no float numbers: {FORMS}")
    documents, positions = (
        None if (t := tensors.get(key)) is None else t.numpy() for key in _BESIDE
    )
    return tensors[name], documents, positions


def _float32(rows: Any) -> np.ndarray:
    """Of an array or a tensor."""
    if isinstance(rows, np.ndarray):
        return np.asarray(rows, dtype=np.float32)
    return np.asarray(rows.float().numpy())


def n_contexts(path: str, size: int) -> int:
    """About as many contexts of `size` as there are."""
    return max(1, open_vectors(path).n // (size - 1))


def content_name(vectors: Vectors) -> str:
    return f"vectors:{hashlib.sha256(vectors.digest.encode()).hexdigest()}"
