"""`status.html` of a sweep: what its jobs are doing, as a page that browsers read again and again.

The page is one offline file. Somebody has to write it anew: a command that waits for Slurm, or
`python -m tcsae.status --html --watch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcsae.base.run_files import RunFiles
from tcsae.report.compare_files import FOLDER as COMPARISON
from tcsae.report.index_page import link
from tcsae.report.page import write_page
from tcsae.report.status_table import advice, cells_of, state_words, summary
from tcsae.report.trials import STEM as TRIALS
from tcsae.runs.status import Group, Job

PAGE = "status.html"
REFRESH_SECONDS = 30
HEAD = ("#", "Job", "State", "Stage", "Done", "Tokens/s", "Left", "Loss")
"""As of `status_table.cells_of`."""


def write_status_page(group: Group, said_by_slurm: Mapping[str, str], again: bool = True) -> Path:
    """The page of a group, in its folder.

    Args:
        said_by_slurm: state and reason by Slurm's job id, for jobs that wait.
        again: whether the page will be written again, and browsers are to look for that.
    """
    over = group.is_over
    folder = group.folder
    links = {
        "comparison": link(RunFiles(folder / COMPARISON).report, folder),
        "points": link(folder / f"{TRIALS}.html", folder),
    }
    context = {
        "group": group,
        "refresh": REFRESH_SECONDS if again and not over else None,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "summary": summary(group),
        "share": _share(group),
        "head": HEAD,
        "rows": [_row(job, said_by_slurm, folder) for job in group.jobs],
        "links": {name: href for name, href in links.items() if href},
        "advice": advice(group),
    }
    title = f"{folder.resolve().name}: {summary(group)}"
    return write_page(folder / PAGE, "status.html.j2", title, context, {}, {})


def _row(job: Job, said_by_slurm: Mapping[str, str], folder: Path) -> dict[str, Any]:
    number, name, _, *rest = cells_of(job)
    waits = said_by_slurm.get(job.slurm_job_id or "", "") if job.state == "queued" else ""
    said = job.status.said
    message = said.message if said and job.state == "failed" else None
    return {
        "number": number,
        "name": name,
        "href": link(RunFiles(job.status.folder).report, folder),
        "state": job.state,
        "words": state_words(job.status),
        "remark": message or waits or None,
        "cells": rest,
        "percent": None if job.status.progress is None else math.floor(100 * job.status.progress),
    }


def _share(group: Group) -> int:
    """Of all jobs, per cent that are done."""
    return math.floor(100 * group.counts.get("done", 0) / max(len(group.jobs), 1))
