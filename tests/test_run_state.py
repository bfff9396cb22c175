"""state.json: what is written is what is read, and nothing that is wrong with it stops anybody."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcsae.runs.state import STATES, RunState, StateFile, queued, read_state

NEVER = 1e9
"""Seconds between two writes, for tests in which none must follow the first."""


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def written(folder: Path) -> RunState:
    state = read_state(folder)
    assert state is not None
    return state


def test_begin_says_who_works_on_the_run_since_when(tmp_path: Path) -> None:
    before = time.time()
    StateFile(tmp_path).begin()
    state = written(tmp_path)
    assert state.state == "running" and state.attempt == 1
    assert (state.host, state.pid) == (socket.gethostname(), os.getpid())
    assert before <= state.started <= state.updated <= time.time()
    assert state.stage is state.message is state.traceback is state.slurm_job_id is None


def test_the_file_has_the_keys_that_scripts_rely_on(tmp_path: Path) -> None:
    StateFile(tmp_path).begin()
    assert list(json.loads((tmp_path / "state.json").read_text())) == [
        "state", "stage", "done", "total", "unit", "rate", "seconds_left", "note", "message",
        "traceback", "host", "pid", "slurm_job_id", "attempt", "started", "updated",
    ]  # fmt: skip


def test_every_begin_is_another_attempt(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        state = StateFile(tmp_path)
        state.begin()
        assert written(tmp_path).attempt == attempt
        state.end("interrupted")
        assert written(tmp_path).attempt == attempt


def test_a_new_attempt_forgets_how_the_last_one_failed(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    state.begin()
    state.stage("train", 1, 2, rate=1.0)
    state.end("failed", "wrong", "Traceback ...")
    StateFile(tmp_path).begin()
    now = written(tmp_path)
    assert now.state == "running"
    assert now.message is now.traceback is now.stage is now.done is None


def test_the_slurm_job_is_the_arrays_task_or_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    StateFile(tmp_path).begin()
    assert written(tmp_path).slurm_job_id == "17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    StateFile(tmp_path).begin()
    assert written(tmp_path).slurm_job_id == "12_0"


def test_a_stage_says_how_far_how_fast_and_how_long(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    state.begin()
    state.stage("train", 250, 1000, "tokens", 50.0, "loss 12.3")
    now = written(tmp_path)
    assert (now.stage, now.done, now.total, now.unit) == ("train", 250, 1000, "tokens")
    assert (now.rate, now.seconds_left, now.note) == (50.0, 15.0, "loss 12.3")


def test_within_a_stage_writes_are_rare_and_a_new_stage_is_written_at_once(tmp_path: Path) -> None:
    state = StateFile(tmp_path, write_every=NEVER)
    state.begin()
    for done in range(100):
        state.stage("harvest", done, 100)
    assert written(tmp_path).done == 0
    state.stage("train", 7, 100)
    assert (written(tmp_path).stage, written(tmp_path).done) == ("train", 7)
    often = StateFile(tmp_path, write_every=0)
    often.begin()
    for done in range(5):
        often.stage("harvest", done, 100)
        assert written(tmp_path).done == done


def test_the_end_keeps_what_was_not_written_before(tmp_path: Path) -> None:
    state = StateFile(tmp_path, write_every=NEVER)
    state.begin()
    state.stage("train", 1, 100, rate=2.0, note="loss 9")
    state.stage("train", 60, 100, rate=2.0)
    state.end("failed", "two\n  lines", "Traceback\n  of them")
    now = written(tmp_path)
    assert (now.state, now.done, now.note) == ("failed", 60, "loss 9")
    assert (now.message, now.traceback) == ("two lines", "Traceback\n  of them")
    assert now.rate is now.seconds_left is None


def test_the_note_of_a_stage_ends_with_it(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    state.begin()
    state.stage("train", 1, 2, note="loss 9")
    state.stage("evaluate", 0, 2)
    assert written(tmp_path).note is None


@given(
    rate=st.none() | st.floats(),
    done=st.none() | st.integers(0, 10**12),
    total=st.none() | st.integers(0, 10**12),
    note=st.none() | st.text(),
)
def test_whatever_a_progress_says_can_be_written_and_read(
    tmp_path_factory: pytest.TempPathFactory,
    rate: float | None,
    done: int | None,
    total: int | None,
    note: str | None,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    state = StateFile(folder)
    state.begin()
    state.stage("train", done, total, "tokens", rate, note)
    now = written(folder)
    assert now == state.state
    assert (now.done, now.total, now.note) == (done, total, note or None)
    if now.seconds_left is not None:
        assert rate and done is not None and total is not None
        assert now.seconds_left == pytest.approx(max(total - done, 0) / rate)


def test_a_state_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    state = StateFile(folder, write_every=0)
    with caplog.at_level(logging.WARNING):
        state.begin()
        for done in range(5):
            state.stage("train", done, 5)
        state.end("done")
    assert len(caplog.records) == 1 and "state" in caplog.text
    assert read_state(folder) is None


def test_writing_goes_on_when_the_folder_is_there_again(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "run")
    state.begin()
    (tmp_path / "run").mkdir()
    state.end("done")
    assert written(tmp_path / "run").state == "done"


def test_a_queued_run_gets_a_folder_and_no_attempt_yet(tmp_path: Path) -> None:
    queued(tmp_path / "sweep" / "run", "12_3")
    state = written(tmp_path / "sweep" / "run")
    assert (state.state, state.attempt, state.slurm_job_id) == ("queued", 0, "12_3")
    StateFile(tmp_path / "sweep" / "run").begin()
    assert written(tmp_path / "sweep" / "run").attempt == 1


def test_a_run_that_is_queued_again_keeps_how_far_it_came(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    state.begin()
    state.stage("train", 40, 100, rate=3.0, note="loss 9")
    state.end("failed", "node gone", "Traceback")
    queued(tmp_path, "13_0")
    now = written(tmp_path)
    assert (now.state, now.attempt, now.slurm_job_id) == ("queued", 1, "13_0")
    assert (now.stage, now.done, now.total, now.note) == ("train", 40, 100, "loss 9")
    assert now.message is now.traceback is now.rate is now.seconds_left is None


def test_a_job_that_was_quicker_than_the_word_that_it_waits_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    state = StateFile(tmp_path)
    state.begin()
    queued(tmp_path, "17")
    assert written(tmp_path).state == "running"
    state.end("interrupted")  # Slurm queues it again under the same number
    queued(tmp_path, "17")
    assert written(tmp_path).state == "queued"
    state.begin()
    queued(tmp_path, "18")
    assert written(tmp_path).slurm_job_id == "18"


def test_a_run_that_cannot_be_marked_as_queued_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        queued(tmp_path / "file" / "run")
    assert len(caplog.records) == 1


# ------------------------------------------------------------------------------------- damage


def example() -> dict[str, Any]:
    state = RunState(
        state="running", stage="train", done=1, total=2, rate=3.5, seconds_left=0.5, note="loss 1",
        host="node", pid=7, slurm_job_id="12_0", attempt=2, started=1e9, updated=1.1e9,
    )  # fmt: skip
    return asdict(state)


def read_text(folder: Path, text: str | bytes) -> RunState | None:
    content = text.encode() if isinstance(text, str) else text
    (folder / "state.json").write_bytes(content)
    return read_state(folder)


def test_no_file_and_no_folder_are_no_state(tmp_path: Path) -> None:
    assert read_state(tmp_path) is read_state(tmp_path / "nowhere") is None


def test_a_key_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    read = read_text(tmp_path, json.dumps(example() | {"gpu": 3}))
    assert read is not None and asdict(read) == example()


def test_every_half_of_a_file_is_no_state(tmp_path: Path) -> None:
    text = json.dumps(example())
    assert read_text(tmp_path, text) is not None
    assert all(read_text(tmp_path, text[:n]) is None for n in range(len(text)))


@pytest.mark.parametrize("name", ["state", "host", "pid", "attempt", "started", "updated"])
def test_what_every_state_has_must_be_there(tmp_path: Path, name: str) -> None:
    rest = {key: value for key, value in example().items() if key != name}
    assert read_text(tmp_path, json.dumps(rest)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", "sleeping"), ("state", None), ("state", []), ("done", "1"), ("done", 1.5),
        ("done", -1), ("done", True), ("rate", float("nan")), ("rate", float("inf")),
        ("updated", None), ("updated", "now"), ("pid", None), ("host", 3), ("total", 10**400),
        ("note", {}), ("unit", None),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_damage(tmp_path: Path, name: str, value: Any) -> None:
    assert read_text(tmp_path, json.dumps(example() | {name: value})) is None


def test_a_whole_number_is_a_rate_too(tmp_path: Path) -> None:
    read = read_text(tmp_path, json.dumps(example() | {"rate": 3, "updated": 5}))
    assert read is not None and (read.rate, read.updated) == (3, 5)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    content=json_values
    | st.fixed_dictionaries(
        {}, optional={k: json_values | st.just(v) for k, v in example().items()}
    )
)
def test_any_json_is_a_state_or_none(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    folder = tmp_path_factory.mktemp("run")
    read = read_text(folder, json.dumps(content))
    assert read is None or (read.state in STATES and content["pid"] == read.pid >= 0)


@given(content=st.binary())
def test_any_bytes_are_no_state(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    assert read_text(tmp_path_factory.mktemp("run"), content) is None
