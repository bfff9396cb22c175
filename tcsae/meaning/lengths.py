"""Does an SAE hold in contexts longer than those it was trained on?

Held-out text in contexts of four times the training length T (twice, where the model has no more
positions). A causal model gives a token the same activation whatever follows, so that their first T
positions are contexts of the training length, and the blocks of positions

    1x: KEPT to T    2x: T to 2 T    4x: 2 T to 4 T

are of the same contexts. For each: explained variance (about the mean of the block), L0, and
omega^2, the share of the features' variance between the positions of the block, sums over features
before the ratio: with S(t) the sum of the codes at position t, S_g(t) that of block g of documents,

    b = sum_t n_t / n (|S(t)|^2 - sum_g |S_g(t)|^2) / (n_t^2 - sum_g n_gt^2) - m2
    omega^2 = b / (mean |f|^2 - m2)

and m2 as the first term for the sums over all positions (`tcsae.metrics.position`). Positions
before KEPT are out: there models behave differently whatever the length.

Shapes: C contexts, t positions of a block, D = d_in, F = d_sae, G blocks of documents, R = 1 + G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config import Measured
from tcsae.data.context_cache import load_or_build_contexts
from tcsae.data.language_model import LanguageModel
from tcsae.meaning.again import Run, as_text, codes_of, few_at_once, number_of, run_again
from tcsae.meaning.held_text import Findings, HeldText
from tcsae.metrics.accumulator import with_deleted
from tcsae.metrics.units import Units
from tcsae.sae.base import SparseAutoencoder

TIMES = (4, 2)
KEPT = 8
CONTEXTS = 24
LEAST = {"explained_variance": 0.05, "l0": 1e-6}
"""Within the training length, to take shares of: of next to nothing they say nothing."""
_POSITIONS = 32
"""Positions whose codes are held at a time."""


class Long(NamedTuple):
    """Contexts longer than those of training."""

    run: Run
    units: Units
    times: int
    said: list[str]
    """What could not be had."""


def lengths(sae: SparseAutoencoder, text: HeldText, config: Measured) -> Findings:
    """Explained variance, L0 and omega^2 by position block, within the training length and on."""
    long: Long | str = text.once("lengths", lambda: _long(text, config))
    if isinstance(long, str):
        return Findings({}, [long])
    size = config.dataset.context_size
    edges = [min(KEPT, size // 2), *(size * n for n in (1, 2, 4) if n <= long.times)]
    names = [f"{n}x" for n in (1, 2, 4)]
    blocks = {}
    for name, start, stop in zip(names, edges, edges[1:], strict=False):
        text.stop.check()
        blocks[name] = of_block(sae, long.run, long.units, start, stop)
    headline, unread = {}, []
    for metric, least in LEAST.items():
        if not float(blocks["1x"][metric][0]) >= least:
            unread.append(_no_share(metric, blocks["1x"][metric], long.units))
    for name in list(blocks)[1:]:
        for metric, least in LEAST.items():
            within = blocks["1x"][metric]
            is_read = float(within[0]) >= least
            ratio = blocks[name][metric] / within if is_read else torch.full_like(within, torch.nan)
            headline[f"lengths_{metric}_{name}"] = number_of(ratio, long.units)
        omega = blocks[name]["omega_squared"]
        headline[f"lengths_omega_squared_{name}"] = number_of(omega, long.units)
    details = {
        "blocks": {
            name: {
                "positions": [start, stop],
                **{metric: _dumped(rows, long.units) for metric, rows in blocks[name].items()},
            }
            for name, start, stop in zip(blocks, edges, edges[1:], strict=False)
        },
        "n_contexts": len(long.run.x),
        "n_documents": long.units.n_documents,
    }
    return Findings(headline, [*_said(blocks, long, details), *unread, *long.said], details)


def _long(text: HeldText, config: Measured) -> Long | str:
    """The longest contexts to be had, or why there are none."""
    model, size = text.model, config.dataset.context_size
    assert isinstance(model, LanguageModel), "Measured.unfit_instruments comes first"
    most = model.positions
    times = next((n for n in TIMES if most is None or n * size <= most), None)
    if times is None:
        return f"lengths: {model.cfg.name} has {most} positions, no more than the contexts' {size}"
    said = []
    if times < TIMES[0]:
        said.append(
            f"Contexts of {TIMES[0] * size} tokens were not tried: {model.cfg.name} has {most} "
            "positions."
        )
    there = len(text.batches) * size // (times * size)
    cfg = config.dataset.model_copy(
        update={
            "context_size": times * size,
            "n_contexts": 1,
            "n_eval_contexts": max(1, min(CONTEXTS, there)),
        }
    )
    root = Path(config.store.dir).expanduser()
    try:
        _, contexts = load_or_build_contexts(cfg, model, root, text.stop)
    except UserError as error:
        return f"lengths: no held-out contexts of {times * size} tokens: {error}"
    run = run_again(text, contexts.ids, max(1, config.model.forward_contexts // times))
    return Long(run, Units(contexts.documents), times, said)


# --------------------------------------------------------------------------- a block of positions


def of_block(
    sae: SparseAutoencoder, run: Run, units: Units, start: int, stop: int
) -> dict[str, Tensor]:
    """`explained_variance`, `l0` and `omega_squared` of positions start to stop - 1: [R] each, of
    all and without each block of documents."""
    valid_Ct = run.valid[:, start:stop]
    mean_D = run.x[:, start:stop][valid_Ct].double().mean(0)
    codes_at = _codes_at(sae, run)
    block_C, G = units.block, units.n_blocks
    sums = {n: torch.zeros(G, dtype=torch.float64) for n in ("n", "error2", "variance2", "l0")}
    between = _Between(G, sae.d_sae)
    for at in torch.arange(start, stop).split(_POSITIONS):
        here = slice(int(at[0]), int(at[-1]) + 1)
        f, x_hat = codes_at(here)
        valid, x = run.valid[:, here], run.x[:, here].double()
        parts = {
            "n": valid.double(),
            "error2": (x_hat.double() - x).square().sum(-1),
            "variance2": (x - mean_D).square().sum(-1),
            "l0": (f > 0).sum(-1).double(),
        }
        for name, part in parts.items():
            sums[name].index_add_(0, block_C, torch.where(valid, part, 0.0).sum(1))
        between.add(torch.where(valid[..., None], f, 0.0), valid, block_C)
    total = {name: with_deleted(value) for name, value in sums.items()}
    return {
        "explained_variance": 1 - total["error2"] / total["variance2"],
        "l0": total["l0"] / total["n"],
        "omega_squared": between.omega_squared(),
    }


def _codes_at(sae: SparseAutoencoder, run: Run) -> Callable[[slice], tuple[Tensor, Tensor]]:
    """Codes and reconstructions of a stretch of positions of all contexts. An SAE that reads a
    token's past reads whole contexts."""
    if not sae.sequential:
        return lambda s: codes_of(sae, Run(run.x[:, s], run.segments[:, s], run.valid[:, s]))
    n, size = run.valid.shape
    parts = [codes_of(sae, run.at(some)) for some in few_at_once(n, size, sae.d_sae)]
    f, x_hat = (torch.cat(part) for part in zip(*parts, strict=True))
    return lambda s: (f[:, s], x_hat[:, s])


