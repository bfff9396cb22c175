"""Differences that were planted are found, those that were not are noise, and all says so."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_folders import F, N, T, changed, codes, inputs, seeded, write_run
from scipy import stats

from tcsae.base.errors import UserError
from tcsae.metrics.density import bin_and_place
from tcsae.report.comparison import Comparison, compare_runs
from tcsae.report.matching import (
    Point,
    density_bin,
    density_matched,
    live_features,
    match_l0,
    pareto_front,
)
from tcsae.report.paired import Term, combine, holds_zero
from tcsae.report.runs import read_run

VARIANT = {"lambda_": 1.0}


def by_label(comparison: Comparison, label: str) -> dict[str, Any]:
    found = [group for group in comparison.groups if group["label"] == label]
    assert len(found) == 1, [group["label"] for group in comparison.groups]
    return found[0]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A baseline, a variant with longer memory and a larger error, and one with neither."""
    root = tmp_path_factory.mktemp("planted")
    write_run(root / "a-baseline", features=codes(0.3))
    write_run(
        root / "b-consistent",
        changed(**VARIANT),
        features=codes(0.9, seed=5),
        error=0.6,
        ce=3.8,
    )
    write_run(
        root / "c-same",
        changed(lambda_=0.1),
        features=codes(0.3, seed=6),
        noise_seed=3,
    )
    return compare_runs([root])


# ------------------------------------------------------------------------------ differences


def test_a_planted_difference_is_outside_noise_with_its_sign(planted: Comparison) -> None:
    deltas = by_label(planted, "lambda=1")["deltas"]
    signs = {"explained_variance": -1, "ce_loss_score": -1, "C_8": 1, "rho_1": 1, "persistence": 1}
    for name, sign in signs.items():
        assert deltas[name]["within_noise"] is False, name
        assert deltas[name]["value"] * sign > 0, name
        assert deltas[name]["low"] < deltas[name]["value"] < deltas[name]["high"]


def test_no_difference_is_within_noise(planted: Comparison) -> None:
    deltas = by_label(planted, "lambda=0.1")["deltas"]
    for name in ("explained_variance", "mse", "ce_loss_score", "C_4", "C_8", "rho_1"):
        assert deltas[name]["within_noise"] is True, (name, deltas[name])


def test_values_are_those_of_the_runs(planted: Comparison) -> None:
    run = next(r for r in planted.runs if r["name"] == "b-consistent")
    core = json.loads((Path(run["folder"]) / "eval" / "core.json").read_text())
    told = json.loads((Path(run["folder"]) / "eval" / "consistency.json").read_text())["summary"]
    group = planted.groups[run["group"]]
    quality = core["eval_result_metrics"]["reconstruction_quality"]
    assert group["metrics"]["explained_variance"]["value"] == quality["explained_variance"]
    assert group["metrics"]["C_8"]["value"] == told["metrics"]["C_8"]["energy_weighted"]
    assert group["medians"]["C_8"] == told["metrics"]["C_8"]["median"]
    assert group["curve"]["rho"] == pytest.approx(told["autocorrelation"]["rho"])
    interval = told["metrics"]["C_8"]["energy_weighted_interval"]
    both = [group["metrics"]["C_8"]["low"], group["metrics"]["C_8"]["high"]]
    assert both == pytest.approx(interval, abs=1e-5)


