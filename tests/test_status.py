"""What `python -m tcsae.status` prints: the table, what to do next, and how it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import environment
from hypothesis import given
from hypothesis import strategies as st
from state_folders import write_final, write_metrics, write_state, write_sweep

from tcsae.report.status_table import duration, fitting_text, shorten, shorten_names, text
from tcsae.runs.status import find_groups
from tcsae.status import main

GRID = [f"window={w},lambda={x}" for w in (4, 8) for x in (0, 0.1, 0.3)]


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """One job done, one failed, one running in its third attempt, one silent, two queued."""
    now = time.time()
    folder = write_sweep(
        tmp_path / "grid",
        GRID,
        command=["--multirun", "window=4,8", "name=a b"],
        submissions=[{"packs": [{"jobs": [1], "job_id": "12_1"}]}],
    )
    write_final(folder / "run-0", wall_seconds=600.0, tokens_per_second=51234.0, final_loss=12.34)
    write_state(
        folder / "run-1", state="failed", message="the loss is not finite", updated=now,
        traceback="Traceback (most recent call last):\n  deep\nValueError: not finite\n",
    )  # fmt: skip
    write_state(
        folder / "run-2", done=425_000, total=1_000_000, rate=9876.0, seconds_left=150.0,
        attempt=3, started=now - 60, updated=now,
    )  # fmt: skip
    write_metrics(folder / "run-2", {"step": 7, "loss/total": 104.25})
    write_state(folder / "run-3", stage="harvest", updated=now - 725, started=now - 800)
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused call leaves."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("tcsae: ")
    return line


# -------------------------------------------------------------------------------------- table


def test_the_table_says_what_every_job_does(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    title, head, *rows = shown(capsys, sweep).splitlines()[:8]
    assert title == f"sweep grid (slurm): {sweep}"
    cells = [re.split(r"  +", line.strip()) for line in [head, *rows]]
    assert cells == [
        ["#", "job", "state", "stage", "done", "tokens/s", "left", "loss"],
        ["0", GRID[0], "done", "-", "100 %", "51,234", "-", "12.34"],
        ["1", GRID[1], "failed", "train", "25 %", "-", "-", "-"],
        ["2", GRID[2], "running, attempt 3", "train", "42 %", "9,876", cells[3][6], "104.2"],
        ["3", GRID[3], "silent for 12 min", "harvest", "25 %", "10", "-", "-"],
        ["4", GRID[4], "queued", "-", "-", "-", "-", "-"],
        ["5", GRID[5], "queued", "-", "-", "-", "-", "-"],
    ]
    assert cells[3][6] in ("2 min", "3 min")


def test_columns_are_aligned_and_fit_into_a_hundred(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, sweep).splitlines()[1:8]
    assert max(map(len, lines)) <= 100
    for head, is_right in (("job", False), ("state", False), ("tokens/s", True), ("loss", True)):
        at = lines[0].index(head) + (len(head) if is_right else 0)
        for line in lines:
            padded = line.ljust(100)
            inside, outside = (padded[at - 1], padded[at]) if is_right else padded[at : at - 2 : -1]
            assert inside != " " and outside == " ", line


def test_one_line_counts_the_jobs_and_says_how_long(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = shown(capsys, sweep).splitlines()[8]
    # Two run at once, one with 150 s left; two wait for 600 s each: (150 + 2 * 600) / 2.
    assert line == "1 done, 1 failed, 1 silent, 1 running, 2 queued; at least 11 min left"


def test_below_the_table_is_what_to_do(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep / ".packs" / "slurm-20250101-120000" / "12_1"
    folder.mkdir(parents=True)
    for name in ("12_1_0_log.out", "12_1_submitted.pkl", "12_10_0_log.out"):
        (folder / name).write_text("")
    log = folder / "12_1_0_log.out"
    (sweep / "run-3" / "train.log").write_text("")
    assert shown(capsys, sweep).splitlines()[9:] == [
        f"failed: 1 {GRID[1]}: the loss is not finite",
        f"    log: {log}",
        f"silent: 3 {GRID[3]}: no word for 12 min from process 1 on elsewhere",
        f"the tracebacks: python -m tcsae.status {sweep} --failed",
        "once the others have ended, this runs what is missing: "
        "python -m tcsae.train --multirun window=4,8 'name=a b'",
    ]


def test_without_slurm_the_log_is_the_one_in_the_runs_folder(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"    log: {sweep / 'run-1'}\n" in shown(capsys, sweep)
    (sweep / "run-1" / "train.log").write_text("")
    assert f"    log: {sweep / 'run-1' / 'train.log'}\n" in shown(capsys, sweep)


def test_a_sweep_that_went_well_needs_no_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path, ["a", "b"])
    for number in (0, 1):
        write_final(tmp_path / f"run-{number}")
    assert shown(capsys, tmp_path).splitlines()[-1] == "2 done"


def test_a_killed_run_says_where_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import sys; from pathlib import Path; from tcsae.runs.state import StateFile\n"
        "StateFile(Path(sys.argv[1])).begin(); import os; os.kill(os.getpid(), 9)"
    )
    run = tmp_path / "run"
    run.mkdir()
    gone = subprocess.run([sys.executable, "-c", script, str(run)], env=environment())
    assert gone.returncode == -9
    state = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(json.dumps(state | {"updated": state["updated"] - 60}))
    begins, how = shown(capsys, run).splitlines()[-2:]
    assert re.fullmatch(
        r"lost: 0 run: killed without a word 1 min ago \(process \d+\); run again, it begins again",
        begins,
    )
    assert how == "the command that began a run goes on with it"
    (run / "checkpoint").mkdir()
    (run / "checkpoint" / "step-00000400.safetensors").write_text("")
    assert "it goes on from the checkpoint at step 400" in shown(capsys, run)


def test_an_older_run_says_when_it_was_last_heard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(tmp_path / "old", {"step": 40, "loss/total": 5.0})
    (tmp_path / "old" / "config.json").write_text("{}")
    then = time.time() - 3 * 3600
    for name in ("metrics.jsonl", "config.json"):
        os.utime(tmp_path / "old" / name, (then, then))
    out = shown(capsys, tmp_path)
    assert "unknown: 0 old: last heard 3 h 00 min ago at step 40" in out


def test_many_failures_are_counted_not_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path, [f"seed={n}" for n in range(30)])
    for number in range(30):
        write_state(tmp_path / f"run-{number}", state="failed", message="no")
    out = shown(capsys, tmp_path)
    assert out.count(": no\n") == 8 and "failed: 22 more" in out


# ----------------------------------------------------------------------------- other outputs


def test_failed_prints_the_tracebacks(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, sweep, "--failed").splitlines() == [
        f"== 1 {GRID[1]}",
        "Traceback (most recent call last):",
        "  deep",
        "ValueError: not finite",
        f"log: {sweep / 'run-1'}",
    ]
    write_final(sweep / "run-1")
    assert shown(capsys, sweep, "--failed") == "no job has failed\n"


def test_json_has_everything(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (group,) = json.loads(shown(capsys, sweep, "--json"))["groups"]
    assert group["counts"] == {"done": 1, "failed": 1, "silent": 1, "running": 1, "queued": 2}
    assert group["launcher"] == "slurm" and group["seconds_left_is_lower_bound"]
    failed, running = group["jobs"][1], group["jobs"][2]
    assert failed["message"] == "the loss is not finite" and "deep" in failed["traceback"]
    assert failed["slurm_job_id"] == "12_1"
    expected: dict[str, Any] = {
        "number": 2, "name": GRID[2], "run_id": "id2", "state": "running", "attempt": 3,
        "stage": "train", "done": 425_000, "total": 1_000_000, "unit": "tokens",
        "progress": 0.425, "tokens_per_second": 9876.0, "loss": 104.25, "host": "elsewhere",
        "folder": str(sweep / "run-2"),
    }  # fmt: skip
    assert {key: running[key] for key in expected} == expected
    assert 0 < running["seconds_left"] <= 150


def test_several_folders_get_a_table_each(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_final(tmp_path / "single")
    out = shown(capsys, sweep, tmp_path / "single", sweep)
    assert out.count(f"sweep grid (slurm): {sweep}\n") == 1
    assert f"\n\n{tmp_path / 'single'}\n#  job     state" in out


def test_watching_ends_when_everything_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_final(tmp_path / "one")
    write_state(tmp_path / "other", state="failed", message="no")
    for arguments in (["--watch", tmp_path], [tmp_path, "--watch"], [tmp_path, "--watch", "9"]):
        out = shown(capsys, *arguments)
        assert out.count("1 done, 1 failed\n") == 1 and ": all have ended\n" in out


# ------------------------------------------------------------------------------------ refusals


def test_bad_folders_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "neither a run nor a sweep" in refusal(capsys, tmp_path)
    assert "is not a folder" in refusal(capsys, tmp_path / "nowhere")
    assert "is not a folder" in refusal(capsys, "--watch", tmp_path / "nowhere")
    assert "give a sweep or run folder" in refusal(capsys)
    assert "give a sweep or run folder" in refusal(capsys, "--watch", "5")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_watch_needs_a_time_above_zero(
    sweep: Path, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    assert "above 0" in refusal(capsys, sweep, f"--watch={seconds}")


@given(content=st.dictionaries(
    st.sampled_from(["state.json", "metrics.jsonl", "config.json", "final_info.json"]),
    st.binary() | st.sampled_from([b"{", b"[]", b'{"training": 3}', b'{"step": "x"}', b"NaN",
                                   b'{"wall_seconds": 1e999, "tokens_per_second": NaN}']),
    min_size=1,
), sweep=st.none() | st.binary() | st.sampled_from([b"{}", b"[]", b'{"jobs": [1]}']))  # fmt: skip
def test_whatever_is_in_the_files_there_is_a_table_and_json(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, bytes], sweep: bytes | None
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "run").mkdir()
    for name, data in content.items():
        (folder / "run" / name).write_bytes(data)
    (folder / "run" / "config.json").touch()
    if sweep is not None:
        (folder / "sweep.json").write_bytes(sweep)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([str(folder)])
    state = "done" if "final_info.json" in content else "unknown"
    assert f"1 {state}" in out.getvalue()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([str(folder), "--json"])
    assert json.loads(out.getvalue())["groups"][0]["counts"] == {state: 1}


# ----------------------------------------------------------------------------- words and numbers


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (60, "1 min"), (89, "1 min"),
        (91, "2 min"), (3569, "59 min"), (3571, "1 h 00 min"), (7500, "2 h 05 min"),
        (86_369, "23 h 59 min"), (86_371, "1 d 00 h"), (273_600, "3 d 04 h"),
    ],
)  # fmt: skip
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}


@given(seconds=st.floats(0, 1e9))
def test_a_duration_is_right_to_half_its_last_unit(seconds: float) -> None:
    parts = re.findall(r"(\d+) (s|min|h|d)", duration(seconds))
    value = sum(int(number) * UNITS[unit] for number, unit in parts)
    assert abs(value - seconds) <= UNITS[parts[-1][1]] / 2 + 1e-6
    limits = {"s": 60, "min": 60, "h": 24}
    assert all(int(number) < limits.get(unit, 10**9) for number, unit in parts)


@given(one=st.text(), width=st.integers(5, 60))
def test_a_shortened_text_fits_and_keeps_both_ends(one: str, width: int) -> None:
    short = shorten(one, width)
    assert len(short) <= width and short.isprintable()
    whole = "".join(c if c.isprintable() else repr(c)[1:-1] for c in one)
    if len(whole) <= width:
        assert short == whole
    else:
        start, end = short.split("…", 1) if one.isascii() else ("", "")
        assert whole.startswith(start) and whole.endswith(end)


def test_long_names_lose_what_they_share_before_what_tells_them_apart() -> None:
    names = [f"smollm2-135m-instruct-l15-topk-scale_free-w8-lambda{x}-s0" for x in (0, 0.1, 0.25)]
    short = shorten_names(names, 20)
    assert short == ["…lambda0-s0", "…lambda0.1-s0", "…lambda0.25-s0"]
    assert shorten_names(names, 80) == names
    assert shorten_names(names[:1], 11) == ["smoll…da0-s0"[:5] + "…a0-s0"]


@given(names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
       width=st.integers(80, 140))  # fmt: skip
def test_the_table_fits_whatever_the_jobs_are_called(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], width: int
) -> None:
    folder = write_sweep(tmp_path_factory.mktemp("sweep"), names)
    write_state(folder / "run-0", updated=time.time(), attempt=2)
    lines = text(find_groups([folder]), width).split("\n")[1 : len(names) + 2]
    assert all(len(line) <= width for line in lines)


def test_a_small_terminal_shows_what_matters_most(sweep: Path) -> None:
    write_final(sweep / "run-4")
    groups = find_groups([sweep])
    whole = fitting_text(groups, 1000, 99, False)
    assert whole == text(groups, 1000)
    n_lines = whole.count("\n") + 1
    assert fitting_text(groups, 1000, n_lines, False) == whole
    no_done = fitting_text(groups, 1000, n_lines - 1, False)
    assert no_done.count("\n") == whole.count("\n") - 1
    assert "(2 more: done)" in no_done and "51,234" not in no_done and GRID[5] in no_done
    least = fitting_text(groups, 1000, 1, False)
    assert "(3 more: done or queued)" in least and GRID[2] in least and GRID[5] not in least
    assert "2 done, 1 failed, 1 silent, 1 running, 1 queued" in least


def test_lines_that_wrap_count_as_several(sweep: Path) -> None:
    groups = find_groups([sweep])
    n_lines = text(groups).count("\n") + 1
    assert "more: done" not in fitting_text(groups, 1000, n_lines, False)
    assert "more: done" in fitting_text(groups, 90, n_lines, False)
