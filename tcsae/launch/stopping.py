"""Slurm's jobs of sweeps, to be ended for good: `python -m tcsae.status --cancel`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.launch.slurm import InQueue, in_queue
from tcsae.launch.sweep_folder import SweepFolder


def slurm_jobs(sweeps: Sequence[Path], seconds: float = 60) -> dict[str, InQueue]:
    """By job id: what Slurm still has to end of the sweeps, closing jobs among them.

    Raises UserError if Slurm does not say within `seconds`.
    """
    sent: list[str] = []
    for sweep in sweeps:
        for submission in SweepFolder(sweep).submissions():
            ids = [pack["job_id"] for pack in submission["packs"]]
            sent += [id_ for id_ in (*ids, submission["closing_job_id"]) if id_ is not None]
    if not sent:
        return {}
    if shutil.which("squeue") is None:
        raise UserError("there is no Slurm on this machine (no squeue): cancel on a login node")
    queue = in_queue(sent, seconds)
    if queue is None:
        raise UserError("Slurm does not say what is in its queue (squeue fails): try again later")
    return {id_: queue[id_] for id_ in dict.fromkeys(sent) if id_ in queue}
