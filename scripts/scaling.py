"""The tables of docs/scaling.md, computed anew:  python scripts/scaling.py

All figures come from tcsae/launch/estimate.py, but for those in MEASURED. A test holds the document
to what this prints.
"""

from __future__ import annotations

from collections.abc import Sequence

from tcsae.base.labels import size
from tcsae.config import Config
from tcsae.config.compose import config_of
from tcsae.launch.estimate import (
    Cost,
    hours,
    job_cost,
    members_that_fit,
    sweep_cost,
)
from tcsae.launch.machine import MACHINES, Machine

A100, H100, CPU = (MACHINES[name] for name in ("a100", "h100", "cpu"))
TOKENS = 500_000_000
CONTEXTS = TOKENS // 128
LONG = [
    "sae=topk",
    "dataset=pile",
    f"dataset.n_contexts={CONTEXTS}",
    "training=long",
    f"training.tokens={TOKENS}",
    "store.dir=store",
]
MODELS = {"gemma": "Gemma-2-2b, layer 19", "smollm2": "SmolLM2-135M, layer 15",
          "gpt2": "GPT-2 small, layer 8"}  # fmt: skip
LAYERS = {"gemma": 19, "smollm2": 15, "gpt2": 8}
WIDTHS = [("gemma", 2304), ("gemma", 16384), ("gemma", 65536), ("smollm2", 2304), ("gpt2", 2304)]

# On two cores (AMD EPYC, AVX512-bf16, 23 GB) that did little else, torch 2.13 for the CPU: the
# embedded default (README.md), a member alone at 2304, in turn with eight others at 9216.
MEASURED = {
    "harvest": 3884.0,
    "topk 2304": 80.0,
    "standard 2304": 105.0,
    "topk 9216": 211.0,
    "standard 9216": 466.0,
    "train": 40.0,
    "evaluate features": 5.0,
    "evaluate model": 17.0,
    "rest": 23.0,
    "total": 170.0,
    "peak": 2.67,
    "store": 341.8,
    "checkpoint": 31.910,
}


def long_job(model: str, d_sae: int, *more: str) -> Config:
    overrides = [f"model={model}", f"layer={LAYERS[model]}", *LONG, f"sae.d_sae={d_sae}", *more]
    return config_of(*overrides)


def cost_of(config: Config, machine: Machine) -> Cost:
    cost = job_cost(config, machine)
    assert cost is not None
    return cost


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def duration(n_hours: float | None) -> str:
    """Hours, to two digits."""
    assert n_hours is not None
    return f"{n_hours:.2g}" if n_hours < 9.95 else f"{n_hours:,.0f}"


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g}"


def streams() -> None:
    rows = []
    for model, label in MODELS.items():
        config = long_job(model, 2304)
        passed = cost_of(config, A100).harvest[1]
        flops = (passed.flops + passed.float32_flops) / cost_of(config, A100).harvest_tokens
        row = [label, f"{flops / 1e9:.2f}"]
        for machine in (A100, H100, CPU):
            cost = cost_of(config, machine)
            passes = hours(cost.harvest[1:-1], machine)
            row += [f"{cost.harvest_tokens / passes / 3600:,.0f}"]
        for machine in (A100, H100, CPU):
            row += [duration(hours(cost_of(config, machine).harvest, machine))]
        rows.append([*row, size(cost_of(config, A100).store_bytes), "computed"])
    table(
        "One stream of 500 M tokens",
        ["model", "GFLOP a token", "tokens/s A100", "H100", "2 cores", "hours A100", "H100",
         "2 cores", "store (bf16)", "figures"],
        rows,
    )  # fmt: skip


def step_ms(config: Config, machine: Machine) -> float:
    return 3.6e6 * hours(cost_of(config, machine).train[:2], machine) / config.steps


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def trainings() -> None:
    rows = []
    for model, d_sae in WIDTHS:
        config = long_job(model, d_sae)
        row = [MODELS[model].split(",")[0], f"{d_sae:,}"]
        row += [milliseconds(step_ms(config, machine)) for machine in (A100, H100, CPU)]
        for machine in (A100, H100, CPU):
            row.append(duration(hours(cost_of(config, machine).train, machine)))
        parts = {w.what: w.seconds(A100) for w in cost_of(config, A100).train[:2]}
        shares = " / ".join(f"{100 * part / sum(parts.values()):.0f}" for part in parts.values())
        read = hours(cost_of(config, A100).stream, A100)
        rows.append([*row, shares, duration(read), "computed"])
    table(
        "One topk SAE (k = 32), 500 M tokens in steps of 4,096, the store being there",
        ["model", "d_sae", "ms a step A100", "H100", "2 cores", "hours A100", "H100", "2 cores",
         "products / bytes, % (A100)", "hours to read the store", "figures"],
        rows,
    )  # fmt: skip