def test_resamples_are_of_the_metrics_they_are_named_for(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert set(run.draws) >= {"explained_variance", "ce_loss_score", "C_8", "smoothness", "l1"}
    for name in ("explained_variance", "l2_ratio", "l1", "ce_loss_score", "C_8", "rho_1"):
        mean = float(run.draws[name].mean())
        assert mean == pytest.approx(float(run.values[name]), rel=0.05, abs=0.02), name
    told = json.loads((tmp_path / "run/eval/core.json").read_text())["eval_result_unstructured"]
    for name in ("mse", "cossim", "ce_loss_score", "kl_div_with_sae", "explained_variance"):
        found = combine(name, [Term(1, [run])])
        ends = [float(found.low), float(found.high)]
        width = ends[1] - ends[0]
        # core.json's own, of half as many resamples.
        assert ends == pytest.approx(told["intervals"][name], abs=0.25 * width + 1e-9)


def test_a_difference_is_that_of_the_two_values(planted: Comparison) -> None:
    base, group = by_label(planted, "baseline"), by_label(planted, "lambda=1")
    assert group["match"]["kind"] == "single" and group["match"]["groups"] == [base["id"]]
    for name, delta in group["deltas"].items():
        values = [g["metrics"][name]["value"] for g in (group, base)]
        if None in values:
            assert delta["value"] is None and delta["reason"]
            continue
        assert delta["value"] == pytest.approx(values[0] - values[1], abs=1e-12)
        assert delta["baseline"] == pytest.approx(values[1], abs=1e-12)


def test_rounding_is_no_difference() -> None:
    assert holds_zero(1e-16, 3e-16, 0.9) and holds_zero(-1.0, 1.0, 0.0)
    assert not holds_zero(1e-5, 3e-5, 0.9) and not holds_zero(-3e-5, -1e-5, 0.9)


def test_a_baseline_has_no_difference(planted: Comparison) -> None:
    base = by_label(planted, "baseline")
    assert base["is_baseline"] and base["deltas"] == {} and base["match"]["kind"] == "self"


def fake_run(value: float, draws: torch.Tensor | None, seed: int = 0) -> Any:
    return SimpleNamespace(
        seed=seed,
        values={"m": torch.tensor(value, dtype=torch.float64)},
        draws={} if draws is None else {"m": draws},
        reasons={},
        interval_reason="",
        basis=lambda name: None,
    )


def bootstrap_run(by_context: torch.Tensor, weights: torch.Tensor, seed: int = 0) -> Any:
    return fake_run(by_context.mean().item(), weights @ by_context / len(by_context), seed)


def test_paired_intervals_cover_what_they_should() -> None:
    from tcsae.metrics.bootstrap import resampling_weights

    weights = resampling_weights(60, 60, 400, 0).double()
    missed, widths = 0, []
    for trial in range(200):
        g = seeded(trial)
        shared = 5 * torch.randn(60, generator=g, dtype=torch.float64)
        first, second = (shared + torch.randn(60, generator=g, dtype=torch.float64) for _ in "ab")
        runs = [bootstrap_run(v, weights) for v in (first, second)]
        found = combine("m", [Term(1, runs[:1]), Term(-1, runs[1:])])
        missed += not found.low <= 0 <= found.high
        widths.append(float(found.high - found.low))
    assert 2 <= missed <= 24
    # What both share, five times as large, is gone: 2 * 1.96 * sqrt(2 / 60).
    assert sum(widths) / 200 == pytest.approx(2 * 1.96 * math.sqrt(2 / 60), rel=0.06)


# ------------------------------------------------------------------------------------ seeds


def test_seeds_are_pooled_as_by_hand(tmp_path: Path) -> None:
    errors = {0: 0.40, 1: 0.50, 2: 0.57}
    for seed, error in errors.items():
        write_run(tmp_path / f"run-{seed}", changed(seed=seed), error=error, noise_seed=seed)
    (group,) = compare_runs([tmp_path]).groups
    told = [json.loads((tmp_path / f"run-{s}/eval/core.json").read_text()) for s in errors]
    values = [
        t["eval_result_metrics"]["reconstruction_quality"]["explained_variance"] for t in told
    ]
    entry = group["metrics"]["explained_variance"]
    assert group["seeds"] == [0, 1, 2] and len(group["runs"]) == 3
    assert entry["value"] == pytest.approx(sum(values) / 3)
    half = stats.t.ppf(0.975, 2) * torch.tensor(values).std().item() / math.sqrt(3)
    assert entry["high"] - entry["value"] == pytest.approx(half, rel=0.15)


def test_seeds_alone_give_students_interval() -> None:
    values = [0.2, 0.3, 0.45]
    runs = [fake_run(v, None, seed) for seed, v in enumerate(values)]
    found = combine("m", [Term(1, runs)])
    low, high = stats.t.interval(0.95, 2, sum(values) / 3, stats.sem(values))
    assert float(found.low) == pytest.approx(low, abs=0.005)
    assert float(found.high) == pytest.approx(high, abs=0.005)


def test_a_shift_common_to_all_seeds_is_certain() -> None:
    values = [0.2, 0.5, 0.9]
    runs = [[fake_run(v + shift, None, s) for s, v in enumerate(values)] for shift in (0.1, 0)]
    found = combine("m", [Term(1, runs[0]), Term(-1, runs[1])])
    assert [float(x) for x in found[:3]] == pytest.approx([0.1, 0.1, 0.1])


def test_other_seeds_are_not_paired() -> None:
    values = [0.2, 0.5, 0.9]
    runs = [[fake_run(v + 0.1, None, s + 10 * k) for s, v in enumerate(values)] for k in (0, 1)]
    found = combine("m", [Term(1, runs[0]), Term(-1, runs[1])])
    assert float(found.low) < -0.5 and float(found.high) > 0.5


def test_one_seed_without_resamples_has_no_interval() -> None:
    found = combine("m", [Term(1, [fake_run(0.3, None)])])
    assert float(found.value) == pytest.approx(0.3) and found.low is None
    assert found.reason == "no interval over documents, and one seed"


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "w4", changed(window=4))
    write_run(tmp_path / "w8", changed(window=8))  # without a loss, the window means nothing
    comparison = compare_runs([tmp_path])
    assert len(comparison.groups) == 1 and comparison.groups[0]["seeds"] == [0]
    assert [r["status"] for r in comparison.runs] == ["used", "duplicate"]
    assert any("w8 (duplicate)" in notice for notice in comparison.notices)


