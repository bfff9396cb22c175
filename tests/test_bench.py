"""The page of speeds: it is what the JSON says, and what the JSON says is computed rightly."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import small_job

SCRIPTS = Path(__file__).parent.parent / "scripts"
LONG = ("harvest", "evaluation", "startup")
"""Sections that run the embedded model or whole commands."""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("bench", SCRIPTS / "bench.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


@pytest.mark.documents
def test_the_page_has_the_tables_of_the_json(bench: Any) -> None:
    results = json.loads(bench.RESULTS.read_text())
    page = bench.PAGE.read_text(encoding="utf-8")
    part = bench.block("bench", bench.page_part(results))
    assert part in page, "python scripts/bench.py --page"
    assert list(results) and all(found["rounds"] >= 7 for found in results.values())


def test_ratios_are_medians_within_rounds(bench: Any) -> None:
    times = {"a": [10.0, 20.0, 90.0], "b": [5.0, 10.0, 30.0], "c": [1.0, 1.0, 1.0]}
    found = bench.summary(times, {"a": "b"})
    assert found["a"] == {"ms": 20.0, "least_ms": 10.0, "against": "b", "ratio": 2.0}
    assert found["c"] == {"ms": 1.0, "least_ms": 1.0}


def test_steps_take_turns_and_the_first_rounds_do_not_count(bench: Any) -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    steps["c"] = lambda: 0.25
    times = bench.take_turns(steps, 4)
    assert order == ["a", "b"] * (bench.WARM_UP + 4)
    assert [len(taken) for taken in times.values()] == [4, 4, 4]
    assert times["c"] == [250.0] * 4


def test_rates_are_of_the_tokens_that_the_row_names(bench: Any) -> None:
    rows = {
        "topk, 8,192 tokens": {"ms": 100.0, "least_ms": 90.0},
        "topk": {"ms": 100.0, "least_ms": 90.0, "against": "topk, 8,192 tokens", "ratio": 1.0},
    }
    first, second = bench.table(rows).splitlines()[2:]
    assert first == "| topk, 8,192 tokens | 100.0 | 90.0 | 81,900 |  |  |"
    assert second == "| topk | 100.0 | 90.0 | 41,000 | 1.00 | topk, 8,192 tokens |"


@pytest.mark.slow
def test_a_section_measures_and_writes_its_rows(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"D_SAE": 128, "CONTEXTS": 2, "TOKENS": 256, "WARM_UP": 1}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "PEERS", {})
    monkeypatch.setattr(bench.bench_data, "GROWTH", (128, 256))
    measured = [key for key in bench.SECTIONS if key not in LONG]
    given = ["--rounds", "1", "--default-allocator", "--json", f"{tmp_path}/r"]
    monkeypatch.setattr(sys, "argv", ["bench", *given, "--sections", *measured])
    bench.main()
    results = json.loads((tmp_path / "r").read_text())
    assert list(results) == measured
    rows = {key: found["rows"] for key, found in results.items() if key != "store"}
    assert all(row["ms"] > 0 for found in rows.values() for row in found.values())
    assert "topk, d_sae 16,384" in results["d_sae"]["rows"]


def test_a_stores_growth_is_read_from_processes_of_their_own(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.bench_data, "GROWTH", (128, 256))
    rows = bench.bench_data.store_section(1)["rows"]
    assert list(rows) == ["128", "256"]
    assert all(row["first_ms"] > 0 and row["later_ms"] > 0 for row in rows.values())
    assert abs(rows["256"]["own_mb"] - rows["128"]["own_mb"]) < 30 < rows["128"]["own_mb"]
    assert bench.TABLES["store"]({"256": {"first_ms": 1.0, "later_ms": 0.5, "own_mb": 100.4,
                                          "mapped_mb": 50.6}}).endswith(
        "| 256 | 1.00 | 0.50 | 100 | 51 |"
    )  # fmt: skip


@pytest.mark.slow
def test_the_time_to_the_first_step_is_read_from_what_runs_write(
    bench: Any, tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    job = small_job(tiny_gpt2, texts, tmp_path)
    small = [a for a in job if not a.startswith(("hydra.", "store.", "training.log_every",
                                                 "tracking", "evaluation.analysis"))]  # fmt: skip
    with bench.bench_data.startup_steps(small) as steps:
        seconds = {name: step() for name, step in steps.items()}
    assert seconds.pop(bench.bench_data.HELP) is None
    assert len(seconds) == 2 and all(0 < taken < 300 for taken in seconds.values())


def test_the_times_to_start_stand_beside_what_is_wanted(bench: Any) -> None:
    rows = {name: {"ms": 1230.0, "least_ms": 900.0} for name in bench.bench_data.WANTED}
    lines = bench.TABLES["startup"](rows).splitlines()
    assert lines[2] == "| python -m tcsae.train --help | 1.23 | 0.90 | 1.5 |"
    assert lines[3].endswith("| 1.23 | 0.90 |  |") and lines[4].endswith("| 1.23 | 0.90 | 5.0 |")
