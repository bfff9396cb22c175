"""The noise of a seed, and the smallest difference that counts.

Training again with another seed moves every metric. Its standard deviation s is pooled over the
settings of a stream that have several seeds,

    s^2 = sum_g sum_s (m_gs - m_g)^2 / df,    df = sum_g (S_g - 1)

and two settings with S_a and S_b seeds of which nothing else is known are called different, in one
comparison of twenty where there is no difference, from

    smallest = t_{.975, df} s sqrt(1 / S_a + 1 / S_b)

on; for a baseline read off between two of its groups, sum_g w_g^2 / S_g in place of 1 / S_b. It
asks only what training again does: `within_noise` asks for documents too, and uses that both sides
have the same seeds, where they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tcsae.base.labels import label, listed, number
from tcsae.report.groups import Group
from tcsae.report.paired import LEVEL, ROUNDING

SHOWN_SEEDS = (1, 2, 3, 5, 10)
"""Seeds a setting for which the smallest difference is given."""


class Noise(NamedTuple):
    """Of one metric in one stream."""

    sd: float
    df: int
    n_settings: int
    """With several seeds."""
    low: float
    high: float
    """The least and the largest standard deviation of a setting."""


def seed_noise(groups: Sequence[Group], name: str) -> Noise | None:
    """The spread of a metric between seeds, over groups of one stream; None with one seed each."""
    squares, df, own = 0.0, 0, []
    for group in groups:
        values = [run.values[name] for run in group.runs if name in run.values]
        known = torch.stack(values) if values else torch.zeros(0)
        known = known[known.isfinite()]
        if len(known) > 1:
            squares += float((known - known.mean()).square().sum())
            df += len(known) - 1
            own.append(float(known.std()))
    if not df:
        return None
    return Noise((squares / df) ** 0.5, df, len(own), min(own), max(own))


def smallest_difference(noise: Noise, weights: Sequence[tuple[float, int]]) -> float:
    """The smallest difference that counts, of a sum of settings with (weight, seeds) each."""
    from scipy.stats import t

    share = sum(weight**2 / n for weight, n in weights)
    return float(t.ppf((1 + LEVEL) / 2, noise.df)) * noise.sd * share**0.5


class SeedNoise:
    """The noise of every metric of a comparison.

    Args:
        groups: all of them.
        metrics: their names.
    """

    def __init__(self, groups: Sequence[Group], metrics: Sequence[str]) -> None:
        self._groups = list(groups)
        self._of: dict[tuple[int, str], Noise] = {}
        for stream in dict.fromkeys(group.stream for group in groups):
            own = [g for g in groups if g.stream == stream and not g.is_loaded]
            for name in metrics:
                if (noise := seed_noise(own, name)) is not None:
                    self._of[stream, name] = noise

    def mark(self, row: Mapping[str, Any]) -> None:
        """Put `seed_smallest` and `within_seed_noise` into every entry of a group's `deltas`;
        null where no setting has several seeds, and for L0, which is what was matched."""
        match = row["match"]
        sides = zip(match["groups"], match["weights"], strict=True)
        n_own = len(self._groups[row["id"]].runs)
        weights = [(1.0, n_own), *((w, len(self._groups[i].runs)) for i, w in sides)]
        for name, entry in row["deltas"].items():
            noise = self._of.get((row["stream"], name))
            smallest = within = None
            if noise is not None and entry["value"] is not None and name != "l0":
                smallest = smallest_difference(noise, weights)
                rounding = ROUNDING * abs(entry["baseline"] or 0.0)
                within = abs(entry["value"]) <= max(smallest, rounding)
            entry |= {"seed_smallest": smallest, "within_seed_noise": within}

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of `Comparison.seed_noise`, for these metrics."""
        return [
            {
                "stream": stream,
                "metric": name,
                "sd": noise.sd,
                "sd_low": noise.low,
                "sd_high": noise.high,
                "df": noise.df,
                "n_settings": noise.n_settings,
                "smallest": {
                    str(n): smallest_difference(noise, [(1.0, n), (-1.0, n)]) for n in SHOWN_SEEDS
                },
            }
            for (stream, name), noise in self._of.items()
            if name in names
        ]


# ------------------------------------------------------------------------------ in words


def seed_mark(entry: Mapping[str, Any]) -> str:
    """ "less than seeds make (0.004)", or nothing."""
    if not entry.get("within_seed_noise") or not entry["seed_smallest"]:
        return ""
    return f"less than seeds make ({two_digits(entry['seed_smallest'])})"


def seed_noise_words(rows: Sequence[Mapping[str, Any]], group: Mapping[str, Any]) -> list[str]:
    """Which differences of a setting training again could have made; nothing without seeds."""
    names = {row["metric"] for row in rows if row["stream"] == group["stream"]}
    entries = {n: e for n, e in group["deltas"].items() if n in names}
    marks = {n: e["within_seed_noise"] for n, e in entries.items()}
    if not any(mark is not None for mark in marks.values()):
        return []
    below = [f"{label(n).name} ({_beside(entries[n])})" for n, mark in marks.items() if mark]
    above = [label(n).name for n, mark in marks.items() if mark is False]
    said = []
    if below:
        said.append(f"No more than another seed makes: {listed(below)}.")
    if above:
        said.append(f"More than another seed makes: {listed(above)}.")
    return said


def _beside(entry: Mapping[str, Any]) -> str:
    return f"{entry['value']:+.3g}; {two_digits(entry['seed_smallest'])} counts"


SEED_NOISE_LEAD = (
    "What training again with another seed makes of a metric: the standard deviation between "
    "seeds, pooled over settings, and the smallest difference between two settings of so many "
    "seeds each that counts."
)
SEED_NOISE_HEADER = (
    "metric",
    "of a seed",
    *(f"{n} seed{'s' if n > 1 else ''}" for n in SHOWN_SEEDS),
    "freedom",
)


def seed_noise_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Under `SEED_NOISE_HEADER`; a row of `Comparison.seed_noise`."""
    smallest = map(two_digits, row["smallest"].values())
    return label(row["metric"]).name, two_digits(row["sd"]), *smallest, str(row["df"])


def two_digits(value: float) -> str:
    """As a size of error is written: of small ones two digits that count."""
    return number(value) if value >= 1 or not value else f"{value:.2g}"
