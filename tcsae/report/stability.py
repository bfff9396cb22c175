"""Seed stability of every setting of a comparison: `Comparison.groups[..]["stability"]`.

reason        why there is none, else null: "stability needs two seeds: ...", "... not trained here"
seeds         how many were matched
matching      "Hungarian" or "mutual nearest neighbours" (tcsae.metrics.stability)
n_live        mean number of live features
mcc, shared   mean over pairs of seeds of the mean matched cosine, and of the share above .7
mcc_low, mcc_high   of the pairs, the least and the largest
random        the mcc of random dictionaries of as many features
pw_mcc        Song et al.'s, over whole dictionaries; null where matching was not Hungarian
median        over live features, of the mean cosine with their matches in the other seeds
consistent    {C_W, L_W: rank correlation of a feature's stability with its own consistency, see
              `rank_correlation`}
by_stability  {edges [n + 1], share [n]: of the live features, C [n]: median C_W there, or null}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tcsae.base.json_numbers import plain
from tcsae.base.labels import interval_text, label, listed, number
from tcsae.base.run_files import RunFiles
from tcsae.metrics.stability import SHARED_COSINE, Stability, rank_correlation, stability
from tcsae.metrics.suite_rows import seen_contexts
from tcsae.report.groups import Group
from tcsae.report.paired import LEVEL
from tcsae.report.runs import Run
from tcsae.runs.folder import load_sae

EDGES = tuple(i / 10 for i in range(11))
"""Of the bins of stability."""
NEEDS_SEEDS = (
    "stability needs two seeds: train the setting again with another one (seed=0,1) and "
    "compare both"
)
_WIDTHS = "the seeds have dictionaries of different shapes"

Entry = dict[str, Any]


def stability_of(group: Group, names: Sequence[str]) -> tuple[Entry, dict[str, Tensor]]:
    """The entry of a setting, and the stability of the features [F] of each seed, by
    "group<id>.seed<seed>".

    Args:
        group: with its runs.
        names: columns of features whose rank correlation with stability is wanted (C_W, L_W).
    """
    if group.is_loaded:
        return {"reason": "it was not trained here: its other seeds are not known"}, {}
    if len(group.runs) < 2:
        return {"reason": NEEDS_SEEDS}, {}
    live = [run.features["density"] > 0 for run in group.runs]
    if not all(bool(alive.any()) for alive in live):
        return {"reason": "a seed has no live feature"}, {}
    decoders = [load_sae(RunFiles(run.folder).path).W_dec.detach() for run in group.runs]
    if len({w.shape for w in decoders}) > 1:
        return {"reason": _WIDTHS}, {}
    found = stability(decoders, live)
    of_seed = {
        f"group{group.id}.seed{run.seed}": x.float()
        for run, x in zip(group.runs, found.features, strict=True)
    }
    return _entry(found, group.runs, names), of_seed


def _entry(found: Stability, runs: Sequence[Run], names: Sequence[str]) -> Entry:
    values = torch.cat(found.features)
    known = values[values.isfinite()]
    return {
        "reason": None,
        "seeds": len(runs),
        "matching": found.matching,
        "n_live": len(known) / len(runs),
        "mcc": sum(found.mcc) / len(found.mcc),
        "mcc_low": min(found.mcc),
        "mcc_high": max(found.mcc),
        "shared": sum(found.shared) / len(found.shared),
        "random": found.random,
        "pw_mcc": found.pw_mcc,
        "median": float(known.median()),
        "consistent": {name: _with_consistency(found, runs, name) for name in names},
        "by_stability": _by_stability(values, runs, names[0] if names else None),
    }


def _with_consistency(found: Stability, runs: Sequence[Run], name: str) -> Entry:
    seeds = []
    for run, stable_F in zip(runs, found.features, strict=True):
        if name not in run.features:
            return {"value": None, "reason": "not measured"}
        seen_F = _seen(run)
        y_F = run.features[name].where(seen_F, torch.nan)
        seeds.append({"x": stable_F, "y": y_F, "density": run.features["density"]})
    return plain(rank_correlation(seeds, found.family, LEVEL))


def _seen(run: Run) -> Tensor:
    """[F] bool, features on in enough contexts to have a consistency of their own."""
    return run.features["contexts_on"] >= seen_contexts(run.place["n_contexts"])


def _by_stability(values: Tensor, runs: Sequence[Run], name: str | None) -> Entry:
    """Share of the features by bin of stability, and the median of their consistency."""
    live = values.isfinite()
    n = len(EDGES) - 1
    bins = (values[live] * n).long().clamp(0, n - 1)
    C: list[float | None] = [None] * n
    if name is not None and all(name in run.features for run in runs):
        columns = torch.cat([run.features[name] for run in runs])[live]
        seen = torch.cat([_seen(run) for run in runs])[live]
        for b in range(n):
            inside = columns[(bins == b) & seen & columns.isfinite()]
            C[b] = float(inside.median()) if len(inside) else None
    share = torch.bincount(bins, minlength=n) / max(1, len(bins))
    return {"edges": list(EDGES), "share": share.tolist(), "C": C}


def stability_columns(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a table with a row a setting: `stability_...`; None where it was not measured."""
    entry = group["stability"]
    names = ("mcc", "shared", "random", "pw_mcc", "median", "reason")
    columns = {f"stability_{name}": entry.get(name) for name in names}
    for name, found in entry.get("consistent", {}).items():
        ends = {end: found.get(end) for end in ("value", "low", "high")}
        column = f"stability_rank_{name}"
        columns |= {column: ends["value"], f"{column}_low": ends["low"]}
        columns |= {f"{column}_high": ends["high"]}
    return columns


