"""Runs laid side by side: settings with their seeds pooled, each against the baseline without loss.

`compare_runs(folders)` -> `Comparison`, which `write(folder)` turns into

    comparison.json   `Comparison.to_json()`, everything below
    comparison.md     a table
    comparison.csv    a row per group: settings, every metric with its interval, every difference
    report.html, notes.txt

A *stream* is one model, hook and set of held-out contexts; only runs of one stream are compared. A
*group* is one setting with all its seeds. An *arm* is a setting but for its sparsity (sae.k,
training.target_l0 and the like: `SPARSITY_KEYS`), so that the groups of an arm lie on one curve of
L0 against quality. The *baseline* of an arm is the arm without temporal loss (lambda 0 or
consistency=none) and everything else equal, or the one arm that was chosen for all.

Fields, all of them JSON:

runs      [{name, folder, status, reason, group, stream, seed, tokens}]; status "used", or with a
          reason: "unfinished", "damaged", "duplicate" (group, stream, seed, tokens are then null)
streams   [{id, model, hook_name, layer, d_in, dataset, context_size, n_documents, n_contexts,
          n_tokens, n_model_tokens, held_out}]
metrics   names in the order of columns: core (explained_variance, l0, ...) and consistency (C_W,
          D_W, L_W for every W, C_W_sparse, L_W_sparse, rho_1, tau_int, omega_squared, share_...,
          ...: energy-weighted means over live features; edge_energy, smoothness).
          Labels are in tcsae.base.labels
headline  the few of them for a narrow table; headline_window: the W of its C_W (null: none)
groups    [{
    id, stream, arm, label ("lambda=1 window=8": what sets it apart in this comparison),
    settings {architecture, d_sae, k or l1_coefficient, consistency ("none", "scale_free", ...,
        "shuffled"; "shuffled window_variance"), window (null for a baseline), lambda, tokens};
        of an SAE that was not trained here (tcsae.evaluate) "loaded from" and sha256 in place
        of the last four, and no seeds: it is compared with nothing
    differs {dotted config key: value}, the keys that are not the same in all groups,
    is_baseline, seeds [..], runs [names],
    metrics {name: {value, low, high, reason}}, low and high null where there is no interval,
    medians, q99 {name: value}: median and 99th percentile over features of consistency metrics
        (mean over seeds),
    energy_by_position {positions, energy}: sum over features of the mean square, relative to that
        from position 8 on, mean over seeds; empty where it was not measured,
    baseline_medians {name: value}: the medians of what it is compared with; {} like deltas,
    match {kind, groups [ids], weights [..], l0, words}: what it is compared with at its own L0;
        kind "single", "interpolated", "none" (words say why, with the nearest), "self" (baseline)
    deltas {name: {value, baseline, low, high, within_noise, smallest, family_low, family_high,
        seed_smallest, within_seed_noise, reason}}: value minus that of the baseline at matched L0,
        with its own paired interval; {}
        if kind is none or self; within_noise: false if it is a difference beside all others of
        this group (`family`), null if there is no interval (reason says why); smallest: the
        smallest difference that would have been one; family_low, family_high: value less and
        plus that; seed_smallest: the smallest difference that is more than training again makes,
        within_seed_noise: whether this one is below (`tcsae.report.seed_noise`); null without
        several seeds
    density_matched {name: {value, baseline, delta, low, high, within_noise, smallest, family_low,
        family_high, overlap, reason}}: the same after weighting both arms to one distribution of
        density (see `matching`), for C_W, rho_1, omega_squared; {} like deltas, and where no
        feature of an arm varies
    gain {run, baseline, reason, metrics {name: {change, value, baseline, up, down, n_features,
        n_matched, half, shown, share, curve {n, share}, features [...], layout}}}: in which
        features the change of C_W and L_W is, of one run and the baseline's of the same seed
        (`tcsae.report.gain`); {} like deltas, and beyond the 24 settings with the largest change.
        half: features that make half of it; share: what the `shown` first make; layout {share,
        n_shown, n_features [own, baseline's], value_without, baseline_without, change_without},
        null where a run did not measure it,
    curve {lags, rho, low, high, reason}: energy-weighted autocorrelation, mean over seeds
    profile {positions, rate}: firing rate by position over its mean, mean over live features
    density {edges, share, C}: log10 density bins: edges [n + 1], share of live features [n],
        energy-weighted C_{headline_window} in the bin [n], null where empty
    stability {reason, seeds, mcc, random, ...}: whether its seeds found the same features
        (`tcsae.report.stability`); with a reason and nothing else where it was not measured
  }]
arms      [{id, stream, label, is_baseline, baseline (arm id or null), groups [ids by L0],
          front [ids: no other group of the arm has less L0 and more explained variance]}]
grids     [{stream, label, windows [..], lambdas [..], groups [[id or null]], metrics {name:
          [[value or null]]}, deltas {name: [[value or null]]}}], rows windows, columns lambdas;
          lambda 0 is the baseline in every row; only if two windows or two lambdas were run
seed_noise [{stream, metric, sd, sd_low, sd_high, df, n_settings, smallest {seeds: difference}}]:
          for the headline, the spread between seeds pooled over settings, that of the steadiest and
          the least steady of them, and the smallest difference between two settings of so many
          seeds that counts; empty with one seed a setting
notices   [text]: what a reader must know: left-out runs, streams that are not compared, one seed,
          what is called a difference
answers   [text]: what the loss changed, a sentence a setting (`tcsae.report.answers`)
level     0.95

Beside the JSON, stability.safetensors has the stability of every feature, NaN where dead, by
"group<id>.seed<seed>"; it is there if a setting has several seeds.
"""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.frames import data_frame
from tcsae.base.labels import (
    DEFAULT_WINDOW,
    interval_text,
    label,
    local_names,
    local_window,
    markdown_table,
    number,
    window_part,
)
from tcsae.base.run_files import RunFiles
from tcsae.report.answers import answers
from tcsae.report.gain import gain_columns, gain_metrics, gains, not_measured
from tcsae.report.groups import Entries, Group, make_groups, sort_streams
from tcsae.report.paired import LEVEL
from tcsae.report.runs import CORE, FROM_ANALYSIS, Run, find_runs, read_run
from tcsae.report.seed_noise import SeedNoise
from tcsae.report.stability import stability_columns, stability_notice, stability_of

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

