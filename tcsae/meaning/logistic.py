"""Logistic probes, one class against the rest, for many classes at once.

The objective is scikit-learn's LogisticRegression (L2, C = 1, intercept not penalised) for each
class alone; both solvers go to its minimum (tests hold them to scikit-learn's).

Shapes: n samples, d inputs, C classes, k features a class.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 50
HALVINGS = 8


def class_means_difference(x: Tensor, y: Tensor) -> Tensor:
    """|mean of a class - mean of the others| of every feature: [C, d].

    x [n, d], y [n, C] 0 or 1. A class without samples, or without others, has 0.
    """
    n_in, n = y.sum(0), len(y)
    inside = y.T.to(x.dtype) @ x
    difference = (
        inside / n_in.clamp(min=1)[:, None] - (x.sum(0) - inside) / (n - n_in).clamp(min=1)[:, None]
    )
    return difference.abs() * ((n_in > 0) & (n_in < n))[:, None]


def fit_few(x: Tensor, y: Tensor, tol: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Newton's method for few features of each class's own: weights [C, k] and intercepts [C].

    Args:
        x: [C, n, k] float64.
        y: [C, n] 0 or 1.
        tol: largest element of the gradient.
    """
    n_classes, _, k = x.shape
    ones = x.new_ones(*x.shape[:2], 1)
    x1 = torch.cat([x, ones], -1)
    w = x.new_zeros(n_classes, k + 1)
    penalty = x.new_ones(k + 1)
    penalty[-1] = 0.0
    # An intercept alone has no curvature left where a class is far from every sample.
    ridge = torch.diag(penalty + 1e-9)
    value = _objective(x1, y, w, penalty)
    for _ in range(STEPS):
        p = torch.sigmoid(_scores(x1, w))
        gradient = torch.einsum("cnk,cn->ck", x1, p - y) + penalty * w
        if gradient.abs().max() < tol:
            break
        weighted = x1 * (p * (1 - p))[..., None]
        step = torch.linalg.solve(weighted.transpose(1, 2) @ x1 + ridge, gradient)
        w, value = _downhill(x1, y, w, step, penalty, value)
    return w[:, :-1], w[:, -1]


def fit_all(x: Tensor, y: Tensor, tol: float = 1e-2, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Newton's method with conjugate gradients, for features that all classes share: weights
    [C, d] and intercepts [C].

    Args:
        x: [n, d].
        y: [C, n] 0 or 1.
        tol: largest element of the gradient.
    """
    x1 = torch.cat([x, x.new_ones(len(x), 1)], 1)
    y = y.to(x.dtype)
    w = x.new_zeros(len(y), x1.shape[1])
    penalty = x.new_ones(x1.shape[1])
    penalty[-1] = 0.0
    value = _objective(x1, y, w, penalty)
    share = y.mean(1)
    likely = _Likely(x1, float((share * (1 - share)).mean()))
    for _ in range(steps):
        p = torch.sigmoid(w @ x1.T)
        gradient = (p - y) @ x1 + penalty * w
        if gradient.abs().max() < tol:
            break
        step = _conjugate(x1, p * (1 - p), penalty, gradient, likely)
        w, value = _downhill(x1, y, w, step, penalty, value)
    return w[:, :-1], w[:, -1]


class _Likely:
    """A curvature near that of every class, c X^T X + 1, factorised once: X's columns may be as
    alike as they like, the gradients that are left are few.
    """

    def __init__(self, x1: Tensor, c: float) -> None:
        n, d = x1.shape
        self.x1, self.c, self.is_tall = x1, c, n >= d
        gram = x1.T @ x1 if self.is_tall else x1 @ x1.T
        eye = torch.eye(len(gram), dtype=x1.dtype, device=x1.device)
        self.factor = torch.linalg.cholesky(eye + c * gram)

    def solved(self, r: Tensor) -> Tensor:
        """r [C, d] times the inverse."""
        if self.is_tall:
            return torch.cholesky_solve(r.T, self.factor).T
        inner = torch.cholesky_solve(self.x1 @ r.T, self.factor)
        return r - self.c * (inner.T @ self.x1)


def _conjugate(x1: Tensor, weight: Tensor, penalty: Tensor, b: Tensor, likely: _Likely) -> Tensor:
    """Solve the Newton equations of all classes roughly, as far as the gradient is worth it."""
    x = torch.zeros_like(b)
    r, z = b.clone(), likely.solved(b)
    p, along = z, (b * z).sum(1)
    norm = b.norm(dim=1)
    enough = norm * torch.minimum(norm.sqrt(), norm.new_tensor(0.1))
    for _ in range(100):
        if (r.norm(dim=1) <= enough).all():
            break
        hp = (weight * (p @ x1.T)) @ x1 + penalty * p
        alpha = along / (p * hp).sum(1).clamp(min=1e-30)
        x = x + alpha[:, None] * p
        r = r - alpha[:, None] * hp
        z = likely.solved(r)
        new = (r * z).sum(1)
        p = z + (new / along.clamp(min=1e-30))[:, None] * p
        along = new
    return x


def _scores(x1: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("cnk,ck->cn", x1, w) if x1.ndim == 3 else w @ x1.T


def _objective(x1: Tensor, y: Tensor, w: Tensor, penalty: Tensor) -> Tensor:
    """[C]."""
    z = _scores(x1, w)
    loss = torch.nn.functional.softplus(z) - y * z
    return loss.sum(1) + 0.5 * (penalty * w**2).sum(1)


def _downhill(
    x1: Tensor, y: Tensor, w: Tensor, step: Tensor, penalty: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """The step, halved for each class until its objective does not rise."""
    size = torch.ones_like(value)
    for _ in range(HALVINGS):
        tried = w - size[:, None] * step
        new = _objective(x1, y, tried, penalty)
        worse = new > value + 1e-9 * value.abs()
        if not worse.any():
            return tried, new
        size = torch.where(worse, size / 2, size)
    return torch.where(worse[:, None], w, tried), torch.where(worse, value, new)
