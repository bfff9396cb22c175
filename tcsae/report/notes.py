"""`notes.txt`: what was run and what came out, in words, for whoever writes it up later.

Nothing is said here that the numbers of the run or of the comparison do not carry.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tcsae.base.files import write_text
from tcsae.base.labels import (
    SPREAD,
    decimals,
    difference_text,
    from_documents,
    interval_text,
    interval_words,
    label,
    listed,
    number,
    spread_text,
    window_part,
)
from tcsae.report import meaning, norm_limits, truth
from tcsae.report.comparison import Comparison
from tcsae.report.contents import NO_ANALYSIS, Contents
from tcsae.report.gain import CAPTION as GAIN_CAPTION
from tcsae.report.gain import HEAD as GAIN_HEAD
from tcsae.report.gain import gain_table, gain_words
from tcsae.report.memory_figures import SHARES
from tcsae.report.origin import origin
from tcsae.report.seed_noise import (
    SEED_NOISE_HEADER,
    SEED_NOISE_LEAD,
    seed_noise_row,
    seed_noise_words,
)
from tcsae.report.stability import stability_words
from tcsae.runs.folder import LoadedRun

_WIDTH = 96
_LAGS = (1, 2, 4, 8, 16, 32, 64, 128)


def write_run_notes(run: LoadedRun, path: Path) -> Path:
    """The notes of a loaded run, into a file."""
    write_text(path, run_notes(run))
    return path


def _heading(text: str, rule: str = "-") -> list[str]:
    return ["", text, rule * len(text)]


def _paragraph(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_on_hyphens=False,
    )


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Cells in columns, each as wide as its widest."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


# ---------------------------------------------------------------- a run


def run_notes(run: LoadedRun) -> str:
    """The notes of a run, from what its folder holds."""
    contents = Contents.of(run)
    name = run.folder.resolve().name
    lines = [f"Notes on the run {name}", "=" * (len(name) + 17)]
    lines += [*_what_was_run(contents), *_core_results(contents), *_truth(contents)]
    lines += [*_consistency(contents), *_meaning(contents)]
    lines += [*_analysis_lines(contents), *_missing(contents), *_reading(contents)]
    return "\n".join(lines) + "\n"


def _what_was_run(contents: Contents) -> list[str]:
    config, info = contents.run.config, contents.run.final_info
    sparsity = f", k {k}" if (k := getattr(config.sae, "k", None)) else ""
    if info.get("sparsity_penalty") is not None:
        sparsity = f", L1 coefficient {info['sparsity_penalty']:g}"
    data = config.dataset
    text = f"{data.name} ({data.path})" if data.path else data.name
    rows = [
        ("model", contents.model_words),
        ("text", f"{text}, contexts of {data.context_size} tokens"),
        ("SAE", f"{config.sae.architecture}, {info['dict_size']:,} features{sparsity}"),
        *origin(contents.run).rows,
        ("massive tokens", f"{100 * info['massive_token_share']:.2f} % of the tokens, left out"),
        ("identity", info["unique_id"]),
    ]
    repeat = ["", "To repeat it (the whole config is in config.json):", f"  {contents.command()}"]
    return [*_heading("What was run"), *_columns(rows), *repeat]


def _core_results(contents: Contents) -> list[str]:
    summary = contents.summary
    said = (
        f"{summary['n_valid_tokens']:,} tokens in {summary['n_contexts']:,} held-out contexts"
        f"{from_documents(summary)}. Brackets: {interval_words(summary)}"
    )
    rows = [
        (
            label(name).name,
            number(value),
            interval_text(contents.intervals.get(name)),
            label(name).meaning,
        )
        for name, value in contents.core.items()
        if value is not None
    ]
    return [
        *_heading("Reconstruction, sparsity, behaviour"),
        *_paragraph(said),
        "",
        *_columns([("metric", "value", "interval", "meaning"), *rows]),
        *_by_norm_limit(contents),
    ]


def _meaning(contents: Contents) -> list[str]:
    found = contents.run.meaning
    if not found:
        return []
    said = [line for text in meaning.words(found) for line in _paragraph(text, "- ")]
    table = _columns([meaning.HEAD, *meaning.table(found)])
    return [*_heading("What the features mean"), *said, "", *table]


def _by_norm_limit(contents: Contents) -> list[str]:
    rows = norm_limits.table(contents)
    if not rows:
        return []
    table = _columns([norm_limits.HEAD, *rows])
    return ["", "Explained variance by norm limit:", *table, "", *_paragraph(norm_limits.CAPTION)]


def _truth(contents: Contents) -> list[str]:
    if contents.truth is None:
        return []
    said = [line for text in truth.words(contents.truth) for line in _paragraph(text)]
    table = _columns([truth.HEAD, *truth.table(contents.truth)])
    return [*_heading("Against the truth"), *said, "", *table, "", *_paragraph(truth.CAPTION)]


def _consistency(contents: Contents) -> list[str]:
    summary = contents.summary
    said = (
        f"Over the {summary['n_live']:,} live features of {summary['n_features']:,}. The weighted "
        "mean weighs a feature by its variance about its position means."
    )
    if "n_seen" in summary:
        said += (
            f" Medians and quantiles are over the {summary['n_seen']:,} that were on in "
            f"{summary['seen_contexts']} contexts or more."
        )
    rows = [("metric", "weighted mean", "interval", "median", "interval", "99 %", "meaning")]
    for name, entry in summary["metrics"].items():
        if not entry["n"]:
            continue
        rows.append(
            (
                label(name).name,
                number(entry["energy_weighted"]),
                interval_text(entry["energy_weighted_interval"]),
                number(entry["median"]),
                interval_text(entry["median_interval"]),
                number(entry.get("q99")),
                label(name).meaning,
            )
        )
    lines = [*_heading("Consistency"), *_paragraph(said), "", *_columns(rows)]
    if said := contents.layout_words():
        lines += ["", *_paragraph(said)]
    lines += _where(contents)
    curve = summary["autocorrelation"]
    known = [k for k in _LAGS if k < len(curve["rho"]) and curve["rho"][k] is not None]
    if known:
        pairs = [
            (f"{k}", number(curve["rho"][k]), interval_text((curve["low"][k], curve["high"][k])))
            for k in known
        ]
        lines += ["", "Energy-weighted autocorrelation:", *_columns([("lag", "rho", ""), *pairs])]
    singles = [
        f"{label(name).name}: {number(entry['value'])} {interval_text(entry['interval'])} "
        f"({label(name).meaning})"
        for name, entry in contents.singles.items()
        if entry["value"] is not None
    ]
    return [*lines, "", *singles] if singles else lines


def _where(contents: Contents) -> list[str]:
    """In which features the consistency sits, and in what part of the variance."""
    metrics = contents.summary["metrics"]
    said = []
    for name in contents.memory_metrics:
        if spread := spread_text(metrics[name]):
            weighted = number(metrics[name]["energy_weighted"])
            said.append(f"{label(name).name}: weighted mean {weighted}; {spread}.")
    shares = [(n, metrics[n]["energy_weighted"]) for n in SHARES if n in metrics]
    if shares and all(value is not None for _, value in shares):
        parts = listed(
            [f"{label(n).name.removeprefix('Variance ')} {number(v)}" for n, v in shares]
        )
        window = contents.summary["shares_window"]
        said.append(f"The variance of features lies {parts} (windows of {window} tokens).")
    for name, entry in metrics.items():
        if n := entry.get("n_censored"):
            said.append(
                f"{label(name).name}: {n:,} features last longer than could be measured, and are "
                "in no mean."
            )
    return ["", *(line for text in said for line in _paragraph(text, "- "))] if said else []


def _analysis_lines(contents: Contents) -> list[str]:
    if contents.analysis is None:
        return []
    redundancy = contents.analysis.redundancy
    limits, near, twins = (redundancy[key] for key in ("thresholds", "redundant", "twins"))
    lines = _heading("Redundancy")
    lines += _paragraph(
        f"{near['n_pairs']} pairs of near-copies in {near['n_groups']} groups (correlation above "
        f"{limits['correlation']} at a lag of at most {redundancy['max_lag']}, decoder cosine "
        f"above {limits['cosine']}): {near['n_redundant']} of {near['n_live']} live features "
        f"could go, a share of {number(near['redundant_share'])}."
    )
    lines += _paragraph(
        f"{twins['n_pairs']} pairs of position twins (decoder cosine above {limits['cosine']}, "
        f"correlation below {limits['twin_correlation']}, overlap of positions below "
        f"{limits['twin_overlap']} and below chance); a share of "
        f"{number(twins['twinned_share'])} of the live features has one"
        f"{_untold(twins)}. Effective rank of the correlations: "
        f"{number(redundancy['effective_rank'])}."
    )
    return lines + _cluster_lines(contents.analysis.specialization)


def _untold(twins: Mapping[str, Any]) -> str:
    """Pairs of one direction of which it cannot be told whether they are apart in position."""
    if not (n := twins.get("n_cannot_tell")):
        return ""
    return f" (of {n} of {twins['n_candidates']} pairs of one direction it cannot be told)"


def _cluster_lines(specialization: Mapping[str, Any]) -> list[str]:
    summary = specialization["summary"]
    checks = ("modularity", "modularity_excess", "ari_seeds", "ari_halves", "ami_decoder")
    lines = _heading("Clusters of features that fire together")
    chance = {
        True: "stronger than in rewired graphs and with shuffled documents (p < 0.01)",
        False: "not stronger than chance (p < 0.01 was asked)",
        None: f"not tested against chance: {summary.get('significant_reason')}",
    }[summary["significant"]]
    lines += _paragraph(f"{summary['n_clusters']} clusters, {chance}.")
    rows = [(label(n).name, number(summary[n]), label(n).meaning) for n in checks]
    lines += [*_columns(rows), ""]
    names = [f"{c['name']} ({c['size']})" for c in specialization["clusters"][:12]]
    return lines + (_paragraph(f"Largest: {'; '.join(names)}.") if names else [])


def _missing(contents: Contents) -> list[str]:
    missing = contents.missing()
    if not missing:
        return []
    return [*_heading("Not measured"), *(p for m in missing for p in _paragraph(m, "- "))]


def _reading(contents: Contents) -> list[str]:
    """What to keep in mind, as far as this run's own numbers call for it."""
    said = origin(contents.run).cautions
    if about_the_limit := norm_limits.caution(contents):
        said.append(about_the_limit)
    ratio = contents.core["l2_ratio"]
    if ratio is not None and ratio < 0.95:
        said.append(
            f"The reconstruction is shrunk (L2 ratio {number(ratio)}): a raw variance of "
            "activations would look smaller for that alone. Consistency metrics do not depend on "
            "the scale of a feature; Smoothness (T-SAE) and Mean activation do."
        )
    alive = contents.core["frac_alive"]
    if alive is not None and alive < 0.9:
        said.append(f"A share of {number(1 - alive)} of the features never fired on held-out text.")
    if contents.analysis is None:
        said.append(f"Redundancy and clusters are {NO_ANALYSIS}.")
    return [*_heading("How to read it"), *(p for text in said for p in _paragraph(text, "- "))]


