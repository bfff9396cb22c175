"""What a run is judged to be doing, from files made by hand and from real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import environment
from hypothesis import given
from hypothesis import strategies as st
from state_folders import NOW, write_final, write_metrics, write_state, write_sweep

from tcsae.base.errors import UserError
from tcsae.runs.state import StateFile, queued
from tcsae.runs.status import (
    LOST_AFTER,
    SILENT_AFTER,
    Job,
    find_groups,
    is_alive,
    run_status,
    seconds_left,
)

# ------------------------------------------------------------------------------- the judgement


def test_a_run_that_speaks_is_running(tmp_path: Path) -> None:
    status = run_status(write_state(tmp_path), NOW + SILENT_AFTER - 1)
    assert status.state == "running" and status.is_here
    assert status.progress == 0.25 and status.tokens_per_second == 10
    assert status.stage == "train" and status.attempt == 1


def test_a_run_elsewhere_that_says_nothing_is_silent_however_long(tmp_path: Path) -> None:
    write_state(tmp_path)
    for age in (SILENT_AFTER + 1, 1e6):
        status = run_status(tmp_path, NOW + age)
        assert status.state == "silent" and status.age == age
        assert status.seconds_left is None


@pytest.mark.parametrize("state", ["queued", "failed", "interrupted"])
def test_other_states_stay_however_old_they_are(tmp_path: Path, state: str) -> None:
    write_state(tmp_path, state=state, host=socket.gethostname(), pid=2**22 + 1)
    assert run_status(tmp_path, NOW + 1e6).state == state


@pytest.mark.parametrize("state", ["queued", "running", "failed", "interrupted", "nonsense"])
def test_a_finished_run_is_done_whatever_its_state_says(tmp_path: Path, state: str) -> None:
    write_final(write_state(tmp_path, state=state), tokens_per_second=99.0, final_loss=3.5)
    status = run_status(tmp_path, NOW + 1e6)
    assert status.state == "done" and status.progress == 1.0 and status.stage is None
    assert (status.tokens_per_second, status.loss) == (99.0, 3.5)


def test_a_damaged_last_file_still_means_done(tmp_path: Path) -> None:
    (tmp_path / "final_info.json").write_text("{")
    status = run_status(tmp_path)
    assert status.state == "done" and status.tokens_per_second is status.loss is None


def test_a_run_without_a_folder_or_with_an_empty_one_is_queued(tmp_path: Path) -> None:
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    assert run_status(tmp_path / "run").state == "queued"
    assert run_status(tmp_path / "nowhere").state == "queued"


def test_the_time_left_is_that_of_the_stage_less_what_has_passed_since(tmp_path: Path) -> None:
    write_state(tmp_path)
    assert run_status(tmp_path, NOW).seconds_left == 75
    assert run_status(tmp_path, NOW + 30).seconds_left == 45
    assert run_status(tmp_path, NOW + 100).seconds_left == 0


def test_a_clock_that_is_ahead_makes_no_negative_age(tmp_path: Path) -> None:
    status = run_status(write_state(tmp_path, updated=NOW + 500), NOW)
    assert status.state == "running" and status.age == 0 and status.seconds_left == 75


def test_contexts_a_second_are_not_tokens_a_second(tmp_path: Path) -> None:
    assert run_status(write_state(tmp_path, unit="contexts"), NOW).tokens_per_second is None


def test_a_requeued_run_shows_its_next_attempt(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        state = StateFile(tmp_path)
        state.begin()
        assert run_status(tmp_path).attempt == attempt
        state.end("interrupted")
        queued(tmp_path)
        assert run_status(tmp_path).attempt == attempt + 1


def test_the_newest_checkpoint_is_the_one_that_counts(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert run_status(tmp_path).checkpoint is None
    for name in ("step-00000090", "step-00000400", "step-x", "other"):
        (tmp_path / "checkpoint" / f"{name}.safetensors").write_text("")
    assert run_status(tmp_path).checkpoint == 400


# --------------------------------------------------------------------------- runs without a state


OLD_CONFIG = {
    "training": {"tokens": 1000, "batch_contexts": 4},
    "dataset": {"context_size": 16},
}


def test_an_older_run_tells_its_progress_by_its_metrics(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD_CONFIG))
    write_metrics(tmp_path, {"step": 4, "loss/total": 7.0, "tokens_per_second": 5.5})
    os.utime(tmp_path / "metrics.jsonl", (NOW, NOW))
    status = run_status(tmp_path, NOW + 90)
    assert status.state == "unknown" and status.age == 90
    assert status.progress == 4 / 16  # 1000 tokens in batches of 64
    assert (status.loss, status.tokens_per_second) == (7.0, 5.5)
    assert status.attempt is status.seconds_left is status.stage is None


def test_a_damaged_state_leaves_what_the_other_files_say(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"step": 4, "loss/total": 7.0})
    (tmp_path / "state.json").write_text('{"state": "runn')
    status = run_status(tmp_path)
    assert status.state == "unknown" and status.loss == 7.0 and status.progress is None


def test_a_line_that_was_cut_short_leaves_the_one_before_it(tmp_path: Path) -> None:
    write_metrics(
        tmp_path,
        {"step": 1, "loss/total": 9.0},
        {"step": 2, "loss/total": 8.0},
        '{"step": 3, "loss/to',
    )
    assert run_status(tmp_path).loss == 8.0


def test_only_the_end_of_a_long_file_is_read_and_it_is_enough(tmp_path: Path) -> None:
    write_metrics(tmp_path, *({"step": n, "loss/total": float(n)} for n in range(10_000)))
    assert (tmp_path / "metrics.jsonl").stat().st_size > 300_000
    assert run_status(tmp_path).loss == 9999.0


def test_a_loss_that_is_not_finite_has_no_value(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"step": 1, "loss/total": 9.0}, {"step": 2, "loss/total": None})
    assert run_status(tmp_path).loss is None


# ----------------------------------------------------------------------------- real processes


WORKER = """
import sys
from pathlib import Path
from tcsae.runs.state import StateFile
state = StateFile(Path(sys.argv[1]))
state.begin()
state.stage("train", 30, 100, rate=1.0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun the run in tmp_path and works until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_living_process_that_says_nothing_is_silent_not_lost(
    tmp_path: Path, worker: subprocess.Popen[str]
) -> None:
    assert run_status(tmp_path).state == "running"
    assert run_status(tmp_path, time.time() + LOST_AFTER + 1).state == "running"
    assert run_status(tmp_path, time.time() + SILENT_AFTER + 1).state == "silent"


def test_a_killed_process_is_lost_also_while_its_parent_has_not_noticed(
    tmp_path: Path, worker: subprocess.Popen[str]
) -> None:
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    soon, later = time.time() + LOST_AFTER + 1, time.time() + SILENT_AFTER + 1
    assert [run_status(tmp_path, now).state for now in (soon, later)] == ["lost", "lost"]
    worker.wait()
    assert [run_status(tmp_path, now).state for now in (soon, later)] == ["lost", "lost"]
    status = run_status(tmp_path, soon)
    assert status.progress == 0.3 and status.seconds_left is None and not status.is_here


def test_a_run_killed_elsewhere_is_only_silent(
    tmp_path: Path, worker: subprocess.Popen[str]
) -> None:
    state = json.loads((tmp_path / "state.json").read_text())
    worker.kill()
    worker.wait()
    (tmp_path / "state.json").write_text(json.dumps(state | {"host": "elsewhere"}))
    assert run_status(tmp_path, time.time() + SILENT_AFTER + 1).state == "silent"


def test_a_lost_run_that_is_begun_again_runs(tmp_path: Path, worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    StateFile(tmp_path).begin()
    status = run_status(tmp_path, time.time() + LOST_AFTER + 1)
    assert (status.state, status.attempt) == ("running", 2)


def test_another_process_under_the_same_number_is_not_the_run(
    tmp_path: Path, worker: subprocess.Popen[str]
) -> None:
    now = time.time()
    assert is_alive(worker.pid, now)
    assert not is_alive(worker.pid, now - 3600)
    write_state(tmp_path, host=socket.gethostname(), pid=worker.pid, updated=now - 3600)
    assert run_status(tmp_path, now).state == "lost"


def test_no_process_has_a_number_beyond_all_numbers() -> None:
    assert not is_alive(2**22 + 1, time.time()) and not is_alive(10**14, time.time())
    assert is_alive(1, time.time()) and is_alive(os.getpid(), time.time())


# ------------------------------------------------------------------------------------ sweeps


def states(folder: Path) -> list[str]:
    (group,) = find_groups([folder], NOW)
    return [job.state for job in group.jobs]


def test_a_sweep_knows_the_jobs_that_have_no_folder(tmp_path: Path) -> None:
    write_sweep(tmp_path, ["window=4", "window=8", "window=16"])
    write_final(tmp_path / "run-0")
    write_state(tmp_path / "run-2")
    (group,) = find_groups([tmp_path], NOW)
    assert [(job.number, job.name, job.state, job.run_id) for job in group.jobs] == [
        (0, "window=4", "done", "id0"),
        (1, "window=8", "queued", "id1"),
        (2, "window=16", "running", "id2"),
    ]
    assert group.counts == {"done": 1, "running": 1, "queued": 1}


def test_the_slurm_job_is_that_of_the_run_or_of_the_last_submission(tmp_path: Path) -> None:
    packs = [
        [{"jobs": [0, 1], "job_id": "12_0"}, {"jobs": [2], "job_id": None}],
        [{"jobs": [1], "job_id": "15_0"}],
    ]
    submissions = [{"time": NOW, "packs": p, "closing_job_id": None} for p in packs]
    write_sweep(tmp_path, ["a", "b", "c", "d"], submissions=submissions)
    write_state(tmp_path / "run-0", slurm_job_id="99_7")
    (group,) = find_groups([tmp_path], NOW)
    assert [job.slurm_job_id for job in group.jobs] == ["99_7", "15_0", None, None]


def test_a_run_a_folder_of_runs_and_sweeps_below_are_found(tmp_path: Path) -> None:
    write_state(tmp_path / "outputs" / "one")
    write_metrics(tmp_path / "outputs" / "old", {"step": 1})
    (tmp_path / "outputs" / "old" / "config.json").write_text("{}")
    write_sweep(tmp_path / "multirun" / "grid", ["a", "b"])
    assert states(tmp_path / "outputs") == ["unknown", "running"]
    assert states(tmp_path / "outputs" / "one") == ["running"]
    groups = find_groups([tmp_path, tmp_path / "outputs" / "one"], NOW)
    assert [[job.name for job in group.jobs] for group in groups] == [
        ["a", "b"],
        ["old", "one"],
        ["one"],
    ]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", '{"jobs": [{}]}', '{"jobs": 3}', '{"name": 1, "jobs": [[]]}'],
)
def test_a_damaged_sweep_shows_the_runs_that_are_there(tmp_path: Path, content: str) -> None:
    write_state(tmp_path / "run-0")
    (tmp_path / "sweep.json").write_text(content)
    (group,) = find_groups([tmp_path], NOW)
    assert [job.state for job in group.jobs] == ["running"]
    assert group.warning is not None and "sweep.json is damaged" in group.warning


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="neither a run nor a sweep"):
        find_groups([tmp_path / "empty"])
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find_groups([tmp_path / "nowhere"])


