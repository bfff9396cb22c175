"""docs/meaning.md's table of synthetic truth: the loss on the first group beside the rest.

    python scripts/synthetic.py DIR ...   read sweeps of +experiment=synthetic_first_group, write
                                          docs/synthetic.json and the page
    python scripts/synthetic.py           write the page from docs/synthetic.json

A world is a table, a setting a row. Intervals are over seeds: the error of other held-out documents
is far below that of another start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effect import ROOT, entry, grouped
from pages import publish, with_interval

from tcsae.base.labels import label, markdown_table
from tcsae.report.paired import Term, combine
from tcsae.report.runs import Run, settings_of

RESULTS = ROOT / "docs" / "synthetic.json"
PAGES = (ROOT / "docs" / "meaning.md",)
BLOCK = "synthetic"
NONE, CONTROL, TSAE = "matryoshka, none", "first group, lambda 3, control", "T-SAE"
LOSS = "first group, lambda 3"
ROWS = (NONE, "first group, lambda 1", LOSS, CONTROL, TSAE, "topk, none", "batchtopk, none")
METRICS = {
    "explained_variance": "explained variance",
    **{
        name: label(name).name.removeprefix("Truth: ")
        for name in (
            *("truth_mcc", "truth_found", "truth_found_slow", "truth_f1_slow", "truth_pieces_slow"),
            *("truth_lag_slow", "truth_recall_with_child", "truth_recall_without_child"),
        )
    },
}
WANTED = 0.1
"""More of the true features found than by the control and by the Temporal SAE."""


def arm_of(run: Run) -> str:
    """The row of a run, as `ROWS` has it."""
    settings = settings_of(run.config)
    architecture = settings["sae.architecture"]
    if architecture == "tsae":
        return "T-SAE, control" if settings["sae.shuffle_positions"] else TSAE
    if settings["lambda"] == 0:
        return f"{architecture}, none"
    features = "first group" if "first group" in settings["consistency"] else "all features"
    control = ", control" if "shuffled" in settings["consistency"] else ""
    return f"{features}, lambda {settings['lambda']:g}{control}"


def world_of(run: Run) -> str:
    world = run.config.model.world
    return "a language model" if world is None else world.name


def results(folders: Sequence[Path]) -> dict[str, Any]:
    """Every world's rows."""
    worlds: dict[str, dict[str, list[Run]]] = {}
    for (world, arm), runs in grouped(folders, world_of, arm_of).items():
        worlds.setdefault(world, {})[arm] = runs
    return {world: measured(arms) for world, arms in worlds.items()}


def measured(arms: Mapping[str, list[Run]]) -> dict[str, Any]:
    ours = arms[LOSS]
    return {
        "seeds": sorted({run.seed for run in ours}),
        "tokens": ours[0].config.training.tokens,  # type: ignore[union-attr]
        "values": {
            arm: {name: entry(combine(name, [Term(1.0, runs)])) for name in METRICS}
            for arm, runs in arms.items()
        },
        "found_more_than": {
            arm: entry(combine("truth_found", [Term(1.0, ours), Term(-1.0, runs)]))
            for arm, runs in arms.items()
            if arm != LOSS
        },
    }


def text(found: Mapping[str, Any]) -> str:
    """A table for each world, and what came of what was wanted, in words."""
    return "\n\n".join(_world(name, world) for name, world in sorted(found.items()))


def _world(name: str, world: Mapping[str, Any]) -> str:
    rows = [
        [arm, *(_cell(world["values"][arm][metric]) for metric in METRICS)]
        for arm in ROWS
        if arm in world["values"]
    ]
    more = world["found_more_than"]
    clear = [_is_clear(more[arm]) for arm in (CONTROL, TSAE) if arm in more]
    differences = "; ".join(
        f"{arm}: {_cell(more[arm], signed=True)}" for arm in ROWS if arm in more
    )
    said = (
        f"World `{name}`, {len(world['seeds'])} seeds, {world['tokens']:,} tokens. Share of true "
        f"features found with the loss on the first group (lambda 3), less that of each: "
        f"{differences}. At least +{WANTED:g} against its control and T-SAE was wanted, "
        "intervals above 0."
    )
    mark = "" if all(clear) and clear else "**no:** "
    return f"{markdown_table(['', *METRICS.values()], rows)}\n\n{mark}{said}"


def _is_clear(difference: Mapping[str, Any]) -> bool:
    low = difference["low"]
    return difference["value"] >= WANTED and low is not None and low > 0


def _cell(value: Mapping[str, Any], signed: bool = False) -> str:
    return "n/a" if value["value"] is None else with_interval(value, signed=signed)


def main() -> None:
    publish(__doc__, results, text, RESULTS, BLOCK, PAGES)


if __name__ == "__main__":
    main()
