"""Files of text and of rows with a field of text, one reader for each form.

Nothing is ever unpickled; what is broken is one line that names the file and, where there are
lines, the line.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tcsae.base.errors import UserError, first_line
from tcsae.data.chat import turns_of
from tcsae.data.documents import Content

Reader = Callable[..., Iterator[Any]]
"""(file, field of the text in a row) -> the documents in it, Content each, blank ones included.
Of rows also (file, field, take): `take(row, where, field)` of each, in place of `row_content`."""
Take = Callable[[Any, str, str], Any]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


# ---------------------------------------------------------------- packed files


def _zstd(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path} is packed with zstd: `pip install zstandard`, or unpack it"
        ) from None
    return zstandard.open(path, "rb")


_PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: of a packed one the suffix before."""
    kind = path.suffix.lower()
    return Path(path.stem).suffix.lower() if kind in _PACKED else kind


def _open(path: Path) -> Any:
    """The file's bytes, unpacked."""
    return _PACKED.get(path.suffix.lower(), lambda p: p.open("rb"))(path)


def _whole(read: Reader) -> Reader:
    """`read`, with what libraries say of a broken file turned into one line."""

    @functools.wraps(read)
    def wrapped(path: Path, field: str, *take: Take) -> Iterator[Any]:
        import pyarrow as pa

        broken = (
            *(pa.ArrowException, UnicodeDecodeError, EOFError, csv.Error, zlib.error),
            *(lzma.LZMAError, gzip.BadGzipFile),
        )
        try:
            yield from read(path, field, *take)
        except UserError:
            raise
        except Exception as error:
            packed = path.suffix.lower() in _PACKED or kind_of(path) in (".parquet", ".arrow")
            if not isinstance(error, broken) and not (packed and _is_of_reading(error)):
                raise
            reason = first_line(error).rstrip(".")
            raise UserError(
                f"{path} is not a whole {path.suffix[1:].lower()} file ({reason}): write or fetch "
                "it again"
            ) from error

    return wrapped


def _is_of_reading(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__name__ == "ZstdError"


# ---------------------------------------------------------------- text and fields


def _utf8(data: bytes, path: Path, offset: int = 0) -> str:
    """Decode `data`, found `offset` bytes into `path`. Raises UserError for what is not text."""
    try:
        text = data.decode("utf-8")
        bad = data.find(b"\0")
    except UnicodeDecodeError as error:
        zero = data.find(b"\0", 0, error.start)
        bad = error.start if zero < 0 else zero
    if bad >= 0:
        raise UserError(
            f"{path} is not UTF-8 text (byte {offset + bad} is 0x{data[bad]:02x}): "
            "convert it to UTF-8, or leave it out of dataset.path"
        )
    return text if offset else text.removeprefix("\ufeff")


def missing(where: str, field: str, names: Iterable[str]) -> UserError:
    return UserError(
        f"{where} has no field {field}: set dataset.text_field to one of {', '.join(names)}"
    )


def row_content(row: Any, where: str, field: str) -> Content:
    """The text of a row: its `field`, which may be nested (`a.b`), a conversation or tokens."""
    if isinstance(row, dict) and field in row:
        value = row[field]
    else:
        value = row
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                raise missing(where, field, map(str, row if isinstance(row, dict) else ()))
            value = value[name]
    if (turns := turns_of(value, f"{where}: field {field}")) is not None:
        return turns
    value = None if value == [] else value
    if isinstance(value, list) and value and all(type(part) is int for part in value):
        return _tokens(value, f"{where}: field {field}")
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where}: field {field} holds {type(value).__name__}, not text: "
            "set dataset.text_field to a field of text"
        )
    # Half of a surrogate pair is legal in JSON and refused by tokenizers.
    return (value or "").encode("utf-8", "replace").decode("utf-8")


def _tokens(value: list[int], where: str) -> np.ndarray:
    lowest, highest = min(value), max(value)
    if lowest < 0 or highest >= 2**31:
        bad = lowest if lowest < 0 else "a number of more than 31 bits"
        raise UserError(f"{where} holds {bad}, which is no token: give lists of token ids, or text")
    return np.array(value, dtype=np.int32)


@_whole
def _read_text(path: Path, field: str) -> Iterator[Content]:
    """One text: the file, with line ends as on Unix."""
    with _open(path) as file:
        yield re.sub(r"\r\n?", "\n", _utf8(file.read(), path))


@_whole
def _read_jsonl(path: Path, field: str, take: Take = row_content) -> Iterator[Any]:
    """One text a line."""
    offset = 0
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            text = _utf8(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UserError(
                    f"{where} is not JSON ({_reason(error)}): one object a line"
                ) from error
            except RecursionError:
                raise UserError(f"{where} is nested too deep to be read: leave it out") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object: one object a line")
            yield take(row, where, field)


def _reason(error: ValueError) -> str:
    """Python's own words for a number of 5,000 digits are about its settings."""
    return "a number too long to be read" if "integer string" in str(error) else str(error)


@_whole
def _read_parquet(path: Path, field: str, take: Take = row_content) -> Iterator[Any]:
    """One text a row."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        column = _column(str(path), field, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=1024, columns=[column])
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        for number, value in enumerate(values):
            yield take({column: value}, f"{path} row {number}", field)


@_whole
def _read_arrow(path: Path, field: str, take: Take = row_content) -> Iterator[Any]:
    """One text a row, from either form of Arrow IPC: `datasets` writes the streaming one."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        seekable = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if seekable else pa.ipc.open_stream(source)
        column = _column(str(path), field, reader.schema.names)
        count = reader.num_record_batches if seekable else None
        batches = map(reader.get_batch, range(count)) if count is not None else iter(reader)
        values = (value for batch in batches for value in batch.column(column).to_pylist())
        for number, value in enumerate(values):
            yield take({column: value}, f"{path} row {number}", field)


def _column(where: str, field: str, names: list[str]) -> str:
    column = field if field in names else field.split(".")[0]
    if column not in names:
        raise missing(where, field, names)
    return column


@_whole
def _read_table(path: Path, field: str, take: Take = row_content) -> Iterator[Any]:
    """One text a row, of values that commas (csv) or tabs (tsv) are between."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    separator = "\t" if kind_of(path) == ".tsv" else ","
    with _open(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(lines, delimiter=separator)
        if rows.fieldnames is None or field not in rows.fieldnames:
            raise missing(str(path), field, rows.fieldnames or [])
        for row in rows:
            yield take(row, f"{path} line {rows.line_num}", field)


@_whole
def _read_json(path: Path, field: str, take: Take = row_content) -> Iterator[Any]:
    """One text an entry of a list (of texts or objects), which may be the one list of an object."""
    try:
        with _open(path) as file:
            content = json.loads(_utf8(file.read(), path))
    except RecursionError:
        raise UserError(f"{path} is nested too deep to be read: leave it out") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({_reason(error)})") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 and field not in content else [content]
    if not isinstance(content, list):
        raise UserError(f"{path} is no list of texts or of objects")
    for number, row in enumerate(content):
        where = f"{path} entry {number}"
        yield take({field: row} if isinstance(row, str) else row, where, field)


ALONE = {".json": _read_json, ".csv": _read_table, ".tsv": _read_table}
"""Forms that may be anything else beside text: in a folder they are data where nothing else is."""
ROWS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    **ALONE,
}
READERS: dict[str, Reader] = {".txt": _read_text, ".md": _read_text, **ROWS}
KINDS = ", ".join(kind[1:] for kind in READERS) + " (also packed: gz, bz2, xz, zst)"
