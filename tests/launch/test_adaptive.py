"""hydra/sweeper=optuna through the real command, in this process, with a tiny model."""

from __future__ import annotations

import builtins
import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers import Outcome, run_here
from sweeps import TOO_LARGE, Grid, folders, grid_maker, words

from tcsae.base.errors import UserError
from tcsae.base.files import locked
from tcsae.base.ranks import Place
from tcsae.config import parse
from tcsae.launch.objective import NO_NUMBERS, known_keys, number_at


@pytest.fixture(scope="module")
def grid(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return grid_maker(tiny_gpt2, texts, tmp_path_factory.mktemp("store"))


OPTUNA = "hydra/sweeper=optuna"
ASKED = (
    *(OPTUNA, "hydra.sweeper.objective=L_2", "hydra.sweeper.n_jobs=2"),
    "hydra.sweeper.baseline='lambda=0'",
    "hydra.sweeper.constraints={explained_variance:'>=baseline-0.5'}",
)
AXES = {"lambda": "tag(log,interval(0.01,2))", "window": "choice(2,4)", "tracking": "disabled"}
EV = "metrics.reconstruction_quality.explained_variance"
L_2 = "consistency.metrics.L_2.energy_weighted"


@pytest.fixture(scope="module")
def searched(
    grid: Grid, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], Outcome]:
    """Two points, and the baseline."""
    sweep = tmp_path_factory.mktemp("searched") / "sweep"
    command = [*grid(sweep, **AXES), *ASKED]
    return sweep, command, run_here(*command, "hydra.sweeper.n_trials=2")


def infos(sweep: Path) -> dict[str, Any]:
    return {n: json.loads((f / "final_info.json").read_text()) for n, f in folders(sweep).items()}


def test_a_search_ends_with_the_best_point_and_its_command(
    searched: tuple[Path, list[str], Outcome],
) -> None:
    sweep, _, outcome = searched
    assert outcome.code == 0, words(outcome)
    rows = list(csv.DictReader((sweep / "trials.csv").open()))
    assert len(rows) == 2 and [row["best"] for row in rows].count("true") == 1
    best = max(rows, key=lambda row: float(row[L_2]))
    assert best["best"] == "true"
    assert 0.01 <= float(best["lambda"]) <= 2 and best["window"] in ("2", "4")
    info = json.loads((sweep / best["folder"] / "final_info.json").read_text())
    assert float(best[L_2]) == info["consistency"]["metrics"]["L_2"]["energy_weighted"]
    assert float(best[EV]) == info["metrics"]["reconstruction_quality"]["explained_variance"]
    command = shlex.split(outcome.stdout.splitlines()[-1])
    assert command[:3] == ["python", "-m", "tcsae.train"]
    assert {f"lambda={best['lambda']}", f"window={best['window']}"} <= set(command)
    # The baseline is a job of the sweep, and no point of the search.
    assert {"lambda=0"} < set(folders(sweep)) and len(folders(sweep)) == 3
    bound = infos(sweep)["lambda=0"]["metrics"]["reconstruction_quality"]["explained_variance"]
    assert f"explained_variance >=baseline-0.5 ({bound - 0.5:.4f})" in (
        (sweep / "trials.md").read_text()
    )
    page = (sweep / "trials.html").read_text()
    assert f'href="{best["folder"]}/report.html"' in page and "http-equiv" not in page
    assert len(json.loads((sweep / "comparison" / "comparison.json").read_text())["runs"]) == 3
    assert all(json.loads(line) for line in (sweep / "study.jsonl").read_text().splitlines())


