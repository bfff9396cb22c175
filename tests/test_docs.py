"""The pages of docs/: they name every file and key there is, and their links lead somewhere."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY
from run_folders import write_run
from safetensors import safe_open
from test_run_files import names

from tcsae.measure.analysis import Analysis
from tcsae.report.comparison import Comparison
from tcsae.runs.state import RunState

FORMATS = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "golden.json").read_text(encoding="utf-8"))


def of_any_window(name: str) -> str:
    """C_8_sparse is C_W_sparse on the page."""
    return re.sub(r"^([CDL])_\d+", r"\1_W", name)


def in_code(page: str) -> set[str]:
    """Every word of a page that stands between backticks, its dotted and comma-joined parts too."""
    spans = re.findall(r"`([^`\n]+)`", page)
    return {word for span in spans for word in (span, *re.split(r"[^\w.\-]+", span))}


def all_keys(tree: Any, path: str = "") -> set[str]:
    """Dotted paths of the nested keys of golden.json."""
    if isinstance(tree, list):
        return set().union(*(all_keys(inner, path) for inner in tree)) if tree else set()
    if not isinstance(tree, dict):
        return set()
    found = set()
    for key, inner in tree.items():
        found |= {f"{path}{key}"} | all_keys(inner, f"{path}{key}.")
    return found


def missing(wanted: set[str], page: str = FORMATS) -> list[str]:
    known = in_code(page)
    return sorted(name for name in wanted if of_any_window(name) not in known)


def test_the_page_of_files_names_every_file_of_a_run() -> None:
    run, export = GOLDEN["run"]["run_files"], GOLDEN["run"]["export_files"]
    assert len(run) > 20
    assert missing(names() | {Path(name).name for name in (*run, *export)}) == []


def test_a_file_that_the_page_lacks_is_found() -> None:
    """What the other tests rest on."""
    assert missing({"core.json", "C_8"}) == []
    assert missing({"core.jso", "training"}, "`core.json`, in words: training") == [
        "core.jso",
        "training",
    ]


def test_the_page_names_every_key_of_final_info() -> None:
    keys = all_keys(GOLDEN["run"]["final_info"])
    assert {"seconds.shared_by", "seconds.own.clusters"} <= keys
    assert missing({key.rsplit(".", 1)[-1] for key in keys if not key.startswith("seconds.")}) == []
    stages = {key for key in keys if key.startswith("seconds.")}
    assert missing({stage.split(".", 1)[-1].rsplit(".", 1)[-1] for stage in stages}) == []


@pytest.mark.parametrize("file", ["core", "consistency"])
def test_the_page_names_every_key_of_what_is_measured(file: str) -> None:
    keys = {key for key in all_keys(GOLDEN["run"][file]) if not key.startswith("sae_cfg_dict.")}
    # SAEBench's own, and the reasons by dotted path.
    keys = {key for key in keys if not re.match(r"eval_config\.|.*\.(intervals|missing)\.", key)}
    assert len(keys) > 40
    assert missing({key.rsplit(".", 1)[-1] for key in keys if not key[-1].isdigit()}) == []


def test_the_page_names_every_tensor_of_a_measured_run(tmp_path: Path) -> None:
    run, seen = write_run(tmp_path / "run"), 0
    for path in sorted((run / "eval").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = set(file.keys())
        assert missing(tensors) == [], path.name
        seen += len(tensors)
    assert seen > 60


def test_the_page_names_what_state_comparison_and_analysis_hold() -> None:
    for kind in (RunState, Comparison):
        assert missing({field.name for field in fields(kind)}) == [], kind.__name__
    parts = {field.name for field in fields(Analysis)} - {"top_tokens"}
    assert [part for part in sorted(parts) if f"`{part}." not in FORMATS] == []
