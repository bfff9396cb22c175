"""What the log says of a training step, from what the step has at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from tcsae.consistency import window_moments
from tcsae.losses.laplacian import Window
from tcsae.sae.codes import TrainingOutput
from tcsae.tensors.sparse import SparseCodes


def features_of(output: TrainingOutput) -> Tensor | SparseCodes:
    """As the temporal loss takes them: by their entries where those are at hand."""
    return output.features if output.codes.sparse is None else output.codes.sparse


@torch.no_grad()
def step_metrics(
    output: TrainingOutput, valid_BT: Tensor, segments_BT: Tensor, x_BTD: Tensor, window: Window
) -> dict[str, Tensor]:
    """Float scalars on the device, none of which is read here: l0 (a token), explained_variance,
    window_variance (of all features, in squared units of theirs), window_consistency.

    Sparse codes are never made dense for it.
    """
    kept_BT1, n_valid = valid_BT[..., None], valid_BT.sum().clamp(min=1)
    mean_D = torch.where(kept_BT1, x_BTD, 0).sum((0, 1)) / n_valid
    spread = torch.where(kept_BT1, x_BTD - mean_D, 0).square().sum()
    error = torch.where(kept_BT1, x_BTD - output.reconstruction, 0).square().sum()
    within_F, measured_F = window_moments(
        features_of(output), window, segments=segments_BT, valid=valid_BT
    )
    return {
        "l0": output.codes.n_active() / n_valid,
        "explained_variance": 1 - error / spread,
        "window_variance": within_F.sum(),
        "window_consistency": 1 - within_F.sum() / measured_F.sum().clamp(min=1e-30),
    }
