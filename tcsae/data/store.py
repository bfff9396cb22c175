"""Activations harvested once and shared: shards addressed by what determines their content.

    <store.dir>/contexts/<key>/train.safetensors, eval.safetensors      token ids, segments, masks
    <store.dir>/activations/<key>/00000.safetensors ...                 [contexts, T, d_in] each

A shard is written whole or not at all (temporary file, fsync, rename) and carries its checksum, so
any number of jobs may work on one folder: locks only keep two from doing the same work twice, and
where the file system has none the work is done twice with the same result. A killed harvest goes on
at the first missing shard.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tcsae.base.errors import UserError
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
from tcsae.base.signals import StopRequest
from tcsae.config import DatasetConfig
from tcsae.data.contexts import Contexts, SpecialIds, build_contexts
from tcsae.data.corpora import open_corpus
from tcsae.data.documents import Corpus
from tcsae.data.language_model import LanguageModel

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of every identity: files written in another way are not found, rather than misread."""


MAX_OPEN_SHARDS = 32_768
"""Each is a memory map, and Linux allows a process 65,530 of them; the longest open one closes."""


def content_key(identity: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a JSON-ready identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------- contexts


def _save_contexts(path: Path, contexts: Contexts) -> None:
    tensors = {"ids": contexts.ids, "segments": contexts.segments, "valid": contexts.valid}
    save_tensors(path, tensors, {"groups": json.dumps(list(contexts.groups))})


def _load_contexts(path: Path) -> Contexts:
    tensors, metadata = load_tensors(path, "delete it; the next run makes it anew")
    return Contexts(**tensors, groups=tuple(json.loads(metadata["groups"])))


def load_or_build_contexts(
    cfg: DatasetConfig, model: LanguageModel, root: Path, stop: StopRequest
) -> tuple[Contexts, Contexts]:
    """Training and held-out contexts, from `root`/contexts if this text was packed before.

    Raises:
        UserError: text that cannot be read or is too little.
        Interrupted: a signal came.
    """
    corpus = open_corpus(cfg)
    special: SpecialIds = model.special_ids
    identity = {
        "format": FORMAT,
        "text": corpus.fingerprint(),
        "tokenizer": model.weights.identity,
        "special": [special.bos, sorted(special.boundaries), sorted(special.masked)],
        **cfg.model_dump(
            include={"n_contexts", "n_eval_contexts", "eval_fraction", "context_size", "seed"}
        ),
    }
    folder = root / "contexts" / content_key(identity)
    paths = folder / "train.safetensors", folder / "eval.safetensors"
    if not all(path.is_file() for path in paths):
        with locked(make_folder(folder) / ".lock", stop.check) as lock:
            if lock is Lock.HELD:
                remove_temporaries(folder)
            # Another process may have packed them while this one waited.
            if not all(path.is_file() for path in paths):
                both = _build_contexts(corpus, cfg, model, stop)
                for path, contexts in zip(paths, both, strict=True):
                    _save_contexts(path, contexts)
                write_json(folder / "identity.json", identity)
    return _load_contexts(paths[0]), _load_contexts(paths[1])


def _build_contexts(
    corpus: Corpus, cfg: DatasetConfig, model: LanguageModel, stop: StopRequest
) -> tuple[Contexts, Contexts]:
    log.info(f"packing contexts of {cfg.context_size} tokens from {corpus.describe()}")
    total = (cfg.n_contexts or 0) + cfg.n_eval_contexts
    with Progress("pack", total, unit="contexts") as progress:

        def report(so_far: int, _: int | None) -> None:
            stop.check()
            progress.update(so_far - progress.done)

        return build_contexts(corpus, model.tokenizer, model.special_ids, cfg, progress=report)


# -------------------------------------------------------------------------------- activations


class ActivationSource(Protocol):
    """Activations of contexts by their index: from disk, or made when asked."""

    contexts: Contexts
    is_read: bool
    """From a disk; otherwise computed."""

    def activations(self, indices: Tensor) -> Tensor:
        """[len(indices), T, d_in]."""
        ...


class StreamSource:
    """The language model itself: no disk, one forward pass for every batch."""

    is_read = False

    def __init__(self, model: LanguageModel, contexts: Contexts) -> None:
        self.model, self.contexts = model, contexts

    def activations(self, indices: Tensor) -> Tensor:
        parts = self.contexts.ids[indices].split(self.model.cfg.forward_contexts)
        return torch.cat([self.model.activations(ids) for ids in parts])


class ActivationStore:
    """The shards of one set of contexts at one hook point of one model.

    Args:
        root: store.dir.
        model: run only if a shard is missing.
        contexts: what to harvest, in shards of `shard_contexts`.
    """

    is_read = True

    def __init__(
        self, root: Path, model: LanguageModel, contexts: Contexts, shard_contexts: int
    ) -> None:
        self.model, self.contexts, self.shard_contexts = model, contexts, shard_contexts
        self.identity = {
            "format": FORMAT,
            **model.identity,
            "d_in": model.d_in,
            "contexts": tensors_digest({"ids": contexts.ids}),
            "shard_contexts": shard_contexts,
        }
        self.folder = root / "activations" / content_key(self.identity)
        self.n_shards = -(-len(contexts.ids) // shard_contexts)
        self._open: dict[int, Tensor] = {}

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
            return 0
        make_folder(self.folder / "locks")
        write_json(self.folder / "identity.json", self.identity)
        per_context = self.contexts.ids.shape[1]
        total = len(self.contexts.ids) * per_context
        done = total - sum((r.stop - r.start) * per_context for r in map(self._rows, missing))
        made = 0
        with Progress(what, total, done=done) as progress:
            # First round: leave shards that others hold to them. Second: wait for those.
            for wait in (False, True):
                for shard in missing:
                    if not self.shard_path(shard).is_file():
                        made += self._harvest_shard(shard, wait, progress, stop)
        return made

    def _harvest_shard(self, shard: int, wait: bool, progress: Progress, stop: StopRequest) -> int:
        path = self.shard_path(shard)
        lock_path = self.folder / "locks" / f"{shard:05d}.lock"
        with locked(lock_path, stop.check if wait else None) as lock:
            if lock is Lock.BUSY or path.is_file():
                return 0
            if lock is Lock.HELD:
                remove_temporaries(self.folder, path.name)
            rows = []
            for ids in self.contexts.ids[self._rows(shard)].split(self.model.cfg.forward_contexts):
                stop.check()
                rows.append(self.model.activations(ids).cpu())
                progress.update(ids.numel())
            save_tensors(path, {"activations": torch.cat(rows)}, {"shard": str(shard)})
        return 1

    def _shard(self, shard: int) -> Tensor:
        if shard not in self._open:
            path = self.shard_path(shard)
            tensors, _ = load_tensors(path, "delete it; the next run harvests it anew")
            if len(self._open) >= MAX_OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[shard] = tensors["activations"]
        return self._open[shard]

    def activations(self, indices: Tensor) -> Tensor:
        rows = [divmod(int(i), self.shard_contexts) for i in indices]
        return torch.stack([self._shard(shard)[row] for shard, row in rows])


# ---------------------------------------------------------------------- masks, scale, batches


@dataclass(frozen=True)
class Calibration:
    """What the first contexts say about the activations, for masks, scale and b_dec."""

    median_norm: float
    """Median over tokens that are neither special nor first."""
    norm_limit: float
    """Tokens beyond it are massive: invalid. Infinite without a filter."""
    massive_share: float
    """Share of those tokens that are massive."""
    sample: Tensor
    """[N, d_in] float32: valid activations."""


@dataclass(frozen=True)
class Batch:
    """x [B, T, d_in] raw activations; the others [B, T]."""

    x: Tensor
    ids: Tensor
    segments: Tensor
    valid: Tensor
    """Neither special nor massive: what is trained on and measured."""
    not_special: Tensor
    """Whatever the norm; position 0 is special."""


CALIBRATION_CONTEXTS = 256


def calibrate(source: ActivationSource, norm_filter: float) -> Calibration:
    """Median norm and massive tokens of the first contexts (they are in random order already).

    Raises UserError for activations without a scale: all zero, or not numbers.
    """
    contexts = source.contexts
    indices = torch.arange(min(CALIBRATION_CONTEXTS, len(contexts.ids)))
    x = source.activations(indices).float()[contexts.valid[indices]]
    norms = x.norm(dim=-1)
    median = norms.median().item() if len(norms) else 0.0
    if not 0 < median < float("inf"):
        raise UserError(
            f"the median norm of the activations is {median:.4g}, so there is nothing to train on: "
            "check the weights (model.path), model.hook and model.dtype"
        )
    limit = norm_filter * median if norm_filter > 0 else float("inf")
    kept = norms <= limit
    return Calibration(median, limit, 1 - kept.float().mean().item(), x[kept])


class ActivationBatches:
    """Batches of a source by context index, massive tokens masked, on `device`."""

    def __init__(self, source: ActivationSource, calibration: Calibration, device: str) -> None:
        self.source, self.calibration, self.device = source, calibration, device

    def __len__(self) -> int:
        return len(self.source.contexts.ids)

    def batch(self, indices: Tensor) -> Batch:
        return self.finish(indices, self.read(indices))

    def read(self, indices: Tensor) -> Tensor:
        """The activations of `finish`: page-locked if a GPU is to fetch them."""
        x = self.source.activations(indices)
        return x.pin_memory() if self.device.startswith("cuda") and x.is_cpu else x

    def finish(self, indices: Tensor, x: Tensor) -> Batch:
        contexts = self.source.contexts
        x = x.to(self.device, non_blocking=True)
        not_special = contexts.valid[indices].to(self.device)
        valid = not_special & (x.float().norm(dim=-1) <= self.calibration.norm_limit)
        ids, segments = contexts.ids[indices], contexts.segments[indices]
        return Batch(x, ids.to(self.device), segments.to(self.device), valid, not_special)

    def in_order(self, batch_contexts: int, n_contexts: int | None = None) -> Iterator[Batch]:
        n_contexts = len(self) if n_contexts is None else min(n_contexts, len(self))
        for indices in torch.arange(n_contexts).split(batch_contexts):
            yield self.batch(indices)


def shuffled_indices(step: int, batch: int, n_contexts: int, seed: int) -> Tensor:
    """[batch] context indices of one step: whole contexts, every one once an epoch.

    A pure function of its arguments, so the order needs no state to be resumed: the steps read
    consecutive pieces of one endless row of seeded permutations.
    """
    wanted = torch.arange(step * batch, (step + 1) * batch)
    epochs = wanted // n_contexts
    out = torch.empty(batch, dtype=torch.long)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        out[here] = _permutation(n_contexts, seed, epoch)[wanted[here] % n_contexts]
    return out


@functools.lru_cache(maxsize=2)
def _permutation(n_contexts: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n_contexts, generator=generator)
