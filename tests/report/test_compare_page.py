"""The page of a comparison shows what `compare_runs` found."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Tags, show
from run_folders import changed, codes, write_run

from tcsae.report.compare_page import write_compare_report
from tcsae.report.comparison import Comparison, compare_runs
from tcsae.report.notes import comparison_notes


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A baseline, window x lambda, one clear difference, one run that did not finish."""
    root = tmp_path_factory.mktemp("sweep")
    write_run(root / "baseline", features=codes(0.2))
    for window in (2, 4):
        for lambda_, phi in ((0.1, 0.2), (1.0, 0.9)):
            config = changed(window=window, lambda_=lambda_)
            features = codes(phi, seed=10 * window + int(lambda_))
            write_run(root / f"w{window}-{lambda_}", config, features=features, noise_seed=window)
    write_run(root / "unfinished", changed(seed=3), finished=False)
    return compare_runs([root])


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compare_report(comparison, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def tags(page: Path) -> Tags:
    return Tags(page.read_text(encoding="utf-8"))


def test_every_setting_is_a_row_and_every_kind_of_figure_is_there(
    comparison: Comparison, tags: Tags
) -> None:
    for group in comparison.groups:
        assert group["label"] in tags.text
    drawn = {a["data-figure"] for _, a in tags.elements if "data-figure" in a}
    window = f"C_{comparison.headline_window}"
    figures = ["pareto", "trade", "autocorrelation", "profile", "density", "by-density"]
    assert {f"s0-{name}" for name in figures} <= drawn
    assert {f"s0-grid-0-{window}", f"s0-delta-{window}"} <= drawn


def test_the_clear_and_the_noise_are_told_apart(comparison: Comparison, tags: Tags) -> None:
    assert "Autocorrelation rho_1 is higher" in tags.text
    assert "Within noise, so no difference was shown" in tags.text
    kinds = [a.get("class") for a in tags.named("td")]
    deltas = [
        e
        for g in comparison.groups
        for name, e in [*g["deltas"].items(), *g["density_matched"].items()]
        if name in comparison.headline and name != "l0" or e in g["density_matched"].values()
    ]
    assert kinds.count("clear") == sum(e["within_noise"] is False for e in deltas) > 0


def test_what_was_left_out_is_said(tags: Tags) -> None:
    assert "unfinished" in tags.text
    assert "has not finished" in tags.text


def test_notes_carry_every_metric_and_every_verdict(comparison: Comparison) -> None:
    text = comparison_notes(comparison)
    unwrapped = " ".join(text.split())
    for notice in comparison.notices:
        assert " ".join(notice.split()) in unwrapped
    for group in comparison.groups:
        assert f"\n{group['label']}\n" in text
    assert text.count("Window consistency C_2 ") >= len(comparison.groups)
    assert "At equal density" in text


def test_a_comparison_without_any_baseline_claims_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a", changed(lambda_=1.0))
    write_run(tmp_path / "b", changed(lambda_=2.0))
    found = compare_runs([tmp_path])
    html = write_compare_report(found, tmp_path / "page.html").read_text(encoding="utf-8")
    text = Tags(html).text
    assert "Not compared: no baseline with the same settings" in text
    assert "is higher" not in text and "is lower" not in text
    assert "is higher" not in comparison_notes(found)


def test_with_many_settings_the_curves_are_few_and_the_page_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "baseline")
    for i in range(13):
        write_run(tmp_path / f"run{i}", changed(lambda_=0.1 * (i + 1)))
    found = compare_runs([tmp_path])
    text = Tags(write_compare_report(found, tmp_path / "p.html").read_text(encoding="utf-8")).text
    assert "Curves of 2 settings are left out" in text


@pytest.mark.slow
def test_a_browser_draws_everything_and_has_no_complaint(page: Path) -> None:
    shown = show(page)
    if shown:
        assert shown.messages == []
        assert shown.tags.named("body") == [{"data-drawn": "all"}]
    else:
        assert len(Tags(page.read_text(encoding="utf-8")).named("script")) == 3


def test_a_grid_writes_the_difference_and_marks_noise(comparison: Comparison) -> None:
    from tcsae.report.compare_page import stream_figures

    content = comparison.to_json()
    name = f"C_{comparison.headline_window}"
    heat = stream_figures(content["groups"], content["grids"], content)[f"grid-0-{name}"].data[0]
    grid = content["grids"][0]
    marked = [cell.count("<br>~ ") for row in heat.text for cell in row]
    deltas = [content["groups"][i]["deltas"].get(name) for row in grid["groups"] for i in row]
    assert marked == [int(bool(d and d["within_noise"])) for d in deltas]
    assert 0 < sum("<br>" in cell for row in heat.text for cell in row) < heat.z.size
