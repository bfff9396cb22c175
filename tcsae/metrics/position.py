"""How much a feature depends on the position in the context: share of variance, information.

Consistent and position-invariant are two things: a feature can be constant within windows and
still belong to one stretch of positions. Shapes: B contexts of a batch, T positions, F features,
G blocks of documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.accumulator import with_deleted
from tcsae.metrics.autocorrelation import Autocorrelation
from tcsae.metrics.masks import checked_masks
from tcsae.metrics.position_sums import Added
from tcsae.metrics.units import MAX_BLOCKS, Units

# Positions before this one are near the start of the context, where models behave differently.
EDGE = 8

# Features whose pairs of blocks are held at a time.
_FEATURE_CHUNK = 64


class PositionResult(NamedTuple):
    """What `position_dependence` returns; [F] unless said otherwise, all float64.

    Attributes:
        eta_squared: share of the variance that lies between positions, 0 to 1.
        omega_squared: the same without the bias of few documents, whatever a feature keeps over a
            context or a document; may be slightly negative.
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


def position_dependence(
    features: Tensor, *, valid: Tensor | None = None, units: Units | None = None
) -> PositionResult:
    """Dependence of each feature on the position within the context.

    With n_t valid tokens at position t, n in all, T positions that were seen, and the sums of
    squares between (SSB) and in total (SST) of a one-way analysis of variance with the position
    as the factor:

        eta^2   = SSB / SST
        omega^2 = b / v, the variance between positions from pairs of DIFFERENT documents
        I       = (H(p) - sum_t (n_t / n) H(p_t)) * b' / b''

    With U as in `position_sums`, m2 the same for the means over all tokens of a document:

        b = sum_t n_t U(t, t) / n - m2       (positions seen in two documents)
        v = mean over tokens of f^2 - m2

    No product of a document with itself is in b, so it is 0 on average for a feature that does not
    know its position even if it keeps its value over a whole document. Hays' omega^2 (1963)
    takes the tokens of a context for independent, and is too low by D / N where a share D of the
    variance is common to a context. Everything is taken about the mean over all tokens: with
    masks the estimate depends a little on the origin.

    H is the entropy of firing in nats, p_t the firing rate at t and p the rate overall; H(p) less
    the mean of H(p_t) is the mutual information of position and firing (Voita et al. 2023, arXiv
    2309.04827). It is too large by what the p_t vary by chance. Miller's correction (T - 1) / (2 n)
    (1955) takes tokens for independent; here b'' is the variance of the p_t as seen, b' the same
    from pairs of different documents, as b above: 0 on average, and I with it, for a feature that
    does not know its position, however long it lasts.

    eta^2 of a feature without any dependence is (T - 1) / (n - 1), about 1 / N for N contexts.
    With a single document nothing can be told apart from noise, and everything but the profiles is
    NaN; so is a feature that does not vary. A feature that always fires has I = 0, one that never
    fires NaN.

    Args:
        features: [B, T, F].
        valid: [B, T] bool. None: every position is valid.
        units: which contexts are from one document. None: each from its own.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> position_dependence(torch.rand(64, 128, 16)).omega_squared.shape
        torch.Size([16])
    """
    checked_masks(features, None, valid)
    accumulator = PositionDependence(features.shape[2], features.shape[1], units=units)
    accumulator.update(features, valid=valid)
    return accumulator.compute()


