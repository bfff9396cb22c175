"""What gives activations: a language model; in its place a synthetic world, or files of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tcsae.config import ModelConfig
from tcsae.data.contexts import SpecialIds
from tcsae.data.token_text import TokenTexts


class ActivationModel(Protocol):
    """The part that harvest, training and evaluation need of either."""

    cfg: ModelConfig
    device: str
    dtype: torch.dtype
    d_in: int
    layer: int
    hook_name: str
    no_model: str | None
    """Why there is no language model; None: there is."""
    checks: dict[str, Any] | None
    """What was found when it was loaded; None: nothing was."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the activations, beside the token ids."""

    @property
    def content(self) -> str:
        """A name for its weights, or its world, by what is in them."""

    @property
    def special_ids(self) -> SpecialIds: ...

    @property
    def vocabulary(self) -> int:
        """Number of what `shown` gives."""

    @property
    def beside(self) -> Sequence[ActivationModel]:
        """The same model read at further places (`store.also`)."""

    def activations(self, ids_BT: Tensor) -> Tensor:
        """[B, T, d_in] of whole contexts of ids."""

    def activations_at(
        self, ids_BT: Tensor, places: Sequence[ActivationModel]
    ) -> list[Tensor | None]:
        """The same at each of these places, out of itself and `beside`, by one forward pass.
        None: there is nothing of this form at that place."""

    def unembedding(self) -> Tensor | None:
        """[vocabulary, d_in]: what a direction of the residual stream adds to each token's logit,
        through the final norm's weight; None: it has no logits."""

    def shown(self, ids_BT: Tensor) -> Tensor:
        """[B, T] int64 below `vocabulary`: what stands for each token where tokens are counted."""

    def texts(self) -> TokenTexts:
        """The same as text."""
