"""A synthetic world drawn: true directions, and what fires on every token of any document.

A token's id says which token of which document it is, so that activations are a function of ids,
as they are of a language model: 0 is BOS, 1 + document * document_tokens + t the token t of a
document. Every document is drawn from a generator of its own, whose seed is the world's and its
number: alone or in a batch it is the same.

Shapes: B contexts, T positions, L tokens of a document, D documents, F true features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcsae.config.synthetic import CHILD, POSITION, WorldConfig

FORMAT = 1
"""Part of the identity of activations: raise it when the same config gives other numbers."""
HOOK = "synthetic"
"""In place of the name of a hook."""
BOS = 0
LEAST_AMPLITUDE = 0.1
"""Of a firing, as a share of its feature's amplitude: noise does not turn a feature off."""
_DIRECTIONS, _DOCUMENTS = 0, 1
"""First number of the seeds of each kind of draw."""

Floats = NDArray[np.float32]


def max_documents(document_tokens: int) -> int:
    """Documents that ids of 32 bits can number."""
    return (2**31 - 2) // document_tokens


class World:
    """The true features of a world, and their values on tokens.

    Args:
        cfg: the world.

    Attributes:
        decoder: [F, d_in] float32, rows of norm 1.
        class_of: [F] int64, index into `cfg.class_names`.
        parent: [F] int64; -1 for a feature without one.
        amplitude: [F] float32.
        topic: [F] int64; -1 for features that no topic moves.
    """

    def __init__(self, cfg: WorldConfig) -> None:
        self.cfg = cfg
        names = cfg.class_names
        numbers = {name: its.n for name, its in cfg.classes.items()}
        amplitudes = {name: its.amplitude for name, its in cfg.classes.items()}
        if cfg.children is not None:
            numbers[CHILD] = numbers[cfg.children.of] * cfg.children.per_parent
            amplitudes[CHILD] = cfg.children.amplitude
        if cfg.position is not None:
            numbers[POSITION] = cfg.position.n
            amplitudes[POSITION] = cfg.position.amplitude
        counts = torch.tensor([numbers[name] for name in names])
        self.class_of = torch.arange(len(names)).repeat_interleave(counts)
        self.amplitude = torch.tensor([amplitudes[name] for name in names])[self.class_of]
        self.parent = torch.full((len(self.class_of),), -1)
        if cfg.children is not None:
            parents = torch.arange(len(self.class_of))[self.members(cfg.children.of)]
            self.parent[self.members(CHILD)] = parents.repeat_interleave(cfg.children.per_parent)
        draws = np.random.default_rng((_DIRECTIONS, cfg.seed))
        self.decoder = _directions(draws, len(self.class_of), cfg.d_in)
        self._massive = _directions(draws, 1, cfg.d_in)[0] * cfg.massive_norm
        own = sum(its.n for its in cfg.classes.values())
        self.topic = torch.full_like(self.parent, -1)
        self.topic[:own] = torch.from_numpy(draws.integers(cfg.topics, size=own))

    @property
    def n_true(self) -> int:
        return len(self.class_of)

    def members(self, name: str) -> slice:
        """The features of a class."""
        at = (self.class_of == self.cfg.class_names.index(name)).nonzero()
        return slice(int(at[0]), int(at[-1]) + 1)

    @cached_property
    def density(self) -> Tensor:
        """[F] float64: the share of tokens on that the world was asked for; NaN for position-bound
        features, which have one by position."""
        densities = {name: its.density for name, its in self.cfg.classes.items()}
        if (children := self.cfg.children) is not None:
            densities[CHILD] = densities[children.of] * children.rate
        each = [densities.get(name, float("nan")) for name in self.cfg.class_names]
        return torch.tensor(each, dtype=torch.float64)[self.class_of]

    # ------------------------------------------------------------------------ what contexts hold

    def codes(self, ids_BT: Tensor) -> Tensor:
        """True values [B, T, F] float32 of whole contexts of ids; 0 where a feature is off, and at
        BOS. The column is the position in the context."""
        at_BT, document_D, row_BT = self._places(ids_BT)
        codes_DLF = torch.from_numpy(self._document_codes(document_D.tolist()))
        codes_BTF = codes_DLF[row_BT, at_BT] * (ids_BT != BOS)[..., None]
        if self.cfg.position is not None:
            bands_TF = self._bands(ids_BT.shape[1])
            codes_BTF[..., self.members(POSITION)] *= bands_TF
        return codes_BTF

    def activations(self, ids_BT: Tensor) -> Tensor:
        """Activations [B, T, d_in] float32 of whole contexts of ids: codes by directions, noise,
        and massive tokens."""
        x_BTD = self.codes(ids_BT) @ self.decoder
        at_BT, document_D, row_BT = self._places(ids_BT)
        if self.cfg.noise:
            noise_DLD = np.stack([self._noise(d) for d in document_D.tolist()])
            x_BTD += torch.from_numpy(noise_DLD)[row_BT, at_BT]
        massive_D = torch.tensor([self._massive_token(d) for d in document_D.tolist()])
        is_massive_BT = (massive_D[row_BT] == at_BT) & (ids_BT != BOS)
        x_BTD = x_BTD + is_massive_BT[..., None] * self._massive
        return torch.where((ids_BT == BOS)[..., None], self._massive, x_BTD)

    def _places(self, ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token in its document [B, T], the documents there are [D], and which of them [B, T]."""
        document_BT, at_BT = _parted(ids_BT, self.cfg.document_tokens)
        document_D, row_BT = document_BT.unique(return_inverse=True)
        return at_BT, document_D, row_BT

    def _bands(self, n_positions: int) -> Tensor:
        """[T, n] whether a position is in the band of each position-bound feature."""
        position = self.cfg.position
        assert position is not None
        bands_TF = torch.zeros(n_positions, position.n)
        for feature in range(position.n):
            far = feature // 2 * position.width
            first = 1 + far if feature % 2 == 0 else n_positions - far - position.width
            bands_TF[first : first + position.width, feature] = 1
        return bands_TF

    # -------------------------------------------------------------------------------- documents

    def _generator(self, document: int, what: int) -> np.random.Generator:
        return np.random.default_rng((_DOCUMENTS, self.cfg.seed, document, what))

    def topic_of(self, document: int) -> int:
        """The topic of a document."""
        return int(self._generator(document, 0).integers(self.cfg.topics))

    def _massive_token(self, document: int) -> int:
        """The token of a document that is massive; -1 for none."""
        has, last = self._generator(document, 1).random(2)
        if has >= self.cfg.massive:
            return -1
        return self.cfg.document_tokens - 1 if last < 0.5 else 0

    def _noise(self, document: int) -> Floats:
        shape = self.cfg.document_tokens, self.cfg.d_in
        drawn = self._generator(document, 2).standard_normal(shape, dtype=np.float32)
        return drawn * np.float32(self.cfg.noise / self.cfg.d_in**0.5)

    def _document_codes(self, documents: Sequence[int]) -> Floats:
        """[D, L, F]; position-bound features as if every position were of their band."""
        shape = self.cfg.document_tokens, self.n_true
        draws = [self._generator(document, 3) for document in documents]
        uniform_DLF = np.stack([draw.random(shape, dtype=np.float32) for draw in draws])
        # The states before the first token need draws of their own.
        first_D2F = np.stack([draw.random((2, self.n_true), dtype=np.float32) for draw in draws])
        topic_D = np.array([self.topic_of(document) for document in documents])
        on_DLF = self._on(uniform_DLF, first_D2F, topic_D)
        codes_DLF = on_DLF * self.amplitude.numpy()
        if self.cfg.amplitude_noise:
            for draw, codes_LF in zip(draws, codes_DLF, strict=True):
                firing = codes_LF.nonzero()
                size = draw.standard_normal(len(firing[0]), dtype=np.float32)
                factor = 1 + np.float32(self.cfg.amplitude_noise) * size
                codes_LF[firing] *= np.maximum(factor, np.float32(LEAST_AMPLITUDE))
        return codes_DLF

    def _on(
        self, uniform_DLF: Floats, first_D2F: Floats, topic_D: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which features are on, [D, L, F] bool."""
        on_DLF = np.zeros(uniform_DLF.shape, dtype=bool)
        for name, its in self.cfg.classes.items():
            of = self.members(name)
            density_DF = its.density * self._frequency(topic_D, of)
            uniform_DLC, first_D2C = uniform_DLF[..., of], first_D2F[..., of]
            if its.lifetime == "document":
                on_DLF[..., of] = (first_D2C[:, 0] < density_DF)[:, None]
            elif its.lifetime == 1:
                on_DLF[..., of] = uniform_DLC < density_DF[:, None]
            else:
                start_DF = density_DF / (its.lifetime * (1 - density_DF))
                step = its.shape / its.lifetime
                on_DLF[..., of] = _runs(
                    uniform_DLC, first_D2C, density_DF, start_DF, step, its.shape
                )
        if (children := self.cfg.children) is not None:
            of = self.members(CHILD)
            parents_DLF = on_DLF[..., self.parent[of].numpy()]
            on_DLF[..., of] = parents_DLF & (uniform_DLF[..., of] < children.rate)
        if (position := self.cfg.position) is not None:
            of = self.members(POSITION)
            on_DLF[..., of] = uniform_DLF[..., of] < position.rate
        return on_DLF

    def _frequency(self, topic_D: NDArray[np.int64], of: slice) -> Floats:
        """How much more frequent each feature is in each document than on average, [D, n]."""
        c, n = self.cfg.correlation, self.cfg.topics
        own_DF = topic_D[:, None] == self.topic[of].numpy()
        return np.where(own_DF, 1 + c * (n - 1), 1 - c).astype(np.float32)


def _directions(draws: np.random.Generator, n: int, d_in: int) -> Tensor:
    rows = draws.standard_normal((n, d_in))
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).float()


