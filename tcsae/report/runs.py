"""Finished runs as a comparison needs them: found in folders, read, and told apart by settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.base.labels import HEADLINE, SINGLES, window_part
from tcsae.base.run_files import AnalysisFiles, RunFiles, runs_below
from tcsae.config import AVERAGED, Config, LoadedConfig, identity
from tcsae.metrics.truth import flat_truth
from tcsae.metrics.units import Units, jackknife_draws
from tcsae.report.draws import core_draws
from tcsae.runs.folder import LoadedRun, load_run

CORE = (
    *HEADLINE,
    "ce_loss_with_sae",
    "kl_div_with_sae",
    "mse",
    "cossim",
    "relative_reconstruction_bias",
    "l1",
)
FROM_ANALYSIS = {
    "redundant_share": ("redundancy", "redundant"),
    "twinned_share": ("redundancy", "twins"),
    "effective_rank": ("redundancy",),
    "modularity_excess": ("specialization", "summary"),
    "ari_halves": ("specialization", "summary"),
}
"""Metric: file of the analysis, and where in it."""

SPARSITY_KEYS = ("sae.k", "sae.l1_coefficient", "sae.l0_coefficient", "training.target_l0")
TEMPORAL_KEYS = ("consistency", "window", "lambda", "training.lambda_warmup")
_DEVICES = ("model.device", "model.device_map", "training.device")
_NO_RESULT_KEYS = ("seed", "evaluation", *_DEVICES, "model.forward_contexts")
LOADED = "loaded from"
"""The setting that only SAEs have that were not trained here."""
_ADVICE = "run its command again with rerun=true"
OLDER = (
    "evaluated by an older version, whose intervals drew contexts where documents are the unit; "
    "run its command again with rerun=true"
)


@dataclass(frozen=True)
class Run:
    """A finished run without its weights."""

    name: str
    folder: Path
    config: Config | LoadedConfig
    place: dict[str, Any]
    """model, hook_name, layer, d_in, dataset, context_size, n_documents (None: not known),
    n_contexts, n_tokens, n_model_tokens, held_out (a digest of the contexts; None: not known)."""
    contexts: Tensor
    """[2, N] valid tokens of every held-out context, and the sum of their norms."""
    values: dict[str, Tensor]
    """Every metric (0-dimensional), and the curve `autocorrelation` [K + 1]; NaN: none."""
    draws: dict[str, Tensor]
    """Draws of the error around the same, [R, ...]; absent where there is no interval."""
    reasons: dict[str, str]
    """Why a metric is NaN."""
    interval_reason: str
    """Why `draws` lacks a metric."""
    medians: dict[str, float | None]
    features: dict[str, Tensor]
    """[F] each: density, contexts_on, c0, rho_1, omega_squared, every C_W, D_W and L_W, and, where
    it was measured, layout_share; profile_rate [T, F]."""
    top: dict[str, float | None] = field(default_factory=dict)
    """The 99th percentile over features of consistency metrics."""
    energy_by_position: list[float | None] = field(default_factory=list)
    """[T], relative to the mean from position 8 on; empty if it was not measured."""
    paired_positions: bool = True
    """omega_squared is from pairs of contexts; else it is too low for features that last."""
    by_density: dict[str, Tensor] = field(default_factory=dict)
    """Sums over features of alike density (`ConsistencySuite.by_density`); empty: not kept."""
    intervals: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Ends of the run's own intervals, and of the band of `autocorrelation`."""

    @property
    def seed(self) -> int | None:
        """None: the SAE was not trained here."""
        return None if isinstance(self.config, LoadedConfig) else self.config.seed

    def basis(self, name: str) -> int | None:
        """What a metric was measured on, where that can differ within a stream."""
        return self.place["n_model_tokens"] if name.startswith(("ce_", "kl_")) else None


