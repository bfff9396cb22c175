"""README's "Does it work?" and docs/effect.md, from the runs of +experiment=effect.

    python scripts/effect.py DIR [DIR ...]    read the sweeps, write docs/effect.json and the pages
                                              (all sweeps of a column together, windows among them)
    python scripts/effect.py                  write the pages from docs/effect.json

A sweep of one model and architecture is a column; what is given replaces what the JSON had of
its column. Differences are at the same L0 (k, or steered), with 95 % intervals over held-out
contexts, paired, and seeds (tcsae/report/paired.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pages import block, given_folders, replace_block, with_interval

from tcsae.base.labels import markdown_table
from tcsae.base.run_files import RunFiles
from tcsae.report.paired import Estimate, Term, combine
from tcsae.report.runs import Run, find_runs, read_run, settings_of

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, README = ROOT / "docs/effect.json", ROOT / "docs/effect.md", ROOT / "README.md"
METRICS = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "frac_alive": "live",
    "C_8": "C_8",
    "L_8": "L_8",
    "D_8": "D_8",
    "C_8_sparse": "C_8, sparse features",
    "L_8_sparse": "L_8, sparse features",
    "omega_squared": "omega²",
    "edge_energy": "edge energy",
}


class Wanted(NamedTuple):
    """What issue and README ask of a column."""

    title: str
    cost: float
    """Of explained variance, at which consistency is compared."""
    consistency: str
    times: float
    """At least so often the baseline's; 0: higher, intervals apart."""
    sparse_times: float
    at_lambda_1: float
    """Largest cost of explained variance at lambda 1."""
    omega_below: bool


COLUMNS = {
    "smollm2.topk": Wanted("SmolLM2, TopK", 0.01, "C_8", 2, 2, 0.01, True),
    "smollm2.batchtopk": Wanted("BatchTopK", 0.01, "C_8", 2.5, 2, 0.012, True),
    "smollm2.jumprelu": Wanted("JumpReLU", 0.01, "C_8", 2.5, 2, 0.014, True),
    "smollm2.standard": Wanted("standard (L1)", 0.01, "C_8", 1.7, 0, 0.005, False),
    "gemma-3-270m.topk": Wanted("Gemma 3 270M, TopK", 0.025, "L_8", 3, 2, 0.025, False),
}
EDGE_TOLERANCE = 0.15


# ------------------------------------------------------------------------------ from the runs


def column_of(run: Run) -> str:
    name = run.config.model.name.split("/")[-1].lower()
    return f"{name.split('-135m')[0]}.{run.config.sae.architecture}"


def arm_of(run: Run) -> str:
    """none; loss, control or first version, with lambda, and with the window if it is not 8."""
    settings = settings_of(run.config)
    form, weight = settings["consistency"], settings["lambda"]
    names = {"shuffled": "control", "scale_free (first version)": "first version"}
    if form == "none":
        return form
    window = "" if settings["window"] == 8 else f", window {settings['window']}"
    return f"{names.get(form, 'loss')}, lambda {weight:g}{window}"


def entry(estimate: Estimate) -> dict[str, Any]:
    numbers = (None if x is None else float(x) for x in estimate[:3])
    return dict(zip(("value", "low", "high"), numbers, strict=True)) | {"reason": estimate.reason}


def difference(name: str, ours: Sequence[tuple[float, Any]], theirs: Sequence[Run]) -> Any:
    terms = [Term(weight, runs) for weight, runs in ours]
    return entry(combine(name, [*terms, Term(-1.0, theirs)]))


def at_cost(
    arms: Mapping[str, list[Run]], losses: Sequence[str], cost: float
) -> tuple[list[tuple[float, list[Run]]], str]:
    """The two arms, with weights, between which the explained variance has fallen by `cost` below
    that of "none". `losses` are the arms to look between, from the weakest on."""
    points = [("none", 0.0)]
    for name in losses:
        terms = [Term(1.0, arms[name]), Term(-1.0, arms["none"])]
        change = combine("explained_variance", terms).value
        assert change is not None
        points.append((name, -float(change)))
    if cost <= 0:
        return [(1.0, arms["none"])], "none, which costs nothing"
    for (below, less), (above, more) in zip(points, points[1:], strict=False):
        if less <= cost <= more:
            share = (cost - less) / (more - less)
            between = f"between {below} and {above}"
            return [(1 - share, arms[below]), (share, arms[above])], between
    last, most = points[-1]
    return [(1.0, arms[last])], f"{last}, which costs {most:.4f}"