_HEADLINE = ("explained_variance", "l0", "frac_alive", "l2_ratio", "ce_loss_score")
_HEADLINE_TRUTH = (
    *("truth_mcc", "truth_found", "truth_found_slow", "truth_f1_slow", "truth_pieces_slow"),
    *("truth_lag_slow", "truth_recall_with_child"),
)
"""Of synthetic worlds."""
_HEADLINE_MEMORY = ("rho_1", "persistence", "omega_squared", "edge_energy", "density")
_HEADLINE_PROBES = (
    *("probe_context_token", "probe_context_document", "probe_context_tokens"),
    *("probe_semantics_token", "probe_semantics_document", "probe_semantics_tokens"),
    *("probe_syntax_token", "probe_context_transfer", "probe_semantics_transfer"),
)
_HEADLINE_POSITION = (
    *("shift_cosine", "shift_moved"),
    *("lengths_explained_variance_4x", "lengths_omega_squared_4x"),
)
"""Of instruments, beside omega^2; where they were asked for."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Runs side by side; the fields are described at the top of this file."""

    runs: list[dict[str, Any]]
    streams: list[dict[str, Any]]
    metrics: list[str]
    headline: list[str]
    headline_window: int | None
    groups: list[dict[str, Any]]
    arms: list[dict[str, Any]]
    grids: list[dict[str, Any]]
    notices: list[str]
    answers: list[str]
    seed_noise: list[dict[str, Any]] = field(default_factory=list)
    level: float = LEVEL
    stable: dict[str, Tensor] = field(default_factory=dict)
    """[F] stability of the features of each seed; not in the JSON."""

    def to_json(self) -> dict[str, Any]:
        content = asdict(replace(self, stable={}))
        del content["stable"]
        return content

    def markdown(self) -> str:
        """In a sentence; two tables, what was measured and what differs from the baseline; and the
        notices."""
        parts = ["\n\n".join(self.answers), _values_table(self), _differences_table(self)]
        parts.append("\n".join(f"- {notice}" for notice in self.notices))
        return "\n\n".join(part for part in parts if part) + "\n"

    def __repr__(self) -> str:
        return self.markdown()

    def table(self) -> DataFrame:
        """A row per group, as `csv` has it. Raises UserError without pandas."""
        rows = [_csv_row(self, group) for group in self.groups]
        return data_frame(rows, "comparison.csv() has the same numbers")

    def csv(self) -> str:
        """A row per group, numbers unrounded, empty where there is none."""
        rows = [_csv_row(self, group) for group in self.groups]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def compare_runs(
    folders: Sequence[str | Path], baseline: Mapping[str, str] | None = None
) -> Comparison:
    """Lay runs side by side.

    Args:
        folders: run folders, sweep folders, or folders that hold any of them.
        baseline: settings (dotted config keys) of the runs without temporal loss that all others
            are compared with, whatever else differs. None: each with its own.

    Raises:
        UserError: a folder without runs, not one run that can be used, or no such baseline.
    """
    used: list[Run] = []
    records: list[dict[str, Any]] = []
    for folder in find_runs(folders):
        record = dict.fromkeys(("name", "folder", "status", "reason", "group", "stream", "seed"))
        record |= {"name": folder.resolve().name, "folder": str(folder), "tokens": None}
        records.append(record)
        try:
            run = read_run(folder)
        except UserError as error:
            record["status"] = "damaged" if RunFiles(folder).is_finished else "unfinished"
            record["reason"] = str(error)
            continue
        used.append(run)
    if not used:
        raise UserError(_nothing_to_compare(records))
    streams = sort_streams(used)
    groups, repeated = make_groups(streams, tuple((baseline or {}).items()))
    if baseline and not any(group.is_baseline for group in groups):
        raise UserError(_no_such_baseline(baseline, groups))
    by_folder = {record["folder"]: record for record in records}
    for run, first in repeated:
        reason = f"same settings and seed as {first.name}"
        by_folder[str(run.folder)] |= {"status": "duplicate", "reason": reason}
    for group in groups:
        for run in group.runs:
            by_folder[str(run.folder)] |= {
                "status": "used",
                "group": group.id,
                "stream": group.stream,
                "seed": run.seed,
                "tokens": group.settings.get("training.tokens"),
            }
    window = _headline_window(groups)
    metrics = _metrics(used)
    entries = Entries(groups, metrics, window)
    rows = [entries.group(group) for group in groups]
    local = local_window(metrics, window)
    chosen = (*_HEADLINE, *_HEADLINE_TRUTH, f"C_{window}", *local_names(local), *_HEADLINE_MEMORY)
    chosen += _HEADLINE_PROBES + _HEADLINE_POSITION
    headline = [name for name in chosen if name in metrics]
    for row, gain in zip(rows, gains(groups, rows, gain_metrics(metrics, window)), strict=True):
        row["gain"] = gain
    noise = SeedNoise(groups, metrics)
    stable: dict[str, Tensor] = {}
    for row, group in zip(rows, groups, strict=True):
        noise.mark(row)
        of = [name for name in (f"C_{window}", f"L_{local}") if name in metrics]
        row["stability"], features = stability_of(group, of)
        stable |= features
    return Comparison(
        runs=records,
        streams=[{"id": i, **stream[0].place} for i, stream in enumerate(streams)],
        metrics=metrics,
        headline=headline,
        headline_window=window,
        groups=rows,
        arms=entries.arms(),
        grids=entries.grids(rows),
        notices=_notices(records, streams, groups, rows),
        answers=answers(rows, metrics, window),
        seed_noise=noise.rows(headline),
        stable=stable,
    )


