"""docs/effect.md's table of two learning rates and two lengths.

python scripts/effect_rates.py DIR      read the sweep of +experiment=effect_rates, write
                                        docs/effect_rates.json and the page
python scripts/effect_rates.py          write the page from docs/effect_rates.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import effect
from effect import PAGE, ROOT, arm_of, difference, entry, grouped
from pages import publish, with_interval

from tcsae.base.labels import markdown_table
from tcsae.config import Config
from tcsae.report.paired import Term, combine
from tcsae.report.runs import Run

RESULTS = ROOT / "docs" / "effect_rates.json"
BLOCK = "effect rates"
METRICS = {
    name: effect.METRICS[name]
    for name in ("explained_variance", "C_8", "L_8", "omega_squared", "edge_energy")
}
LOSS = "loss, lambda 1"


def training_of(run: Run) -> str:
    assert isinstance(run.config, Config), "trained by tcsae"
    training = run.config.training
    return f"{training.tokens:,} tokens, rate {training.lr:g}"


def results(folders: Sequence[Path]) -> dict[str, Any]:
    """Of each training: every metric without the loss, with it, and the paired difference."""
    arms: dict[str, dict[str, list[Run]]] = {}
    for (training, arm), runs in grouped(folders, training_of, arm_of).items():
        arms.setdefault(training, {})[arm] = runs
    return {training: measured(found["none"], found[LOSS]) for training, found in arms.items()}


def measured(none: list[Run], loss: list[Run]) -> dict[str, Any]:
    return {
        "seeds": [run.seed for run in none],
        "metrics": {
            name: {
                "before": entry(combine(name, [Term(1.0, none)])),
                "after": entry(combine(name, [Term(1.0, loss)])),
                "change": difference(name, [(1.0, loss)], none),
            }
            for name in METRICS
        },
    }


def text(found: Mapping[str, Any]) -> str:
    rows = [
        [training, *(_cell(row["metrics"][name]) for name in METRICS)]
        for training, row in sorted(found.items(), key=lambda item: _numbers(item[0]))
    ]
    table = markdown_table(["no loss → lambda 1", *METRICS.values()], rows)
    return f"{table}\n\nTopK at L0 32, seed 0; brackets are 95 % intervals of the difference."


def _cell(metric: Mapping[str, Any]) -> str:
    if metric["change"]["value"] is None:
        return "not measured"
    before, after = metric["before"]["value"], metric["after"]["value"]
    return f"{before:.4f} → {after:.4f}: {with_interval(metric['change'], 4, signed=True)}"


def _numbers(training: str) -> tuple[int, float]:
    tokens, rate = training.split(" tokens, rate ")
    return int(tokens.replace(",", "")), float(rate)


def main() -> None:
    publish(__doc__, results, text, RESULTS, BLOCK, [PAGE])


if __name__ == "__main__":
    main()