# ---------------------------------------------------------------------------------- time left


def job(tmp_path: Path, number: int) -> Job:
    return Job(number, str(number), run_status(tmp_path / f"run-{number}", NOW))


def test_nothing_that_runs_means_no_time_to_tell(tmp_path: Path) -> None:
    write_final(tmp_path / "run-0", wall_seconds=100.0)
    assert seconds_left([job(tmp_path, 0), job(tmp_path, 1)]) is None
    assert seconds_left([]) is None


def test_without_a_finished_job_the_time_left_is_a_lower_bound(tmp_path: Path) -> None:
    write_state(tmp_path / "run-0", seconds_left=75.0)
    assert seconds_left([job(tmp_path, 0)]) == (75.0, True)
    # One that waits takes as long as this one in all: 60 s so far, 75 s to come.
    assert seconds_left([job(tmp_path, 0), job(tmp_path, 1)]) == (75.0 + 135.0, True)


def test_a_finished_job_says_how_long_the_others_take(tmp_path: Path) -> None:
    write_final(tmp_path / "run-0", wall_seconds=300.0)
    for number in (1, 2):
        write_state(tmp_path / f"run-{number}", seconds_left=75.0, started=NOW - 60)
    waiting = [job(tmp_path, number) for number in (3, 4)]
    jobs = [job(tmp_path, number) for number in range(3)]
    # Two at once: 240 s for those that run, then 300 s for those that wait.
    assert seconds_left(jobs) == (240.0, False)
    assert seconds_left(jobs + waiting) == (540.0, False)