# ------------------------------------------------------------------------------- in folders


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """Folders of runs that were begun, in the order given, those of a sweep by name.

    Raises UserError for a folder that is not there, or holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        runs = [run for run in runs_below(folder) if RunFiles(run).is_begun]
        if not runs:
            raise UserError(f"{folder} is neither a run nor a sweep (no config.json in it)")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


# ------------------------------------------------------------------------------------- read


def read_run(folder: Path) -> Run:
    """Raises UserError, in one line, for a run that has not finished or is damaged."""
    try:
        loaded = load_run(folder)
        return _run_of(loaded, folder)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder} is damaged ({said}); {_ADVICE}") from None


def _run_of(loaded: LoadedRun, folder: Path) -> Run:
    config = loaded.config
    summary = loaded.consistency["summary"]
    sums = loaded.per_context.items()
    kinds = {
        kind: {k.split(".")[1]: v for k, v in sums if k.startswith(f"{kind}.")}
        for kind in ("reconstruction", "model")
    }
    values, reasons = _core_values(loaded.core)
    medians: dict[str, float | None] = {}
    top: dict[str, float | None] = {}
    for name, entry in _consistency_entries(summary):
        values[name] = _number(entry["energy_weighted"])
        medians[name] = entry.get("median")
        top[name] = entry.get("q99")
        if entry["reason"]:
            reasons[name] = entry["reason"]
    values["autocorrelation"] = torch.stack([_number(x) for x in summary["autocorrelation"]["rho"]])
    for name, (value, reason) in _analysis_values(RunFiles(folder).analysis).items():
        values[name] = _number(value)
        reasons |= {name: reason} if reason else {}
    if (truth := loaded.final_info.get("truth")) is not None:
        values |= {name: _number(value) for name, value in flat_truth(truth).items()}
    draws, why = _draws(loaded, kinds)
    for name, number, drawn in _of_instruments(loaded):
        values[name] = number
        if drawn is not None:
            draws[name] = drawn
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        place=_place(loaded, kinds),
        contexts=torch.stack([kinds["reconstruction"][k] for k in ("n_tokens", "l2_norm_in")]),
        values=values,
        draws=draws,
        reasons=reasons,
        interval_reason=why,
        medians=medians,
        features=_features(loaded.per_feature),
        top=top,
        energy_by_position=summary.get("energy_by_position", []),
        paired_positions="energy_by_position" in summary,
        by_density={k: v.double() for k, v in loaded.by_density.items()},
        intervals=_intervals(loaded) if draws else {},
    )


def _number(value: float | None) -> Tensor:
    return torch.tensor(math.nan if value is None else value, dtype=torch.float64)


def _core_values(core: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    flat = {k: v for group in core["eval_result_metrics"].values() for k, v in group.items()}
    missing = core["eval_result_unstructured"]["missing"]
    reasons = {path.split(".")[-1]: reason for path, reason in missing.items()}
    return {name: _number(flat[name]) for name in CORE}, reasons


def _consistency_entries(summary: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from summary["metrics"].items()
    for name in SINGLES:
        if name in summary:
            entry = summary[name]
            yield name, {"energy_weighted": entry["value"], "reason": entry["reason"]}


def _analysis_values(files: AnalysisFiles) -> dict[str, tuple[float | None, str | None]]:
    # Not `LoadedRun.analysis`, which reads the large tensors too.
    if not files.redundancy.is_file():
        return {}
    content = {
        "redundancy": read_json(files.redundancy),
        "specialization": read_json(files.specialization),
    }
    found = {}
    for name, (file, *path) in FROM_ANALYSIS.items():
        entry = content[file]
        for key in path:
            entry = entry[key]
        found[name] = (entry[name], entry.get(f"{name}_reason"))
    return found


def _draws(
    loaded: LoadedRun, kinds: Mapping[str, Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], str]:
    """Draws of every metric, and why there are none of the suite's."""
    summary = loaded.consistency["summary"]
    if "n_documents" not in summary:
        return {}, OLDER
    sums, n_draws = loaded.per_context, loaded.config.evaluation.bootstrap
    units, through_model = Units(sums["document"]), sums["model_context"].long()
    named = kinds["reconstruction"], kinds["model"]
    draws = core_draws(*named, loaded.sae.d_in, n_draws, units, through_model)
    for name, value in loaded.draws.items():
        whole = value.ndim == 1 or name == "autocorrelation"
        draws[name] = (value if whole else value[:, 0]).double()
    known = {name: value for name, value in draws.items() if value.isfinite().any()}
    return known, summary["interval_reason"] or ""