# ---------------------------------------------------------------- a comparison


def comparison_notes(comparison: Comparison) -> str:
    """The notes of a comparison."""
    content = comparison.to_json()
    lines = ["Notes on a comparison", "=" * 21]
    lines += _compared(content)
    for stream in content["streams"]:
        own = [g for g in content["groups"] if g["stream"] == stream["id"]]
        lines += _heading(stream_words(stream), "=")
        lines += _heading("Every metric, with its interval") + _all_metrics(own, content)
        lines += _heading("Against the baseline at the same L0")
        lines += [p for group in own for p in _group_verdict(group, content)]
        lines += _where_gained(own)
        lines += _at_equal_density(own)
        lines += _of_seeds(own, content)
    return "\n".join(lines) + "\n"


def stream_words(stream: Mapping[str, Any]) -> str:
    """One stream in a line."""
    return (
        f"{stream['model']}, {stream['hook_name']}, {stream['dataset']}: "
        f"{stream['n_contexts']:,} held-out contexts of {stream['context_size']} tokens"
        f"{from_documents(stream)}"
    )


def _compared(content: Mapping[str, Any]) -> list[str]:
    used = [run for run in content["runs"] if run["status"] == "used"]
    lines = _heading("What was compared")
    lines += _paragraph(
        f"{len(used)} runs in {len(content['groups'])} settings. Seeds of one setting are pooled. "
        f"Brackets: {100 * content['level']:g} % interval, over documents and seeds."
    )
    labels = {group["id"]: group["label"] for group in content["groups"]}
    rows = [(run["name"], labels.get(run["group"], run["status"])) for run in content["runs"]]
    lines += ["", *_columns([("run", "setting"), *rows]), ""]
    for group in content["groups"]:
        settings = ", ".join(f"{k} {v}" for k, v in group["settings"].items() if v is not None)
        said = f"{group['label']}: {settings}"
        if group["seeds"]:
            said += f"; seeds {listed([str(seed) for seed in group['seeds']])}"
        lines += _paragraph(said, "- ")
    if content["answers"]:
        lines += _heading("In a sentence")
        lines += [p for text in content["answers"] for p in _paragraph(text, "- ")]
    if content["notices"]:
        lines += _heading("To keep in mind")
        lines += [p for text in content["notices"] for p in _paragraph(text, "- ")]
    return lines


