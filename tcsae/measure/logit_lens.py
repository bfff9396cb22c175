"""What a feature writes towards the next token, by itself: the logit lens of its direction.

(nostalgebraist 2020; of SAE features as SAEDashboard and Neuronpedia show it.) The decoder's row
times the final norm's weight, times the unembedding: what the blocks between make of it is left
out, and so is the norm's scale, the same for all tokens. A logit less the mean over tokens.

Shapes: S features, k tokens, V tokens of the vocabulary, D = d_in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcsae.data.activation_model import ActivationModel

TOKENS = 10
"""At either end."""
MOST_FEATURES = 4096
"""Those with the most energy: as many as a page shows."""
AT_ONCE = 128


@torch.inference_mode()
def logit_lens(
    W_dec: Tensor, features: Tensor, model: ActivationModel, k: int = TOKENS
) -> dict[str, Tensor]:
    """The tokens whose logits a feature raises and lowers most, for a decoder row of norm 1.

    Args:
        W_dec: [F, D].
        features: [S] numbers.

    Returns:
        features [S] int64; raised, lowered [S, k] int32, most first; raised_by, lowered_by [S, k]
        float32. {} for a model without logits, or of another width.
    """
    W_VD = model.unembedding()
    if W_VD is None or W_VD.shape[1] != W_dec.shape[1]:
        return {}
    k = min(k, len(W_VD))
    rows = torch.nn.functional.normalize(W_dec.float()[features], dim=1)
    mean_D = W_VD.float().mean(0)
    found: dict[str, list[Tensor]] = {}
    for part in rows.split(AT_ONCE):
        part = part.to(W_VD.device)
        logits = (part.to(W_VD.dtype) @ W_VD.T).float() - (part @ mean_D)[:, None]
        for name, largest in (("raised", True), ("lowered", False)):
            value, token = logits.topk(k, dim=1, largest=largest)
            found.setdefault(name, []).append(token.int().cpu())
            found.setdefault(f"{name}_by", []).append(value.cpu())
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return {"features": features.long().cpu(), **joined}
