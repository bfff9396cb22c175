"""Document and local part, nested shares and energy by position on pages, in notes and tables."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import page_of
from run_folders import changed, codes, write_run

from tcsae.base.files import load_tensors, save_tensors
from tcsae.base.labels import label, local_window, spread_text, window_part
from tcsae.measure.evaluation import Evaluation
from tcsae.metrics.suite import ConsistencySuite
from tcsae.report.compare_page import stream_figures, write_compare_report
from tcsae.report.comparison import compare_runs
from tcsae.report.contents import OLDER, Contents
from tcsae.report.memory_figures import SHARES, share_rows, stacked_shares
from tcsae.report.notes import comparison_notes, run_notes
from tcsae.report.run_page import run_figures
from tcsae.runs.folder import load_run

NEW = ("energy_by_position", "edge_energy", "shares_window")


def is_new(name: str) -> bool:
    part = window_part(name)
    return name in NEW or name in SHARES or bool(part and (part.kind != "C" or part.sparse))


def aged(folder: Path, to: Path) -> Path:
    """The same run as a version would have left it that measured none of this."""
    shutil.copytree(folder, to)
    path = to / "eval" / "consistency.json"
    content = json.loads(path.read_text())
    summary = {k: v for k, v in content["summary"].items() if not is_new(k)}
    metrics = {k: v for k, v in summary["metrics"].items() if not is_new(k)}
    for entry in metrics.values():
        del entry["q99"]
    content["summary"] = summary | {"metrics": metrics}
    content["per_feature"] = {k: v for k, v in content["per_feature"].items() if not is_new(k)}
    path.write_text(json.dumps(content))
    for name in ("draws", "per_feature"):
        path = to / "eval" / f"{name}.safetensors"
        tensors, _ = load_tensors(path, "")
        path.unlink()
        save_tensors(path, {k: v for k, v in tensors.items() if not is_new(k)}, {})
    return to


def test_names_of_windows_are_read_and_said() -> None:
    assert window_part("L_16_sparse") == ("L", 16, True)
    assert window_part("C_8") == ("C", 8, False)
    assert [window_part(n) for n in ("C_", "c0", "L_x", "rho_1", "L_8_dense")] == [None] * 5
    assert label("L_8").name == "Local consistency L_8"
    assert label("D_8").meaning.endswith("from lag 4 x 8 on")
    assert label("C_4_sparse").name == "Window consistency C_4, sparse"


def test_the_local_part_shown_is_that_of_the_window_or_of_8_or_less() -> None:
    names = ["C_32", "L_2", "L_4", "L_16", "L_8_sparse", "D_8"]
    assert local_window(names, 16) == 16
    assert local_window(names, 32) == 4
    assert local_window(["L_16", "L_32"], None) == 16
    assert local_window(["C_8"], 8) is None


def test_a_spread_is_said_only_where_it_was_measured() -> None:
    said = spread_text({"median": 0.01, "q99": 0.5})
    assert said == "over features: median 0.010, 99th percentile 0.500"
    assert spread_text({"median": 0.01}) == ""


def test_shares_of_groups_of_features_are_weighted_means_that_add_up() -> None:
    rng = np.random.default_rng(0)
    parts = rng.dirichlet(np.ones(4), 6).T
    values: dict[str, np.ndarray] = dict(zip(SHARES, parts, strict=True))
    values["density"] = np.array([0.0, 0.05, 0.05, 0.3, 0.3, 0.3])
    values["c0"] = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    values["share_window"][5] = np.nan
    rows = share_rows(values, values["density"] > 0)
    assert rows is not None
    assert all(sum(row) == pytest.approx(1) for row in rows.values())
    whole = (parts[:, 1:5] @ [1, 2, 3, 4]) / 10
    assert rows["all, weighted by variance"] == pytest.approx(whole.tolist())
    assert rows["dense, weighted"] == pytest.approx(((parts[:, 3:5] @ [3, 4]) / 7).tolist())
    figure = stacked_shares(rows)
    assert [trace.name for trace in figure.data][0] == "between positions"
    assert list(figure.data[3].x) == pytest.approx([row[3] for row in rows.values()])
    assert (
        share_rows({k: v for k, v in values.items() if k != "share_window"}, values["c0"] > 0)
        is None
    )


def test_a_run_s_page_and_notes_show_them(run_folder: Path, tmp_path: Path) -> None:
    run = load_run(run_folder)
    contents = Contents.of(run)
    assert contents.local_window is not None
    local = f"L_{contents.local_window}"
    assert {"shares", "energy", f"distribution-{local}"} <= set(run_figures(contents))
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    page = page_of(folder).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    entry = contents.summary["metrics"][local]
    for words in (label(local).name, "Edge energy", spread_text(entry), "99 %"):
        assert words in text, words
    notes = " ".join(run_notes(run).split())
    for words in (label(local).name, "Edge energy", "Variance between documents"):
        assert words in notes, words
    assert "The variance of features lies between positions" in notes
    assert OLDER not in notes


def test_an_older_run_has_a_page_that_says_what_is_missing(
    run_folder: Path, tmp_path: Path
) -> None:
    folder = aged(run_folder, tmp_path / "older")
    contents = Contents.of(load_run(folder))
    assert contents.local_window is None and OLDER in contents.missing()
    assert not {"shares", "energy"} & set(run_figures(contents))
    page = page_of(folder).read_text(encoding="utf-8")
    assert "Nested shares were not measured" in page
    assert OLDER.split(":")[0] in " ".join(run_notes(load_run(folder)).split())


def test_a_comparison_has_them_paired_with_the_spread_beside_them(tmp_path: Path) -> None:
    write_run(tmp_path / "base", features=codes(0.3))
    write_run(tmp_path / "variant", changed(lambda_=1.0), features=codes(0.9))
    comparison = compare_runs([tmp_path])
    assert {"L_2", "D_2", "edge_energy", "omega_squared"} <= set(comparison.headline)
    order = [n for n in comparison.metrics if window_part(n)]
    assert order == ["C_2", "C_4", "C_8", "D_2", "L_2"]
    variant = next(g for g in comparison.groups if not g["is_baseline"])
    content = json.loads((tmp_path / "variant" / "eval" / "consistency.json").read_text())
    summary: dict[str, Any] = content["summary"]
    for name in ("L_2", "D_2", "share_window"):
        entry = summary["metrics"][name]
        assert variant["metrics"][name]["value"] == pytest.approx(entry["energy_weighted"])
        assert variant["q99"][name] == pytest.approx(entry["q99"])
        assert variant["deltas"][name]["low"] is not None, name
    assert variant["metrics"]["edge_energy"]["value"] == summary["edge_energy"]["value"]
    assert variant["deltas"]["edge_energy"]["low"] is not None
    curve = variant["energy_by_position"]
    assert curve["energy"][0] is None, "position 0 is never valid"
    assert curve["energy"][1:] == pytest.approx(summary["energy_by_position"][1:])
    assert "energy" in stream_figures(comparison.groups, [], comparison.to_json())
    page = write_compare_report(comparison, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "In many features or in a few" in page and "Local consistency L_2" in page
    notes = comparison_notes(comparison)
    assert "Local consistency L_2, over features: median" in notes
    assert not any("evaluated by an older version:" in notice for notice in comparison.notices)


def test_older_runs_are_compared_by_what_they_have(tmp_path: Path) -> None:
    write_run(tmp_path / "new" / "base", features=codes(0.3))
    write_run(tmp_path / "new" / "variant", changed(lambda_=1.0), features=codes(0.9))
    older = aged(tmp_path / "new" / "variant", tmp_path / "older")
    comparison = compare_runs([tmp_path / "new" / "base", older])
    variant = next(g for g in comparison.groups if not g["is_baseline"])
    assert variant["metrics"]["L_2"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "not measured",
    }
    assert variant["deltas"]["C_2"]["low"] is not None
    assert variant["energy_by_position"] == {"positions": [], "energy": []}
    assert any("older version: older" in notice for notice in comparison.notices)
    assert "not measured" in comparison_notes(comparison)
    write_compare_report(comparison, tmp_path / "report.html")


def test_the_terminal_has_the_local_part_beside_the_window_consistency() -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(32, 64, 6, generator=generator) * (torch.arange(6) / 6 > 0.3)
    suite = ConsistencySuite(6, 64, n_boot=50, windows=(8,))
    suite.update(f, inputs=torch.rand(32, 64, 3, generator=generator))
    names = ("explained_variance", "l2_ratio", "l0", "frac_alive", "ce_loss_score", "kl_div_score")
    groups = (
        "reconstruction_quality",
        "shrinkage",
        "sparsity",
        "misc_metrics",
        "model_performance_preservation",
        "model_behavior_preservation",
    )
    core = {"eval_result_metrics": {group: dict.fromkeys(names, 0.5) for group in groups}}
    summary = suite.summary()
    found = Evaluation(core, {"summary": summary}, {}, {}, {}, {})
    lines = found.lines()
    at = next(i for i, line in enumerate(lines) if line.startswith("window consistency C_8"))
    wanted = ("local consistency L_8", "document part D_8", "L_8 of sparse features")
    assert all(line.startswith(w) for line, w in zip(lines[at + 1 :], wanted, strict=False))
    assert "99th percentile" in lines[at] and "[" in lines[at + 1]
    assert any(line.startswith("edge energy") for line in lines)
    assert found.headline["eval/L_8"] == summary["metrics"]["L_8"]["energy_weighted"]
    assert found.headline["eval/L_8_q99"] == summary["metrics"]["L_8"]["q99"]
    assert found.headline["eval/edge_energy"] == summary["edge_energy"]["value"]