def test_a_later_attempt_has_only_its_stage_to_go_by(tmp_path: Path) -> None:
    write_final(tmp_path / "run-0", wall_seconds=300.0)
    write_state(tmp_path / "run-1", seconds_left=75.0, attempt=2)
    assert seconds_left([job(tmp_path, 0), job(tmp_path, 1)]) == (75.0, False)


def test_a_running_job_that_says_nothing_of_its_stage_makes_a_lower_bound(tmp_path: Path) -> None:
    write_final(tmp_path / "run-0", wall_seconds=50.0)
    write_state(tmp_path / "run-1", seconds_left=75.0)
    write_state(tmp_path / "run-2", seconds_left=None)
    assert seconds_left([job(tmp_path, n) for n in (0, 1, 2)]) == (75.0, True)
    assert seconds_left([job(tmp_path, n) for n in (0, 2)]) is None


@given(
    lefts=st.lists(st.floats(0.1, 1e6), min_size=1, max_size=5),
    n_queued=st.integers(0, 5),
    wall=st.none() | st.floats(1, 1e6),
)
def test_more_work_never_takes_less_time(
    tmp_path_factory: pytest.TempPathFactory, lefts: list[float], n_queued: int, wall: float | None
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    for number, left in enumerate(lefts):
        write_state(folder / f"run-{number}", seconds_left=left)
    if wall is not None:
        write_final(folder / "run-99", wall_seconds=wall)
    jobs = [job(folder, number) for number in [99, *range(len(lefts) + n_queued)]]
    jobs = jobs if wall is not None else jobs[1:]
    found, one_less = seconds_left(jobs), seconds_left(jobs[:-1])
    assert found is not None and found[0] >= max(lefts) and found[1] is (wall is None)
    if n_queued and one_less is not None:
        assert found[0] >= one_less[0]
