"""What training again changes: features that seeds share, the smallest difference that counts."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from browser import Tags
from run_folders import changed, codes, write_run

from tcsae.base.files import load_tensors
from tcsae.jobs.tracking import comparison_columns
from tcsae.report.compare_files import write_comparison
from tcsae.report.comparison import Comparison, compare_runs
from tcsae.report.notes import comparison_notes
from tcsae.report.seed_noise import SeedNoise, seed_noise, smallest_difference
from tcsae.report.stability import NEEDS_SEEDS


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Without and with the loss, three seeds each; explained variance hangs on the seed."""
    root = tmp_path_factory.mktemp("pair")
    for seed in range(3):
        for name, lambda_, phi in (("none", 0.0, 0.3), ("loss", 1.0, 0.9)):
            config = changed(seed=seed, lambda_=lambda_)
            features = codes(phi, seed=seed + 10 * int(lambda_))
            error = 0.5 + 0.1 * ((seed + int(lambda_)) % 3)
            write_run(root / f"{name}-{seed}", config, features=features, error=error)
    return compare_runs([root])


# ------------------------------------------------------------------------ the smallest difference


def fake_group(values: torch.Tensor, stream: int = 0) -> Any:
    runs = tuple(SimpleNamespace(values={"m": value}) for value in values)
    return SimpleNamespace(runs=runs, stream=stream, is_loaded=False)


def test_the_marked_rate_is_right() -> None:
    """Of differences that are none, one of twenty is above the smallest that counts; of those of
    the size that has even odds, about half."""
    generator = torch.Generator().manual_seed(0)
    for n_groups, n_seeds in ((2, 2), (4, 3), (2, 5)):
        called, found = 0, 0
        for _ in range(600):
            values = 3 + 0.2 * torch.randn(n_groups, n_seeds, generator=generator).double()
            noise = seed_noise([fake_group(v) for v in values], "m")
            assert noise is not None and noise.df == n_groups * (n_seeds - 1)
            smallest = smallest_difference(noise, [(1, n_seeds), (-1, n_seeds)])
            apart = float(values[1].mean() - values[0].mean())
            called += abs(apart) > smallest
            found += abs(apart + 1.0) > smallest
        # 600 trials: three standard errors are .027.
        assert abs(called / 600 - 0.05) < 0.027, (n_groups, n_seeds)
        assert found / 600 > (0.3 if n_seeds == 2 else 0.9)


def test_noise_is_that_of_students_t_by_hand() -> None:
    groups = [fake_group(torch.tensor([1.0, 3.0]).double()), fake_group(torch.zeros(2).double())]
    noise = seed_noise(groups, "m")
    assert noise is not None
    assert noise.sd == pytest.approx(1.0) and noise.df == 2 and noise.n_settings == 2
    assert (noise.low, noise.high) == (0.0, pytest.approx(2**0.5))
    assert smallest_difference(noise, [(1, 2), (-1, 2)]) == pytest.approx(4.3027, abs=1e-3)
    half = [(1, 2), (-0.5, 2), (-0.5, 2)]
    assert smallest_difference(noise, half) == pytest.approx(4.3027 * 0.75**0.5, abs=1e-3)
    assert seed_noise([fake_group(torch.tensor([1.0]))], "m") is None


def test_a_difference_is_marked_where_seeds_make_as_much(pair: Comparison) -> None:
    deltas = next(g for g in pair.groups if not g["is_baseline"])["deltas"]
    assert deltas["explained_variance"]["within_seed_noise"] is True
    assert deltas["C_8"]["within_seed_noise"] is False
    assert deltas["l0"]["seed_smallest"] is None
    rows = {row["metric"]: row for row in pair.seed_noise}
    assert set(rows) <= set(pair.headline) and {"explained_variance", "C_4"} <= set(rows)
    row = rows["explained_variance"]
    assert row["df"] == 4 and row["n_settings"] == 2
    assert row["smallest"]["3"] == pytest.approx(deltas["explained_variance"]["seed_smallest"])
    values = [
        [
            json.loads(_core(r))["eval_result_metrics"]["reconstruction_quality"][
                "explained_variance"
            ]
            for r in pair.runs
            if r["group"] == g["id"]
        ]
        for g in pair.groups
    ]
    spread = torch.tensor(values).double().var(1).mean().sqrt()
    assert row["sd"] == pytest.approx(float(spread), rel=1e-6)


