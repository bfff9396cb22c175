"""Do the intervals and the word "different" keep what they promise? Simulated, with known truth.

    make calibrate                          300 trials a row, about 45 minutes on one core
    python scripts/calibrate.py --trials 40 --documents 32 --check

Every trial goes the way of a user: features and activations of contexts from a number of documents
in, a comparison out. Documents are alike in themselves: the contexts of one share a level of every
feature and a size of the error. Three tables: how often a 95 % interval holds the truth; how often
anything is called different between two SAEs of one law, and how often an effect of twice the
printed smallest difference is found; and whether a baseline differs from itself at another k.

`--check` ends with status 1 if a rate is outside what chance allows at this number of trials.
`--write` puts the tables into docs/statistics.md.

Shapes: N contexts, T positions, F features, D = d_in.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from tcsae.base.labels import markdown_table
from tcsae.base.progress import Progress
from tcsae.metrics.reconstruction import ReconstructionMetrics
from tcsae.metrics.suite import ConsistencySuite
from tcsae.metrics.units import Units, jackknife_draws
from tcsae.report.draws import core_draws
from tcsae.report.groups import Entries, Group
from tcsae.report.runs import Run

PAGE = Path(__file__).parent.parent / "docs" / "statistics.md"
T, F, D, N = 24, 16, 16, 128
WINDOWS = (2, 4, 8)
LEVEL, MOST_DIFFERENT, POWER = 0.95, 0.05, 0.8
CORE = ("explained_variance", "l0", "mse", "cossim", "l2_ratio", "l1")
MODEL = ("n_tokens",)
FAINT = 0.35
"""Threshold added where features are to be sparse."""


# ------------------------------------------------------------------------------- simulation


@dataclass
class World:
    """What is drawn: features that last by AR(1), levels and errors by document."""

    seed: int
    sparse: bool = False
    lasting: float = 0.8
    """Largest coefficient of the autoregressions; those of the features go from 0 to it."""
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def memory(self, n: int, stronger: float = 0.0) -> Tensor:
        """AR(1) of variance 1, [n, T, F]."""
        phi = (torch.linspace(0, self.lasting, F) + stronger).clamp(max=0.98)
        z = torch.zeros(n, T, F)
        z[:, 0] = self.randn(n, F)
        for t in range(1, T):
            z[:, t] = phi * z[:, t - 1] + (1 - phi**2).sqrt() * self.randn(n, F)
        return z

    def codes(self, n: int, documents: int, common: Tensor | None = None, **kind: float) -> Tensor:
        """Features [n, T, F]; `common` [n, T, F] is what two SAEs see alike."""
        z = self.memory(n, **kind)
        if common is not None:
            z = 0.5**0.5 * (z + common)
        levels = self.randn(documents, 1, F).repeat_interleave(n // documents, 0)
        return torch.relu(z + 0.7 * levels - 0.5 - (FAINT if self.sparse else 0.0))

    def sizes(self, n: int, documents: int) -> Tensor:
        """Size of the error of each context, alike in a document, [n, 1, 1]."""
        return (0.5 * self.randn(documents, 1, 1)).exp().repeat_interleave(n // documents, 0)

    def reconstruction(self, codes: Tensor, sizes: Tensor) -> ReconstructionMetrics:
        n = len(codes)
        x = self.randn(n, T, D)
        measured = ReconstructionMetrics(D, F)
        x_hat = x - 0.45 * sizes * self.randn(n, T, D)
        measured.update(x, x_hat, codes, valid=torch.ones(n, T, dtype=torch.bool))
        return measured


def units_of(n: int, documents: int) -> Units:
    return Units([i * documents // n for i in range(n)])


def suite_of(codes: Tensor, units: Units | None) -> ConsistencySuite:
    blocks = 64 if units is not None else 0
    suite = ConsistencySuite(
        F, T, max_lag=8, windows=WINDOWS, units=units, n_blocks=blocks, n_boot=1000
    )
    suite.update(codes)
    return suite


# --------------------------------------------------------------------------------- coverage


def truth(world: World) -> dict[str, float]:
    """The metrics of 30,000 contexts, each from a document of its own."""
    n = 30_000
    codes = world.codes(n, n)
    known = suite_of(codes, None).summary()["metrics"]
    told = {name: e["energy_weighted"] for name, e in known.items()}
    told |= world.reconstruction(codes, world.sizes(n, n)).compute()
    return {name: value for name, value in told.items() if value is not None}


def coverage(documents: int, trials: int, sparse: bool, progress: Progress) -> dict[str, list[int]]:
    """For every metric (intervals that hold the truth, intervals given)."""
    world = World(documents + 1000 * sparse, sparse)
    right = truth(world)
    found: dict[str, list[int]] = {}
    for _ in range(trials):
        codes, units = world.codes(N, documents), units_of(N, documents)
        summary = suite_of(codes, units).summary()
        ends = {n: e["energy_weighted_interval"] for n, e in summary["metrics"].items()}
        measured = world.reconstruction(codes, world.sizes(N, documents))
        told = measured.compute_intervals(units=units)
        ends |= {name: list(told[name]) for name in ("explained_variance", "l0", "mse", "cossim")}
        for name, (low, high) in ends.items():
            if low is not None and name in right:
                held, given = found.setdefault(name, [0, 0])
                found[name] = [held + (low <= right[name] <= high), given + 1]
        progress.update(1)
    return found


# -------------------------------------------------------------------------------- comparison


def run_of(name: str, world: World, codes: Tensor, sizes: Tensor, units: Units) -> Run:
    """A run as a comparison reads it, without its folder."""
    suite = suite_of(codes, units)
    summary, columns = suite.summary(), suite.per_feature()
    measured = world.reconstruction(codes, sizes)
    sums = measured.context_sums()
    nothing = {key: torch.zeros(0, dtype=torch.float64) for key in MODEL}
    draws = core_draws(sums, nothing, D, 1000, units, torch.zeros(0, dtype=torch.long))
    draws |= {n: d[:, 0] if d.ndim == 2 and n != "autocorrelation" else d
              for n, d in suite.draws().items()}  # fmt: skip
    core = measured.compute()
    values = {n: core[n] for n in CORE} | {"autocorrelation": summary["autocorrelation"]["rho"]}
    values |= {n: e["energy_weighted"] for n, e in summary["metrics"].items()}
    return Run(
        name,
        Path(name),
        SimpleNamespace(seed=0),  # type: ignore[arg-type]
        {"n_model_tokens": 1},
        torch.zeros(2, 0),
        {n: torch.tensor(math.nan if v is None else v).double() for n, v in values.items()},
        {n: d for n, d in draws.items() if d.isfinite().any()},
        {},
        "",
        {},
        {
            n: v.double()
            for n, v in columns.items()
            if n in ("density", "c0", "rho_1", "omega_squared", "profile_rate")
            or n.startswith("C_")
        },  # fmt: skip
        by_density={n: v.double() for n, v in suite.by_density().items()},
    )


def row_of(baseline: Run, variant: Run) -> dict[str, Any]:
    """The entry of a variant beside its baseline, as comparison.json has it."""
    plain = {"sae.architecture": "topk", "sae.k": 3}
    groups = [
        Group(0, 0, plain | {"consistency": "none", "lambda": 0.0}, (baseline,)),
        Group(1, 0, plain | {"consistency": "scale_free", "lambda": 1.0, "window": 8}, (variant,)),
    ]
    names = [n for n in baseline.values if n != "autocorrelation" and n in variant.values]
    return Entries(groups, names, 8).group(groups[1])


def different(row: Mapping[str, Any]) -> list[str]:
    """What is called different, at matched L0 or at matched density."""
    return [
        name
        for kind in ("deltas", "density_matched")
        for name, entry in row[kind].items()
        if entry["within_noise"] is False
    ]


def pairs(
    world: World, documents: int, trials: int, stronger: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Rows of two SAEs that see half of everything alike; the second may last longer."""
    for _ in range(trials):
        common, sizes = world.memory(N), world.sizes(N, documents)
        units = units_of(N, documents)
        first = run_of("a", world, world.codes(N, documents, common), sizes, units)
        kind = {"stronger": stronger} if stronger else {}
        second = run_of("b", world, world.codes(N, documents, common, **kind), sizes, units)
        # L0 was matched: one that misses it by chance is not moved.
        second.values["l0"] = first.values["l0"]
        yield row_of(first, second)


