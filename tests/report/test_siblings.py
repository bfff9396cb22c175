"""The links from a run's page to its sweep."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest

from tcsae.base.files import write_json
from tcsae.report.siblings import MOST, siblings


def sweep_of(folder: Path, n: int) -> Path:
    folder.mkdir(exist_ok=True)
    jobs = [{"folder": f"lambda=0.{i},a b", "name": f"lambda=0.{i}"} for i in range(n)]
    write_json(folder / "sweep.json", {"jobs": jobs})
    return folder


def test_links_lead_to_the_comparison_and_the_other_runs(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "sweep", 3)
    run = sweep / "lambda=0.1,a b"
    found = siblings(run)
    assert found is not None
    assert (found["sweep"], found["name"], found["n"]) == ("sweep", "lambda=0.1", 3)
    targets = [(run / unquote(other["href"])).resolve() for other in found["others"]]
    assert targets == [sweep / f"lambda=0.{i},a b" / "report.html" for i in (0, 2)]
    assert (run / found["comparison"]).resolve() == sweep / "comparison" / "report.html"


@pytest.mark.parametrize("here", [0, 50, 99])
def test_of_a_large_sweep_the_nearest_are_linked(tmp_path: Path, here: int) -> None:
    sweep = sweep_of(tmp_path, 100)
    found = siblings(sweep / f"lambda=0.{here},a b")
    assert found is not None
    names = [int(other["name"].rpartition(".")[2]) for other in found["others"]]
    assert len(names) == MOST - 1 and here not in names
    assert max(names + [here]) - min(names + [here]) == MOST - 1


def test_a_run_of_no_sweep_and_a_file_that_is_none_have_no_links(tmp_path: Path) -> None:
    assert siblings(tmp_path / "outputs" / "run") is None
    write_json(tmp_path / "sweep.json", ["no", "sweep"])
    assert siblings(tmp_path / "run") is None
    sweep_of(tmp_path, 2)
    assert siblings(tmp_path / "another") is None