def _nothing_to_compare(records: Sequence[dict[str, Any]]) -> str:
    if len(records) == 1:
        return records[0]["reason"]
    return f"none of the {len(records)} runs can be used; the first: {records[0]['reason']}"


def _no_such_baseline(wanted: Mapping[str, str], groups: Sequence[Group]) -> str:
    said = " ".join(f"{key}={value}" for key, value in wanted.items())
    plain = [g.settings for g in groups if g.settings.get("consistency") == "none"]
    there = [
        f"{key}={value}"
        for key in wanted
        for value in dict.fromkeys(str(settings.get(key)) for settings in plain)
        if value != "None"
    ]
    known = f"there are: {', '.join(there)}" if there else "no run there has such a key"
    return f"no run without temporal loss has {said}; {known}"


def _headline_window(groups: Sequence[Group]) -> int | None:
    """The window most variants were trained with, if its C_W was measured everywhere."""
    names = [set(run.features) for group in groups for run in group.runs]
    measured = sorted(int(n[2:]) for n in set.intersection(*names) if n.startswith("C_"))
    trained = Counter(g.settings["window"] for g in groups if "window" in g.settings)
    wanted = [w for w, _ in sorted(trained.items(), key=lambda item: (-item[1], str(item[0])))]
    known = [w for w in [*wanted, DEFAULT_WINDOW] if w in measured]
    return (known or measured or [None])[0]