def _parted(ids: Tensor, document_tokens: int) -> tuple[Tensor, Tensor]:
    """Document and token in it; of BOS the document and token of the one after it, unused."""
    number = (ids.long() - 1).clamp(min=0)
    # A BOS must not ask for a document that is not there: it takes that of its row's last token.
    number = torch.where(ids == BOS, number.amax(-1, keepdim=True), number)
    return number // document_tokens, number % document_tokens


def _runs(
    uniform_DLF: Floats,
    first_D2F: Floats,
    density_DF: Floats,
    start_DF: Floats,
    step: float,
    phases: int,
) -> NDArray[np.bool_]:
    """Runs of on and off, [D, L, F] bool: a chain off -> phase 1 -> ... -> `phases` -> off.

    It starts as it would be found at any time: on with `density_DF`, in any phase alike. From off
    it starts with `start_DF`, from a phase to the next (or off) with `step`.
    """
    phase_DF = np.where(
        first_D2F[:, 0] < density_DF, 1 + np.floor(first_D2F[:, 1] * phases), 0
    ).astype(np.int64)
    on_DLF = np.empty(uniform_DLF.shape, dtype=bool)
    for t in range(uniform_DLF.shape[1]):
        if t:
            moves_DF = uniform_DLF[:, t] < np.where(phase_DF == 0, start_DF, np.float32(step))
            phase_DF = (phase_DF + moves_DF) % (phases + 1)
        on_DLF[:, t] = phase_DF > 0
    return on_DLF


