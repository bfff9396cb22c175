"""What a feature keeps over a document, apart from what it keeps over a few tokens.

Shapes: B contexts of a batch, T positions, F features, L bands of lags, G bootstrap blocks, R
resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcsae.metrics.autocorrelation import CONSTANT
from tcsae.metrics.bootstrap import Accumulator
from tcsae.metrics.masks import checked_masks, require_shape

# Contexts added at a time, so that memory does not grow with the batch.
_CONTEXT_CHUNK = 16
# 1 - D under this is rounding: nothing is left over for the local part.
_NOTHING_LEFT = 1e-6


def long_lags(window: int, n_positions: int) -> tuple[int, int]:
    """First and last lag of the document part of a window; none if the first is larger.

    From 4 W, where what lasts a few windows has died away, to 3/4 of the context, beyond which
    few pairs are left and all of them touch the context's ends.
    """
    return 4 * window, 3 * n_positions // 4


def local_part(consistency: Tensor, document: Tensor) -> Tensor:
    """L = (C_W - D) / (1 - D), what a feature keeps over a window beyond what it keeps over the
    document; NaN where D leaves nothing over. Any shapes alike; no unit."""
    left = 1.0 - document
    return (consistency - document) / torch.where(left > _NOTHING_LEFT, left, torch.nan)


def nested_shares(omega: Tensor, document: Tensor, consistency: Tensor) -> dict[str, Tensor]:
    """The variance of a feature in four parts that add up to 1.

    Between positions (the same in every context), between documents, between windows of a
    document, and between the tokens of a window ("flicker"):

        omega^2,  (1 - omega^2) D,  (1 - omega^2) (C_W - D),  (1 - omega^2) (1 - C_W)

    The parts are unbiased rather than positive: one that is 0 may come out slightly negative.

    Args:
        omega, document, consistency: omega^2, D and C_W, of one shape.

    Returns:
        `share_position`, `share_document`, `share_window`, `share_flicker`, of that shape; NaN
        together.
    """
    rest = 1.0 - omega
    shares = {
        "share_position": omega,
        "share_document": rest * document,
        "share_window": rest * (consistency - document),
        "share_flicker": rest * (1.0 - consistency),
    }
    known = torch.stack(list(shares.values())).isfinite().all(0)
    return {name: torch.where(known, value, torch.nan) for name, value in shares.items()}


class LongLags(Accumulator):
    """Mean autocorrelation over bands of long lags, over any number of batches.

    With d = f - mu_j(t), mu_j(t) the mean over contexts, and the pairs (t, t') whose lag lies in
    the band, both valid and in one segment:

        D_j = (sum over pairs of d d' / P) / (sum over tokens of d^2 / P_0)

    mu_j(t) is estimated from the same contexts, which takes 1 / n_t of a token's variance away
    and, where a pair is seen in n_tt' contexts within one segment, 1 / n_t + 1 / n_t' -
    n_tt' / (n_t n_t') of its covariance: P and P_0 are the numbers of pairs and tokens less that.
    Without masks both lose 1 / N, and D is the plain ratio. With short segments the covariance
    loses more than the variance, and the plain ratio would be too low.

    Exact in one pass: kept are the products, and for every position the sum of d over the
    partners of the pairs there. One [T, T] by [T, F] product per band and context.

    Memory: 8 (2 + L) T F bytes, and with blocks 4 G T (F + L T) bytes more (92 MB at G = 64, L = 4,
    T = 128, F = 2304).

    Args:
        n_features: F.
        n_positions: T.
        bands: (first, last) lag of each band, in positions.
        n_blocks: G, groups of whole contexts whose sums are kept apart for the bootstrap.
            0: none, and no intervals.
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int,
        bands: Sequence[tuple[int, int]],
        *,
        n_blocks: int = 0,
    ) -> None:
        if any(not 1 <= first <= last < n_positions for first, last in bands):
            raise ValueError(
                f"bands of lags must lie in 1 to {n_positions - 1} for {n_positions} positions, "
                f"not {list(bands)}"
            )
        self.n_features = n_features
        self.n_positions = n_positions
        self.bands = tuple(bands)
        super().__init__(n_blocks)

    @torch.no_grad()
    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Add a batch: features [B, T, F], segments [B, T], valid [B, T]."""
        require_shape(features, self.n_features, self.n_positions)
        segments, valid = checked_masks(features, segments, valid)
        if not self._state:
            self._start(features, valid)
        parts = (x.split(_CONTEXT_CHUNK) for x in (features, segments, valid))
        for chunk in zip(*parts, strict=True):
            self._add(*chunk)

    def compute(self) -> Tensor:
        """D, [L, F] float64, no unit. NaN for a feature that does not vary about its position
        means, in a band without a pair, and with a single context."""
        state = self._require_batches()
        mean_TF = state["sums"] / state["counts"].clamp(min=1.0)[:, None]
        energy_F = self._squares_about(mean_TF)
        raw_F = self._squares_about(-state["origin"])
        n_pairs_L, n_tokens = self._effective()
        energy_F = torch.where(energy_F > CONSTANT * raw_F, energy_F, torch.nan)
        covariance_LF = self._products_about(mean_TF) / n_pairs_L[:, None]
        return covariance_LF / (energy_F / n_tokens)

    def pairs(self) -> Tensor:
        """Number of counted pairs of every band, [L] float64."""
        return self._require_batches()["pairs"].sum((1, 2)) / 2

    def block_sums(self) -> tuple[Tensor, Tensor]:
        """What the bootstrap over contexts resamples, to give to `resampled`.

        Returns:
            [G, L + 1, F], the sums of d d' over the pairs of every band and, last, of d^2 over
            the tokens; and the numbers P and P_0 of each, [G, L + 1]. Centred by mu_j(t) of all
            the contexts. Added over blocks they give the exact sums; a single block is exact when
            no position is masked, else its sums over partners are taken in proportion to its
            position means.
        """
        state = self._require_batches()
        mean_TF = state["sums"] / state["counts"].clamp(min=1.0)[:, None]
        products_GLF = state["block_products"] + self._block_change(mean_TF)
        pairs_GL = state["block_pairs"].sum((2, 3))
        share_GL = pairs_GL / pairs_GL.sum(0).clamp(min=1.0)
        rest_LF = self._products_about(mean_TF) - products_GLF.sum(0)
        products_GLF = products_GLF + (share_GL[..., None] * rest_LF).float()
        mean_TF = mean_TF.float()
        squares_GF = state["block_squares"] - _cross(
            2 * state["block_sums"] - state["block_counts"][..., None] * mean_TF, mean_TF
        )
        n_pairs_L, n_tokens = self._effective()
        tokens_G = state["block_counts"].sum(1)
        n_GL = torch.cat([share_GL * n_pairs_L, (tokens_G / tokens_G.sum() * n_tokens)[:, None]], 1)
        return torch.cat([products_GLF, squares_GF[:, None]], 1), n_GL.float()

    def _add(self, features: Tensor, segments: Tensor, valid: Tensor) -> None:
        state = self._state
        d_BTF = torch.where(valid[..., None], features - state["origin"].to(features.dtype), 0.0)
        near_BTT = (segments[:, :, None] == segments[:, None]) & valid[:, :, None] & valid[:, None]
        pairs_BLTT = (near_BTT[:, None] & self._in_band(valid.device)).to(d_BTF.dtype)
        partners_BLTF = (pairs_BLTT.flatten(1, 2) @ d_BTF).unflatten(1, pairs_BLTT.shape[1:3])
        sums = {
            "sums": d_BTF,
            "squares": d_BTF.square().sum(1),
            "counts": valid,
            "products": (partners_BLTF * d_BTF[:, None]).sum(2),
            "pairs": pairs_BLTT,
        }
        state["partners"] += partners_BLTF.sum(0)
        block = self._blocks_of(len(features), d_BTF.device)
        for name, value in sums.items():
            state[name] += value.sum(0)
            if self.n_blocks:
                state[f"block_{name}"].index_add_(0, block, value.float())
        self.n_contexts += len(features)

    def _in_band(self, device: torch.device) -> Tensor:
        """[L, T, T] bool: the lag between two positions, either way, lies in the band."""
        t = torch.arange(self.n_positions, device=device)
        lag_TT = (t[:, None] - t).abs()
        limits_L2 = torch.tensor(self.bands, device=device).reshape(-1, 2)
        first_L11, last_L11 = limits_L2[:, :, None, None].unbind(1)
        return (lag_TT >= first_L11) & (lag_TT <= last_L11)

    def _start(self, features: Tensor, valid: Tensor) -> None:
        t, f, bands = self.n_positions, self.n_features, len(self.bands)
        f_BTF = torch.where(valid[..., None], features, 0.0).double()
        counts_T1 = valid.sum(0)[:, None].double()
        overall_F = f_BTF.sum((0, 1)) / counts_T1.sum().clamp(min=1.0)
        origin_TF = torch.where(counts_T1 > 0, f_BTF.sum(0) / counts_T1.clamp(min=1.0), overall_F)
        shapes: dict[str, tuple[int, ...]] = {
            "sums": (t, f),
            "squares": (f,),
            "counts": (t,),
            "products": (bands, f),
            "pairs": (bands, t, t),
        }
        self._state = {"origin": origin_TF, "partners": origin_TF.new_zeros(bands, t, f)}
        for name, shape in shapes.items():
            self._state[name] = origin_TF.new_zeros(shape)
            if self.n_blocks:
                zeros = torch.zeros(self.n_blocks, *shape, device=features.device)
                self._state[f"block_{name}"] = zeros

    def _effective(self) -> tuple[Tensor, Tensor]:
        """P (every pair twice) [L] and P_0 []; NaN where nothing is left."""
        counts_T = self._state["counts"]
        lost_T = torch.where(counts_T > 0, 1.0 / counts_T.clamp(min=1.0), 0.0)
        pairs_LTT = self._state["pairs"]
        kept_LTT = 1.0 - lost_T[:, None] - lost_T + pairs_LTT * lost_T[:, None] * lost_T
        n_pairs_L = (pairs_LTT * kept_LTT).sum((1, 2))
        n_tokens = counts_T.sum() - (counts_T > 0).sum()
        return (
            torch.where(n_pairs_L > 0, n_pairs_L, torch.nan),
            torch.where(n_tokens > 0, n_tokens, torch.nan),
        )

    def _squares_about(self, shift_TF: Tensor) -> Tensor:
        """Sums over tokens of (d - shift)^2, [F]."""
        state = self._state
        moved_TF = 2 * state["sums"] - state["counts"][:, None] * shift_TF
        return state["squares"] - _cross(moved_TF, shift_TF)

    def _products_about(self, shift_TF: Tensor) -> Tensor:
        """Sums over counted pairs, either way, of (d - shift) (d' - shift'), [L, F]."""
        state = self._state
        moved_LTF = 2 * state["partners"] - state["pairs"] @ shift_TF
        return state["products"] - _cross(moved_LTF, shift_TF)

    def _block_change(self, shift_TF: Tensor) -> Tensor:
        """What `_products_about` takes from and adds to the products of every block, [G, L, F],
        with sums over partners as position mean times number of pairs."""
        state, shift_TF = self._state, shift_TF.float()
        counts_GT1 = state["block_counts"].clamp(min=1.0)[..., None]
        # Block by block: [G, L, T, F] at once would take gigabytes.
        changes = [
            _cross(pairs_LTT @ (shift_TF - 2 * sums_TF / counts_T1), shift_TF)
            for pairs_LTT, sums_TF, counts_T1 in zip(
                state["block_pairs"], state["block_sums"], counts_GT1, strict=True
            )
        ]
        return torch.stack(changes)


def resampled(block_sums: Tensor, block_counts: Tensor, weights_RG: Tensor) -> Tensor:
    """D of resampled blocks, [R, L, F], from what `LongLags.block_sums` gave."""
    drawn = (weights_RG @ block_sums.flatten(1)).unflatten(1, block_sums.shape[1:])
    mean = drawn / (weights_RG @ block_counts)[..., None]
    energy = mean[:, -1:]
    return mean[:, :-1] / torch.where(energy > 0, energy, torch.nan)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """Sum over positions of x y, [..., F] from [..., T, F]."""
    return (x * y).sum(-2)
