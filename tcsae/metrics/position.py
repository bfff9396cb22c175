"""How much a feature depends on the position in the context: share of variance, information.

Consistent and position-invariant are two things: a feature can be constant within windows and
still belong to one stretch of positions. Shapes: B contexts of a batch, T positions, F features,
G bootstrap blocks, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from tcsae.metrics.autocorrelation import CONSTANT
from tcsae.metrics.bootstrap import Accumulator
from tcsae.metrics.masks import checked_masks, require_shape


class PositionResult(NamedTuple):
    """What `position_dependence` returns; [F] unless said otherwise, all float64.

    Attributes:
        eta_squared: share of the variance that lies between positions, 0 to 1.
        omega_squared: the same without the bias of few contexts; may be slightly negative.
        mutual_information: between position and firing, in nats; may be slightly negative.
        mutual_information_share: divided by the entropy of firing. NaN if that is 0.
        profile_rate: [T, F], share of valid tokens at a position on which the feature fires.
        profile_mean: [T, F], mean activation over those tokens, zeros included.
    """

    eta_squared: Tensor
    omega_squared: Tensor
    mutual_information: Tensor
    mutual_information_share: Tensor
    profile_rate: Tensor
    profile_mean: Tensor


def position_dependence(features: Tensor, *, valid: Tensor | None = None) -> PositionResult:
    """Dependence of each feature on the position within the context.

    With n_t valid tokens at position t, n in all, T positions that were seen, and the sums of
    squares between (SSB), within (SSW) and in total (SST) of a one-way analysis of variance with
    the position as the factor, MSW = SSW / (n - T):

        eta^2   = SSB / SST
        omega^2 = (SSB - (T - 1) MSW) / (SST + MSW)                         (Hays 1963)
        I       = H(p) - sum_t (n_t / n) H(p_t) - (T - 1) / (2 n)

    H is the entropy of firing in nats, p_t the firing rate at t and p the rate overall. I is the
    mutual information of position and firing (Voita et al. 2023, arXiv 2309.04827), less its bias
    (Miller 1955). With as many tokens at every position it is (1 / T) sum_t [p_t ln(p_t / p) +
    (1 - p_t) ln((1 - p_t) / (1 - p))] - (T - 1) / (2 N T). For features that fire less often than
    there are positions that bias is overstated, and I comes out a little under 0.

    eta^2 of a feature without any dependence is (T - 1) / (n - 1), about 1 / N for N contexts.
    With a single context nothing can be told apart from noise, and everything but the profiles is
    NaN; so is a feature that does not vary. A feature that always fires has I = 0, one that never
    fires NaN.

    Args:
        features: [B, T, F].
        valid: [B, T] bool. None: every position is valid.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> position_dependence(torch.rand(64, 128, 16)).omega_squared.shape
        torch.Size([16])
    """
    checked_masks(features, None, valid)
    accumulator = PositionDependence(features.shape[2], features.shape[1])
    accumulator.update(features, valid=valid)
    return accumulator.compute()


class PositionDependence(Accumulator):
    """`position_dependence` over any number of batches.

    Memory: 16 T F bytes, and with blocks 8 G T F bytes more (151 MB at G = 64, T = 128,
    F = 2304).

    Args:
        n_features: F.
        n_positions: T.
        n_blocks: G, groups of whole contexts whose sums are kept apart for the bootstrap.
            0: none, and no intervals.
    """

    def __init__(self, n_features: int, n_positions: int, *, n_blocks: int = 0) -> None:
        self.n_features = n_features
        self.n_positions = n_positions
        super().__init__(n_features=n_features, n_positions=n_positions, n_blocks=n_blocks)

    @torch.no_grad()
    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Add a batch: features [B, T, F], valid [B, T]. `segments` changes nothing: the position
        in the context is what the model sees."""
        require_shape(features, self.n_features, self.n_positions)
        _, valid = checked_masks(features, segments, valid)
        if not self._state:
            self._start(features, valid)
        state = self._state
        d_BTF = torch.where(valid[..., None], features - state["origin"], 0.0)
        squares_BF = d_BTF.square().sum(1)
        fires_BTF = ((features > 0) & valid[..., None]).float()
        state["sums"] += d_BTF.sum(0)
        state["squares"] += squares_BF.sum(0)
        state["fires"] += fires_BTF.sum(0)
        state["counts"] += valid.sum(0)
        if self.n_blocks:
            block = self._blocks_of(len(features), d_BTF.device)
            state["block_sums"].index_add_(0, block, d_BTF.float())
            state["block_squares"].index_add_(0, block, squares_BF.float())
            state["block_fires"].index_add_(0, block, fires_BTF)
            state["block_counts"].index_add_(0, block, valid.float())
        self.n_contexts += len(features)

    def compute(self) -> PositionResult:
        """The result over all batches; see `position_dependence`."""
        state = self._require_batches()
        counts_T1 = state["counts"][:, None]
        shares = self._shares(state["sums"], state["squares"], state["fires"], state["counts"])
        return PositionResult(
            **shares,
            profile_rate=state["fires"] / counts_T1,
            profile_mean=state["sums"] / counts_T1 + state["origin"],
        )

    def resample(self, weights_RG: Tensor) -> dict[str, Tensor]:
        """The four shares of resampled blocks, [R, F] each, by their names in PositionResult."""
        self._require_batches()
        names = ("block_sums", "block_squares", "block_fires", "block_counts")
        return self._shares(*(self._drawn(name, weights_RG) for name in names))

    def _shares(
        self, sums: Tensor, squares: Tensor, fires: Tensor, counts: Tensor
    ) -> dict[str, Tensor]:
        """The [..., F] fields of PositionResult from sums [..., T, F], [..., F] and [..., T]."""
        state = self._state
        eta, omega = variance_shares(sums, squares, counts)
        information, entropy = position_information(fires, counts)
        total, origin = state["counts"].sum(), state["origin"]
        raw_squares = state["squares"] + (2 * state["sums"].sum(0) + total * origin) * origin
        varying = state["squares"] - state["sums"].sum(0) ** 2 / total > CONSTANT * raw_squares
        information = torch.where(state["fires"].sum(0) > 0, information, torch.nan)
        return {
            "eta_squared": torch.where(varying, eta, torch.nan),
            "omega_squared": torch.where(varying, omega, torch.nan),
            "mutual_information": information,
            "mutual_information_share": information / torch.where(entropy > 0, entropy, torch.nan),
        }

    def _relative_to(self, first: Self) -> dict[str, Tensor]:
        state = self._state
        shift_F = first._state["origin"] - state["origin"]
        moved = {"fires": state["fires"], "counts": state["counts"]}
        moved |= _shifted(state["sums"], state["squares"], state["counts"], shift_F, "")
        if self.n_blocks:
            moved |= {name: state[name] for name in ("block_fires", "block_counts")}
            sums, squares = state["block_sums"], state["block_squares"]
            moved |= _shifted(sums, squares, state["block_counts"], shift_F.float(), "block_")
        return moved

    def _start(self, features: Tensor, valid: Tensor) -> None:
        t, f, blocks, device = self.n_positions, self.n_features, self.n_blocks, features.device
        f_BTF = torch.where(valid[..., None], features, 0.0).double()
        self._state = {
            "origin": f_BTF.sum((0, 1)) / valid.sum().clamp(min=1),
            "sums": f_BTF.new_zeros(t, f),
            "squares": f_BTF.new_zeros(f),
            "fires": f_BTF.new_zeros(t, f),
            "counts": f_BTF.new_zeros(t),
        }
        if blocks:
            self._state |= {
                "block_sums": torch.zeros(blocks, t, f, device=device),
                "block_squares": torch.zeros(blocks, f, device=device),
                "block_fires": torch.zeros(blocks, t, f, device=device),
                "block_counts": torch.zeros(blocks, t, device=device),
            }