# ------------------------------------------------------------------------------- matched L0


FRONT = [Point(0, 10.0, 0.5), Point(1, 40.0, 0.7), Point(2, 20.0, 0.4)]


def test_the_front_leaves_out_what_is_beaten() -> None:
    assert [p.group for p in pareto_front(FRONT)] == [0, 1]


def test_interpolation_is_linear_in_log_l0() -> None:
    match = match_l0(20.0, FRONT)
    assert match.kind == "interpolated" and match.groups == [0, 1]
    assert match.weights == pytest.approx([0.5, 0.5])


def test_a_single_baseline_stands_in_up_to_five_per_cent_away() -> None:
    near, far = match_l0(10.4, FRONT[:1]), match_l0(10.6, FRONT[:1])
    assert near.kind == "single" and near.groups == [0] and near.l0 == 10.0
    assert far.kind == "none" and far.groups == []
    assert far.words == "no baseline at this L0 (10.6): the nearest has 10"


def test_nothing_is_extrapolated() -> None:
    assert match_l0(60.0, FRONT).kind == "none"
    assert match_l0(41.0, FRONT).groups == [1]


def test_a_beaten_baseline_still_stands_in_at_its_own_l0() -> None:
    beaten = [Point(0, 10.0, 0.5), Point(1, 20.0, 0.49)]
    assert match_l0(20.0, beaten).groups == [1]


def test_a_dead_variant_is_not_matched() -> None:
    assert match_l0(0.0, FRONT).words == "no feature fires, so there is no L0 to match"


points = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=8).map(
    lambda pairs: [Point(i, float(l0), ev) for i, (l0, ev) in enumerate(pairs)]
)


@given(points)
def test_the_front_is_what_nothing_beats(found: list[Point]) -> None:
    front = pareto_front(found)
    assert front
    for point in front:
        assert not any(
            p.l0 < point.l0 and p.explained_variance >= point.explained_variance for p in found
        )
    for point in found:
        assert any(
            p.l0 <= point.l0 and p.explained_variance >= point.explained_variance for p in front
        )


@given(points, st.floats(0.5, 60))
def test_weights_sum_to_one_and_stay_between_neighbours(found: list[Point], l0: float) -> None:
    match = match_l0(l0, found)
    if match.kind == "none":
        assert all(abs(p.l0 / l0 - 1) > 0.05 for p in found)
        return
    assert sum(match.weights) == pytest.approx(1)
    assert all(w >= 0 for w in match.weights)
    own = {p.group: p.l0 for p in found}
    if match.kind == "interpolated":
        mean = sum(w * math.log(own[g]) for g, w in zip(match.groups, match.weights, strict=True))
        assert math.exp(mean) == pytest.approx(l0)


