"""OpenAI's sparse_autoencoder: one .pt of a state dict, its activation's name in it.

Read off its model.py. An SAE with ReLU computes latents = relu(W (x - pre_bias) + latent_bias) and
decoder(latents) + pre_bias. One with TopK normalises every token first, which is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.files import check_shapes, make, read_torch, renamed

_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "latent_bias",
    "W_dec": "decoder.weight",
    "b_dec": "pre_bias",
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def find_weights(path: Path) -> Path | None:
    """A .pt file that is given itself: their folders hold one for each layer."""
    return path if path.is_file() and path.suffix == ".pt" else None


def load_openai(weights: Path) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """(SAE in float32 on the CPU, {"activation": ...}) of such a file. No code in it is run.

    Raises:
        ValueError, one line that names the file: it is damaged, holds code, is no state dict of
        theirs, has another activation than ReLU, a tensor of another shape.
    """
    try:
        state = read_torch(weights)
        if "pre_bias" not in state:
            raise ValueError(
                "it is neither OpenAI's (no pre_bias in it) nor dictionary_learning's (ae.pt or "
                "ae_N.pt)"
            )
        activation = state.pop("activation", "ReLU")
        inner = state.pop("activation_state_dict", None)
        if activation == "TopK":
            raise ValueError(
                "activation is TopK: such an SAE gives every token a mean and a factor of its "
                "own (normalize), which no weights can hold; sae-lens' releases have it"
            )
        if activation != "ReLU" or inner:
            raise ValueError(f"activation is {activation!r} ({inner}), only ReLU is computed here")
        tensors = renamed(state, _NAMES, "OpenAI", weights.name, _STATISTICS)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        check_shapes(shapes, None, None, weights.name, "the encoder's {d_in} and {d_sae}")
        return make("standard", tensors), {"activation": activation}
    except ValueError as error:
        raise ValueError(f"cannot load the SAE in {weights}: {error}") from None
