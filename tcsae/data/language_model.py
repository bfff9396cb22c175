"""The language model: its tokenizer, its shape and its activations.

Activations, and the logits with something in their place, come from one network: transformers' own
(network.py). What is tried on it at loading is in `checks`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tcsae.base.errors import UserError, first_line
from tcsae.config import ModelConfig, place_of, resolve_layer
from tcsae.data.activation_model import ActivationModel
from tcsae.data.contexts import SpecialIds
from tcsae.data.devices import choose_device, choose_dtype, first_device
from tcsae.data.loading import HOOKS, load_model, quiet, with_places
from tcsae.data.model_checks import HookPoint, check_batch, try_model
from tcsae.data.model_folder import CONFIG, VOCABULARIES
from tcsae.data.network import Growing, Logits, Network, Replace
from tcsae.data.shape import positions_are_learned, read_shape
from tcsae.data.token_text import TokenTexts
from tcsae.data.weights import find_weights

log = logging.getLogger(__name__)


def _check_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("model.device_map needs accelerate: pip install accelerate")


class LanguageModel:
    """A language model that is loaded when it is first run; its tokenizer and shape come earlier.

    Args:
        cfg: the model's config.
        layer: the block, as the config names it.
        also: further places that a forward pass can be read at, as `store.also` names them.

    Raises:
        UserError: no such weights, no such layer, a folder that does not load.
    """

    no_model: str | None = None

    def __init__(
        self, cfg: ModelConfig, layer: int | str | None, also: Sequence[int | str] = ()
    ) -> None:
        self.cfg = cfg
        self.weights = find_weights(cfg)
        self.device = choose_device(cfg.device)
        if cfg.device_map is not None:
            _check_accelerate()
            self.device = first_device(cfg.device_map)
        self.dtype = choose_dtype(cfg.dtype, self.device)
        shape = read_shape(self.weights.folder / CONFIG)
        self.n_layers, self.d_in, self.vocabulary, self.positions = shape
        try:
            self.layer = resolve_layer(layer, self.n_layers)
        except ValueError as error:
            raise UserError(f"{error} for {cfg.name}") from None
        self.hook_name = f"blocks.{self.layer}.{HOOKS[cfg.hook]}"
        self.checks: dict[str, Any] | None = None
        """What was found when it was loaded; None: it was not."""
        self.beside = self._others(also)
        """The same model at the other places; none of them is ever loaded itself."""

    def _others(self, also: Sequence[int | str]) -> list[LanguageModel]:
        found = {self.hook_name: self}
        for layer, hook in map(place_of, also):
            cfg = self.cfg.model_copy(update={"hook": hook or self.cfg.hook})
            try:
                other = LanguageModel(cfg, layer)
            except UserError as error:  # the run that reads it says so, and this one is another
                log.warning(f"store.also: {error}: left out")
                continue
            found.setdefault(other.hook_name, other)
        return list(found.values())[1:]

    def check_length(self, context_size: int) -> None:
        """Raises UserError for contexts longer than the model's table of positions, and warns of
        those longer than it was made for."""
        n = self.positions
        if n is None or context_size <= n:
            return
        said = f"dataset.context_size = {context_size}: {self.cfg.name} has {n} positions"
        if positions_are_learned(self.weights.folder / CONFIG):
            raise UserError(f"{said}; take at most so many")
        log.warning(f"{said}, and was not trained on later ones: what it does there is not its own")

    def check_ids(self, largest: int) -> None:
        """Raises UserError for a token that the model has no embedding of."""
        if largest >= self.vocabulary:
            raise UserError(
                f"token {largest} is beyond the {self.vocabulary} of {self.cfg.name}: the "
                f"tokenizer in {self.weights.folder} is not this model's"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the activations, beside the token ids."""
        weights = self.weights.identity
        found = {
            "weights": f"untrained:{weights}" if self.cfg.untrained else weights,
            "hook": self.hook_name,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.cfg.hook not in ("resid_pre", "resid_post"):
            # Stores made when the bridge gave a block's parts, which for some families are others.
            found["network"] = "transformers"
        return found

    @property
    def content(self) -> str:
        """A name for the weights, by what is in them."""
        return self.weights.identity

    def shown(self, ids_BT: Tensor) -> Tensor:
        """What stands for a token where tokens are counted: its id."""
        return ids_BT

    def texts(self) -> TokenTexts:
        """Tokens as text."""
        return TokenTexts(self.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        folder = self.weights.folder
        if not any((folder / name).is_file() for name in VOCABULARIES):
            # transformers makes an empty tokenizer then, and says nothing.
            raise UserError(f"{folder} has no tokenizer (none of {', '.join(VOCABULARIES)})")
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                tokenizer("tried once")  # settings of another form show only here
                return tokenizer
        # Each class has its own way to fail on a file of another form.
        except Exception as error:
            raise UserError(
                f"no tokenizer can be loaded from {folder}: {first_line(error)}"
            ) from None

    @cached_property
    def special_ids(self) -> SpecialIds:
        tokenizer = self.tokenizer
        own = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        bos = next((i for i in (self.cfg.bos_id, *own) if i is not None), None)
        if bos is None:
            raise UserError(
                f"the tokenizer of {self.cfg.name} has neither bos nor eos: set model.bos_id"
            )
        boundaries = {i for i in (bos, *own) if i is not None}
        pad = {tokenizer.pad_token_id} - {None}
        masked = boundaries | pad | set(self.cfg.extra_masked_ids)
        return SpecialIds(bos=bos, boundaries=frozenset(boundaries), masked=frozenset(masked))

    @cached_property
    def _network(self) -> Network:
        self.check_ids(self.special_ids.bos)
        kind = "untrained, " if self.cfg.untrained else ""
        log.info(f"loading {self.cfg.name} ({kind}{self.dtype}, {self.device})")
        folder = self.weights.folder
        try:
            with quiet():
                placed = self.cfg.device_map
                model = load_model(folder, self.dtype, self.cfg.untrained, placed)
                model = model if placed else model.to(self.device)
                model = model.eval().requires_grad_(False)
        # Files that are damaged, shapes that do not fit, a device that is full, and whatever a
        # family's own code raises for a config of another form.
        except Exception as error:
            raise UserError(
                f"{folder} does not load as a model ({self.dtype}, {self.device}): "
                f"{first_line(error)}"
            ) from error
        with quiet():
            also = [(place.layer, place.cfg.hook) for place in self.beside]
            network, bridge = with_places(
                model, folder, self.tokenizer, self.layer, self.cfg.hook, also
            )
        ids_BT = check_batch(self.vocabulary, self.positions, self.special_ids.bos)
        ids_BT = ids_BT.to(self.device)
        self.checks = try_model(network, bridge, ids_BT, self._hook_point)
        if self.cfg.device_map is not None:
            found = getattr(model, "hf_device_map", {"": self.device})
            self.checks["device_map"] = {name: str(place) for name, place in found.items()}
            log.info(f"{self.cfg.name} is on {', '.join(sorted(set(map(str, found.values()))))}")
        with torch.inference_mode():
            network.check_repeated(ids_BT)
        return network

    @property
    def _hook_point(self) -> HookPoint:
        return HookPoint(self.cfg.name, self.cfg.hook, self.hook_name, self.d_in)

    @torch.inference_mode()
    def activations(self, ids_BT: Tensor) -> Tensor:
        """[B, T, d_in] at the hook point, in the model's dtype; the forward pass ends there."""
        (x_BTD,) = self.activations_at(ids_BT, [self])
        assert x_BTD is not None
        return x_BTD

    @torch.inference_mode()
    def activations_at(
        self, ids_BT: Tensor, places: Sequence[ActivationModel]
    ) -> list[Tensor | None]:
        """[B, T, d_in] at each place, out of this one and `beside`, of one forward pass.

        None for one beside it where something else is than a vector for each token.
        """
        known = [place.hook_name for place in (self, *self.beside)]
        numbers = [known.index(place.hook_name) for place in places]
        found = self._network.activations(ids_BT.to(self.device, torch.long), numbers)
        assert 0 in found or 0 not in numbers, f"the model does not come by {self.hook_name}"
        fits = (*ids_BT.shape, self.d_in)
        return [x if (x := found.get(n)) is not None and x.shape == fits else None for n in numbers]

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, replace: Replace | None = None) -> Tensor:
        """[B, T, vocab]; `replace` maps the hook's activations [B, T, d_in] to their stand-in."""
        return self._network.logits(ids_BT.to(self.device, torch.long), replace)

    @torch.inference_mode()
    def growing(self) -> Growing:
        """For a text to which tokens are added: none that is there already is run again, where
        the family allows it."""
        return Growing(self._network, self._network.keeps_its_past)

    @torch.inference_mode()
    def unembedding(self) -> Tensor | None:
        """[vocab, d_in], through the final norm's weight; None: it is of another width."""
        found = self._network.unembedding()
        if found is None or found.shape[1] != self.d_in:
            return None
        return found[: len(self.tokenizer)]  # rows beyond are there to fill a round number

    def repeated(self, ids_BT: Tensor) -> AbstractContextManager[Logits]:
        """Within it, `logits` of these ids with one stand-in after the other: what comes before the
        hook point is run once."""
        return self._network.repeated(ids_BT.to(self.device, torch.long))
