"""SAEs on disk as SAELens 6 keeps them: cfg.json and sae_weights.safetensors in a folder.

Nothing is ever unpickled: only safetensors files are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tcsae.base.files import atomic, make_folder, write_json
from tcsae.config.sae import architectures
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.files import Shapes, read_safetensors, safetensors_shapes
from tcsae.sae.formats.saelens_cfg import CFG_NAME, understood
from tcsae.sae.registry import sae_class

WEIGHTS_NAME = "sae_weights.safetensors"
SAE_LENS_VERSION = "6.54.12"  # the version whose format this is; below 6 SAELens converts the cfg

METADATA_DEFAULTS: dict[str, Any] = {
    "sae_lens_version": SAE_LENS_VERSION,
    "sae_lens_training_version": None,
    "model_name": None,
    "hook_name": None,
    "context_size": None,
    "prepend_bos": True,
    "hook_head_index": None,
    "model_from_pretrained_kwargs": {},
    "seqpos_slice": [None],
    "exclude_special_tokens": True,
    "dataset_path": None,
}

_OUR_NAMES = {"temporal": "tfa"}
"""Architectures that have another name in SAELens."""


def save_saelens(
    folder: str | Path, sae: SparseAutoencoder, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `sae` so that SAELens 6 and `load_saelens` read it; float32, on the CPU.

    `metadata` goes over METADATA_DEFAULTS: model_name, hook_name and whatever else is JSON; the
    training configuration belongs under its key "tcsae", where the SAE's own configuration is
    added as ["tcsae"]["sae"]. Both files are replaced atomically, the weights first: a folder
    with a new cfg.json is whole. Fold the input's scale before saving.
    """
    folder = make_folder(Path(folder))
    state = sae.saelens_state()
    given = dict(metadata or {})
    own = {**given.pop("tcsae", {}), "sae": sae.cfg.model_dump(mode="json")}
    cfg = {
        "architecture": state.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **state.cfg,
        "metadata": {
            **METADATA_DEFAULTS,
            "training_architecture": sae.cfg.architecture,
            **given,
            "tcsae": own,
        },
    }
    json.dumps(cfg, allow_nan=False)  # what cannot be written must fail before the weights change
    _write_weights(folder / WEIGHTS_NAME, state.tensors)
    write_json(folder / CFG_NAME, cfg)


def load_saelens(folder: str | Path) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """(SAE in float32 on the CPU, the content of cfg.json) of a SAELens folder, ours or not.

    Raises:
        ValueError, one line that names the folder: a file is missing, cfg.json is not JSON or
        not SAELens', the architecture is unknown or uses options that are not computed here,
        the weights are a pickle or damaged, a tensor is missing, additional or of another shape.
    """
    folder = Path(folder)
    try:
        cfg = _read_cfg(folder)
        path = folder / WEIGHTS_NAME
        # The header first: shapes that do not fit are refused before anything is loaded.
        shapes = _modern_names(safetensors_shapes(path))
        _check_width(cfg, shapes)
        sae = empty_sae(cfg)
        _check_shapes(shapes, sae)
        tensors = _modern(cfg, read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"cannot load the SAE in {folder}: {error}") from None
    if not cfg.get("apply_b_dec_to_input", True):
        tensors = with_centred_input(tensors)
    sae.load_saelens(cfg, tensors)
    return sae, cfg


