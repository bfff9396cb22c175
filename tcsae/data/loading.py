"""transformers' model from a folder: what its files lack, or have too much, is not passed by.

No code of a folder is ever run (trust_remote_code=False), and no pickle is read.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tcsae.base.errors import UserError, first_line
from tcsae.data.network import Network, find_place, module_paths

log = logging.getLogger(__name__)

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}


def load_model(
    folder: Path,
    dtype: torch.dtype,
    untrained: bool,
    device_map: str | Mapping[str, str] | None = None,
) -> Any:
    """transformers' model, on the CPU or where `device_map` says. Raises what transformers raises,
    or ValueError."""
    return _untrained(folder, dtype) if untrained else _trained(folder, dtype, device_map)


def _trained(folder: Path, dtype: torch.dtype, device_map: str | Mapping[str, str] | None) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        device_map=device_map,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        trust_remote_code=False,
    )
    model, found = loaded
    for key, there, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{key} is {tuple(there)} in its weights and {tuple(wanted)} by config.json: they do "
            "not belong together"
        )
    _check_keys(model, found["missing_keys"], found["unexpected_keys"])
    if device_map is not None:
        _check_places(model, device_map)
    return model


def _check_places(model: Any, device_map: str | Mapping[str, str]) -> None:
    """Raises ValueError for a map that is not of this model, or that its devices do not hold."""
    if not isinstance(device_map, str):
        modules = dict(model.named_modules())
        if strange := [name for name in device_map if name not in modules]:
            raise ValueError(
                f"model.device_map: {strange[0]} is no module of it (there are "
                f"{', '.join(name for name, _ in model.base_model.named_children())}, ...)"
            )
        starts = tuple(f"{name}." if name else "" for name in device_map)
        left = [name for name, _ in model.named_parameters() if not name.startswith(starts)]
        if left:
            raise ValueError(f"model.device_map says nothing of {left[0]}")
    if away := [name for name, value in model.named_parameters() if value.is_meta]:
        raise ValueError(
            f"model.device_map: the devices have no room for {away[0]}{_others(away)}, and what "
            "is kept elsewhere is not read: take more GPUs, or a smaller model.dtype"
        )


_COMPUTED = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", "position_ids")
"""Tables that old files hold beside the weights: masks and angles, which every class makes."""


def _check_keys(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError for weights that transformers makes up, or leaves out, with a warning."""
    if missing := sorted(missing):
        raise ValueError(f"it has no weights for {missing[0]}")
    extra = sorted(key for key in unexpected if not key.endswith(_COMPUTED))
    inside = [key for key in extra if _is_part(model, key)]
    if inside:
        raise ValueError(
            f"its weights hold {inside[0]}{_others(inside)}, which config.json has no place for: "
            "they do not belong together (another config, an adapter that is not merged?)"
        )
    if extra:
        log.warning(
            f"left out: {extra[0]}{_others(extra)}, which {type(model).__name__} has no place for"
        )
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and None not in ends and ends[0].weight is not ends[1].weight:
        log.warning(
            "config.json ties the embeddings of input and output (tie_word_embeddings), and the "
            "weights have two that differ: both are used, each in its place"
        )


def _others(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _is_part(model: Any, key: str) -> bool:
    """Whether it is of a part of the language model, not of a head or a tower beside it."""
    if "lora_" in key or key.startswith("base_model."):
        return True
    names = {name for name, _ in (*model.named_children(), *model.base_model.named_children())}
    return key.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in names


def _untrained(folder: Path, dtype: torch.dtype) -> Any:
    """The architecture at its random start: the same weights for everybody."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model.to(dtype)


def with_places(
    model: Any,
    folder: Path,
    tokenizer: Any,
    layer: int,
    hook: str,
    also: Sequence[tuple[int, str]],
) -> tuple[Network, Any]:
    """The network with its place for `hook` and those of `also` (layer, hook), None where there is
    no such part; and TransformerLens' bridge on the same tensors.

    Raises UserError where TransformerLens does not know the family, or the block has no such part.
    """
    from transformer_lens.model_bridge import TransformerBridge

    weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
    own = copy.deepcopy(model, weights)  # modules are copied, tensors are not
    paths = module_paths(model)
    family = model.config.model_type
    try:
        bridge = TransformerBridge.boot_transformers(
            str(folder),
            hf_model=model,
            tokenizer=tokenizer,
            device=model.device,
            dtype=model.dtype,
            trust_remote_code=False,
        )
    # Each family has code of its own there, which raises whatever does not fit.
    except Exception as error:
        raise UserError(
            f"TransformerLens, which knows where the parts of a model are, has no map of {family} "
            f"({first_line(error).split('. ')[0][:200]}): give a model of another family"
        ) from error
    bridge = bridge.eval().requires_grad_(False)
    there = {name: find_place(bridge, paths, layer, point) for name, point in HOOKS.items()}
    if there[hook] is None:
        known = [name for name, place in there.items() if place is not None]
        raise UserError(
            f"model.hook = {hook}: block {layer} of {family} has no such part; it has "
            f"{', '.join(known) or 'none of the hooks'}"
        )
    others = [find_place(bridge, paths, block, HOOKS[name]) for block, name in also]
    return Network(own, [there[hook], *others]), bridge


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries' progress bars and warnings about what is intended."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    lens = logging.getLogger("transformer_lens")
    lens_before = lens.level
    lens.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if not sys.stderr.isatty():
                # The bar of a conversion obeys no setting, and in a log it is one long line.
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        transformers.utils.logging.set_verbosity(before)
        lens.setLevel(lens_before)
