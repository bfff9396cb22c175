"""What the loss on the first group finds of features that are known, beside the rest: the map of
docs/meaning.md, a row a world, and docs/synthetic.md with all tables.

    python scripts/synthetic.py DIR ...   read sweeps of +experiment=synthetic_first_group and
                                          synthetic_study into docs/synthetic.json, write the pages
    python scripts/synthetic.py           write the pages from docs/synthetic.json

A study is one world at one length of training, width and selection; what is given replaces what the
JSON had of it. A setting is a row. Intervals are over seeds: the error of other held-out documents
is far below that of another start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effect import ROOT, entry, grouped
from pages import block, given_folders, processor, replace_block, with_interval

from tcsae.base.labels import label, markdown_table
from tcsae.report.paired import Term, combine
from tcsae.report.runs import AVERAGED, Run, settings_of

RESULTS = ROOT / "docs" / "synthetic.json"
MAP, PAGE = ROOT / "docs" / "meaning.md", ROOT / "docs" / "synthetic.md"
NONE, TSAE, BATCHTOPK = "matryoshka, none", "T-SAE", "batchtopk, none"
OTHERS = (TSAE, "T-SAE, control", "topk, none", BATCHTOPK)
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
CONTRASTS = (
    *("explained_variance", "truth_mcc", "truth_found", "truth_found_slow"),
    *("truth_f1_slow", "truth_recall_with_child"),
)
WANTED = 0.1
"""More of the true features found than by the control and by the Temporal SAE."""
_NOTHING = {"value": None, "low": None, "high": None}
_LOSS = re.compile(r"first group, lambda ([0-9.]+)(, control)?")


def arm_of(run: Run) -> str:
    """The row of a run."""
    settings = settings_of(run.config)
    architecture = settings["sae.architecture"]
    if architecture == "tsae":
        return "T-SAE, control" if settings["sae.shuffle_positions"] else TSAE
    if settings["consistency"] == AVERAGED:
        return f"{architecture}, averaged"
    if settings["lambda"] == 0:
        return f"{architecture}, none"
    features = "first group" if "first group" in settings["consistency"] else "all features"
    control = ", control" if "shuffled" in settings["consistency"] else ""
    return f"{features}, lambda {settings['lambda']:g}{control}"


def study_of(run: Run) -> str:
    """World, training and width: what the rows of a table share."""
    world = run.config.model.world
    training = getattr(run.config, "training", None)
    name = "a language model" if world is None else f"`{world.name}`"
    assert training is not None
    return (
        f"{name}, {training.tokens:,} tokens of {training.batch_contexts} contexts a step, "
        f"learning rate {training.lr:g}, {run.config.sae.d_sae:,} features"
    )


def order(arm: str) -> tuple[int, float, bool]:
    """No loss first, then the loss by lambda, each with its control, then the others."""
    if (loss := _LOSS.fullmatch(arm)) is not None:
        return 1, float(loss[1]), loss[2] is not None
    return (0, 0.0, False) if arm == NONE else (2, float(_place(arm)), False)


def _place(arm: str) -> int:
    return OTHERS.index(arm) if arm in OTHERS else len(OTHERS)


def results(folders: Sequence[Path]) -> dict[str, Any]:
    """Every study's rows; those of the JSON that no folder is of stay."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    studies: dict[str, dict[str, list[Run]]] = {}
    for (study, arm), runs in grouped(folders, study_of, arm_of).items():
        studies.setdefault(study, {})[arm] = runs
    return found | {study: measured(arms) for study, arms in studies.items()}


def loss_of(arms: Mapping[str, Any]) -> str:
    """The row that the others are compared with: the largest lambda that has a control."""
    return max((arm for arm in arms if f"{arm}, control" in arms and arm != TSAE), key=order)


def measured(arms: Mapping[str, list[Run]]) -> dict[str, Any]:
    loss = loss_of(arms)
    classes = sorted(
        name
        for name in arms[loss][0].values
        if re.fullmatch("truth_found_.*", name) and not name.endswith("_slow")
    )
    return {
        "loss": loss,
        "selection": getattr(arms[loss][0].config.sae, "selection", "batch"),
        "seeds": {arm: [run.seed for run in runs] for arm, runs in arms.items()},
        "on": processor(),
        "values": {
            arm: {name: entry(combine(name, [Term(1.0, runs)])) for name in METRICS}
            for arm, runs in arms.items()
        },
        "loss_minus": {
            arm: {name: _less(name, arms[loss], runs) for name in CONTRASTS}
            for arm, runs in arms.items()
            if arm != loss
        },
        "found_by_class": {
            arm: {name: _less(name, runs, arms[NONE]) for name in classes}
            for arm, runs in arms.items()
            if _LOSS.fullmatch(arm) and NONE in arms
        },
    }