def _metrics(runs: Sequence[Run]) -> list[str]:
    """Every metric that has a value somewhere: core, then consistency, then analysis."""
    named = dict.fromkeys(name for run in runs for name in run.values)
    memory = [n for n in named if n not in (*CORE, *FROM_ANALYSIS, "autocorrelation")]
    parts = [part for name in memory if (part := window_part(name)) is not None]
    parts.sort(key=lambda part: (part.sparse, part.kind, part.window))
    windows = [f"{p.kind}_{p.window}{'_sparse' if p.sparse else ''}" for p in parts]
    ordered = [*CORE, *windows, *(n for n in memory if n not in windows), *FROM_ANALYSIS]

    def has_value(name: str) -> bool:
        return any(name in run.values and run.values[name].isfinite() for run in runs)

    return [name for name in ordered if has_value(name)]


# ---------------------------------------------------------------------------------- notices


def _notices(
    records: Sequence[dict[str, Any]],
    streams: Sequence[Sequence[Run]],
    groups: Sequence[Group],
    rows: Sequence[dict[str, Any]],
) -> list[str]:
    notices = [
        f"left out: {record['name']} ({record['status']}): {record['reason']}"
        for record in records
        if record["status"] != "used"
    ]
    if len(streams) > 1:
        places = "; ".join(_place_said(stream[0].place) for stream in streams)
        notices.append(
            f"the runs were measured on {len(streams)} different sets of activations ({places}): "
            "each variant is compared with baselines of its own set only, and values of two sets "
            "are not to be compared; the same text, dataset.eval_key, eval_fraction, "
            "n_eval_contexts and context_size give the same set"
        )
    for row in rows:
        if row["match"]["kind"] == "none":
            notices.append(f"{row['label']}: no difference is given, {row['match']['words']}")
    alone = [row["label"] for row in rows if len(row["seeds"]) == 1]
    if alone:
        which = "every setting" if len(alone) == len(rows) else ", ".join(alone)
        notices.append(
            f"one seed: {which}. The interval is about these SAEs on other contexts; how much "
            "training again would change is not known"
        )
    notices += stability_notice(rows)
    n = sum(e["within_noise"] is not None for row in rows for e in row["deltas"].values())
    if n:
        notices.append(
            f"{n} differences, each with a 95 % interval of its own. A setting is called different "
            "from its baseline in a metric only where the difference is beyond what the largest of "
            "all its metrics reaches by chance in one comparison of twenty; beside each is the "
            "smallest that would have been"
        )
    without = [run.name for g in groups for run in g.runs if not run.by_density]
    if any(row["density_matched"] for row in rows) and without:
        notices.append(
            "at matched density the intervals are over features alone, for runs whose sums by "
            f"document were not kept: {', '.join(without)}"
        )
    if line := not_measured(rows):
        notices.append(f"where the gain lies: {line}")
    few = [stream[0].place for stream in streams if (stream[0].place["n_documents"] or 99) < 64]
    for place in few:
        notices.append(
            f"{_place_said(place)}: an interval from so few documents is wide; a larger "
            "dataset.eval_fraction, or text with more documents, narrows it"
        )
    older = [run.name for group in groups for run in group.runs if not run.paired_positions]
    if older:
        notices.append(
            f"evaluated by an older version: {', '.join(older)}. Their omega² is too low for "
            "features that last, and is not to be compared with that of other runs; document and "
            "local part and the energy by position were not measured"
        )
    reasons = {e["reason"] for row in rows for e in row["metrics"].values() if e["low"] is None}
    if all(e["low"] is None for row in rows for e in row["metrics"].values()):
        notices.append(f"no intervals: {'; '.join(sorted(r for r in reasons if r))}")
    return notices


