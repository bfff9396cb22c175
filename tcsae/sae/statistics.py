"""Location and spread of a batch of tokens. N tokens, D = d_in."""

from __future__ import annotations

import torch
from torch import Tensor

from tcsae.tensors.over_ranks import summed


def total_variance(centred_ND: Tensor, n_valid: Tensor) -> Tensor:
    """Variance summed over d_in of the valid tokens; the others must be zero.

    0 where it is not above float32's rounding of the mean square: a single token has none.
    """
    mean_D = summed(centred_ND.sum(0)) / n_valid
    mean_square = summed(centred_ND.square().sum()) / n_valid
    variance = mean_square - mean_D.square().sum()
    return torch.where(variance > 1e-6 * mean_square, variance, 0)


@torch.no_grad()
def geometric_median(x_ND: Tensor, max_steps: int = 200, tolerance: float = 1e-5) -> Tensor:
    """The point [d_in] with the least sum of Euclidean distances to the tokens [N, d_in].

    Weiszfeld's iteration from the mean: weights 1 / distance, until a step is shorter than
    `tolerance` times the mean distance. Massive tokens hardly move it, unlike the mean.
    """
    x_ND = x_ND.float()
    median_D = x_ND.mean(0)
    for _ in range(max_steps):
        distance_N = (x_ND - median_D).norm(dim=1)
        typical = distance_N.mean()
        weight_N = 1 / distance_N.clamp_min(1e-6 * typical + torch.finfo(torch.float32).tiny)
        step_D = (weight_N @ x_ND) / weight_N.sum() - median_D
        median_D = median_D + step_D
        if step_D.norm() <= tolerance * typical:
            break
    return median_D
