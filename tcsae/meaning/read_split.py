"""One split of a task, read as numbers, and the probes that are fitted to it.

Inputs are divided by their standard deviation in the training part, so that the penalty is the same
for every SAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_matrix

from tcsae.meaning.held_text import Number
from tcsae.meaning.logistic import class_means_difference, fit_all, fit_few
from tcsae.meaning.scores import Replicates, accuracy_sums, macro_auc, macro_f1
from tcsae.meaning.tasks import Item, Split, Task, sampled

HEADLINE_K = 5
"""Features a class of the probes that tables and pages show."""


@dataclass
class Scores:
    """What the splits of one probe add up to."""

    sums: list[np.ndarray] = field(default_factory=list)
    f1: list[np.ndarray] = field(default_factory=list)
    auc: list[np.ndarray] = field(default_factory=list)

    def dump(self, replicates: Replicates) -> dict[str, Number]:
        right, total = np.sum(self.sums, axis=0)
        return {
            "accuracy": replicates.number(right / total),
            "auc": replicates.number(np.mean(self.auc, axis=0)),
            "f1": replicates.number(np.mean(self.f1, axis=0)),
        }


@dataclass(frozen=True)
class Side:
    x: torch.Tensor
    """[samples, inputs] float32."""
    label: np.ndarray
    document: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """A split, read: inputs divided by their standard deviation in the training part."""

    train: Side
    test: Side
    difference: torch.Tensor
    """[C, inputs]: of class means, on the training part."""
    one_hot: torch.Tensor
    """[C, training samples] float32."""


def read(task: Task, split: Split, source: csr_matrix | np.ndarray, size: int | None) -> Prepared:
    def side(items: Sequence[Item]) -> Side:
        s = sampled(task, items, size)
        x = s.average @ source[: s.average.shape[1]]
        dense = x.toarray() if isinstance(x, csr_matrix) else x
        return Side(torch.from_numpy(np.ascontiguousarray(dense)), s.label, s.document)

    return prepare(side(split.train), side(split.test), len(task.classes))


def prepare(train: Side, test: Side, n_classes: int) -> Prepared:
    """Select and scale by the training part alone."""
    label = torch.from_numpy(train.label)
    one_hot = torch.nn.functional.one_hot(label, n_classes).float()
    difference = class_means_difference(train.x, one_hot)
    scale = train.x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Prepared(
        Side(train.x / scale, train.label, train.document),
        Side(test.x / scale, test.label, test.document),
        difference,
        one_hot.T.contiguous(),
    )


def few(
    data: Prepared, k: int, allowed: slice = slice(None), y: torch.Tensor | None = None
) -> np.ndarray:
    """Scores [test samples, C] of a probe of k features a class, out of those `allowed`.

    y: other labels [C, training samples] than the true ones, by which features are chosen too.
    """
    difference = data.difference
    if y is not None:
        difference = class_means_difference(data.train.x, y.T)
    start = allowed.start or 0
    part = difference[:, allowed]
    chosen = start + part.topk(min(k, part.shape[1]), dim=1).indices
    y = data.one_hot if y is None else y
    w, b = fit_few(data.train.x[:, chosen].permute(1, 0, 2).double(), y.double())
    z = torch.einsum("nck,ck->nc", data.test.x[:, chosen].double(), w) + b
    return z.numpy()


def all_of(data: Prepared) -> np.ndarray:
    """Scores [test samples, C] of a probe of all inputs that vary."""
    there = (data.train.x != data.train.x[:1]).any(0)
    w, b = fit_all(data.train.x[:, there], data.one_hot)
    return (data.test.x[:, there] @ w.T + b).double().numpy()


def shuffled(data: Prepared, number: int) -> torch.Tensor:
    order = np.random.default_rng(number).permutation(len(data.train.label))
    return data.one_hot[:, torch.from_numpy(order)]


def replicates_of(task: Task) -> Replicates:
    documents = [item.document for split in task.splits for item in split.test]
    return Replicates(np.array(documents))


def score(scores: Scores, z: np.ndarray, data: Prepared, replicates: Replicates) -> None:
    weights = replicates.weights(data.test.document)
    label, predicted = data.test.label, z.argmax(1)
    scores.sums.append(accuracy_sums(predicted, label, weights))
    scores.f1.append(macro_f1(predicted, label, weights, range(z.shape[1])))
    scores.auc.append(macro_auc(z, label, weights))
