"""Values of pooled seeds and their differences, with paired intervals.

Runs of one stream were measured on the same contexts, and every resample draws the same contexts
for all of them; so a difference of two runs has resamples of its own, from which what the contexts
have in common is gone. `combine` reads an interval from them for any weighted sum of groups of
runs, each group standing for the mean over its seeds:

    d_r = sum_g w_g mean_s m_gs(resample r of the contexts)  +  se t_r

The second term is the spread of training: se is the standard error over seeds and t_r a draw of
Student's t with (seeds - 1) degrees of freedom, because two or three seeds say little about their
own spread. If all groups have the same seeds (same initial weights, same order of batches), se is
that of the differences seed by seed; otherwise every group with two seeds or more adds a term of
its own. A group with one seed adds none: its interval is about this one SAE, not about training
again.

Shapes: R resamples, N contexts, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tcsae.metrics.bootstrap import interval
from tcsae.report.runs import Run

LEVEL = 0.95
SEED_DRAWS = 1000
"""Resamples where there are none over contexts."""

_ROUNDING = 1e-9


class Term(NamedTuple):
    """The mean over the seeds of a group, with its weight."""

    weight: float
    runs: Sequence[Run]


class Estimate(NamedTuple):
    """A weighted sum of groups; numbers or lists (of a curve), None where there is none."""

    value: Tensor | None
    low: Tensor | None
    high: Tensor | None
    reason: str | None


def combine(name: str, terms: Sequence[Term]) -> Estimate:
    """The weighted sum of a metric over groups of runs of one stream, with its 95 % interval."""
    runs = [run for term in terms for run in term.runs]
    for run in runs:
        if name not in run.values or not run.values[name].isfinite().any():
            why = run.reasons.get(name, "not measured")
            return Estimate(None, None, None, f"{why} (seed {run.seed})" if len(runs) > 1 else why)
    if len({run.basis(name) for run in runs}) > 1:
        return Estimate(None, None, None, "measured on different contexts")
    if len({run.values[name].shape for run in runs}) > 1:
        return Estimate(None, None, None, "measured up to different lags")
    value = _sum(terms, [torch.stack([r.values[name] for r in t.runs]) for t in terms])
    over_contexts, reason = _context_draws(name, terms)
    n_draws = SEED_DRAWS if over_contexts is None else len(over_contexts)
    over_seeds = _seed_draws(name, terms, n_draws)
    parts = [part for part in (over_contexts, over_seeds) if part is not None]
    if not parts:
        return Estimate(value, None, None, reason)
    low, high = interval(torch.stack(parts).sum(0), value, LEVEL)
    if not low.isfinite().any():
        return Estimate(value, None, None, "undefined in every resample")
    return Estimate(value, low, high, None)


def holds_zero(low: float, high: float, scale: float) -> bool:
    """Whether the interval of a difference holds 0, give or take the rounding of its terms."""
    rounding = _ROUNDING * abs(scale)
    return low - rounding <= 0 <= high + rounding


def _sum(terms: Sequence[Term], by_run: Sequence[Tensor]) -> Tensor:
    """Sum over terms of weight times the mean over the first axis."""
    means = [term.weight * values.mean(0) for term, values in zip(terms, by_run, strict=True)]
    return torch.stack(means).sum(0)


def _context_draws(name: str, terms: Sequence[Term]) -> tuple[Tensor | None, str | None]:
    runs = [run for term in terms for run in term.runs]
    for run in runs:
        if name not in run.draws:
            why = run.interval_reason or "no interval over contexts, and one seed"
            return None, why
    if len({run.draws[name].shape for run in runs}) > 1:
        return None, "resampled differently (evaluation.bootstrap)"
    return _sum(terms, [torch.stack([r.draws[name] for r in t.runs]) for t in terms]), None


def _seed_draws(name: str, terms: Sequence[Term], n_draws: int) -> Tensor | None:
    values = [torch.stack([run.values[name] for run in term.runs]) for term in terms]
    if len({tuple(run.seed for run in term.runs) for term in terms}) == 1:
        by_seed = [term.weight * v for term, v in zip(terms, values, strict=True)]
        spreads = [torch.stack(by_seed).sum(0)]
    else:
        spreads = [term.weight * v for term, v in zip(terms, values, strict=True)]
    parts = [
        _student(spread, n_draws, salt) for salt, spread in enumerate(spreads) if len(spread) > 1
    ]
    return torch.stack(parts).sum(0) if parts else None


def _student(values: Tensor, n_draws: int, salt: int) -> Tensor:
    """Draws [R, ...] of the error of the mean over seeds of values [S, ...]."""
    from scipy.stats import t

    error = values.std(0) / len(values) ** 0.5
    quantiles = t.ppf((np.arange(n_draws) + 0.5) / n_draws, df=len(values) - 1)
    order = np.random.default_rng(salt).permutation(n_draws)
    drawn = torch.from_numpy(quantiles[order])
    return drawn.reshape(-1, *[1] * error.ndim) * error
