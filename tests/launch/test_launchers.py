"""--multirun through the real command: in this process, and in several of this machine."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers import (
    Outcome,
    count_calls,
    finish,
    leftovers,
    metric_lines,
    run_apart,
    run_here,
    start,
    weights_digest,
)
from sweeps import TOO_LARGE, Grid, folders, grid_maker, is_bad, wait_for, words

from tcsae.base.files import locked
from tcsae.data.language_model import LanguageModel
from tcsae.runs.state import read_state


@pytest.fixture(scope="module")
def grid(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return grid_maker(tiny_gpt2, texts, tmp_path_factory.mktemp("store"))


HARVEST_PASSES = 14  # 48 training and 8 held-out contexts, 4 in a forward pass

POINTS = {"window": "4,8", "lambda": f"0,0.1,{TOO_LARGE}"}


@pytest.fixture(scope="module")
def mixed(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A 2 x 3 grid side by side in which one weight is too large, only to be looked at."""
    sweep = tmp_path_factory.mktemp("mixed") / "sweep"
    return sweep, run_here(*grid(sweep, **POINTS))


def test_a_failed_job_does_not_hide_the_others(mixed: tuple[Path, Outcome]) -> None:
    sweep, outcome = mixed
    assert outcome.code == 1
    done = [name for name, folder in folders(sweep).items() if (folder / "notes.txt").is_file()]
    assert sorted(done) == [f"window={w},lambda={v}" for w in (4, 8) for v in ("0", "0.1")]
    assert outcome.stdout.count(" done  ") == 4
    assert outcome.stdout.count("not finite at step 0 (term: consistency)") == 2
    assert "4 done, 2 failed" in outcome.stdout
    assert outcome.messages[-1] == "tcsae: 2 of 6 jobs did not finish"


def test_every_job_has_its_own_log_state_and_hydra_files(mixed: tuple[Path, Outcome]) -> None:
    sweep, _ = mixed
    for name, folder in folders(sweep).items():
        log = (folder / "train.log").read_text()
        assert "48 training and 8 held-out contexts" in log
        assert log.count("held-out results") == (0 if is_bad(name) else 1)  # its own only
        assert (folder / ".hydra" / "overrides.yaml").is_file()
        state = read_state(folder)
        assert state is not None
        if is_bad(name):
            assert state.state == "failed" and "not finite" in (state.message or "")
            assert "Traceback" in (state.traceback or "")
        else:
            assert state.state == "done"
    assert leftovers(sweep) == []


def test_the_sweep_ends_with_its_comparison(mixed: tuple[Path, Outcome]) -> None:
    sweep, _ = mixed
    comparison = json.loads((sweep / "comparison" / "comparison.json").read_text())
    statuses = [run["status"] for run in comparison["runs"]]
    assert statuses.count("used") == 3
    assert statuses.count("duplicate") == 1  # with lambda 0 the window means nothing
    assert statuses.count("unfinished") == 2
    assert (sweep / "comparison" / "report.html").is_file()
    page = (folders(sweep)["window=4,lambda=0.1"] / "report.html").read_text()
    assert 'href="../comparison/report.html"' in page and page.count('/report.html">window=') == 5


def test_jobs_side_by_side_end_as_each_would_alone(
    mixed: tuple[Path, Outcome], grid: Grid, tmp_path: Path
) -> None:
    alone = grid(tmp_path, window="8", **{"lambda": "0.1"})[1:-1]
    assert run_here(*alone, f"hydra.run.dir={tmp_path / 'run'}").code == 0
    packed = folders(mixed[0])["window=8,lambda=0.1"]
    assert weights_digest(packed) == weights_digest(tmp_path / "run")
    assert metric_lines(packed) == metric_lines(tmp_path / "run")


