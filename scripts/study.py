"""The answer of the study (docs/results) from its run folders: results, tables, figures, page.

    python scripts/study.py DIR [DIR ...]    compare the runs; write all of docs/results
    python scripts/study.py                  write tables, figures and page from its JSON files

Writes results.json (every comparison), runs.jsonl (a line a run: settings and what was measured),
tables.md (all arms, all measures), the figures, and README.md from page.md.j2. No result is typed
there: `value`, `change` and `matched` look them up in results.json, and the tests hold the page to
it.

Every arm is compared with the baselines of its own architecture and model at its own L0, the
Temporal SAE with the Matryoshka SAE, the persistent SAE with topk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import given_folders, with_interval
from study_figures import FIGURES, write_figures

from tcsae.base.files import read_json
from tcsae.base.labels import markdown_table
from tcsae.base.run_files import RunFiles
from tcsae.report.comparison import compare_runs
from tcsae.report.runs import find_runs

DOCS = Path(__file__).parent.parent / "docs" / "results"
RESULTS, RUNS, SEED = DOCS / "results.json", DOCS / "runs.jsonl", DOCS / "first_attempt.json"
TEMPLATE, PAGE, TABLES = DOCS / "page.md.j2", DOCS / "README.md", DOCS / "tables.md"
MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2", "google/gemma-3-270m": "gemma3"}
BASELINE_OF = {"temporal": "matryoshka", "persistent": "topk"}
"""Comparisons whose baseline has another architecture's name."""
METRICS = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "frac_alive": "live",
    "ce_loss_with_sae": "CE (nats)",
    "C_8": "C_8",
    "rho_1": "rho_1",
    "tau_int": "tau_int (tokens)",
    "omega_squared": "omega²",
    "smoothness": "smoothness",
    "redundant_share": "redundant share",
    "twinned_share": "position twins",
    "ari_halves": "ARI of halves",
}
PRIMARY = ("C_8", "explained_variance", "ce_loss_with_sae", "omega_squared")
SECONDARY = tuple(name for name in METRICS if name not in (*PRIMARY, "l0"))
WORTH = {"C_8": (1, 0.02), "explained_variance": (1, -0.01), "ce_loss_with_sae": (-1, 0.02)}
"""The protocol's "worth it": at least so much, or at most (-1)."""
_FORMS = {
    "none": "baseline",
    "scale_free": "scale-free",
    "shuffled": "scale-free, shuffled (control)",
    "window_variance": "literal",
    "batch_history": "batch history",
    "slow": "slow features",
}


# ------------------------------------------------------------------------------ from the runs


def table_of(config: Mapping[str, Any]) -> str:
    """The comparison that a run belongs to: model.architecture."""
    model = MODELS[config["model"]["name"]]
    untrained = "-untrained" if config["model"]["untrained"] else ""
    architecture = config["sae"]["architecture"]
    shown = {"tsae": "temporal", "matryoshka": "temporal"}.get(architecture, architecture)
    return f"{model}{untrained}.{shown}"


def arm_of(differs: Mapping[str, Any]) -> tuple[str, str]:
    """(key, name) of a group of a comparison."""
    architecture = differs["architecture"]
    form = differs["consistency"].removesuffix(" (first version)")  # all of this study is
    if architecture == "tsae":
        if differs.get("sae.shuffle_positions"):
            return "tsae-control", "Temporal SAE, any other token (control)"
        return "tsae", "Temporal SAE, alpha 0.2"
    if architecture == "persistent":
        k = differs.get("sae.k") or differs["k"]
        return f"persistent-{k}", f"persistent SAE, k {k}"
    if form == "none":
        if target := differs.get("training.target_l0"):
            return f"baseline-{target:g}", f"baseline, steered to L0 {target:g}"
        k = differs.get("sae.k") or differs["k"]
        return f"baseline-{k}", f"baseline, k {k}"
    window = "" if form == "slow" else f", W {differs['window']}"
    key = form if form == "slow" else f"{form}-w{differs['window']}-l{differs['lambda']:g}"
    return key, f"{_FORMS[form]}{window}, lambda {differs['lambda']:g}"


