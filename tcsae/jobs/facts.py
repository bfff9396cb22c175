"""What the files of an SAE from elsewhere say of where and how it was trained.

Every library's words come under SAELens' names, so that `tcsae.jobs.cautions` reads one kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.data.language_model import HOOKS
from tcsae.sae.formats import dictionary_learning, sparsify
from tcsae.sae.formats.known import LoadedSAE

RUNNER_NAME = "runner_cfg.json"
"""Of SAELens 6: the whole configuration of the training, beside the SAE."""
# Facts that no library has a name for.
WITHOUT_METADATA = "cfg.json without metadata, as before SAELens 6"
ONE_THRESHOLD = "one threshold for all features"
TRAINED_ON = "normalize_activations in training"
UNKNOWN = "keys that are not known"

# A block, by its path in transformers' models, and what libraries call its places.
_BLOCK = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d+)")
_LAYER = re.compile(r"layer_(\d+)")
_GEMMA_SCOPE = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)")
_GEMMA_PLACES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_OPENAI = re.compile(r"([a-z_]+?)(?:_v\d\w*)?/autoencoders/(\d+)\.pt")
_OPENAI_PLACES = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "mlp_post_act": "mlp.hook_post",
}


@dataclass(frozen=True)
class Facts:
    """What an SAE says of where it was trained; None and {} where it does not."""

    model: str | None = None
    hook_name: str | None = None
    context_size: int | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    """All that is said of the training, by SAELens' names, whatever its type."""
    own: Mapping[str, Any] | None = None
    """The whole config of the run that trained it, if that was one of this package."""


def part(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _of(kind: type, value: Any) -> Any:
    return value if type(value) is kind else None


def facts_of(found: LoadedSAE) -> Facts:
    """By the words of the library that wrote it."""
    path = found.weights.absolute()
    match found.library:
        case "dictionary_learning":
            return dictionary_learning_facts(found.cfg)
        case "sparsify":
            return sparsify_facts(path)
        case "Gemma Scope":
            return gemma_scope_facts(path)
        case "OpenAI":
            return openai_facts(path)
    return saelens_facts(found.cfg, found.weights, found.sae.saelens_state().tensors)


def saelens_facts(cfg: Mapping[str, Any], weights: Path, tensors: Mapping[str, Tensor]) -> Facts:
    """Of a SAELens folder: cfg.json's content, what stands in runner_cfg.json beside the file of
    weights, and what the tensors (by SAELens' names) tell."""
    metadata = part(cfg, "metadata")
    # Before version 6 SAELens had no metadata: everything was at the top.
    said = {
        **_runner(weights.with_name(RUNNER_NAME)),
        **part(metadata, "training_architecture_details"),
        **cfg,
        **{k: v for k, v in metadata.items() if v is not None},
        WITHOUT_METADATA: "metadata" not in cfg,
        ONE_THRESHOLD: one_threshold(tensors.get("threshold")),
    }
    # Trained on transformers' own model, SAELens has the path of a module for a hook.
    block = _BLOCK.fullmatch(str(said.get("hook_name")))
    if block:
        said["hook_name"] = f"blocks.{block[1]}.hook_resid_post"
    own = part(metadata, "tcsae")
    own = own if {"model", "dataset"} <= own.keys() else {}
    if own and part(own, "dataset").get("source") == "files":
        said.pop("dataset_path", None)  # a path means nothing on another machine
    return Facts(
        model=_of(str, said.get("model_name")),
        hook_name=_of(str, said.get("hook_name")),
        context_size=_of(int, said.get("context_size")),
        said=said,
        own=own or None,
    )


def _object(path: Path) -> dict[str, Any]:
    """Of a JSON file beside the SAE; {} without the file, or for one that is anything else."""
    try:
        content = read_json(path) if path.is_file() else None
    except UserError:
        content = None
    return content if isinstance(content, dict) else {}


def _runner(path: Path) -> dict[str, Any]:
    """What SAELens' runner was told."""
    content = _object(path)
    sae = part(content, "sae")
    return {**content, **sae, TRAINED_ON: sae.get("normalize_activations")}


def one_threshold(threshold_F: Tensor | None) -> bool:
    """Whether all features have the same one, as BatchTopK leaves it when saved as JumpReLU."""
    if threshold_F is None or len(threshold_F) < 2:
        return False
    return bool(threshold_F[0] > 0 and (threshold_F == threshold_F[0]).all())


def dictionary_learning_facts(config: Mapping[str, Any]) -> Facts:
    trainer = part(config, "trainer")
    layer, place = trainer.get("layer"), str(trainer.get("submodule_name"))
    hook = next((hook for hook in HOOKS if place.startswith(hook)), None)
    name = f"blocks.{layer}.{HOOKS[hook]}" if hook and type(layer) is int else None
    buffer = part(config, "buffer")
    if buffer.get("io") == "in":
        name = f"the input of {name or place}"
    return Facts(
        model=_of(str, trainer.get("lm_name")),
        hook_name=name,
        context_size=_of(int, buffer.get("ctx_len")),
        said={UNKNOWN: dictionary_learning.unknown_keys({"trainer": trainer})},
    )


def sparsify_facts(weights: Path) -> Facts:
    """Of a folder that is named after its module, in one that has the run's configuration."""
    run, module = _object(weights.parent.parent / sparsify.RUN_NAME), weights.parent.name
    block = _BLOCK.fullmatch(module)
    # What a block's parts give is not in all families what their hooks are.
    named = f"the output of {module}" if "." in module else None
    return Facts(
        model=_of(str, run.get("model")),
        hook_name=f"blocks.{block[1]}.hook_resid_post" if block else named,
        context_size=_of(int, run.get("ctx_len")),
        said={
            "dataset_path": run.get("dataset"),
            "exclude_special_tokens": run.get("exclude_tokens"),
            "sequence_separator_token": "eos",
        },
    )


def gemma_scope_facts(weights: Path) -> Facts:
    """By the path, as the hub has it: gemma-scope-2b-pt-res/layer_20/width_16k/..."""
    release, layer = _GEMMA_SCOPE.search(str(weights)), _LAYER.search(str(weights.parent))
    if release is None or layer is None:
        return Facts()
    size, tuned, place = release.groups()
    return Facts(
        model=f"google/gemma-2-{size}" + ("-it" if tuned == "it" else ""),
        hook_name=f"blocks.{layer[1]}.{_GEMMA_PLACES[place]}",
        context_size=1024,
    )


def openai_facts(weights: Path) -> Facts:
    """By the path, as theirs are: gpt2-small/resid_delta_mlp/autoencoders/8.pt"""
    found = _OPENAI.search(weights.as_posix())
    if found is None:
        return Facts()
    place, layer = found.groups()
    hook = _OPENAI_PLACES.get(place, place)
    return Facts(
        model="gpt2" if "gpt2-small" in weights.parts else None,
        hook_name=f"blocks.{layer}.{hook}",
        context_size=64,
    )
