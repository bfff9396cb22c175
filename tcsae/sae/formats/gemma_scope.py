"""Gemma Scope's SAEs: params.npz, a JumpReLU, with nothing beside it.

f = relu(pre) where pre = x @ W_enc + b_enc is above its feature's threshold, x_hat = f @ W_dec +
b_dec: b_dec is not subtracted from the input. What each file is of stands in its path alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.files import check_shapes, make, npz_shapes, read_npz, renamed
from tcsae.sae.formats.saelens import with_centred_input

WEIGHTS_NAME = "params.npz"
_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


def find_weights(path: Path) -> Path | None:
    """The file of weights of a folder, or of a path to it."""
    file = path if path.is_file() else path / WEIGHTS_NAME
    return file if file.suffix == ".npz" and file.is_file() else None


def load_gemma_scope(weights: Path) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """(SAE in float32 on the CPU, {}) of params.npz. Nothing in it is unpickled.

    Raises:
        ValueError, one line that names the path: it is damaged, of a transcoder or of embeddings
        (by its path), an array is missing, additional, of another shape or not floating point.
    """
    try:
        if any("transcoder" in part for part in weights.parts):
            raise ValueError(
                "a transcoder, by its path, which gives an MLP's output from its input; only "
                "SAEs, which give back what they are given, are measured here"
            )
        if "embedding" in weights.parts:
            raise ValueError("of embeddings, by its path, which are not read here")
        shapes = npz_shapes(weights)
        if shapes.keys() >= _NAMES.keys():
            known = {name: shapes[name] for name in _NAMES}
            check_shapes(known, None, None, weights.name, "W_enc's {d_in} and {d_sae}")
        tensors = renamed(read_npz(weights), _NAMES, "Gemma Scope", weights.name)
        return make("jumprelu", with_centred_input(tensors)), {}
    except ValueError as error:
        raise ValueError(f"cannot load the SAE in {weights}: {error}") from None