def test_processes_of_the_local_launcher_search_as_this_one(
    searched: tuple[Path, list[str], Outcome], grid: Grid, tmp_path: Path
) -> None:
    """The points are chosen from what the jobs came to: the same points, the same values."""
    local = ("hydra/launcher=local", "hydra.launcher.processes=2", "hydra.launcher.pack=1")
    given = [*grid(tmp_path / "sweep", **AXES), *ASKED, *local]
    outcome = run_here(*given, "hydra.sweeper.n_trials=2")
    assert outcome.code == 0, words(outcome)
    here, there = (
        [
            {key: row[key] for key in ("lambda", "window", "best", L_2, EV)}
            for row in csv.DictReader((sweep / "trials.csv").open())
        ]
        for sweep in (searched[0], tmp_path / "sweep")
    )
    assert len(there) == 2 and there == here


def test_the_same_command_with_more_points_goes_on(
    searched: tuple[Path, list[str], Outcome],
) -> None:
    sweep, command, _ = searched
    before = {name: folder.stat().st_mtime_ns for name, folder in folders(sweep).items()}
    outcome = run_here(*command, "hydra.sweeper.n_trials=3")
    assert outcome.code == 0, words(outcome)
    assert "the study has 2 points" in words(outcome) and "3 of 3 points" in words(outcome)
    now = folders(sweep)
    assert len(now) == 4
    assert {name: now[name].stat().st_mtime_ns for name in before} == before
    numbers = [job["number"] for job in json.loads((sweep / "sweep.json").read_text())["jobs"]]
    assert numbers == [0, 1, 2, 3]
    again = run_here(*command, "hydra.sweeper.n_trials=3")
    assert again.code == 0 and "3 points, 3 with a value" in again.stdout
    assert "(-0." in (sweep / "trials.md").read_text()  # the baseline's bound is still known


def test_another_search_has_a_folder_of_its_own(
    searched: tuple[Path, list[str], Outcome], grid: Grid
) -> None:
    sweep, command, _ = searched
    line = run_here(*command, "hydra.sweeper.direction=minimize").refusal()
    assert "is of another search (direction: maximize, now minimize)" in line
    line = run_here(*grid(sweep, **{**AXES, "window": "choice(2,8)"}), *ASKED).refusal()
    assert '"window": "choice(2,8)"' in line and "hydra.sweep.dir" in line
    with locked(sweep / ".study.jsonl.lock"):
        assert "another command is at work" in run_here(*command).refusal()


def test_the_known_keys_are_those_that_a_run_writes(
    searched: tuple[Path, list[str], Outcome],
) -> None:
    for name, folder in folders(searched[0]).items():
        info = json.loads((folder / "final_info.json").read_text())
        config = parse(json.loads((folder / "config.json").read_text()))
        for key in known_keys(config):
            found = number_at(info, key)  # raises for one that is not there
            assert isinstance(found, float) or ("None" in found and f"{key} is" in found)
        assert ("consistency.metrics.L_W.mean" in known_keys(config)) == ("window" in name)
        written = {key for key, value in flat(info) if isinstance(value, int | float)}
        others = ("eval_cfg.", "model_checks.", "seconds.", "consistency.")
        kept = {key for key in written if not key.startswith((*others, "metrics.token_stats"))}
        assert kept <= {*known_keys(config), *NO_NUMBERS}


