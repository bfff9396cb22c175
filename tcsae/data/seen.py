"""How much of the held-out text was trained on: measured on tokens, however the split was made."""

from __future__ import annotations

import numpy as np

from tcsae.data.contexts import Contexts

RUN = 16
"""Tokens in a row that count as the same text: longer than phrases that any two texts share. In
contexts of less than twice as many, half a context: a copy may be cut in two at any place."""
MOST = 0.5
"""Share of a context's tokens in such runs from which it counts as seen."""
_CHUNK = 4096
_BASE = np.uint64(0x9E3779B97F4A7C15)


def share_seen(train: Contexts, held_out: Contexts) -> float:
    """Share of the held-out contexts of which at least half the tokens (BOS at 0 apart) lie in runs
    of `RUN` tokens that stand in a training context too."""
    length = held_out.ids.shape[1] - 1
    run = max(1, min(RUN, length // 2))
    wanted = _runs(held_out.ids.numpy(), run)
    known = np.unique(wanted)
    found = np.zeros(len(known), dtype=bool)
    for start in range(0, len(train), _CHUNK):
        there = _runs(train.ids[start : start + _CHUNK].numpy(), run).ravel()
        place = np.searchsorted(known, there).clip(max=len(known) - 1)
        found[place[known[place] == there]] = True
    seen = found[np.searchsorted(known, wanted)]
    covered = np.zeros((len(wanted), length), dtype=bool)
    for offset in range(run):
        covered[:, offset : offset + seen.shape[1]] |= seen
    return float((covered.mean(1) >= MOST).mean())


def _runs(ids: np.ndarray, run: int) -> np.ndarray:
    """A number for every `run` ids in a row but the first: uint64 [N, T - run] of ids [N, T]."""
    text = ids[:, 1:].astype(np.uint64)
    n = text.shape[1] - run + 1
    total = np.zeros((len(text), n), dtype=np.uint64)
    for offset in range(run):
        # A polynomial modulo 2^64; the ids are spread first, as powers of an even one would vanish.
        total = total * _BASE + (text[:, offset : offset + n] + np.uint64(1)) * _BASE
    return total
