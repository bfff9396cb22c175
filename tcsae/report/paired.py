"""Values of pooled seeds and their differences, with paired intervals.

Runs of one stream were measured on the same contexts, and every draw leaves the same documents out
for all of them; so a difference of two runs has draws of its own, from which what the documents
have in common is gone. `combine` reads an interval from them for any weighted sum of groups of
runs, each group standing for the mean over its seeds:

    d_r = sum_g w_g mean_s m_gs(draw r of the documents)  +  se t_r  +  the error of a curve

The second term is the spread of training: se is the standard error over seeds and t_r a draw of
Student's t, because two or three seeds say little about their own spread. If all groups have the
same seeds (same initial weights, same order of batches), se is that of the differences seed by
seed, with (seeds - 1) degrees of freedom. Otherwise the groups are taken to have one spread s,
pooled over those with several seeds: se is s sqrt(sum_g w_g^2 / S_g), single seeds included, with
sum_g (S_g - 1) degrees of freedom. With one seed each nothing is known of it: the interval is
about these SAEs, not about training again.

Shapes: R draws, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tcsae.metrics.units import interval
from tcsae.report.at_l0 import error_draws
from tcsae.report.runs import Run

LEVEL = 0.95
SEED_DRAWS = 1000
"""Draws where there are none over documents of any metric."""

ROUNDING = 1e-9
"""Of a value: a smaller difference is none."""


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
    draws: Tensor | None = None
    """[R, ...] around the value."""


def combine(
    name: str, terms: Sequence[Term], *, value: Tensor | None = None, error: float = 0.0
) -> Estimate:
    """The weighted sum of a metric over groups of runs of one stream, with its 95 % interval.

    Args:
        name: of the metric.
        terms: the groups.
        value: of the whole, where it is not the sum itself but moves with the groups like it.
        error: standard deviation of what else is not known of it.
    """
    runs = [run for term in terms for run in term.runs]
    for run in runs:
        if name not in run.values or not run.values[name].isfinite().any():
            why = run.reasons.get(name, "not measured")
            return Estimate(None, None, None, f"{why} (seed {run.seed})" if len(runs) > 1 else why)
    if len({run.basis(name) for run in runs}) > 1:
        return Estimate(None, None, None, "measured on different contexts")
    if len({run.values[name].shape for run in runs}) > 1:
        return Estimate(None, None, None, "measured up to different lags")
    if value is None:
        value = _sum(terms, [torch.stack([r.values[name] for r in t.runs]) for t in terms])
    over_documents, reason = _document_draws(name, terms)
    n_draws = _usual_draws(runs) if over_documents is None else len(over_documents)
    over_seeds = _seed_draws(name, terms, n_draws)
    parts = [part for part in (over_documents, over_seeds) if part is not None]
    if not parts:
        return Estimate(value, None, None, reason)
    if error:
        parts.append(error_draws(name, error, n_draws))
    # About the value, of which the parts are the errors.
    draws = torch.stack([part - part.mean(0) for part in parts]).sum(0) + value
    low, high = interval(draws, value, LEVEL)
    if not low.isfinite().any():
        return Estimate(value, None, None, "undefined without some of the documents")
    return Estimate(value, low, high, None, draws)


def _usual_draws(runs: Sequence[Run]) -> int:
    """As many as the runs' other metrics have, beside which this one is looked at."""
    numbers = {len(draws) for run in runs for draws in run.draws.values()}
    return numbers.pop() if len(numbers) == 1 else SEED_DRAWS


def holds_zero(low: float, high: float, scale: float) -> bool:
    """Whether the interval of a difference holds 0, give or take the rounding of its terms."""
    rounding = ROUNDING * abs(scale)
    return low - rounding <= 0 <= high + rounding


def _sum(terms: Sequence[Term], by_run: Sequence[Tensor]) -> Tensor:
    """Sum over terms of weight times the mean over the first axis."""
    means = [term.weight * values.mean(0) for term, values in zip(terms, by_run, strict=True)]
    return torch.stack(means).sum(0)


def _document_draws(name: str, terms: Sequence[Term]) -> tuple[Tensor | None, str | None]:
    runs = [run for term in terms for run in term.runs]
    for run in runs:
        if name not in run.draws:
            why = run.interval_reason or "no interval over documents, and one seed"
            return None, why
    if len({run.draws[name].shape for run in runs}) > 1:
        return None, "resampled differently (evaluation.bootstrap)"
    return _sum(terms, [torch.stack([r.draws[name] for r in t.runs]) for t in terms]), None


def _seed_draws(name: str, terms: Sequence[Term], n_draws: int) -> Tensor | None:
    values = [torch.stack([run.values[name] for run in term.runs]) for term in terms]
    if len({tuple(run.seed for run in term.runs) for term in terms}) == 1:
        by_seed = [term.weight * v for term, v in zip(terms, values, strict=True)]
        together = torch.stack(by_seed).sum(0)
        n = len(together)
        return student(together.std(0) / n**0.5, n - 1, n_draws) if n > 1 else None
    df = sum(len(v) - 1 for v in values)
    if not df:
        return None
    squares = torch.stack([(v - v.mean(0)).square().sum(0) for v in values]).sum(0)
    share = sum(term.weight**2 / len(v) for term, v in zip(terms, values, strict=True))
    return student((squares / df * share).sqrt(), df, n_draws)


def student(error: Tensor, df: int, n_draws: int) -> Tensor:
    """Draws [R, ...] of an error of that size, Student's t with `df` degrees of freedom."""
    from scipy.stats import t

    quantiles = t.ppf((np.arange(n_draws) + 0.5) / n_draws, df=df)
    order = np.random.default_rng(0).permutation(n_draws)
    drawn = torch.from_numpy(quantiles[order])
    return drawn.reshape(-1, *[1] * error.ndim) * error
