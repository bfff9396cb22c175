"""Where metrics go: metrics.jsonl always, Weights & Biases if wanted. W&B never stops training."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tcsae.base.files import disk_errors, write_text
from tcsae.base.labels import window_part
from tcsae.base.run_files import NOTES, REPORT, STABILITY, RunFiles
from tcsae.config import AVERAGED, Config, TrackingConfig, run_id, run_name
from tcsae.jobs.wandb_run import WandbRun
from tcsae.report.compare_page import heat_map, stream_figures
from tcsae.report.comparison import Comparison
from tcsae.report.gain import gain_columns
from tcsae.report.stability import stability_columns

_TAG_LENGTH = 64
_NAME_LENGTH = 128
_RUN = RunFiles("")
_REPORT_FILES = tuple(
    path.as_posix()
    for path in (
        _RUN.report,
        _RUN.report_features / "*" / "*.js",
        _RUN.notes,
        _RUN.config,
        _RUN.final_info,
        _RUN.eval.path / "*.json",
    )
)
_COMPARISON_FILES = ("comparison.*", REPORT, NOTES, STABILITY)


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, with the step it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop lines after `step`, and a last line that a kill cut short; returns what is left."""
        if not self.path.exists():
            return []
        kept, rows = [], []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
                rows.append(row)
        write_text(self.path, "".join(kept))
        return rows

    def log(self, metrics: dict[str, float], step: int) -> None:
        # JSON has no NaN; a metric that has no value in this batch is null.
        known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = json.dumps({"step": step, **known}, allow_nan=False) + "\n"
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)


# ---------------------------------------------------------------------------------- one run


def run_tags(config: Config) -> list[str]:
    """What runs are filtered by in W&B: what it is made of, its part in the experiment, the user's
    own."""
    consistency = config.consistency
    tags = [
        config.sae.architecture,
        consistency.form,
        config.dataset.name,
        Path(config.model.name).name,
    ]
    if config.averaged:
        tags.append(AVERAGED)
    elif consistency.form == "none" or config.lambda_ == 0:
        tags.append("baseline")
    if consistency.shuffle_positions:
        tags.append("shuffled control")
    return list(dict.fromkeys(tag[:_TAG_LENGTH] for tag in [*tags, *config.tracking.tags]))


def searchable(config: Config, folder: Path) -> dict[str, Any]:
    """The config as W&B gets it: config.json's keys, and numbers to plot over.

    `window` is a number always: document is as long as a context. `window_option` is the window as
    it was given.
    """
    is_number = isinstance(config.window, int)
    return config.dump() | {
        "window": config.window if is_number else config.dataset.context_size,
        "window_option": str(config.window),
        "run_id": run_id(config),
        "run_folder": str(Path(folder).resolve()),
    }


def training_run(config: Config, folder: Path) -> WandbRun:
    """The W&B run of a job."""
    return WandbRun(
        config.tracking,
        folder,
        id=run_id(config),
        name=(config.name or run_name(config))[:_NAME_LENGTH],
        job_type="train",
        tags=run_tags(config),
        config=searchable(config, folder),
    )


class Tracker:
    """metrics.jsonl and W&B, as the trainer's `MetricsLog`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, Path(folder)
        self.lines = JsonLines(RunFiles(self.folder).metrics)
        self.wandb = training_run(config, self.folder)

    def rewind(self, step: int) -> None:
        self.wandb.catch_up(self.lines.rewind(step))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.lines.log(metrics, step)
        self.wandb.log(metrics, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.wandb.summary(values)

    def pages(self, figures: Mapping[str, Any], table: Mapping[str, Sequence[Any]]) -> None:
        """The report's figures by name, and its table of features by columns."""
        named = {f"report/{name}": figure for name, figure in figures.items()}
        # After the last step: a run that was killed while it was evaluated has logged that one.
        self.wandb.pages(named, {"report/features": table}, self.config.steps + 1)

    def files(self) -> None:
        """The SAE and the report as artifacts."""
        if not self.config.tracking.artifacts:
            return
        shown = searchable(self.config, self.folder)
        about = {k: shown[k] for k in ("run_id", "run_folder", "layer", "window", "lambda")}
        about |= {
            "model": self.config.model.name,
            "dataset": self.config.dataset.name,
            "architecture": self.config.sae.architecture,
            "d_sae": self.config.sae.d_sae,
            "consistency": self.config.consistency.form,
            "shuffle_positions": self.config.consistency.shuffle_positions,
        }
        self.wandb.artifact("sae", RunFiles(self.folder).sae, ["*"], about)
        self.wandb.artifact("report", self.folder, _REPORT_FILES, about)

    def finish(self, exit_code: int) -> None:
        """The end; with `exit_code` 0 the run is done, and its files go along."""
        if exit_code == 0:
            self.files()
        self.wandb.finish(exit_code)


