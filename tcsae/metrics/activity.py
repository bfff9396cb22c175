"""When a feature is on, for how long, how strongly, and how smoothly it follows its input.

A feature is on where f > 0. Shapes: B contexts of a batch, T positions, F features, G bootstrap
blocks, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.bootstrap import Accumulator
from tcsae.metrics.masks import checked_masks, pair_mask, require_shape


class ActivityResult(NamedTuple):
    """What `Activity.compute` returns; [F] float64 unless said otherwise.

    Attributes:
        density: share of the valid tokens on which the feature is on, 0 to 1.
        mean_activation: mean of f over those tokens, in units of f. NaN if it is never on.
        amplitude_cv: standard deviation over mean of f over those tokens. NaN if never on.
        persistence: P(on at t + 1 | on at t) - P(on at t + 1 | off at t), -1 to 1; 0 for a
            feature that fires independently from token to token. NaN if it is never on or never
            off before a counted neighbour.
        run_length: mean length of a run of on, in positions. NaN if no run was seen to end.
        frac_alive: [], share of the features that were on at least once.
    """

    density: Tensor
    mean_activation: Tensor
    amplitude_cv: Tensor
    persistence: Tensor
    run_length: Tensor
    frac_alive: Tensor


class Activity(Accumulator):
    """Density, amplitude, persistence and run length over any number of batches.

    Persistence and run length come from the counted pairs (t, t + 1): both positions valid, one
    segment. The mean run length is 1 / P(off at t + 1 | on at t), that is

        on tokens with a counted successor / ends of runs seen.

    A run cut by the edge of a context, a segment or a stretch of valid positions thus counts with
    the length that was seen of it, but not as an ended run. For a stationary feature this is
    consistent whatever the law of the lengths; the mean of the visible lengths is too short, and
    leaving cut runs out makes it shorter still.

    Args:
        n_features: F.
        n_positions: T. None: batches may differ in it.
        n_blocks: G, groups of whole contexts whose sums are kept apart for the bootstrap.
            0: none, and no intervals.
    """

    def __init__(
        self, n_features: int, n_positions: int | None = None, *, n_blocks: int = 0
    ) -> None:
        self.n_features = n_features
        self.n_positions = n_positions
        super().__init__(n_blocks)

    @torch.no_grad()
    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Add a batch: features [B, T, F], segments [B, T], valid [B, T]."""
        require_shape(features, self.n_features, self.n_positions)
        segments, valid = checked_masks(features, segments, valid)
        on_BTF = (features > 0) & valid[..., None]
        amplitude_BTF = torch.where(on_BTF, features, 0.0).double()
        pairs_BT = pair_mask(segments, valid, 1)
        early_BT, late_BT = torch.zeros_like(valid), torch.zeros_like(valid)
        early_BT[:, :-1] = pairs_BT
        late_BT[:, 1:] = pairs_BT
        stays_BTF = (on_BTF[:, :-1] & on_BTF[:, 1:]).float()
        masks_B3T = torch.stack([valid, early_BT, late_BT], 1).float()
        on_B3F = torch.bmm(masks_B3T, on_BTF.float())
        sums = {
            "block_tokens": valid.sum(1, keepdim=True),
            "block_pairs": pairs_BT.sum(1, keepdim=True),
            "block_on": on_B3F[:, 0],
            "block_on_before": on_B3F[:, 1],
            "block_on_after": on_B3F[:, 2],
            "block_stays": torch.bmm(pairs_BT[:, None].float(), stays_BTF)[:, 0],
            "block_amplitude": amplitude_BTF.sum(1),
            "block_squares": amplitude_BTF.square().sum(1),
        }
        self._add_to_blocks(sums)
        self.n_contexts += len(features)

    def compute(self) -> ActivityResult:
        """The result over all batches; see `ActivityResult`."""
        state = self._require_batches()
        result = _activity({name: value.sum(0) for name, value in state.items()})
        alive = (state["block_on"].sum(0) > 0).double().mean()
        return ActivityResult(**result, frac_alive=alive)

    def resample(self, weights_RG: Tensor) -> dict[str, Tensor]:
        """The [F] fields of ActivityResult for resampled blocks, [R, F] each."""
        state = self._require_batches()
        return _activity({name: self._drawn(name, weights_RG) for name in state})


