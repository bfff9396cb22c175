"""Firings with the documents of every feature permuted on their own: what chance alone gives.

Shapes: N counted positions, F features, D documents, L contexts of the longest that is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse
from torch import Tensor

from tcsae.metrics.top_contexts import Firings, firing_units
from tcsae.metrics.units import Units

# Documents are exchanged if as long as this share of the longest, and among at least so many.
_ALIKE = 0.8
_LEAST_STRATUM = 4


class Exchangeable(NamedTuple):
    """Documents in the order of length, cut so that those of one stratum have one length."""

    context: np.ndarray
    """[D, L] number of each context that is kept, by document; -1 beyond the document's length."""
    stratum: np.ndarray
    """[D] int64, from 0."""


def exchangeable(units: Units) -> Exchangeable:
    """Strata of documents alike in length: within a fifth of their longest, and at least 4.

    Of each document as many contexts are kept as the shortest of its stratum has, evenly spaced.
    Where all documents have one length nothing is cut.
    """
    document = units.document.numpy()
    sizes = np.bincount(document, minlength=units.n_documents)
    order = np.argsort(-sizes, kind="stable")
    stratum = np.zeros(len(order), dtype=np.int64)
    start = current = 0
    for place, size in enumerate(sizes[order]):
        if place - start >= _LEAST_STRATUM and size < _ALIKE * sizes[order[start]]:
            start, current = place, current + 1
        stratum[place] = current
    if len(order) - start < _LEAST_STRATUM:
        stratum[start:] = max(current - 1, 0)
    context = np.full((len(order), int(sizes.max(initial=0))), -1)
    for place, which in enumerate(order):
        length = sizes[order[stratum == stratum[place]]].min()
        members = np.flatnonzero(document == which)
        context[place, :length] = members[np.arange(length) * len(members) // length]
    return Exchangeable(context, stratum)


def shuffle_contexts(
    firings: Firings, seed: int, *, documents: Units | Tensor | None = None
) -> sparse.csr_matrix:
    """Firing pattern [N, F] with the documents of every feature permuted on their own.

    Keeps what each feature does inside a document (rate, runs, position profile) and breaks what
    features do together. Documents are exchanged with others alike in length, context for context,
    and the contexts that one has more than another are left out: the fewer are alike, the more of
    what fires together stays so by chance. A firing that would land on a position that does not
    count is lost.

    Args:
        documents: [contexts], which document each context is from, or the units. None: each
            context is a document of its own.
    """
    units = firing_units(firings, documents)
    context_DL, stratum = exchangeable(units)
    place = np.full((2, len(units)), -1)
    place[:, context_DL[context_DL >= 0]] = (context_DL >= 0).nonzero()
    row_of = np.full((len(units), int(firings.position.max(initial=0)) + 1), -1)
    row_of[firings.context, firings.position] = np.arange(len(firings.context))
    entries, n_features = firings.pattern.tocoo(), firings.pattern.shape[1]
    chance = np.random.default_rng(seed).random((n_features, len(stratum)))
    order_FD = (stratum + chance).argsort(axis=1)
    document, which = place[:, firings.context[entries.row]]
    context = context_DL[order_FD[entries.col, document], which]
    row = row_of[context, firings.position[entries.row]]
    kept = (document >= 0) & (row >= 0)
    return sparse.csr_matrix(
        (entries.data[kept], (row[kept], entries.col[kept])), shape=firings.pattern.shape
    )
