"""`python -m tcsae`: one door to every command, and one way out of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

import tcsae
from tcsae import cli
from tcsae.base.errors import Interrupted, SweepFailed, UserError


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tcsae", *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )


def test_without_a_command_it_lists_them_all() -> None:
    done = call()
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)


def test_the_version_is_that_of_the_package() -> None:
    assert call("--version").stdout == f"tcsae {tcsae.__version__}\n"


def test_a_command_gets_its_own_arguments(tmp_path: Path) -> None:
    done = call("status", str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tcsae: ") and done.stderr.count("\n") == 1
    composed = call("train", "--cfg", "job", "window=12")
    assert composed.returncode == 0, composed.stderr
    assert "window: 12" in composed.stdout


def test_an_unknown_command_is_one_line() -> None:
    done = call("trian")
    assert done.returncode == 2
    assert done.stderr.startswith("tcsae: trian: no such command; one of train, ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("mend it"), 2, "tcsae: mend it"),
        (SweepFailed("1 of 2 jobs failed"), 1, "tcsae: 1 of 2 jobs failed"),
        (Interrupted("SIGTERM"), 75, "tcsae: SIGTERM; the same command goes on from here"),
        (KeyboardInterrupt(), 130, "tcsae: stopped at once; the same command goes on"),
        (FileNotFoundError(2, "No such file", "/x"), 2, "tcsae: /x: No such file"),
    ],
)
def test_every_way_out_is_a_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, cli.command():
        raise error
    assert stopped.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), cli.command():
        raise ZeroDivisionError
