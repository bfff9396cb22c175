"""What may be called different where many metrics are looked at together.

One metric of two SAEs of one law lies outside its own 95 % interval in one comparison of twenty;
some metric of thirty does so in a third. The draws are shared by all metrics, so the largest
deviation among them has a distribution of its own: a difference counts if it is beyond what that
one exceeds in one comparison of twenty (max-t, Romano and Wolf 2005).

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
    error_RM = draws_RM - draws_RM.mean(0)
    spread_M = error_RM.std(0)
    unit_RM = error_RM.abs() / torch.where(spread_M > 0, spread_M, torch.inf)
    limit = float(unit_RM.amax(1).quantile(level))
    return {
        name: Joint(
            smallest := limit * float(spread),
            abs(value) > max(smallest, rounding[name]),
        )
        for (name, (value, _)), spread in zip(differences.items(), spread_M, strict=True)
    }
