"""A synthetic world in a language model's place, and the contexts that its documents make."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig, ModelConfig
from tcsae.data.contexts import Contexts, segments_of, valid_of
from tcsae.data.synthetic import (
    BOS,
    FORMAT,
    HOOK,
    World,
    context_ids,
    document_numbers,
    documents_each,
)
from tcsae.data.token_text import TokenTexts
from tcsae.data.without_model import WithoutModel


class _FeatureTexts(TokenTexts):
    """What stands for a token in words: a true feature by its class and number there."""

    def __init__(self, world: World) -> None:
        super().__init__(tokenizer=None)
        self._world = world

    def _of(self, token: int) -> tuple[str, bytes | None]:
        if token < 2:
            return ("BOS", "nothing")[token], None
        feature = token - 2
        name = self._world.cfg.class_names[int(self._world.class_of[feature])]
        # A space, because tokens are set one behind the other.
        return f"{name} {feature - self._world.members(name).start} ", None


class SyntheticModel(WithoutModel):
    """`ActivationModel` of a world. Nothing of it is a language model: it has no logits, no text.

    What stands for a token is the strongest true feature on it, by class and number ("phrase 12").

    Raises UserError: no such layer (a world has one, 0), no such device.
    """

    no_model: str | None = "a synthetic world has no language model"

    def __init__(self, cfg: ModelConfig, layer: int | str | None) -> None:
        assert cfg.world is not None
        self.world, self.d_in = World(cfg.world), cfg.world.d_in
        super().__init__(cfg, layer, "a synthetic world", HOOK, BOS)
        self.vocabulary = self.world.n_true + 2

    @property
    def content(self) -> str:
        said = f"{FORMAT}:{self.world.cfg.model_dump_json()}"
        return f"synthetic:{hashlib.sha256(said.encode()).hexdigest()}"

    def activations(self, ids_BT: Tensor) -> Tensor:
        return self.world.activations(ids_BT.cpu()).to(self.device)

    def shown(self, ids_BT: Tensor) -> Tensor:
        value_BT, feature_BT = self.world.codes(ids_BT.cpu()).max(-1)
        shown_BT = torch.where(value_BT > 0, feature_BT + 2, 1)
        return torch.where(ids_BT.cpu() == BOS, 0, shown_BT).to(ids_BT.device)

    def texts(self) -> TokenTexts:
        return _FeatureTexts(self.world)

    def contexts(self, cfg: DatasetConfig) -> tuple[Contexts, Contexts]:
        """Training and held-out contexts, of different documents. UserError for too many."""
        if cfg.n_contexts is None:
            raise UserError("a synthetic world has no end: set dataset.n_contexts")
        return (
            self._side(cfg.n_contexts, cfg.seed, cfg.context_size, held_out=False),
            self._side(cfg.n_eval_contexts, cfg.eval_key, cfg.context_size, held_out=True),
        )

    def _side(self, n: int, key: int, size: int, *, held_out: bool) -> Contexts:
        tokens = self.world.cfg.document_tokens
        pieces = max(1, tokens // (size - 1))
        wanted = -(-n // pieces) * documents_each(tokens, size)
        try:
            numbers = document_numbers(wanted, key, held_out=held_out, document_tokens=tokens)
        except ValueError as error:
            raise UserError(f"dataset: {error}") from None
        ids, units = context_ids(numbers, tokens, size)
        return Contexts(
            ids=ids[:n],
            segments=segments_of(ids[:n], self.special_ids.boundaries),
            valid=valid_of(ids[:n], self.special_ids.masked),
            groups=("held out" if held_out else "training",),
            documents=units[:n],
            seen=0.0 if held_out else None,
        )
