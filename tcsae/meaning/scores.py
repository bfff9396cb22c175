"""Accuracy, macro F1 and macro AUC of probes, again without each block of documents.

Shapes: n test samples, C classes, R = 1 + blocks: all documents, and all but each block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from tcsae.meaning.held_text import Number
from tcsae.metrics.units import MIN_UNITS

BLOCKS = 20


class Replicates:
    """Which test samples are left out when a block of documents is.

    Args:
        documents: of all test samples of all splits: numbers; the blocks are of these.
    """

    def __init__(self, documents: np.ndarray) -> None:
        self._known = np.unique(documents)
        self.n_documents = len(self._known)
        self.n_blocks = min(self.n_documents, BLOCKS)

    def weights(self, documents: np.ndarray) -> np.ndarray:
        """[R, n] of samples of these documents."""
        block = np.searchsorted(self._known, documents) % self.n_blocks
        kept = block[None] != np.arange(self.n_blocks)[:, None]
        return np.concatenate([np.ones((1, len(documents))), kept.astype(float)])

    def number(self, values: np.ndarray) -> Number:
        """Of [R] values: the first, with a 95 % interval by the jackknife over the blocks."""
        value, others = float(values[0]), values[1:]
        if not math.isfinite(value):
            return Number(None)
        if self.n_documents < MIN_UNITS or not np.isfinite(others).all():
            return Number(value)
        g = len(others)
        error = math.sqrt((g - 1) / g * float(((others - others.mean()) ** 2).sum()))
        half = float(student.ppf(0.975, g - 1)) * error
        return Number(value, (value - half, value + half), tuple(others.tolist()))


def macro_auc(scores: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over classes of the area under the ROC curve, ties halved: [R].

    scores [n, C], label [n], weights [R, n]. Classes without a sample, or with nothing else, are
    left out; NaN if all are.
    """
    found = []
    for number in range(scores.shape[1]):
        order = np.argsort(scores[:, number], kind="stable")
        s, positive = scores[order, number], label[order] == number
        w = weights[:, order]
        starts = np.flatnonzero(np.r_[True, s[1:] != s[:-1]])
        pos = np.add.reduceat(w * positive, starts, axis=1)
        neg = np.add.reduceat(w * ~positive, starts, axis=1)
        below = np.cumsum(neg, axis=1) - neg
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((pos * (below + neg / 2)).sum(1) / (pos.sum(1) * neg.sum(1)))
    stacked = np.array(found)
    there = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        return np.where(there, stacked, 0).sum(0) / there.sum(0)


def accuracy_sums(predicted: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Right ones and all, [2, R]."""
    return np.stack([weights @ (predicted == label), weights.sum(1)])


def macro_f1(
    predicted: np.ndarray, label: np.ndarray, weights: np.ndarray, classes: Sequence[int]
) -> np.ndarray:
    """Mean over the classes that there are of F1: [R]."""
    is_, said = (np.equal.outer(x, np.asarray(classes)) for x in (label, predicted))
    both, first, second = weights @ (is_ & said), weights @ is_, weights @ said
    there = first > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(there, 2 * both / (first + second), 0.0)
        return f1.sum(1) / there.sum(1)
