"""Text -> contexts of T tokens: packed, numbered by document, split into training and held out.

Shapes: N contexts, T tokens a context (BOS included).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig
from tcsae.data.chat import IDS, START, ChatTokens
from tcsae.data.documents import HASHES, Corpus, Document, Shuffled
from tcsae.data.documents import text_hash as _hash
from tcsae.data.held_out import HeldOut
from tcsae.data.one_text import PartedText
from tcsae.data.sides import Side

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with the contexts gathered so far and those asked for (None: all there are)."""


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
    """Packed contexts of one side of the split, in a drawn order of documents."""

    ids: Tensor
    """int32 [N, T]; position 0 is BOS."""
    segments: Tensor
    """int16 [N, T]; the number of the document within the context, from 1."""
    valid: Tensor
    """bool [N, T]; False at position 0 and at masked ids."""
    groups: tuple[str, ...]
    """The groups of documents that these tokens are from, sorted."""
    documents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [N]; documents numbered by first appearance. Held out: the one that the context is of
    (short ones that share a context count as one). Training: the one that its first token is of.
    Where none are given, every context is one of its own."""
    passage: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))
    """int32 [n, T'] of held-out ones: one document as it stands (tcsae/data/held_out.py); [0, 0]
    where contexts were packed by an older version."""
    seen: float | None = None
    """Of held-out ones: the share that was trained on (tcsae/data/seen.py)."""

    def __post_init__(self) -> None:
        if not len(self.documents):
            object.__setattr__(self, "documents", torch.arange(len(self.ids)))

    @property
    def n_documents(self) -> int:
        return len(self.documents.unique())

    def __len__(self) -> int:
        return len(self.ids)


def segments_of(ids: Tensor, boundary_ids: frozenset[int]) -> Tensor:
    """Number of the document of each token: cumsum(token in boundary_ids), int16 as `ids` [N, T].

    A boundary token belongs to the document that it opens.
    """
    boundaries = torch.isin(ids, torch.tensor(sorted(boundary_ids), dtype=ids.dtype))
    return boundaries.cumsum(dim=-1).to(torch.int16)


def _marked_segments(marked: Tensor, boundary_ids: frozenset[int]) -> Tensor:
    """The same of tokens that may be marked: those of conversations start a segment by a mark
    alone."""
    boundaries = torch.isin(marked, torch.tensor(sorted(boundary_ids), dtype=marked.dtype))
    return (boundaries | (marked & START > 0)).cumsum(dim=-1).to(torch.int16)


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
        stream: int32 [number of tokens], documents with one BOS between them; those of
            conversations may be marked (tcsae/data/chat.py).
        limit: contexts at most (None: as many as there are).

    Returns:
        Contexts int32 [N, size], and the length of the part of the stream that is in them; the
        tokens after it are fewer than a context needs, or beyond `limit`.
    """
    starts = _starts(stream, bos, size, limit)
    ids = np.full((len(starts), size), bos, dtype=np.int32)
    if starts:
        ids[:, 1:] = np.lib.stride_tricks.sliding_window_view(stream, size - 1)[starts]
    return ids, starts[-1] + size - 1 if starts else 0


def _starts(stream: np.ndarray, bos: int, size: int, limit: int | None) -> list[int]:
    """Where in the stream the contexts of `pack` begin, their BOS left out."""
    starts: list[int] = []
    at = 0
    while limit is None or len(starts) < limit:
        if at < len(stream) and stream[at] & IDS == bos:
            at += 1
        if at + size - 1 > len(stream):
            break
        starts.append(at)
        at += size - 1
    return starts


def build_contexts(
    corpus: Corpus,
    tokenizer: Any,
    special: SpecialIds,
    cfg: DatasetConfig,
    *,
    progress: Progress | None = None,
    are_tokens: bool = True,
) -> tuple[Contexts, Contexts]:
    """Training and held-out contexts of `corpus`, with no group of documents in both.

    A group is held out if the hash of its name falls under `cfg.eval_fraction`, whatever the
    seed. For training a finite corpus is taken in an order drawn with `cfg.seed`, a stream as it
    comes, until `cfg.n_contexts` (None: all of a finite corpus) are full: documents are packed
    with one BOS between them, and what is left of the last context is dropped. The
    `cfg.n_eval_contexts` held-out ones are spread over as many documents as can be, drawn with
    `cfg.eval_key` (tcsae/data/held_out.py). Text that spells a special token is plain text.

    Args:
        tokenizer: Hugging Face fast tokenizer.
        are_tokens: whether numbers that documents come as are token ids, and so a model's.

    Raises:
        UserError: the text gives fewer contexts than asked, or one group only.
    """
    if cfg.n_contexts is None and not corpus.finite:
        raise UserError(
            f"dataset {cfg.name} is a stream without a known end: set dataset.n_contexts"
        )
    started = time.perf_counter()
    size, bos = cfg.context_size, special.bos
    chat = ChatTokens(tokenizer, bos, cfg.chat, by_turn=cfg.segments == "turn")
    train = _Training(cfg.n_contexts, size, tokenizer, bos, cfg.seed, chat)
    held_out = HeldOut(cfg.n_eval_contexts, size, tokenizer, bos, cfg.eval_key, chat)
    report = _reporter(progress, train, held_out)
    if corpus.finite:
        _fill_from_finite(corpus, cfg, (train, held_out), report)
    else:
        _fill_from_stream(corpus, cfg, (train, held_out), report)
    contexts = [_contexts_of(side, special, cfg) for side in (train, held_out)]
    contexts[1] = replace(contexts[1], passage=torch.from_numpy(held_out.passage()))
    if are_tokens and (train.tokens_given or held_out.tokens_given):
        logger.warning(
            "%s: tokens are taken as they are, as this model's, and a row is one document",
            corpus.describe(),
        )
    _say_chats(corpus, cfg, chat, train.chats + held_out.chats)
    logger.info(
        "%s: %d training and %d evaluation contexts of %d tokens in %.1f s",
        corpus.describe(),
        len(contexts[0]),
        len(contexts[1]),
        cfg.context_size,
        time.perf_counter() - started,
    )
    return contexts[0], contexts[1]


def _say_chats(corpus: Corpus, cfg: DatasetConfig, chat: ChatTokens, n: int) -> None:
    """How conversations became text. Raises UserError where a key is about them and there is none,
    or would change nothing."""
    if n:
        how = "the tokenizer's chat template" if chat.templated else "plain text, role: text"
        of = "turns" if chat.by_turn else "conversations"
        logger.info("%s: conversations as %s; segments are %s", corpus.describe(), how, of)
        return
    for key, value, usual in (
        ("segments", cfg.segments, "document"),
        ("chat", cfg.chat, "template"),
    ):
        if value != usual:
            raise UserError(
                f"dataset.{key}={value} is for conversations, and {corpus.describe()} has none in "
                f"field {cfg.text_field}: leave the key out, or set dataset.text_field=messages"
            )


class _Training(Side):
    """Documents in an order drawn with `seed`, in one stream that is cut into contexts."""

    name = "training"

    def __init__(
        self,
        n_contexts: int | None,
        size: int,
        tokenizer: Any,
        bos: int,
        seed: int,
        chat: ChatTokens,
    ) -> None:
        super().__init__(n_contexts, size, tokenizer, bos, chat)
        self.seed = seed
        # A context uses at most `size` tokens of the stream: its own and a BOS at the cut.
        self.wanted = math.inf if n_contexts is None else n_contexts * size

    def clear(self) -> None:
        super().clear()
        self._pieces: list[tuple[str, np.ndarray]] = []  # (group, ids), a document each

    def rank(self, document: Document) -> int:
        return _hash(f"{self.seed}:{document.id}")

    def missing_tokens(self) -> float:
        return self.wanted - self.n_tokens

    def take(self, document: Document, ids: np.ndarray) -> None:
        self._pieces.append((document.group, ids))

    def contexts_so_far(self) -> int:
        gathered = self.n_tokens // self.size
        return gathered if self.n_contexts is None else min(gathered, self.n_contexts)

    def packed(self) -> tuple[np.ndarray, np.ndarray, set[str]]:
        separator = np.array([self.bos], dtype=np.int32)
        parts = [part for _, ids in self._pieces for part in (ids, separator)][:-1]
        stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        ids, end = pack(stream, self.bos, self.size, self.n_contexts)
        first = np.cumsum([0, *(len(ids) + 1 for _, ids in self._pieces)])
        starts = _starts(stream, self.bos, self.size, self.n_contexts)
        holding = np.searchsorted(first, np.array(starts, dtype=np.int64), side="right")
        # Ascending already, so that numbers by size are numbers by first appearance.
        documents = np.unique(holding, return_inverse=True)[1]
        pieces = zip(self._pieces, first, strict=False)
        return ids, documents, {group for (group, _), start in pieces if start < end}


def _reporter(progress: Progress | None, train: Side, held_out: Side) -> Callable[[], None]:
    total = None
    if train.n_contexts is not None and held_out.n_contexts is not None:
        total = train.n_contexts + held_out.n_contexts

    def report() -> None:
        if progress is not None:
            progress(train.contexts_so_far() + held_out.contexts_so_far(), total)

    return report


# ---------------------------------------------------------------- the split


def _parted(corpus: Corpus, cfg: DatasetConfig) -> tuple[Corpus, int]:
    """The corpus, or where it is one long text the pieces of it; and `_held_out_below`."""
    limit = _held_out_below(corpus, cfg)
    if limit is not None:
        return corpus, limit
    pieces = PartedText.from_corpus(corpus) if corpus.finite else None
    limit = None if pieces is None else _held_out_below(pieces, cfg)
    if pieces is None or limit is None:
        raise UserError(
            f"dataset {cfg.name} is one document ({corpus.describe()}), too short to be parted, "
            "and held-out contexts need another one: give two files or more, or jsonl with a row "
            "for each document"
        )
    logger.warning(
        "%s is one document: it is parted into %d pieces, some of them held out. What is measured "
        "on them holds for this text, not for others; give more documents for that",
        corpus.describe(),
        pieces.n,
    )
    return pieces, limit


def _held_out_below(corpus: Corpus, cfg: DatasetConfig) -> int | None:
    """Groups whose hash is below this are held out: two at least, for a feature's mean at a
    position is taken over documents; one where there are two in all. Training gets at least one.

    Reads only as far as it must, so one look at a few documents as a rule. None: there is one
    group only.
    """
    limit = int(cfg.eval_fraction * HASHES)
    lowest, highest = [HASHES, HASHES], -1
    for document in corpus.documents():
        key = _hash(document.group)
        if key not in lowest:
            lowest = sorted([*lowest, key])[:2]
        highest = max(highest, key)
        if lowest[1] < limit <= highest:
            return limit
    if lowest[0] == highest:
        return None
    if lowest[1] == highest:
        return highest
    return lowest[1] + 1 if lowest[1] >= limit else highest


def _fill_from_finite(
    corpus: Corpus, cfg: DatasetConfig, sides: tuple[Side, Side], report: Callable[[], None]
) -> None:
    corpus, limit = _parted(corpus, cfg)
    open_ = set(sides)
    while open_:
        samples = {side: side.sample() for side in sides if side in open_}
        for document in corpus.documents():
            side = sides[_hash(document.group) < limit]
            if side in samples:
                samples[side].add(side.rank(document), side.shortened(document))
        open_ = {side for side, sample in samples.items() if not side.fill(sample, report)}


def _fill_from_stream(
    corpus: Corpus, cfg: DatasetConfig, sides: tuple[Side, Side], report: Callable[[], None]
) -> None:
    """Training in the stream's own order; the other side in a pass and an order of its own."""
    limit = int(cfg.eval_fraction * HASHES)
    train, held_out = sides
    drawn = corpus.shuffled_with(cfg.eval_key) if isinstance(corpus, Shuffled) else corpus
    for side, source in ((train, corpus), (held_out, drawn)):
        while True:
            side.clear()
            for document in source.documents():
                if (_hash(document.group) < limit) != (side is held_out):
                    continue
                if side.add(side.shortened(document)):
                    report()
                    if side.full:
                        break
            side.flush()
            report()
            if side.enough(dropped=False):
                break
            side.widen()


def contexts_of(ids: Tensor, special: SpecialIds) -> Contexts:
    """Contexts of these ids, int32 [N, T], that belong to no side of a split."""
    segments, valid = segments_of(ids, special.boundaries), valid_of(ids, special.masked)
    return Contexts(ids, segments, valid, ())


def _contexts_of(side: Side, special: SpecialIds, cfg: DatasetConfig) -> Contexts:
    packed, documents, groups = side.packed()
    if len(packed) < (side.n_contexts or 1):
        raise _too_little(side, len(packed), max(side.n_tokens - 1, 0), cfg)
    ids = torch.from_numpy(packed & IDS)
    return Contexts(
        ids=ids,
        segments=_marked_segments(torch.from_numpy(packed), special.boundaries),
        valid=valid_of(ids, special.masked),
        groups=tuple(sorted(groups)),
        documents=torch.from_numpy(documents),
    )


def _too_little(side: Side, have: int, n_tokens: int, cfg: DatasetConfig) -> UserError:
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
