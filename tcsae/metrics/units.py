"""The unit of every interval, null, split and permutation: the document.

Tokens of a context are not independent, and neither are contexts of a document: what is drawn, left
out, shuffled or split is always a document with all of its contexts. `Units` says which contexts
belong together; every run that was measured on the same contexts has the same units, and
`multipliers` gives the same draws to all of them, so that draws of two runs may be subtracted and
those of two metrics laid side by side.

Errors are those of the delete-a-document jackknife (Quenouille 1956; Tukey 1958): the estimate is
computed again without each document, which takes 16 to 64 computations in place of 1,000 resamples
and is, unlike the bootstrap, not too narrow for a ratio of few documents. The draws that intervals
are read from follow Student's t with documents - 1 degrees of freedom around the estimate.

Shapes: N contexts, G blocks, R draws.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MIN_UNITS = 16
"""Documents below which no interval is given: its coverage could not be trusted."""

MAX_BLOCKS = 64
"""Where there are more documents, whole ones share a block: memory and time go with the blocks, and
an error is known well enough from 64 of them."""


class Units:
    """Which of N contexts belong to one document.

    Args:
        documents: [N], a number or name for the document of each context, in the order in which
            the contexts are measured. Contexts with the same one are one unit, wherever they lie.

    Attributes:
        document: [N] int64, the documents numbered by first appearance.
        n_documents: how many there are.
        block: [N] int64; whole documents dealt to at most `MAX_BLOCKS` blocks, larger ones first,
            each to the block with the fewest contexts so far. A block a document where they fit.
        n_blocks: G.
    """

    def __init__(self, documents: Tensor | Sequence[int | str]) -> None:
        named = documents.tolist() if isinstance(documents, Tensor) else list(documents)
        numbers: dict[int | str, int] = {}
        self.document = torch.tensor(
            [numbers.setdefault(name, len(numbers)) for name in named], dtype=torch.long
        )
        self.n_documents = len(numbers)
        self.n_blocks = min(self.n_documents, MAX_BLOCKS)
        self._block = self._dealt()
        self.block = torch.from_numpy(self._block)

    @classmethod
    def of_contexts(cls, n: int) -> Units:
        """Every context a document of its own."""
        return cls(range(n))

    def __len__(self) -> int:
        return len(self.document)

    def _dealt(self) -> np.ndarray:
        document_N = np.array(self.document.tolist(), dtype=np.int64)
        if self.n_documents <= MAX_BLOCKS:
            return document_N
        sizes = np.bincount(document_N, minlength=self.n_documents)
        filled = np.zeros(self.n_blocks, dtype=np.int64)
        block_of = np.zeros(self.n_documents, dtype=np.int64)
        for document in np.argsort(-sizes, kind="stable"):
            block = int(filled.argmin())
            block_of[document] = block
            filled[block] += sizes[document]
        return block_of[document_N]

    def subset(self, contexts: Tensor) -> Units:
        """The units of some of the contexts, [M] indices."""
        return Units(self.document[contexts])

    def spread(self, n: int) -> Tensor:
        """At most n contexts from as many documents as can be, ascending indices [min(n, N)].

        One of every document before a second one of any; where not all documents can have one
        more, those evenly spaced in the order of the documents.
        """
        taken: list[int] = []
        members = [
            (self.document == d).nonzero().flatten().tolist() for d in range(self.n_documents)
        ]
        while len(taken) < min(n, len(self)):
            open_ = [i for i, left in enumerate(members) if left]
            wanted = min(n - len(taken), len(open_))
            for place in np.linspace(0, len(open_) - 1, wanted).round().astype(int):
                taken.append(members[open_[place]].pop(0))
        return torch.tensor(sorted(taken), dtype=torch.long)

    def halves(self, seed: int = 0) -> Tensor:
        """A split of the documents in two, about equal in contexts: [N] bool, one side of each.

        Blocks, so whole documents, are drawn in a seeded order and given to the smaller side.
        """
        sizes = np.bincount(self._block, minlength=self.n_blocks)
        order = np.random.default_rng(seed).permutation(self.n_blocks)
        side, filled = np.zeros(self.n_blocks, dtype=bool), [0, 0]
        for g in sorted(order.tolist(), key=lambda g: -sizes[g]):
            smaller = int(filled[1] < filled[0])
            side[g] = bool(smaller)
            filled[smaller] += sizes[g]
        return torch.from_numpy(side[self._block])

    def without_each(self, value: Tensor, contexts: Tensor | None = None) -> Tensor:
        """Sums over contexts, of all and without each block: [1 + G, ...].

        Args:
            value: [N, ...], or [M, ...] of the contexts [M].
            contexts: which ones `value` has. None: all.
        """
        block = self.block if contexts is None else self.block[contexts]
        blocks = value.new_zeros(self.n_blocks, *value.shape[1:]).index_add_(0, block, value)
        total = blocks.sum(0, keepdim=True)
        return torch.cat([total, total - blocks])

    @property
    def interval_reason(self) -> str | None:
        """Why no interval can be given; None if one can."""
        if self.n_documents >= MIN_UNITS:
            return None
        return too_few(self.n_documents)


def too_few(n_documents: int) -> str:
    """Why so few documents allow no interval."""
    documents = "one document" if n_documents == 1 else f"{n_documents} documents"
    return (
        f"the contexts are from {documents}: too few for an interval, "
        f"which takes at least {MIN_UNITS}"
    )


def multipliers(n_blocks: int, n_draws: int, seed: int = 0) -> Tensor:
    """[R, G] float64, the same for every metric and every run over the same documents.

    Rows are draws from Student's t in G dimensions with G - 1 degrees of freedom: normal
    columns, of mean 0 and variance 1 exactly and uncorrelated exactly where R > G, times
    sqrt(df / chi^2), whose quantiles are taken evenly.
    """
    return torch.from_numpy(_multipliers(n_blocks, n_draws, seed))


# Kept as an array: a tensor made while the cost of a job is counted would have no values.
@functools.lru_cache(maxsize=8)
def _multipliers(n_blocks: int, n_draws: int, seed: int) -> np.ndarray:
    from scipy.stats import chi2

    generator = np.random.default_rng(seed)
    normal = generator.standard_normal((n_draws, n_blocks))
    if n_draws > n_blocks + 1:
        normal -= normal.mean(0)
        normal = np.linalg.qr(normal)[0] * np.sqrt(n_draws)
    df = max(n_blocks - 1, 1)
    even = generator.permutation((np.arange(n_draws) + 0.5) / n_draws)
    scale = np.sqrt(df / chi2.ppf(even, df))
    return np.ascontiguousarray(normal * scale[:, None])


def jackknife_draws(deleted: Tensor, estimate: Tensor, n_draws: int, seed: int = 0) -> Tensor:
    """Draws [R, ...] around an estimate [...], from the same without each block, [G, ...].

    With d_g the estimate without block g and m their mean, the error has the variance
    (G - 1) / G sum_g (d_g - m)^2; draw r is estimate - sqrt((G - 1) / G) sum_g z_rg (d_g - m).
    A block that could not be left out (NaN) makes the draws NaN.
    """
    n_blocks = len(deleted)
    z_RG = multipliers(n_blocks, n_draws, seed).to(deleted.device)
    around = (deleted.double() - deleted.double().mean(0)).reshape(n_blocks, -1)
    error = z_RG @ around * ((n_blocks - 1) / n_blocks) ** 0.5
    return estimate.double() - error.reshape(n_draws, *deleted.shape[1:])


def jackknife_interval(deleted: Tensor, estimate: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Ends of an interval for an estimate [...] from the same without each block, [G, ...].

    That of Student's t where documents are alike in what they add. Where a few add most, t with
    documents - 1 degrees of freedom is too short on their side: the skewness of what each
    block adds is taken out by Hall's cubic (1992, "On the removal of skewness by transformation"),
    and the degrees of freedom are those that its kurtosis leaves the variance (Satterthwaite 1946).
    NaN where a block could not be left out.
    """
    from scipy.stats import t

    n = len(deleted)
    flat = deleted.double().reshape(n, -1)
    added = -(n - 1) * (flat - flat.mean(0))
    spread = added.std(0, unbiased=False)
    unit = added / torch.where(spread > 0, spread, torch.nan)
    skew = unit.pow(3).mean(0) * (n * (n - 1)) ** 0.5 / max(n - 2, 1)
    kurtosis = (unit.pow(4).mean(0) - 3.0).clamp(min=0.0)
    df = (2 * (n - 1) / (2 + kurtosis * (n - 1) / n)).clamp(min=4.0).nan_to_num(nan=n - 1.0)
    reach = torch.from_numpy(np.asarray(t.ppf((1 + level) / 2, df.cpu().numpy()))).to(flat)
    error = spread / max(n - 1, 1) ** 0.5
    ends = [_unskewed(sign * reach, skew, n) for sign in (1.0, -1.0)]
    low, high = (estimate.double() - (error * end).reshape(deleted.shape[1:]) for end in ends)
    return low, high


def _unskewed(t: Tensor, skew: Tensor, n: int) -> Tensor:
    """The value of the studentised mean at which Hall's cubic is t; t itself without skewness."""
    a = torch.where(skew.abs() > 1e-6, skew, torch.nan) / n**0.5
    inside = 1 + a * (t - a / 6)
    root = inside.sign() * inside.abs().pow(1 / 3)
    return torch.where(a.isnan(), t, 3 / a * (root - 1))


def interval(draws: Tensor, estimate: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The ends that hold `level` of the draws [R, ...], symmetric about the estimate [...].

    For differences, whose errors have little skewness; that of one estimate is better known from
    `jackknife_interval`. NaN where every draw or the estimate is NaN.
    """
    distance = (draws - draws.nanmean(0)).abs().nanquantile(level, dim=0)
    return estimate - distance, estimate + distance
