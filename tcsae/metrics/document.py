"""What a feature keeps over a document, apart from what it keeps over a few tokens.

Shapes: B contexts of a batch, T positions, F features, L bands of lags, G blocks of documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcsae.metrics.accumulator import with_deleted
from tcsae.metrics.autocorrelation import Autocorrelation
from tcsae.metrics.position_sums import Added, Centring, MeanProducts, scale_without
from tcsae.metrics.units import MAX_BLOCKS, Units

# Contexts multiplied at a time, so that memory does not grow with the batch.
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


class LongLags:
    """Mean autocorrelation over bands of long lags, over any number of batches.

    Over the pairs (t, t') whose lag lies in the band, both valid and in one segment:

        D_j = (mean over pairs of f f' - mu_j(t) mu_j(t')) / c_j(0)

    with the products of means from different documents, as in `autocorrelation`: D has no bias
    however few documents there are, and however few of the pairs lie in one segment.

    Exact in one pass. One [T, T] by [T, F] product per band and context.

    Memory: that of `PositionSums` and of `Autocorrelation`, and 16 G L F bytes more.

    Args:
        n_features: F.
        n_positions: T.
        bands: (first, last) lag of each band, in positions.
        units, n_blocks: see `Accumulator`.
        memory: that shares its sums, is updated by its owner, who then calls `add`. None: its own.

    Raises:
        ValueError: a band does not fit into the positions.
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int,
        bands: Sequence[tuple[int, int]],
        *,
        units: Units | None = None,
        n_blocks: int = MAX_BLOCKS,
        memory: Autocorrelation | None = None,
    ) -> None:
        if not all(0 < first <= last < n_positions for first, last in bands):
            raise ValueError(f"bands of lags must lie in 1 to {n_positions - 1}, not {bands}")
        self.bands = tuple(bands)
        self._memory = memory or Autocorrelation(
            n_features, n_positions, 0, units=units, n_blocks=n_blocks
        )
        self._sums = self._memory.sums
        self._state: dict[str, Tensor] = {}

    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Add a batch: features [B, T, F], segments [B, T], valid [B, T]."""
        for added in self._sums.add(features, segments=segments, valid=valid):
            self._memory.add(added)
            self.add(added)

    @torch.no_grad()
    def add(self, added: Added) -> None:
        """Add contexts that the shared sums have taken in."""
        # The products need the precision of the features, their sums that of float64.
        dtype = torch.promote_types(added.features.dtype, torch.float32)
        parts = (added.d.to(dtype), added.segments, added.valid, added.block)
        for chunk in zip(*(x.split(_CONTEXT_CHUNK) for x in parts), strict=True):
            self._add(*chunk)

    def reset(self) -> None:
        """Forget every batch."""
        self._memory.reset()
        self._state = {}

    def compute(self) -> Tensor:
        """D, [L, F] float64, no unit. NaN for a feature that does not vary about its position
        means, in a band without a pair, and with a single document."""
        energy_F = self._memory.covariance()[0]
        return self.covariances(deletions=False)[0] / torch.where(energy_F > 0, energy_F, torch.nan)

    def covariances(self, deletions: bool = True) -> Tensor:
        """The numerator of D, of all and without each block, [1 + G, L, F] float64."""
        sums, state, n_used = self._sums.centred(), self._moved(), self._sums.n_used
        products_RLF = with_deleted(state["products"], n_used, deletions)
        pairs_RL = with_deleted(state["block_pairs"], n_used, deletions)
        means_RLF = self._mean_products(sums, deletions)
        products_RLF = products_RLF - self._centring(sums).change(sums)
        return (products_RLF - means_RLF) / torch.where(pairs_RL > 0, pairs_RL, torch.nan)[
            ..., None
        ]

    def pairs(self) -> Tensor:
        """Number of counted pairs of every band, [L] float64."""
        self._sums._require_batches()
        return self._state["pairs"].sum((1, 2)) / 2

    def _add(self, d_BTF: Tensor, segments_BT: Tensor, valid_BT: Tensor, block_B: Tensor) -> None:
        if not self._state:
            self._start(d_BTF)
        near_BTT = segments_BT[:, :, None] == segments_BT[:, None]
        near_BTT &= valid_BT[:, :, None] & valid_BT[:, None]
        pairs_BLTT = (near_BTT[:, None] & self._in_band(d_BTF.device)).to(d_BTF.dtype)
        partners_BLTF = (pairs_BLTT.flatten(1, 2) @ d_BTF).unflatten(1, pairs_BLTT.shape[1:3])
        values = {
            "products": (partners_BLTF * d_BTF[:, None]).sum(2),
            "ends": 2 * partners_BLTF.sum(2),
            "block_pairs": pairs_BLTT.sum((2, 3)),
        }
        for name, value in values.items():
            self._state[name].index_add_(0, block_B, value.double())
        self._state["pairs"] += pairs_BLTT.sum(0)

    def _start(self, d_BTF: Tensor) -> None:
        _, t, f = d_BTF.shape
        blocks, bands = self._sums.n_blocks, len(self.bands)
        shapes = {
            "products": (blocks, bands, f),
            "ends": (blocks, bands, f),
            "block_pairs": (blocks, bands),
            "pairs": (bands, t, t),
        }
        zeros = d_BTF.new_zeros((), dtype=torch.float64)
        self._state = {name: zeros.new_zeros(shape) for name, shape in shapes.items()}
        self._origin_F = self._sums.origin_F

    def _in_band(self, device: torch.device) -> Tensor:
        """[L, T, T] bool: the lag between two positions, either way, lies in the band."""
        t = torch.arange(self._sums.n_positions, device=device)
        lag_TT = (t[:, None] - t).abs()
        limits_L2 = torch.tensor(self.bands, device=device).reshape(-1, 2)
        first_L11, last_L11 = limits_L2[:, :, None, None].unbind(1)
        return (lag_TT >= first_L11) & (lag_TT <= last_L11)

    def _moved(self) -> dict[str, Tensor]:
        """The sums about the origin that the shared sums have now."""
        state, shift_F = self._state, self._sums.origin_F - self._origin_F
        pairs_GL1 = state["block_pairs"][..., None]
        state["products"] -= (state["ends"] - pairs_GL1 * shift_F) * shift_F
        state["ends"] -= 2 * pairs_GL1 * shift_F
        self._origin_F = self._sums.origin_F
        return state

    def _mean_products(self, sums: dict[str, Tensor], deletions: bool) -> Tensor:
        """Sums over counted pairs, either way, of U(t, t'), [1 + G, L, F]."""
        sums_GTF, counts_GT = sums["block_sums"], sums["block_counts"]
        total_TF, total_T = sums_GTF.sum(0), counts_GT.sum(0)
        different_TT = total_T[:, None] * total_T - counts_GT.T @ counts_GT
        pairs_LTT = self._state["pairs"]
        r_LTT = torch.where(different_TT > 0, pairs_LTT / different_TT.clamp(min=1), 0.0)
        whole_LF = _cross(r_LTT @ total_TF, total_TF)
        # Block by block: [G, L, T, F] at once would take gigabytes.
        own, with_whole = [], []
        for sums_TF in sums_GTF:
            partners_LTF = r_LTT @ sums_TF
            own.append(_cross(partners_LTF, sums_TF))
            with_whole.append(2 * _cross(partners_LTF, total_TF))
        forms = MeanProducts(whole_LF, torch.stack(own), torch.stack(with_whole))
        if not deletions:
            return forms.rows(None)
        inside_LTT = (pairs_LTT > 0).to(different_TT)
        counted_GLT = (inside_LTT @ counts_GT.T).permute(2, 0, 1)
        gone_GL = 2 * (counted_GLT * (total_T - counts_GT)[:, None]).sum(2)
        different_L = (inside_LTT * different_TT).sum((1, 2))
        scale_GL = scale_without(
            self._state["block_pairs"][: len(counts_GT)], different_L, different_L - gone_GL
        )
        return forms.rows(scale_GL)

    def _centring(self, sums: dict[str, Tensor]) -> Centring:
        sums_GTF, counts_GT = sums["block_sums"], sums["block_counts"]
        total_T = counts_GT.sum(0)
        different_TT = total_T[:, None] * total_T - counts_GT.T @ counts_GT
        r_LTT = torch.where(different_TT > 0, self._state["pairs"] / different_TT.clamp(min=1), 0.0)
        weights_GLT = 2 * (r_LTT @ (total_T - counts_GT).T).permute(2, 0, 1)
        return Centring(self._state["ends"][: len(counts_GT)], torch.bmm(weights_GLT, sums_GTF))


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """Sum over positions of x y, [..., F] from [..., T, F]."""
    return (x * y).sum(-2)
