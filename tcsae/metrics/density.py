"""Bins of firing density, in which features of alike density are compared.

Shapes: F features, b bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS_A_DECADE = 4
DENSITY_EDGES = torch.arange(-7 * BINS_A_DECADE, 1) / BINS_A_DECADE
"""Edges of the bins, log10 of density: [b + 1]."""
N_BINS = len(DENSITY_EDGES) - 1


def density_bin(density: Tensor) -> Tensor:
    """Bin of each density in (0, 1] and, behind the point, the place in it: [F] like `density`.

    The whole part is the number of the bin, the rest how far the log10 density is above its lower
    edge, in widths of a bin. What is rarer than the first edge is at the start of the first bin.
    """
    place = (density.log10() - float(DENSITY_EDGES[0])) * BINS_A_DECADE
    last = torch.nextafter(place.new_tensor(N_BINS), place.new_tensor(0.0))
    return place.clamp(min=0.0).clamp(max=last)


def bin_and_place(place: Tensor) -> tuple[Tensor, Tensor]:
    """The bin, int64, and the log10 density above its lower edge, of what `density_bin` gave."""
    whole = place.floor()
    return whole.long(), (place - whole) / BINS_A_DECADE
