"""Files that are whole or absent: atomic writes, locks, checksums, disk errors in one line."""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError

log = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn disk errors (full, read-only, forbidden) into one-line UserErrors that name `path`."""
    try:
        yield
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from error


def disk_reason(error: BaseException) -> str | None:
    """What is wrong with the disk, and what to do; None for an error of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    # safetensors reports the operating system's number in its text only.
    if number == errno.ENOSPC or "os error 28)" in text:
        return "the disk is full; free some space and run the same command again, it goes on"
    if number == errno.EDQUOT or "os error 122)" in text:
        return "the disk quota is used up; free some space and run the same command again"
    forbidden = (errno.EROFS, errno.EACCES, errno.EPERM)
    if number in forbidden or any(f"os error {n})" in text for n in forbidden):
        return (
            "the folder is read-only or not yours; choose another one with hydra.run.dir (runs), "
            "store.dir (activations) or TCSAE_CACHE (models)"
        )
    return None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path, renamed to `path` when the block ends well, else removed.

    The rename happens after an fsync: a reader, also on another machine of a shared file system,
    sees the old file or the whole new one. The temporary path is in a folder of its own beside
    `path`, so that what a library leaves there when it is killed goes with it.
    """
    with disk_errors(path):
        name = f".{path.name}."
        folder = Path(tempfile.mkdtemp(prefix=name, suffix=TEMPORARY_SUFFIX, dir=path.parent))
        try:
            temporary = folder / path.name
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left beside `name`; only while holding the lock they held."""
    for left in folder.glob(f".{name}.*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)


class Lock(enum.Enum):
    """The result of asking for a lock."""

    HELD = enum.auto()
    BUSY = enum.auto()
    """Somebody else holds it."""
    NONE = enum.auto()
    """The file system has no locks."""


@functools.cache
def _warn_of_no_locks(folder: Path) -> None:
    log.warning(f"{folder}: no file locks here; work may be done twice")


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[Lock]:
    """Holds the lock file `path` during the block if it can, and says whether it does.

    Without `waiting`, BUSY at once if somebody else holds it. With it, waits, calling `waiting`
    about once a second, which may raise. The lock ends with the process, however that ends.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    state = Lock.BUSY
    with disk_errors(path):
        while state is Lock.BUSY:
            try:
                lock.acquire(timeout=1 if waiting else 0)
                state = Lock.HELD
            except Timeout:
                if waiting is None:
                    break
                waiting()
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                    raise
                _warn_of_no_locks(path.parent)
                state = Lock.NONE
    try:
        yield state
    finally:
        lock.release()


def honour_umask(path: Path) -> None:
    """Give a file the permissions of any other new file beside it.

    safetensors makes files that only their owner may read; stores and models are shared.
    """
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    with contextlib.suppress(PermissionError):  # file systems without permissions to give
        path.chmod(probe.stat().st_mode)
    probe.unlink()


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
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
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


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is what a clone without git-lfs holds in place of the real one."""
    with open(path, "rb") as file:
        return file.read(48).startswith(b"version https://git-lfs.github.com/spec/")


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError for such a file."""
    if is_lfs_pointer(path):
        raise UserError(
            f"{path} is a pointer of git-lfs, not the file itself: `git lfs pull` in "
            f"{path.parent} gets it"
        )


def _described(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the SHA-256 of everything that the file says.

    As one entry: safetensors writes several in any order, and the same content must be the same
    bytes.
    """
    said = json.dumps([tensors_digest(tensors), metadata], sort_keys=True)
    stamped = {**metadata, "sha256": hashlib.sha256(said.encode()).hexdigest()}
    return {"tcsae": json.dumps(stamped, sort_keys=True)}


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """An atomic safetensors file that carries the digest of its own content."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(whole, temporary, metadata=_described(whole, metadata))
        honour_umask(temporary)


def load_tensors(path: Path, advice: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(tensors, metadata) of a file that `save_tensors` wrote, memory-mapped and verified.

    Raises:
        UserError: truncated or altered file; `advice` says what to do about it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            described = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(described.get("tcsae", "{}"))
    except (SafetensorError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from None
    metadata.pop("sha256", None)
    if described != _described(tensors, metadata):
        raise UserError(f"{path} is damaged (its content does not match its checksum); {advice}")
    return tensors, metadata