# ------------------------------------------------------------------------------ in words


def stability_words(group: Mapping[str, Any]) -> list[str]:
    """What a setting's stability comes to, in sentences."""
    entry = group["stability"]
    if entry["reason"]:
        return [f"{group['label']}: {entry['reason']}."]
    published = ""
    if entry["pw_mcc"] is not None:
        published = f"; PW-MCC, with dead features, {number(entry['pw_mcc'])}"
    by = "" if entry["matching"] == "Hungarian" else f", matched by {entry['matching']}"
    said = (
        f"{group['label']}: of the live features of one seed {100 * entry['shared']:.0f} % have a "
        f"match in another with a cosine above {SHARED_COSINE:g}; MCC {number(entry['mcc'])} "
        f"(random directions {number(entry['random'])}){published}, {entry['seeds']} seeds{by}."
    )
    return [said, *(_consistent(name, e) for name, e in entry["consistent"].items())]


def _consistent(name: str, entry: Mapping[str, Any]) -> str:
    """Whether stable features are the consistent ones."""
    said = label(name).name
    if entry["value"] is None:
        return f"{said} and stability: cannot tell, {entry['reason']}."
    verdict = _verdict(entry["low"], entry["high"])
    given = entry["given_density"]
    return (
        f"Stable features are {verdict} in {said}: rank correlation {_ranked(entry)}; among "
        f"features of one density {_ranked(given)}, {_verdict(given['low'], given['high'])} "
        f"({entry['n']:,} features of all seeds in {entry['n_families']:,} families)."
    )


def _verdict(low: float, high: float) -> str:
    return "higher" if low > 0 else "lower" if high < 0 else "neither higher nor lower"


def _ranked(entry: Mapping[str, Any]) -> str:
    return f"{number(entry['value'])} {interval_text((entry['low'], entry['high']))}"


def stability_notice(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which settings have one seed, so no stability; none where all have several."""
    alone = [row["label"] for row in rows if row["stability"]["reason"] == NEEDS_SEEDS]
    if not alone:
        return []
    which = "every setting" if len(alone) == len(rows) else listed(alone)
    return [f"no seed stability for {which}: {NEEDS_SEEDS}"]