def memory() -> None:
    rows = []
    for model, d_sae in WIDTHS:
        config = long_job(model, d_sae)
        cost = cost_of(config, A100)
        fits = members_that_fit(config, 80)
        packs = [gb(cost.shared_bytes + n * cost.member_bytes) for n in (1, 8, 16)]
        rows.append(
            [MODELS[model].split(",")[0], f"{d_sae:,}", gb(cost.member_bytes), *packs, str(fits),
             gb(cost.host_bytes), gb(cost.run_bytes), "computed"]
        )  # fmt: skip
    table(
        "Memory and disk, GB",
        ["model", "d_sae", "one SAE in training", "device: process of 1", "of 8", "of 16",
         "SAEs in 80 GB", "host", "run folder", "figures"],
        rows,
    )  # fmt: skip


def packs_of(members: int) -> list[list[int]]:
    return [list(range(first, first + members)) for first in range(0, 16, members)]


def grids() -> None:
    ways: dict[str, tuple[list[str], int]] = {
        "16 processes, each its own store": (["store.dir=own-{}"], 1),
        "16 processes, one store": ([], 1),
        "2 processes of 8, one store": ([], 8),
        "1 process of 16": ([], 16),
        "16 processes, store=stream": (["store=stream"], 1),
        "2 processes of 8, store=stream": (["store=stream"], 8),
        "1 process of 16, store=stream": (["store=stream"], 16),
    }
    chosen = {
        ("gemma", 2304): list(ways),
        ("gemma", 16384): list(ways)[1:4] + list(ways)[-1:],
        ("gemma", 65536): [list(ways)[i] for i in (1, 2, 4, 5)],
        ("smollm2", 2304): [list(ways)[i] for i in (1, 3, 6)],
        ("gpt2", 2304): [list(ways)[i] for i in (1, 3, 6)],
    }
    rows = []
    for (model, d_sae), names in chosen.items():
        for name in names:
            more, pack = ways[name]
            configs = [
                long_job(model, d_sae, *(text.format(index) for text in more))
                for index in range(16 if "own" in name else 1)
            ]
            grid = configs if len(configs) == 16 else configs * 16
            costs = [sweep_cost(grid, packs_of(pack), machine) for machine in (A100, H100)]
            rows.append(
                [
                    MODELS[model].split(",")[0],
                    f"{d_sae:,}",
                    name,
                    *(duration(cost.device_hours) for cost in costs),
                    duration(max(costs[0].pack_hours)),
                    size(costs[0].store_bytes + costs[0].run_bytes),
                    gb(costs[0].device_bytes),
                    "computed",
                ]
            )
    table(
        "A grid of 16 points (window x lambda), 500 M tokens each, nothing harvested before",
        ["model", "d_sae", "how", "GPU hours A100", "H100", "longest process (A100), hours", "disk",
         "device memory, GB", "figures"],
        rows,
    )  # fmt: skip


def comparison() -> None:
    default = config_of("model=smollm2", "store.dir=store")
    cost = cost_of(default, CPU)
    measured = (*cost.evaluate, *cost.reference)
    works = {work.what: work.seconds(CPU) for work in cost.evaluate}
    whole = (*cost.harvest, *cost.stream, *cost.train, *measured)
    computed = {
        "harvest": cost.harvest_tokens / 3600 / hours(cost.harvest[1:], CPU),
        "train": 3600 * hours((*cost.train, *cost.stream), CPU),
        "evaluate features": works["features"],
        "evaluate model": sum(w.seconds(CPU) for w in measured if w.what in ("model", "logits")),
        "rest": works["intervals"] + works["analysis"],
        "total": 3600 * hours(whole, CPU),
        "peak": cost.host_bytes / 1e9,
        "store": cost.store_bytes / 1e6,
        "checkpoint": cost.train[3].disk_bytes
        / default.steps
        * default.training.checkpoint_every
        / 1e6,
    }
    for name in ("topk", "standard"):
        for d_sae in (2304, 9216):
            one = config_of("model=smollm2", f"sae={name}", f"sae.d_sae={d_sae}")
            computed[f"{name} {d_sae}"] = step_ms(one, CPU)
    labels = {
        "harvest": "harvest, tokens/s (SmolLM2 layer 15)",
        "topk 2304": "step of topk, d_in 576, d_sae 2,304, ms",
        "standard 2304": "step of standard, d_sae 2,304, ms",
        "topk 9216": "step of topk, d_sae 9,216, ms",
        "standard 9216": "step of standard, d_sae 9,216, ms",
        "train": "training of the default run, s",
        "evaluate features": "its features measured, s",
        "evaluate model": "its CE and KL measured, s",
        "rest": "its intervals, analysis and pages, s",
        "total": "the whole default run, s (start-up is not computed)",
        "peak": "its peak memory, GB (measured with 0.34 of store mapped into it)",
        "store": "its store, MB",
        "checkpoint": "one checkpoint, MB",
    }
    rows = []
    for key, label in labels.items():
        a, b = computed[key], MEASURED[key]
        digits = "{:,.0f}" if b >= 1000 else "{:.4g}" if key == "checkpoint" else "{:.3g}"
        rows.append([label, digits.format(b), digits.format(a), f"{a / b:.2f}"])
    table(
        "Measured on two cores, and what the model computes for them",
        ["what", "measured", "computed", "computed / measured"],
        rows,
    )


def main() -> None:
    for part in (streams, trainings, memory, grids, comparison):
        part()


if __name__ == "__main__":
    main()