def effect_of(stronger: float) -> float:
    """True difference of C_8 that lasting longer makes."""
    known = []
    for more in (0.0, stronger):
        world = World(7)
        common = world.memory(6000)
        codes = world.codes(6000, 6000, common, stronger=more)
        entry = suite_of(codes, None).summary()["metrics"]["C_8"]
        known.append(entry["energy_weighted"])
    return known[1] - known[0]


def strength_for(effect: float) -> float:
    """How much longer features must last for C_8 to be larger by so much."""
    low, high = 0.0, 0.6
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if effect_of(middle) < effect else (low, middle)
    return (low + high) / 2


@dataclass
class Called:
    """Of so many comparisons of equals, in how many anything was called different; and of those
    with an effect, in how many it was found."""

    documents: int
    trials: int
    false: int
    smallest: float
    effect: float
    found: int


def comparisons(documents: int, trials: int, sparse: bool, progress: Progress) -> Called:
    world = World(documents + 500 + 1000 * sparse, sparse)
    false, smallest = 0, []
    for row in pairs(world, documents, trials):
        false += bool(different(row))
        smallest.append(row["deltas"]["C_8"]["smallest"])
        progress.update(1)
    wanted = 2 * float(torch.tensor(smallest).median())
    stronger = strength_for(wanted)
    found = 0
    for row in pairs(world, documents, trials, stronger):
        found += "C_8" in different(row)
        progress.update(1)
    return Called(documents, trials, false, wanted / 2, effect_of(stronger), found)


