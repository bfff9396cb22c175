"""How much a feature depends on the position in the context: share of variance, information.

Consistent and position-invariant are two things: a feature can be constant within windows and
still belong to one stretch of positions. Shapes: B contexts of a batch, T positions, F features,
G bootstrap blocks, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tcsae.metrics.autocorrelation import CONSTANT
from tcsae.metrics.bootstrap import Accumulator
from tcsae.metrics.masks import checked_masks, require_shape

# Positions before this one are near the start of the context, where models behave differently.
EDGE = 8

# Sums over tokens that a resample draws as often as the block; sums of squares of whole contexts,
# the pairs of a context with itself, that it draws with the square of that.
_OF_TOKENS = ("sums", "fires", "counts")
_OF_CONTEXTS = ("own_squares", "own_tokens")
_MOVING = ("sums", "squares", "counts", "own_squares", "own_cross", "own_tokens")


class PositionResult(NamedTuple):
    """What `position_dependence` returns; [F] unless said otherwise, all float64.

    Attributes:
        eta_squared: share of the variance that lies between positions, 0 to 1.
        omega_squared: the same without the bias of few contexts, whatever a feature keeps over a
            context; may be slightly negative.
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
    squares between (SSB) and in total (SST) of a one-way analysis of variance with the position
    as the factor:

        eta^2   = SSB / SST
        omega^2 = b / v, the variance between positions from pairs of DIFFERENT contexts
        I       = H(p) - sum_t (n_t / n) H(p_t) - (T - 1) / (2 n)

    With S_t and Q_t the sums over contexts of f and f^2 at position t, R_n and Y_n the sum of f
    and the number of valid tokens of context n:

        m2 = ((sum_n R_n)^2 - sum_n R_n^2) / ((sum_n Y_n)^2 - sum_n Y_n^2)
        b  = sum_t (S_t^2 - Q_t) / (n_t - 1) / sum_t n_t - m2       (positions with n_t >= 2)
        v  = sum_t Q_t / sum_t n_t - m2

    No product of a context with itself is in b, so it is 0 on average for a feature that does not
    know its position even if it keeps its value over the whole context. Hays' omega^2 (1963)
    takes the tokens of a context for independent, and is too low by D / N where a share D of the
    variance is common to a context. Everything is taken about the mean over all tokens: with
    masks the estimate depends a little on the origin.

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

    Memory: 24 T F bytes, and with blocks 12 G T F bytes more (226 MB at G = 64, T = 128,
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
        super().__init__(n_blocks)

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
        tokens_B = valid.sum(1).double()
        context_BF = d_BTF.sum(1)
        sums = {
            "sums": d_BTF,
            "squares": d_BTF.square(),
            "fires": ((features > 0) & valid[..., None]).float(),
            "counts": valid,
            "own_squares": context_BF.square(),
            "own_cross": context_BF * tokens_B[:, None],
            "own_tokens": tokens_B.square(),
            "energy": torch.where(valid, features.square().sum(2, dtype=torch.float64), 0.0),
        }
        block = self._blocks_of(len(features), d_BTF.device)
        for name, value in sums.items():
            state[name] += value.sum(0)
            if self.n_blocks:
                state[f"block_{name}"].index_add_(0, block, value.float())
        self.n_contexts += len(features)

    def compute(self) -> PositionResult:
        """The result over all batches; see `position_dependence`."""
        state = self._centred()
        counts_T = state["counts"]
        counts_T1 = counts_T[:, None]
        rate_T = _pair_rate(counts_T, counts_T)
        drawn = {name: state[name] for name in ("sums", "fires", "counts", *_OF_CONTEXTS)}
        drawn["squares"] = state["squares"].sum(0)
        drawn["own_pairs"] = rate_T @ state["squares"]
        return PositionResult(
            **self._shares(drawn | {"rate": rate_T}),
            profile_rate=state["fires"] / counts_T1,
            profile_mean=state["sums"] / counts_T1 + state["origin"],
        )

    def resample(self, weights_RG: Tensor) -> dict[str, Tensor]:
        """The four shares of resampled blocks, [R, F] each, by their names in PositionResult.

        Pairs of contexts i, j count w_i w_j times; a context drawn twice never meets its copy.
        """
        state = self._centred()
        twice_RG = weights_RG.square()
        drawn = {name: self._drawn(f"block_{name}", weights_RG) for name in _OF_TOKENS}
        drawn |= {name: self._drawn(f"block_{name}", twice_RG) for name in _OF_CONTEXTS}
        rate_RT = _pair_rate(drawn["counts"], self._drawn("block_counts", twice_RG))
        # One product for both sums of squares, so that no [R, T, F] of them is made.
        by_token = weights_RG[..., None].expand(*weights_RG.shape, self.n_positions)
        by_pair = twice_RG[..., None] * rate_RT[:, None]
        squares_GTF = state["block_squares"]
        rows = torch.cat([by_token, by_pair]).flatten(1).to(squares_GTF.dtype)
        drawn["squares"], drawn["own_pairs"] = (rows @ squares_GTF.flatten(0, 1)).chunk(2)
        return self._shares(drawn | {"rate": rate_RT})

    def energy_by_position(self) -> Tensor:
        """E_t, sum over features of the mean of f^2 over the valid tokens at a position, over its
        mean from position 8 on; [T] float64, NaN where no token is valid."""
        state = self._require_batches()
        energy_T, counts_T = state["energy"], state["counts"]
        rest = energy_T[EDGE:].sum() / counts_T[EDGE:].sum()
        return energy_T / counts_T / torch.where(rest > 0, rest, torch.nan)

    def edge_energy(self) -> Tensor:
        """Mean over tokens of the energy at positions 1 to 7, over that from position 8 on; []
        float64, NaN where either has no valid token or no feature is on."""
        state = self._require_batches()
        return _edge_energy(state["energy"], state["counts"])

    def resample_edge_energy(self, weights_RG: Tensor) -> Tensor:
        """`edge_energy` of resampled blocks, [R]."""
        self._require_batches()
        names = ("block_energy", "block_counts")
        return _edge_energy(*(self._drawn(name, weights_RG) for name in names))

    def reset(self) -> None:
        super().reset()
        self._n_centred = 0

    def _shares(self, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The [..., F] fields of PositionResult from the sums of all or of resampled contexts."""
        state = self._state
        sums, counts = drawn["sums"], drawn["counts"]
        eta = variance_share(sums, drawn["squares"], counts)
        omega = _paired_share(drawn)
        information, entropy = position_information(drawn["fires"], counts)
        total, origin = state["counts"].sum(), state["origin"]
        squares = state["squares"].sum(0)
        raw_squares = squares + (2 * state["sums"].sum(0) + total * origin) * origin
        varying = squares - state["sums"].sum(0) ** 2 / total > CONSTANT * raw_squares
        information = torch.where(state["fires"].sum(0) > 0, information, torch.nan)
        return {
            "eta_squared": torch.where(varying, eta, torch.nan),
            "omega_squared": torch.where(varying, omega, torch.nan),
            "mutual_information": information,
            "mutual_information_share": information / torch.where(entropy > 0, entropy, torch.nan),
        }

    def _centred(self) -> dict[str, Tensor]:
        """The sums, with the origin moved to the mean over all tokens."""
        state = self._require_batches()
        if self._n_centred != self.n_contexts:
            shift_F = state["sums"].sum(0) / state["counts"].sum().clamp(min=1)
            state |= self._moved(shift_F)
            state["origin"] = state["origin"] + shift_F
            self._n_centred = self.n_contexts
        return state

    def _moved(self, shift_F: Tensor) -> dict[str, Tensor]:
        """Every sum that changes when `shift_F` is subtracted from the features."""
        moved: dict[str, Tensor] = {}
        for prefix in ("", "block_") if self.n_blocks else ("",):
            own = {name: self._state[prefix + name] for name in _MOVING}
            by = shift_F.to(own["sums"].dtype)
            counts, tokens = own["counts"][..., None], own["own_tokens"][..., None]
            changed = {
                "sums": own["sums"] - counts * by,
                "squares": own["squares"] - (2 * own["sums"] - counts * by) * by,
                "own_squares": own["own_squares"] - (2 * own["own_cross"] - tokens * by) * by,
                "own_cross": own["own_cross"] - tokens * by,
            }
            moved |= {prefix + name: value for name, value in changed.items()}
        return moved

    def _start(self, features: Tensor, valid: Tensor) -> None:
        t, f, device = self.n_positions, self.n_features, features.device
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("sums", "squares", "fires"), (t, f))
        shapes |= dict.fromkeys(("counts", "energy"), (t,))
        shapes |= {"own_squares": (f,), "own_cross": (f,), "own_tokens": ()}
        f_BTF = torch.where(valid[..., None], features, 0.0).double()
        self._state = {"origin": f_BTF.sum((0, 1)) / valid.sum().clamp(min=1)}
        for name, shape in shapes.items():
            self._state[name] = torch.zeros(shape, dtype=torch.float64, device=device)
            if self.n_blocks:
                self._state[f"block_{name}"] = torch.zeros(self.n_blocks, *shape, device=device)


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


def _pair_rate(counts: Tensor, own_counts: Tensor) -> Tensor:
    """What a pair of different contexts at a position counts in the mean over tokens: tokens over
    (ordered) pairs there, 0 at positions without a pair. [..., T] from sums of w and of w^2."""
    pairs = counts.square() - own_counts
    return torch.where(pairs > 0, counts / pairs.clamp(min=1.0), 0.0)


def _paired_share(drawn: dict[str, Tensor]) -> Tensor:
    """omega^2 [..., F]; see `position_dependence`. NaN without a pair of different contexts at a
    position, or where nothing varies."""
    sums, counts, rate = drawn["sums"], drawn["counts"], drawn["rate"]
    paired = torch.where(rate > 0, counts, 0.0).sum(-1)[..., None]
    at_position = ((rate[..., None] * sums.square()).sum(-2) - drawn["own_pairs"]) / paired
    total = counts.sum(-1)[..., None]
    tokens = total.square() - drawn["own_tokens"][..., None]
    overall = (sums.sum(-2).square() - drawn["own_squares"]) / torch.where(
        tokens > 0, tokens, torch.nan
    )
    variance = drawn["squares"] / total - overall
    known = (paired > 0) & (variance > 0)
    return torch.where(known, at_position - overall, torch.nan) / variance


def _edge_energy(energy: Tensor, counts: Tensor) -> Tensor:
    """Energy per token at positions 1 to EDGE - 1 over that of the rest; [...] from [..., T]."""
    near, rest = (
        energy[..., part].sum(-1) / counts[..., part].sum(-1)
        for part in (slice(1, EDGE), slice(EDGE, None))
    )
    return near / torch.where(rest > 0, rest, torch.nan)


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
