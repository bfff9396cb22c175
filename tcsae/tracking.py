"""Where metrics go: metrics.jsonl always, Weights & Biases if wanted. W&B never stops training."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tcsae.config import Config, run_id, run_name
from tcsae.files import disk_errors, write_text

log = logging.getLogger(__name__)


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


class WeightsAndBiases:
    """A W&B run that goes on under the same id after a restart; every failure is a warning."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.run: Any = None
        self.failed = config.tracking.mode == "disabled"
        self._try(lambda: self._start(config, folder))

    def _start(self, config: Config, folder: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        (folder / "wandb").mkdir(exist_ok=True)
        self.run = wandb.init(
            mode=config.tracking.mode,
            project=config.tracking.project,
            entity=config.tracking.entity,
            id=run_id(config),
            resume="allow",
            name=config.name or run_name(config),
            dir=folder,
            config=config.dump(),
            tags=[config.sae.architecture, config.consistency.form, config.dataset.name],
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        self.run.define_metric("*", step_metric="training_step")

    def _try(self, action: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            said = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning(f"W&B is off for the rest of this run ({said})")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._try(lambda: self.run.log({"training_step": step, **metrics}))

    def summary(self, values: dict[str, Any]) -> None:
        self._try(lambda: self.run.summary.update(values))

    def pages(self, figures: Mapping[str, Any], table: Mapping[str, Sequence[Any]]) -> None:
        """Plotly figures by name, and a table given by its columns."""
        self._try(lambda: self._send_pages(figures, table))

    def _send_pages(self, figures: Mapping[str, Any], table: Mapping[str, Sequence[Any]]) -> None:
        import wandb

        rows = [list(row) for row in zip(*table.values(), strict=True)]
        sent: dict[str, Any] = {f"report/{k}": wandb.Plotly(v) for k, v in figures.items()}
        sent["report/features"] = wandb.Table(columns=list(table), data=rows)
        self.run.log(sent)

    def finish(self, exit_code: int) -> None:
        self._try(lambda: self.run.finish(exit_code=exit_code))


class Tracker:
    """Both of them, as the trainer's `MetricsLog`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.lines = JsonLines(folder / "metrics.jsonl")
        self.wandb = WeightsAndBiases(config, folder)

    def rewind(self, step: int) -> None:
        self.lines.rewind(step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.lines.log(metrics, step)
        self.wandb.log(metrics, step)

    def summary(self, values: dict[str, Any]) -> None:
        self.wandb.summary(values)

    def pages(self, figures: Mapping[str, Any], table: Mapping[str, Sequence[Any]]) -> None:
        self.wandb.pages(figures, table)

    def finish(self, exit_code: int) -> None:
        self.wandb.finish(exit_code)