# ------------------------------------------------------------------------ itself at another k

GRIDS = ([32.0], [16.0, 128.0], [32.0, 64.0], [16.0, 32.0, 64.0, 128.0])


def curve(name: str, k: float) -> float:
    """Metrics of one baseline by L0, as published ones go."""
    return {
        "explained_variance": 1 - 0.55 * k**-0.32,
        "ce_loss_score": 1 - 0.19 * k**-0.6,
        "density": k / 2304,
        "l1": 3.0 * k**0.8,
        "C_8": 0.01 * k**0.35,
        "rho_1": 0.05 * k**0.2,
        "l0": k,
    }[name]


METRICS = ("explained_variance", "ce_loss_score", "density", "l1", "C_8", "rho_1", "l0")


def itself(trials: int, progress: Progress) -> dict[str, list[int]]:
    """A baseline beside itself at a k in between: comparisons with anything different, and all."""
    generator = torch.Generator().manual_seed(11)
    found: dict[str, list[int]] = {}
    for baselines in GRIDS:
        low, high = min(baselines), max(baselines)
        held = [0, 0]
        for _ in range(trials):
            share = float(torch.rand((), generator=generator))
            k = (
                low * (high / low) ** share
                if len(baselines) > 1
                else low * 1.045 ** (2 * share - 1)
            )
            held = [held[0] + _itself_once(baselines, k, generator), held[1] + 1]
            progress.update(1)
        found[", ".join(f"{x:g}" for x in baselines)] = held
    return found


def _itself_once(baselines: Sequence[float], k: float, generator: torch.Generator) -> bool:
    n = 64
    units = Units.of_contexts(n)
    shared = {m: 0.02 * torch.randn(n, generator=generator).double() for m in METRICS}

    def run(at: float) -> Run:
        values: dict[str, Tensor] = {"autocorrelation": torch.ones(3).double()}
        draws: dict[str, Tensor] = {}
        for name in METRICS:
            true = curve(name, at)
            noise = 0.002 * torch.randn(n, generator=generator).double()
            by_document = true * (1 + (shared[name] + noise if name != "l0" else 0 * noise))
            values[name] = by_document.mean()
            rows = units.without_each(by_document)
            deleted = rows[1:] / (n - 1)
            draws[name] = jackknife_draws(deleted, values[name], 1000)
        features = {"density": torch.full((4,), 0.1), "c0": torch.ones(4)}
        features |= {"profile_rate": torch.full((5, 4), 0.1)}
        config: Any = SimpleNamespace(seed=0)
        place = {"n_model_tokens": 1}
        nothing = torch.zeros(2, 0)
        return Run(f"{at}", Path("k"), config, place, nothing, values, draws, {}, "", {}, features)

    plain = {"sae.architecture": "jumprelu"}
    groups = [
        Group(i, 0, plain | {"sae.k": b, "consistency": "none", "lambda": 0.0}, (run(b),))
        for i, b in enumerate(baselines)
    ]
    variant = plain | {"sae.k": k, "consistency": "scale_free", "lambda": 1.0, "window": 8}
    groups.append(Group(len(groups), 0, variant, (run(k),)))
    return bool(different(Entries(groups, list(METRICS), None).group(groups[-1])))


