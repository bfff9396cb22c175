"""In which features a difference between two SAEs lies: the parts of a weighted mean, by feature.

A metric's energy-weighted mean is a sum of parts, one a feature. What a feature gained is its part
less that of its counterpart, the feature of the other SAE with the same direction; one without a
counterpart gained all its part, and what the other SAE had alone is lost. So the gains add up to
the difference of the two means, whatever is matched with what.

Shapes: F features of one SAE, G of the other, M gains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tcsae.metrics.windows import weighed

MIN_COSINE = 0.5
"""Decoder cosine that counterparts have at least."""
MATCHED = 4096
"""Features of either SAE whose counterparts are looked for, those with the largest parts."""


def parts_of(name: str, values: Mapping[str, Tensor]) -> Tensor:
    """What each feature adds to the energy-weighted mean of a metric: [F] float64, whose sum it is.

    0 for a feature that never fired, or has no value.

    Args:
        name: C_W, L_W, D_W, rho_1 (see `weighed` for the weights).
        values: per feature, [F]: the metric, c0, density, and D_W where it is L_W.
    """
    value_F, weights_F = weighed(name, values, values["c0"], values["density"])
    counted_F = (values["density"] > 0) & value_F.isfinite() & weights_F.isfinite()
    weights_F = torch.where(counted_F, weights_F, 0.0).double()
    return weights_F * torch.where(counted_F, value_F, 0.0).double() / weights_F.sum()


def counterparts(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """One feature of the second SAE for each of the first: pairs of the largest cosines first.

    Args:
        first, second: decoder directions, [F, d_in] and [G, d_in].

    Returns:
        Its number, [F] int64, -1 where there is none; and the cosine, [F], 0 where there is none.
    """
    units = (torch.nn.functional.normalize(W.float(), dim=1) for W in (first, second))
    cosine_FG = torch.mm(next(units), next(units).T)
    partner_F = torch.full((len(first),), -1)
    found_F = torch.zeros(len(first))
    here_F = torch.arange(len(first))
    while cosine_FG.numel():
        best_F, to_F = cosine_FG.max(1)
        # The other way round too: no pair has a larger cosine then.
        pairs_F = (cosine_FG.max(0).indices[to_F] == here_F) & (best_F >= MIN_COSINE)
        if not pairs_F.any():
            break
        partner_F[pairs_F], found_F[pairs_F] = to_F[pairs_F], best_F[pairs_F]
        cosine_FG[pairs_F] = -2.0
        cosine_FG[:, to_F[pairs_F]] = -2.0
    return partner_F, found_F


@dataclass(frozen=True)
class Gain:
    """Where the change of one metric lies, largest part of it first."""

    change: float
    """The sum of all gains: the mean of the first SAE less that of the second."""
    gain: Tensor
    """[M] float64."""
    feature: Tensor
    """[M] number in the first SAE; -1: only the second has it."""
    counterpart: Tensor
    """[M] number in the second; -1: only the first has it."""
    is_layout: Tensor | None
    """[M] bool; None: not measured."""

    def share(self, n: int) -> float | None:
        """Of the change, what the first n make; None where nothing changed."""
        return float(self.gain[:n].sum()) / self.change if self.change else None

    def n_for(self, share: float) -> int | None:
        """How many of the first ones make at least this share; None where nothing changed."""
        if not self.change:
            return None
        reached = self.gain.cumsum(0) / self.change >= share - 1e-9
        return int(reached.nonzero()[0]) + 1 if reached.any() else None

    @property
    def up(self) -> float:
        """The sum of what went up."""
        return float(self.gain.clamp(min=0.0).sum())

    @property
    def layout_share(self) -> float | None:
        """Of the change, what layout features make."""
        if self.is_layout is None or not self.change:
            return None
        return float(self.gain[self.is_layout].sum()) / self.change


def gain_of(
    first: Tensor,
    second: Tensor,
    partner: Tensor,
    layout: tuple[Tensor, Tensor] | None = None,
) -> Gain:
    """The gains of two SAEs, those in the direction of the whole change first.

    Args:
        first, second: parts, [F] and [G].
        partner: of `counterparts`, [F].
        layout: which features are layout, [F] and [G] bool; a pair is what its first one is.
    """
    has = partner >= 0
    theirs = torch.where(has, second[partner.clamp(min=0)], 0.0)
    alone = torch.ones(len(second), dtype=torch.bool)
    alone[partner[has]] = False
    lost = alone.nonzero().flatten()
    gain = torch.cat([first - theirs, -second[lost]])
    none = torch.full_like(lost, -1)
    feature = torch.cat([torch.arange(len(first)), none])
    counterpart = torch.cat([partner, lost])
    change = float(first.sum() - second.sum())
    order = (gain if change >= 0 else -gain).argsort(descending=True, stable=True)
    is_layout = None if layout is None else torch.cat([layout[0], layout[1][lost]])[order]
    return Gain(change, gain[order], feature[order], counterpart[order], is_layout)


def matched(
    W_first: Tensor, W_second: Tensor, weight_first: Tensor, weight_second: Tensor
) -> tuple[Tensor, Tensor]:
    """`counterparts` among the `MATCHED` features of either SAE with the largest weights, [F] and
    [G]: the others have none."""
    chosen = [
        weight.abs().argsort(descending=True, stable=True)[:MATCHED].sort().values
        for weight in (weight_first, weight_second)
    ]
    found, cosine = counterparts(W_first[chosen[0]], W_second[chosen[1]])
    partner_F = torch.full((len(W_first),), -1)
    cosine_F = torch.zeros(len(W_first))
    partner_F[chosen[0]] = torch.where(found >= 0, chosen[1][found.clamp(min=0)], -1)
    cosine_F[chosen[0]] = cosine
    return partner_F, cosine_F


def mean_without(name: str, values: Mapping[str, Tensor], left_out: Tensor) -> float | None:
    """The energy-weighted mean of a metric over all features but some, [F] bool; None: of none."""
    density = torch.where(left_out, 0.0, values["density"])
    mean = float(parts_of(name, {**values, "density": density}).sum())
    return mean if mean == mean else None
