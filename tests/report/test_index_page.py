"""The index over a folder: every run once, links that lead somewhere, and nothing that is not."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import Tags, show
from run_folders import changed, codes, write_run

from tcsae.base.errors import UserError
from tcsae.base.files import write_json
from tcsae.compare import main
from tcsae.report.compare_files import write_comparison
from tcsae.report.comparison import compare_runs
from tcsae.report.index_page import HEAD, INDEX, write_index


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index")
    sweep = root / "a sweep"
    write_run(sweep / "none", features=codes(0.2))
    write_run(sweep / "loss", changed(lambda_=1.0), features=codes(0.9, seed=3))
    write_run(root / "begun", changed(seed=4), finished=False)
    for name in ("none", "loss"):
        (sweep / name / "report.html").write_text("a page")
        write_json(
            sweep / name / "final_info.json",
            {
                "layer": 1,
                "metrics": {"q": {"explained_variance": 0.75}, "s": {"l0": 4.0}},
                "consistency": {"metrics": {"C_8": {"energy_weighted": 0.125, "median": 0.0625}}},
            },
        )
    write_comparison(compare_runs([sweep]), sweep / "comparison")
    return root


def hrefs(page: Path) -> list[Path]:
    tags = Tags(page.read_text(encoding="utf-8")).named("a")
    found = [str(a["href"]) for a in tags if not str(a["href"]).startswith("#")]
    return [page.parent / unquote(href) for href in found]


def test_every_run_is_there_with_its_numbers_and_every_link_leads_somewhere(folder: Path) -> None:
    main([str(folder), "--index"])
    page = folder / INDEX
    text = Tags(page.read_text(encoding="utf-8")).text
    assert text.startswith("3 runs in") or "3 runs in" in text
    assert all(name in text for name in ("a sweep/none", "a sweep/loss", "begun not finished"))
    assert "0.750" in text and "0.125 0.062" in text and all(cell in text for cell in HEAD)
    linked = hrefs(page)
    assert [path for path in linked if not path.is_file()] == []
    pages = {path.parent.name for path in linked if path.name == "report.html"}
    assert pages == {"none", "loss", "comparison"}
    assert compare_runs([folder / "a sweep"]).answers[0] in text
    shown = show(page)
    assert shown is None or shown.messages == []


def test_a_comparison_links_to_its_runs(folder: Path) -> None:
    linked = hrefs(folder / "a sweep" / "comparison" / "report.html")
    assert {path.resolve().parent.name for path in linked} == {"none", "loss"}
    assert all(path.is_file() for path in linked)


def test_a_folder_without_runs_and_a_second_folder_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_index(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        write_index(tmp_path / "none")
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path), "--index"])
    assert "--index takes one DIR" in capsys.readouterr().err