def _of_instruments(loaded: LoadedRun) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, value, and draws of its error, of the headlines of meaning.json."""
    for part in loaded.meaning.values():
        for name, entry in part["headline"].items():
            number, without = _number(entry["value"]), entry.get("replicates")
            drawn = None
            if without:
                each = torch.tensor(without, dtype=torch.float64)
                drawn = jackknife_draws(each, number, loaded.config.evaluation.bootstrap)
            yield name, number, drawn


def _intervals(loaded: LoadedRun) -> dict[str, tuple[Tensor, Tensor]]:
    summary, curve = loaded.consistency["summary"], loaded.consistency["summary"]["autocorrelation"]
    ends: dict[str, Any] = dict(loaded.core["eval_result_unstructured"]["intervals"])
    ends |= {n: e["energy_weighted_interval"] for n, e in summary["metrics"].items()}
    ends |= {name: summary[name]["interval"] for name in SINGLES if name in summary}
    found = {n: (_number(e[0]), _number(e[1])) for n, e in ends.items() if None not in e}
    low, high = (torch.stack([_number(x) for x in curve[key]]) for key in ("low", "high"))
    named = [item for part in loaded.meaning.values() for item in part["headline"].items()]
    found |= {
        n: (_number(e["interval"][0]), _number(e["interval"][1]))
        for n, e in named
        if None not in e["interval"]
    }
    return found | {"autocorrelation": (low, high)}


def _features(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = ("density", "contexts_on", "c0", "rho_1", "omega_squared", "profile_rate")
    wanted = (*plain, "layout_share")
    kept = [name for name in columns if name in wanted or window_part(name)]
    return {name: columns[name].double() for name in kept}


def _place(loaded: LoadedRun, kinds: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    config, core = loaded.config, loaded.core
    path = config.dataset.path
    return {
        "model": config.model.name,
        "hook_name": core["eval_config"]["hook_name"],
        "layer": loaded.final_info["layer"],
        "d_in": loaded.sae.d_in,
        "dataset": config.dataset.name if path is None else f"{config.dataset.name} ({path})",
        "context_size": config.dataset.context_size,
        "n_documents": loaded.consistency["summary"].get("n_documents"),
        "n_contexts": loaded.consistency["summary"]["n_contexts"],
        "n_tokens": loaded.consistency["summary"]["n_valid_tokens"],
        "n_model_tokens": int(kinds["model"]["n_tokens"].sum()),
        "held_out": _held_out(loaded.folder),
    }


def _held_out(folder: Path) -> str | None:
    """The digest of the contexts that were measured on, of a run that kept it."""
    file = RunFiles(folder).content
    return read_json(file).get("held_out_contexts") if file.is_file() else None


# --------------------------------------------------------------------------------- settings


def settings_of(config: Config | LoadedConfig) -> dict[str, Any]:
    """Flat dotted settings that determine what is trained, but for the seed; of an SAE that was
    loaded instead, what is known of it, with LOADED and no temporal loss, not even "none".

    Without a temporal loss its other options mean nothing: they are left out, `consistency` is
    "none" and `lambda` 0, whatever the config says. What was trained on means has no loss either:
    its `consistency` is AVERAGED, so that it is compared with the same on single tokens.
    """
    settings = dict(flat(identity(config)))
    for key in list(settings):
        if key.startswith(tuple(f"{k}." for k in _NO_RESULT_KEYS)) or key in _NO_RESULT_KEYS:
            del settings[key]
    if isinstance(config, LoadedConfig):
        del settings["window"]
        return settings | {LOADED: config.source.title}
    scaled = settings["consistency.scale_by_window"]
    for key in [key for key in settings if key.startswith("consistency.")]:
        del settings[key]
    consistency = config.consistency
    if consistency.form == "none" or config.lambda_ == 0:
        for key in TEMPORAL_KEYS:
            settings.pop(key, None)
        if (kind := settings.pop("training.average", None)) is not None:
            window = config.window if kind == "window" else "document"
            return settings | {"consistency": AVERAGED, "window": window, "lambda": 0.0}
        return settings | {"consistency": "none", "lambda": 0.0}
    if consistency.form == "slow":
        settings["window"] = 2  # neighbours, whatever the window is
    name = consistency.label + (" / W" if scaled else "")
    if consistency.shuffle_positions:
        is_usual = consistency.form == "scale_free"
        name = name.replace("scale_free", "shuffled", 1) if is_usual else f"shuffled {name}"
    return settings | {"consistency": name}


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def key_of(settings: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Settings, some left out, as text to compare by."""
    return json.dumps({k: v for k, v in settings.items() if k not in without}, sort_keys=True)


def same_stream(first: Run, second: Run) -> bool:
    """One model, hook and set of held-out contexts: the activations themselves are compared."""
    names = ("model", "hook_name", "d_in", "context_size")
    if any(first.place[n] != second.place[n] for n in names):
        return False
    digests = first.place.get("held_out"), second.place.get("held_out")
    if None not in digests and digests[0] != digests[1]:
        return False
    mine, theirs = first.contexts, second.contexts
    return (
        mine.shape == theirs.shape
        and bool((mine[0] == theirs[0]).all())
        and torch.allclose(mine[1], theirs[1], rtol=1e-3)
    )
