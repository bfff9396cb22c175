"""What is tried on a model when it is loaded: that it is causal, and that two libraries agree."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.data.network import Network, bridge_outputs

log = logging.getLogger(__name__)

CONTEXTS, LENGTH = 4, 32
NOT_CAUSAL = 1e-3
"""Relative change of a position's logits by later tokens that is no rounding; a causal model's is
0, or where experts work on tokens of several contexts at once, as large as that of the others."""
OTHER_NETWORK = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative difference between two networks that is more than the rounding of their kernels."""


def check_batch(vocabulary: int, positions: int | None, bos: int) -> Tensor:
    """[CONTEXTS, up to LENGTH] ids, the same at every loading of the model."""
    length = min(LENGTH, positions or LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (CONTEXTS, length), generator=generator)
    ids_BT[:, 0] = bos
    return ids_BT


@torch.inference_mode()
def check_causality(network: Network, ids_BT: Tensor, name: str) -> float:
    """The largest relative change of a position's logits when the tokens after it change.

    Raises UserError for a model whose positions see what follows: its cross-entropy would be that
    of a task with the answer in view.
    """
    half = ids_BT.shape[1] // 2
    other_BT = ids_BT.clone()
    # In the last context only: the others show how much rounding there is.
    other_BT[-1, half:] = other_BT[0, half:]
    first, second = network.logits(ids_BT), network.logits(other_BT)
    if not first.isfinite().all():
        raise UserError(
            f"{name} gives logits that are not finite in {str(first.dtype)[6:]}: take another "
            "model.dtype, or other weights"
        )
    change_BT = _relative(first - second, first)
    change, rounding = float(change_BT[-1, :half].max()), float(change_BT[:-1].max())
    if change > max(NOT_CAUSAL, 10 * rounding):
        raise UserError(
            f"{name} is no causal language model: other tokens after a position change its logits "
            f"by {100 * change:.1f} % (an encoder, as BERT is?); give a model that predicts the "
            "next token"
        )
    return _rounded(change)


def _relative(difference: Tensor, whole: Tensor) -> Tensor:
    """Norms over the last dimension; a constant added to all logits changes nothing."""
    difference, whole = difference.float(), whole.float()
    difference = difference - difference.mean(-1, keepdim=True)
    whole = whole - whole.mean(-1, keepdim=True)
    return difference.norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-12)


@torch.inference_mode()
def compare_bridge(
    network: Network, bridge: Any, ids_BT: Tensor, hook_name: str, name: str
) -> dict[str, float] | None:
    """Relative differences of TransformerLens' bridge at the hook and in the logits.

    No result comes from the bridge; whoever takes the SAE there is warned. None: it does not run.
    """
    try:
        x_BTD, logits = bridge_outputs(bridge, ids_BT, hook_name)
    # Another library's forward pass: whatever it raises, the results here do not hang on it.
    except Exception as error:
        log.warning(
            f"TransformerLens cannot run {name} ({type(error).__name__}), so that nothing can be "
            "compared with it; all numbers are those of transformers' own model"
        )
        return None
    own_BTD = network.activations(ids_BT)
    assert own_BTD is not None
    found = {
        "activations": _difference(x_BTD, own_BTD),
        "logits": _difference(logits, network.logits(ids_BT)),
    }
    worst = max(found.values())
    if not worst <= OTHER_NETWORK[logits.dtype]:  # NaN too
        log.warning(
            f"TransformerLens computes {name} otherwise than transformers (by "
            f"{100 * worst:.2g} % on one batch): all numbers here are of transformers' own "
            "model, and the SAE does not fit TransformerLens' one"
        )
    return {key: _rounded(value) for key, value in found.items() if math.isfinite(value)}


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")
