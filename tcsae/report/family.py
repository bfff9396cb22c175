"""What may be called different where many metrics are looked at together.

One metric of two SAEs of one law lies outside its own 95 % interval in one comparison of twenty;
some metric of thirty does so in a third. The draws are shared by all metrics, so the most unlikely
deviation among them has a distribution of its own: a difference counts if it is less likely than
that one is in one comparison of twenty (Westfall and Young 1993; Romano and Wolf 2005). Deviations
are laid side by side by how likely they are, each by its own draws: those with few seeds have long
tails, and in units of their spread would hide all others.

Shapes: R draws, M metrics.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


class Joint(NamedTuple):
    """A difference beside all others of its comparison."""

    smallest: float
    """The smallest difference that would have been called one."""
    is_different: bool


def jointly(
    differences: Mapping[Key, tuple[float, Tensor]], level: float, rounding: Mapping[Key, float]
) -> dict[Key, Joint]:
    """Which of the differences are differences, at `level` for all of them together.

    Args:
        differences: value, and draws [R] around it, by metric.
        level: how often nothing is called different where nothing is.
        rounding: by metric, what is no difference whatever the draws say.
    """
    if not differences:
        return {}
    draws_RM = torch.stack([draws for _, draws in differences.values()], 1).double()
    distance_RM = (draws_RM - draws_RM.mean(0)).abs()
    n_draws = len(distance_RM)
    # 1 for the largest deviation of a metric, and up; of equal ones the most likely.
    ascending_RM = distance_RM.sort(0).values
    rank_RM = (
        n_draws - torch.searchsorted(ascending_RM.T.contiguous(), distance_RM.T.contiguous()).T
    )
    rarest_R = rank_RM.amin(1).double()
    n_beyond = int(rarest_R.quantile(1 - level, interpolation="lower"))
    smallest_M = ascending_RM[n_draws - max(n_beyond, 1)]
    return {
        name: Joint(float(smallest), abs(value) > max(float(smallest), rounding[name]))
        for (name, (value, _)), smallest in zip(differences.items(), smallest_M, strict=True)
    }