class PositionDependence:
    """`position_dependence` over any number of batches.

    Memory: that of `PositionSums`, and 4 G T F bytes more (75 MB at G = 64, T = 128, F = 2304).

    Args:
        n_features: F.
        n_positions: T.
        units, n_blocks: see `Accumulator`.
        memory: that shares its sums, is updated by its owner, who then calls `add`. None: its own.
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int,
        *,
        units: Units | None = None,
        n_blocks: int = MAX_BLOCKS,
        memory: Autocorrelation | None = None,
    ) -> None:
        self.n_positions = n_positions
        self._memory = memory or Autocorrelation(
            n_features, n_positions, 0, units=units, n_blocks=n_blocks
        )
        self._sums = self._memory.sums
        self._state: dict[str, Tensor] = {}

    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Add a batch: features [B, T, F], valid [B, T]. `segments` changes nothing: the position
        in the context is what the model sees."""
        for added in self._sums.add(features, segments=segments, valid=valid):
            self._memory.add(added)
            self.add(added)

    @torch.no_grad()
    def add(self, added: Added) -> None:
        """Add contexts that the shared sums have taken in."""
        f_BTF, valid_BT = added.features, added.valid
        if not self._state:
            (_, t, f), blocks = f_BTF.shape, self._sums.n_blocks
            self._state = {
                "fires": torch.zeros(blocks, t, f, device=f_BTF.device),
                "energy": added.d.new_zeros(blocks, t),
            }
        fires_BTF = (f_BTF > 0) & valid_BT[..., None]
        energy_BT = torch.where(valid_BT, f_BTF.square().sum(2, dtype=torch.float64), 0.0)
        self._state["fires"].index_add_(0, added.block, fires_BTF.float())
        self._state["energy"].index_add_(0, added.block, energy_BT)

    def reset(self) -> None:
        """Forget every batch."""
        self._memory.reset()
        self._state = {}

    def compute(self) -> PositionResult:
        """The result over all batches; see `position_dependence`."""
        shares = {name: value[0] for name, value in self.shares(deletions=False).items()}
        return PositionResult(**shares, **self.profiles())

    def profiles(self) -> dict[str, Tensor]:
        """`profile_rate` and `profile_mean` of PositionResult."""
        sums = self._sums.centred()
        counts_T1 = sums["block_counts"].sum(0)[:, None]
        return {
            "profile_rate": self._state["fires"].sum(0).double() / counts_T1,
            "profile_mean": sums["block_sums"].sum(0) / counts_T1 + self._sums.origin_F,
        }

    def shares(self, deletions: bool = True) -> dict[str, Tensor]:
        """The four shares by their names in PositionResult: of all, and without each block,
        [1 + G, F]; eta_squared of all only, [1, F]."""
        information_RF, entropy_RF = self._information(deletions)
        share_RF = information_RF / torch.where(entropy_RF > 0, entropy_RF, torch.nan)
        return {
            "eta_squared": self._eta_squared()[None],
            "omega_squared": self._omega_squared(deletions),
            "mutual_information": information_RF,
            "mutual_information_share": share_RF,
        }

    def energy_by_position(self) -> Tensor:
        """E_t, sum over features of the mean of f^2 over the valid tokens at a position, over its
        mean from position 8 on; [T] float64, NaN where no token is valid."""
        counts_T = self._sums.centred()["block_counts"].sum(0)
        energy_T = self._state["energy"].sum(0)
        rest = energy_T[EDGE:].sum() / counts_T[EDGE:].sum()
        return energy_T / counts_T / torch.where(rest > 0, rest, torch.nan)

    def edge_energy(self, deletions: bool = True) -> Tensor:
        """Mean over tokens of the energy at positions 1 to 7, over that from position 8 on, of all
        and without each block; [1 + G] float64, NaN where either has no valid token or no feature
        is on."""
        n_used, counts_GT = self._sums.n_used, self._sums.centred()["block_counts"]
        energy_RT = with_deleted(self._state["energy"], n_used, deletions)
        counts_RT = with_deleted(counts_GT, n_used, deletions)
        near, rest = (
            energy_RT[:, part].sum(1) / counts_RT[:, part].sum(1)
            for part in (slice(1, EDGE), slice(EDGE, None))
        )
        return near / torch.where(rest > 0, rest, torch.nan)

    def counted_twice(self, energy_F: Tensor, seen_F: Tensor) -> dict[str, Tensor]:
        """What the jackknife has too much in the variance of `omega_squared` [F], and of the means
        over features `omega_squared_mean`, `mutual_information`, `mutual_information_share` [].

        Where nothing hangs on the position b is a sum over pairs of documents in which no document
        has a part alone, and the jackknife gives twice its variance (Efron and Stein 1981). What
        is too much is 2 sum over pairs of K^2, with K what the pair adds to b, less the means of
        its two documents.

        Args:
            energy_F: c_j(0), 0 for features that are left out.
            seen_F: bool, those whose information enters the means of it.
        """
        sums, fires_GTF = self._sums.centred(), self._state["fires"][: self._sums.n_used]
        counts_GT, totals_GTF = sums["block_counts"], sums["block_sums"]
        omega_F = self._omega_squared(False)[0]
        known_F = omega_F.isfinite() & (energy_F > 0)
        variance_F = torch.where(known_F, energy_F / (1.0 - omega_F), torch.nan)
        rate_F = fires_GTF.sum((0, 1), dtype=torch.float64) / counts_GT.sum()
        entropy_F = _binary_entropy(rate_F)
        seen_energy_F = torch.where(seen_F, energy_F, 0.0)
        scale_F = torch.where(entropy_F > 0, seen_energy_F / (2 * rate_F * (1 - rate_F)), 0.0)
        weights_F3 = torch.stack(
            [known_F.double(), scale_F, torch.where(entropy_F > 0, scale_F / entropy_F, 0.0)], 1
        )
        pairs_GG3 = counts_GT.new_zeros(*[len(counts_GT)] * 2, 3)
        single = []
        for some in torch.arange(len(energy_F)).split(_FEATURE_CHUNK):
            kernel_GGF = _pair_kernel(totals_GTF[..., some], counts_GT)
            single.append(_second_order(kernel_GGF) / variance_F[some].square())
            pairs_GG3[..., :1] += kernel_GGF @ weights_F3[some, :1]
            kernel_GGF = _pair_kernel(fires_GTF[..., some].double(), counts_GT)
            pairs_GG3[..., 1:] += kernel_GGF @ weights_F3[some, 1:]
        of_means_3 = _second_order(pairs_GG3)
        total = seen_energy_F.sum().square()
        return {
            "omega_squared": torch.cat(single),
            "omega_squared_mean": of_means_3[0] / variance_F.nansum().square(),
            "mutual_information": of_means_3[1] / total,
            "mutual_information_share": of_means_3[2] / total,
        }

    def _eta_squared(self) -> Tensor:
        sums = self._sums.centred()
        counts_T = sums["block_counts"].sum(0)
        eta_F = variance_share(sums["block_sums"].sum(0), sums["block_squares"].sum(0), counts_T)
        return torch.where(self._varying(), eta_F, torch.nan)

    def _omega_squared(self, deletions: bool) -> Tensor:
        sums, n_used = self._sums.centred(), self._sums.n_used
        at_position_RF, paired_R = self._memory.position_means(deletions)
        total_GF, tokens_G1 = sums["block_sums"].sum(1), sums["block_counts"].sum(1)[:, None]
        s, s2, n, n2, squares = (
            with_deleted(x, n_used, deletions)
            for x in (
                *(total_GF, total_GF.square(), tokens_G1, tokens_G1.square()),
                sums["block_squares"],
            )
        )
        pairs = n.square() - n2
        overall_RF = (s.square() - s2) / torch.where(pairs > 0, pairs, torch.nan)
        variance_RF = squares / n - overall_RF
        known_RF = (paired_R[:, None] > 0) & (variance_RF > 0) & self._varying()
        return torch.where(known_RF, at_position_RF - overall_RF, torch.nan) / variance_RF

    def _varying(self) -> Tensor:
        """[F] bool: the feature is no constant."""
        sums = self._sums.centred()
        # The sums are about the mean over all tokens.
        mean_square_F = sums["block_squares"].sum(0) / sums["block_counts"].sum().clamp(min=1)
        return ~self._sums.constant(mean_square_F)

    def _information(self, deletions: bool) -> tuple[Tensor, Tensor]:
        """I less its bias and the entropy of firing, [1 + G, F]."""
        n_used, counts_GT = self._sums.n_used, self._sums.centred()["block_counts"]
        fires_GTF = self._state["fires"][:n_used]
        fires_TF, counts_T = fires_GTF.sum(0, dtype=torch.float64), counts_GT.sum(0)
        own = {
            "own_at": torch.linalg.vector_norm(fires_GTF, dim=0, dtype=torch.float64).square(),
            "own": fires_GTF.sum(1).double().square().sum(0),
            "own_at_tokens": counts_GT.square().sum(0),
            "own_tokens": counts_GT.sum(1).square().sum(),
        }
        rows = [_corrected_information(fires_TF, counts_T, **own)]
        for f_TF, n_T in zip(fires_GTF, counts_GT, strict=True) if deletions else ():
            f_TF = f_TF.double()
            left = {
                "own_at": own["own_at"] - f_TF.square(),
                "own": own["own"] - f_TF.sum(0).square(),
                "own_at_tokens": own["own_at_tokens"] - n_T.square(),
                "own_tokens": own["own_tokens"] - n_T.sum().square(),
            }
            rows.append(_corrected_information(fires_TF - f_TF, counts_T - n_T, **left))
        information_RF, entropy_RF = (torch.stack(parts) for parts in zip(*rows, strict=True))
        if n_used < 2:
            information_RF = torch.full_like(information_RF, torch.nan)
        return torch.where(fires_TF.sum(0) > 0, information_RF, torch.nan), entropy_RF


