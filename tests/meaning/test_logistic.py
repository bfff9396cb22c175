"""Both solvers against scikit-learn on the same features, and what the scores are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

from tcsae.meaning.logistic import class_means_difference, fit_all, fit_few
from tcsae.meaning.scores import Replicates, accuracy_sums, macro_auc, macro_f1

N, D, C = 240, 20, 4


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, np.ndarray]:
    """Sparse features, some of them of classes; [2 N, D] and labels."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(C, (2 * N,), generator=generator)
    x = torch.relu(torch.randn(2 * N, D, generator=generator, dtype=torch.float64) - 0.8)
    x[:, :C] += 0.7 * torch.nn.functional.one_hot(label, C)
    return x, label.numpy()


def sklearns(x: np.ndarray, y: np.ndarray, tried: np.ndarray) -> np.ndarray:
    fitted = LogisticRegression(tol=1e-10, max_iter=10_000).fit(x, y)
    return fitted.decision_function(tried)


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_few_features_agree_with_scikit_learn(data: tuple[Tensor, np.ndarray], k: int) -> None:
    x, label = data
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(label[:N]), C)
    chosen = class_means_difference(x[:N], one_hot).topk(k, dim=1).indices
    w, b = fit_few(x[:N, chosen].permute(1, 0, 2), one_hot.T.double())
    own = torch.einsum("nck,ck->nc", x[N:, chosen], w) + b
    theirs = np.stack(
        [
            sklearns(x[:N, chosen[c]].numpy(), label[:N] == c, x[N:, chosen[c]].numpy())
            for c in range(C)
        ],
        axis=1,
    )
    np.testing.assert_allclose(own.numpy(), theirs, atol=1e-5)
    agree(own.numpy(), theirs, label[N:])


def test_all_features_agree_with_scikit_learn(data: tuple[Tensor, np.ndarray]) -> None:
    x, label = data
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(label[:N]), C)
    w, b = fit_all(x[:N], one_hot.T.double(), tol=1e-8)
    own = (x[N:] @ w.T + b).numpy()
    theirs = np.stack(
        [sklearns(x[:N].numpy(), label[:N] == c, x[N:].numpy()) for c in range(C)], axis=1
    )
    np.testing.assert_allclose(own, theirs, atol=1e-5)
    agree(own, theirs, label[N:])


def agree(own: np.ndarray, theirs: np.ndarray, label: np.ndarray) -> None:
    """Probabilities, accuracy, macro AUC and macro F1, to 1e-6."""
    np.testing.assert_allclose(expit(own), expit(theirs), atol=1e-6)
    weights = np.ones((1, len(label)))
    right, total = accuracy_sums(own.argmax(1), label, weights)[:, 0]
    assert right / total == pytest.approx((theirs.argmax(1) == label).mean(), abs=1e-6)
    auc = np.mean([roc_auc_score(label == c, theirs[:, c]) for c in range(C)])
    assert macro_auc(own, label, weights)[0] == pytest.approx(auc, abs=1e-6)
    f1 = f1_score(label, theirs.argmax(1), average="macro")
    found = macro_f1(own.argmax(1), label, weights, range(C))
    assert found[0] == pytest.approx(f1, abs=1e-6)


def test_a_separable_class_has_a_finite_probe() -> None:
    x = torch.cat([torch.zeros(50, 1), torch.full((50, 1), 1e3)]).double()
    y = torch.cat([torch.zeros(50), torch.ones(50)]).double()
    w, b = fit_few(x[None], y[None])
    assert torch.isfinite(w).all() and torch.isfinite(b).all()
    assert ((x @ w[0] + b[0] > 0) == (y > 0)).all()


def test_the_auc_halves_ties_and_leaves_out_a_class_that_nobody_has() -> None:
    label = np.array([0, 0, 1, 1])
    scores = np.array([[0.0, 0.0, 9.0], [0.0, 0.0, 1.0], [0.0, 1.0, 2.0], [-1.0, 1.0, 5.0]])
    weights = np.ones((1, 4))
    # Class 0: of its 4 pairs 2 are won and 2 tied; class 1: all won.
    assert macro_auc(scores, label, weights)[0] == pytest.approx((0.75 + 1.0) / 2)
    assert np.isnan(macro_auc(scores, np.zeros(4, int), weights)[0])


def test_an_interval_covers_the_truth_and_few_documents_have_none() -> None:
    covered = []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        # Documents differ: tokens of one are no independent draws.
        rate = generator.beta(6, 4, size=40)
        document = np.repeat(np.arange(40), 30)
        right = (generator.random(1200) < rate[document]).astype(int)
        replicates = Replicates(document)
        sums = accuracy_sums(right, np.ones(1200, int), replicates.weights(document))
        number = replicates.number(sums[0] / sums[1])
        low, high = number.interval
        assert low is not None and high is not None and len(number.replicates) == 20
        covered.append(low < 0.6 < high)
    assert 0.9 < np.mean(covered) < 0.99
    few = Replicates(np.arange(15))
    assert few.number(np.full(16, 0.5)).interval == (None, None)