def _losses(arms: Mapping[str, list[Run]]) -> list[str]:
    """The arms of the loss at the usual window, by lambda."""
    names = [name for name in arms if name.startswith("loss") and "window" not in name]
    return sorted(names, key=lambda name: float(name.split("lambda ")[1]))


def measured(arms: Mapping[str, list[Run]], wanted: Wanted) -> dict[str, Any]:
    """What the pages show of one column."""
    none = arms["none"]
    there, where = at_cost(arms, _losses(arms), wanted.cost)
    one, control = arms["loss, lambda 1"], arms["control, lambda 1"]
    checked = ("C_8", "L_8", "C_8_sparse", "L_8_sparse")
    return {
        "title": wanted.title,
        "seeds": sorted({run.seed for run in none}),
        "place": none[0].place,
        "tokens": none[0].config.training.tokens,  # type: ignore[union-attr]
        "lr": none[0].config.training.lr,  # type: ignore[union-attr]
        "values": {
            arm: {name: entry(combine(name, [Term(1.0, runs)])) for name in METRICS}
            for arm, runs in arms.items()
        },
        "spread": {
            arm: {"median": runs[0].medians["C_8"], "q99": runs[0].top["C_8"]}
            for arm, runs in arms.items()
        },
        "at_cost": {
            "where": where,
            **{
                name: {
                    "baseline": entry(combine(name, [Term(1.0, none)])),
                    "there": entry(combine(name, [Term(w, runs) for w, runs in there])),
                    "change": difference(name, there, none),
                }
                for name in checked
            },
        },
        "at_lambda_1": {
            name: difference(name, [(1.0, one)], none)
            for name in ("explained_variance", "omega_squared", "edge_energy", *checked)
        },
        "minus_control": {name: difference(name, [(1.0, one)], control) for name in checked},
    }


