"""Families of features: clusters of what fires together, and whether they are more than noise.

phi coefficient of firing -> k-nearest-neighbour graph -> Leiden communities (Traag, Waltman and
van Eck 2019), held against other seeds, the other half of the contexts, two kinds of chance, and
the clusters of the decoder directions.

Shapes: N counted positions, F features, V features in a graph (its vertices), E edges,
k neighbours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.metrics.correlation import to_csr, top_partners
from tcsae.metrics.masks import checked_masks, require_shape

if TYPE_CHECKING:
    import igraph

_BLOCK_ROWS = 1024


class Firings(NamedTuple):
    """Where features fire at the counted positions."""

    pattern: sparse.csr_matrix
    """[N, F], 1 where f > 0."""
    context: np.ndarray
    """[N], number of the context of each row."""


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
        context = (rows // valid.shape[1]).cpu().numpy() + self.n_contexts
        self._batches.append(Firings(pattern, context))
        self.n_contexts += len(features)

    def merge(self, other: FiringPatterns) -> None:
        """Take in another accumulator of the same size, whose contexts follow on from these."""
        self._batches += [b._replace(context=b.context + self.n_contexts) for b in other._batches]
        self.n_contexts += other.n_contexts

    def compute(self) -> Firings:
        """All firings so far."""
        empty = sparse.csr_matrix((0, self.n_features))
        pattern = sparse.vstack([empty, *(b.pattern for b in self._batches)], format="csr")
        contexts = [np.zeros(0, dtype=np.int64), *(b.context for b in self._batches)]
        return Firings(pattern, np.concatenate(contexts))


def phi_coefficient(both: Tensor, first: Tensor, second: Tensor, n: int) -> Tensor:
    """phi of two events from counts: Pearson's coefficient of two 0/1 variables, in [-1, 1].

    (n n11 - n1 n2) / sqrt(n1 (n - n1) n2 (n - n2)); NaN if an event never or always happens.

    Args:
        both: positions at which both fire; first, second: at which each fires (broadcast).
        n: counted positions.
    """
    both, first, second = both.double(), first.double(), second.double()
    return (n * both - first * second) / (first * (n - first) * second * (n - second)).sqrt()


class FeatureGraph(NamedTuple):
    """Undirected neighbour graph over some of the features."""

    features: Tensor
    """[V] int64, feature numbers of the vertices."""
    edges: Tensor
    """[E, 2] int64, vertices (not feature numbers), first < second."""
    weights: Tensor
    """[E] float32, above 0."""


def _neighbour_graph(features: Tensor, partners: Tensor, similarity: Tensor) -> FeatureGraph:
    """Union of everybody's nearest neighbours [V, k], with positive similarity only."""
    vertex, column = (similarity > 0).nonzero(as_tuple=True)
    pairs = torch.stack([vertex, partners[vertex, column]], dim=1).sort(dim=1).values
    _, kept = np.unique(pairs.numpy(), axis=0, return_index=True)
    keep = torch.from_numpy(kept)
    return FeatureGraph(features, pairs[keep], similarity[vertex, column][keep])


def firing_graph(pattern: sparse.csr_matrix, k: int = 20, min_firings: int = 20) -> FeatureGraph:
    """k-nearest-neighbour graph on max(phi, 0) of the features with enough firings.

    Args:
        pattern: [N, F], 1 where a feature fires.
        k: neighbours looked for; the graph is the union of both directions.
        min_firings: features that fire less often are left out.
    """
    firings = torch.from_numpy(np.ravel(pattern.sum(axis=0)))
    features = (firings >= min_firings).nonzero().flatten()
    chosen = pattern[:, features.numpy()]
    return _neighbour_graph(features, *top_partners(chosen, chosen, k))


def direction_graph(W_dec: Tensor, features: Tensor, k: int = 20) -> FeatureGraph:
    """k-nearest-neighbour graph on max(cosine, 0) of the decoder rows [F, d_in] of `features`."""
    unit = normalize(W_dec.detach().cpu().float()[features], dim=1)
    top_k = max(0, min(k, len(unit) - 1))
    similarity, partners = torch.zeros(len(unit), top_k), torch.zeros(len(unit), top_k).long()
    for start in range(0, len(unit), _BLOCK_ROWS):
        cosine = unit[start : start + _BLOCK_ROWS] @ unit.T
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -1
        rows = slice(start, start + len(cosine))
        similarity[rows], partners[rows] = cosine.topk(top_k)
    return _neighbour_graph(features, partners, similarity)


def _to_igraph(graph: FeatureGraph) -> igraph.Graph:
    import igraph

    result = igraph.Graph(n=len(graph.features), edges=graph.edges.tolist())
    result.es["weight"] = graph.weights.tolist()
    return result


@contextmanager
def _igraph_random(seed: int) -> Iterator[None]:
    """igraph draws from one generator of its own: seed it, and put the default back."""
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        yield
    finally:
        igraph.set_random_number_generator(random)


def _communities(network: igraph.Graph, resolution: float, seed: int) -> np.ndarray:
    import leidenalg

    partition = leidenalg.find_partition(
        network,
        leidenalg.RBConfigurationVertexPartition,
        weights="weight",
        resolution_parameter=resolution,
        seed=seed,
        n_iterations=4,
    )
    return np.asarray(partition.membership, dtype=np.int64)
