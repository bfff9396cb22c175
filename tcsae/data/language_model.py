"""The language model: its tokenizer, its shape and its activations.

Its weights are in two networks that share them: transformers' own, whose attention is one kernel,
for activations of the residual stream, and the TransformerLens bridge around a second tree of
modules, which has a hook at every part, for everything else.
"""

from __future__ import annotations

import copy
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.config import ModelConfig, resolve_layer
from tcsae.data.contexts import SpecialIds
from tcsae.data.weights import find_weights, quiet

log = logging.getLogger(__name__)

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}


def bfloat16_is_native(device: str) -> bool:
    """Whether this device multiplies bfloat16 faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def choose_device(wanted: str) -> str:
    """The device that `wanted` names; auto: a GPU if there is one. UserError if it is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"model.device = {wanted}: not usable here ({_first_line(error)}): take auto or cpu"
        ) from None
    return wanted


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    if wanted == "auto":
        wanted = "bfloat16" if bfloat16_is_native(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class _Shape(NamedTuple):
    n_layers: int
    d_in: int
    vocabulary: int
    positions: int | None
    """As many as the model was made for; None: the config does not say."""
    positions_are_learned: bool
    """One vector for each: there is none for a later position."""


_SHAPE_KEYS = (
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    ("hidden_size", "n_embd", "d_model", "dim"),
    ("vocab_size",),
)


def _read_shape(path: Path) -> _Shape:
    """From a config.json, whose keys differ between families of models."""
    config = read_json(path)
    config = config.get("text_config", config)
    found = []
    for keys in _SHAPE_KEYS:
        values = [config[key] for key in keys if isinstance(config.get(key), int)]
        if not values:
            raise UserError(f"{path} has none of {', '.join(keys)}: it is no decoder's config")
        found.append(values[0])
    of_positions = (config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx"))
    positions = next((n for n in of_positions if isinstance(n, int)), None)
    # What rotates, or weighs by distance, has a value at any position.
    is_open = any(key.startswith(("rope", "rotary", "alibi", "partial_rotary")) for key in config)
    n_layers, d_in, vocabulary = found
    is_learned = positions is not None and not is_open
    return _Shape(n_layers, d_in, vocabulary, positions, is_learned)


class _Reached(Exception):
    """The forward pass has come to the activations that were wanted."""

    def __init__(self, activation: Tensor) -> None:
        self.activation = activation


class LanguageModel:
    """A language model that is loaded when it is first run; its tokenizer and shape come earlier.

    Args:
        cfg: the model's config.
        layer: the block, as the config names it.

    Raises:
        UserError: no such weights, no such layer, a folder that does not load.
    """

    def __init__(self, cfg: ModelConfig, layer: int | str | None) -> None:
        self.cfg = cfg
        self.weights = find_weights(cfg)
        self.device = choose_device(cfg.device)
        self.dtype = choose_dtype(cfg.dtype, self.device)
        shape = _read_shape(self.weights.folder / "config.json")
        self.n_layers, self.d_in, self.vocabulary = shape.n_layers, shape.d_in, shape.vocabulary
        self.positions, self.positions_are_learned = shape.positions, shape.positions_are_learned
        try:
            self.layer = resolve_layer(layer, self.n_layers)
        except ValueError as error:
            raise UserError(f"{error} for {cfg.name}") from None
        self.hook_name = f"blocks.{self.layer}.{HOOKS[cfg.hook]}"

    def check_length(self, context_size: int) -> None:
        """Raises UserError for contexts longer than the model's table of positions, and warns of
        those longer than it was made for."""
        n = self.positions
        if n is None or context_size <= n:
            return
        said = f"dataset.context_size = {context_size}: {self.cfg.name} has {n} positions"
        if self.positions_are_learned:
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
        return {
            "weights": f"untrained:{weights}" if self.cfg.untrained else weights,
            "hook": self.hook_name,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        folder = self.weights.folder
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            # transformers makes an empty tokenizer then, and says nothing.
            raise UserError(f"{folder} has no tokenizer (none of {', '.join(_VOCABULARIES)})")
        try:
            with quiet():
                return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"no tokenizer can be loaded from {folder}: {_first_line(error)}"
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
    def _networks(self) -> tuple[Any, Any]:
        """transformers' own model and the TransformerLens bridge, sharing tensors on `device`."""
        from safetensors import SafetensorError
        from transformer_lens.model_bridge import TransformerBridge

        kind = "untrained, " if self.cfg.untrained else ""
        log.info(f"loading {self.cfg.name} ({kind}{self.dtype}, {self.device})")
        folder = str(self.weights.folder)
        # RuntimeError: shapes that do not fit, a device that is not there or is full.
        expected = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
        try:
            with quiet():
                model = self._untrained() if self.cfg.untrained else self._trained()
                model = model.to(self.device).eval().requires_grad_(False)
                weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
                own = copy.deepcopy(model, weights)  # modules are copied, tensors are not
                bridge = TransformerBridge.boot_transformers(
                    folder,
                    hf_model=model,
                    tokenizer=self.tokenizer,
                    device=self.device,
                    dtype=self.dtype,
                )
        except expected as error:
            raise UserError(
                f"{folder} does not load as a model ({self.dtype}, {self.device}): "
                f"{_first_line(error)}"
            ) from error
        return own, bridge.eval().requires_grad_(False)

    @property
    def bridge(self) -> Any:
        """The TransformerLens bridge."""
        return self._networks[1]

    def _trained(self) -> Any:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(self.weights.folder),
            dtype=self.dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, found = loaded
        if found["missing_keys"]:
            # transformers fills them with random numbers and only warns.
            raise ValueError(f"it has no weights for {sorted(found['missing_keys'])[0]}")
        return model

    def _untrained(self) -> Any:
        """The architecture at its random start: the same weights for everybody."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(str(self.weights.folder))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).to(self.dtype)

    @torch.inference_mode()
    def activations(self, ids_BT: Tensor) -> Tensor:
        """[B, T, d_in] at the hook point, in the model's dtype; the forward pass ends there.

        The residual stream is taken from transformers' own model: the bridge makes attention in
        many kernels, so that each part has a hook, which takes a quarter longer. Both are the same
        up to rounding. Its parts, attn_out and mlp_out, are not modules of every model: the bridge
        knows where they are.
        """
        ids_BT = ids_BT.to(self.device, torch.long)
        try:
            if self.cfg.hook not in ("resid_pre", "resid_post"):
                self._at_hook_point(ids_BT)
            else:
                self._at_block(ids_BT)
        except _Reached as reached:
            return reached.activation
        raise AssertionError(f"the forward pass does not come by {self.hook_name}")

    def _at_block(self, ids_BT: Tensor) -> None:
        """Raises _Reached with what goes into the block, or comes out of it."""
        own, bridge = self._networks
        block = own.get_submodule(bridge.blocks[self.layer].name)

        def before(block: Any, args: Any, named: Any) -> None:
            raise _Reached(args[0] if args else named["hidden_states"])

        def after(block: Any, args: Any, out: Any) -> None:
            raise _Reached(out[0] if isinstance(out, tuple) else out)

        if self.cfg.hook == "resid_pre":
            handle = block.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = block.register_forward_hook(after)
        with handle:
            own(ids_BT, use_cache=False)

    def _at_hook_point(self, ids_BT: Tensor) -> None:
        """Raises _Reached with what comes by the bridge's hook point."""

        def stop(activation: Tensor, hook: Any) -> None:
            raise _Reached(activation)

        # run_with_hooks resolves the names of all hooks at every call.
        point = self.bridge.hook_dict[self.hook_name]
        point.add_hook(stop, level=1)
        try:
            self.bridge(ids_BT)
        finally:
            point.remove_hooks("fwd", level=1)

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, replace: Any = None) -> Tensor:
        """[B, T, vocab]; `replace` maps the hook's activations [B, T, d_in] to their stand-in."""
        ids_BT = ids_BT.to(self.device, torch.long)
        if replace is None:
            return self.bridge(ids_BT)
        hooks = [(self.hook_name, lambda activation, hook: replace(activation))]
        return self.bridge.run_with_hooks(ids_BT, fwd_hooks=hooks)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
