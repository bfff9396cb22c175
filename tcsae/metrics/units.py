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
        self.block = self._dealt()

    @classmethod
    def of_contexts(cls, n: int) -> Units:
        """Every context a document of its own."""
        return cls(range(n))

    def __len__(self) -> int:
        return len(self.document)

    def _dealt(self) -> Tensor:
        if self.n_documents <= MAX_BLOCKS:
            return self.document.clone()
        sizes = torch.bincount(self.document, minlength=self.n_documents)
        filled = np.zeros(self.n_blocks, dtype=np.int64)
        block_of = torch.zeros(self.n_documents, dtype=torch.long)
        for document in sizes.argsort(descending=True, stable=True).tolist():
            block = int(filled.argmin())
            block_of[document] = block
            filled[block] += int(sizes[document])
        return block_of[self.document]

    def subset(self, contexts: Tensor) -> Units:
        """The units of some of the contexts, [M] indices."""
        return Units(self.document[contexts])

    def spread(self, n: int) -> Tensor:
        """At most n contexts from as many documents as can be, ascending indices [min(n, N)].

        One of every document before a second one of any; where not all documents can have one
        more, those evenly spaced in the order of the documents.
        """
        taken: list[int] = []
        members = [(self.document == d).nonzero().flatten().tolist() for d in range(self.n_documents)]
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
        sizes = torch.bincount(self.block, minlength=self.n_blocks).tolist()
        order = np.random.default_rng(seed).permutation(self.n_blocks)
        order = sorted(order.tolist(), key=lambda g: -sizes[g])
        side, filled = torch.zeros(self.n_blocks, dtype=torch.bool), [0, 0]
        for g in order:
            smaller = int(filled[1] < filled[0])
            side[g] = bool(smaller)
            filled[smaller] += sizes[g]
        return side[self.block]

    @property
    def interval_reason(self) -> str | None:
        """Why no interval can be given; None if one can."""
        if self.n_documents >= MIN_UNITS:
            return None
        return too_few(self.n_documents)


def too_few(n_documents: int) -> str:
    """Why so few documents allow no interval."""
    documents = "1 document" if n_documents == 1 else f"{n_documents} documents"
    return (
        f"the contexts are from {documents}: too few for an interval, "
        f"which takes at least {MIN_UNITS}"
    )


@functools.lru_cache(maxsize=8)
def multipliers(n_blocks: int, n_draws: int, seed: int = 0) -> Tensor:
    """[R, G] float64, the same for every metric and every run over the same documents.

    Rows are draws from Student's t in G dimensions with G - 1 degrees of freedom: normal
    columns, of mean 0 and variance 1 exactly and uncorrelated exactly where R > G, times
    sqrt(df / chi^2), whose quantiles are taken evenly.
    """
    from scipy.stats import chi2

    generator = np.random.default_rng(seed)
    normal = generator.standard_normal((n_draws, n_blocks))
    if n_draws > n_blocks + 1:
        normal -= normal.mean(0)
        normal = np.linalg.qr(normal)[0] * np.sqrt(n_draws)
    df = max(n_blocks - 1, 1)
    even = generator.permutation((np.arange(n_draws) + 0.5) / n_draws)
    scale = np.sqrt(df / chi2.ppf(even, df))
    return torch.from_numpy(normal * scale[:, None])


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


def interval(draws: Tensor, estimate: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The ends that hold `level` of the draws [R, ...], symmetric about the estimate [...].

    Symmetric because a draw is the error of an estimate around it, and its skewness, known from
    few documents, would sit on the wrong side. NaN where every draw or the estimate is NaN.
    """
    distance = (draws - draws.nanmean(0)).abs().nanquantile(level, dim=0)
    return estimate - distance, estimate + distance