def _all_metrics(groups: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> list[str]:
    lines = []
    for group in groups:
        rows = []
        for name in content["metrics"]:
            entry = group["metrics"].get(name)
            if entry is None:
                continue
            rows.append(
                (
                    f"  {label(name).name}",
                    number(entry["value"]),
                    interval_text((entry["low"], entry["high"])) or f"({entry['reason']})",
                )
            )
        lines += ["", group["label"], *_columns(rows), *_spreads(group, content)]
    return lines


def _spreads(group: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[str]:
    """Whether the headline's means of windows are those of many features or of a few."""
    for name in filter(window_part, content["headline"]):
        spread = {key: group.get(source, {}).get(name) for key, source in SPREAD.items()}
        if text := spread_text(spread):
            yield f"  {label(name).name}, {text}"


def _group_verdict(group: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[str]:
    if group["is_baseline"]:
        return
    yield ""
    yield from _paragraph(f"{group['label']} ({group['match']['words']})")
    of_seeds = seed_noise_words(content["seed_noise"], group)
    for sentence in [*verdicts(group, content["metrics"]), *of_seeds]:
        yield from _paragraph(sentence, "- ")


def _where_gained(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """In which features the change of C_W and L_W lies."""
    lines = []
    for group in groups:
        found = group["gain"]
        if not found:
            continue
        lines += ["", *_paragraph(f"{group['label']}: {found['run']} against {found['baseline']}")]
        if found["reason"]:
            lines += _paragraph(f"Not worked out: {found['reason']}.", "- ")
        for name, entry in found["metrics"].items():
            lines += _paragraph(gain_words(group, name), "- ")
            table = _columns([GAIN_HEAD, *gain_table(entry)])
            lines += ["", *(f"  {line}" for line in table)]
    return [*_heading("Where the gain lies"), *_paragraph(GAIN_CAPTION), *lines] if lines else []


def verdicts(group: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What a group's differences at matched L0 say, in sentences: one for each clear difference,
    one for those within noise, one for those without an interval. L0 is what was matched."""
    deltas = group["deltas"]
    if not deltas:
        return [f"Not compared: {group['match']['words']}."]
    said, noise, unknown = [], [], []
    for name in names:
        entry = deltas.get(name)
        if name == "l0" or entry is None or entry["value"] is None:
            continue
        text = difference_text(entry["value"], entry["low"], entry["high"])
        if entry["within_noise"] is None:
            unknown.append(f"{label(name).name} ({text})")
        elif entry["within_noise"]:
            noise.append(f"{label(name).name} ({text}{_would_show(entry)})")
        else:
            said.append(_clear(label(name).name, group["metrics"][name]["value"], entry, text))
            said[-1] += _medians(group, name)
    if noise:
        said.append(f"Within noise, so no difference was shown: {listed(noise)}.")
    if unknown:
        said.append(f"Without an interval, so nothing can be said: {listed(unknown)}.")
    return said


def _medians(group: Mapping[str, Any], name: str) -> str:
    """Of a mean over features, whether the one in the middle moved too."""
    if not window_part(name):
        return ""
    own, theirs = (group.get(k, {}).get(name) for k in ("medians", "baseline_medians"))
    if own is None or theirs is None:
        return ""
    return f" Median over features: {number(own)} against {number(theirs)}."


def density_verdict(group: Mapping[str, Any], name: str) -> str:
    """One sentence on a metric at equal density; empty if that was not worked out."""
    entry = group["density_matched"].get(name)
    if entry is None:
        return ""
    said = f"At equal density, {label(name).name}"
    if entry["delta"] is None:
        return f"{said}: not compared, {entry['reason']}."
    text = difference_text(entry["delta"], entry["low"], entry["high"])
    overlap = f"Overlap {number(entry['overlap'])}."
    if entry["within_noise"] is None:
        return f"{said}: {text}, without an interval ({entry['reason']}). {overlap}"
    if entry["within_noise"]:
        shown = _would_show(entry)
        return f"{said}: within noise, so no difference was shown ({text}{shown}). {overlap}"
    moved = {**entry, "value": entry["delta"]}
    return f"{_clear(said, entry['value'], moved, text)} {overlap}"


def _would_show(entry: Mapping[str, Any]) -> str:
    """The smallest difference that would have been called one."""
    smallest = entry.get("smallest")
    return f"; {number(smallest)} would have shown" if smallest else ""


def _clear(name: str, own: float, entry: Mapping[str, Any], text: str) -> str:
    direction = "higher" if entry["value"] > 0 else "lower"
    digits = decimals(entry["low"], entry["high"])
    values = f"{own:.{digits}f} against {entry['baseline']:.{digits}f}"
    return f"{name} is {direction}: {values}, {text}."


def _at_equal_density(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for group in groups:
        if group["density_matched"]:
            lines += ["", group["label"]]
        for name in group["density_matched"]:
            lines += _paragraph(density_verdict(group, name), "- ")
    if not lines:
        return []
    said = (
        "Features that fire often are more consistent in any SAE. Both sides are weighted to one "
        "distribution of density here; the overlap is the share of them that this leaves. "
        "Intervals are over features, documents and, where both sides have the same, seeds."
    )
    return [*_heading("The same at equal density"), *_paragraph(said), *lines]


def _of_seeds(groups: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> list[str]:
    """What training again changes: the features, and every headline metric."""
    lines = _heading("Seeds: the same features?")
    lines += [p for g in groups for text in stability_words(g) for p in _paragraph(text, "- ")]
    own = [row for row in content["seed_noise"] if row["stream"] == groups[0]["stream"]]
    if not own:
        return lines
    lines += ["", *_paragraph(SEED_NOISE_LEAD), ""]
    return [*lines, *_columns([SEED_NOISE_HEADER, *map(seed_noise_row, own)])]
