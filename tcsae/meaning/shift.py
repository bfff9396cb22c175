"""Does a token keep its code where its context starts elsewhere? Position-invariance by doing it.

The same held-out text goes through the language model in contexts that start 1, 8, 32 and 64
tokens later, BOS first as always. A token then stands that much earlier, and has lost as much of
its past. Over tokens that are valid in both, and that have `KEPT` tokens before them even in the
shortest context, so that every shift is measured on the same tokens:

    jaccard       active features in both / in either, mean over tokens
    cosine        of the two codes, mean over tokens
    correlation   of each feature with itself, sum of covariances / sum of sqrt(variance variance)
    input_cosine  of the two activations less their mean over tokens: what the model itself keeps
    moved         (1 - cosine) / (1 - input_cosine): codes against activations; null where the
                  activations stay

A cosine does not see the SAE's scale, which is one number for all. `near_start` has the same of the
tokens at positions 1 to 7 of the shifted context; `again` of contexts that start where they did:
what the arithmetic alone makes, where a batch of another shape is rounded otherwise.

Shapes: C contexts, T positions, D = d_in, F = d_sae, G blocks of documents, R = 1 + G.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tcsae.config import Measured
from tcsae.meaning.again import Run, as_text, codes_of, few_at_once, masked, number_of, run_again
from tcsae.meaning.held_text import Findings, HeldText, Number
from tcsae.metrics.accumulator import with_deleted
from tcsae.metrics.units import Units
from tcsae.sae.base import SparseAutoencoder

SHIFTS = (1, 8, 32, 64)
"""Tokens by which the contexts start later; those beyond half a context are left out."""
KEPT = 8
"""Tokens before a token that is measured, in the shortest context."""
CONTEXTS = 32
AGAIN = 8
"""Contexts that are run again as they are."""
SEEN = 20
"""Tokens at which a feature must be on for its own correlation to be shown."""
NAMES = ("jaccard", "cosine", "correlation", "input_cosine", "moved")
_OF_FEATURES = ("a", "b", "aa", "bb", "ab")


class Views(NamedTuple):
    """Some held-out text in contexts that start at several places."""

    units: Units
    first: int
    """Position in the whole context from which on tokens are measured."""
    whole: Run
    shifted: dict[int, Run]
    """By shift; 0: as they are, of the first `AGAIN` contexts and without their last token."""
    mean_D: Tensor
    """Of the activations that are measured."""


def shift(sae: SparseAutoencoder, text: HeldText, config: Measured) -> Findings:
    """Agreement of a token's codes, and of its activations, between contexts that start apart."""
    views: Views | None = text.once("shift", lambda: _views(text, config.model.forward_contexts))
    size = config.dataset.context_size
    if views is None:
        said = f"shift: contexts of {size} tokens are too short to start later"
        return Findings({}, [said])
    by_shift = {}
    for by in views.shifted:
        text.stop.check()
        by_shift[by] = agreement(sae, views, by)
    shifts = [by for by in views.shifted if by]
    units = views.units
    mean = {n: torch.stack([by_shift[by].rows[n] for by in shifts]).mean(0) for n in NAMES[:4]}
    mean["moved"] = _moved(mean)
    headline = {f"shift_{name}": number_of(rows, units) for name, rows in mean.items()}
    details = {
        "by_shift": {str(by): _shown(by_shift[by], units) for by in shifts},
        "again": {n: float(by_shift[0].rows[n][0]) for n in NAMES[:4]},
        "first_position": views.first,
        "n_contexts": len(views.whole.x),
        "n_documents": units.n_documents,
        "n_tokens": int(by_shift[shifts[0]].n_tokens),
    }
    return Findings(headline, _said(headline, shifts, details), details)