def compared(folders: list[Path], name: str) -> dict[str, Any]:
    """One comparison, with what the page needs of it."""
    architecture = name.split(".")[1]
    baseline = {"sae.architecture": BASELINE_OF.get(architecture, architecture)}
    comparison = compare_runs(folders, baseline)
    if len(comparison.streams) != 1:
        raise SystemExit(f"error: {name}: the runs were measured on different contexts")
    rows = {}
    for group in comparison.groups:
        key, said = arm_of(group["differs"] | group["settings"])
        at = "metrics", "deltas", "density_matched"
        found = {kind: {m: e for m, e in group[kind].items() if m in METRICS} for kind in at}
        rows[key] = {
            "name": said,
            "is_baseline": group["is_baseline"],
            "seeds": group["seeds"],
            "compared_at": group["match"]["words"],
            **found,
            "curve": group["curve"],
        }
    return {"stream": comparison.streams[0], "rows": rows}


def gather(folders: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every comparison by its name, and a line for every run."""
    sorted_runs: dict[str, list[Path]] = {}
    lines = []
    for folder in find_runs(folders):
        files = RunFiles(folder)
        if not files.is_finished:
            print(f"left out, not finished: {folder}")
            continue
        config = read_json(files.config)
        info = read_json(files.final_info)
        info["consistency"] = {
            metric: {k: entry[k] for k in ("energy_weighted", "median", "energy_weighted_interval")}
            for metric, entry in info["consistency"]["metrics"].items()
        }
        table = table_of(config)
        sorted_runs.setdefault(table, []).append(folder)
        lines.append({"sweep": folder.parent.name, "table": table, "config": config, "info": info})
    for name, own in sorted_runs.items():
        if name.endswith(".persistent"):
            own += sorted_runs[name.replace("persistent", "topk")]
    results = {name: compared(own, name) for name, own in sorted(sorted_runs.items())}
    for name, found in results.items():
        if name.endswith(".persistent"):
            found["rows"] = {
                key: row
                for key, row in found["rows"].items()
                if row["is_baseline"] or key.startswith("persistent")
            }
    return results, sorted(lines, key=lambda line: (line["sweep"], line["info"]["unique_id"]))


# ------------------------------------------------------------------------------ in words


def digits(metric: str) -> int:
    return 2 if metric in ("l0", "tau_int") else 3


def shown(
    entry: Mapping[str, Any] | None, metric: str, signed: bool = False, key: str = "value"
) -> str:
    """`+0.012 [+0.010, +0.014]`; n/a where there is none."""
    if entry is None or entry[key] is None:
        return "n/a"
    return with_interval(entry, digits(metric), signed, key)


class Lookup:
    """What page.md.j2 calls."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results

    def row(self, table: str, arm: str) -> dict[str, Any]:
        found: dict[str, Any] = self.results[table]["rows"][arm]
        return found

    def value(self, table: str, arm: str, metric: str) -> str:
        return shown(self.row(table, arm)["metrics"].get(metric), metric)

    def change(self, table: str, arm: str, metric: str) -> str:
        """Minus the baseline at matched L0."""
        return shown(self.row(table, arm)["deltas"].get(metric), metric, signed=True)

    def matched(self, table: str, arm: str, metric: str = "C_8") -> str:
        """Minus the baseline at matched density."""
        entry = self.row(table, arm)["density_matched"].get(metric)
        return shown(entry, metric, signed=True, key="delta")

    def worth_it(self) -> str:
        """The arms that meet the protocol's criteria, in words."""
        found = []
        for table, comparison in self.results.items():
            for row in comparison["rows"].values():
                change = {metric: row["deltas"].get(metric, {}).get("value") for metric in WORTH}
                if None not in change.values() and all(
                    sign * (change[metric] - limit) >= 0 for metric, (sign, limit) in WORTH.items()
                ):
                    found.append(f"{table}: {row['name']}")
        return "; ".join(found) or "none"

    def main_table(self, table: str) -> str:
        """All arms of a comparison with the primary measures and omega²."""
        header = ["", "seeds", "L0", "C_8", "change of C_8", "at matched density",
                  "explained variance", "CE, nats a token", "omega²"]  # fmt: skip
        lines = []
        for arm, row in self.results[table]["rows"].items():
            cells = [row["name"], str(len(row["seeds"]))]
            cells += [f"{row['metrics']['l0']['value']:.1f}", self.value(table, arm, "C_8")]
            if row["is_baseline"]:
                own = [self.value(table, arm, m) for m in PRIMARY[1:]]
                cells += ["", "", *own]
            else:
                changes = [self.change(table, arm, metric) for metric in PRIMARY]
                cells += [changes[0], self.matched(table, arm), *changes[1:]]
            lines.append(cells)
        return markdown_table(header, lines)

    def lower(self, metric: str) -> str:
        """The arms of trained models whose change is below 0, interval and all, in words."""
        found = [
            f"{table.replace('.', ', ')}: {row['name']} ({self.change(table, arm, metric)})"
            for table, comparison in self.results.items()
            for arm, row in comparison["rows"].items()
            if "untrained" not in table and (row["deltas"].get(metric, {}).get("high") or 0) < 0
        ]
        return "; ".join(found) or "none"

    def order_table(self) -> str:
        """The loss at lambda 1 beside its control, of every comparison that has both."""
        lines = []
        for table, comparison in self.results.items():
            arms = [comparison["rows"].get(f"{form}-w8-l1") for form in ("scale_free", "shuffled")]
            if None in arms:
                continue
            loss, control = (arm["deltas"]["C_8"] for arm in arms)
            apart = "more" if loss["low"] > control["high"] else "not told apart"
            apart = "less" if loss["high"] < control["low"] else apart
            cells = (shown(entry, "C_8", signed=True) for entry in (loss, control))
            lines.append([table.replace(".", ", "), *cells, apart])
        return markdown_table(["", "the loss", "its control", "the loss gains"], lines)

    def all_measures(self, table: str) -> str:
        header = ["", "seeds", *METRICS.values(), "compared at"]
        lines = [
            [row["name"], str(len(row["seeds"])),
             *(self.value(table, arm, metric) for metric in METRICS), row["compared_at"]]
            for arm, row in self.results[table]["rows"].items()
        ]  # fmt: skip
        return markdown_table(header, lines)

    def secondary_changes(self, table: str) -> str:
        lines = [
            [row["name"], *(self.change(table, arm, metric) for metric in SECONDARY)]
            for arm, row in self.results[table]["rows"].items()
            if not row["is_baseline"]
        ]
        return markdown_table(["", *(METRICS[metric] for metric in SECONDARY)], lines)


def rendered(template: Path, results: Mapping[str, Any], runs: list[dict[str, Any]]) -> str:
    """page.md.j2 or sentence.md.j2 with what it looks up."""
    from jinja2 import Environment, StrictUndefined

    look = Lookup(results)
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        value=look.value,
        change=look.change,
        matched=look.matched,
        main_table=look.main_table,
        order_table=look.order_table,
        lower=look.lower,
        worth_it=look.worth_it(),
        results=results,
        n_runs=len(runs),
        hours=f"{hours(runs):.1f}",
        first=json.loads(SEED.read_text(encoding="utf-8")),
    )


