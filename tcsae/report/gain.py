"""Where the gain lies: in which features the change of C_W and L_W against the baseline is.

Of one run of a setting and the run of its baseline with the same seed. The arithmetic is that of
`tcsae.metrics.gain`: parts of the weighted mean, counterparts by decoder direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.base.labels import label, local_names, local_window, number
from tcsae.base.run_files import RunFiles
from tcsae.metrics.gain import Gain, gain_of, matched, mean_without, parts_of
from tcsae.metrics.layout import is_layout_feature
from tcsae.report.controls import is_control
from tcsae.report.groups import Group
from tcsae.report.runs import Run
from tcsae.runs.folder import load_sae

SHOWN = 10
"""Features that are named, and whose share is said."""
SETTINGS = 24
"""Settings that it is worked out for: with more, those with the largest change of C_W."""
CURVE = (*range(1, 11), 15, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
"""Numbers of features at which the cumulative share is given."""
NOT_MEASURED = (
    "how much of it lies in layout features (line ends, punctuation, headings) was not measured: "
    "a run was evaluated by an older version, or has no text; run its command again with rerun=true"
)

Row = dict[str, Any]


def gain_metrics(metrics: Sequence[str], window: int | None) -> list[str]:
    """C_W and the L_W beside it, those there are."""
    local = [n for n in local_names(local_window(metrics, window)) if n.startswith("L_")][:1]
    return [name for name in (f"C_{window}", *local) if name in metrics]


def gains(groups: Sequence[Group], rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """`gain` of every setting, in the order of `rows`; {} for what has no baseline, and beyond
    `SETTINGS`.

    Args:
        groups, rows: of a comparison, in the same order.
        names: of `gain_metrics`.
    """
    if not names:
        return [{} for _ in rows]
    compared = [row for row in rows if row["deltas"]]

    def rank(row: Row) -> tuple[bool, float]:
        return is_control(row), -(row["deltas"].get(names[0], {}).get("value") or 0.0)

    chosen = {row["id"] for row in sorted(compared, key=rank)[:SETTINGS]}
    by_id = {group.id: group for group in groups}
    files = _Files()
    return [
        _gain_of_setting(by_id[row["id"]], by_id[_nearest(row)], names, files)
        if row["id"] in chosen
        else {}
        for row in rows
    ]


class _Files:
    """What is read of run folders, the last two kept: the next setting has the same baseline."""

    def __init__(self) -> None:
        self.decoder = lru_cache(maxsize=2)(self._decoder)
        self.tokens = lru_cache(maxsize=2)(self._tokens)

    @staticmethod
    def _decoder(folder: Path) -> Tensor:
        return load_sae(RunFiles(folder).sae).W_dec.detach()

    @staticmethod
    def _tokens(folder: Path) -> list[list[str]]:
        """The tokens that set each feature apart; [] without an analysis."""
        file = RunFiles(folder).analysis.specialization
        return read_json(file)["features"]["top_tokens"] if file.is_file() else []


def _nearest(row: Row) -> int:
    """The setting of the baseline that weighs most at this L0."""
    match = row["match"]
    weighted = zip(match["weights"], match["groups"], strict=True)
    return max(weighted, key=lambda pair: pair[0])[1]


def _gain_of_setting(group: Group, baseline: Group, names: Sequence[str], files: _Files) -> Row:
    theirs = {run.seed: run for run in baseline.runs}
    own = next((run for run in group.runs if run.seed in theirs), group.runs[0])
    other = theirs.get(own.seed, baseline.runs[0])
    found: Row = {"run": own.name, "baseline": other.name, "reason": None, "metrics": {}}
    try:
        directions = files.decoder(own.folder), files.decoder(other.folder)
    except UserError as error:
        return found | {"reason": str(error)}
    for name in names:
        needed = {name, "c0", "density"} | ({f"D_{name[2:]}"} if name.startswith("L_") else set())
        if all(needed <= set(run.features) for run in (own, other)):
            found["metrics"][name] = _of_metric(name, own, other, directions, files)
    return found


def _of_metric(
    name: str, own: Run, other: Run, directions: tuple[Tensor, Tensor], files: _Files
) -> Row:
    parts = parts_of(name, own.features), parts_of(name, other.features)
    partner_F, cosine_F = matched(*directions, *parts)
    layout = _layout(own, other)
    gain = gain_of(*parts, partner_F, layout)
    curve = [n for n in CURVE if n <= len(gain.gain)]
    entry: Row = {
        "change": gain.change,
        "value": float(parts[0].sum()),
        "baseline": float(parts[1].sum()),
        "up": gain.up,
        "down": gain.change - gain.up,
        "n_features": len(parts[0]),
        "n_matched": int((partner_F >= 0).sum()),
        "half": gain.n_for(0.5),
        "shown": SHOWN,
        "share": gain.share(SHOWN),
        "curve": {"n": curve, "share": [gain.share(n) for n in curve]},
        "features": [
            _feature(i, name, gain, cosine_F, own, other, files)
            for i in range(min(SHOWN, len(gain.gain)))
        ],
        "layout": None,
    }
    if layout is not None and gain.is_layout is not None:
        own_mean = mean_without(name, own.features, layout[0])
        other_mean = mean_without(name, other.features, layout[1])
        entry["layout"] = {
            "share": gain.layout_share,
            "n_shown": int(gain.is_layout[:SHOWN].sum()),
            "n_features": [int(side.sum()) for side in layout],
            "value_without": own_mean,
            "baseline_without": other_mean,
            "change_without": _difference(own_mean, other_mean),
        }
    return entry


def _difference(own: float | None, other: float | None) -> float | None:
    return None if own is None or other is None else own - other


def _layout(own: Run, other: Run) -> tuple[Tensor, Tensor] | None:
    columns = [run.features.get("layout_share") for run in (own, other)]
    if columns[0] is None or columns[1] is None:
        return None
    return is_layout_feature(columns[0]), is_layout_feature(columns[1])


def _feature(
    place: int,
    name: str,
    gain: Gain,
    cosine_F: Tensor,
    own: Run,
    other: Run,
    files: _Files,
) -> Row:
    number_of, partner = int(gain.feature[place]), int(gain.counterpart[place])
    mine, run = (number_of, own) if number_of >= 0 else (partner, other)
    layout, tokens = run.features.get("layout_share"), files.tokens(run.folder)
    return {
        "feature": number_of if number_of >= 0 else None,
        "counterpart": partner if partner >= 0 else None,
        "cosine": float(cosine_F[number_of]) if min(number_of, partner) >= 0 else None,
        "gain": float(gain.gain[place]),
        "share": float(gain.gain[place]) / gain.change if gain.change else None,
        "value": _known(own.features[name], number_of),
        "baseline": _known(other.features[name], partner),
        "density": float(run.features["density"][mine]),
        "layout_share": None if layout is None else _known(layout, mine),
        "tokens": tokens[mine] if tokens else [],
    }


def _known(column: Tensor, place: int) -> float | None:
    if place < 0 or not torch.isfinite(column[place]):
        return None
    return float(column[place])


# ---------------------------------------------------------------------------------- in words


def gain_words(row: Mapping[str, Any], name: str) -> str:
    """Where the change of a metric lies, in a sentence; empty where it was not worked out."""
    entry = row.get("gain", {}).get("metrics", {}).get(name)
    if entry is None or entry["share"] is None:
        return ""
    if row["deltas"].get(name, {}).get("within_noise"):
        return f"The change in {label(name).name} is within noise: there is nothing to share out."
    shown, total = entry["shown"], entry["n_features"]
    text = f"{shown} of {total:,} features make {_percent(entry['share'])} of the change in "
    text += label(name).name
    layout = entry["layout"]
    if layout is None:
        return f"{text}."
    text += f", {layout['n_shown']} of them layout (line ends, punctuation, headings)"
    if layout["change_without"] is not None:
        text += (
            f"; layout features make {_percent(layout['share'])}, and without them "
            f"{name} goes {number(layout['baseline_without'])} -> "
            f"{number(layout['value_without'])} ({layout['change_without']:+.3f})"
        )
    return f"{text}."


def gain_columns(group: Mapping[str, Any]) -> Row:
    """What the table of a comparison has of it."""
    columns: Row = {}
    for name, entry in group["gain"].get("metrics", {}).items():
        layout = entry["layout"] or {}
        columns |= {
            f"{name}_baseline_median": group["baseline_medians"].get(name),
            f"{name}_gain_half": entry["half"],
            f"{name}_gain_share_of_{entry['shown']}": entry["share"],
            f"{name}_gain_layout_share": layout.get("share"),
            f"{name}_delta_without_layout": layout.get("change_without"),
        }
    return columns


def not_measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line where layout was not measured; empty where it was."""
    entries = [e for row in rows for e in row.get("gain", {}).get("metrics", {}).values()]
    return NOT_MEASURED if any(entry["layout"] is None for entry in entries) else ""


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.0f} %"


