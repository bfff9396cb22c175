"""Where features fire: their top contexts, the positions, and the tokens they fire on.

Shapes: B contexts, T positions, N counted positions, F features, V tokens of the vocabulary,
k contexts per feature, P (feature, context) pairs, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from tcsae.metrics.correlation import to_csr
from tcsae.metrics.masks import checked_masks, require_shape
from tcsae.metrics.units import Units


class TopContext(NamedTuple):
    """The k contexts in which each feature is strongest, strongest first.

    A feature that fires in fewer than k contexts has -1, -1 and 0 in the places left over.
    """

    context: Tensor
    """[F, k] int64, number of the context in the order in which they were seen, from 0."""
    position: Tensor
    """[F, k] int64, position of the maximum in that context (the first, if several)."""
    value: Tensor
    """[F, k], activation there."""
    rows: Tensor
    """[F, k, T], activations over that context, 0 at positions that do not count."""


class TopContexts:
    """Keeps the k contexts with the largest activation of each feature, one batch at a time.

    A context enters once, with its largest activation at a valid position. Equal activations: the
    earlier context. Contexts are numbered in the order of the updates. The activations over each
    context are kept for highlighting: 9.4 MB for 2304 features, k = 8, T = 128 in float32.
    """

    def __init__(self, n_features: int, k: int, n_positions: int) -> None:
        self.n_features, self.k, self.n_positions = n_features, k, n_positions
        self.reset()

    def reset(self) -> None:
        shape = (self.n_features, self.k)
        self.n_contexts = 0
        rows = torch.zeros(*shape, self.n_positions)
        nowhere = torch.full(shape, -1)
        self._top = TopContext(nowhere, nowhere.clone(), torch.zeros(shape), rows)

    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Take in features [B, T, F] and valid [B, T]; `segments` make no difference here."""
        require_shape(features, self.n_features, self.n_positions)
        _, valid = checked_masks(features, segments, valid)
        f_BTF = torch.where(valid[..., None], features.detach(), 0)
        value, position = f_BTF.max(dim=1)
        # Only contexts that can enter are looked at further: most never do.
        best = value.T.sort(dim=1, descending=True, stable=True)
        context = best.indices[:, : self.k]
        value = best.values[:, : self.k].cpu()
        position = position.T.gather(1, context).cpu()
        feature = torch.arange(self.n_features, device=f_BTF.device)[:, None]
        rows = f_BTF[context, :, feature].cpu()
        self._take(TopContext(context.cpu() + self.n_contexts, position, value, rows))
        self.n_contexts += len(features)

    def _take(self, new: TopContext) -> None:
        dtype = torch.promote_types(self._top.value.dtype, new.value.dtype)
        value = torch.cat([self._top.value.to(dtype), new.value.to(dtype)], dim=1)
        value, order = value.sort(dim=1, descending=True, stable=True)
        value, order = value[:, : self.k], order[:, : self.k]
        fires = value > 0

        def chosen(old: Tensor, add: Tensor) -> Tensor:
            return torch.cat([old, add], dim=1).gather(1, order).masked_fill(~fires, -1)

        both = torch.cat([self._top.rows.to(dtype), new.rows.to(dtype)], dim=1)
        rows = both[torch.arange(self.n_features)[:, None], order] * fires[..., None]
        context = chosen(self._top.context, new.context)
        position = chosen(self._top.position, new.position)
        self._top = TopContext(context, position, value.clamp(min=0), rows)

    def compute(self) -> TopContext:
        """The k strongest contexts of every feature so far."""
        return self._top


class Firings(NamedTuple):
    """Where features fire at the counted positions."""

    pattern: sparse.csr_matrix
    """[N, F], 1 where f > 0."""
    context: np.ndarray
    """[N] int64, number of the context of each row."""
    position: np.ndarray
    """[N] int64, position in the context."""


def firing_units(firings: Firings, documents: Units | Tensor | None) -> Units:
    """The documents of the contexts of firings.

    Args:
        documents: units, or [contexts] the document of each context. None: each its own.

    Raises:
        ValueError: firings has more contexts than documents speak of.
    """
    n_contexts = int(firings.context.max()) + 1 if len(firings.context) else 0
    if documents is None:
        return Units.of_contexts(n_contexts)
    units = documents if isinstance(documents, Units) else Units(documents)
    if len(units) < n_contexts:
        raise ValueError(f"documents of {len(units)} contexts for firings in {n_contexts}")
    return units


class FiringPatterns:
    """Collects f > 0 at the valid positions, one batch at a time (12 bytes a firing)."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.reset()

    def reset(self) -> None:
        self.n_contexts = 0
        self._batches: list[Firings] = []

    def update(
        self, features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Take in features [B, T, F] and valid [B, T]; `segments` make no difference here."""
        require_shape(features, self.n_features)
        _, valid = checked_masks(features, segments, valid)
        rows = valid.flatten().nonzero().flatten()
        pattern = to_csr(features.flatten(0, 1)[rows] > 0)
        context, position = (
            rows.cpu().numpy() // valid.shape[1],
            rows.cpu().numpy() % valid.shape[1],
        )
        self._batches.append(Firings(pattern, context + self.n_contexts, position))
        self.n_contexts += len(features)

    def compute(self) -> Firings:
        """All firings so far."""
        empty = sparse.csr_matrix((0, self.n_features))
        pattern = sparse.vstack([empty, *(b.pattern for b in self._batches)], format="csr")
        none = np.zeros(0, dtype=np.int64)
        context = np.concatenate([none, *(b.context for b in self._batches)])
        return Firings(
            pattern, context, np.concatenate([none, *(b.position for b in self._batches)])
        )


