"""Activations of one's own in a language model's place (dataset=activations)."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from tcsae.config import DatasetConfig, ModelConfig
from tcsae.data.contexts import Contexts, build_contexts
from tcsae.data.token_text import TokenTexts
from tcsae.data.vectors import HOOK, content_name, open_vectors
from tcsae.data.without_model import WithoutModel

log = logging.getLogger(__name__)

BOS = 0
"""The place before a document, in which there is no vector."""


class _NoTexts(TokenTexts):
    """There is no text: a dot stands for a vector."""

    def __init__(self) -> None:
        super().__init__(tokenizer=None)

    def _of(self, token: int) -> tuple[str, bytes | None]:
        # A space, because tokens are set one behind the other.
        return "BOS" if token == BOS else "\u00b7 ", None


class _Numbers:
    """In a tokenizer's place: documents come as numbers already."""

    pad_token_id = None
    chat_template = None

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n


class VectorsModel(WithoutModel):
    """`ActivationModel` of files of vectors. A token is a vector, its id the vector's number.

    Every context begins with a place of zeros, BOS, that counts nowhere: contexts of T places hold
    T - 1 vectors.

    Raises UserError: no such layer (there is one, 0), no such device, files that do not fit
    together, numbers that are not finite.
    """

    no_model: str | None = "activations of one's own come without a language model"
    vocabulary = 2

    def __init__(self, cfg: ModelConfig, dataset: DatasetConfig, layer: int | str | None) -> None:
        self._vectors = open_vectors(dataset.path)
        self._vectors.check_numbers()
        self.d_in = self._vectors.d_in
        super().__init__(cfg, layer, "activations of one's own", HOOK, BOS)

    @property
    def content(self) -> str:
        return content_name(self._vectors)

    def activations(self, ids_BT: Tensor) -> Tensor:
        numbers = ids_BT.cpu().long()
        x_BTD = torch.from_numpy(self._vectors.take((numbers - 1).clamp(min=0).numpy()))
        x_BTD[numbers == BOS] = 0
        return x_BTD.to(self.device)

    def shown(self, ids_BT: Tensor) -> Tensor:
        return (ids_BT != BOS).long()

    def texts(self) -> TokenTexts:
        return _NoTexts()

    def contexts(self, cfg: DatasetConfig) -> tuple[Contexts, Contexts]:
        """Training and held-out contexts, of different documents, packed as those of a text.
        UserError for too few vectors."""
        log.info(
            f"{self.no_model} and without text: CE and KL scores, words on pages, probes and "
            "steering are left out"
        )
        train, held_out = build_contexts(
            self._vectors,
            _Numbers(self._vectors.n + 1),
            self.special_ids,
            cfg,
            are_tokens=False,
        )
        return train, replace(held_out, seen=0.0)
