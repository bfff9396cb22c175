"""`python -m tcsae.launch.worker PACK.json`: the jobs of a pack, side by side in this process.

Exit codes: 0 all done, 1 at least one failed (the others are done all the same), 75 stopped by a
signal with everything saved.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tcsae.base.errors import INTERRUPTED_EXIT_CODE, Interrupted, UserError
from tcsae.base.files import disk_errors, make_folder, write_text
from tcsae.base.log import console, run_logs
from tcsae.base.printable import printable
from tcsae.base.signals import StopRequest, stop_on_signal
from tcsae.launch.jobs import GridJob, read_pack

if TYPE_CHECKING:  # it loads torch
    from tcsae.training.share import Share

log = logging.getLogger(__name__)


class JobsFailed(Exception):
    """Jobs of this pack failed; their tracebacks stand above."""


def work(
    pack: Sequence[GridJob], stop: StopRequest, share: Share | None = None
) -> dict[int, Exception]:
    """Do the jobs; the errors of those that failed, by job number.

    With `share` the other ranks train along (jobs/along.py).

    Raises Interrupted if a signal came: everything is saved.
    """
    from tcsae.jobs.bank import run_bank

    errors: dict[int, Exception] = {}
    ready = []
    for job in pack:
        try:
            if job.hydra_files:
                _write_hydra_files(job)
            ready.append(job)
        except (OSError, UserError) as failed:  # of its folder: the others have theirs
            errors[job.number] = failed
    with run_logs([job.folder for job in ready]):
        bank = [(job.config, job.folder) for job in ready]
        outcomes = run_bank(bank, stop, share) if bank else []
    errors |= {
        job.number: outcome.error
        for job, outcome in zip(ready, outcomes, strict=True)
        if outcome.error is not None
    }
    for job in pack:
        if (error := errors.get(job.number)) is not None:
            log.error(f"job {job.number} ({job.name}) failed: {error}")
    return errors


def _write_hydra_files(job: GridJob) -> None:
    folder = make_folder(job.files.hydra)
    with disk_errors(folder):
        for name, text in job.hydra_files.items():
            write_text(folder / name, text)


def work_or_raise(path: Path, stop: StopRequest) -> None:
    """Do the pack in the file `path`. Raises JobsFailed if a job failed, after the others' end."""
    prepare_process()
    pack = read_pack(path)
    errors = work(pack, stop)
    for error in errors.values():
        traceback.print_exception(error)
    raise_failed(pack, errors)


def prepare_process() -> None:
    """Threads and log lines, before torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console()


def raise_failed(pack: Sequence[GridJob], errors: Mapping[int, Exception | str]) -> None:
    """Raises JobsFailed if there are errors, which names them."""
    if errors:
        said = "; ".join(f"{pack_job_name(pack, n)}: {error}" for n, error in errors.items())
        raise JobsFailed(f"{len(errors)} of {len(pack)} jobs failed ({said})")


def pack_job_name(pack: Sequence[GridJob], number: int) -> str:
    return next(f"job {job.number}, {job.name}" for job in pack if job.number == number)


def main(arguments: Sequence[str] | None = None) -> None:
    path = Path((arguments or sys.argv[1:])[0])
    try:
        with stop_on_signal() as stop:
            work_or_raise(path, stop)
    except Interrupted as stopped:
        log.warning(str(stopped))
        sys.exit(INTERRUPTED_EXIT_CODE)
    except (JobsFailed, UserError) as failed:
        print(f"tcsae: {printable(str(failed))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