def _corrected_information(
    fires_TF: Tensor,
    counts_T: Tensor,
    *,
    own_at: Tensor,
    own: Tensor,
    own_at_tokens: Tensor,
    own_tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """I less its bias, and the entropy of firing, [F] each.

    Args:
        own_at, own: sums over blocks of their squared firings, at each position [T, F] and over
            all positions [F]; own_at_tokens [T], own_tokens []: of their squared tokens.
    """
    information_F, entropy_F = position_information(fires_TF, counts_T)
    rate_F, n = fires_TF.sum(0) / counts_T.sum(), counts_T.sum()
    at_TF = fires_TF / counts_T.clamp(min=1)[:, None]
    seen_F = (counts_T[:, None] * (at_TF - rate_F).square()).sum(0) / n
    pairs_T = counts_T.square() - own_at_tokens
    different_TF = (fires_TF.square() - own_at) / pairs_T.clamp(min=1)[:, None]
    weights_T = torch.where(pairs_T > 0, counts_T, 0.0)
    overall_F = (fires_TF.sum(0).square() - own) / (n.square() - own_tokens).clamp(min=1)
    between_F = (weights_T[:, None] * different_TF).sum(0) / weights_T.sum() - overall_F
    share_F = torch.where(seen_F > 0, between_F / seen_F, 0.0)
    return information_F * share_F, entropy_F


def _pair_kernel(sums_GTF: Tensor, counts_GT: Tensor) -> Tensor:
    """What each pair of blocks adds to the variance between positions b, [G, G, F]."""
    counts_T, totals_GF = counts_GT.sum(0), sums_GTF.sum(1)
    pairs_T = counts_T.square() - counts_GT.square().sum(0)
    rate_T = torch.where(pairs_T > 0, counts_T / pairs_T.clamp(min=1), 0.0)
    rate_T /= torch.where(pairs_T > 0, counts_T, 0.0).sum().clamp(min=1)
    n, n2 = counts_T.sum(), counts_GT.sum(1).square().sum()
    rows_FGT = sums_GTF.permute(2, 0, 1)
    at_position_FGG = (rows_FGT * rate_T) @ rows_FGT.transpose(1, 2)
    overall_FGG = totals_GF.T[:, :, None] * totals_GF.T[:, None] / (n.square() - n2).clamp(min=1)
    return (at_position_FGG - overall_FGG).permute(1, 2, 0)


def _second_order(kernel_GGF: Tensor) -> Tensor:
    """2 sum over ordered pairs of K^2, K less the means of the rows of its two blocks, [F]."""
    n = len(kernel_GGF)
    apart_GG1 = 1.0 - torch.eye(n, dtype=kernel_GGF.dtype, device=kernel_GGF.device)[..., None]
    kernel_GGF = kernel_GGF * apart_GG1
    # Off the diagonal: K - a_g - a_h with the row means taken out exactly.
    row_GF = kernel_GGF.sum(1) / max(n - 2, 1)
    centre_F = kernel_GGF.sum((0, 1)) / max((n - 1) * (n - 2), 1)
    left_GGF = (kernel_GGF - row_GF[:, None] - row_GF[None] + centre_F) * apart_GG1
    return 2.0 * left_GGF.square().sum((0, 1))


def variance_share(sums: Tensor, squares: Tensor, counts: Tensor) -> Tensor:
    """eta^2 [..., F] from the sums by position [..., T, F], the sums of squares [..., F] and the
    numbers of tokens by position [..., T].

    NaN where no position was seen twice, or nothing varies.
    """
    total = counts.sum(-1)[..., None]
    groups = (counts > 0).sum(-1)[..., None]
    centre = sums.sum(-2).square() / total
    between = (sums.square() / counts.clamp(min=1)[..., None]).sum(-2) - centre
    overall = squares - centre
    return between / torch.where((total > groups) & (overall > 0), overall, torch.nan)


def position_information(fires: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mutual information of position and firing as it is seen, bias included, and the entropy of
    firing, in nats [..., F], from firings by position [..., T, F] and tokens by position [..., T].

    NaN where no position was seen twice.
    """
    total = counts.sum(-1)[..., None]
    groups = (counts > 0).sum(-1)[..., None]
    weights = (counts / total)[..., None]
    entropy = _binary_entropy(fires.sum(-2) / total)
    within = (weights * _binary_entropy(fires / counts.clamp(min=1)[..., None])).sum(-2)
    return torch.where(total > groups, entropy - within, torch.nan), entropy


def _binary_entropy(p: Tensor) -> Tensor:
    # log is several times faster than xlogy, and 0 times a finite log is 0 all the same.
    smallest = torch.finfo(p.dtype).tiny
    q = 1 - p
    return -(p * p.clamp(min=smallest).log() + q * q.clamp(min=smallest).log())
