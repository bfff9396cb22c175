"""Files that are whole or absent: atomic writes, checksums, and disk errors in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tcsae.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Full, read-only and forbidden places become one-line UserErrors that name `path`."""
    try:
        yield
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from error


def _disk_reason(error: Exception) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    # safetensors reports the operating system's number in its text only.
    if number == errno.ENOSPC or "os error 28" in text:
        return "the disk is full; free some space and run the same command again, it goes on"
    if number == errno.EDQUOT or "os error 122" in text:
        return "the disk quota is used up; free some space and run the same command again"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM) or "os error 30" in text:
        return "the folder is read-only or not yours; choose another one"
    return None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well, else removed.

    The rename happens after an fsync: a reader, also on another machine of a shared file system,
    sees the old file or the whole new one.
    """
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
    )
    with disk_errors(path):
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left; call it only while holding the folder's lock."""
    for left in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        left.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, content: Any) -> None:
    """Atomic; NaN and infinity are refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises UserError for a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as JSON ({error})") from None


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """An atomic safetensors file that carries the digest of its own content."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stamped = {**metadata, "sha256": tensors_digest(whole)}
    with atomic(path) as temporary:
        save_file(whole, temporary, metadata=stamped)


def load_tensors(path: Path, advice: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(tensors, metadata) of a file that `save_tensors` wrote, memory-mapped and verified.

    Raises:
        UserError: truncated or altered file; `advice` says what to do about it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from None
    if metadata.pop("sha256", None) != tensors_digest(tensors):
        raise UserError(f"{path} is damaged (its content does not match its checksum); {advice}")
    return tensors, metadata
