"""`python -m tcsae.status DIR [DIR ...]`: what the jobs of sweeps and runs are doing.

From their files alone: it works from any machine that sees the folder, also while Slurm is down.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.cli import agreed, command, refuse, show
from tcsae.report.status_table import WIDTH, fitting_text, text, to_json, tracebacks
from tcsae.runs.status import Group, find_groups

WATCH_EVERY = 5.0
SLURM_SECONDS = 5.0
"""How long Slurm is waited for, without whose word the page is written too."""
_CLEAR = "\x1b[H\x1b[J"


def _uses_colour() -> bool:
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def _watch(folders: Sequence[Path], seconds: float) -> None:
    """Draw again and again, until every job has ended or Ctrl-C."""
    is_terminal = sys.stdout.isatty()
    while True:
        groups = find_groups(folders)
        is_over = all(group.is_over for group in groups)
        width, height = shutil.get_terminal_size((WIDTH, 24))
        # Two lines less: the one below, and the one that the cursor is in.
        size = height - 2 if is_terminal else sys.maxsize
        page = fitting_text(groups, width, size, _uses_colour())
        said = time.strftime("%H:%M:%S") + (": all have ended" if is_over else "; Ctrl-C ends")
        print((_CLEAR if is_terminal else "") + f"{page}\n{said}", flush=True)
        if is_over:
            return
        time.sleep(seconds)


def _write_pages(folders: Sequence[Path], seconds: float | None) -> None:
    """One page in each folder, again and again until every job has ended where `seconds` say so."""
    from tcsae.report.status_page import write_status_page

    while True:
        groups = find_groups(folders)
        said, again = _said_by_slurm(groups), seconds is not None
        pages = [write_status_page(group, said, again) for group in groups]
        is_over = all(group.is_over for group in groups)
        show("\n".join(map(str, pages)) + (": all have ended" if again and is_over else ""))
        if seconds is None or is_over:
            return
        time.sleep(seconds)


def _said_by_slurm(groups: Sequence[Group]) -> dict[str, str]:
    """State and reason by job id; nothing where there is no Slurm, or it does not answer."""
    from tcsae.launch.stopping import slurm_jobs

    if shutil.which("squeue") is None:
        return {}
    try:
        jobs = slurm_jobs([group.folder for group in groups if group.is_sweep], SLURM_SECONDS)
    except (UserError, LookupError, TypeError):  # or a damaged sweep.json
        return {}
    return {name: found.said for name, found in jobs.items()}


def _cancel(folders: Sequence[Path], yes: bool) -> None:
    """Jobs that run elsewhere than on Slurm are their own command's to stop."""
    from tcsae.launch.slurm import cancel
    from tcsae.launch.stopping import slurm_jobs

    groups = find_groups(folders)
    jobs = slurm_jobs([group.folder for group in groups if group.is_sweep])
    if not jobs:
        show("Slurm has no job of it; what runs without Slurm is stopped by Ctrl-C where it runs")
        return
    states = Counter(found.said for found in jobs.values())
    show(f"{len(jobs)} jobs: " + ", ".join(f"{n} {state}" for state, n in states.items()))
    if agreed("cancel all of them?", yes):
        cancel(list(jobs))
        show("cancelled: they save first, and the sweep's command goes on from there")


# ------------------------------------------------------------------------------------- command


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.status",
        description="What the jobs of sweeps and runs are doing, from their files alone.",
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="a sweep or a run")
    parser.add_argument(
        "--html",
        action="store_true",
        help="write status.html into each folder; with --watch again and again",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--watch",
        nargs="?",
        const=str(WATCH_EVERY),
        metavar="SECONDS",
        help=f"draw again every SECONDS ({WATCH_EVERY:g}) until every job has ended",
    )
    how.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    how.add_argument(
        "--cancel", action="store_true", help="end what Slurm has of it for good; asks first"
    )
    parser.add_argument("--yes", action="store_true", help="with --cancel: do not ask")
    how.add_argument("--failed", action="store_true", help="the tracebacks of failed jobs")
    given = parser.parse_args(arguments)
    if given.yes and not given.cancel:
        parser.error("--yes goes with --cancel")
    if given.html and (given.json or given.cancel or given.failed):
        parser.error("--html goes with --watch alone")
    if given.watch is not None:
        try:
            given.watch = float(given.watch)
        except ValueError:  # `--watch DIR`
            given.folders.insert(0, Path(given.watch))
            given.watch = WATCH_EVERY
    return given


def _show(given: argparse.Namespace) -> None:
    if given.html:
        _write_pages(given.folders, given.watch)
    elif given.watch is not None:
        _watch(given.folders, given.watch)
    elif given.json:
        print(json.dumps(to_json(find_groups(given.folders)), indent=2, allow_nan=False))
    elif given.cancel:
        _cancel(given.folders, given.yes)
    elif given.failed:
        show("\n".join(tracebacks(find_groups(given.folders))))
    else:
        width = shutil.get_terminal_size((WIDTH, 24)).columns
        print(text(find_groups(given.folders), width, _uses_colour()))
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    if not given.folders:
        refuse("give a sweep or run folder: python -m tcsae.status multirun/...")
    if given.watch is not None and not 0 < given.watch < math.inf:
        refuse(f"--watch {given.watch:g}: must be a number of seconds above 0")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # terminals without an ellipsis
    with command():
        try:
            _show(given)
        except BrokenPipeError:  # the reader, a pager perhaps, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