def test_a_variant_is_compared_between_two_baselines(tmp_path: Path) -> None:
    for k, error in ((2, 0.7), (8, 0.3)):
        write_run(tmp_path / f"base-{k}", changed(sae__k=k), features=codes(0.3, l0=k), error=error)
    write_run(tmp_path / "variant", changed(**VARIANT), features=codes(0.3, l0=4), error=0.5)
    comparison = compare_runs([tmp_path])
    low, high = (by_label(comparison, f"baseline k={k}") for k in (2, 8))
    group = by_label(comparison, "lambda=1 k=4")
    assert group["match"]["kind"] == "interpolated"
    assert group["match"]["weights"] == pytest.approx([0.5, 0.5])
    assert group["match"]["l0"] == 4
    # Half way in log L0: C_4 itself, the share that is not explained by its logarithm.
    ends = {n: [g["metrics"][n]["value"] for g in (low, high)] for n in low["metrics"]}
    expected = {
        "C_4": sum(ends["C_4"]) / 2,
        "density": math.sqrt(math.prod(ends["density"])),
        **{
            name: 1 - math.sqrt(math.prod(1 - x for x in ends[name]))
            for name in ("explained_variance", "ce_loss_score")
        },
    }
    for name, value in expected.items():
        assert group["deltas"][name]["baseline"] == pytest.approx(value)
    base, own = comparison.arms
    assert base["groups"] == [low["id"], high["id"]] == base["front"]
    assert own["baseline"] == base["id"] and own["groups"] == [group["id"]]


def test_targets_of_l0_are_points_of_one_arm(tmp_path: Path) -> None:
    jumprelu = {"sae": {"architecture": "jumprelu", "d_sae": F}}
    for l0 in (2, 8):
        config = changed(training__target_l0=l0) | jumprelu
        write_run(tmp_path / f"base-{l0}", config, features=codes(0.3, l0=l0), error=1 / l0)
    config = changed(training__target_l0=4, **VARIANT) | jumprelu
    write_run(tmp_path / "variant", config, features=codes(0.3, l0=4), error=0.5)
    base, own = compare_runs([tmp_path]).arms
    assert len(base["groups"]) == 2 and own["baseline"] == base["id"]
    (variant,) = (g for g in compare_runs([tmp_path]).groups if not g["is_baseline"])
    assert variant["match"]["kind"] == "interpolated"


def test_a_baseline_with_other_settings_is_named_and_not_used(tmp_path: Path) -> None:
    write_run(tmp_path / "base", changed(training__tokens=2000))
    write_run(tmp_path / "variant", changed(**VARIANT))
    comparison = compare_runs([tmp_path])
    group = next(g for g in comparison.groups if not g["is_baseline"])
    assert group["match"]["kind"] == "none" and group["deltas"] == {}
    assert "training.tokens" in group["match"]["words"]
    assert any("training.tokens" in notice for notice in comparison.notices)


# -------------------------------------------------------------------------- matched density


def arm(density: list[float], C: list[float], energy: list[float], seed: int = 0) -> Any:
    columns = {"density": density, "C_8": C, "c0": energy}
    features = {k: torch.tensor(v, dtype=torch.float64) for k, v in columns.items()}
    return Term(1.0, [SimpleNamespace(seed=seed, features=features, by_density={})])


def test_density_alone_is_no_difference_at_matched_density() -> None:
    # C depends on density only; the second arm has its energy in the dense features.
    density, C = [0.01] * 40 + [0.3] * 40, [0.1] * 40 + [0.6] * 40
    rare = arm(density, C, [4.0] * 40 + [1.0] * 40)
    dense = arm(density, C, [1.0] * 40 + [4.0] * 40)
    arms = [live_features([term], ["C_8"]) for term in (dense, rare)]
    raw = [float((f.energy * f.metrics["C_8"]).sum()) for f in arms]
    assert raw[0] - raw[1] == pytest.approx(0.3)
    entry = density_matched(arms[0], arms[1], "C_8")
    assert entry["delta"] == pytest.approx(0, abs=1e-12) and entry["within_noise"] is True
    assert entry["overlap"] == pytest.approx(0.4)
    assert entry["value"] == pytest.approx(0.35)


def test_a_true_difference_stays_at_matched_density() -> None:
    density = [0.01] * 40 + [0.3] * 40
    rare = arm(density, [0.1] * 40 + [0.6] * 40, [4.0] * 40 + [1.0] * 40)
    dense = arm(density, [0.2] * 40 + [0.7] * 40, [1.0] * 40 + [4.0] * 40)
    entry = density_matched(*(live_features([term], ["C_8"]) for term in (dense, rare)), "C_8")
    assert entry["delta"] == pytest.approx(0.1) and entry["within_noise"] is False


