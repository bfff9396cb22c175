"""Where metrics go: metrics.jsonl always, Weights & Biases if wanted. W&B never stops training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tcsae.base.files import disk_errors, read_json, write_json, write_text
from tcsae.base.labels import window_part
from tcsae.base.run_files import NOTES, REPORT, RunFiles
from tcsae.config import Config, TrackingConfig, run_id, run_name
from tcsae.report.compare_page import heat_map, stream_figures
from tcsae.report.comparison import Comparison

log = logging.getLogger(__name__)

STEP = "training_step"
"""The metric that all others are drawn over."""
_TAG_LENGTH = 64
_NAME_LENGTH = 128
_RUN = RunFiles("")
_REPORT_FILES = tuple(
    path.as_posix()
    for path in (_RUN.report, _RUN.notes, _RUN.config, _RUN.final_info, _RUN.eval.path / "*.json")
)
_COMPARISON_FILES = ("comparison.*", REPORT, NOTES)


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, with the step it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop lines after `step`, and a last line that a kill cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                continue
        write_text(self.path, "".join(kept))

    def log(self, metrics: dict[str, float], step: int) -> None:
        # JSON has no NaN; a metric that has no value in this batch is null.
        known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = json.dumps({"step": step, **known}, allow_nan=False) + "\n"
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)


class WandbRun:
    """A W&B run that goes on under its id after a restart. Its first failure is one warning, after
    which it does nothing.

    Args:
        tracking: mode, project, entity, group.
        folder: W&B writes to `wandb/` in it.
        about: id, name, job_type, tags, config: as in `wandb.init`.
    """

    def __init__(self, tracking: TrackingConfig, folder: Path, **about: Any) -> None:
        self.tracking, self.folder, self.id = tracking, Path(folder), about["id"]
        self.run: Any = None
        self.failed = tracking.mode == "disabled"
        self.attempt(lambda: self._start(about))

    def _start(self, about: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            mode=self.tracking.mode,
            project=self.tracking.project,
            entity=self.tracking.entity,
            group=self.tracking.group,
            resume="allow",
            dir=self.folder,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=60,
                # Without a network, W&B would wait for it for ever; `wandb sync` sends the rest.
                finish_timeout=300,
                # The runs of a bank live in one process.
                reinit="create_new",
            ),
            **about,
        )
        self.run.define_metric("*", step_metric=STEP)

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do something with W&B; a failure of it is the warning."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            said = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning(f"W&B is off for the rest of this run ({said})")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """A row of the history. W&B drops one whose step it has or has passed: what a restarted
        run repeats is the same."""
        self.attempt(lambda: self.run.log({STEP: step, **values}, step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.attempt(lambda: self.run.summary.update(values))

    def pages(
        self,
        figures: Mapping[str, Any],
        tables: Mapping[str, Mapping[str, Sequence[Any]]],
        step: int,
    ) -> None:
        """Plotly figures, and tables given by their columns, all by their names in W&B."""
        self.attempt(lambda: self._send_pages(figures, tables, step))

    def _send_pages(
        self,
        figures: Mapping[str, Any],
        tables: Mapping[str, Mapping[str, Sequence[Any]]],
        step: int,
    ) -> None:
        import wandb

        sent: dict[str, Any] = {name: wandb.Plotly(figure) for name, figure in figures.items()}
        for name, columns in tables.items():
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            sent[name] = wandb.Table(columns=list(columns), data=rows)
        with self._staging():
            self.run.log({STEP: step, **sent}, step=step)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[None]:
        """W&B copies a table to the home folder of the machine that made it, where `wandb sync` on
        another one does not find it; here, to the run's own folder."""
        name = "WANDB_DATA_DIR"
        if name in os.environ:
            yield
            return
        os.environ[name] = str((self.folder / "wandb").resolve())
        try:
            yield
        finally:
            del os.environ[name]

    def artifact(
        self, kind: str, folder: Path, patterns: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        """Files of `folder` as the artifact `<kind>-<run id>`, once for each content."""
        self.attempt(lambda: self._send_artifact(kind, folder, patterns, metadata))

    def _send_artifact(
        self, kind: str, folder: Path, patterns: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        import wandb

        name = f"{kind}-{self.id}"
        artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata))
        files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        for path in files:
            # Not copied: an SAE may have gigabytes, and nothing changes it here.
            artifact.add_file(
                str(path.resolve()),
                name=path.relative_to(folder).as_posix(),
                policy="immutable",
                skip_cache=True,
            )
        known = self.folder / "wandb" / "artifacts.json"
        sent = read_json(known) if known.is_file() else {}
        place = f"{self.tracking.mode} {self.tracking.entity}/{self.tracking.project}/{name}"
        if files and sent.get(place) != artifact.digest:
            self.run.log_artifact(artifact)
            write_json(known, sent | {place: artifact.digest})

    def finish(self, exit_code: int) -> None:
        self.attempt(lambda: self.run.finish(exit_code=exit_code))


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
    if consistency.form == "none" or config.lambda_ == 0:
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


def _say_environment(config: Config) -> None:
    """One line for what W&B's environment asks and the config has otherwise: the config wins, so
    that the same command means the same everywhere."""
    tracking = config.tracking
    if tracking.mode == "disabled":
        return
    keys = {
        "WANDB_MODE": ("tracking.mode", tracking.mode),
        "WANDB_PROJECT": ("tracking.project", tracking.project),
        "WANDB_ENTITY": ("tracking.entity", tracking.entity),
        "WANDB_NAME": ("name", config.name),
        "WANDB_TAGS": ("tracking.tags", ",".join(tracking.tags)),
        "WANDB_RUN_GROUP": ("tracking.group", tracking.group),
    }
    # Where these keys are null the client itself takes the environment's.
    obeyed = ("tracking.entity", "tracking.group")
    other = [
        f"{name}={asked} ({key} does it)"
        for name, (key, value) in keys.items()
        if (asked := os.environ.get(name)) and asked != value and (value or key not in obeyed)
    ]
    if other:
        log.warning(f"without effect in the environment: {', '.join(other)}")


class Tracker:
    """metrics.jsonl and W&B, as the trainer's `MetricsLog`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, Path(folder)
        _say_environment(config)
        self.lines = JsonLines(RunFiles(self.folder).metrics)
        self.wandb = training_run(config, self.folder)

    def rewind(self, step: int) -> None:
        self.lines.rewind(step)

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
    return columns


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
