"""The table of docs/prior_art.md from the runs of +experiment=prior_art.

    python scripts/prior_art.py DIR [DIR ...]    compare, and write docs/prior_art.json and the page
    python scripts/prior_art.py                  write the page from docs/prior_art.json

Everything is compared with the Matryoshka SAE without temporal loss: differences at its L0, with
paired 95 % intervals over held-out contexts and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import block, given_folders, replace_block, with_interval

from tcsae.base.labels import markdown_table
from tcsae.report.comparison import compare_runs

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RESULTS = DOCS / "prior_art.md", DOCS / "prior_art.json"
BASELINE = {"sae.architecture": "matryoshka"}
COLUMNS = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "frac_alive": "live",
    "C_8": "C_8",
    "rho_1": "rho_1",
    "tau_int": "tau_int (tokens)",
    "omega_squared": "omega²",
    "smoothness": "smoothness",
}
CHANGES = ("explained_variance", "ce_loss_score", "C_8", "rho_1", "omega_squared", "smoothness")
NAMES = {**COLUMNS, "ce_loss_score": "CE loss score"}


def name_of(differs: Mapping[str, Any]) -> str:
    """A row's name in words."""
    if differs["sae.architecture"] == "matryoshka":
        form = differs["consistency"]
        if form == "none":
            return "Matryoshka, no temporal loss"
        window = f", W {differs['window']}" if form != "slow" else ""
        return f"Matryoshka, {form}{window}, lambda {differs['lambda']:g}"
    loss = {
        "cosine": "cosine",
        "inner_product": "inner product",
        "squared_difference": "no contrast (squared difference)",
    }[differs["sae.pair_loss"]]
    partner = "any other token" if differs["sae.shuffle_positions"] else differs["sae.pairs"]
    name = f"T-SAE, {loss}, {partner}, alpha {differs['sae.pair_coefficient']:g}"
    return f"{name} (control)" if differs["sae.shuffle_positions"] else name


def results(folders: list[Path]) -> dict[str, Any]:
    """What the page shows, and nothing else."""
    comparison = compare_runs(folders, BASELINE)
    rows = []
    for group in comparison.groups:
        kept = {name: group["metrics"][name] for name in COLUMNS}
        changes = {name: group["deltas"][name] for name in CHANGES if group["deltas"]}
        rows.append(
            {
                "name": name_of(group["differs"]),
                "is_baseline": group["is_baseline"],
                "seeds": group["seeds"],
                "tokens": group["settings"]["tokens"],
                "metrics": kept,
                "deltas": changes,
            }
        )
    return {"stream": comparison.streams[0], "rows": rows}


def tables(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    values = [[row["name"], *(with_interval(row["metrics"][n]) for n in COLUMNS)] for row in rows]
    changes = []
    for row in rows:
        if not row["is_baseline"]:
            entries = [row["deltas"][name] for name in CHANGES]
            noise = ["~ " if e["within_noise"] else "" for e in entries]
            shown = [n + with_interval(e, signed=True) for n, e in zip(noise, entries, strict=True)]
            changes.append([row["name"], *shown])
    return "\n\n".join(
        [
            markdown_table(["", *COLUMNS.values()], values),
            "Minus the Matryoshka SAE without temporal loss (~: the interval holds 0):",
            markdown_table(["", *(NAMES[name] for name in CHANGES)], changes),
        ]
    )


def main() -> None:
    folders = given_folders(__doc__)
    if folders:
        RESULTS.write_text(json.dumps(results(folders), indent=1) + "\n", encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    replace_block(PAGE, block("prior art", tables(found)))
    print(tables(found))


if __name__ == "__main__":
    main()
