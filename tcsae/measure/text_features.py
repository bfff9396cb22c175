"""Text in, features out: read as the evaluation of the run reads its held-out text.

One way to harvest: contexts with their BOS, `StreamSource` and `ActivationBatches`, the SAE on raw
activations in float32. Values are those of the evaluation but for rounding, since a batch of
another size multiplies in another order.

Shapes: T tokens, F features.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.labels import number
from tcsae.config import ModelConfig
from tcsae.data.batches import ActivationBatches, Calibration
from tcsae.data.contexts import contexts_of, pack
from tcsae.data.language_model import LanguageModel
from tcsae.data.sides import token_ids
from tcsae.data.store import StreamSource
from tcsae.data.token_text import Piece, TokenTexts
from tcsae.measure.evaluation import ENCODE_CONTEXTS
from tcsae.measure.strips import STYLE, Strip
from tcsae.sae.base import SparseAutoencoder

log = logging.getLogger(__name__)

_HALVES = re.compile("[\ud800-\udfff]")
By = Literal["sum", "peak", "longest"]
_Row = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of one context: ids, valid, massive [T'], and codes [T', F] sparse."""


class TopFeature(NamedTuple):
    """What a feature does in a text; masked tokens count nowhere."""

    feature: int
    peak: float
    mean: float
    """Over the tokens at which it is on."""
    tokens: int
    """At which it is on."""
    longest: int
    """Most of them in a row, masked tokens passed over."""


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """The features of a text, token by token: `.values`, `.top()`, `.strip(j)`."""

    ids: Tensor
    """[T] int64, BOS included."""
    tokens: list[str]
    """T texts, each of one token alone: parts of characters as bytes."""
    pieces: list[Piece]
    """The text to be read: whole characters across tokens."""
    contexts: Tensor
    """[T] int64: which context of the model a token is in; one, unless the text was parted."""
    valid: Tensor
    """[T] bool: what counts; neither special nor first nor massive."""
    massive: Tensor
    """[T] bool: left out for the norm of its activation."""
    sparse: Tensor
    """[T, F] float32, sparse COO, on the CPU; masked tokens have values that mean nothing."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> str:
        """As the tokens have it, special ones included."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def values(self) -> Tensor:
        """[T, F] float32, dense; `sparse` is the same with what is not 0 alone."""
        return self.sparse.to_dense()

    def top(self, n: int = 10, by: By = "sum") -> list[TopFeature]:
        """The n strongest features, strongest first, over valid tokens.

        Args:
            by: "sum" of the values, their "peak", or "longest": most tokens in a row.

        Raises:
            UserError: another `by`, an n that is no number of features.
        """
        if not _is_whole(n) or n < 0:
            raise UserError(f"top {n}: how many features is a whole number, 0 or more")
        if by not in ("sum", "peak", "longest"):
            raise UserError(f'by = "{by}": it is one of sum, peak, longest')
        found = self._firing()
        strength = {
            "sum": lambda f: f.mean * f.tokens,
            "peak": lambda f: f.peak,
            "longest": lambda f: f.longest,
        }[by]
        return sorted(found, key=lambda f: (-strength(f), f.feature))[:n]

    def strip(self, feature: int, heading: str = "") -> Strip:
        """One feature along the text. Raises UserError for a number that the SAE does not have."""
        check_feature(feature, self.sparse.shape[1])
        at, of = self.sparse.indices()
        mine = of == feature
        values = torch.zeros(len(self)).index_put((at[mine],), self.sparse.values()[mine])
        return Strip(feature, values, self.tokens, self.pieces, self.valid, heading)

    def _firing(self) -> list[TopFeature]:
        """Of every feature that fires at a valid token, by number."""
        at, of = self.sparse.indices()
        values = self.sparse.values()
        counted = (values > 0) & self.valid[at]
        at, of, values = at[counted], of[counted], values[counted].double()
        order = of.argsort(stable=True)  # places stay in order
        place = (self.valid.cumsum(0) - 1)[at[order]]  # among valid tokens
        features, column, tokens = of[order].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        none = torch.zeros(len(features), dtype=torch.float64)
        sums = none.scatter_add(0, column, values[order])
        peaks = none.scatter_reduce(0, column, values[order], "amax")
        begins = torch.ones(len(place), dtype=torch.bool)
        begins[1:] = (column.diff() != 0) | (place.diff() != 1)
        lengths = (begins.cumsum(0) - 1).bincount()
        longest = none.long().scatter_reduce(0, column[begins], lengths, "amax")
        rows = (features, peaks, sums / tokens, tokens, longest)
        return [TopFeature(*row) for row in zip(*(part.tolist() for part in rows), strict=True)]

    def __repr__(self) -> str:
        n_contexts = len(self.contexts.unique())
        parted = f" in {n_contexts} contexts" if n_contexts > 1 else ""
        lines = [
            f"{len(self)} tokens{parted}, {int(self.valid.sum())} of them count "
            f"({int(self.massive.sum())} massive ones do not); {self.sparse.shape[1]:,} features"
        ]
        for f in self.top(5):
            lines.append(
                f"  feature {f.feature}: on at {f.tokens} tokens, at most {f.longest} in a row, "
                f"peak {number(f.peak)}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        strips = "".join(self.strip(f.feature).html() for f in self.top(8))
        return STYLE + (strips or "<p>No feature fires on these tokens.</p>")


def check_feature(feature: int, n_features: int) -> None:
    """Raises UserError for what is no number of a feature that the SAE has."""
    if not _is_whole(feature) or not 0 <= feature < n_features:
        raise UserError(f"feature {feature}: this SAE has 0 to {n_features - 1}")


def _is_whole(value: Any) -> bool:
    """Of Python, numpy or torch; True and False are no numbers here."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def _model(cfg: str, layer: int | str | None) -> LanguageModel:
    return LanguageModel(ModelConfig.model_validate_json(cfg), layer)


def shared_model(cfg: ModelConfig, layer: int | str | None) -> LanguageModel:
    """The language model of a config; asked again for the same one, the one that is loaded.

    Raises UserError for what is none.
    """
    if cfg.why_no_text is not None:
        raise UserError(f"{cfg.why_no_text}: no text can be read")
    return _model(cfg.model_dump_json(by_alias=True), layer)


class TextReader:
    """An SAE with its language model, for texts.

    Args:
        sae: on raw activations; it stays where it is, a copy goes to the model's device.
        model: as in the run.
        context_size: most tokens that the model sees together, BOS included.
        norm_limit: activations beyond it are massive; infinite: none are.
    """

    def __init__(
        self, sae: SparseAutoencoder, model: LanguageModel, context_size: int, norm_limit: float
    ) -> None:
        self.model, self.context_size, self.norm_limit = model, context_size, norm_limit
        there = torch.device(model.device).type == sae.device.type
        self.sae = (sae if there else copy.deepcopy(sae).to(model.device)).eval()

    @functools.cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.model.tokenizer)

    @torch.no_grad()
    def read(self, text: str | Sequence[int] | Tensor, *, parted: bool = False) -> TextFeatures:
        """The features of a text, or of token ids (their BOS is put before them if it lacks).

        Args:
            parted: cut a text that is longer than a context as training text is cut, each part
                read by itself. False: refuse it.

        Raises:
            UserError: nothing to read, what is neither text nor ids, a text longer than a context,
                an id that the model lacks.
        """
        parts = self._parts(self.ids(text), parted)
        return joined([row for part in parts for row in self._features(part)], self.texts)

    def ids(self, text: str | Sequence[int] | Tensor) -> list[int]:
        """The tokens of a text, its BOS before them. Raises UserError as `read`."""
        bos = self.model.special_ids.bos
        if isinstance(text, str):
            if not text.strip():
                raise UserError("the text is empty: give some words")
            if _HALVES.search(text):
                raise UserError("the text has half a character (a lone surrogate): leave it out")
            return [bos, *token_ids(self.model.tokenizer, [text])[0]]
        given = text.flatten().tolist() if isinstance(text, Tensor) else text
        if not isinstance(given, Iterable) or not all(map(_is_whole, given := list(given))):
            kind = f"a {type(text).__name__}"
            raise UserError(
                f"{kind} that is neither a text nor a list of token ids (whole numbers)"
            )
        ids = [int(i) for i in given]
        ids = ids if ids[:1] == [bos] else [bos, *ids]
        if len(ids) < 2:
            raise UserError("no token ids but the first: give some more")
        if min(ids) < 0:
            raise UserError(f"token {min(ids)}: ids are 0 or more")
        return ids

    def _parts(self, ids: list[int], parted: bool) -> list[Tensor]:
        """Contexts [N, T'] of the text: as many whole ones as there are, then the rest."""
        self.model.check_ids(max(ids))
        size = self.context_size
        if len(ids) <= size:
            return [torch.tensor([ids], dtype=torch.int32)]
        if not parted:
            raise UserError(
                f"the text has {len(ids):,} tokens with its BOS, and a context of this run {size}: "
                "shorten it, or read it in parts as training text is (parted=True; --parts)"
            )
        bos = self.model.special_ids.bos
        stream = np.array(ids[1:], dtype=np.int32)
        whole, end = pack(stream, bos, size)
        parts = [torch.from_numpy(whole)]
        if len(rest := stream[end:]):
            parts.append(torch.tensor([[bos, *rest.tolist()]], dtype=torch.int32))
        return parts

    def _features(self, ids_NT: Tensor) -> list[_Row]:
        contexts = contexts_of(ids_NT, self.model.special_ids)
        unknown = Calibration(math.nan, self.norm_limit, math.nan, torch.empty(0))
        source = StreamSource(self.model, contexts)
        batches = ActivationBatches(source, unknown, str(self.sae.device))
        return list(coded(self.sae, batches))


def coded(sae: SparseAutoencoder, batches: ActivationBatches) -> Iterator[_Row]:
    """Every context of `batches` as the SAE has it, on the CPU. `sae` is on their device."""
    for batch in batches.in_order(ENCODE_CONTEXTS):
        codes = sae.encode(batch.x.float(), segments=batch.segments, valid=batch.valid)
        massive = batch.not_special & ~batch.valid
        for row in zip(batch.ids, batch.valid, massive, codes, strict=True):
            ids, valid, large, f_TF = (part.cpu() for part in row)
            yield ids.long(), valid, large, f_TF.float().to_sparse()


def joined(rows: list[_Row], texts: TokenTexts) -> TextFeatures:
    """Contexts one after the other; at least one."""
    ids, valid, massive = (torch.cat([row[i] for row in rows]) for i in range(3))
    numbers = ids.tolist()
    return TextFeatures(
        ids=ids,
        tokens=[texts(i) for i in numbers],
        pieces=texts.pieces(numbers),
        contexts=torch.cat([torch.full_like(row[0], n) for n, row in enumerate(rows)]),
        valid=valid,
        massive=massive,
        sparse=torch.cat([row[3] for row in rows]).coalesce(),
    )