@dataclass(frozen=True)
class TokenStatistics:
    """On which tokens features fire, and how strongly."""

    weight: sparse.csr_matrix
    """[V, F] float64, summed activation of the feature at that token."""
    token_counts: Tensor
    """[V] int64, how often the token stood at a counted position."""
    firings: Tensor
    """[F] int64, counted positions with f > 0."""
    total: Tensor
    """[F] float64, sum of f."""

    @property
    def log_density(self) -> Tensor:
        """log10 of the share of counted positions at which the feature fires, [F]; NaN: never."""
        density = self.firings.double() / self.token_counts.sum()
        return torch.where(density > 0, density.log10(), torch.nan)

    @property
    def token_entropy(self) -> Tensor:
        """Entropy in nats of a feature's tokens, weighted by activation, [F]; NaN: never fires.

        0: one token. Biased low for a feature with few firings: at most ln(firings).
        """
        w = self.weight.tocoo()
        x_log_x = np.bincount(w.col, w.data * np.log(w.data), minlength=w.shape[1])
        entropy = self.total.log() - torch.from_numpy(x_log_x) / self.total
        return entropy.clamp(min=0)


class FeatureTokens:
    """Sums for `TokenStatistics`, one batch at a time; memory goes with the distinct
    (token, feature) pairs: 12 bytes each."""

    def __init__(self, n_features: int, vocab_size: int) -> None:
        self.n_features, self.vocab_size = n_features, vocab_size
        self.reset()

    def reset(self) -> None:
        self._weight = sparse.csr_matrix((self.vocab_size, self.n_features))
        self._token_counts = torch.zeros(self.vocab_size, dtype=torch.long)
        self._firings = torch.zeros(self.n_features, dtype=torch.long)

    def update(
        self,
        features: Tensor,
        token_ids: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """Take in features [B, T, F] with token_ids [B, T]; `segments` make no difference here."""
        require_shape(features, self.n_features)
        _, valid = checked_masks(features, segments, valid)
        codes = to_csr(features.flatten(0, 1), valid.flatten())
        token_N, valid_N = token_ids.flatten().cpu().numpy(), valid.flatten().cpu().numpy()
        entries = (np.ones(len(token_N)), (token_N, np.arange(len(token_N))))
        tokens_VN = sparse.csr_matrix(entries, shape=(self.vocab_size, len(token_N)))
        self._weight = self._weight + tokens_VN @ codes
        counts = np.bincount(token_N[valid_N], minlength=self.vocab_size)
        self._token_counts += torch.from_numpy(counts)
        self._firings += torch.from_numpy(np.bincount(codes.indices, minlength=self.n_features))

    def compute(self) -> TokenStatistics:
        """The sums so far."""
        total = torch.from_numpy(np.ravel(self._weight.sum(axis=0)))
        counts, firings = self._token_counts.clone(), self._firings.clone()
        return TokenStatistics(self._weight, counts, firings, total)


def characteristic_tokens(
    statistics: TokenStatistics, labels: Tensor, n_tokens: int = 8
) -> list[list[tuple[int, float]]]:
    """Tokens that set a cluster of features apart: for each cluster (token id, score), best first.

    p(v | c): share of token v in the summed activation of the cluster's features; p(v): its share
    of all counted positions. Score, in nats: p(v | c) ln(p(v | c) / p(v)), the token's part of
    the Kullback-Leibler divergence. Common tokens score 0, and rare ones cannot win by lift
    alone. Only positive scores are given.

    Args:
        labels: [F] cluster of each feature, 0..C - 1; -1: none. `torch.arange(F)` asks about
            single features.
    """
    member = (labels >= 0).nonzero().flatten().numpy()
    label = labels.numpy()[member]
    n_clusters = int(label.max()) + 1 if len(label) else 0
    shape = (len(labels), n_clusters)
    of_cluster = sparse.csr_matrix((np.ones(len(member)), (member, label)), shape=shape)
    weight = (statistics.weight @ of_cluster).tocsc()
    background = statistics.token_counts.numpy() / max(1, int(statistics.token_counts.sum()))
    names: list[list[tuple[int, float]]] = []
    for c in range(n_clusters):
        column = slice(weight.indptr[c], weight.indptr[c + 1])
        token, share = weight.indices[column], weight.data[column] / weight.data[column].sum()
        score = share * np.log(share / background[token])
        best = np.lexsort((token, -score))[:n_tokens]
        names.append([(int(token[i]), float(score[i])) for i in best if score[i] > 0])
    return names


def cluster_names(
    statistics: TokenStatistics, labels: Tensor, decode: Callable[[int], str], n_words: int = 3
) -> list[str]:
    """A readable name per cluster, from its characteristic tokens: "king / queen / throne".

    Spelling variants (case, leading space) count once; a cluster without such tokens is called
    "cluster" and its number.
    """
    names = []
    for c, tokens in enumerate(characteristic_tokens(statistics, labels, 4 * n_words)):
        words: dict[str, str] = {}
        for token, _ in tokens:
            text = decode(token)
            word = text.strip() or repr(text)
            words.setdefault(word.casefold(), word)
        names.append(" / ".join(list(words.values())[:n_words]) or f"cluster {c}")
    return names