# ------------------------------------------------------------------------------------ tables


def outside(held: int, given: int, rate: float, *, above: bool = False) -> bool:
    """Whether so many are not what chance gives once in 10,000 at this rate."""
    if above:
        return held > binom.ppf(0.9999, given, rate)
    return held < binom.ppf(0.0001, given, rate)


def report(documents: Sequence[int], trials: int) -> tuple[str, list[str]]:
    """The tables as Markdown, and what failed."""
    kinds = (False, True)
    total = len(documents) * trials * len(kinds) * 3 + len(GRIDS) * trials
    failed: list[str] = []
    with Progress("calibrate", total, unit="trials") as progress:
        columns = {
            (d, sparse): coverage(d, trials, sparse, progress)
            for sparse in kinds
            for d in documents
        }
        called = {
            (d, sparse): comparisons(d, trials, sparse, progress)
            for sparse in kinds
            for d in documents
        }
        same = itself(trials, progress)
    names = sorted({name for column in columns.values() for name in column})
    rows = []
    for name in names:
        cells = []
        for (d, sparse), column in columns.items():
            held, given = column.get(name, [0, 0])
            cells.append(f"{held / given:.3f}" if given >= trials / 2 else "cannot tell")
            if given >= trials / 2 and outside(held, given, LEVEL):
                failed.append(f"{name}: {held} of {given} at {d} documents, sparse {sparse}")
        rows.append([name, *cells])
    head = ["metric", *(f"{d} documents{', sparse' * s}" for d, s in columns)]
    parts = ["Intervals of 95 % that hold the truth:", markdown_table(head, rows, "---:")]
    rows = []
    for (d, sparse), c in called.items():
        rows.append(
            [
                f"{d}{', sparse' * sparse}",
                f"{c.false / c.trials:.3f}",
                f"{c.smallest:.4f}",
                f"{c.effect:.4f}",
                f"{c.found / c.trials:.3f}",
            ]
        )
        if outside(c.false, c.trials, MOST_DIFFERENT, above=True):
            failed.append(f"{c.false} of {c.trials} equals called different at {d} documents")
        if outside(c.found, c.trials, POWER):
            failed.append(f"effect found in {c.found} of {c.trials} at {d} documents")
    head = ["documents", "equals called different", "smallest (C_8)", "an effect of", "is found"]
    parts += ["Two SAEs over the same text:", markdown_table(head, rows, "---:")]
    rows = []
    for grid, (wrong, given) in same.items():
        rows.append([grid, f"{wrong / given:.3f}"])
        if outside(wrong, given, MOST_DIFFERENT, above=True):
            failed.append(f"baselines {grid}: {wrong} of {given} differ from themselves")
    head = ["baselines at L0", "the same SAE at another L0 called different"]
    parts += ["A baseline beside itself:", markdown_table(head, rows, "---:")]
    return "\n\n".join(parts) + "\n", failed


def _write(text: str, trials: int) -> None:
    revision = ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()
    first, last = "<!-- calibrate -->", "<!-- end -->"
    page = PAGE.read_text()
    before, after = page.split(first)[0], page.split(last)[1]
    said = f"`make calibrate`, {trials} trials a row, at {commit}.\n\n{text}"
    PAGE.write_text(f"{before}{first}\n{said}\n{last}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--documents", default="16,32,128", help="numbers, with commas")
    parser.add_argument("--check", action="store_true", help="fail on a rate outside chance")
    parser.add_argument("--write", action="store_true", help="put the tables into the docs")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text, failed = report([int(d) for d in given.documents.split(",")], given.trials)
    sys.stdout.write(text)
    if given.write:
        _write(text, given.trials)
    for line in failed:
        sys.stderr.write(f"outside what chance allows: {line}\n")
    return 1 if failed and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
