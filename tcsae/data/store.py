"""Activations harvested once and shared: shards addressed by what determines their content.

    <store.dir>/activations/<key>/00000.safetensors ...                 [contexts, T, d_in] each

A shard is written whole or not at all (temporary file, fsync, rename) and carries its checksum, so
any number of jobs may work on one folder: locks only keep two from doing the same work twice, and
where the file system has none the work is done twice with the same result. A killed harvest goes on
at the first missing shard.

The ranks of one command (tcsae/base/ranks.py) begin each with shards of its own, and
then help each other out; without locks they keep to their own and wait for the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tcsae.base.files import (
    Lock,
    load_tensors,
    locked,
    make_folder,
    remove_temporaries,
    save_tensors,
    tensors_digest,
    write_json,
)
from tcsae.base.progress import Progress
from tcsae.base.ranks import here
from tcsae.base.run_files import ACTIVATIONS, IDENTITY
from tcsae.base.signals import StopRequest
from tcsae.data.activation_model import ActivationModel
from tcsae.data.contexts import Contexts

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of every identity: files written in another way are not found, rather than misread."""


MAX_OPEN_SHARDS = 32_768
"""Each is a memory map, and Linux allows a process 65,530 of them; the longest open one closes."""


def content_key(identity: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a JSON-ready identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class ActivationSource(Protocol):
    """Activations of contexts by index, read from disk or computed on demand."""

    contexts: Contexts
    is_read: bool
    """From a disk; otherwise computed."""

    def activations(self, indices: Tensor) -> Tensor:
        """[len(indices), T, d_in]."""
        ...


class StreamSource:
    """Activations computed by the model for every batch, without a disk."""

    is_read = False

    def __init__(self, model: ActivationModel, contexts: Contexts) -> None:
        self.model, self.contexts = model, contexts

    def activations(self, indices: Tensor) -> Tensor:
        parts = self.contexts.ids[indices].split(self.model.cfg.forward_contexts)
        return torch.cat([self.model.activations(ids) for ids in parts])


class KeptSource(StreamSource):
    """Of a few contexts: computed once, and kept in memory."""

    @cached_property
    def _kept(self) -> Tensor:
        return super().activations(torch.arange(len(self.contexts))).cpu()

    def activations(self, indices: Tensor) -> Tensor:
        return self._kept[indices]


class ReadSource:
    """All of another source's activations, read (or computed) once and kept in memory: several
    passes, and several threads, go over them."""

    is_read = True

    def __init__(self, source: ActivationSource, at_once: int, stop: StopRequest) -> None:
        self.contexts = source.contexts
        parts = []
        for indices in torch.arange(len(self.contexts)).split(at_once):
            stop.check()
            parts.append(source.activations(indices).cpu())
        self._kept = torch.cat(parts)

    def activations(self, indices: Tensor) -> Tensor:
        return self._kept[indices]


def _turn(shard: int) -> int:
    """Which rank after this one begins with the shard: 0 for those of its own."""
    place = here()
    return (shard - place.rank) % place.size


def _wait_for(path: Path, stop: StopRequest) -> None:
    """Until another rank has made the file; `stop` is asked for if that rank is gone."""
    while not path.is_file():
        stop.check()
        time.sleep(0.1)


class _Behind:
    """Writes a shard while the next one is computed. Its locks are held until it is on the disk;
    whatever the disk said is raised at the next `write` or `wait`, or at the end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: tuple[Future[None], contextlib.ExitStack] | None = None

    def write(self, work: Callable[[], None], held: contextlib.ExitStack) -> None:
        self.wait()
        self._last = self._thread.submit(work), held.pop_all()

    def wait(self) -> None:
        if self._last is not None:
            (written, held), self._last = self._last, None
            with held:  # by this thread, which took the locks
                written.result()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


class ActivationStore:
    """The shards of one set of contexts at one hook point of one model.

    Args:
        root: store.dir.
        model: run only if a shard is missing.
        contexts: what to harvest, in shards of `shard_contexts`.
    """

    is_read = True

    def __init__(
        self, root: Path, model: ActivationModel, contexts: Contexts, shard_contexts: int
    ) -> None:
        self.model, self.contexts, self.shard_contexts = model, contexts, shard_contexts
        self.identity = {
            "format": FORMAT,
            **model.identity,
            "d_in": model.d_in,
            "contexts": tensors_digest({"ids": contexts.ids}),
            "shard_contexts": shard_contexts,
        }
        self.folder = root / ACTIVATIONS / content_key(self.identity)
        self.n_shards = -(-len(contexts.ids) // shard_contexts)
        self._open: dict[int, Tensor] = {}
        self.beside = [
            ActivationStore(root, other, contexts, shard_contexts) for other in model.beside
        ]
        """Stores of the same contexts at other places: their shards are made along with its own."""

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def _rows(self, shard: int) -> slice:
        first = shard * self.shard_contexts
        return slice(first, min(first + self.shard_contexts, len(self.contexts.ids)))

    def missing(self) -> list[int]:
        return [s for s in range(self.n_shards) if not self.shard_path(s).is_file()]

    def harvest(self, stop: StopRequest, what: str = "harvest") -> int:
        """Make every missing shard, beside whoever else is at it. Returns how many were made here.

        Raises:
            Interrupted: a signal came; whole shards stay.
            UserError: the disk is full or read-only; whole shards stay.
        """
        missing = self.missing()
        if not missing:
            log.info(f"{what}: all {self.n_shards} shards are in the store ({self.folder})")
            with contextlib.suppress(OSError):  # of somebody else's store
                (self.folder / IDENTITY).touch()  # `tcsae.clean` goes by when it was last used
            return 0
        for store in (self, *self.beside):
            make_folder(store.folder / "locks")
            write_json(store.folder / IDENTITY, store.identity)
        per_context = self.contexts.ids.shape[1]
        total = len(self.contexts.ids) * per_context
        done = total - sum((r.stop - r.start) * per_context for r in map(self._rows, missing))
        made = 0
        with Progress(what, total, done=done) as progress, _Behind() as behind:
            # First round: leave shards that others hold to them. Second: wait for those.
            for wait in (False, True):
                for shard in sorted(missing, key=_turn):
                    if not self.shard_path(shard).is_file():
                        made += self._harvest_shard(shard, wait, progress, stop, behind)
                behind.wait()
        return made

    def _harvest_shard(
        self, shard: int, wait: bool, progress: Progress, stop: StopRequest, behind: _Behind
    ) -> int:
        """Make one shard here and, by the same forward passes, those beside it that are missing.

        Jobs at several places of a model come here at once. Each asks for the locks in one order,
        so that one has all of them, and the others leave the shard to it.
        """
        stores = [s for s in (self, *self.beside) if not s.shard_path(shard).is_file()]
        with contextlib.ExitStack() as held:
            mine: list[ActivationStore] = []
            for store in sorted(stores, key=lambda store: store.folder.name):
                lock_path = store.folder / "locks" / f"{shard:05d}.lock"
                waiting = stop.check if wait and store is self else None
                lock = held.enter_context(locked(lock_path, waiting))
                if lock is Lock.BUSY and (store is self or not wait):
                    return 0
                if lock is Lock.NONE and _turn(shard):
                    if wait:
                        _wait_for(store.shard_path(shard), stop)
                    return 0
                if lock is not Lock.BUSY and not store.shard_path(shard).is_file():
                    mine.append(store)
                    if lock is Lock.HELD:
                        remove_temporaries(store.folder, store.shard_path(shard).name)
            if self not in mine:
                return 0
            behind.write(self._make(shard, mine, progress, stop), held)
        return 1

    def _make(
        self, shard: int, stores: list[ActivationStore], progress: Progress, stop: StopRequest
    ) -> Callable[[], None]:
        """Computes the shard of these stores; called, what is returned writes it."""
        rows: list[list[Tensor]] = [[] for _ in stores]
        places = [store.model for store in stores]
        for ids in self.contexts.ids[self._rows(shard)].split(self.model.cfg.forward_contexts):
            stop.check()
            for kept, x_BTD in zip(rows, self.model.activations_at(ids, places), strict=True):
                kept += [] if x_BTD is None else [x_BTD.cpu()]
            progress.update(ids.numel())

        def write() -> None:
            for store, kept in zip(stores, rows, strict=True):
                if kept:  # else there is no such place, which the run that wants it will say
                    path = store.shard_path(shard)
                    save_tensors(path, {"activations": torch.cat(kept)}, {"shard": str(shard)})

        return write

    def _shard(self, shard: int) -> Tensor:
        if shard not in self._open:
            path = self.shard_path(shard)
            tensors, _ = load_tensors(path, "delete it; the next run harvests it anew")
            if len(self._open) >= MAX_OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[shard] = tensors["activations"]
        return self._open[shard]

    def rows(self, indices: Tensor) -> list[Tensor]:
        """[T, d_in] each, as they lie in the files, which are read when the tensors are."""
        places = [divmod(int(i), self.shard_contexts) for i in indices]
        return [self._shard(shard)[row] for shard, row in places]

    def activations(self, indices: Tensor) -> Tensor:
        return torch.stack(self.rows(indices))
