"""A gain that was planted in one feature is found there, and every place says the same of it."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Tags
from run_folders import F, N, T, changed, codes, seeded, write_run

from tcsae.jobs.tracking import comparison_columns
from tcsae.report.compare_page import write_compare_report
from tcsae.report.comparison import Comparison, compare_runs
from tcsae.report.gain import NOT_MEASURED, SETTINGS, gain_words, gains
from tcsae.report.notes import comparison_notes

SLOW = 3
"""The feature that the variant makes slow."""


def slow(width: int = 16) -> torch.Tensor:
    """[N, T], on for a stretch of every context, wherever that begins."""
    starts = torch.randint(0, T, (N, 1), generator=seeded(9))
    return ((torch.arange(T) - starts) % T < width // 2).float() * 3.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gain")
    before = codes(0.2)
    after = before.clone()
    after[..., SLOW] = slow()
    # Layout is where the slow feature is on: all of its activation, and half of the others'.
    layout = slow() > 0
    write_run(root / "a", features=before, layout=layout)
    write_run(root / "b", changed(lambda_=1.0), features=after, layout=layout)
    return root


@pytest.fixture(scope="module")
def comparison(folders: Path) -> Comparison:
    return compare_runs([folders])


@pytest.fixture(scope="module")
def row(comparison: Comparison) -> dict[str, Any]:
    return next(group for group in comparison.groups if group["deltas"])


@pytest.mark.parametrize("name", ["C_4", "L_4"])
def test_the_feature_that_was_made_slow_has_the_gain(row: dict[str, Any], name: str) -> None:
    entry = row["gain"]["metrics"].get(name)
    if entry is None:
        assert name not in row["metrics"]
        return
    first = entry["features"][0]
    assert (first["feature"], first["counterpart"]) == (SLOW, SLOW)
    assert first["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert first["share"] > 0.7 and entry["half"] == 1
    assert first["value"] > first["baseline"] + 0.3
    assert entry["change"] == pytest.approx(row["deltas"][name]["value"], abs=1e-5)
    assert entry["value"] == pytest.approx(row["metrics"][name]["value"], abs=1e-5)
    shares = entry["curve"]["share"]
    assert entry["curve"]["n"][: len(shares)] == list(range(1, len(shares) + 1))
    assert shares[0] == pytest.approx(first["share"])
    assert entry["up"] + entry["down"] == pytest.approx(entry["change"])
    assert (entry["n_features"], entry["n_matched"]) == (F, F)


def test_without_the_layout_feature_the_gain_is_gone(row: dict[str, Any]) -> None:
    entry = row["gain"]["metrics"]["C_4"]
    assert entry["features"][0]["layout_share"] == pytest.approx(1.0)
    assert entry["layout"]["share"] > 0.7
    assert abs(entry["layout"]["change_without"]) < 0.1 * entry["change"]


def test_sentence_notes_page_and_csv_say_it(
    comparison: Comparison, row: dict[str, Any], tmp_path: Path
) -> None:
    name = list(row["gain"]["metrics"])[-1]
    entry, said = row["gain"]["metrics"][name], gain_words(row, name)
    assert f"{100 * entry['share']:.0f} % of the change in" in said
    assert f"({entry['layout']['change_without']:+.3f})" in said
    (answer,) = comparison.answers
    assert answer.endswith(said)
    medians = row["baseline_medians"][name], row["medians"][name]
    assert f"median {medians[0]:.3f} -> {medians[1]:.3f}" in answer
    notes = " ".join(comparison_notes(comparison).split())
    assert "Where the gain lies" in notes and said in notes
    page = Tags(write_compare_report(comparison, tmp_path / "report.html").read_text())
    assert "Where the gain lies" in page.text and said in page.text
    assert any(tag.get("data-figure") == "s0-gain-1" for tag in page.named("div"))
    rows = list(csv.DictReader(io.StringIO(comparison.csv())))
    written = next(line for line in rows if line["lambda"] == "1.0")
    assert float(written[f"{name}_gain_share_of_10"]) == entry["share"]
    assert float(written[f"{name}_gain_layout_share"]) == entry["layout"]["share"]
    assert float(written[f"{name}_baseline_median"]) == medians[0]
    assert float(written[f"{name}_median"]) == medians[1]
    in_wandb = comparison_columns(comparison)
    for column in ("gain_share_of_10", "gain_layout_share", "delta_without_layout"):
        assert in_wandb[f"{name}_{column}"][row["id"]] == float(written[f"{name}_{column}"])
    assert in_wandb[f"{name}_median"][row["id"]] == medians[1]


def test_runs_without_the_column_say_so_once_and_the_rest_is_there(
    folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "b", tmp_path / "b")
    write_run(tmp_path / "a", features=codes(0.2))
    older = compare_runs([tmp_path])
    entry = next(g for g in older.groups if g["deltas"])["gain"]["metrics"]["C_4"]
    assert entry["layout"] is None and entry["half"] == 1
    assert [NOT_MEASURED in notice for notice in older.notices].count(True) == 1
    assert "layout" not in older.answers[0]


def test_what_is_within_noise_is_not_shared_out(row: dict[str, Any]) -> None:
    name = next(iter(row["gain"]["metrics"]))
    noisy = {**row, "deltas": {name: {**row["deltas"][name], "within_noise": True}}}
    assert "nothing to share out" in gain_words(noisy, name)
    assert gain_words({**row, "gain": {}}, name) == ""


def test_a_baseline_whose_weights_are_gone_says_so(folders: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(folders / name, tmp_path / name)
    comparison = compare_runs([tmp_path])
    assert next(g for g in comparison.groups if g["deltas"])["gain"]["reason"] is None
    from tcsae.report.groups import make_groups, sort_streams
    from tcsae.report.runs import read_run

    runs = [read_run(tmp_path / name) for name in "ab"]
    groups, _ = make_groups(sort_streams(runs))
    (tmp_path / "a" / "sae" / "sae_weights.safetensors").unlink()
    found = gains(groups, comparison.groups, ["C_4"])
    assert found[0] == {} and "sae" in found[1]["reason"] and found[1]["metrics"] == {}
    many = [{**comparison.groups[1], "id": 1} for _ in range(SETTINGS + 1)]
    assert len(gains(groups, many, [])) == SETTINGS + 1