def _core(run: dict[str, Any]) -> str:
    return (Path(run["folder"]) / "eval" / "core.json").read_text()


def test_the_mark_is_on_page_notes_csv_and_in_words(pair: Comparison, tmp_path: Path) -> None:
    tags = Tags(write_comparison(pair, tmp_path).read_text(encoding="utf-8"))
    notes = " ".join(comparison_notes(pair).split())
    for text in (tags.text, notes):
        assert "less than seeds make (" in text
        assert "No more than another seed makes: Explained variance (" in text
        assert "More than another seed makes: " in text
        assert "deviation between seeds, pooled over settings" in text
    row = list(csv.DictReader(io.StringIO(pair.csv())))[1]
    assert row["explained_variance_delta_within_seed_noise"] == "True"
    assert float(row["explained_variance_delta_seed_smallest"]) > 0
    columns = comparison_columns(pair)
    assert columns["delta_explained_variance_within_seed_noise"] == [None, True]


# ------------------------------------------------------------------------------- stability


def test_stability_is_on_page_notes_csv_and_in_a_file(pair: Comparison, tmp_path: Path) -> None:
    tags = Tags(write_comparison(pair, tmp_path).read_text(encoding="utf-8"))
    entry = pair.groups[0]["stability"]
    assert entry["reason"] is None and entry["seeds"] == 3 and entry["matching"] == "Hungarian"
    # SAEs that were never trained: their directions are random.
    assert entry["mcc"] == pytest.approx(entry["random"], abs=0.1)
    assert entry["mcc_low"] <= entry["mcc"] <= entry["mcc_high"]
    assert sum(entry["by_stability"]["share"]) == pytest.approx(1)
    assert "too few features" in entry["consistent"]["C_4"]["reason"]
    for text in (tags.text, comparison_notes(pair)):
        assert "PW-MCC" in text and "random directions" in " ".join(text.split())
    drawn = {a["data-figure"] for _, a in tags.elements if "data-figure" in a}
    assert "s0-stability" in drawn
    row = next(csv.DictReader(io.StringIO(pair.csv())))
    assert float(row["stability_mcc"]) == entry["mcc"] and row["stability_reason"] == ""
    assert comparison_columns(pair)["stability_mcc"][0] == entry["mcc"]
    features, _ = load_tensors(tmp_path / "stability.safetensors", "")
    assert set(features) == {f"group{g}.seed{s}" for g in (0, 1) for s in range(3)}
    median = torch.cat([features[f"group0.seed{s}"] for s in range(3)]).nanmedian()
    assert float(median) == pytest.approx(entry["median"])
    assert "stable" not in pair.to_json()


def test_one_seed_says_that_stability_needs_two(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "alone")
    comparison = compare_runs([tmp_path / "runs"])
    page = write_comparison(comparison, tmp_path / "out")
    assert comparison.groups[0]["stability"] == {"reason": NEEDS_SEEDS}
    assert "stability needs two seeds" in Tags(page.read_text(encoding="utf-8")).text
    assert any("stability needs two seeds" in notice for notice in comparison.notices)
    assert comparison.seed_noise == [] and not (tmp_path / "out/stability.safetensors").exists()
    assert "stability needs two seeds" in " ".join(comparison_notes(comparison).split())


def test_groups_of_one_seed_are_marked_by_the_seeds_of_others() -> None:
    groups = [fake_group(torch.tensor([1.0, 1.2, 0.8]).double()), fake_group(torch.ones(1))]
    noise = SeedNoise(groups, ["m"])
    row = {"id": 1, "stream": 0, "match": {"groups": [0], "weights": [1.0]}}
    row["deltas"] = {"m": {"value": 0.3, "baseline": 1.0}}
    noise.mark(row)
    entry = row["deltas"]["m"]
    assert entry["seed_smallest"] == pytest.approx(4.3027 * 0.2 * (1 + 1 / 3) ** 0.5, rel=1e-3)
    assert entry["within_seed_noise"] is True
