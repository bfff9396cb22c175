"""SAEs that dictionary_learning trained: ae.pt, or checkpoints/ae_N.pt, and config.json.

The .pt are pickles of tensors, read with torch's weights-only reader, which runs no code of a file.
Written against dictionary_learning 0.1.0 (dictionary.py, utils.py, trainers/).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.files import check_shapes, make, read_object, read_torch, renamed
from tcsae.sae.formats.saelens import with_centred_input

AE_NAME = "ae.pt"
CONFIG_NAME = "config.json"
CHECKPOINTS = "checkpoints"
_IS_AE = re.compile(r"ae(_\w+)?\.pt")
_LAYER = re.compile(r"layer_(\d+)")


class _Form(NamedTuple):
    """How one of their classes is written, and what it is here."""

    architecture: str
    names: dict[str, str]
    """Their tensor names by SAELens' names."""
    scalars: tuple[str, ...] = ()
    """Buffers beside these; older files have none."""


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_dec": "decoder_bias",
    "b_gate": "gate_bias",
    "b_mag": "mag_bias",
    "r_mag": "r_mag",
}
_TOPK = _LINEAR | {"b_dec": "b_dec"}
_FORMS = {
    "AutoEncoder": _Form("standard", _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Form("standard", _LINEAR | {"b_dec": "decoder.bias"}),
    "AutoEncoderTopK": _Form("topk", _TOPK, ("k", "threshold")),
    "BatchTopKSAE": _Form("batchtopk", _TOPK, ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": _Form("matryoshka", _PLAIN, ("k", "threshold", "group_sizes")),
    "JumpReluAutoEncoder": _Form("jumprelu", _PLAIN | {"threshold": "threshold"}),
    "GatedAutoEncoder": _Form("gated", _GATED),
}
_TRAINERS = {
    "StandardTrainer": "AutoEncoder",
    "StandardTrainerAprilUpdate": "AutoEncoder",
    "PAnnealTrainer": "AutoEncoder",
    "GatedSAETrainer": "GatedAutoEncoder",
    "GatedAnnealTrainer": "GatedAutoEncoder",
    "TopKTrainer": "AutoEncoderTopK",
    "BatchTopKTrainer": "BatchTopKSAE",
    "MatryoshkaBatchTopKTrainer": "MatryoshkaBatchTopKSAE",
    "JumpReluTrainer": "JumpReluAutoEncoder",
}
"""What each of their trainers trains; others are taken at their dict_class's word."""
_TRAINING = """
    activation_dim anneal_start auxk_alpha bandwidth decay_start device dict_class dict_size
    ghost_threshold group_fractions group_sizes group_weights k k_anneal_steps l1_penalty layer
    lm_name lr n_sparsity_updates norm_factor p_end p_start resample_steps seed
    sparsity_function sparsity_penalty sparsity_queue_length sparsity_warmup_steps steps
    submodule_name target_l0 threshold_beta threshold_start_step top_k_aux trainer_class
    wandb_name warmup_steps
"""
"""What their trainers write of themselves: beside dict_class nothing that changes the function."""
_WHY_NOT = {
    "IdentityDict": "it has no features: the neurons are given back",
    "CrossCoder": "it reads several layers or models at once",
    "Transcoder": "it gives another place's activations, not those it reads",
}


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Of config.json's trainer: keys that no trainer of theirs writes, as "key=value"."""
    trainer = config["trainer"]
    return [f"{key}={trainer[key]}" for key in sorted(trainer.keys() - {*_TRAINING.split()})]


def find_ae(path: Path) -> Path | None:
    """The file of weights that `path` means: itself, ae.pt in it, or its one checkpoint.

    Raises ValueError if it has several checkpoints and no ae.pt.
    """
    if path.is_file():
        return path if _IS_AE.fullmatch(path.name) else None
    if (path / AE_NAME).is_file():
        return path / AE_NAME
    found = [file for folder in (path, path / CHECKPOINTS) for file in folder.glob("ae_*.pt")]
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in sorted(found))
        raise ValueError(
            f"cannot load the SAE in {path}: it has no {AE_NAME} but several checkpoints: give "
            f"one of {names}"
        )
    return found[0] if found else None


def load_dictionary_learning(path: str | Path) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """(SAE in float32 on the CPU, the content of config.json) of what dictionary_learning saved.

    `path` is a folder with ae.pt, a folder with one checkpoint, or such a file; config.json lies
    beside the file or, of checkpoints/, one folder up.

    Codes and reconstructions are those of their own load_dictionary and encode(x): AutoEncoder
    gets decoder rows of norm 1; AutoEncoderNew and JumpReluAutoEncoder do not subtract b_dec,
    which moves into b_enc; BatchTopK and Matryoshka fire above their stored threshold.

    Raises:
        ValueError, one line that names the folder: a file is missing or damaged, it holds
        anything but tensors, the class is unknown, a tensor is missing, additional or of another
        shape, config.json contradicts itself or the tensors, or it is of a transcoder.
    """
    path = Path(path)
    try:
        file = find_ae(path)
        if file is None:
            raise ValueError(f"it has no {AE_NAME}")
        config = _read_config(file)
        trainer = config["trainer"]
        name = trainer["dict_class"]
        form = _FORMS[name]
        state = read_torch(file)
        tensors = renamed(state, form.names, name, file.name, form.scalars)
        shapes = {ours: list(tensor.shape) for ours, tensor in tensors.items()}
        sizes = trainer.get("activation_dim"), trainer.get("dict_size")
        check_shapes(shapes, *sizes, file.name, "activation_dim {d_in} and dict_size {d_sae}")
        tensors, fields = _converted(tensors, state, trainer, file.name)
        return make(form.architecture, tensors, **fields), config
    except ValueError as error:
        raise ValueError(f"cannot load the SAE in {path}: {error}") from None


def _read_config(file: Path) -> dict[str, Any]:
    folders = (file.parent, file.parent.parent)
    path = next((f / CONFIG_NAME for f in folders if (f / CONFIG_NAME).is_file()), None)
    if path is None:
        raise ValueError(f"there is no {CONFIG_NAME} beside {file.name} nor one folder up")
    config = read_object(path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise ValueError(f"{CONFIG_NAME} has no trainer.dict_class: not dictionary_learning's")
    name, made_by = trainer["dict_class"], trainer.get("trainer_class")
    if name not in list(_FORMS):
        why = next((f" ({why})" for key, why in _WHY_NOT.items() if key in str(name)), "")
        raise ValueError(f"unknown dict_class {name!r}{why}: known are {', '.join(_FORMS)}")
    trained = _TRAINERS.get(made_by, name) if isinstance(made_by, str) else name
    if trained != name:
        raise ValueError(
            f"{CONFIG_NAME}: trainer_class {made_by} trains {trained}, but dict_class is {name}"
        )
    _check_sizes(trainer)
    _check_place(config)
    return config


def _check_sizes(trainer: Mapping[str, Any]) -> None:
    for key in ("activation_dim", "dict_size"):
        value = trainer.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{CONFIG_NAME}: {key} is {value!r}, it must be an integer above 0")


def _check_place(config: Mapping[str, Any]) -> None:
    """What the buffer gave the trainer, and whether config.json agrees with itself on it."""
    trainer, buffer = config["trainer"], config.get("buffer")
    buffer = buffer if isinstance(buffer, dict) else {}
    io = buffer.get("io", "out")
    if io not in ("in", "out"):
        raise ValueError(
            f"{CONFIG_NAME}: buffer.io is {io!r}: a transcoder, which gives a part's output from "
            "its input; only SAEs, which give back what they are given, are measured here"
        )
    width, d_in = buffer.get("d_submodule"), trainer.get("activation_dim")
    if None not in (width, d_in) and width != d_in:
        raise ValueError(
            f"{CONFIG_NAME}: buffer.d_submodule is {width!r}, but trainer.activation_dim {d_in}"
        )
    named = _LAYER.search(str(trainer.get("submodule_name")))
    layer = trainer.get("layer")
    if named and type(layer) is int and int(named[1]) != layer:
        raise ValueError(
            f"{CONFIG_NAME}: layer is {layer}, but submodule_name {trainer['submodule_name']}"
        )


def _converted(
    tensors: dict[str, Tensor], state: Mapping[str, Any], trainer: Mapping[str, Any], file: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration fields) that compute the same in our form."""
    fields: dict[str, Any] = {}
    d_sae = tensors["W_enc"].shape[1]
    convert = _CONVERSIONS.get(trainer["dict_class"])
    if convert is not None:
        tensors = convert(tensors)
    if "k" in _FORMS[trainer["dict_class"]].scalars:
        fields["k"] = _k(state, trainer, file)
    if trainer["dict_class"] in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        if "threshold" not in state or state["threshold"].numel() != 1:
            raise ValueError(f"{file}: threshold missing: tokens cannot be encoded one by one")
        # Before training has set it, it is -1, and the ReLU before it lets all above 0 through.
        threshold = max(state["threshold"].item(), 0.0)
        tensors = tensors | {"threshold": torch.full((d_sae,), threshold)}
    if trainer["dict_class"] == "MatryoshkaBatchTopKSAE":
        fields["group_fractions"] = _group_fractions(state, trainer, d_sae, file)
    return tensors, fields


def _with_unit_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decoder rows of norm 1, their norms in the encoder: what AutoEncoder.from_pretrained does."""
    norm_F = tensors["W_dec"].norm(dim=1)
    return tensors | {
        "W_dec": tensors["W_dec"] / norm_F[:, None],
        "W_enc": tensors["W_enc"] * norm_F,
        "b_enc": tensors["b_enc"] * norm_F,
    }


_CONVERSIONS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "AutoEncoder": _with_unit_decoder,
    "AutoEncoderNew": with_centred_input,
    "JumpReluAutoEncoder": with_centred_input,
}


def _k(state: Mapping[str, Tensor], trainer: Mapping[str, Any], file: str) -> int:
    known = {int(state["k"].item())} if "k" in state and state["k"].numel() == 1 else set()
    known |= {trainer["k"]} if isinstance(trainer.get("k"), int) else set()
    if len(known) != 1:
        said = " and ".join(map(str, sorted(known))) or "missing"
        raise ValueError(f"k is {said} in {file} and {CONFIG_NAME}: it must be one number")
    return known.pop()


def _group_fractions(
    state: Mapping[str, Tensor], trainer: Mapping[str, Any], d_sae: int, file: str
) -> tuple[float, ...]:
    sizes = state["group_sizes"].tolist() if "group_sizes" in state else []
    if not isinstance(sizes, list) or sum(sizes) != d_sae:
        raise ValueError(f"{file}: group_sizes {sizes} do not add up to {d_sae} features")
    told = trainer.get("group_sizes")
    if isinstance(told, list) and told != sizes:
        raise ValueError(f"group_sizes are {sizes} in {file}, but {told} in {CONFIG_NAME}")
    # A little above the quotient, so that rounding down gives the size back.
    return tuple((size + 1e-6) / d_sae for size in sizes)