def test_matched_density_is_invariant_to_scale_and_dead_features() -> None:
    one = arm([0.1, 0.2, 0.0], [0.5, 0.1, 9.0], [1.0, 2.0, 0.0])
    two = arm([0.1, 0.2], [0.5, 0.1], [100.0, 200.0])
    entry = density_matched(*(live_features([t], ["C_8"]) for t in (one, two)), "C_8")
    assert entry["delta"] == pytest.approx(0) and entry["overlap"] == pytest.approx(1)


def test_arms_without_a_common_density_are_not_compared() -> None:
    arms = (arm([0.001], [0.1], [1.0]), arm([0.5], [0.9], [1.0]))
    entry = density_matched(*(live_features([t], ["C_8"]) for t in arms), "C_8")
    assert entry["delta"] is None and entry["within_noise"] is None
    assert entry["reason"] == "the two have no density in common"


def test_bins_of_density_are_quarters_of_a_decade() -> None:
    density = torch.tensor([1.0, 0.57, 0.56, 0.1, 1e-7, 1e-12], dtype=torch.float64)
    bins, above = bin_and_place(density_bin(density))
    assert bins.tolist() == [27, 27, 26, 24, 0, 0]
    expected = [0.25, math.log10(0.57) + 0.25, math.log10(0.56) + 0.5, 0, 0, 0]
    assert above.tolist() == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------ the document


def test_csv_and_markdown_say_what_json_says(planted: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(planted.csv())))
    assert [row["label"] for row in rows] == [group["label"] for group in planted.groups]
    for row, group in zip(rows, planted.groups, strict=True):
        for name, entry in group["metrics"].items():
            for key, column in (("value", name), ("low", f"{name}_low")):
                told = None if row[column] == "" else float(row[column])
                assert told == entry[key], column
        for name, entry in group["deltas"].items():
            for key, column in (("value", f"{name}_delta"), ("smallest", f"{name}_delta_smallest")):
                told = None if row[column] == "" else float(row[column])
                assert told == entry[key], column
            assert row[f"{name}_delta_within_noise"] in (str(entry["within_noise"]), "")
    cells = [line.split(" | ") for line in planted.markdown().splitlines() if "lambda=1 " in line]
    values, differences = cells
    column = planted.headline.index("explained_variance")
    group = by_label(planted, "lambda=1")
    assert values[2 + column].split()[0] == f"{group['metrics']['explained_variance']['value']:.3f}"
    told = float(differences[2].split()[0])
    assert told == pytest.approx(group["deltas"]["explained_variance"]["value"], abs=5e-4)


def test_noise_is_marked_in_the_table(planted: Comparison) -> None:
    differences = planted.markdown().split("minus the baseline")[1].splitlines()
    same = next(line for line in differences if line.startswith("| lambda=0.1"))
    found = next(line for line in differences if line.startswith("| lambda=1 "))
    assert same.split(" | ")[2].startswith("~ ") and not found.split(" | ")[2].startswith("~")


def test_the_document_survives_json(planted: Comparison) -> None:
    text = json.dumps(planted.to_json(), allow_nan=False)
    assert Comparison(**json.loads(text)) == planted


def test_several_comparisons_and_single_seeds_are_said(planted: Comparison) -> None:
    text = " ".join(planted.notices)
    assert "all its metrics reaches by chance in one comparison of twenty" in text
    assert "one seed: every setting" in text


def test_a_grid_has_the_baseline_at_lambda_zero(tmp_path: Path) -> None:
    write_run(tmp_path / "base")
    for window in (4, 8):
        for value in (0.3, 1.0):
            if (window, value) != (8, 0.3):
                write_run(tmp_path / f"{window}-{value}", changed(window=window, lambda_=value))
    comparison = compare_runs([tmp_path])
    (grid,) = comparison.grids
    assert grid["windows"] == [4, 8] and grid["lambdas"] == [0.0, 0.3, 1.0]
    assert [row[0] for row in grid["groups"]] == [0, 0] and grid["groups"][1][1] is None
    cell = grid["groups"][1][2]
    assert (
        comparison.groups[cell]["settings"] | {"window": 8, "lambda": 1.0}
        == (comparison.groups[cell]["settings"])
    )
    assert grid["metrics"]["C_4"][1][2] == comparison.groups[cell]["metrics"]["C_4"]["value"]
    assert grid["metrics"]["C_4"][1][1] is None
    assert comparison.headline_window == 4