def grouped(
    folders: Sequence[Path], *keys: Callable[[Run], str]
) -> dict[tuple[str, ...], list[Run]]:
    """The finished runs below the folders by what `keys` say of them, each group by seed."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for folder in find_runs(folders):
        if RunFiles(folder).is_finished:
            run = read_run(folder)
            found.setdefault(tuple(key(run) for key in keys), []).append(run)
    for runs in found.values():
        runs.sort(key=lambda run: run.seed or 0)
    return found


def results(folders: Sequence[Path]) -> dict[str, Any]:
    columns: dict[str, dict[str, list[Run]]] = {}
    for (column, arm), runs in grouped(folders, column_of, arm_of).items():
        columns.setdefault(column, {})[arm] = runs
    return {name: measured(arms, COLUMNS[name]) for name, arms in columns.items()}


# ---------------------------------------------------------------------------------- in words


def _mark(holds: bool, text: str) -> str:
    return text if holds else f"**no:** {text}"


def _times(entry: Mapping[str, Any], times: float) -> str:
    before, after = entry["baseline"]["value"], entry["there"]["value"]
    text = f"{before:.3f} → {after:.3f}, {after / before:.1f} x"
    holds = after >= times * before if times else entry["change"]["low"] > 0
    return _mark(holds, text)


def checks(found: Mapping[str, Any]) -> list[list[str]]:
    """The table of what was asked, a row a question; `no:` where it does not hold."""
    rows: list[list[str]] = []
    columns = {name: (found[name], COLUMNS[name]) for name in COLUMNS if name in found}

    def row(question: str, answer: Any) -> None:
        rows.append([question, *(answer(*pair) for pair in columns.values())])

    row(
        "consistency at .01 less explained variance (Gemma: L_8 at .025)",
        lambda f, w: _times(f["at_cost"][w.consistency], w.times),
    )
    row(
        "C_8 of sparse features (on at < 10 % of tokens), there",
        lambda f, w: _times(f["at_cost"]["C_8_sparse"], w.sparse_times),
    )
    row(
        "explained variance at lambda 1",
        lambda f, w: _mark(
            f["at_lambda_1"]["explained_variance"]["value"] >= -w.at_lambda_1,
            with_interval(f["at_lambda_1"]["explained_variance"], 4, signed=True),
        ),
    )
    row("omega² at lambda 1", _omega)
    row("edge energy (positions 1 to 7 over the rest) at lambda 1", _edges)
    row(
        "L_8 minus the shuffled control's, lambda 1",
        lambda f, w: _mark(
            (f["minus_control"]["L_8"]["low"] or 0) > 0,
            with_interval(f["minus_control"]["L_8"], signed=True),
        ),
    )
    return rows


def _omega(found: Mapping[str, Any], wanted: Wanted) -> str:
    change = found["at_lambda_1"]["omega_squared"]
    holds = change["value"] < 0 if wanted.omega_below else (change["low"] or 0) <= 0
    return _mark(holds, with_interval(change, 4, signed=True))


def _edges(found: Mapping[str, Any], wanted: Wanted) -> str:
    before, after = (
        found["values"][arm]["edge_energy"]["value"] for arm in ("none", "loss, lambda 1")
    )
    return _mark(abs(after / before - 1) <= EDGE_TOLERANCE, f"{before:.2f} → {after:.2f}")


def summary(found: Mapping[str, Any]) -> str:
    """For the README."""
    shown = [found[name] for name in COLUMNS if name in found]
    missing = [COLUMNS[name].title for name in COLUMNS if name not in found]
    table = markdown_table(["", *(column["title"] for column in shown)], checks(found))
    seeds = sorted({len(column["seeds"]) for column in shown})
    words = [
        f"{' or '.join(map(str, seeds))} seeds, held-out text, the same L0 with and without; "
        "brackets are 95 % intervals over held-out contexts and seeds; **no:** marks what did not "
        "come out as we wanted.",
        *(f"In {c['title']} the gain sits in few features: {_spread(c)}." for c in shown[:1]),
    ]
    if missing:
        words.append(f"Not run yet: {', '.join(missing)}.")
    return f"{table}\n\n{' '.join(words)}"


def _spread(column: Mapping[str, Any]) -> str:
    before, after = (column["spread"][arm] for arm in ("none", "loss, lambda 1"))
    return (
        f"the 99th percentile of C_8 goes from {before['q99']:.2f} to {after['q99']:.2f}, the "
        f"median from {before['median']:.3f} to {after['median']:.3f} (lambda 1, seed 0)"
    )


def page(found: Mapping[str, Any]) -> str:
    """For docs/effect.md: every arm of every column."""
    parts = []
    for name in COLUMNS:
        if name not in found:
            continue
        column = found[name]
        rows = [
            [arm, *(with_interval(values[metric]) for metric in METRICS)]
            for arm, values in sorted(column["values"].items(), key=_order)
        ]
        parts += [
            f"## {column['title']}",
            f"{column['tokens']:,} tokens at learning rate {column['lr']:g}, seeds "
            f"{', '.join(map(str, column['seeds']))}; {column['place']['n_contexts']} held-out "
            f"contexts. The price of .01 (Gemma .025) is paid {column['at_cost']['where']}. "
            f"C_8 by feature: {_spread(column)}.",
            markdown_table(["", *METRICS.values()], rows),
        ]
    return "\n\n".join(parts)


def _order(arm_and_values: tuple[str, Any]) -> tuple[bool, str, float, float]:
    """No loss first, then by kind, lambda and window."""
    arm = arm_and_values[0]
    kind, _, rest = arm.partition(", lambda ")
    weight, _, window = rest.partition(", window ")
    return arm != "none", kind, float(weight or 0), float(window or 8)


def main() -> None:
    folders = given_folders(__doc__)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if folders:
        found |= results(folders)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    replace_block(README, block("effect", summary(found)))
    replace_block(PAGE, block("effect", f"{summary(found)}\n\n{page(found)}"))
    print(summary(found))


if __name__ == "__main__":
    main()