# ------------------------------------------------------------------------------- a comparison


def comparison_id(group: str) -> str:
    """The id of a sweep's comparison run: the same whenever the sweep is compared."""
    return f"comparison-{hashlib.sha256(group.encode()).hexdigest()[:10]}"


def comparison_columns(comparison: Comparison) -> dict[str, list[Any]]:
    """A row for each setting: what it is, its metrics with their intervals, and what the headline
    metrics differ by from the baseline's at matched L0."""
    groups = comparison.groups
    settings = dict.fromkeys(key for group in groups for key in group["settings"])
    columns: dict[str, list[Any]] = {
        "setting": [group["label"] for group in groups],
        "stream": [group["stream"] for group in groups],
        "seeds": [" ".join(map(str, group["seeds"])) for group in groups],
    }
    for key in settings:
        values = [group["settings"].get(key) for group in groups]
        as_text = any(isinstance(value, str) for value in values)
        columns[key] = [str(v) if as_text and v is not None else v for v in values]
    for name in comparison.metrics:
        for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            columns[name + suffix] = [group["metrics"][name][end] for group in groups]
    for name in comparison.headline:
        differences = [group["deltas"].get(name, {}).get("value") for group in groups]
        columns[f"delta_{name}"] = differences
        for mark in ("seed_smallest", "within_seed_noise"):
            columns[f"delta_{name}_{mark}"] = [g["deltas"].get(name, {}).get(mark) for g in groups]
    more = [stability_columns(group) | _medians(group) | gain_columns(group) for group in groups]
    for name in dict.fromkeys(name for row in more for name in row):
        columns[name] = [row.get(name) for row in more]
    return columns


def _medians(group: Mapping[str, Any]) -> dict[str, Any]:
    """Beside the means over features of C_W, D_W and L_W."""
    return {f"{n}_median": value for n, value in group["medians"].items() if window_part(n)}


def comparison_figures(comparison: Comparison) -> dict[str, Any]:
    """The figures of the comparison's page by their names there, and a heat map for every C_W and
    L_W."""
    content = comparison.to_json()
    memory = [name for name in content["metrics"] if (p := window_part(name)) and p.kind != "D"]
    figures: dict[str, Any] = {}
    for stream in content["streams"]:
        groups, grids = (
            [entry for entry in content[kind] if entry["stream"] == stream["id"]]
            for kind in ("groups", "grids")
        )
        drawn = {
            f"grid-{index}-{name}": heat_map(grid, name, groups)
            for index, grid in enumerate(grids)
            for name in memory
        }
        drawn |= stream_figures(groups, grids, content)
        figures |= {f"s{stream['id']}-{name}": figure for name, figure in drawn.items()}
    return figures


def send_comparison(
    comparison: Comparison, folder: Path, tracking: TrackingConfig, group: str
) -> None:
    """A sweep's comparison as a run of its group, which sending it again resumes.

    It has the page's figures (heat maps over window and lambda, L0 against quality) under
    `comparison/`, the table `comparison/settings`, and the files of `folder` as an artifact. Every
    failure is a warning.

    Args:
        folder: where `tcsae.compare.write_comparison` wrote it.
        tracking: as the sweep's jobs have it.
        group: the sweep.
    """
    run = WandbRun(
        tracking.model_copy(update={"group": group[:_NAME_LENGTH]}),
        folder,
        id=comparison_id(group),
        name=f"comparison of {group}"[:_NAME_LENGTH],
        job_type="comparison",
        tags=list(dict.fromkeys(["comparison", *tracking.tags])),
        config={"run_folder": str(Path(folder).resolve()), "sweep": group},
    )
    run.attempt(lambda: _send_comparison(run, comparison, group))
    run.finish(exit_code=0)


def _send_comparison(run: WandbRun, comparison: Comparison, group: str) -> None:
    figures = {f"comparison/{k}": v for k, v in comparison_figures(comparison).items()}
    tables = {"comparison/table": comparison_columns(comparison)}
    # Sending it again must have a larger step, whatever W&B knows of the last time.
    run.pages(figures, tables, step=int(time.time()))
    n_used = sum(run["status"] == "used" for run in comparison.runs)
    run.summary({"comparison/n_runs": n_used, "comparison/n_settings": len(comparison.groups)})
    if run.tracking.artifacts:
        run.artifact("comparison", run.folder, _COMPARISON_FILES, {"sweep": group})
