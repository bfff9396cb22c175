"""Devices by their names in the configuration, and what they compute in."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tcsae.base.errors import UserError, first_line

INSTEAD = {
    "model.device": "take auto or cpu",
    "training.device": "take cpu, or null: model.device",
    "model.device_map": "give devices that are there",
}
"""By key: what to say where a device is not there."""


def choose_device(wanted: str, key: str = "model.device") -> str:
    """The device that `wanted`, the value of `key`, names; auto: a GPU if there is one.

    Raises UserError if it is not there.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if (why := _why_not(wanted)) is not None:
        raise UserError(f"{key} = {wanted}: not usable here ({why}): {INSTEAD[key]}")
    return wanted


def first_device(places: str | Mapping[str, str]) -> str:
    """Where token ids go in and logits come out of a model that `model.device_map` places.

    Raises UserError if one of its devices is not there.
    """
    if isinstance(places, str):
        return choose_device("auto")
    return [choose_device(place, "model.device_map") for place in places.values()][0]


def _why_not(wanted: str) -> str | None:
    kind, _, number = wanted.partition(":")
    if kind == "cuda" and int(number or 0) >= (n := torch.cuda.device_count()):
        if n < 2:
            return "there is 1 GPU, cuda:0" if n else "there is no GPU"
        return f"there are {n} GPUs, cuda:0 to cuda:{n - 1}"
    try:
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError) as error:  # a torch built without it asserts
        return first_line(error)
    return None


def bfloat16_is_native(device: str) -> bool:
    """Whether this device multiplies bfloat16 faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """The dtype that `model.dtype` names; auto: bfloat16 where that is faster."""
    if wanted == "auto":
        wanted = "bfloat16" if bfloat16_is_native(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
