"""The one pass over the held-out contexts that `analysis` reads from, and the picture it gives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tcsae.metrics.correlation import FeatureCorrelation, SparseFeatureCorrelation
from tcsae.metrics.redundancy import PositionCorrelation
from tcsae.metrics.top_contexts import FeatureTokens, FiringPatterns, TopContexts
from tcsae.metrics.units import Units

TOP_K = 8
CELLS = 256
"""Rows and columns of the picture of the correlation matrix, at most."""
POSITION_FEATURES = 8
TOGETHER = 5
"""Companions of each feature that are kept."""
MIN_FIRINGS = 20
"""Features that fire less often are in no cluster, and have no position-by-position correlation."""
DENSE_ENTRIES = 2**28
"""Largest number of product sums, (max_lag + 1) F^2, that are kept dense (1 GB)."""
SPARSE_ENTRIES = 2**33
"""Largest number of coefficients, (2 max_lag + 1) F^2, that the sparse way works out; beyond it
fewer lags are looked at (17 ns each: 150 seconds)."""
CLOSE_FEATURES = 8192
"""Features that get clusters, a place in the picture and top contexts."""
ROW_ENTRIES = 2**26
"""Largest number of activations kept for top contexts (256 MB)."""
LONGEST_POSITIONS = 512
"""Longest context whose T x T correlations are worked out."""


class Pass:
    """The accumulators of the one pass, made for what is known of the features beforehand.

    Features come on `device`, and tokens as numbers below `vocabulary`.

    `units` says which of the contexts, in the order of the pass, are from one document. What needs
    two halves with noise of their own gets halves of the documents.
    """

    def __init__(
        self,
        n_features: int,
        n_positions: int,
        n_contexts: int,
        vocabulary: int,
        device: str,
        known: Mapping[str, Tensor],
        max_lag: int,
        units: Units | None = None,
    ) -> None:
        self.units = units or Units.of_contexts(n_contexts)
        self._half, self._n_seen = self.units.halves(), 0
        self.n_features, self.max_lag = n_features, max_lag
        self.max_lag_reason: str | None = None
        self.live = known["density"] > 0
        n_close = min(CLOSE_FEATURES, max(1, ROW_ENTRIES // (TOP_K * n_positions)))
        self.close = _most_energetic(known, n_close)
        self.left_out = None
        if len(self.close) < n_features:
            self.left_out = (
                f"of {n_features} features the {len(self.close)} with the most energy are shown"
            )
        self.lagged: FeatureCorrelation | SparseFeatureCorrelation
        if (max_lag + 1) * n_features**2 <= DENSE_ENTRIES:
            self.lagged = FeatureCorrelation(n_features, max_lag, device=device)
        else:
            self.max_lag = max(0, min(max_lag, (SPARSE_ENTRIES // n_features**2 - 1) // 2))
            if self.max_lag < max_lag:
                self.max_lag_reason = f"{n_features} features: fewer lags than {max_lag} looked at"
            self.lagged = SparseFeatureCorrelation(n_features, self.max_lag)
        # The matrix of the picture: lag 0 of the first if that is dense and has every feature.
        self._at_once: FeatureCorrelation | None = None
        if self.left_out or isinstance(self.lagged, SparseFeatureCorrelation):
            self._at_once = FeatureCorrelation(len(self.close), device=device)
        bound: list[int] = []
        if n_positions <= LONGEST_POSITIONS:
            bound = _most_position_bound(known, MIN_FIRINGS / (n_contexts * n_positions))
        self.by_position = PositionCorrelation(bound, n_positions)
        self.firings = FiringPatterns(n_features)
        self.top = TopContexts(len(self.close), TOP_K, n_positions)
        self.tokens = FeatureTokens(n_features, vocabulary)
        self._ids: list[Tensor] = []
        self._valid: list[Tensor] = []

    def update(self, f_BTF: Tensor, ids: Tensor, segments: Tensor, valid: Tensor) -> None:
        masks = {"segments": segments, "valid": valid}
        close_BTS = f_BTF[..., self.close.to(f_BTF.device)] if self.left_out else f_BTF
        half = self._half[self._n_seen : self._n_seen + len(f_BTF)]
        self._n_seen += len(f_BTF)
        if self._at_once is not None:
            self.lagged.update(f_BTF, **masks)
            self._at_once.update(close_BTS, half=half, **masks)
        else:
            assert isinstance(self.lagged, FeatureCorrelation)
            self.lagged.update(f_BTF, half=half, **masks)
        if len(self.by_position.feature_ids):
            self.by_position.update(f_BTF, half=half, **masks)
        self.firings.update(f_BTF, **masks)
        self.top.update(close_BTS, **masks)
        self.tokens.update(f_BTF, ids, **masks)
        self._ids.append(ids.cpu().int())
        self._valid.append(valid.cpu())

    @cached_property
    def zero_lag_SS(self) -> Tensor:
        """Pearson coefficients of the features looked at closely."""
        return self._zero_lag.compute(max_lag=0).values.cpu()

    def zero_lag_halves(self) -> tuple[Tensor, Tensor]:
        """The same of two halves of the documents."""
        first, second = self._zero_lag.compute_halves()
        return first.cpu(), second.cpu()

    @property
    def _zero_lag(self) -> FeatureCorrelation:
        accumulator = self._at_once or self.lagged
        assert isinstance(accumulator, FeatureCorrelation)
        return accumulator

    def contexts(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """ids and valid [C, T] of the chosen contexts."""
        return torch.cat(self._ids)[chosen], torch.cat(self._valid)[chosen]


def _most_energetic(known: Mapping[str, Tensor], n: int) -> Tensor:
    """Numbers of the features to look at closely, ascending: all, if there are no more than n."""
    energy = torch.where(known["density"] > 0, known["c0"].nan_to_num(nan=0.0), -1.0)
    return energy.argsort(descending=True, stable=True)[:n].sort().values


def _most_position_bound(known: Mapping[str, Tensor], least_density: float) -> list[int]:
    """The features with the largest omega^2, of those in which it is above its noise.

    `omega_squared_low` is the lower end of its interval; without it, of those above 0.
    """
    often = known["density"] >= least_density
    above = known.get("omega_squared_low", known["omega_squared"]) > 0
    bound = torch.where(often & above, known["omega_squared"].nan_to_num(nan=0.0), 0.0)
    best = bound.argsort(descending=True, stable=True)[:POSITION_FEATURES]
    return [int(j) for j in best if bound[j] > 0]


# ------------------------------------------------------------------- the correlation picture


def picture(seen: Pass, labels_S: Tensor) -> dict[str, Tensor]:
    """The correlation matrix in the order of the clusters, averaged down to CELLS x CELLS."""
    R = seen.zero_lag_SS
    places = _order(R, labels_S)
    n_cells = min(len(places), CELLS)
    edges = np.linspace(0, len(places), n_cells + 1).round().astype(np.int64)
    tensors = {"order": seen.close[places], "edges": torch.from_numpy(edges)}
    starts = edges[:-1]
    tensors["cell_cluster"] = labels_S[places][torch.from_numpy(starts)]
    if not n_cells:
        return tensors | {"mean": torch.empty(0, 0), "largest": torch.empty(0, 0)}
    ordered = R[places][:, places].double().numpy()
    sizes = np.diff(edges)
    n_pairs = np.outer(sizes, sizes) - np.diag(sizes)
    np.fill_diagonal(ordered, 0.0)
    sums = np.add.reduceat(np.add.reduceat(ordered, starts, 0), starts, 1)
    np.fill_diagonal(ordered, -np.inf)
    largest = np.maximum.reduceat(np.maximum.reduceat(ordered, starts, 0), starts, 1)
    empty = n_pairs == 0
    mean = np.where(empty, np.nan, sums / np.maximum(n_pairs, 1))
    return tensors | {
        "mean": torch.from_numpy(mean).float(),
        "largest": torch.from_numpy(np.where(empty, np.nan, largest)).float(),
    }


def together(seen: Pass) -> dict[str, Tensor]:
    """The features that each fires with: the largest positive coefficients, -1 where there are
    fewer than TOGETHER."""
    R = seen.zero_lag_SS.clone().nan_to_num_(nan=-1.0).fill_diagonal_(-1.0)
    value, place = R.topk(min(TOGETHER, len(R)), dim=1)
    return {
        "together_feature": seen.close,
        "together": torch.where(value > 0, seen.close[place], -1),
        "together_correlation": value.clamp(min=0.0).float(),
    }


def _order(R: Tensor, labels_S: Tensor) -> Tensor:
    """Places of the features that vary: by cluster, and in a cluster those alike side by side."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    varies = ~R.diagonal().isnan()
    parts = []
    for label in [*range(int(labels_S.max()) + 1 if len(labels_S) else 0), -1]:
        members = ((labels_S == label) & varies).nonzero().flatten()
        if label >= 0 and len(members) > 2:
            distance = (1 - R[members][:, members]).clamp(min=0).fill_diagonal_(0).double()
            tree = linkage(squareform(distance.numpy(), checks=False), "average")
            members = members[torch.from_numpy(leaves_list(tree).astype(np.int64))]
        parts.append(members)
    return torch.cat(parts)
