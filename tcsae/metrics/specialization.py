"""Families of features: clusters of what fires together, and whether they are more than noise.

phi coefficient of firing -> k-nearest-neighbour graph -> Leiden communities (Traag, Waltman and
van Eck 2019), held against other seeds, halves of the documents, two kinds of chance, and the
clusters of the decoder directions.

Shapes: N counted positions, F features, V features in a graph (its vertices), E edges,
k neighbours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.metrics.correlation import top_partners
from tcsae.metrics.shuffled import exchangeable
from tcsae.metrics.shuffled import shuffle_contexts as shuffle_contexts
from tcsae.metrics.top_contexts import Firings, firing_units
from tcsae.metrics.units import MIN_UNITS, Units

if TYPE_CHECKING:
    import igraph

# Largest p at which a clustering counts as more than chance.
SIGNIFICANT = 0.01
# A similarity of exactly 0 comes out of float32 as up to this.
_ROUNDING = 1e-6
_BLOCK_ROWS = 1024
# As good as going on until nothing changes, on the graphs of a default run.
_LEIDEN_ITERATIONS = 10


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
    vertex, column = (similarity > _ROUNDING).nonzero(as_tuple=True)
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
    neighbours = top_partners(chosen, chosen, k)
    return _neighbour_graph(features, neighbours.partners, neighbours.values)


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
    """igraph's own Leiden: on 2,304 features 20 times as fast as leidenalg's, modularity higher."""
    if network.ecount() == 0:
        return np.arange(network.vcount())
    with _igraph_random(seed):
        partition = network.community_leiden(
            objective_function="modularity",
            weights="weight",
            resolution=resolution,
            n_iterations=_LEIDEN_ITERATIONS,
        )
    return np.asarray(partition.membership, dtype=np.int64)


def _by_size(membership: np.ndarray) -> Tensor:
    label, size = np.unique(membership, return_counts=True)
    rank = np.full(len(label), -1)
    large = np.flatnonzero(size > 1)
    rank[large[np.argsort(-size[large], kind="stable")]] = np.arange(len(large))
    return torch.from_numpy(rank[membership])


def _modularity(network: igraph.Graph, resolution: float, seed: int) -> float:
    if network.ecount() == 0:
        return 0.0
    membership = _communities(network, resolution, seed)
    return float(network.modularity(membership, weights="weight", resolution=resolution))


def _rewired(network: igraph.Graph, seed: int) -> igraph.Graph:
    """Same degrees, edges swapped at random, weights dealt out anew."""
    result = network.copy()
    with _igraph_random(seed):
        result.rewire()
    weights = np.array(network.es["weight"])
    result.es["weight"] = np.random.default_rng(seed).permutation(weights).tolist()
    return result


def _against(observed: float, null: list[float]) -> dict[str, Any]:
    """The observed value against draws from a null, one-sided.

    p is that of one further draw from a normal distribution of which the nulls are a sample
    (Student's t, n - 1 degrees of freedom), so that few nulls are enough.
    """
    from scipy.stats import t

    mean, sd = float(np.mean(null)), float(np.std(null, ddof=1))
    z = (observed - mean) / max(sd, 1e-9)
    p = float(t.sf(z / np.sqrt(1 + 1 / len(null)), df=len(null) - 1))
    return {"mean": mean, "sd": sd, "z": float(z), "p": p, "n": len(null)}


@dataclass(frozen=True)
class Specialization:
    """Clusters of features, and how much they can be trusted."""

    labels: Tensor
    """[F] int64, cluster by decreasing size from 0; -1: fires too seldom or has no partner."""
    decoder_labels: Tensor
    """[F] int64, the same for clusters of decoder directions; all -1 without a decoder."""
    graph: FeatureGraph
    """The neighbour graph the clusters were found in."""
    summary: dict[str, Any]
    """Figures for JSON; one that could not be computed is None, `<name>_reason` beside it.

    Beside sizes and settings: `modularity`; `ari_seeds`, mean adjusted Rand index over pairs of
    seeds; `ari_halves`, that of clusterings of two halves of the documents, over the features that
    fire often enough in both; `null_rewired`, modularity of graphs with the same degrees;
    `null_shuffled`, of graphs made after `shuffle_contexts`; `modularity_excess`, modularity less
    the mean of `null_shuffled`, both over the contexts that can be exchanged (`contexts_exchanged`,
    a share); `significant`, modularity above both nulls at p < .01; `ami_decoder`, adjusted mutual
    information with clusters of decoder directions. With fewer than 16 documents what takes
    exchanging or splitting them cannot be told.

    The rewired null alone proves little: independent features that fire in runs beat it (120 of
    them in 60 documents of 128 positions, runs of 1, 2, 5, 10: z = 0, 2, 4, 8, means of three
    seeds), and their modularity itself grows (.18, .20, .21, .23), while `modularity_excess` stays
    0 within .012. So compare SAEs of different consistency by the excess. It is not 0 but below it
    where contexts differ much in how many features fire (by a factor of 1.8 up or down: -.01, of
    2.7: -.04 to -.1): busy contexts draw all features together, and the shuffled have none. Neither
    null tells clusters from a continuum cut into pieces; the two ARI do.
    """


def _missing(name: str, reason: str) -> dict[str, Any]:
    return {name: None, f"{name}_reason": reason}


@dataclass(frozen=True)
class _Clustering:
    """The settings of one clustering, and the checks that repeat it."""

    k: int
    min_firings: int
    resolution: float
    seed: int

    def seed_agreement(
        self, network: igraph.Graph, first: np.ndarray, n_seeds: int
    ) -> dict[str, Any]:
        """`first`: the communities of the first seed."""
        from sklearn.metrics import adjusted_rand_score

        others = range(self.seed + 1, self.seed + n_seeds)
        runs = [first, *(_communities(network, self.resolution, seed) for seed in others)]
        scores = [adjusted_rand_score(a, b) for a, b in combinations(runs, 2)]
        return {"ari_seeds": float(np.mean(scores)), "n_seeds": n_seeds}

    def half_agreement(self, firings: Firings, units: Units) -> dict[str, Any]:
        from sklearn.metrics import adjusted_rand_score

        name, reason = "ari_halves", _too_few_documents(units, "split")
        if reason:
            return _missing(name, reason)
        first = ~units.halves(self.seed).numpy()[firings.context]
        found: list[dict[int, int]] = []
        for half in (first, ~first):
            graph = firing_graph(firings.pattern[half], self.k, self.min_firings)
            labels = _communities(_to_igraph(graph), self.resolution, self.seed)
            found.append(dict(zip(graph.features.tolist(), labels.tolist(), strict=True)))
        shared = sorted(found[0].keys() & found[1].keys())
        if len(shared) < 2:
            return _missing(name, f"no two features fire {self.min_firings} times in both halves")
        score = adjusted_rand_score(*([half[feature] for feature in shared] for half in found))
        return {name: float(score), "n_features_halves": len(shared)}

    def chance(
        self, firings: Firings, units: Units, graph: FeatureGraph, observed: float, n_nulls: int
    ) -> dict[str, Any]:
        """Modularity of rewired graphs and of graphs of shuffled documents."""
        seeds, network = range(self.seed, self.seed + n_nulls), _to_igraph(graph)
        rewired = [_modularity(_rewired(network, seed), self.resolution, seed) for seed in seeds]
        result: dict[str, Any] = {"null_rewired": _against(observed, rewired)}
        reason = _too_few_documents(units, "exchange")
        if reason:
            for name in ("null_shuffled", "modularity_excess", "significant"):
                result |= _missing(name, reason)
            return result
        chosen = firings._replace(pattern=firings.pattern[:, graph.features.numpy()])
        exchanged = np.isin(np.arange(len(units)), exchangeable(units).context)
        if not exchanged.all():
            # What is held against the null comes from the same contexts.
            kept = sparse.diags(exchanged[firings.context].astype(float))
            chosen = chosen._replace(pattern=(kept @ chosen.pattern).tocsr())
            observed = self.modularity(chosen.pattern, self.seed)
        null = [
            self.modularity(shuffle_contexts(chosen, seed, documents=units), seed) for seed in seeds
        ]
        result["contexts_exchanged"] = float(exchanged.mean())
        result["null_shuffled"] = _against(observed, null)
        result["significant"] = (
            max(result[name]["p"] for name in ("null_rewired", "null_shuffled")) < SIGNIFICANT
        )
        result["modularity_excess"] = observed - result["null_shuffled"]["mean"]
        return result

    def modularity(self, pattern: sparse.csr_matrix, seed: int) -> float:
        """Of the clusters of firing pattern [N, F], all of whose features count."""
        network = _to_igraph(firing_graph(pattern, self.k, min_firings=1))
        return _modularity(network, self.resolution, seed)


def _too_few_documents(units: Units, what: str) -> str | None:
    if units.n_documents >= MIN_UNITS:
        return None
    one = units.n_documents == 1
    documents = "one document" if one else f"{units.n_documents} documents"
    return (
        f"cannot tell: the contexts are from {documents}, too few to {what}, "
        f"which takes at least {MIN_UNITS}"
    )


def _nothing_to_cluster(graph: FeatureGraph, min_firings: int) -> dict[str, Any]:
    reason = "no two features fire together more often than chance"
    if len(graph.features) < 2:
        reason = f"fewer than two features fire at least {min_firings} times"
    summary: dict[str, Any] = {"n_clusters": 0, "cluster_sizes": []}
    checks = "ari_seeds ari_halves null_rewired null_shuffled significant ami_decoder"
    for name in ("modularity", "modularity_excess", *checks.split()):
        summary |= _missing(name, reason)
    return summary


def cluster_features(
    firings: Firings,
    W_dec: Tensor | None = None,
    *,
    documents: Units | Tensor | None = None,
    k: int = 20,
    min_firings: int = 20,
    resolution: float = 1.0,
    seed: int = 0,
    n_seeds: int = 4,
    n_nulls: int = 5,
) -> Specialization:
    """Cluster features by what fires together, and check the clusters (`Specialization.summary`).

    Found are clusters of about 8 features and more (planted ones come back whole). Most of 4 and
    fewer are lost: with `k` = 20 neighbours to each feature they are joined to others.

    Args:
        firings: of `FiringPatterns.compute`.
        W_dec: decoder [F, d_in] for the comparison. None: left out.
        documents: [contexts], which document each context is from, or the units: they are split
            and shuffled whole. None: each context is a document of its own.
        k: neighbours per feature.
        min_firings: features that fire less often get label -1.
        resolution: of Leiden; 1 is modularity, larger values give more clusters.
        n_seeds, n_nulls: how many, at least 2 each.

    Raises:
        ValueError: n_seeds or n_nulls is below 2, or there are contexts of unknown document.
    """
    if min(n_seeds, n_nulls) < 2:
        raise ValueError(f"n_seeds and n_nulls must be at least 2, not {n_seeds} and {n_nulls}")
    from sklearn.metrics import adjusted_mutual_info_score

    settings = _Clustering(k, min_firings, resolution, seed)
    graph, n_features = firing_graph(firings.pattern, k, min_firings), firings.pattern.shape[1]
    units = firing_units(firings, documents)
    summary: dict[str, Any] = asdict(settings) | {"n_features": len(graph.features)}
    summary["n_documents"] = units.n_documents
    labels, by_direction = torch.full((n_features,), -1), torch.full((n_features,), -1)
    if len(graph.edges) == 0:
        summary |= _nothing_to_cluster(graph, min_firings)
        return Specialization(labels, by_direction, graph, summary)
    network = _to_igraph(graph)
    membership = _communities(network, resolution, seed)
    modularity = float(network.modularity(membership, weights="weight", resolution=resolution))
    labels[graph.features] = _by_size(membership)
    sizes = torch.bincount(labels[labels >= 0]).tolist()
    summary |= {"n_clusters": len(sizes), "cluster_sizes": sizes, "modularity": modularity}
    summary |= settings.seed_agreement(network, membership, n_seeds) | settings.half_agreement(
        firings, units
    )
    summary |= settings.chance(firings, units, graph, modularity, n_nulls)
    if W_dec is None:
        summary |= _missing("ami_decoder", "no decoder was given")
    else:
        directions = _to_igraph(direction_graph(W_dec, graph.features, k))
        theirs = _communities(directions, resolution, seed)
        by_direction[graph.features] = _by_size(theirs)
        summary["ami_decoder"] = float(adjusted_mutual_info_score(membership, theirs))
    return Specialization(labels, by_direction, graph, summary)


def layout(graph: FeatureGraph, seed: int = 0, epochs: int = 50) -> tuple[Tensor, Tensor]:
    """Places for a picture: features that have a neighbour [M] and their coordinates [M, 2].

    UMAP (McInnes, Healy and Melville 2018) in igraph, on distance 1 - weight. Distances between
    far points, areas and axes mean nothing.
    """
    network = _to_igraph(graph)
    placed = [vertex for vertex, degree in enumerate(network.degree()) if degree > 0]
    if not placed:
        return graph.features[:0], torch.zeros(0, 2)
    network = network.induced_subgraph(placed)
    distance = (1 - np.array(network.es["weight"])).tolist()
    with _igraph_random(seed):
        points = network.layout_umap(dist=distance, epochs=epochs, min_dist=0.1)
    return graph.features[placed], torch.tensor(points.coords)