def test_the_shuffled_control_is_an_arm_of_its_own(tmp_path: Path) -> None:
    write_run(tmp_path / "base")
    write_run(tmp_path / "variant", changed(**VARIANT))
    write_run(tmp_path / "control", changed(consistency__shuffle_positions=True, **VARIANT))
    comparison = compare_runs([tmp_path])
    labels = {g["settings"]["consistency"] for g in comparison.groups}
    assert labels == {"none", "scale_free", "shuffled"} and len(comparison.arms) == 3
    assert by_label(comparison, "lambda=1 consistency=shuffled")["deltas"]


def test_an_sae_of_means_is_compared_with_the_same_on_single_tokens(tmp_path: Path) -> None:
    write_run(tmp_path / "base")
    averaged = changed(lambda_=0, training__average="window")
    write_run(tmp_path / "means", averaged, features=codes(0.9, seed=5))
    comparison = compare_runs([tmp_path])
    assert [g["is_baseline"] for g in comparison.groups] == [True, False]
    group = by_label(comparison, "averaged window=4")
    assert group["deltas"] and group["match"]["groups"] == [0]
    (said,) = comparison.answers
    assert "against the same on single tokens" in said


def test_profiles_are_relative_to_each_features_mean_rate(tmp_path: Path) -> None:
    features = torch.zeros(N, T, F)
    features[:, 1:, 0] = 1.0
    features[: N // 2, 8:, 1] = 1.0
    write_run(tmp_path / "run", features=features)
    profile = compare_runs([tmp_path]).groups[0]["profile"]
    late = 15 / 8
    assert profile["rate"][0] is None
    assert profile["rate"][1] == pytest.approx((1 + 0) / 2)
    assert profile["rate"][10] == pytest.approx((1 + late) / 2)


# ------------------------------------------------------------------- what cannot be compared


def test_runs_of_other_activations_are_compared_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "base")
    write_run(tmp_path / "variant", changed(**VARIANT))
    other = changed(model__name="test/other", lambda_=1.0)
    write_run(tmp_path / "other", other, x=inputs(seed=3))
    comparison = compare_runs([tmp_path])
    assert [s["model"] for s in comparison.streams] == ["test/tiny", "test/other"]
    group = next(g for g in comparison.groups if g["stream"] == 1)
    assert group["match"]["kind"] == "none" and group["deltas"] == {}
    assert any("2 different sets of activations" in notice for notice in comparison.notices)


def test_other_held_out_contexts_are_another_stream(tmp_path: Path) -> None:
    write_run(tmp_path / "base")
    write_run(tmp_path / "variant", changed(**VARIANT), x=inputs(seed=3))
    comparison = compare_runs([tmp_path])
    assert len(comparison.streams) == 2
    assert not any(group["deltas"] for group in comparison.groups)


def test_a_run_that_never_finished_is_left_out_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "half", changed(**VARIANT), finished=False)
    comparison = compare_runs([tmp_path])
    record = next(r for r in comparison.runs if r["name"] == "half")
    assert record["status"] == "unfinished" and "has not finished" in record["reason"]
    assert any("half" in notice for notice in comparison.notices)
    with pytest.raises(UserError, match="has not finished"):
        compare_runs([tmp_path / "half"])


@pytest.mark.parametrize(
    "damaged",
    ["config.json", "eval/core.json", "eval/consistency.json", "metrics.jsonl", "sae/cfg.json"],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, damaged: str) -> None:
    write_run(tmp_path / "good")
    run = write_run(tmp_path / "bad", changed(**VARIANT))
    (run / damaged).write_text('{"half": ')
    record = next(r for r in compare_runs([tmp_path]).runs if r["name"] == "bad")
    assert record["status"] == "damaged" and "\n" not in record["reason"]
    with pytest.raises(UserError, match="bad"):
        compare_runs([run])