# ------------------------------------------------------------------------------------- contexts


def document_numbers(n: int, key: int, *, held_out: bool, document_tokens: int) -> Tensor:
    """[n] int64: the documents of one side. No document is on both; another key, other documents.

    Even numbers are trained on, odd ones held out. Raises ValueError if there are fewer.
    """
    half = max_documents(document_tokens) // 2
    if n > half:
        raise ValueError(f"{n} documents of {document_tokens} tokens: there are {half} at most")
    # Far apart, so that the ranges of two keys overlap only when there are very many documents.
    return (torch.arange(n) + key * 100_003) % half * 2 + int(held_out)


def context_ids(documents_D: Tensor, document_tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Contexts of whole or cut documents, and which of `documents_D` each is of.

    A document that fills contexts gives as many as it fills; of short ones as many as fill one
    share it, with a BOS between them, the last one cut, so that no document is in two contexts.

    Returns:
        ids int32 [N, size], position 0 BOS; and [N] int64 numbers 0, 1, ... of the document, or
        documents, that a context is of.
    """
    first_D1 = documents_D[:, None] * document_tokens + 1
    ids_DL = first_D1 + torch.arange(document_tokens)
    if (pieces := document_tokens // (size - 1)) > 0:
        body = ids_DL[:, : pieces * (size - 1)].reshape(-1, size - 1)
        units = torch.arange(len(documents_D)).repeat_interleave(pieces)
    else:
        share = documents_each(document_tokens, size)
        ids_DL = torch.nn.functional.pad(ids_DL, (0, 1), value=BOS)  # one after each
        body = ids_DL.reshape(-1, share * (document_tokens + 1))[:, : size - 1]
        units = torch.arange(len(body))
    return torch.nn.functional.pad(body, (1, 0), value=BOS).int(), units


def documents_each(document_tokens: int, size: int) -> int:
    """Documents that share a context of `size` tokens; 1 where one fills it."""
    return 1 if document_tokens >= size - 1 else -(-size // (document_tokens + 1))
