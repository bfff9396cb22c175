"""`python -m tcsae.status` as a process: terminals, pipes, what it imports, and a real run."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment, metric_lines, run_here, small_job
from state_folders import write_final, write_state, write_sweep

from tcsae.runs.state import StateFile
from tcsae.status import main

COMMAND = [sys.executable, "-m", "tcsae.status"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """One job failed, one waits."""
    folder = write_sweep(tmp_path / "grid", ["window=4", "window=8"])
    write_state(folder / "run-0", state="failed", message="no")
    return folder


def in_terminal(*arguments: object, **env: str) -> tuple[subprocess.Popen[bytes], int]:
    """The command with a terminal of its own for stdout, and the terminal's other end."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=slave,
        env=environment(TERM="xterm", COLUMNS="100", LINES="50", **env),
        # Where the tests run in the background, a shell has told them to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(slave)
    return process, master


def read_until(master: int, pattern: str) -> str:
    """What the terminal shows, up to a match of `pattern` or the end."""
    seen = ""
    while not re.search(pattern, seen, re.DOTALL):
        try:
            seen += os.read(master, 4096).decode()
        except OSError:  # how a terminal without a process ends
            break
    return seen


def test_a_terminal_is_drawn_again_until_the_run_has_ended(tmp_path: Path) -> None:
    state = StateFile(tmp_path, write_every=0)
    state.begin()
    state.stage("train", 10, 100, rate=5.0)
    process, master = in_terminal("--watch", "0.05", tmp_path)
    first = read_until(master, r"10 %.*\x1b\[H\x1b\[J.*Ctrl-C ends")
    assert first.startswith("\x1b[H\x1b[J")
    state.stage("train", 80, 100, rate=5.0)
    assert "80 %" in read_until(master, "80 %")
    write_final(tmp_path)
    last = read_until(master, "all have ended")
    assert "1 done" in last
    assert process.wait(timeout=20) == 0
    os.close(master)


def test_colours_are_for_terminals_that_want_them(sweep: Path) -> None:
    plain = subprocess.run(
        [*COMMAND, str(sweep)], capture_output=True, text=True, env=environment(TERM="xterm")
    )
    assert "\x1b" not in plain.stdout and "failed" in plain.stdout
    for env, is_coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        process, master = in_terminal(sweep, **env)
        out = read_until(master, "what is missing.*\n").replace("\r\n", "\n")
        process.wait(timeout=20)
        os.close(master)
        assert ("\x1b[31mfailed" in out) is is_coloured
        assert re.sub(r"\x1b\[\d*m", "", out) == plain.stdout


def test_the_command_ends_quietly_when_interrupted_or_no_longer_read(sweep: Path) -> None:
    process, master = in_terminal("--watch", "60", sweep)
    read_until(master, "Ctrl-C ends")
    process.send_signal(2)
    assert process.wait(timeout=20) == 0
    os.close(master)
    names = [f"window={n}" for n in range(5000)]  # more than a pipe holds
    write_sweep(sweep, names)
    piped = subprocess.Popen(
        [*COMMAND, str(sweep)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert piped.stdout is not None and piped.stderr is not None
    piped.stdout.readline()
    piped.stdout.close()
    assert piped.stderr.read() == b"" and piped.wait(timeout=20) == 0


def test_a_terminal_without_an_ellipsis_gets_another_character(tmp_path: Path) -> None:
    write_final(tmp_path / ("long-name-" * 12))
    done = subprocess.run(
        [*COMMAND, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(PYTHONIOENCODING="ascii"),
    )
    assert done.returncode == 0 and "long-name-long" in done.stdout and "?" in done.stdout


def test_the_command_needs_none_of_the_heavy_libraries() -> None:
    script = (
        "import sys, tcsae.status, tcsae.runs.state\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'hydra', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment()
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_refusal_of_the_command_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(tmp_path / "nowhere")], capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tcsae: {tmp_path / 'nowhere'} is not a folder\n"


@pytest.mark.slow
def test_a_real_run_is_shown_as_done(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, own_store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    outcome = run_here(*small_job(tiny_gpt2, texts, run, tracking="disabled"))
    assert outcome.code == 0, outcome.stderr
    main([str(run), "--json"])
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    (job,) = group["jobs"]
    info = json.loads((run / "final_info.json").read_text())
    assert job["state"] == "done" and job["progress"] == 1.0
    assert job["loss"] == metric_lines(run)[-1]["loss/total"] == info["final_loss"]
    assert job["tokens_per_second"] == info["tokens_per_second"]
    assert job["checkpoint_step"] is None  # a finished run keeps none