CAPTION = (
    "A mean over features is a sum of parts, one a feature: its share of the energy times its own "
    "value. Gain: that part less the part of the baseline's counterpart, the feature with the "
    "nearest decoder direction, one to one (cosine 0.5 at least); one without a counterpart gains "
    "all its part, and what only the baseline has is lost. Gains add up to the change. Layout: "
    "the share of a feature's activation on line ends, punctuation, headings and names in "
    "capitals; of the embedded plays, dataset=speech is the text without them."
)
HEAD = (
    "Feature",
    "counterpart",
    "cosine",
    "gain",
    "share",
    "metric",
    "density",
    "layout",
    "tokens",
)


def gain_table(entry: Mapping[str, Any]) -> list[list[str]]:
    """The features that are named, under HEAD."""
    return [
        [
            "gone" if f["feature"] is None else str(f["feature"]),
            "none" if f["counterpart"] is None else str(f["counterpart"]),
            number(f["cosine"]) if f["cosine"] is not None else "",
            f"{f['gain']:+.4f}",
            _percent(f["share"]),
            f"{number(f['baseline'])} -> {number(f['value'])}",
            number(f["density"]),
            number(f["layout_share"]),
            " ".join(_shown(text) for text in f["tokens"]),
        ]
        for f in entry["features"]
    ]


def _shown(text: str) -> str:
    """A token alone with its white space shown."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