def _less(name: str, ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    """The difference over the seeds that both have."""
    seeds = {run.seed for run in ours} & {run.seed for run in theirs}
    terms = [
        Term(weight, [run for run in runs if run.seed in seeds])
        for weight, runs in ((1.0, ours), (-1.0, theirs))
    ]
    return entry(combine(name, terms))


def the_map(found: Mapping[str, Any]) -> str:
    """A row a study: what the loss finds more than none, its control and the Temporal SAE do, and
    how much longer a parent's feature fires beside a child."""
    heads = ["world", "tokens", "features", "seeds", "found, no loss", "found, loss"]
    heads += ["less no loss", "less its control", "less T-SAE", "recall with a child, less control"]
    rows = [_map_row(name, found[name]) for name in sorted(found, key=_by_size)]
    return markdown_table(heads, rows)


def _by_size(study: str) -> tuple[bool, str]:
    return "_256`" not in study and "_256_" not in study, study


def _map_row(name: str, study: Mapping[str, Any]) -> list[str]:
    world, tokens, *_, features = re.split(r", (?=\D|\d[\d,]* (?:tokens|features))", name)
    loss, less = study["loss"], study["loss_minus"]
    control = f"{loss}, control"
    cells = [study["values"][arm]["truth_found"] for arm in (NONE, loss)]
    minus = [less.get(arm, {}).get("truth_found", _NOTHING) for arm in (NONE, control, TSAE)]
    minus.append(less.get(control, {}).get("truth_recall_with_child", _NOTHING))
    seeds = len(study["seeds"][loss])
    return [
        *(world, tokens.split()[0], features.split()[0], str(seeds)),
        *(f"{cell['value']:.2f}" for cell in cells),
        *(_cell(value, signed=True, digits=2) for value in minus),
    ]


def text(found: Mapping[str, Any]) -> str:
    """For each study its table, the differences, and what came of what was wanted, in words."""
    return "\n\n".join(_study(name, study) for name, study in sorted(found.items()))


def _study(name: str, study: Mapping[str, Any]) -> str:
    arms, loss = sorted(study["values"], key=order), study["loss"]
    rows = [[arm, *(_cell(study["values"][arm][m]) for m in METRICS)] for arm in arms]
    seeds = sorted({len(seeds) for seeds in study["seeds"].values()})
    many = " to ".join(map(str, (seeds[0], seeds[-1])[: len(seeds)]))
    minus = [
        [f"minus {arm}", *(_cell(study["loss_minus"][arm][m], signed=True) for m in CONTRASTS)]
        for arm in arms
        if arm in study["loss_minus"] and (arm == f"{loss}, control" or not _LOSS.fullmatch(arm))
    ]
    said = [
        f"**{name}**; {many} seed{'s' * (seeds[-1] > 1)} a row; "
        f"groups select by {study['selection']}; on {study['on']}.",
        markdown_table(["", *METRICS.values()], rows),
        f"{loss[0].upper()}{loss[1:]}, less each of the others:",
        markdown_table(["", *(METRICS[m] for m in CONTRASTS)], minus),
    ]
    return "\n\n".join([*said, *_map(study), _verdict(study)])


def _map(study: Mapping[str, Any]) -> list[str]:
    """Where the loss helps and harms: found by class, less than without it."""
    by_class = study["found_by_class"]
    if not by_class:
        return []
    classes = sorted(next(iter(by_class.values())))
    rows = [
        [arm, *(_cell(by_class[arm][name], signed=True) for name in classes)]
        for arm in sorted(by_class, key=order)
    ]
    heads = [name.removeprefix("truth_found_") for name in classes]
    return [
        "Found by class of feature, less than without a loss:",
        markdown_table(["", *heads], rows),
    ]


def _verdict(study: Mapping[str, Any]) -> str:
    compared = (f"{study['loss']}, control", TSAE)
    more = {
        arm: study["loss_minus"][arm]["truth_found"]
        for arm in compared
        if arm in study["loss_minus"]
    }
    clear = all(map(_is_clear, more.values()))
    said = "; ".join(f"{arm} {_cell(value, signed=True)}" for arm, value in more.items())
    return (
        f"{'' if clear else '**no:** '}Found by {study['loss']}, less that of {said}: at least "
        f"+{WANTED:g} was wanted, intervals above 0."
    )


def _is_clear(difference: Mapping[str, Any]) -> bool:
    low = difference["low"]
    return difference["value"] >= WANTED and low is not None and low > 0


def _cell(value: Mapping[str, Any], signed: bool = False, digits: int = 3) -> str:
    return "n/a" if value["value"] is None else with_interval(value, digits, signed)


def main() -> None:
    folders = given_folders(__doc__)
    found = results(folders) if folders else json.loads(RESULTS.read_text(encoding="utf-8"))
    if folders:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    replace_block(MAP, block("synthetic map", the_map(found)))
    replace_block(PAGE, block("synthetic", text(found)))
    print(the_map(found))


if __name__ == "__main__":
    main()