def with_centred_input(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of x that `tensors` (SAELens' names) are, as the same one of x - b_dec.

    x @ W_enc + b = (x - b_dec) @ W_enc + (b + b_dec @ W_enc); the gated magnitudes' projection
    is multiplied by exp(r_mag) before their bias, and so is the shift. In float64.
    """
    out = dict(tensors)
    shift_F = tensors["b_dec"].double() @ tensors["W_enc"].double()
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in tensors:
            gain = tensors["r_mag"].double().exp() if name == "b_mag" else 1.0
            out[name] = (tensors[name].double() + shift_F * gain).float()
    return out


def _write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    plain = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    with atomic(path) as temporary:
        # save_file would make a file that only its owner may read.
        temporary.write_bytes(save(plain))


def _read_cfg(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    path = folder / CFG_NAME
    if not path.is_file():
        raise ValueError(f"it has no {CFG_NAME}")
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CFG_NAME} is not JSON ({error})") from None
    if not isinstance(cfg, dict):
        raise ValueError(f"{CFG_NAME} has no architecture, d_in, d_sae: it is not SAELens' format")
    return understood(cfg)


def empty_sae(cfg: Mapping[str, Any]) -> SparseAutoencoder:
    """An SAE of the class and shape that cfg.json names."""
    metadata = cfg.get("metadata")
    own = metadata.get("tcsae") if isinstance(metadata, dict) else None
    stored = own.get("sae") if isinstance(own, dict) else None
    # An export may go under another name (batchtopk as jumprelu); ours says what it was.
    stored = stored if isinstance(stored, dict) else {"architecture": cfg["architecture"]}
    architecture = stored.get("architecture")
    if isinstance(architecture, str) and architecture in _OUR_NAMES:
        architecture = _OUR_NAMES[architecture]
        stored = {**stored, "architecture": architecture}
    if not isinstance(architecture, str) or architecture not in architectures():
        raise ValueError(
            f"unknown architecture {architecture!r}: known are {', '.join(architectures())}"
        )
    chosen = sae_class(architecture)
    try:
        fields = {**stored, **chosen.saelens_fields(cfg)}
        # By way of JSON, because strict validation takes JSON's lists for tuples only there.
        config = chosen.config_class.model_validate_json(json.dumps(fields))
    except KeyError as error:
        raise ValueError(f"{CFG_NAME} has no {error.args[0]}") from None
    except ValidationError as error:
        broken = (
            f"{'.'.join(map(str, e['loc'])) or 'sae'}={e['input']!r}: {e['msg']}"
            for e in error.errors()
        )
        raise ValueError(f"{CFG_NAME}: {'; '.join(broken)}") from None
    # A generator of its own: loading must not advance torch's.
    return chosen(config, cfg["d_in"], torch.Generator())


def _modern_names(shapes: Shapes) -> Shapes:
    """Those that `_modern` leaves."""
    found = {name: shape for name, shape in shapes.items() if name != "scaling_factor"}
    if "log_threshold" in found and "threshold" not in found:
        found["threshold"] = found.pop("log_threshold")
    return found


def _modern(cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of SAELens 2 to 5 as those of 6: a scaling factor that scales nothing goes, a
    logarithm of the threshold becomes one."""
    found = dict(tensors)
    factor = found.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise ValueError(
            f"{WEIGHTS_NAME}: scaling_factor is not 1 everywhere (finetuning_scaling_factor="
            f"{cfg.get('finetuning_scaling_factor')!r}), which is not computed here: multiply "
            "W_dec's rows by it and leave it out"
        )
    if integers := [name for name, tensor in found.items() if not tensor.is_floating_point()]:
        name = integers[0]
        raise ValueError(f"{WEIGHTS_NAME}: {name} is {found[name].dtype}, not floating point")
    if "log_threshold" in found and "threshold" not in found:
        found["threshold"] = found.pop("log_threshold").float().exp()
    return found


def _check_width(cfg: Mapping[str, Any], shapes: Shapes) -> None:
    """Before an SAE of the size that cfg.json names is made: it may be any number."""
    wanted = [cfg["d_sae"], cfg["d_in"]]
    if "W_dec" not in shapes:
        raise ValueError(f"{WEIGHTS_NAME}: W_dec missing (architecture {cfg['architecture']})")
    shape = shapes["W_dec"]
    if shape != wanted:
        raise ValueError(
            f"{WEIGHTS_NAME}: W_dec is {shape}, but d_in {cfg['d_in']} and d_sae {cfg['d_sae']} "
            f"in {CFG_NAME} ask for {wanted}"
        )


def _check_shapes(shapes: Shapes, sae: SparseAutoencoder) -> None:
    expected = sae.saelens_state().tensors
    missing = sorted(expected.keys() - shapes.keys())
    additional = sorted(shapes.keys() - expected.keys())
    if missing or additional:
        parts = [f"{', '.join(missing)} missing"] if missing else []
        parts += [f"{', '.join(additional)} not expected"] if additional else []
        raise ValueError(
            f"{WEIGHTS_NAME}: {'; '.join(parts)} (architecture {sae.cfg.architecture})"
        )
    for name, wanted in expected.items():
        found = shapes[name]
        if found != list(wanted.shape):
            raise ValueError(
                f"{WEIGHTS_NAME}: {name} is {found}, but d_in {sae.d_in} and d_sae "
                f"{sae.d_sae} in {CFG_NAME} ask for {list(wanted.shape)}"
            )