def flat(tree: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found += flat(value, f"{before}{key}.") if inner else [(before + key, value)]
    return found


def test_failed_points_are_done_again_and_points_chosen_twice_once(
    grid: Grid, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    axes = {"lambda": f"choice(0.1,{TOO_LARGE})", "window": "2", "tracking": "disabled"}
    command = [*grid(sweep, **axes), OPTUNA, "hydra.sweeper.objective=L_W"]
    command += [f"hydra.sweeper.{key}=6" for key in ("n_trials", "n_jobs")]
    command.append("hydra.launcher.compare=false")
    outcome = run_here(*command)
    assert outcome.code == 1
    assert "4 of 6 points were refused or are chosen twice" in words(outcome)
    assert len(folders(sweep)) == 2
    assert outcome.messages[-1].endswith("jobs did not finish")
    rows = list(csv.DictReader((sweep / "trials.csv").open()))
    failed = [row for row in rows if row["lambda"] == TOO_LARGE.replace("1e39", "1e+39")]
    assert len(failed) == 1 and "the same command does it again" in failed[0]["remark"]
    assert {row["feasible"] for row in rows if row not in failed} == {"true"}
    again = run_here(*command)
    assert again.code == 1 and "1 to be done again" in words(again)
    assert "not finite at step 0" in again.stdout


REFUSED = [
    ((), "hydra.sweeper.objective must be given"),
    (("objective=explained_varance",), "no explained_varance; did you mean explained_variance"),
    (("objective=L_2", "constraints={l00:'>=1'}"), "constraints.l00: final_info.json will have no"),
    (("objective=L_2", "constraints={l0:'about 8'}"), "write >=NUMBER, <=NUMBER or >=baseline-"),
    (("objective=L_2", "constraints={l0:'>=baseline'}"), "say which job it is"),
    (("objective=L_2", "baseline='lambda=0'"), "no constraint names baseline"),
    (("objective=L_2", "direction=up"), "hydra.sweeper.direction = up"),
    (("objective=L_2", "n_trials=0"), "hydra.sweeper.n_trials = 0"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_cannot_be_asked_is_refused_before_anything_runs(
    given: tuple[str, ...], said: str, grid: Grid, tmp_path: Path
) -> None:
    command = [*grid(tmp_path / "sweep", **AXES), OPTUNA]
    line = run_here(*command, *(f"hydra.sweeper.{text}" for text in given)).refusal()
    assert said in line
    assert list(tmp_path.iterdir()) == []


NO_AXES = [
    ({"seed": "0,1"}, "seed is no axis of a search"),
    ({"tracking.project": "a,b", "tracking": "offline"}, "has no influence on a run's results"),
    ({"lambda": "interval(2,0.1)"}, "an interval is (low,high) with low < high"),
    ({"lambda": "tag(log,interval(0,1))"}, "with 0 < low < high"),
    ({"lambda": "tag(log,choice(1,2))"}, "goes with interval"),
    ({"lambda": "interval(-1,1)"}, "lambda"),
    ({"lambda": "1"}, "there is no axis to search"),
]


@pytest.mark.parametrize(("changes", "said"), NO_AXES)
def test_what_is_no_axis_is_refused(
    changes: dict[str, str], said: str, grid: Grid, tmp_path: Path
) -> None:
    fixed = {"lambda": "0.5", "tracking": "disabled", **changes}
    command = grid(tmp_path / "sweep", **fixed)
    assert said in run_here(*command, OPTUNA, "hydra.sweeper.objective=L_2").refusal()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_first_points_and_writes_nothing(grid: Grid, tmp_path: Path) -> None:
    outcome = run_here(*grid(tmp_path / "sweep", **AXES), *ASKED, "--dry-run")
    assert outcome.code == 0
    assert "the first 2 of 20 points" in words(outcome)
    assert "3 to do in one process, 3 side by side" in words(outcome)
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_one_line_says_what_to_install(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return real(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    line = run_here(*grid(tmp_path / "sweep", **AXES), *ASKED).refusal()
    assert "pip install 'tcsae[optuna]'" in line


def test_several_ranks_cannot_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from tcsae.launch import adaptive
    from tcsae.launch.here import HereLauncher

    monkeypatch.setattr(adaptive, "here", lambda: Place(rank=0, size=2))
    with pytest.raises(UserError, match="leave torchrun or srun out"):
        adaptive._check_launcher(HereLauncher())


def test_slurm_that_is_not_waited_for_cannot_be_searched(grid: Grid, tmp_path: Path) -> None:
    slurm = ("hydra/launcher=slurm_cpu", "hydra.launcher.wait=false")
    line = run_here(*grid(tmp_path / "sweep", **AXES), *ASKED, *slurm).refusal()
    assert "hydra.launcher.wait=false: a search waits for its jobs" in line
