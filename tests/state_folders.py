"""Run and sweep folders with nothing but what `python -m tcsae.status` reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tcsae.runs.state import RunState

NOW = 2e9


def write_state(folder: Path, **changes: Any) -> Path:
    """A run that works on another machine, or whatever `changes` say."""
    state = RunState(
        state="running", stage="train", done=250, total=1000, rate=10.0, seconds_left=75.0,
        host="elsewhere", pid=1, attempt=1, started=NOW - 60, updated=NOW,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps(asdict(state) | changes))
    return folder


def write_metrics(folder: Path, *lines: dict[str, Any] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(texts))
    return folder


def write_final(folder: Path, **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "final_info.json").write_text(json.dumps(content))
    return folder


def write_sweep(folder: Path, names: list[str], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        {"number": n, "run_id": f"id{n}", "name": name, "overrides": [], "folder": f"run-{n}"}
        for n, name in enumerate(names)
    ]
    content = {
        "name": "grid", "created": NOW, "command": ["--multirun"], "launcher": "slurm",
        "jobs": jobs, "submissions": [],
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(content | changes))
    return folder
