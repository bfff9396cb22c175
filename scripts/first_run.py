"""README's first run: does it, on an empty store, and writes what it printed into README.md.

    python scripts/first_run.py [key=value ...]     (further arguments are overrides, for a trial)

Of the progress lines one in the middle and the last of each stage are kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pages import block, processor, replace_block

from tcsae.base.progress import clock

README = Path(__file__).resolve().parent.parent / "README.md"
_LINE = re.compile(r"^\d\d:\d\d:\d\d (INFO|WARNING) +(?P<text>.*)$")
_PROGRESS = re.compile(r"^(?P<stage>[a-z() -]+): [\d,]+ of [\d,]+ ")


def run(folder: Path, overrides: Sequence[str]) -> tuple[list[str], float, float]:
    """(what it printed, seconds, the most memory in GB) of what `make train` does, in `folder`."""
    command = [sys.executable, "-m", "tcsae.train", "+experiment=pair", *overrides]
    # The language model's converted weights are kept: they are made once on a machine.
    environment = {**os.environ, "TCSAE_STORE": str(folder / "store"), "COLUMNS": "120"}
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=printed.extend, args=(process.stdout,))
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    reader.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("".join(printed) + f"exit code {process.returncode}")
    return [line.rstrip() for line in printed], time.monotonic() - begun, usage.ru_maxrss / 1e6


def shortened(printed: Sequence[str], folder: Path) -> list[str]:
    """The log's lines, of each stage's progress lines the one in the middle."""
    stages: dict[str, list[str]] = {}
    for line in printed:
        at = _LINE.match(line)
        progress = at and _PROGRESS.match(at["text"])
        if progress:
            stages.setdefault(progress["stage"], []).append(line)
    middle = {lines[len(lines) // 2] for lines in stages.values()}
    dropped = {line for lines in stages.values() for line in lines} - middle
    kept = [line for line in printed if _LINE.match(line) and line not in dropped]
    return [line.replace(f"{folder}/", "").replace(str(folder), ".") for line in kept]


def written(printed: Sequence[str], seconds: float, gigabytes: float) -> str:
    """The block of README."""
    intro = (
        f"What it printed on {os.cpu_count()} cores, {processor()}, in {clock(seconds)} "
        f"minutes and {gigabytes:.1f} GB of memory (`python scripts/first_run.py`; most progress "
        "lines left out):"
    )
    return block("first run", "\n".join([intro, "", *(f"    {line}" for line in printed)]))


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        printed, seconds, gigabytes = run(folder, sys.argv[1:])
        new = written(shortened(printed, folder), seconds, gigabytes)
    print(new)
    if not sys.argv[1:]:
        replace_block(README, new)


if __name__ == "__main__":
    main()