def hours(runs: list[dict[str, Any]]) -> float:
    """What the sweeps took, one after another: runs of a sweep share a bank, and each counts from
    the bank's beginning."""
    longest: dict[str, float] = {}
    for run in runs:
        longest[run["sweep"]] = max(longest.get(run["sweep"], 0), run["info"]["wall_seconds"])
    return sum(longest.values()) / 3600


def tables(results: Mapping[str, Any]) -> str:
    look = Lookup(results)
    parts = [
        "# All arms, all measures",
        "Means over features weighted by their variance; 95 % intervals over held-out contexts and "
        "seeds. Changes are minus the baseline of the same architecture at the arm's L0, paired; "
        "at matched density the intervals are over features. n/a: not measured for that arm (the "
        "analysis was made for the main arms), or no baseline at that L0. Written by "
        "scripts/study.py; the answer is in [README.md](README.md).",
    ]
    for name in results:
        model, architecture = name.split(".")
        parts += [f"## {model}, {architecture}", look.all_measures(name)]
        parts += ["Changes of the primary measures:", look.main_table(name)]
        if (changes := look.secondary_changes(name)).count("\n") > 1:
            parts += ["Changes of the secondary measures:", changes]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    folders = given_folders(__doc__)
    if folders:
        results, runs = gather(folders)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        text = "".join(json.dumps(run) + "\n" for run in runs)
        RUNS.write_text(text, encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    runs = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
    TABLES.write_text(tables(results), encoding="utf-8")
    write_figures(results, DOCS)
    PAGE.write_text(rendered(TEMPLATE, results, runs), encoding="utf-8")
    print(f"{len(runs)} runs, {len(results)} comparisons: {PAGE}, {', '.join(FIGURES)}")


if __name__ == "__main__":
    main()
