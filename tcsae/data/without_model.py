"""What stands in a language model's place has in common: one layer, no logits, ids of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config import ModelConfig, resolve_layer
from tcsae.data.activation_model import ActivationModel
from tcsae.data.contexts import SpecialIds
from tcsae.data.devices import choose_device


class WithoutModel:
    """The parts of `ActivationModel` that do not depend on where its activations come from.

    Args:
        what: it is, for messages.
        hook_name: of the one place that it has.
        bos: the id that leads a context and counts nowhere.

    Raises UserError: no such layer (there is one, 0), no such device.
    """

    no_model: str | None
    beside: Sequence[ActivationModel] = ()

    def __init__(
        self, cfg: ModelConfig, layer: int | str | None, what: str, hook_name: str, bos: int
    ) -> None:
        self.cfg, self.hook_name = cfg, hook_name
        self.device, self.dtype = choose_device(cfg.device), torch.float32
        try:
            self.layer = resolve_layer(layer, 1)
        except ValueError as error:
            raise UserError(f"{error} for {what}") from None
        self.checks: dict[str, Any] | None = None
        self.special_ids = SpecialIds(bos, frozenset({bos}), frozenset({bos}))

    @property
    def content(self) -> str:
        raise NotImplementedError

    def activations(self, ids_BT: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, Any]:
        return {"weights": self.content, "hook": self.hook_name, "dtype": "float32"}

    def activations_at(
        self, ids_BT: Tensor, places: Sequence[ActivationModel]
    ) -> list[Tensor | None]:
        return [self.activations(ids_BT) for _ in places]

    def unembedding(self) -> Tensor | None:
        return None