@pytest.mark.parametrize("missing", ["eval/per_feature.safetensors", "eval/core.json", "sae"])
def test_a_missing_file_is_damage(tmp_path: Path, missing: str) -> None:
    run = write_run(tmp_path / "bad")
    (run / missing).rename(tmp_path / "gone")
    with pytest.raises(UserError, match="bad"):
        compare_runs([run])


def test_runs_without_resamples_still_have_values(tmp_path: Path) -> None:
    for name, changes in (("base", {}), ("variant", VARIANT)):
        run = write_run(tmp_path / name, changed(**changes))
        (run / "eval" / "draws.safetensors").unlink()
    deltas = by_label(compare_runs([tmp_path]), "lambda=1")["deltas"]
    assert deltas["C_4"]["value"] is not None and deltas["C_4"]["within_noise"] is None
    assert "no interval over documents" in deltas["C_4"]["reason"]
    assert deltas["explained_variance"]["within_noise"] is not None


def test_folders_that_hold_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run nor a sweep"):
        compare_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match="is not a folder"):
        compare_runs([tmp_path / "nowhere"])


def test_an_sae_with_every_feature_dead_gets_words(tmp_path: Path) -> None:
    write_run(tmp_path / "base")
    write_run(tmp_path / "dead", changed(**VARIANT), features=torch.zeros(N, T, F))
    comparison = compare_runs([tmp_path])
    json.dumps(comparison.to_json(), allow_nan=False)
    group = by_label(comparison, "lambda=1")
    assert group["metrics"]["frac_alive"]["value"] == 0
    assert group["metrics"]["C_4"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "no feature fired on a valid token",
    }
    assert group["match"]["words"] == "no feature fires, so there is no L0 to match"
    assert "n/a" in comparison.markdown()


def test_one_context_gives_values_and_says_why_there_are_no_intervals(tmp_path: Path) -> None:
    x = inputs(n_contexts=1)
    write_run(tmp_path / "base", x=x)
    write_run(tmp_path / "variant", changed(**VARIANT), x=x)
    comparison = compare_runs([tmp_path])
    json.dumps(comparison.to_json(), allow_nan=False)
    delta = by_label(comparison, "lambda=1")["deltas"]["explained_variance"]
    assert delta["value"] == 0 and delta["within_noise"] is None
    assert any(notice.startswith("no intervals: ") for notice in comparison.notices)


# ------------------------------------------------------------------------- a chosen baseline


@pytest.fixture(scope="module")
def of_two_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without temporal loss: two dictionary sizes; with it: one."""
    root = tmp_path_factory.mktemp("kinds")
    write_run(root / "small", features=codes(0.3))
    write_run(root / "small-temporal", changed(lambda_=1.0), features=codes(0.9, seed=5))
    write_run(root / "other", changed(training__lr=0.5), features=codes(0.6, seed=6))
    return root


def test_every_other_run_is_compared_with_the_baseline_that_was_chosen(of_two_kinds: Path) -> None:
    own = compare_runs([of_two_kinds])
    assert [g["is_baseline"] for g in own.groups] == [True, True, False]
    lr = own.groups[own.groups[2]["match"]["groups"][0]]["differs"]["training.lr"]
    chosen = compare_runs([of_two_kinds], {"training.lr": f"{lr:g}"})
    (baseline,) = [g for g in chosen.groups if g["is_baseline"]]
    others = [g for g in chosen.groups if not g["is_baseline"]]
    assert len(others) == 2
    for group in others:
        assert group["match"]["groups"] == [baseline["id"]]
        value = group["metrics"]["C_8"]["value"] - baseline["metrics"]["C_8"]["value"]
        assert group["deltas"]["C_8"]["value"] == pytest.approx(value)
        assert value > 0 and group["deltas"]["C_8"]["within_noise"] is False
    assert sum("lr=0.5" in g["label"] for g in others) == 1


def test_a_chosen_baseline_that_no_run_has_is_refused_with_those_there_are(
    of_two_kinds: Path,
) -> None:
    with pytest.raises(UserError, match=r"training\.lr=7; there are: .*training\.lr=0\.5"):
        compare_runs([of_two_kinds], {"training.lr": "7"})
    with pytest.raises(UserError, match="no run there has such a key"):
        compare_runs([of_two_kinds], {"training.luck": "1"})
