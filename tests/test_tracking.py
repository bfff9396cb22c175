"""W&B: what a run is called there, what it has when all is written, and what `wandb sync` sends."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import environment, metric_lines, run_here, small_job
from run_folders import changed, codes, write_run
from wandb_server import OfflineRun, Server, offline_runs

from tcsae.base.errors import UserError
from tcsae.base.files import file_digest
from tcsae.config import Config, TrackingConfig, parse, run_id, run_name
from tcsae.jobs.tracking import (
    Tracker,
    comparison_columns,
    comparison_figures,
    comparison_id,
    run_tags,
    searchable,
    send_comparison,
)
from tcsae.jobs.wandb_run import WandbRun, check_environment
from tcsae.report.comparison import Comparison, compare_runs
from tcsae.training.member import Member

GROUP = "grid-0123456789"


def written(folder: Path) -> list[OfflineRun]:
    """The offline runs in a folder, once W&B's own process has written all of them."""
    import wandb

    wandb.teardown()
    return offline_runs(folder)


def client(server: Server, home: Path) -> dict[str, str]:
    """The environment of somebody who is logged in to `server`."""
    key = "local-" + "0" * 40
    env = environment(HOME=str(home), WANDB_BASE_URL=server.url, WANDB_API_KEY=key)
    del env["WANDB_MODE"]  # which the tests set
    return env


def config_of(**changes: Any) -> Config:
    return parse(changed(**changes))


# --------------------------------------------------------------------- names, tags, identity


def test_runs_are_tagged_by_what_they_are_made_of_and_by_the_user() -> None:
    config = config_of(lambda_=0.1, tracking={"tags": ["paper", "topk"]})
    assert run_tags(config) == ["topk", "scale_free", "files", "tiny", "paper"]
    baseline = ["topk", "scale_free", "files", "tiny", "baseline"]
    assert run_tags(config_of()) == baseline
    assert "baseline" in run_tags(config_of(consistency={"form": "none"}, lambda_=0.1))
    averaged = config_of(training__average="window")  # no baseline: means were trained on
    assert run_tags(averaged)[-1] == "averaged" and "baseline" not in run_tags(averaged)
    shuffled = {"form": "scale_free", "shuffle_positions": True}
    assert run_tags(config_of(consistency=shuffled, lambda_=0.1))[-1] == "shuffled control"


def test_no_tag_is_longer_than_wandb_takes() -> None:
    config = config_of(dataset__name="d" * 100, model__name="m" * 100)
    assert max(map(len, run_tags(config))) == 64


def test_window_and_lambda_are_numbers_in_wandb_also_for_documents() -> None:
    for window, number in ((4, 4), ("document", 16)):
        shown = searchable(config_of(window=window, lambda_=1), Path("runs/a"))
        assert shown["window"] == number and shown["window_option"] == str(window)
        assert shown["lambda"] == 1.0 and isinstance(shown["lambda"], float)
        assert shown["run_id"] == run_id(config_of(window=window, lambda_=1))
        assert Path(shown["run_folder"]) == Path("runs/a").resolve()


def test_tracking_is_not_part_of_what_a_run_is() -> None:
    told = config_of(tracking={"group": "sweep", "tags": ["a"], "artifacts": False})
    assert run_id(told) == run_id(config_of()) and run_name(told) == run_name(config_of())


@pytest.mark.parametrize(
    ("tracking", "key"),
    [
        ({"tags": ["a" * 65]}, "tracking.tags.0 = a"),
        ({"tags": [""]}, "tracking.tags.0 = "),
        ({"tags": "a"}, "tracking.tags = a"),
        ({"group": "a" * 129}, "tracking.group = a"),
        ({"project": "me/sae"}, "takes no / in a name"),
        ({"project": "a" * 129}, "tracking.project = a"),
        ({"project": ""}, "tracking.project = "),
        ({"entity": "me/team"}, "takes no / in a name"),
        ({"entity": ""}, "tracking.entity = "),
        ({"artifacts": "perhaps"}, "tracking.artifacts = perhaps"),
    ],
)
def test_what_wandb_would_not_take_is_refused_before_anything_runs(
    tracking: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=key):
        config_of(tracking=tracking)