def _views(text: HeldText, at_once: int) -> Views | None:
    source = text.batches.source.contexts
    size = source.ids.shape[1]
    shifts = [by for by in SHIFTS if by <= size // 2]
    first = max(shifts, default=0) + min(KEPT, size // 8) + 1
    if not shifts or first >= size:
        return None
    chosen = Units(text.documents).spread(CONTEXTS)
    ids = source.ids[chosen]
    whole = masked(
        text.batches.source.activations(chosen).cpu(),
        source.segments[chosen],
        source.valid[chosen],
        text.batches.calibration.norm_limit,
    )
    shifted = {0: run_again(text, ids[:AGAIN, :-1], at_once)}
    for by in shifts:
        later = torch.cat([ids[:, :1], ids[:, 1 + by :]], 1)
        shifted[by] = run_again(text, later, at_once)
    counted = whole.valid[:, first:]
    mean_D = whole.x[:, first:][counted].double().mean(0)
    return Views(Units(text.documents[chosen]), first, whole, shifted, mean_D)


# ------------------------------------------------------------------------------- agreement


class Agreement(NamedTuple):
    """Of one shift."""

    rows: dict[str, Tensor]
    """[R] by `NAMES`."""
    near_start: dict[str, float]
    """`jaccard`, `cosine`, `input_cosine` of tokens at positions 1 to 7 of the shifted context."""
    feature_F: Tensor
    """Each feature's own correlation; NaN where it was seen at fewer than `SEEN` tokens."""
    n_tokens: int


def agreement(sae: SparseAutoencoder, views: Views, by: int) -> Agreement:
    """How far the codes of the whole contexts and of those that start `by` later agree."""
    other = views.shifted[by]
    n, length = other.valid.shape
    block_C = views.units.block[:n]
    sums = _Sums(views.units.n_blocks, sae.d_sae)
    edge = _Sums(views.units.n_blocks, 0)
    for some in few_at_once(n, length, sae.d_sae):
        one, two = views.whole.at(some), other.at(some)
        f_one, f_two = codes_of(sae, one)[0], codes_of(sae, two)[0]
        for into, start in ((sums, views.first - by), (edge, 1)):
            stop = length if into is sums else min(KEPT, length)
            here = slice(start + by, stop + by), slice(start, stop)
            both = one.valid[:, here[0]] & two.valid[:, here[1]]
            block = block_C[some, None].expand_as(both)[both]
            codes = f_one[:, here[0]][both], f_two[:, here[1]][both]
            x = one.x[:, here[0]][both].double(), two.x[:, here[1]][both].double()
            into.add(block, codes, (x[0] - views.mean_D, x[1] - views.mean_D))
    near = {name: float(rows[0]) for name, rows in edge.of_tokens().items()}
    return Agreement(sums.rows(), near, sums.by_feature(), int(sums.tokens.sum()))


class _Sums:
    """Sums over tokens by block of documents."""

    def __init__(self, n_blocks: int, d_sae: int) -> None:
        self.tokens = torch.zeros(n_blocks, dtype=torch.float64)
        self._of = {
            name: torch.zeros(2, n_blocks, dtype=torch.float64)
            for name in ("jaccard", "cosine", "input_cosine")
        }
        self._features = {
            n: torch.zeros(n_blocks, d_sae, dtype=torch.float64) for n in _OF_FEATURES
        }
        self._on_F = torch.zeros(d_sae)

    def add(
        self, block_N: Tensor, codes: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor]
    ) -> None:
        """Tokens: codes [N, F] and centred activations [N, D] of both."""
        a, b = codes
        self.tokens.index_add_(0, block_N, torch.ones(len(a), dtype=torch.float64))
        either = ((a > 0) | (b > 0)).sum(1)
        both = ((a > 0) & (b > 0)).sum(1)
        self._token("jaccard", block_N, both.double() / either.clamp(min=1), either > 0)
        self._token("cosine", block_N, functional.cosine_similarity(a, b).double(), either > 0)
        moving = (inputs[0].norm(dim=1) > 0) | (inputs[1].norm(dim=1) > 0)
        self._token("input_cosine", block_N, functional.cosine_similarity(*inputs), moving)
        if not len(self._on_F):
            return
        self._on_F += (a > 0).sum(0)
        for block in block_N.unique():
            one, two = (x[block_N == block].double() for x in (a, b))
            parts = (one, two, one.square(), two.square(), one * two)
            for name, part in zip(_OF_FEATURES, parts, strict=True):
                self._features[name][block] += part.sum(0)

    def _token(self, name: str, block_N: Tensor, value_N: Tensor, counted_N: Tensor) -> None:
        value_N = torch.where(counted_N, value_N, 0.0)
        self._of[name][0].index_add_(0, block_N, value_N)
        self._of[name][1].index_add_(0, block_N, counted_N.double())

    def of_tokens(self) -> dict[str, Tensor]:
        """[R] each, NaN without a token."""
        sums = {name: with_deleted(pair.T) for name, pair in self._of.items()}
        return {name: pair[:, 0] / _some(pair[:, 1]) for name, pair in sums.items()}

    def rows(self) -> dict[str, Tensor]:
        rows = self.of_tokens()
        cov_RF, var_RF = self._moments()
        rows["correlation"] = cov_RF.sum(1) / _some(var_RF.sum(1))
        return rows | {"moved": _moved(rows)}

    def by_feature(self) -> Tensor:
        cov_RF, var_RF = self._moments()
        seen_F = self._on_F >= SEEN
        return torch.where(seen_F, cov_RF[0] / _some(var_RF[0]), torch.nan)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Covariance, and root of the product of the variances: [R, F] each."""
        n_R1 = _some(with_deleted(self.tokens[:, None]))
        a, b, aa, bb, ab = (with_deleted(self._features[n]) / n_R1 for n in _OF_FEATURES)
        variances = (aa - a.square()).clamp(min=0), (bb - b.square()).clamp(min=0)
        return ab - a * b, (variances[0] * variances[1]).sqrt()


def _some(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.nan)


STAYS = 1e-6
"""1 - cosine of activations below which they have not moved."""


def _moved(rows: Mapping[str, Tensor]) -> Tensor:
    apart = 1 - rows["input_cosine"]
    return (1 - rows["cosine"]) / torch.where(apart > STAYS, apart, torch.nan)


# ------------------------------------------------------------------------------- in words


def _shown(found: Agreement, units: Units) -> dict[str, Any]:
    known = found.feature_F[found.feature_F.isfinite()]
    ends = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    quartiles = known.quantile(ends).tolist() if len(known) else [None] * 3
    numbers = {name: number_of(rows, units) for name, rows in found.rows.items()}
    return {
        **{n: {"value": x.value, "interval": list(x.interval)} for n, x in numbers.items()},
        "near_start": found.near_start,
        "features": {"q25_median_q75": quartiles, "n": len(known)},
    }


def _said(
    headline: Mapping[str, Number], shifts: list[int], details: Mapping[str, Any]
) -> list[str]:
    jaccard, cosine, correlation, kept, moved = (
        as_text(headline[f"shift_{name}"]) for name in NAMES
    )
    far = f"{shifts[0]} to {shifts[-1]} tokens" if len(shifts) > 1 else f"{shifts[0]} token"
    by = details["by_shift"]
    said = [
        f"In contexts that start {far} later a token keeps {jaccard} of its active features "
        f"(Jaccard), its code has a cosine of {cosine} with the first, its activation {kept}; "
        f"features correlate {correlation} with themselves "
        f"({details['n_tokens']:,} tokens of {details['n_documents']} documents, each shift).",
        "Cosine of the codes by shift: "
        + ", ".join(f"{s}: {_plain(by[str(s)]['cosine']['value'])}" for s in shifts)
        + "; of the activations: "
        + ", ".join(f"{s}: {_plain(by[str(s)]['input_cosine']['value'])}" for s in shifts)
        + f"; of contexts run again as they are {_plain(details['again']['cosine'])} and "
        + f"{_plain(details['again']['input_cosine'])}.",
    ]
    if headline["shift_moved"].value is not None:
        said.append(f"Codes move {moved} times as much as activations (1 - cosine of each).")
    return said


def _plain(value: float | None) -> str:
    return "n/a" if value is None or value != value else f"{value:.3f}"