def test_the_same_command_again_does_only_what_is_missing(
    mixed: tuple[Path, Outcome], grid: Grid, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    shutil.copytree(mixed[0], sweep)
    lost, kept = (folders(sweep)[f"window={w},lambda=0.1"] for w in (4, 8))
    digest = weights_digest(lost)
    shutil.rmtree(lost)
    before = (kept / "final_info.json").read_text()
    outcome = run_here(*grid(sweep, **POINTS))
    assert outcome.code == 1
    assert "1 done, 3 skipped, 2 failed" in outcome.stdout
    assert weights_digest(lost) == digest
    assert (kept / "final_info.json").read_text() == before


def test_a_dry_run_shows_jobs_and_packing_and_writes_nothing(grid: Grid, tmp_path: Path) -> None:
    arguments = grid(tmp_path / "sweep", window="4,8", **{"lambda": "0,0.1,1"})
    outcome = run_here(*arguments, "hydra.launcher.pack=2", "--dry-run")
    assert outcome.code == 0
    assert "6 to do in 3 processes, 2 side by side, on 1 stream" in words(outcome)
    assert "process 0    window=4,lambda=0\n" in words(outcome)
    assert "process 2    window=8,lambda=1\n" in words(outcome)
    assert "1 without temporal loss differ from another only in what it would do" in words(outcome)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_which_jobs_are_the_same(grid: Grid, tmp_path: Path) -> None:
    arguments = grid(tmp_path / "sweep", window="4,8", **{"lambda": "1,1.0"})
    outcome = run_here(*arguments, "--dry-run")
    assert outcome.code == 0
    said = words(outcome)
    assert "without temporal loss" not in said
    assert "2 to do in" in said and "2 are the same as another and are done once with it" in said
    assert len(re.findall(r"INFO\s+\d+  as job \d+ ", said)) == 2 and "finished  " not in said


def test_a_dry_run_of_a_single_run_says_its_cost_and_writes_nothing(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = grid(tmp_path / "sweep")[1:-1]
    for flag in ("--dry-run", "hydra.launcher.dry_run=true"):
        outcome = run_here(*arguments, f"hydra.run.dir={tmp_path / 'run'}", flag)
        assert outcome.code == 0
        assert "one run, " in words(outcome)
        assert "1 harvest of 0.0 M tokens in all" in words(outcome)
        assert "of process time: harvest" in words(outcome)
        assert "memory of the largest process: host" in words(outcome)
    refused = run_here(*arguments, "lambda=-1", "--dry-run")
    assert refused.code == 2 and "lambda = -1" in refused.refusal()
    assert list(tmp_path.iterdir()) == []


def test_what_jobs_need_can_be_made_beforehand(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sweep over layers and of one run: contexts first, then the stores, and nothing else."""
    monkeypatch.chdir(tmp_path)
    store, sweep = tmp_path / "store", tmp_path / "sweep"
    arguments = grid(sweep, layer="0,1", **{"lambda": "0,0.1", "store__dir": str(store)})
    passes = count_calls(LanguageModel, "activations_at", monkeypatch)
    outcome = run_here(*arguments, "--prepare")
    assert outcome.code == 0
    assert "prepared: weights and text of 2 streams" in words(outcome)
    assert {path.name for path in store.iterdir()} == {"contexts"} and passes == []
    outcome = run_here(*arguments, "--harvest")
    assert outcome.code == 0 and len(passes) == HARVEST_PASSES  # of both layers at once
    assert "prepared: weights, text and activations of 2 streams" in words(outcome)
    assert len(list((store / "activations").iterdir())) == 4
    passes.clear()
    single = [a for a in arguments[1:-1] if not a.startswith(("layer=", "lambda="))]
    again = run_here(*single, "layer=0", "--harvest")
    assert again.code == 0 and passes == []
    assert "of 1 stream, " in words(again)
    streamed = [a for a in single if not a.startswith("store.shard_contexts")]
    refused = run_here(*streamed, "store=stream", "--harvest")
    assert refused.code == 2 and "store=stream keeps no activations" in refused.refusal()
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda": "0,-1"}, "job 1 (lambda=-1): lambda = -1"),
        ({"lambda": "0,high"}, "lambda = high: must be any finite number"),
        ({"window": "4,99"}, "job 1 (window=99): window = 99: must be 2 to 16"),
        ({"training__tokens": "1000,none"}, "job 1 (training.tokens=none): training.tokens"),
    ],
)
def test_one_bad_value_refuses_the_whole_grid_before_anything_is_written(
    changes: dict[str, str], message: str, grid: Grid, tmp_path: Path
) -> None:
    outcome = run_here(*grid(tmp_path / "sweep", **changes))
    assert outcome.code == 2
    assert message in outcome.refusal()
    assert list(tmp_path.iterdir()) == []


def test_a_grid_grows_and_its_jobs_keep_their_numbers(
    mixed: tuple[Path, Outcome], grid: Grid
) -> None:
    sweep, _ = mixed
    outcome = run_here(*grid(sweep, window="4,8", **{"lambda": "0,0.2"}), "--dry-run")
    said = words(outcome)
    assert "2 jobs more, beside the 6 that" in said
    numbers = re.findall(r"^.*INFO\s+(\d+)  (?:finished|process)", said, re.MULTILINE)
    assert len(numbers) == 4 and {"6", "7"} < set(numbers)


def test_a_bad_launcher_option_is_one_line(grid: Grid, tmp_path: Path) -> None:
    outcome = run_here(*grid(tmp_path / "sweep"), "hydra.launcher.pack=none")
    assert "hydra.launcher.pack = none" in outcome.refusal()
    assert list(tmp_path.iterdir()) == []


def test_a_job_whose_folder_is_busy_fails_alone(
    mixed: tuple[Path, Outcome], grid: Grid, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    shutil.copytree(mixed[0], sweep)
    busy, free = (folders(sweep)[f"window=4,lambda={v}"] for v in ("0", "0.1"))
    for folder in (busy, free):
        (folder / "final_info.json").unlink()
    with locked(busy / ".lock"):
        outcome = run_here(*grid(sweep, **POINTS))
    assert "in use by another process" in outcome.stdout
    assert (free / "final_info.json").is_file()
    assert not (busy / "final_info.json").exists()


@pytest.mark.slow
def test_local_processes_do_the_same_as_this_one(
    mixed: tuple[Path, Outcome], grid: Grid, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    arguments = grid(sweep, store__dir=str(tmp_path / "store"), **POINTS)
    outcome = run_here(*arguments, "hydra/launcher=local")
    assert outcome.code == 1, words(outcome)
    assert "6 to do in 2 processes, 3 side by side" in words(outcome)
    assert "4 done, 2 failed" in outcome.stdout
    for name, folder in folders(mixed[0]).items():
        if not is_bad(name):
            assert weights_digest(folders(sweep)[name]) == weights_digest(folder), name
    assert (sweep / "comparison" / "report.html").is_file()


LONG = {"lambda": "0,0.1", "training__tokens": "100000", "training__checkpoint_every": "500"}
"""Long enough to be stopped as soon as it trains: 781 steps."""


@pytest.fixture(scope="module")
def whole(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = tmp_path_factory.mktemp("whole") / "sweep"
    assert run_apart(*grid(sweep, **LONG)).code == 0
    return sweep


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["here", "local"])
def test_a_sweep_stopped_by_a_signal_goes_on_to_the_same_weights(
    launcher: str, whole: Path, grid: Grid, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    arguments = [*grid(sweep, **LONG), f"hydra/launcher={launcher}"]
    process = start(*arguments)
    wait_for(lambda: any('"train"' in p.read_text() for p in sweep.glob("*/state.json")))
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.code == 75, stopped.stderr
    states = [read_state(folder) for folder in folders(sweep).values()]
    assert [state and state.state for state in states] == ["interrupted", "interrupted"]
    assert run_apart(*arguments).code == 0
    for name, folder in folders(whole).items():
        assert weights_digest(folders(sweep)[name]) == weights_digest(folder)
