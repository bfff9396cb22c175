"""The W&B dashboard: everything it shows is something that a run or a comparison logs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import environment, run_here, small_job, write_texts
from run_folders import changed, codes, write_run
from wandb_server import OfflineRun, Server, offline_runs

from tcsae import dashboard
from tcsae.config import TrackingConfig
from tcsae.jobs.tracking import send_comparison
from tcsae.report.comparison import compare_runs

OWN = {"run:displayName", "run:group", "run:createdAt"}
"""What W&B knows of every run by itself."""


@dataclass
class Logged:
    """What was logged, by the names that a dashboard uses."""

    history: set[str]
    summary: set[str]
    config: dict[str, Any]
    media: dict[str, str]
    """Key to type: plotly-file or table-file."""


@pytest.fixture(scope="module")
def logged(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """A real run, and the comparison of a small sweep."""
    import wandb

    folder = tmp_path_factory.mktemp("dashboard")
    arguments = small_job(
        tiny_gpt2,
        # Of fewer than 16 held-out documents rank, twins and clusters cannot be told.
        write_texts(folder / "texts", documents=80),
        folder / "run",
        layer="1",
        tracking="offline",
        store__dir=str(folder / "store"),
        evaluation__windows="[2,4,8]",
        evaluation__analysis="true",
        dataset__n_eval_contexts="24",
    )
    assert run_here(*arguments).code == 0
    sweep = folder / "sweep"
    write_run(sweep / "base")
    write_run(sweep / "a", changed(lambda_=1.0, window=8), features=codes(0.9))
    write_run(sweep / "b", changed(lambda_=1.0, window=4), features=codes(0.7))
    (sweep / "comparison").mkdir()
    send_comparison(compare_runs([sweep]), sweep / "comparison", TrackingConfig(), "sweep")
    wandb.teardown()  # everything is written when it returns
    (run,) = offline_runs(folder / "run")
    (comparison,) = offline_runs(sweep / "comparison")
    return _logged([run, comparison], run.config)


def _logged(runs: list[OfflineRun], config: dict[str, Any]) -> Logged:
    rows = [row for run in runs for row in run.history]
    media = {key.removesuffix("._type"): row[key] for row in rows for key in row if "._type" in key}
    return Logged(
        history={key for row in rows for key, value in row.items() if _is_number(value)},
        summary={k for run in runs for k, value in run.summary.items() if _is_number(value)},
        config=config,
        media=media,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ------------------------------------------------------------------------- what is shown of it


def missing(definition: dict[str, Any], logged: Logged) -> list[str]:
    """Whatever a workspace shows, filters or sorts by that is not in `logged`."""
    section = definition["section"]
    found = []
    for part in section["panelBankConfig"]["sections"]:
        for panel in part["panels"]:
            found += [f"{part['name']}: {name}" for name in _missing(panel, logged)]
    (runs,) = section["runSets"]
    keys = [*runs["runFeed"]["columnPinned"]]
    keys += [_key(entry) for entry in runs["grouping"]]
    keys += [_key(entry["key"]) for entry in runs["sort"]["keys"]]
    keys += [_key(entry["key"]) for entry in runs["filters"]["filters"]]
    return found + [name for name in keys if not _is_known(name, logged)]


def _key(entry: dict[str, str]) -> str:
    return f"{entry['section']}:{entry['name']}"


def _missing(panel: dict[str, Any], logged: Logged) -> list[str]:
    kind, config = panel["viewType"], panel["config"]
    if kind == "Run History Line Plot":
        names = {*config["metrics"], config["xAxis"]} - logged.history
        pattern = config.get("metricRegex")
        matches = pattern and [name for name in logged.history if re.search(pattern, name)]
        assert config["metrics"] or len(matches) > 1
        return sorted(names)
    if kind == "Bar Chart":
        return sorted(set(config["metrics"]) - logged.summary)
    if kind == "Media Browser":
        shown = [key for key in config["mediaKeys"] if logged.media.get(key) != "plotly-file"]
        return shown if config["mediaKeys"] else ["nothing"]
    if kind == "Weave":
        name = config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]
        return [] if logged.media.get(name) == "table-file" else [name]
    if kind == "Scatter Plot":
        names = [config[f"{axis}Axis"] for axis in "xyz"]
    elif kind == "Parallel Coordinates Plot":
        names = [column["accessor"] for column in config["columns"]]
    else:
        # A kind of panel that is not known here is not checked, so there must be none.
        assert kind == "Parameter Importance", kind
        names = [f"summary:{config['targetKey']}"]
    assert names
    return [name for name in names if not _is_known(name, logged)]


def _is_known(accessor: str, logged: Logged) -> bool:
    place, _, name = accessor.partition(":")
    if place == "summary":
        return name in logged.summary
    if place != "config":
        return accessor in OWN
    node: Any = logged.config
    first, value, *rest = name.split(".")
    assert value == "value"
    for key in (first, *rest):
        if key not in node:
            return False
        node = node[key]
    return not isinstance(node, dict)


def _definition(**about: Any) -> dict[str, Any]:
    return dashboard.definition(dashboard.workspace("someone", "tcsae", **about))


def _without_value(name: str) -> bool:
    """The contexts here are too short for a document part beyond W = 2, and no feature is sparse:
    what would be logged as null."""
    return bool(re.search(r"\b[DL]_[48](_sparse)?$|\bL_2_sparse$|-[DL]_[48](_sparse)?$", name))


@pytest.mark.parametrize("group", [None, "sweep"])
def test_every_key_of_the_dashboard_is_one_that_a_run_logs(
    logged: Logged, group: str | None
) -> None:
    found = missing(_definition(group=group), logged)
    assert [name for name in found if not _without_value(name)] == []


@pytest.mark.parametrize("window", [2, 4])
def test_another_window_is_one_that_a_run_logs_too(logged: Logged, window: int) -> None:
    found = missing(_definition(window=window), logged)
    assert [name for name in found if not _without_value(name)] == []
    if window == 2:
        assert {"eval/L_2", "eval/D_2", "eval/edge_energy"} <= logged.summary


def test_a_window_that_was_not_measured_is_missed_everywhere(logged: Logged) -> None:
    names = " ".join(missing(_definition(window=16), logged))
    assert names.count("summary:eval/C_16") == 7
    assert "comparison/s0-grid-0-C_16" in names


def test_the_check_knows_what_is_not_logged(logged: Logged) -> None:
    import wandb_workspaces.reports.v2 as wr

    made = dashboard.workspace("someone", "tcsae")
    made.sections[0].panels = [
        wr.LinePlot(x="tokens", y=["loss/nothing", "l0"]),
        wr.ScatterPlot(x=wr.Config("sae.nothing"), y=wr.Config("lambda"), z="eval/l0"),
        wr.BarPlot(metrics=["nothing"]),
        wr.MediaBrowser(media_keys=["report/features"]),
        wr.WeavePanelSummaryTable(table_name="report/profile"),
    ]
    found = missing(dashboard.definition(made), logged)
    assert [name.partition(": ")[2] for name in found if not _without_value(name)] == [
        "loss/nothing",
        "config:sae.value.nothing",
        "nothing",
        "report/features",
        "report/profile",
    ]


# --------------------------------------------------------------------------------- its shape


def test_all_sweeps_are_grouped_and_one_is_filtered() -> None:
    (everything,) = _definition()["section"]["runSets"]
    assert everything["grouping"] == [{"section": "run", "name": "group"}]
    assert everything["filters"]["filters"] == []
    (one,) = _definition(group='it\'s "a" sweep')["section"]["runSets"]
    assert one["grouping"] == []
    (condition,) = one["filters"]["filters"]
    assert condition["key"] == {"section": "run", "name": "group"}
    assert (condition["op"], condition["value"]) == ("=", 'it\'s "a" sweep')


def test_the_sections_are_those_of_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "docs" / "wandb.md").read_text()
    made = dashboard.workspace("someone", "tcsae")
    for section in made.sections:
        assert f"**{section.name}**" in text, section.name


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_definition_is_written_without_account_or_network(
    no_network: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "workspace.json"
    dashboard.main(["--entity", "someone", "--group", "sweep", "--json", str(file)])
    assert capsys.readouterr().out == f"definition: {file}\n"
    assert _without_ids(json.loads(file.read_text())) == _without_ids(_definition(group="sweep"))


def _without_ids(node: Any) -> Any:
    """Panels have random ids."""
    if isinstance(node, dict):
        return {k: _without_ids(v) for k, v in node.items() if k not in ("__id__", "id")}
    return [_without_ids(item) for item in node] if isinstance(node, list) else node


def test_a_dry_run_names_every_section_and_panel(
    no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.main(["--entity", "someone", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    made = dashboard.workspace("someone", "tcsae")
    assert len(lines) == 1 + sum(1 + len(section.panels) for section in made.sections)
    assert lines[0] == "workspace 'tcsae sweeps' for someone/tcsae"
    assert "  LinePlot: explained variance, in the batch" in lines


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        dashboard.main(["--entity", "someone", "--json", str(tmp_path / "file" / "a.json")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"tcsae: {tmp_path / 'file'}: File exists"


def _command(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = environment(HOME=str(tmp_path), NETRC=str(tmp_path / "none"), **env)
    own.pop("WANDB_MODE", None)
    return subprocess.run(
        [sys.executable, "-m", "tcsae.dashboard", "--entity", "someone", *arguments],
        env=own,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_a_login_the_command_says_in_one_line_what_to_do(tmp_path: Path) -> None:
    done = _command(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tcsae: W&B did not take the workspace for someone/tcsae (no API key")
    assert "run `wandb login`" in line and "--json FILE" in line


def test_the_command_saves_the_workspace_and_says_where(tmp_path: Path) -> None:
    with Server() as server:
        key = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "local-" + "0" * 40}
        done = _command(tmp_path, "--group", "sweep", **key)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"workspace: {server.url}/someone/tcsae?nw=abc\n"
        (view,) = server.views
    assert (view["entityName"], view["projectName"]) == ("someone", "tcsae")
    assert view["displayName"] == "tcsae sweep"
    assert _without_ids(json.loads(view["spec"])) == _without_ids(_definition(group="sweep"))
