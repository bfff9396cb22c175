"""Text -> contexts of T tokens: packed, numbered by document, split into training and held out.

Shapes: N contexts, T tokens a context (BOS included).
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig
from tcsae.data.documents import Corpus, Document

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with the contexts gathered so far and those asked for (None: all there are)."""

BATCH_CHARS = 1_000_000
"""Text given to the tokenizer at once: enough to use every core, little enough to hold."""


@dataclass(frozen=True)
class SpecialIds:
    """The token ids with a meaning of their own."""

    bos: int
    """Starts every context and stands between two documents."""
    boundaries: frozenset[int]
    """Ids that start a new segment: bos and eos."""
    masked: frozenset[int]
    """Ids that are left out of losses and metrics: pad, bos, eos and the like."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """Packed contexts of one side of the split, in a seeded order of documents."""

    ids: Tensor
    """int32 [N, T]; position 0 is BOS."""
    segments: Tensor
    """int16 [N, T]; the number of the document within the context, from 1."""
    valid: Tensor
    """bool [N, T]; False at position 0 and at masked ids."""
    groups: tuple[str, ...]
    """The groups of documents that these tokens are from, sorted."""

    def __len__(self) -> int:
        return len(self.ids)


def segments_of(ids: Tensor, boundary_ids: frozenset[int]) -> Tensor:
    """Number of the document of each token: cumsum(token in boundary_ids), int16 as `ids` [N, T].

    A boundary token belongs to the document that it opens.
    """
    boundaries = torch.isin(ids, torch.tensor(sorted(boundary_ids), dtype=ids.dtype))
    return boundaries.cumsum(dim=-1).to(torch.int16)


def valid_of(ids: Tensor, special_ids: frozenset[int]) -> Tensor:
    """Which tokens count: bool as `ids` [N, T], False at position 0 and at `special_ids`."""
    valid = ~torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype))
    valid[..., 0] = False
    return valid


def pack(
    stream: np.ndarray, bos: int, size: int, limit: int | None = None
) -> tuple[np.ndarray, int]:
    """Cut a stream of token ids into contexts of `size` tokens, each BOS and `size` - 1 of them.

    A BOS in the stream at a cut is the one that leads the context; it is not doubled.

    Args:
        stream: int32 [number of tokens], documents with one BOS between them.
        limit: contexts at most (None: as many as there are).

    Returns:
        Contexts int32 [N, size], and the length of the part of the stream that is in them; the
        tokens after it are fewer than a context needs, or beyond `limit`.
    """
    starts: list[int] = []
    at = end = 0
    while limit is None or len(starts) < limit:
        if at < len(stream) and stream[at] == bos:
            at += 1
        if at + size - 1 > len(stream):
            break
        starts.append(at)
        at = end = at + size - 1
    ids = np.full((len(starts), size), bos, dtype=np.int32)
    if starts:
        ids[:, 1:] = np.lib.stride_tricks.sliding_window_view(stream, size - 1)[starts]
    return ids, end


def build_contexts(
    corpus: Corpus,
    tokenizer: Any,
    special: SpecialIds,
    cfg: DatasetConfig,
    *,
    progress: Progress | None = None,
) -> tuple[Contexts, Contexts]:
    """Training and held-out contexts of `corpus`, with no group of documents in both.

    A group is held out if the hash of its name falls under `cfg.eval_fraction`, whatever the
    seed. A finite corpus is taken in an order drawn with `cfg.seed`, a stream as it comes, until
    `cfg.n_contexts` (None: all of a finite corpus) and `cfg.n_eval_contexts` are full. Documents
    are tokenised whole, text that spells a special token as plain text, and packed with one BOS
    between them; what is left of the last context is dropped.

    Args:
        tokenizer: Hugging Face fast tokenizer.

    Raises:
        UserError: the text gives fewer contexts than asked, or one group only.
    """
    if cfg.n_contexts is None and not corpus.finite:
        raise UserError(
            f"dataset {cfg.name} is a stream without a known end: set dataset.n_contexts"
        )
    started = time.perf_counter()
    train = _Side("training", cfg.n_contexts, cfg.context_size, tokenizer)
    held_out = _Side("evaluation", cfg.n_eval_contexts, cfg.context_size, tokenizer)
    report = _reporter(progress, train, held_out)
    if corpus.finite:
        _fill_from_finite(corpus, cfg, (train, held_out), report)
    else:
        _fill_from_stream(corpus, cfg, (train, held_out), report)
    contexts = tuple(_contexts_of(side, special, cfg) for side in (train, held_out))
    logger.info(
        "%s: %d training and %d evaluation contexts of %d tokens in %.1f s",
        corpus.describe(),
        len(contexts[0]),
        len(contexts[1]),
        cfg.context_size,
        time.perf_counter() - started,
    )
    return contexts[0], contexts[1]


class _Side:
    """The documents of one side of the split, tokenised in batches until it holds enough."""

    def __init__(self, name: str, n_contexts: int | None, size: int, tokenizer: Any) -> None:
        self.name = name
        self.n_contexts = n_contexts
        self.size = size
        # A context uses at most `size` tokens of the stream: its own and a BOS at the cut.
        self.wanted = math.inf if n_contexts is None else n_contexts * size
        self._tokenizer = tokenizer
        self.clear()

    def clear(self) -> None:
        self.pieces: list[tuple[str, np.ndarray]] = []  # (group, ids), a document each
        self.n_tokens = 0
        self._pending: list[Document] = []
        self._pending_chars = 0

    @property
    def full(self) -> bool:
        return self.n_tokens >= self.wanted

    def add(self, document: Document) -> bool:
        """Take a document; whether that led to tokens, and so to progress."""
        self._pending.append(document)
        self._pending_chars += len(document.text)
        # Near the end a batch is no larger than what is probably still missing.
        if self._pending_chars < min(BATCH_CHARS, 4 * (self.wanted - self.n_tokens)):
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Tokenise what is pending."""
        if not self._pending:
            return
        ids = self._tokenizer(
            [document.text for document in self._pending],
            add_special_tokens=False,
            # Text that spells <|endoftext|> must not become a boundary between documents.
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for document, tokens in zip(self._pending, ids, strict=True):
            if tokens:
                self.pieces.append((document.group, np.array(tokens, dtype=np.int32)))
                self.n_tokens += len(tokens) + 1
        self._pending, self._pending_chars = [], 0

    def contexts_so_far(self) -> int:
        gathered = self.n_tokens // self.size
        return gathered if self.n_contexts is None else min(gathered, self.n_contexts)


def _reporter(progress: Progress | None, train: _Side, held_out: _Side) -> Callable[[], None]:
    total = None
    if train.n_contexts is not None and held_out.n_contexts is not None:
        total = train.n_contexts + held_out.n_contexts

    def report() -> None:
        if progress is not None:
            progress(train.contexts_so_far() + held_out.contexts_so_far(), total)

    return report


# ---------------------------------------------------------------- the split

_HASHES = 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _held_out_below(corpus: Corpus, cfg: DatasetConfig) -> int:
    """Groups whose hash is below this are held out; both sides get at least one group.

    Reads only as far as it must, so one look at a few documents as a rule.
    """
    limit = int(cfg.eval_fraction * _HASHES)
    lowest, highest = _HASHES, -1
    for document in corpus.documents():
        key = _hash(document.group)
        lowest, highest = min(lowest, key), max(highest, key)
        if lowest < limit <= highest:
            return limit
    if lowest == highest:
        raise UserError(
            f"dataset {cfg.name} is one document ({corpus.describe()}), and held-out contexts "
            "need another one: give two files or more, or jsonl with a row for each document"
        )
    return lowest + 1 if lowest >= limit else highest


@dataclass
class _Sample:
    """The documents that come first in the drawn order, and no more text than `budget` asks.

    So a sample of a corpus that does not fit in memory takes one pass and the sample's memory.
    """

    budget: float
    """Characters."""
    chars: int = 0
    dropped: bool = False
    _heap: list[tuple[int, str, Document]] = field(default_factory=list)

    def add(self, rank: int, document: Document) -> None:
        heapq.heappush(self._heap, (-rank, document.id, document))
        self.chars += len(document.text)
        while self.chars - len(self._heap[0][2].text) >= self.budget:
            self.chars -= len(heapq.heappop(self._heap)[2].text)
            self.dropped = True

    def in_order(self) -> Iterator[Document]:
        return (document for _, _, document in sorted(self._heap, key=lambda kept: -kept[0]))


def _fill_from_finite(
    corpus: Corpus, cfg: DatasetConfig, sides: tuple[_Side, _Side], report: Callable[[], None]
) -> None:
    limit = _held_out_below(corpus, cfg)
    chars_per_token = 8
    while True:
        samples = [_Sample(side.wanted * chars_per_token) for side in sides]
        for document in corpus.documents():
            held_out = _hash(document.group) < limit
            samples[held_out].add(_hash(f"{cfg.seed}:{document.id}"), document)
        for side, sample in zip(sides, samples, strict=True):
            side.clear()
            for document in sample.in_order():
                if side.full:
                    break
                if side.add(document):
                    report()
            side.flush()
            report()
        if all(
            side.full or not sample.dropped for side, sample in zip(sides, samples, strict=True)
        ):
            return
        chars_per_token *= 8


def _fill_from_stream(
    corpus: Corpus, cfg: DatasetConfig, sides: tuple[_Side, _Side], report: Callable[[], None]
) -> None:
    limit = int(cfg.eval_fraction * _HASHES)
    for document in corpus.documents():
        side = sides[_hash(document.group) < limit]
        if not side.full and side.add(document):
            report()
            if all(side.full for side in sides):
                return
    for side in sides:
        side.flush()
    report()


def _contexts_of(side: _Side, special: SpecialIds, cfg: DatasetConfig) -> Contexts:
    separator = np.array([special.bos], dtype=np.int32)
    parts = [part for _, ids in side.pieces for part in (ids, separator)][:-1]
    stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    packed, end = pack(stream, special.bos, side.size, side.n_contexts)
    if len(packed) < (side.n_contexts or 1):
        raise _too_little(side, len(packed), len(stream), cfg)
    starts = np.cumsum([0, *(len(ids) + 1 for _, ids in side.pieces)])
    groups = {group for (group, _), start in zip(side.pieces, starts, strict=False) if start < end}
    ids = torch.from_numpy(packed)
    return Contexts(
        ids=ids,
        segments=segments_of(ids, special.boundaries),
        valid=valid_of(ids, special.masked),
        groups=tuple(sorted(groups)),
    )


def _too_little(side: _Side, have: int, n_tokens: int, cfg: DatasetConfig) -> UserError:
    key = "n_contexts" if side.name == "training" else "n_eval_contexts"
    share = "lower" if side.name == "training" else "raise"
    if have == 0:
        return UserError(
            f"dataset {cfg.name} is too small: {n_tokens} tokens of {side.name} text, and one "
            f"context takes {side.size}: give more text, {share} dataset.eval_fraction, or lower "
            "dataset.context_size"
        )
    return UserError(
        f"dataset {cfg.name} gives {have} {side.name} contexts of {side.size} tokens, "
        f"{side.n_contexts} asked: set dataset.{key}={have}, {share} dataset.eval_fraction, "
        "or give more text"
    )
