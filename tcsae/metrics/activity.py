"""When a feature is on, for how long, how strongly, and how smoothly it follows its input.

A feature is on where f > 0. Shapes: B contexts of a batch, T positions, F features, G blocks
of documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.accumulator import Accumulator, with_deleted
from tcsae.metrics.masks import checked_masks, pair_mask, require_shape
from tcsae.metrics.units import MAX_BLOCKS, Units


class ActivityResult(NamedTuple):
    """What `Activity.compute` returns; [F] float64 unless said otherwise.

    Attributes:
        density: share of the valid tokens on which the feature is on, 0 to 1.
        mean_activation: mean of f over those tokens, in units of f. NaN if it is never on.
        amplitude_cv: standard deviation over mean of f over those tokens, the squared mean taken
            from pairs of different documents: one document shows no spread between documents. NaN
            if it is on in fewer than two.
        persistence: P(on at t + 1 | on at t) - P(on at t + 1 | off at t), -1 to 1; 0 for a
            feature that fires independently from token to token. NaN if it is never on or never
            off before a counted neighbour.
        run_length: mean length of a run of on, in positions. NaN if no run was seen to end: longer
            than could be seen if it was ever on before a counted neighbour.
        frac_alive: [], share of the features that were on at least once.
    """

    density: Tensor
    mean_activation: Tensor
    amplitude_cv: Tensor
    persistence: Tensor
    run_length: Tensor
    frac_alive: Tensor


class LiveShare(NamedTuple):
    """Share of the features that ever fire, [1 + G]: of all, and without each block."""

    value: Tensor
    reason: str | None
    """Why it cannot be told; None if it can."""


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
        units, n_blocks: see `Accumulator`.
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int | None = None,
        *,
        units: Units | None = None,
        n_blocks: int = MAX_BLOCKS,
    ) -> None:
        self.n_features = n_features
        self.n_positions = n_positions
        super().__init__(units, n_blocks)

    def reset(self) -> None:
        super().reset()
        self._fires: list[Tensor] = []

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
        self._add_to_blocks(sums, self._blocks_of(len(features), features.device))
        self._fires.append(on_B3F[:, 0] > 0)
        self.n_contexts += len(features)

    def compute(self) -> ActivityResult:
        """The result over all batches; see `ActivityResult`."""
        result = {name: value[0] for name, value in self.rows(deletions=False).items()}
        alive = (self._state["block_on"].sum(0) > 0).double().mean()
        return ActivityResult(**result, frac_alive=alive)

    def rows(self, deletions: bool = True, blocks_G: Tensor | None = None) -> dict[str, Tensor]:
        """The [F] fields of ActivityResult: of all, and without each block, [1 + G, F].

        Args:
            deletions: False: of all only.
            blocks_G: bool, the blocks that are looked at. None: all.
        """
        state = dict(self._require_batches())
        if blocks_G is not None:
            kept = blocks_G.to(state["block_on"])[:, None]
            state = {name: value[: len(kept)] * kept for name, value in state.items()}
        for name in ("block_amplitude", "block_on"):
            state[f"{name}_own"] = state[name].square()
        n_used = self.n_used
        return _activity({n: with_deleted(v, n_used, deletions) for n, v in state.items()})

    def contexts_on(self) -> Tensor:
        """Number of contexts in which each feature is on, [F]."""
        self._require_batches()
        return torch.cat(self._fires).sum(0)

    def live_share(self, deletions: bool = True) -> LiveShare:
        """Share of the features that ever fire, estimated from those seen in few documents.

        With S features seen in m documents, Q1 of them in one and Q2 in two:

            S + (m - 1) / m * Q1^2 / (2 Q2)    of F, F at most (Chao 1987, "Chao2")

        Exact where the unseen are like the rare ones, a lower bound where they are rarer still;
        the share seen alone grows with the number of tokens, and is smaller for features that
        keep to a few documents.
        """
        fires_NF = torch.cat(self._fires)
        units = self.units or Units.of_contexts(len(fires_NF))
        document_N = units.document[: len(fires_NF)].to(fires_NF.device)
        n_documents = units.n_documents
        seen_DF = fires_NF.new_zeros(n_documents, fires_NF.shape[1], dtype=torch.float32)
        seen_DF = (seen_DF.index_add_(0, document_N, fires_NF.float()) > 0).float()
        count_F = seen_DF.sum(0)
        block_N = self._block_of_all(len(fires_NF)).to(fires_NF.device)
        rows = [_chao(count_F, n_documents)]
        if deletions:
            block_D = block_N.new_zeros(n_documents).index_copy_(0, document_N, block_N)
            for block in range(self.n_used):
                gone_D = block_D == block
                left_F = count_F - seen_DF[gone_D].sum(0)
                rows.append(_chao(left_F, n_documents - int(gone_D.sum())))
        once, twice = ((count_F == n).sum() for n in (1, 2))
        reason = None
        if once > 0.01 * len(count_F) and twice == 0:
            reason = (
                f"cannot tell: {int(once)} features were seen in one document and none in two, so "
                "nothing says how many were not seen"
            )
        return LiveShare(torch.stack(rows), reason)

    def _block_of_all(self, n_contexts: int) -> Tensor:
        if self.units is not None:
            return self.units.block[:n_contexts]
        return torch.arange(n_contexts) % self.n_blocks


def _chao(count_F: Tensor, n_documents: int) -> Tensor:
    """Estimated share of live features from the number of documents that each was seen in."""
    seen, once, twice = (count_F > 0).sum(), (count_F == 1).sum(), (count_F == 2).sum()
    pairs = once.square() / (2 * twice) if twice > 0 else once * (once - 1) / 2
    unseen = (n_documents - 1) / max(n_documents, 1) * pairs
    return ((seen + unseen).double() / len(count_F)).clamp(max=1.0)


def _activity(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fields of ActivityResult [..., F] from the sums of `Activity` [..., F] or [..., 1]."""
    on, before, after = sums["block_on"], sums["block_on_before"], sums["block_on_after"]
    stays, amplitude = sums["block_stays"], sums["block_amplitude"]
    ends = before - stays
    pairs = on.square() - sums["block_on_own"]
    square_of_mean = (amplitude.square() - sums["block_amplitude_own"]) / torch.where(
        pairs > 0, pairs, torch.nan
    )
    spread = (sums["block_squares"] / on - square_of_mean).clamp(min=0.0).sqrt()
    mean = amplitude / on
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
        units, n_blocks: see `Accumulator`.
        n_first: features in the first group of an SAE with groups; 0: no groups.
    """

    def __init__(
        self,
        n_features: int,
        *,
        units: Units | None = None,
        n_blocks: int = MAX_BLOCKS,
        n_first: int = 0,
    ) -> None:
        if not 0 <= n_first < n_features:
            raise ValueError(
                f"the first group must have 1 to {n_features - 1} of {n_features} features, "
                f"not {n_first}"
            )
        self.n_features = n_features
        self.n_first = n_first
        super().__init__(units, n_blocks)

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
        self._add_to_blocks(sums, self._blocks_of(len(features), features.device))
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

    def rows(self) -> Tensor:
        """`value`, and `groups` if there are any: of all, and without each block, [1 + G, P]."""
        state = self._require_batches()
        means, contexts = (
            with_deleted(state[name], self.n_used, True)
            for name in ("block_means", "block_contexts")
        )
        return means / contexts

    def _parts(self, x_BF: Tensor) -> Tensor:
        """Sums over all features and, with groups, over the first and the rest: [B, 1 or 3]."""
        parts = [x_BF]
        if self.n_first:
            parts += [x_BF[:, : self.n_first], x_BF[:, self.n_first :]]
        return torch.stack([part.sum(1) for part in parts], 1)
