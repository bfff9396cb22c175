"""Files of tensors from elsewhere (safetensors, torch's, numpy's), and the SAEs they make.

Nothing in them is ever run.

Of safetensors and numpy's files the names and shapes can be had before any tensor is read.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tcsae.base.errors import first_line
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.registry import sae_class

Shapes = dict[str, list[int]]


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that must be an object. Raises ValueError, without the folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is JSON, but not an object with keys")
    return content


# ------------------------------------------------------------------------------ safetensors


def safetensors_shapes(path: Path) -> Shapes:
    """Of every tensor, from the file's header. Raises ValueError for another kind of file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"it has no {path.name} (weights in any other format are not read)")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        raise ValueError(f"{path.name} is a pickle, not a safetensors file: refused, not opened")
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_slice(name).get_shape() for name in names}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path.name} is damaged or not a safetensors file ({error})") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError as of `safetensors_shapes`, and for a type that torch has not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safetensors_shapes(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path.name} is damaged or not a safetensors file ({error})") from None


# ------------------------------------------------------------------------------ torch


def read_torch(path: Path) -> dict[str, Any]:
    """What torch.save wrote, if that is a dict: its weights-only reader runs no code of the file.

    Raises ValueError, without the folder.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol; it is refused or read
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(
            f"{path.name} is not a plain file of tensors (it may hold code): refused, nothing in "
            "it was run"
        ) from None
    except Exception as error:  # a damaged file makes torch's reader stumble in many ways
        raise ValueError(f"{path.name} is damaged ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path.name} holds more than tensors: it is no SAE's weights")
    return dict(state)


# ------------------------------------------------------------------------------ numpy


def npz_shapes(path: Path) -> Shapes:
    """Of every array, from the headers. Raises ValueError for what is no file of arrays."""
    from numpy.lib import format as npy

    found: Shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = npy.read_magic(file)
                    read = npy.read_array_header_1_0 if version == (1, 0) else None
                    shape, _, dtype = (read or npy.read_array_header_2_0)(file)
                if dtype.hasobject:
                    raise ValueError(f"{member} holds Python objects: refused, not opened")
                found[member.removesuffix(".npy")] = list(shape)
    except Exception as error:  # zip and numpy stumble in many ways
        raise ValueError(f"{path.name} is damaged or not numpy's ({first_line(error)})") from None
    return found


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays as float32. Raises ValueError as of `npz_shapes`, and for other than floats."""
    import numpy as np

    npz_shapes(path)
    found = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if array.dtype.kind != "f":
                    raise ValueError(f"{name} is {array.dtype}, not floating point")
                found[name] = torch.from_numpy(array.astype(np.float32))
    except Exception as error:
        raise ValueError(f"{path.name} is damaged or not numpy's ({first_line(error)})") from None
    return found


# ------------------------------------------------------------------------------ what they make


def make(architecture: str, tensors: Mapping[str, Tensor], **fields: Any) -> SparseAutoencoder:
    """An SAE of ours with these tensors (SAELens' names and shapes, x - b_dec encoded).

    Raises ValueError for options that do not fit.
    """
    chosen = sae_class(architecture)
    d_in, d_sae = tensors["W_enc"].shape
    try:
        cfg = chosen.config_class(architecture=architecture, d_sae=d_sae, **fields)
    except ValidationError as error:
        raise ValueError("; ".join(e["msg"] for e in error.errors())) from None
    # A generator of its own: loading must not advance torch's.
    sae = chosen(cfg, d_in, torch.Generator())
    sae.load_saelens({}, tensors)
    return sae


def renamed(
    state: Mapping[str, Any],
    names: Mapping[str, str],
    what: str,
    file: str,
    others: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors under SAELens' names, float32, matrices turned its way.

    Args:
        names: their tensor names by SAELens' names; torch.nn.Linear's, which end in ".weight",
            are [out, in] and are turned.
        what: whose they are, for messages.
        file: its name, for messages.
        others: names that may stand beside these.

    Raises:
        ValueError: a tensor is missing, additional, no tensor or no floating-point one.
    """
    missing = sorted(set(names.values()) - state.keys())
    additional = sorted(state.keys() - set(names.values()) - set(others))
    if missing or additional:
        parts = [f"{', '.join(missing)} missing"] if missing else []
        parts += [f"{', '.join(map(str, additional))} not expected"] if additional else []
        raise ValueError(f"{file}: {'; '.join(parts)} ({what})")
    for name in names.values():
        if not isinstance(state[name], Tensor):
            raise ValueError(f"{file} holds more than tensors: {name} is none")
        if not state[name].is_floating_point():
            raise ValueError(f"{file}: {name} is {state[name].dtype}, not floating point")
        if state[name].layout is not torch.strided or state[name].is_meta:
            raise ValueError(f"{file}: {name} is sparse or has no values")
    found = {ours: state[name].float() for ours, name in names.items()}
    turned = [ours for ours, name in names.items() if name.endswith(".weight")]
    # A tensor that is no matrix is refused by its shape later.
    return found | {ours: found[ours].transpose(0, -1).contiguous() for ours in turned}


def check_shapes(
    shapes: Mapping[str, list[int]], d_in: int | None, d_sae: int | None, file: str, said: str
) -> None:
    """Raises ValueError unless the shapes, by SAELens' names, are those of one SAE.

    `d_in` and `d_sae` are what a config says, if it does; `said` names the keys it says it under,
    as "activation_dim {d_in} and dict_size {d_sae}".
    """
    shape = shapes["W_enc"]
    if len(shape) != 2:
        raise ValueError(f"{file}: the encoder's weights are {shape}, not a matrix")
    d_in, d_sae = (d_in or shape[0]), (d_sae or shape[1])
    wanted = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    for name, found in shapes.items():
        if found != wanted.get(name, [d_sae]):
            raise ValueError(
                f"{file}: {name} is {found}, but {said.format(d_in=d_in, d_sae=d_sae)} ask for "
                f"{wanted.get(name, [d_sae])}"
            )
