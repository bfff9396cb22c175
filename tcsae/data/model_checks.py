"""What is tried on a model when it is loaded: that it runs, is causal, is TransformerLens' too."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.base.errors import UserError, first_line
from tcsae.data.network import Network, bridge_outputs

log = logging.getLogger(__name__)

CONTEXTS, LENGTH = 2, 16
NOT_CAUSAL = 1e-3
"""Relative change of a position's logits by later tokens that is no rounding; a causal model's is
0, or where experts work on tokens of several contexts at once, as large as that of the others."""
OTHER_NETWORK = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Relative difference between two networks that is more than the rounding of their kernels."""


class HookPoint(NamedTuple):
    """What is said of a model, and what its activations must be."""

    model: str
    hook: str
    full_name: str
    d_in: int


def check_batch(vocabulary: int, positions: int | None, bos: int) -> Tensor:
    """[CONTEXTS, up to LENGTH] ids, the same at every loading of the model."""
    length = min(LENGTH, positions or LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (CONTEXTS, length), generator=generator)
    ids_BT[:, 0] = bos
    return ids_BT


@torch.inference_mode()
def try_model(network: Network, bridge: Any, ids_BT: Tensor, at: HookPoint) -> dict[str, Any]:
    """What is found when one batch goes through the model, as final_info.json has it.

    Raises UserError for a model that does not run, whose logits are not finite, that is not
    causal, or whose hook has something else than one vector for each token.
    """
    seen: list[Tensor] = []

    def keep(x_BTD: Tensor) -> Tensor:
        seen.append(x_BTD.clone())  # some families add to it in place
        return x_BTD

    try:
        logits = network.logits(ids_BT, keep)
    # Each family has code of its own, which raises whatever does not fit.
    except Exception as error:
        raise UserError(f"{at.model} does not run: {first_line(error)}") from error
    if len(seen) != 1 or seen[0].shape != (*ids_BT.shape, at.d_in):
        raise UserError(
            f"model.hook = {at.hook}: what comes by {at.full_name} of {at.model} is not one "
            f"vector of {at.d_in} numbers for each token: take another hook or layer"
        )
    if not logits.isfinite().all():
        raise UserError(
            f"{at.model} gives logits that are not finite in "
            f"{str(logits.dtype).removeprefix('torch.')}: take another model.dtype, or other "
            "weights"
        )
    return {
        "network": "transformers",
        "later_tokens_change": _check_causality(network, ids_BT, logits, at.model),
        "transformer_lens": _compare_bridge(bridge, ids_BT, (seen[0], logits), at),
    }


def _check_causality(network: Network, ids_BT: Tensor, logits: Tensor, name: str) -> float:
    """The largest relative change of a position's logits when the tokens after it change.

    Raises UserError for a model whose positions see what follows: its cross-entropy would be that
    of a task with the answer in view.
    """
    half = ids_BT.shape[1] // 2
    other_BT = ids_BT.clone()
    # In the last context only: the others show how much rounding there is.
    other_BT[-1, half:] = other_BT[0, half:]
    change_BT = _relative(logits - network.logits(other_BT), logits)
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


def _compare_bridge(
    bridge: Any, ids_BT: Tensor, own: tuple[Tensor, Tensor], at: HookPoint
) -> dict[str, float] | None:
    """Relative differences of TransformerLens' bridge at the hook and in the logits.

    No result comes from the bridge; whoever takes the SAE there is warned. None: it does not run.
    """
    try:
        theirs = bridge_outputs(bridge, ids_BT, at.full_name)
        differences = [_difference(a, b) for a, b in zip(theirs, own, strict=True)]
    # Another library's forward pass: whatever it raises, the results here do not hang on it.
    except Exception as error:
        log.warning(
            f"TransformerLens cannot run {at.model} ({type(error).__name__}), so that nothing can "
            "be compared with it; all numbers are those of transformers' own model"
        )
        return None
    if not max(differences) <= OTHER_NETWORK[own[1].dtype]:
        log.warning(
            f"TransformerLens computes {at.model} otherwise than transformers (by "
            f"{100 * max(differences):.2g} % on one batch): all numbers here are of transformers' "
            "own model, and the SAE does not fit TransformerLens' one"
        )
    if not all(math.isfinite(value) for value in differences):
        return None
    return dict(zip(("activations", "logits"), map(_rounded, differences), strict=True))


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")
