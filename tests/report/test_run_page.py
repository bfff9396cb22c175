"""The page of a run: whole, offline, and the same to a browser as to its author."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from browser import EVIL, Tags, page_of, show
from run_folders import codes, inputs, write_run

from tcsae.base.errors import UserError
from tcsae.base.files import read_json, write_json
from tcsae.report.notes import run_notes
from tcsae.runs.folder import load_run


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Path:
    return page_of(run_folder)


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


def test_explained_variance_by_norm_limit_and_its_caution_are_shown(
    tags: Tags, run_folder: Path, tmp_path: Path
) -> None:
    assert "Explained variance by norm limit" in tags.text
    assert "3 x the median (this run's)" in tags.text and "no limit" in tags.text
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    core = read_json(copy / "eval" / "core.json")
    extras = core["eval_result_unstructured"]
    extras["norm_limit_caution"] = {
        "decides_the_headline": True,
        "limits": [5],
        "text": "Explained variance depends on the norm limit: told",
    }
    write_json(copy / "eval" / "core.json", core)
    told = Tags(page_of(copy).read_text(encoding="utf-8"))
    assert "depends on the norm limit: told" in told.text
    assert "depends on the norm limit" not in tags.text


def test_a_run_that_was_measured_before_the_limits_has_a_page(
    run_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    core = read_json(copy / "eval" / "core.json")
    for key in ("explained_variance_by_norm_limit", "norm_limit_caution"):
        del core["eval_result_unstructured"][key]
    write_json(copy / "eval" / "core.json", core)
    page = Tags(page_of(copy).read_text(encoding="utf-8"))
    assert "norm limit" not in page.text and "Explained variance" in page.text


def test_headline_and_command_are_written_out(tags: Tags, run_folder: Path) -> None:
    from tcsae.base.labels import number

    core = load_run(run_folder).core["eval_result_metrics"]
    value = number(core["reconstruction_quality"]["explained_variance"])
    assert f"Explained variance {value}" in tags.text
    assert "python -m tcsae.train" in tags.text


def test_a_run_without_analysis_says_so(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    shutil.rmtree(folder / "analysis")
    text = Tags(page_of(folder).read_text(encoding="utf-8")).text
    assert "Clusters: not there: this run has no analysis/ folder" in text


def test_what_is_no_finished_run_is_refused_in_a_line(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        page_of(tmp_path)
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "final_info.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        page_of(tmp_path / "run")


def test_tokens_are_text_whatever_they_contain(evil_folder: Path) -> None:
    tags = Tags(page_of(evil_folder).read_text(encoding="utf-8"))
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
    page = page_of(evil_folder)
    shown = show(page, "#feature-0")
    html = shown.tags if shown else Tags(page.read_text(encoding="utf-8"))
    assert not html.named("img")
    if shown:
        assert shown.messages == []
        assert EVIL in html.text


@pytest.mark.slow
def test_the_table_sorts_and_searches(page: Path, run_folder: Path, tmp_path: Path) -> None:
    from tcsae.report.contents import Contents

    script = """<script>
      document.querySelector('#features-head [data-key=density] button').click();
      const rows = () => [...document.querySelectorAll('#features-body tr')];
      document.body.dataset.order = rows().map((row) => row.dataset.feature).join(' ');
      const box = document.getElementById('features-search');
      box.value = '17';
      box.dispatchEvent(new Event('input'));
      document.body.dataset.found = rows().map((row) => row.dataset.feature).join(' ');
      const ask = (text) => {
        box.value = text;
        box.dispatchEvent(new Event('input'));
        return rows().map((row) => row.dataset.feature).join(' ');
      };
      document.body.dataset.met = ask('C>.01  density < 0.05');
      document.body.dataset.none = ask('nothing>3');
      document.body.dataset.said = document.getElementById('features-count').textContent;
      ask('');
      rows()[0].click();
      document.body.dataset.near = document.getElementById('feature-partners').textContent;
      document.body.dataset.lens = document.getElementById('feature-lens').textContent;
      document.body.dataset.opened = document.getElementById('feature-title').textContent;
    </script></body>"""
    html = page.read_text(encoding="utf-8").replace("</body>", script)
    tried = tmp_path / "page.html"
    tried.write_text(html, encoding="utf-8")
    shown = show(tried)
    body = shown.tags.named("body")[0] if shown else {}
    if shown:
        assert shown.messages == []
        density = Contents.of(load_run(run_folder)).values["density"]
        order = [int(i) for i in body["data-order"].split()]
        assert sorted(order) == list(range(96))
        values = [float(f"{density[i]:.4g}") for i in order]
        assert values == sorted(values, reverse=True)
        assert "17" in body["data-found"].split()
        assert len(body["data-found"].split()) < 96
        contents = Contents.of(load_run(run_folder))
        C = contents.values[str(contents.window_metric)]
        met = {i for i in range(96) if C[i] > 0.01 and density[i] < 0.05}
        assert {int(i) for i in body["data-met"].split()} == met and 0 < len(met) < 96
        assert len(body["data-none"].split()) == 96
        assert "there is no column nothing" in body["data-said"]
        feature = int(body["data-opened"].split()[1])
        W = torch.nn.functional.normalize(contents.run.sae.W_dec.detach(), dim=1)
        cosine = (W @ W[feature]).index_fill(0, torch.tensor([feature]), -2.0)
        assert f"Nearest direction: feature {int(cosine.argmax())} " in body["data-near"]
        assert "Fires with: feature" in body["data-near"]
        analysis = contents.analysis
        assert analysis is not None
        raised = analysis.logit_lens["raised"][feature]
        text = analysis.top_tokens["tokens"][str(int(raised[0]))]
        said = body["data-lens"]
        assert said.startswith("Raises: ") and "Lowers: " in said and text.strip() in said
    assert 'id="features-search"' in html


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dead", "one context"])
def test_a_run_with_hardly_anything_to_show_has_a_page(
    kind: str, run_folder: Path, tmp_path: Path
) -> None:
    n_contexts = 1 if kind == "one context" else 24
    features = codes(n_contexts=n_contexts) * (kind != "dead")
    folder = write_run(tmp_path / "run", features=features, x=inputs(n_contexts=n_contexts))
    shutil.copy(run_folder / "final_info.json", folder)
    html = page_of(folder).read_text(encoding="utf-8")
    data = html.partition('id="content">')[2].partition("</script>")[0]
    assert "NaN" not in data and "Infinity" not in data
    text = Tags(html).text
    reason = "no feature fired on a valid token" if kind == "dead" else "a single context"
    assert reason in text
    assert reason in " ".join(run_notes(load_run(folder)).split())
    shown = show(folder / "report.html")
    assert shown is None or shown.messages == []