def _place_said(place: dict[str, Any]) -> str:
    documents = f" from {n} documents" if (n := place["n_documents"]) else ""
    return (
        f"{place['model']} {place['hook_name']}, {place['n_contexts']} contexts of "
        f"{place['context_size']} tokens{documents} of {place['dataset']}"
    )


# ----------------------------------------------------------------------------------- tables


def _with_interval(entry: dict[str, Any], signed: bool = False, key: str = "value") -> str:
    value = entry[key]
    if value is None:
        return "n/a"
    text = ("+" if signed and value >= 0 else "") + number(value)
    return f"{text} {interval_text((entry['low'], entry['high']))}".rstrip()


def _values_table(comparison: Comparison) -> str:
    names = comparison.headline
    rows = [
        [
            group["label"],
            ", ".join(map(str, group["seeds"])),
            *(_with_interval(group["metrics"][name]) for name in names),
        ]
        for group in comparison.groups
    ]
    return markdown_table(["setting", "seeds", *(label(name).name for name in names)], rows, "---:")


def _differences_table(comparison: Comparison) -> str:
    """Differences at matched L0, and of C_W at matched density; "~": within noise."""
    names = [name for name in comparison.headline if name != "l0"]
    window = f"C_{comparison.headline_window}"
    rows = []
    for group in comparison.groups:
        if not group["deltas"]:
            continue
        cells = [_difference(group["deltas"][name]) for name in names]
        if window in comparison.metrics:
            matched = group["density_matched"].get(window)
            cells.append(_difference(matched, "delta") if matched else "n/a")
        rows.append([group["label"], group["match"]["words"], *cells])
    if not rows:
        return ""
    header = ["minus the baseline", "at", *(label(name).name for name in names)]
    if window in comparison.metrics:
        header.append(f"{window} at matched density")
    return markdown_table(header, rows, "---:") + (
        "\n\n~ within noise: no difference beside all others of its line; brackets: its own 95 % "
        "interval"
    )


def _difference(entry: dict[str, Any], key: str = "value") -> str:
    text = _with_interval(entry, signed=True, key=key)
    return f"~ {text}" if entry["within_noise"] else text


def _csv_row(comparison: Comparison, group: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {name: group[name] for name in ("id", "label", "stream", "arm")}
    row |= group["settings"] | {key: value for key, value in group["differs"].items()}
    row["seeds"] = " ".join(map(str, group["seeds"]))
    for name in comparison.metrics:
        entry = group["metrics"][name]
        row |= {name: entry["value"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
        if window_part(name):
            row |= {f"{name}_median": group["medians"].get(name)}
    row["baseline"] = " ".join(map(str, group["match"]["groups"]))
    row["matched_at"] = group["match"]["words"]
    for kind, key in (("deltas", "value"), ("density_matched", "delta")):
        for name, entry in group[kind].items():
            column = f"{name}_delta" if kind == "deltas" else f"{name}_density_matched_delta"
            row |= {column: entry[key], f"{column}_low": entry["low"]}
            row |= {
                f"{column}_high": entry["high"],
                f"{column}_within_noise": entry["within_noise"],
                f"{column}_smallest": entry["smallest"],
            }
            if kind == "deltas":
                marks = ("seed_smallest", "within_seed_noise")
                row |= {f"{column}_{mark}": entry[mark] for mark in marks}
    return row | stability_columns(group) | gain_columns(group)