# ------------------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def arguments(
    tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    store = tmp_path_factory.mktemp("store")

    def build(folder: Path, **changes: str) -> list[str]:
        fixed = {
            "layer": "1",
            "tracking": "offline",
            "store__dir": str(store),
            "tracking__group": GROUP,
            "tracking__tags": "[paper]",
            "name": "window\\=4\\,lambda\\=0.1",
        }
        return small_job(tiny_gpt2, texts, folder, **{**fixed, **changes})

    return build


@pytest.fixture(scope="module")
def interrupted(
    arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that died after it had logged step 6, whose last checkpoint was step 4; then the end
    of it."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    original = Member.train_step

    def dies(self: Member, *args: Any) -> Any:
        if self.step == 7:
            raise KeyboardInterrupt
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Member, "train_step", dies)
        assert run_here(*arguments(folder)).code == 130
    written(folder)
    outcome = run_here(*arguments(folder))
    assert outcome.code == 0 and "W&B is off" not in outcome.stdout, outcome.stdout
    written(folder)
    return folder


@pytest.fixture(scope="module")
def synced(interrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """What the server has after `wandb sync` of the folder."""
    home = tmp_path_factory.mktemp("home")
    with Server() as server:
        sync(interrupted / "wandb", server, home)
    return server


def test_a_run_is_in_its_group_under_its_id_name_tags_and_type(interrupted: Path) -> None:
    info = json.loads((interrupted / "final_info.json").read_text())
    for session in offline_runs(interrupted):
        assert session.run.run_id == info["unique_id"]
        assert session.run.run_group == GROUP
        assert session.run.display_name == "window=4,lambda=0.1"
        assert session.run.job_type == "train"
        assert session.run.project == "tcsae"
        assert list(session.run.tags) == ["topk", "scale_free", "files", "tiny", "paper"]
        assert (session.config["window"], session.config["lambda"]) == (4, 0.1)
        assert session.config["run_folder"] == str(interrupted)
        assert session.config["sae"]["d_sae"] == 96


def test_a_restarted_run_goes_on_under_the_same_id_and_nothing_is_missing(
    interrupted: Path,
) -> None:
    first, second = offline_runs(interrupted)
    assert (first.exit_code, second.exit_code) == (1, 0)
    rows = [[row for row in run.history if "l0" in row] for run in (first, second)]
    assert [row["training_step"] for row in rows[0]] == [2, 4, 6]
    assert [row["training_step"] for row in rows[1]] == [6, 8, 10, 12]
    lines = {line["step"]: line for line in metric_lines(interrupted)}
    for row in [*rows[0], *rows[1]]:
        line = lines[row["training_step"]]
        assert row["_step"] == row["training_step"]
        assert {k: row[k] for k in line if k != "step"} == pytest.approx(
            {k: v for k, v in line.items() if k != "step"}, rel=1e-6
        )


def test_the_summary_has_what_was_measured_on_held_out_text(interrupted: Path) -> None:
    info = json.loads((interrupted / "final_info.json").read_text())
    summary = offline_runs(interrupted)[-1].summary
    for group in info["metrics"].values():
        for name, value in group.items():
            assert summary[f"eval/{name}"] == value
    memory = info["consistency"]["metrics"]
    for name in ("C_4", "rho_1", "tau_int", "omega_squared"):
        assert summary[f"eval/{name}"] == memory[name]["energy_weighted"]


def test_a_finished_run_has_its_sae_and_its_report_as_artifacts(interrupted: Path) -> None:
    first, second = offline_runs(interrupted)
    name = second.run.run_id
    assert not {f"sae-{name}", f"report-{name}"} & set(first.artifacts)
    sae, report = (second.artifacts[f"{kind}-{name}"] for kind in ("sae", "report"))
    assert (sae.type, report.type) == ("sae", "report")
    assert _paths(sae) == {"cfg.json", "sae_weights.safetensors"}
    assert _paths(report) == {
        "report.html",
        "notes.txt",
        "config.json",
        "final_info.json",
        "eval/core.json",
        "eval/consistency.json",
    }
    about = json.loads(sae.metadata)
    assert (about["window"], about["lambda"], about["layer"]) == (4, 0.1, 1)


def _paths(artifact: Any) -> set[str]:
    return {entry.path for entry in artifact.manifest.contents}


def test_everything_that_sync_needs_is_in_the_run_folder(interrupted: Path) -> None:
    for session in offline_runs(interrupted):
        for artifact in session.artifacts.values():
            for entry in artifact.manifest.contents:
                assert Path(entry.local_path).is_relative_to(interrupted.resolve())
                assert Path(entry.local_path).stat().st_size == entry.size
    assert "WANDB_DATA_DIR" not in os.environ


def test_sync_makes_one_whole_run_of_all_sessions(interrupted: Path, synced: Server) -> None:
    (run,) = synced.runs.values()
    assert run.name == json.loads((interrupted / "final_info.json").read_text())["unique_id"]
    assert run.about["groupName"] == GROUP and run.about["jobType"] == "train"
    assert run.about["displayName"] == "window=4,lambda=0.1"
    assert run.about["tags"] == ["topk", "scale_free", "files", "tiny", "paper"]
    rows = [run.history[place] for place in sorted(run.history)]
    logged = [row for row in rows if "l0" in row]
    assert [row["training_step"] for row in logged] == [2, 4, 6, 6, 8, 10, 12]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert run.exit_code == 0
    assert run.summary["eval/l0"] == offline_runs(interrupted)[-1].summary["eval/l0"]


def test_sync_uploads_the_artifacts_and_the_table_of_features(
    interrupted: Path, synced: Server
) -> None:
    (run,) = synced.runs.values()
    artifacts = synced.artifacts
    assert all(entry["committed"] for entry in artifacts.values())
    types = sorted(entry["type"] for entry in artifacts.values())
    assert types == ["report", "run_table", "sae"]
    sent = synced.uploads[f"artifact/sae-{run.name}/sae_weights.safetensors"]
    assert sent == (interrupted / "sae" / "sae_weights.safetensors").read_bytes()
    assert f"artifact/report-{run.name}/report.html" in synced.uploads
    assert any("report/features_" in name for name in run.files)


def test_a_run_that_is_found_finished_logs_nothing_again(
    interrupted: Path, arguments: Callable[..., list[str]]
) -> None:
    before = offline_runs(interrupted)
    assert "already finished" in run_here(*arguments(interrupted)).stdout
    assert len(written(interrupted)) == len(before)


def test_without_artifacts_only_the_metrics_go_along(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    outcome = run_here(*arguments(tmp_path / "run", tracking__artifacts="false"))
    assert outcome.code == 0, outcome.stderr
    (run,) = written(tmp_path / "run")
    assert {artifact.type for artifact in run.artifacts.values()} == {"run_table"}
    assert run.summary["eval/l0"] > 0


# ------------------------------------------------------------------------------ a W&B run


def a_run(folder: Path, **about: Any) -> WandbRun:
    settings = {"id": "abc", "name": "a run", "job_type": "train", "tags": [], "config": {}}
    return WandbRun(TrackingConfig(group=GROUP), folder, **{**settings, **about})


def test_a_record_is_for_the_project_and_the_entity_of_the_config(tmp_path: Path) -> None:
    tracking = TrackingConfig(project="p", entity="e", group=GROUP)
    WandbRun(tracking, tmp_path, id="abc").finish(0)
    (found,) = written(tmp_path)
    assert (found.run.project, found.run.entity, found.run.run_group) == ("p", "e", GROUP)


def test_runs_of_a_bank_log_side_by_side_in_one_process(tmp_path: Path) -> None:
    runs = {name: a_run(tmp_path / name, id=name) for name in ("a", "b", "c")}
    for step in (1, 2, 3):
        for place, run in enumerate(runs.values()):
            run.log({"x": 10 * place + step}, step)
    for run in runs.values():
        run.finish(0)
    for place, name in enumerate(runs):
        (found,) = written(tmp_path / name)
        assert found.run.run_id == name and found.exit_code == 0
        assert [row["x"] for row in found.history] == [10 * place + step for step in (1, 2, 3)]


ONLINE = """
import os, sys, time
from pathlib import Path
from tcsae.config import TrackingConfig
from tcsae.jobs import wandb_run
from tcsae.jobs.wandb_run import WandbRun
wandb_run._START_SECONDS, wandb_run._FINISH_SECONDS = 3, 2
folder = Path(sys.argv[1])
def start(name="a", mode="online", id="abc"):
    return WandbRun(TrackingConfig(mode=mode), folder / name, id=id, name="a run")
def log(run, *steps):
    for step in steps:
        run.log({"x": 10 * step}, step)
"""
"""In its own process: W&B reads where its server is once."""


def online(code: str, folder: Path, env: dict[str, str], returns: int = 0) -> str:
    """Everything that `code` said."""
    done = subprocess.run(
        [sys.executable, "-c", ONLINE + code, str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == returns, done.stdout
    return done.stdout


def sync(folder: Path, server: Server, home: Path) -> None:
    command = [str(Path(sys.executable).with_name("wandb")), "sync", str(folder)]
    done = subprocess.run(
        command, env=client(server, home), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def steps_of(server: Server, run: str = "abc") -> list[tuple[int, int]]:
    history = server.runs[run].history
    return [(history[place]["_step"], history[place]["x"]) for place in sorted(history)]


def test_online_a_restarted_run_has_every_step_once(tmp_path: Path) -> None:
    code = """
for steps in ((2, 4, 6), (4, 6, 8)):
    run = start()
    log(run, *steps)
    run.finish(0)
    assert not run.failed and run.mode == "online"
"""
    with Server() as server:
        online(code, tmp_path, client(server, tmp_path))
    assert steps_of(server) == [(2, 20), (4, 40), (6, 60), (8, 80)]


def test_online_without_a_network_is_offline_whole_and_sync_sends_it(tmp_path: Path) -> None:
    code = """
for name in ("a", "b"):
    begun = time.monotonic()
    run = start(name, id=name)
    print(name, "waited", time.monotonic() - begun)
    log(run, 2, 4)
    run.finish(0)
"""
    with Server() as server:
        env = client(server, tmp_path)
        said = online(code, tmp_path, env | {"WANDB_BASE_URL": "http://127.0.0.1:9"})
        waited = [float(line.split()[-1]) for line in said.splitlines() if "waited" in line]
        # The second run of a process knows already.
        assert waited[0] < 15 and waited[1] < 2
        lines = [line for line in said.splitlines() if "no W&B online" in line]
        assert len(lines) == 2 and f"`wandb sync {tmp_path}/a/wandb` sends it" in lines[0]
        for name in ("a", "b"):
            sync(tmp_path / name / "wandb", server, tmp_path)
            assert steps_of(server, name) == [(2, 20), (4, 40)]
            assert server.runs[name].exit_code == 0


def test_a_deleted_run_has_a_new_id_that_later_starts_know(tmp_path: Path) -> None:
    code = """
for steps in ((2, 4), (6,)):
    run = start()
    log(run, *steps)
    run.finish(0)
    assert not run.failed and run.mode == "online"
"""
    with Server() as server:
        server.deleted = {"abc"}
        said = online(code, tmp_path, client(server, tmp_path))
        n_asked = len(server.refused)
        (new,) = json.loads((tmp_path / "a" / "wandb_ids.json").read_text()).values()
        assert new.startswith("abc-") and list(server.runs) == [new]
        (line,) = [line for line in said.splitlines() if "was deleted there" in line]
        assert "the W&B run abc was deleted there" in line and f"this run is {new}" in line
        online("log(run := start(), 8)\nrun.finish(0)", tmp_path, client(server, tmp_path))
        assert len(server.refused) == n_asked
    assert steps_of(server, new) == [(2, 20), (4, 40), (6, 60), (8, 80)]


def test_a_run_that_is_never_taken_is_offline_under_its_new_id(tmp_path: Path) -> None:
    class Never(Server):
        def on_UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
            self.deleted.add(v["name"])
            return super().on_UpsertBucket(v)

    with Never() as server:
        online("log(run := start(), 2)\nrun.finish(0)", tmp_path, client(server, tmp_path))
    (new,) = json.loads((tmp_path / "a" / "wandb_ids.json").read_text()).values()
    (run,) = offline_runs(tmp_path / "a")
    assert run.run.run_id == new and [row["x"] for row in run.history] == [20]


def test_what_a_killed_offline_start_kept_goes_along_online(tmp_path: Path) -> None:
    rows = "[{'step': step, 'x': 10 * step, 'nothing': None} for step in (2, 4)]"
    killed = "log(start(mode='offline'), 2, 4, 6)\nos._exit(9)"
    goes_on = f"run = start()\nrun.catch_up({rows})\nlog(run, 6, 8)\nrun.finish(0)"
    with Server() as server:
        env = client(server, tmp_path)
        online(killed, tmp_path, env, returns=9)
        online(goes_on, tmp_path, env)
        assert steps_of(server) == [(2, 20), (4, 40), (6, 60), (8, 80)]


def test_sync_sends_what_a_killed_start_wrote(tmp_path: Path) -> None:
    with Server() as server:
        env = client(server, tmp_path)
        online("log(run := start(mode='offline'), 2, 4, 6)\nrun.finish(0)", tmp_path, env)
        (record,) = (tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb")
        record.write_bytes(record.read_bytes()[:-5])  # as a kill leaves it: the last record is cut
        sync(tmp_path / "a" / "wandb", server, tmp_path)
    assert steps_of(server) == [(2, 20), (4, 40), (6, 60)]


def test_a_server_that_is_gone_at_the_end_is_one_line(tmp_path: Path) -> None:
    code = """
import urllib.request
run = start()
log(run, 2)
urllib.request.urlopen(urllib.request.Request(os.environ["WANDB_BASE_URL"] + "/gone", b""))
log(run, 4)
run.finish(0)
"""

    class Goes(Server):
        gone = False

        def stream(self, name: str, sent: dict[str, Any]) -> None:
            if self.gone:
                raise ConnectionError

    with Goes() as server:
        server.on_post = lambda path: setattr(server, "gone", path == "/gone" or server.gone)
        said = online(code, tmp_path, client(server, tmp_path))
    assert f"`wandb sync --include-online {tmp_path}/a/wandb` sends the rest" in said
    assert "W&B is off" not in said


def test_a_restart_after_an_online_one_repeats_what_that_may_not_have_sent(tmp_path: Path) -> None:
    config = config_of(tracking={"mode": "offline"})
    lines = [json.dumps({"step": step, "l0": step / 2}) for step in (2, 4, 6)]
    for kind, steps in (("", [2, 4]), ("offline-", [])):
        folder = tmp_path / f"{kind}run"
        (folder / "wandb" / f"{kind}run-20260101_000000-{run_id(config)}").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        tracker = Tracker(config, folder)
        tracker.rewind(4)
        tracker.finish(1)
        assert [row["l0"] for row in written(folder)[-1].history] == [step / 2 for step in steps]


def test_an_artifact_is_logged_once_for_each_content(tmp_path: Path) -> None:
    files = tmp_path / "files"
    (files / "inner").mkdir(parents=True)
    (files / "inner" / "a.txt").write_text("one")
    counts = []
    for content in ("one", "one", "two"):
        (files / "inner" / "a.txt").write_text(content)
        run = a_run(tmp_path)
        for _ in range(2):
            run.artifact("report", files, ["inner/*.txt", "nothing*"], {})
        run.finish(0)
        counts.append(len(written(tmp_path)[-1].artifacts))
    assert counts == [1, 0, 1]
    assert _paths(offline_runs(tmp_path)[0].artifacts["report-abc"]) == {"inner/a.txt"}


def test_an_artifact_without_files_is_none(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.artifact("sae", tmp_path / "sae", ["*"], {})
    run.finish(0)
    (found,) = written(tmp_path)
    assert found.artifacts == {} and found.exit_code == 0


def test_a_place_that_the_user_chose_for_copies_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "mine"))
    run = a_run(tmp_path / "run")
    run.pages({}, {"table": {"a": [1, 2], "b": ["x", None]}}, 1)
    run.finish(0)
    (found,) = written(tmp_path / "run")
    (artifact,) = found.artifacts.values()
    (entry,) = artifact.manifest.contents
    assert Path(entry.local_path).is_relative_to(tmp_path / "mine")
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "mine")


def test_files_that_cannot_be_logged_are_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no artifacts today")

    folder = write_run(tmp_path / "run")
    tracker = Tracker(config_of(), folder)
    monkeypatch.setattr(tracker.wandb.run, "log_artifact", fails)
    with caplog.at_level(logging.WARNING, "tcsae"):
        tracker.finish(0)
    (line,) = [record.message for record in caplog.records if record.name == "tcsae.jobs.wandb_run"]
    assert line == "W&B is off for the rest of this run (RuntimeError: no artifacts today)"
    # What was not sent is not taken for sent.
    assert not (folder / "wandb" / "artifacts.json").exists()


# ---------------------------------------------------------------------------- a comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A sweep with a baseline and a grid of 2 windows x 1 lambda, and its comparison/."""
    from tcsae.report.compare_files import write_comparison

    sweep = tmp_path_factory.mktemp("sweep")
    write_run(sweep / "base")
    write_run(sweep / "a", changed(lambda_=1.0, window=4), features=codes(0.9))
    write_run(sweep / "b", changed(lambda_=1.0, window=8), features=codes(0.7))
    comparison = compare_runs([sweep])
    write_comparison(comparison, sweep / "comparison")
    return comparison, sweep / "comparison"


@pytest.fixture(scope="module")
def sent(compared: tuple[Comparison, Path]) -> list[OfflineRun]:
    """What two closing jobs of the same sweep leave."""
    comparison, folder = compared
    tracking = TrackingConfig(tags=["paper"])
    send_comparison(comparison, folder, tracking, GROUP)
    written(folder)
    send_comparison(comparison, folder, tracking, GROUP)
    return written(folder)


def test_a_sweep_is_one_summary_run_of_its_group_however_often_it_is_sent(
    sent: list[OfflineRun],
) -> None:
    first, second = sent
    for session in sent:
        assert session.run.run_id == comparison_id(GROUP)
        assert session.run.run_group == GROUP
        assert session.run.job_type == "comparison"
        assert session.run.display_name == f"comparison of {GROUP}"
        assert list(session.run.tags) == ["comparison", "paper"]
        assert session.exit_code == 0
        assert session.summary["comparison/n_runs"] == 3
    assert second.history[0]["_step"] >= first.history[0]["_step"]


def test_comparisons_of_two_sweeps_are_two_runs() -> None:
    assert comparison_id("one") != comparison_id("two")


def test_the_comparison_has_the_pages_figures_and_every_heat_map(
    sent: list[OfflineRun], compared: tuple[Comparison, Path]
) -> None:
    (row,) = sent[0].history
    media = {key.removesuffix("._type") for key in row if key.endswith("._type")}
    figures = {f"comparison/{name}" for name in comparison_figures(compared[0])}
    assert media == figures | {"comparison/table"}
    page = (compared[1] / "report.html").read_text()
    for name in ("s0-pareto", "s0-grid-0-explained_variance", "s0-grid-0-C_4"):
        assert name in page and f"comparison/{name}" in figures
    for window in (2, 4, 8):
        assert f"comparison/s0-grid-0-C_{window}" in figures


def test_the_heat_map_in_wandb_has_the_grids_values(
    sent: list[OfflineRun], compared: tuple[Comparison, Path]
) -> None:
    (row,) = sent[0].history
    path = sent[0].path.parent / "files" / row["comparison/s0-grid-0-C_8.path"]
    (heat,) = json.loads(path.read_text())["data"]
    (grid,) = compared[0].grids
    assert heat["y"] == ["4", "8"] and heat["x"] == ["0", "1"]
    flat = [value for line in _decoded(heat["z"]) for value in line]
    wanted = [value for line in grid["metrics"]["C_8"] for value in line]
    assert flat == pytest.approx(wanted, abs=1e-6)


def _decoded(values: Any) -> Any:
    """Plotly writes arrays as base64."""
    import base64

    import numpy as np

    if isinstance(values, list):
        return values
    array = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
    return array.reshape([int(n) for n in values["shape"].split(",")]).tolist()


def test_the_table_in_wandb_has_a_row_for_each_setting(
    sent: list[OfflineRun], compared: tuple[Comparison, Path]
) -> None:
    (row,) = sent[0].history
    path = sent[0].path.parent / "files" / row["comparison/table.path"]
    table = json.loads(path.read_text())
    rows = [dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]]
    groups = compared[0].groups
    assert [row["setting"] for row in rows] == [group["label"] for group in groups]
    for shown, group in zip(rows, groups, strict=True):
        for name in ("explained_variance", "l0", "C_8"):
            entry = group["metrics"][name]
            assert shown[name] == pytest.approx(entry["value"])
            assert shown[f"{name}_low"] == pytest.approx(entry["low"])
    assert rows[0]["delta_C_4"] is None
    assert rows[1]["delta_C_4"] == pytest.approx(groups[1]["deltas"]["C_4"]["value"])


def test_a_table_takes_windows_that_are_not_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "base")
    for window in ("document", 4):
        config = changed(lambda_=1.0, window=window)
        write_run(tmp_path / f"w{window}", config, features=codes(0.9))
    comparison = compare_runs([tmp_path])
    assert sorted(map(str, comparison_columns(comparison)["window"])) == ["4", "None", "document"]
    send_comparison(comparison, tmp_path / "comparison", TrackingConfig(), GROUP)
    (found,) = written(tmp_path / "comparison")
    assert found.history[0]["comparison/table._type"] == "table-file"


def test_the_comparisons_files_are_an_artifact_once(
    sent: list[OfflineRun], compared: tuple[Comparison, Path]
) -> None:
    name = f"comparison-{comparison_id(GROUP)}"
    assert name not in sent[1].artifacts
    artifact = sent[0].artifacts[name]
    assert artifact.type == "comparison"
    files = {path.name for path in compared[1].iterdir() if path.is_file()}
    assert _paths(artifact) == files


def test_a_comparison_that_wandb_does_not_take_is_one_warning(
    compared: tuple[Comparison, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        send_comparison(compared[0], tmp_path / "file", TrackingConfig(), GROUP)
        monkeypatch.setitem(sys.modules, "wandb", None)
        send_comparison(compared[0], tmp_path / "there", TrackingConfig(), GROUP)
    assert len(caplog.records) == 2
    assert all("W&B is off" in record.message for record in caplog.records)


def test_disabled_tracking_sends_no_comparison(
    compared: tuple[Comparison, Path], tmp_path: Path
) -> None:
    before = file_digest(compared[1] / "comparison.json")
    send_comparison(compared[0], tmp_path / "there", TrackingConfig(mode="disabled"), GROUP)
    assert not (tmp_path / "there").exists()
    assert file_digest(compared[1] / "comparison.json") == before


SAID = {
    "MODE": ("online", "tracking.mode"),
    "DISABLED": ("true", "tracking=disabled"),
    "PROJECT": ("mine", "tracking.project"),
    "ENTITY": ("me", "tracking.entity"),
    "NAME": ("n", "name"),
    "TAGS": ("a,b", "tracking.tags"),
    "RUN_GROUP": ("g", "tracking.group"),
    "RUN_ID": ("i", "the hash of the configuration"),
    "RESUME": ("must", "the run's folder"),
    "DIR": ("d", "the run's folder"),
    "JOB_TYPE": ("j", "the command"),
}


@pytest.mark.parametrize("variable", SAID)
def test_what_the_environment_asks_in_vain_is_said(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    value, key = SAID[variable]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(f"WANDB_{variable}", value)
    tracking = {"entity": "e", "group": GROUP, "tags": ["c"]}
    check_environment(TrackingConfig(mode="disabled", **tracking), None)
    assert not caplog.records
    check_environment(TrackingConfig(**tracking), None)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"without effect in the environment: WANDB_{variable}={value} ({key} does it)"


def test_the_same_in_the_environment_and_the_config_needs_no_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    same = {"MODE": "offline", "TAGS": "a,b", "NAME": "n", "ENTITY": "e", "RESUME": "allow"}
    for name, value in same.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    check_environment(TrackingConfig(tags=["a", "b"]), "n")
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("ENTITY", "me/team", "takes no / in a name"), ("RUN_GROUP", "g" * 129, "at most 128")],
)
def test_a_name_of_the_environment_that_wandb_would_refuse_is_refused_first(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tcsae.jobs.bank import run

    monkeypatch.setenv(f"WANDB_{name}", value)
    with pytest.raises(UserError, match=words):
        # Before the model: there is none here.
        run(config_of(model__path=str(tmp_path / "none")), tmp_path / "run")


def test_what_the_config_leaves_open_is_the_environments(tmp_path: Path) -> None:
    with Server() as server:
        asked = {"ENTITY": "me", "RUN_GROUP": "g", "NOTES": "why"}
        asked |= {"RUN_ID": "i", "DIR": str(tmp_path / "d"), "JOB_TYPE": "j", "RESUME": "never"}
        env = client(server, tmp_path) | {f"WANDB_{name}": value for name, value in asked.items()}
        online("log(run := start(), 2)\nrun.finish(0)", tmp_path, env)
        # WANDB_BASE_URL and WANDB_API_KEY brought it here.
        (run,) = server.runs.values()
    assert run.name == "abc" and not (tmp_path / "d").exists()
    assert (run.about["entity"], run.about["groupName"]) == ("me", "g")
    assert run.about["notes"] == "why"