def _activity(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fields of ActivityResult [..., F] from the sums of `Activity` [..., F] or [..., 1]."""
    on, before, after = sums["block_on"], sums["block_on_before"], sums["block_on_after"]
    stays, amplitude = sums["block_stays"], sums["block_amplitude"]
    ends = before - stays
    mean = amplitude / on
    spread = (sums["block_squares"] / on - mean.square()).clamp(min=0.0).sqrt()
    return {
        "density": on / sums["block_tokens"],
        "mean_activation": mean,
        "amplitude_cv": spread / mean,
        "persistence": stays / before - (after - stays) / (sums["block_pairs"] - before),
        "run_length": before / torch.where(ends > 0, ends, torch.nan),
    }


class SmoothnessResult(NamedTuple):
    """What `smoothness` returns, in units of f per unit of x, float64.

    Attributes:
        value: [], the mean over contexts of the mean over the features active in each.
        per_feature: [F], the mean over the contexts in which the feature is active. NaN if none.
        groups: [2], `value` of the first group of features and of the rest; [0] without groups.
    """

    value: Tensor
    per_feature: Tensor
    groups: Tensor


def smoothness(
    features: Tensor,
    inputs: Tensor,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> SmoothnessResult:
    """Smoothness as T-SAE reports it (Bhalla et al. 2025, arXiv 2511.05541): lower is smoother.

    Per context and active feature, max over t of |f_t - f_{t-1}| / ||x_t - x_{t-1}||; mean over
    the features on at least once in the context, then over contexts. It scales with f: shrinking
    the features lowers it. For comparison with that paper only.

    Only counted pairs (both positions valid, one segment) whose inputs differ are looked at;
    contexts without any are left out.

    Args:
        features: [B, T, F].
        inputs: x, [B, T, d_in], what the SAE was given.
        segments, valid: [B, T] or None, as everywhere.

    Raises:
        ValueError: shapes do not fit.
    """
    checked_masks(features, segments, valid)
    accumulator = Smoothness(features.shape[2])
    accumulator.update(features, inputs, segments=segments, valid=valid)
    return accumulator.compute()


class Smoothness(Accumulator):
    """`smoothness` over any number of batches.

    Args:
        n_features: F.
        n_blocks: G, groups of whole contexts whose sums are kept apart for the bootstrap.
        n_first: features in the first group of an SAE with groups; 0: no groups.
    """

    def __init__(self, n_features: int, *, n_blocks: int = 0, n_first: int = 0) -> None:
        if not 0 <= n_first < n_features:
            raise ValueError(
                f"the first group must have 1 to {n_features - 1} of {n_features} features, "
                f"not {n_first}"
            )
        self.n_features = n_features
        self.n_first = n_first
        super().__init__(n_blocks)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        inputs: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """Add a batch: features [B, T, F], inputs [B, T, d_in], segments and valid [B, T]."""
        require_shape(features, self.n_features)
        segments, valid = checked_masks(features, segments, valid)
        if inputs.shape[:2] != features.shape[:2]:
            raise ValueError(
                f"inputs must be [contexts, positions, d_in] with {tuple(features.shape[:2])} "
                f"in front, not {tuple(inputs.shape)}"
            )
        step_BT = inputs.double().diff(dim=1).norm(dim=2)
        counted_BT = pair_mask(segments, valid, 1) & (step_BT > 0)
        slope_BTF = features.double().diff(dim=1).abs() / step_BT[..., None]
        slope_BF = torch.where(counted_BT[..., None], slope_BTF, 0.0).amax(1)
        active_BF = ((features > 0) & valid[..., None]).any(1) & counted_BT.any(1, keepdim=True)
        slope_BF = torch.where(active_BF, slope_BF, 0.0)
        n_active_BP = self._parts(active_BF)
        sums = {
            "block_slopes": slope_BF,
            "block_active": active_BF,
            "block_means": self._parts(slope_BF) / n_active_BP.clamp(min=1),
            "block_contexts": n_active_BP > 0,
        }
        self._add_to_blocks(sums)
        self.n_contexts += len(features)

    def compute(self) -> SmoothnessResult:
        """The result over all batches; see `smoothness`."""
        sums = {name: value.sum(0) for name, value in self._require_batches().items()}
        value_P = sums["block_means"] / sums["block_contexts"]
        return SmoothnessResult(
            value=value_P[0],
            per_feature=sums["block_slopes"] / sums["block_active"],
            groups=value_P[1:],
        )

    def resample(self, weights_RG: Tensor) -> Tensor:
        """`value`, and `groups` if there are any, of resampled blocks, [R, 1] or [R, 3]."""
        self._require_batches()
        means = self._drawn("block_means", weights_RG)
        return means / self._drawn("block_contexts", weights_RG)

    def _parts(self, x_BF: Tensor) -> Tensor:
        """Sums over all features and, with groups, over the first and the rest: [B, 1 or 3]."""
        parts = [x_BF]
        if self.n_first:
            parts += [x_BF[:, : self.n_first], x_BF[:, self.n_first :]]
        return torch.stack([part.sum(1) for part in parts], 1)
