"""SAEs that dictionary_learning trained: ae.pt and config.json in a folder.

ae.pt is a pickle of tensors. It is read with torch's weights-only reader, which runs no code of
the file. Written against dictionary_learning 0.1.0 (dictionary.py, utils.py, trainers/).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.saelens import with_centred_input
from tcsae.sae.registry import sae_class

AE_NAME = "ae.pt"
CONFIG_NAME = "config.json"


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


def load_dictionary_learning(folder: str | Path) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """(SAE in float32 on the CPU, the content of config.json) of dictionary_learning's folder.

    Codes and reconstructions are those of their own load_dictionary and encode(x): AutoEncoder
    gets decoder rows of norm 1; AutoEncoderNew and JumpReluAutoEncoder do not subtract b_dec,
    which moves into b_enc; BatchTopK and Matryoshka fire above their stored threshold.

    Raises:
        ValueError, one line that names the folder: a file is missing or damaged, ae.pt holds
        anything but tensors, the class is unknown, a tensor is missing, additional or of another
        shape.
    """
    folder = Path(folder)
    try:
        config = _read_config(folder)
        trainer = config["trainer"]
        form = _FORMS[trainer["dict_class"]]
        state = _read_state(folder / AE_NAME)
        tensors = _renamed(state, form, trainer["dict_class"])
        _check_shapes(tensors, trainer)
        tensors, fields = _converted(tensors, state, trainer)
        chosen = sae_class(form.architecture)
        cfg = chosen.config_class(architecture=form.architecture, **fields)
    except ValidationError as error:
        said = "; ".join(e["msg"] for e in error.errors())
        raise ValueError(f"cannot load the SAE in {folder}: {said}") from None
    except ValueError as error:
        raise ValueError(f"cannot load the SAE in {folder}: {error}") from None
    # A generator of its own: loading must not advance torch's.
    sae = chosen(cfg, len(tensors["b_dec"]), torch.Generator())
    sae.load_saelens({}, tensors)
    return sae, config


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"it has no {CONFIG_NAME} beside {AE_NAME}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG_NAME} is not JSON ({error})") from None
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise ValueError(f"{CONFIG_NAME} has no trainer.dict_class: not dictionary_learning's")
    if trainer["dict_class"] not in list(_FORMS):
        raise ValueError(
            f"unknown dict_class {trainer['dict_class']!r}: known are {', '.join(_FORMS)}"
        )
    return config


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"it has no {AE_NAME}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol; it is refused or read
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(
            f"{AE_NAME} is not a plain file of tensors (it may hold code): refused, nothing in it "
            "was run"
        ) from None
    except Exception as error:  # a damaged file makes torch's reader stumble in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{AE_NAME} is damaged ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{AE_NAME} holds more than tensors: not dictionary_learning's weights")
    return dict(state)


def _renamed(state: Mapping[str, Tensor], form: _Form, dict_class: str) -> dict[str, Tensor]:
    """The tensors under SAELens' names, matrices turned its way, float32."""
    missing = sorted(set(form.names.values()) - state.keys())
    additional = sorted(state.keys() - set(form.names.values()) - set(form.scalars))
    if missing or additional:
        parts = [f"{', '.join(missing)} missing"] if missing else []
        parts += [f"{', '.join(additional)} not expected"] if additional else []
        raise ValueError(f"{AE_NAME}: {'; '.join(parts)} ({dict_class})")
    integers = [name for name in form.names.values() if not state[name].is_floating_point()]
    if integers:
        raise ValueError(f"{AE_NAME}: {integers[0]} is {state[integers[0]].dtype}")
    found = {ours: state[name].float() for ours, name in form.names.items()}
    turned = [ours for ours, name in form.names.items() if name.endswith(".weight")]
    # torch.nn.Linear keeps [out, in]; a tensor that is no matrix is refused by its shape later.
    return found | {ours: found[ours].transpose(0, -1).contiguous() for ours in turned}


def _check_shapes(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> None:
    shape = list(tensors["W_enc"].shape)
    if len(shape) != 2:
        raise ValueError(f"{AE_NAME}: the encoder's weights are {shape}, not a matrix")
    d_in, d_sae = trainer.get("activation_dim", shape[0]), trainer.get("dict_size", shape[1])
    wanted = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    for name, tensor in tensors.items():
        expected = wanted.get(name, [d_sae])
        if list(tensor.shape) != expected:
            raise ValueError(
                f"{AE_NAME}: {name} is {list(tensor.shape)}, but activation_dim {d_in} and "
                f"dict_size {d_sae} ask for {expected}"
            )


def _converted(
    tensors: dict[str, Tensor], state: Mapping[str, Tensor], trainer: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration fields) that compute the same in our form."""
    fields: dict[str, Any] = {"d_sae": tensors["W_enc"].shape[1]}
    convert = _CONVERSIONS.get(trainer["dict_class"])
    if convert is not None:
        tensors = convert(tensors)
    if "k" in _FORMS[trainer["dict_class"]].scalars:
        fields["k"] = _k(state, trainer)
    if trainer["dict_class"] in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        if "threshold" not in state or state["threshold"].numel() != 1:
            raise ValueError(f"{AE_NAME}: threshold missing: tokens cannot be encoded one by one")
        # Before training has set it, it is -1, and the ReLU before it lets all above 0 through.
        threshold = max(state["threshold"].item(), 0.0)
        tensors = tensors | {"threshold": torch.full((fields["d_sae"],), threshold)}
    if trainer["dict_class"] == "MatryoshkaBatchTopKSAE":
        fields["group_fractions"] = _group_fractions(state, fields["d_sae"])
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


def _k(state: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> int:
    known = {int(state["k"].item())} if "k" in state and state["k"].numel() == 1 else set()
    known |= {trainer["k"]} if isinstance(trainer.get("k"), int) else set()
    if len(known) != 1:
        said = " and ".join(map(str, sorted(known))) or "missing"
        raise ValueError(f"k is {said} in {AE_NAME} and {CONFIG_NAME}: it must be one number")
    return known.pop()


def _group_fractions(state: Mapping[str, Tensor], d_sae: int) -> tuple[float, ...]:
    sizes = state["group_sizes"].tolist() if "group_sizes" in state else []
    if not isinstance(sizes, list) or sum(sizes) != d_sae:
        raise ValueError(f"{AE_NAME}: group_sizes {sizes} do not add up to {d_sae} features")
    # A little above the quotient, so that rounding down gives the size back.
    return tuple((size + 1e-6) / d_sae for size in sizes)
