"""README's and docs/effect.md's second table: the loss on the first group beside the Temporal SAE.

    python scripts/effect_groups.py DIR      read the sweep of +experiment=effect_first_group, write
                                             docs/effect_groups.json and the pages
    python scripts/effect_groups.py          write the pages from docs/effect_groups.json

Every row is a dictionary of the same two groups at the same L0. The loss is compared with the
Temporal SAE at that one's explained variance, between the weights of lambda around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import effect
from effect import ROOT, at_cost, difference, entry, grouped
from pages import publish, with_interval

from tcsae.base.labels import markdown_table
from tcsae.report.paired import Term, combine
from tcsae.report.runs import Run, settings_of

RESULTS = ROOT / "docs" / "effect_groups.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "effect.md")
BLOCK = "effect groups"
NONE, TSAE = "none", "T-SAE"
LOSSES = ("first group, lambda 1", "first group, lambda 3")
ROWS = (
    NONE,
    "all features, lambda 1",
    *LOSSES,
    "first group, lambda 3, control",
    TSAE,
    "T-SAE, control",
    "T-SAE, authors' loss",
    "T-SAE, authors' loss, 8192 pairs, same-document negatives",
)
METRICS = {
    name: effect.METRICS[name]
    for name in (
        *("explained_variance", "l0", "frac_alive", "C_8", "L_8", "L_8_sparse"),
        *("omega_squared", "edge_energy"),
    )
} | {"smoothness_first_group": "smoothness, first group"}
WANTED_TIMES = 1.3
"""L_8 of sparse features against the Temporal SAE's, at its explained variance."""


def arm_of(run: Run) -> str:
    """The row of a run, as `ROWS` has it."""
    settings = settings_of(run.config)
    if settings["sae.architecture"] == "tsae":
        if settings["sae.pair_loss"] == "cosine":
            return "T-SAE, control" if settings["sae.shuffle_positions"] else TSAE
        many = settings.get("sae.same_document_negatives")
        return ROWS[-1] if many else ROWS[-2]
    if settings["lambda"] == 0:
        return NONE
    # The groups are a label of the form, as pages show it.
    features = "first group" if "first group" in settings["consistency"] else "all features"
    control = ", control" if "shuffled" in settings["consistency"] else ""
    return f"{features}, lambda {settings['lambda']:g}{control}"


def results(folders: Sequence[Path]) -> dict[str, Any]:
    """Every row's metrics, and the loss at the Temporal SAE's explained variance."""
    return measured({arm: runs for (arm,), runs in grouped(folders, arm_of).items()})


def measured(arms: Mapping[str, list[Run]]) -> dict[str, Any]:
    none, theirs = arms[NONE], arms[TSAE]
    price = combine("explained_variance", [Term(1.0, none), Term(-1.0, theirs)]).value
    assert price is not None
    there, where = at_cost(arms, LOSSES, float(price))
    ours = [Term(weight, runs) for weight, runs in there]
    return {
        "seeds": sorted({run.seed for run in none}),
        "tokens": none[0].config.training.tokens,  # type: ignore[union-attr]
        "values": {
            arm: {name: entry(combine(name, [Term(1.0, runs)])) for name in METRICS}
            for arm, runs in arms.items()
        },
        "at_their_price": {
            "price": float(price),
            "where": where,
            "L_8_sparse": {
                "ours": entry(combine("L_8_sparse", ours)),
                "theirs": entry(combine("L_8_sparse", [Term(1.0, theirs)])),
                "difference": difference("L_8_sparse", there, theirs),
            },
            "omega_squared": difference("omega_squared", there, none),
        },
    }


def text(found: Mapping[str, Any]) -> str:
    """The table, and what came of what was wanted, in words."""
    rows = [
        [arm, *(with_interval(found["values"][arm][name]) for name in METRICS)]
        for arm in ROWS
        if arm in found["values"]
    ]
    there = found["at_their_price"]
    ours, theirs = (there["L_8_sparse"][who]["value"] for who in ("ours", "theirs"))
    times, omega = ours / theirs, there["omega_squared"]
    holds = times >= WANTED_TIMES and (omega["low"] or 0) <= 0
    words = (
        f"At the Temporal SAE's explained variance ({there['price']:.4f} below no loss; "
        f"{there['where']}) the loss on the first group has L_8 of sparse features {ours:.3f}, "
        f"theirs {theirs:.3f}: {times:.1f} x ({WANTED_TIMES} wanted), a difference of "
        f"{with_interval(there['L_8_sparse']['difference'], signed=True)}; omega² against no loss "
        f"{with_interval(omega, 4, signed=True)}."
    )
    seeds = len(found["seeds"])
    return (
        f"{markdown_table(['', *METRICS.values()], rows)}\n\n{'' if holds else '**no:** '}{words} "
        f"{seeds} seeds, {found['tokens']:,} tokens, groups of .2 and .8, k 20."
    )


def main() -> None:
    publish(__doc__, results, text, RESULTS, BLOCK, PAGES)


if __name__ == "__main__":
    main()
