"""SAEs that EleutherAI's sparsify trained: cfg.json and sae.safetensors in a folder.

Read off sparsify 1.0 to 1.3 (sparse_coder.py): latents = topk(relu(W (x - b_dec) + b)),
reconstruction = latents @ W_dec + b_dec. b_dec is always subtracted; normalize_decoder is only
about training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.files import (
    check_shapes,
    make,
    read_object,
    read_safetensors,
    renamed,
    safetensors_shapes,
)

CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae.safetensors"
RUN_NAME = "config.json"
"""Of the run that trained it, one folder up."""

_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_REFUSED = {
    "activation": ("topk", "not computed here, only 'topk' is"),
    "signed": (False, "it lets the largest values through whatever their sign"),
    "skip_connection": (False, "it adds a linear map of its input to what it gives back"),
    "transcode": (False, "a transcoder, which gives a module's output from its input"),
}
"""Keys that change what is computed: the value that is read, and what another one means."""
_CHANGES_NOTHING = ("expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk")


def find_weights(path: Path) -> Path | None:
    """The file of weights of a folder, or of a path to one of its two files."""
    if path.is_file():
        if path.name not in (WEIGHTS_NAME, CFG_NAME):
            return None
        path = path.parent
    return path / WEIGHTS_NAME if (path / WEIGHTS_NAME).is_file() else None


def load_sparsify(weights: Path) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """(SAE in float32 on the CPU, the content of cfg.json) of sparsify's folder.

    Raises:
        ValueError, one line that names the folder: a file is missing or damaged, cfg.json has a
        key that changes the function to one that is not computed here or that is not known, it
        contradicts the weights, a tensor is missing, additional or of another shape.
    """
    folder = weights.parent
    try:
        if not (folder / CFG_NAME).is_file():
            raise ValueError(f"it has no {CFG_NAME} beside {WEIGHTS_NAME}")
        cfg = read_object(folder / CFG_NAME)
        d_in, d_sae = _understood(cfg)
        # The header first: shapes that do not fit are refused before anything is loaded.
        shapes = safetensors_shapes(weights)
        if set(_NAMES.values()) <= shapes.keys():
            known = {ours: shapes[name] for ours, name in _NAMES.items()}
            known["W_enc"] = known["W_enc"][::-1]
            check_shapes(known, d_in, d_sae, WEIGHTS_NAME, "d_in {d_in} and num_latents {d_sae}")
        tensors = renamed(read_safetensors(weights), _NAMES, "sparsify", WEIGHTS_NAME)
        return make("topk", tensors, k=cfg["k"]), cfg
    except ValueError as error:
        raise ValueError(f"cannot load the SAE in {folder}: {error}") from None


def _understood(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """(d_in, number of latents) of a cfg whose function is computed here."""
    for key in ("d_in", "k"):
        if type(cfg.get(key)) is not int or cfg[key] < 1:
            raise ValueError(
                f"{CFG_NAME}: {key} is {cfg.get(key)!r}, it must be an integer above 0"
            )
    for key, (computed, why) in _REFUSED.items():
        value = cfg.get(key, computed)
        if type(value) is not type(computed) or value != computed:
            raise ValueError(f"{CFG_NAME}: {key}={value!r}: {why}")
    unknown = sorted(cfg.keys() - {*_REFUSED, *_CHANGES_NOTHING, "d_in"})
    if unknown:
        said = ", ".join(f"{key}={cfg[key]!r}" for key in unknown)
        raise ValueError(f"{CFG_NAME}: {said} is not known here and may change what it computes")
    # 0, or nothing in older folders: as many as the expansion factor says.
    latents = cfg.get("num_latents") or cfg["d_in"] * _factor(cfg)
    if type(latents) is not int or latents < 1:
        raise ValueError(f"{CFG_NAME}: num_latents is {latents!r}, it must be an integer above 0")
    return cfg["d_in"], latents


def _factor(cfg: Mapping[str, Any]) -> int:
    factor = cfg.get("expansion_factor")
    if type(factor) is not int or factor < 1:
        raise ValueError(
            f"{CFG_NAME}: num_latents is not set, and expansion_factor is {factor!r}, where an "
            "integer above 0 must be"
        )
    return factor
