"""The page of a run: whole, offline, and the same to a browser as to its author."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from browser import EVIL, Tags, show

from tcsae.errors import UserError
from tcsae.report.run_page import write_run_report


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Path:
    return write_run_report(run_folder)


@pytest.fixture(scope="module")
def tags(page: Path) -> Tags:
    return Tags(page.read_text(encoding="utf-8"))


def test_the_page_lies_in_the_run_folder(page: Path, run_folder: Path) -> None:
    assert page == run_folder / "report.html"
    assert page.stat().st_size < 6_000_000


def test_nothing_is_fetched(page: Path, tags: Tags) -> None:
    for _, attributes in tags.elements:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    style = page.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_plotly_is_in_the_page_once(page: Path) -> None:
    assert len(re.findall(r"\* plotly\.js v", page.read_text(encoding="utf-8"))) == 1


def test_every_part_is_there(tags: Tags) -> None:
    ids = {attributes.get("id") for _, attributes in tags.elements}
    parts = "results training consistency positions together families features all repeat"
    assert set(parts.split()) <= ids
    drawn = {a["data-figure"] for _, a in tags.elements if "data-figure" in a}
    assert {"autocorrelation", "profile", "correlation", "training-0"} <= drawn
    assert any(name.startswith("distribution-C_") for name in drawn)


def test_headline_and_command_are_written_out(tags: Tags, run_folder: Path) -> None:
    from tcsae.report.labels import number
    from tcsae.run import load_run

    core = load_run(run_folder).core["eval_result_metrics"]
    value = number(core["reconstruction_quality"]["explained_variance"])
    assert f"Explained variance {value}" in tags.text
    assert "python -m tcsae.train" in tags.text


def test_a_run_without_analysis_says_so(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    shutil.rmtree(folder / "analysis")
    text = Tags(write_run_report(folder).read_text(encoding="utf-8")).text
    assert "Clusters: not there: this run has no analysis/ folder" in text


def test_what_is_no_finished_run_is_refused_in_a_line(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_run_report(tmp_path)
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "final_info.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        write_run_report(tmp_path / "run")


def test_tokens_are_text_whatever_they_contain(evil_folder: Path) -> None:
    tags = Tags(write_run_report(evil_folder).read_text(encoding="utf-8"))
    assert not tags.named("img")
    assert len(tags.named("script")) == 3


@pytest.mark.slow
def test_a_browser_draws_everything_and_has_no_complaint(page: Path) -> None:
    shown = show(page)
    html = shown.tags if shown else Tags(page.read_text(encoding="utf-8"))
    assert html.named("dialog")
    if shown:
        assert shown.messages == []
        assert html.named("body") == [{"data-drawn": "all"}]
        rows = [a for a in html.named("tr") if "data-feature" in a]
        assert len(rows) == 96
        assert "96 of 96 features" in html.text
        n_figures = len([a for a in html.named("div") if "data-figure" in a])
        assert shown.html.count('class="main-svg"') >= n_figures > 10


@pytest.mark.slow
def test_a_feature_opens_with_its_contexts(page: Path, run_folder: Path) -> None:
    from tcsae.report.contents import Contents
    from tcsae.run import load_run

    contents = Contents.of(load_run(run_folder))
    feature = int(contents.values["density"].argmax())
    shown = show(page, f"#feature-{feature}")
    if shown:
        assert shown.messages == []
        tags = shown.tags
        assert "open" in tags.named("dialog")[0]
        assert f"Feature {feature}" in tags.text
        top = contents.analysis.top_contexts
        n_contexts = int((top["context"][feature] >= 0).sum())
        blocks = [a for a in tags.named("div") if a.get("class") == "context"]
        assert len(blocks) == n_contexts > 0
        peaks = [a for a in tags.named("mark") if "peak" in (a.get("class") or "")]
        assert len(peaks) == n_contexts
        largest = float(top["value"][feature, 0])
        assert float(peaks[0]["title"].split()[0]) == pytest.approx(largest, abs=0.002)
    else:
        assert Tags(page.read_text(encoding="utf-8")).named("dialog")


@pytest.mark.slow
def test_a_browser_runs_no_token(evil_folder: Path) -> None:
    page = write_run_report(evil_folder)
    shown = show(page, "#feature-0")
    html = shown.tags if shown else Tags(page.read_text(encoding="utf-8"))
    assert not html.named("img")
    if shown:
        assert shown.messages == []
        assert EVIL in html.text