class _Between:
    """Sums for omega^2: at each position by block, of which the lengths alone are kept."""

    def __init__(self, n_blocks: int, d_sae: int) -> None:
        self._all_GF = torch.zeros(n_blocks, d_sae, dtype=torch.float64)
        self._n_G = torch.zeros(n_blocks, dtype=torch.float64)
        self._square_G = torch.zeros(n_blocks, dtype=torch.float64)
        self._at_R = torch.zeros(n_blocks + 1, dtype=torch.float64)
        """sum_t n_t U(t, t)."""
        self._pairs_R = torch.zeros(n_blocks + 1, dtype=torch.float64)
        """sum_t n_t of the positions that have a U."""

    def add(self, f_CtF: Tensor, valid_Ct: Tensor, block_C: Tensor) -> None:
        self._square_G.index_add_(0, block_C, f_CtF.double().square().sum((1, 2)))
        for t in range(f_CtF.shape[1]):
            S_GF = torch.zeros_like(self._all_GF).index_add_(0, block_C, f_CtF[:, t].double())
            n_G = torch.zeros_like(self._n_G).index_add_(0, block_C, valid_Ct[:, t].double())
            self._all_GF += S_GF
            self._n_G += n_G
            U_R, n_R = _of_different(S_GF, n_G)
            known = U_R.isfinite()
            self._at_R += torch.where(known, U_R * n_R, 0.0)
            self._pairs_R += torch.where(known, n_R, 0.0)

    def omega_squared(self) -> Tensor:
        m2_R, n_R = _of_different(self._all_GF, self._n_G)
        between_R = self._at_R / self._pairs_R - m2_R
        variance_R = with_deleted(self._square_G) / n_R - m2_R
        return between_R / torch.where(variance_R > 0, variance_R, torch.nan)


def _of_different(S_GF: Tensor, n_G: Tensor) -> tuple[Tensor, Tensor]:
    """Products of means of different blocks, summed over features, and the tokens: [R] each."""
    gram_G, total_F = S_GF.square().sum(1), S_GF.sum(0)
    whole = total_F.square().sum()
    squared_R = torch.cat([whole[None], whole - 2 * S_GF @ total_F + gram_G])
    own_R, n_R, n2_R = (with_deleted(x) for x in (gram_G, n_G, n_G.square()))
    pairs_R = n_R.square() - n2_R
    return (squared_R - own_R) / torch.where(pairs_R > 0, pairs_R, torch.nan), n_R


# ------------------------------------------------------------------------------- in words


_WORDS = {"explained_variance": "explained variance", "l0": "L0", "omega_squared": "omega²"}


def _no_share(metric: str, rows_R: Tensor, units: Units) -> str:
    return (
        f"Within the training length {_WORDS[metric]} is {as_text(number_of(rows_R, units))}: too "
        "little to take shares of it."
    )


def _dumped(rows_R: Tensor, units: Units) -> dict[str, Any]:
    found = number_of(rows_R, units)
    return {"value": found.value, "interval": list(found.interval)}


def _said(
    blocks: Mapping[str, Mapping[str, Tensor]], long: Long, details: Mapping[str, Any]
) -> list[str]:
    said = []
    for metric, name in _WORDS.items():
        parts = [
            f"{as_text(number_of(rows[metric], long.units))} at positions "
            f"{' to '.join(str(p) for p in details['blocks'][block]['positions'])}"
            for block, rows in blocks.items()
        ]
        said.append(f"In longer contexts {name} is {', '.join(parts)}.")
    said[-1] += f" {details['n_contexts']} contexts from {details['n_documents']} documents."
    return said