def _shifted(
    sums: Tensor, squares: Tensor, counts: Tensor, shift_F: Tensor, prefix: str
) -> dict[str, Tensor]:
    """Sums [..., T, F] and squares [..., F] of the features less `shift_F`."""
    total = counts.sum(-1)[..., None]
    return {
        f"{prefix}sums": sums - counts[..., None] * shift_F,
        f"{prefix}squares": squares - (2 * sums.sum(-2) - total * shift_F) * shift_F,
    }


def variance_shares(sums: Tensor, squares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """eta^2 and omega^2, each [..., F], from the sums by position [..., T, F], the sums of squares
    [..., F] and the numbers of tokens by position [..., T].

    NaN where no position was seen twice, or nothing varies.
    """
    total = counts.sum(-1)[..., None]
    groups = (counts > 0).sum(-1)[..., None]
    centre = sums.sum(-2).square() / total
    between = (sums.square() / counts.clamp(min=1)[..., None]).sum(-2) - centre
    overall = squares - centre
    spare = total - groups
    mean_square_within = (overall - between) / torch.where(spare > 0, spare, torch.nan)
    known = (spare > 0) & (overall > 0)
    eta = between / torch.where(known, overall, torch.nan)
    omega = (between - (groups - 1) * mean_square_within) / (overall + mean_square_within)
    return eta, torch.where(known, omega, torch.nan)


def position_information(fires: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mutual information of position and firing, and the entropy of firing, in nats [..., F], from
    firings by position [..., T, F] and tokens by position [..., T].

    NaN where no position was seen twice. The bias is not taken off a feature that always or never
    fires: its information is 0 for certain.
    """
    total = counts.sum(-1)[..., None]
    groups = (counts > 0).sum(-1)[..., None]
    weights = (counts / total)[..., None]
    entropy = _binary_entropy(fires.sum(-2) / total)
    within = (weights * _binary_entropy(fires / counts.clamp(min=1)[..., None])).sum(-2)
    bias = torch.where(entropy > 0, (groups - 1) / (2 * total), 0.0)
    return torch.where(total > groups, entropy - within - bias, torch.nan), entropy


def _binary_entropy(p: Tensor) -> Tensor:
    # log is several times faster than xlogy, and 0 times a finite log is 0 all the same.
    smallest = torch.finfo(p.dtype).tiny
    q = 1 - p
    return -(p * p.clamp(min=smallest).log() + q * q.clamp(min=smallest).log())
