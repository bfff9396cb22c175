"""One feature of a run, all of them as a table, and a run in six lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tcsae.base.frames import data_frame
from tcsae.base.labels import interval_text, number
from tcsae.config import Config, LoadedConfig
from tcsae.data.token_text import pieces
from tcsae.measure.analysis import Analysis
from tcsae.measure.strips import STYLE, Strip, visible

if TYPE_CHECKING:
    from pandas import DataFrame

_SHOWN = ("density", "mean_activation", "rho_1", "C_8", "L_8", "run_length", "omega_squared")


@dataclass(frozen=True, eq=False, repr=False)
class Feature:
    """What was measured of one feature."""

    number: int
    values: dict[str, float]
    """Every scalar of the suite by name; NaN where there is no value."""
    rho: Tensor
    """[K + 1] autocorrelation by lag, in tokens."""
    tokens: list[str]
    """That set it apart, best first; [] without an analysis."""
    cluster: str | None
    """The name of its cluster; None: it is in none, or there is no analysis."""
    contexts: list[Strip]
    """Where it fires most strongly on held-out text; [] without an analysis."""

    def __repr__(self) -> str:
        tokens = " ".join(repr(text) for text in self.tokens)
        lines = [f"feature {self.number}" + (f" ({self.cluster})" if self.cluster else "")]
        if tokens:
            lines.append(f"  tokens: {tokens}")
        known = [name for name in _SHOWN if name in self.values]
        lines.append("  " + ", ".join(f"{name} {number(self.values[name])}" for name in known))
        if self.contexts:
            lines.append(f"  {len(self.contexts)} top contexts in .contexts")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        strips = "".join(strip.html() for strip in self.contexts)
        return f"{STYLE}<pre>{escape(repr(self))}</pre>{strips}"


def feature_of(
    feature: int, per_feature: Mapping[str, Tensor], analysis: Analysis | None
) -> Feature:
    """One feature; its number must be there."""
    values = {name: float(v[feature]) for name, v in per_feature.items() if v.ndim == 1}
    tokens: list[str] = []
    cluster = None
    if analysis is not None:
        columns = analysis.specialization["features"]
        tokens = columns["top_tokens"][feature]
        if (own := columns["cluster"][feature]) >= 0:
            cluster = analysis.specialization["clusters"][own]["name"]
    contexts = [] if analysis is None else top_strips(feature, analysis)
    return Feature(feature, values, per_feature["rho"][:, feature], tokens, cluster, contexts)


def top_strips(feature: int, analysis: Analysis) -> list[Strip]:
    """The contexts in which a feature is strongest, strongest first."""
    top = analysis.top_contexts
    rows = (top["features"] == feature).nonzero().flatten().tolist()
    if not rows:
        return []
    texts = analysis.top_tokens["tokens"]
    parts = {i: bytes.fromhex(part) for i, part in analysis.top_tokens.get("parts", {}).items()}
    found = []
    for entry, context in enumerate(top["context"][rows[0]].tolist()):
        if context < 0:
            continue
        ids = [str(i) for i in top["ids"][context].tolist()]
        tokens = [texts[i] for i in ids]
        found.append(
            Strip(
                feature,
                top["rows"][rows[0], entry].float(),
                tokens,
                pieces(tokens, [parts.get(i) for i in ids]),
                top["valid"][context].bool(),
                f"in held-out context {int(top['number'][context])}",
            )
        )
    return found


def table_of(per_feature: Mapping[str, Tensor], analysis: Analysis | None) -> DataFrame:
    """A row a feature. Raises UserError without pandas."""
    columns: dict[str, Any] = {
        name: value.numpy() for name, value in per_feature.items() if value.ndim == 1
    }
    if analysis is not None:
        known = analysis.specialization["features"]
        names = [cluster["name"] for cluster in analysis.specialization["clusters"]]
        columns["cluster"] = [names[c] if c >= 0 else None for c in known["cluster"]]
        columns["tokens"] = [" ".join(map(visible, own)) for own in known["top_tokens"]]
    table = data_frame(columns, "run.per_feature has the same numbers")
    table.index.name = "feature"
    return table


def in_six_lines(folder: Path, config: Config | LoadedConfig, info: Mapping[str, Any]) -> str:
    """What a run is and came to, in the few numbers that people look at first."""
    metrics = {k: v for group in info.get("metrics", {}).values() for k, v in group.items()}
    summary = info.get("consistency", {}).get("metrics", {})
    if isinstance(config, Config):
        form = config.loss_words
        how = f"{form}, window {config.window}, lambda {config.lambda_:g}, seed {config.seed}"
    else:
        how = f"loaded from {config.source.folder}"
    kept = ("explained_variance", "l0", "ce_loss_score")
    lines = [
        f"run in {folder}",
        f"  {config.model.name}, block {info.get('layer')}, {config.model.hook}; "
        f"text {config.dataset.path or config.dataset.name}",
        f"  {config.sae.architecture}, {config.sae.d_sae:,} features; {how}",
        "  " + ", ".join(f"{name} {number(metrics.get(name))}" for name in kept),
        "  " + (", ".join(_measured(summary)) or "no consistency was measured"),
        "  .features(text)  .table()  .feature(j)  .sae  .per_feature  .consistency",
    ]
    return "\n".join(lines)


def _measured(summary: Mapping[str, Any]) -> list[str]:
    window = "8" if "C_8" in summary else max(_windows(summary), key=int, default="8")
    names = [f"C_{window}", f"L_{window}", "rho_1", "omega_squared"]
    names = [name for name in names if name in summary]
    found = []
    for name in names:
        entry = summary[name]
        band = interval_text(entry["energy_weighted_interval"])
        found.append(f"{name} {number(entry['energy_weighted'])} {band}".rstrip())
    return found


def _windows(summary: Mapping[str, Any]) -> list[str]:
    parts = (name.partition("_") for name in summary)
    return [window for kind, _, window in parts if kind == "C" and window.isdigit()]
