"""Inside a Slurm job: do the pack; when told to stop, save, and be queued again."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

from tcsae.base import ranks
from tcsae.base.errors import INTERRUPTED_EXIT_CODE, Interrupted, RankLost, UserError
from tcsae.base.files import read_json, write_json
from tcsae.base.log import console
from tcsae.base.run_files import STARTS, RunFiles
from tcsae.base.signals import StopRequest, stop_on_signal
from tcsae.launch.closing import write_sweep_page
from tcsae.launch.jobs import read_pack
from tcsae.launch.pack_ranks import work_over_ranks
from tcsae.launch.together import agree
from tcsae.launch.worker import prepare_process, raise_failed, work_or_raise
from tcsae.runs.state import queued, slurm_job_id

log = logging.getLogger(__name__)

KILL_WAIT = 600.0
"""Seconds to wait for Slurm's kill where this job cannot queue itself again."""


class PackJob:
    """What submitit sends: the pack is in a JSON file.

    Slurm starts a job again whose node has failed, and one that is preempted is queued again: at
    most `max_retries` times in a row without anything saved in between.

    Every task of the job comes here (launch/pack_ranks.py). Slurm's signals reach all of them, and
    each saves what is its own; the first one alone counts, and queues the job again once the others
    have saved. A task that dies ends the job: the others save, and the same command goes on.

    Args:
        together: the pack is one job, which all tasks train.
    """

    def __init__(self, max_retries: int, together: bool = False) -> None:
        self.max_retries, self.together = max_retries, together

    def __call__(self, path: str) -> None:
        ranks.begin()
        before = progress_mark(Path(path))
        group = None
        try:
            with stop_on_signal() as stop, ranks.leaving():
                if ranks.here().size == 1:
                    count_start(Path(path), before, self.max_retries)
                    return work_or_raise(Path(path), stop)
                group = ranks.join()
                self._work_over_ranks(Path(path), before, group, stop)
        except Interrupted as stopped:
            log.warning(str(stopped))
            lost = group.cause if group is not None else None
            if lost is not None or isinstance(stopped, RankLost):
                raise UserError(f"{lost or stopped}; {ranks.GO_ON}") from None
            if not ranks.here().is_first:
                sys.exit(INTERRUPTED_EXIT_CODE)
            _be_queued_again(Path(path), is_stuck=progress_mark(Path(path)) == before)

    def _work_over_ranks(
        self, path: Path, before: tuple[int, ...], group: ranks.Group | None, stop: StopRequest
    ) -> None:
        """Raises JobsFailed in the first rank."""
        prepare_process()
        assert group is not None
        pack, problem = read_pack(path), None
        if ranks.here().is_first:
            try:
                count_start(path, before, self.max_retries)
            except UserError as error:
                problem = str(error)
        agree([job.config for job in pack], path, problem, stop)
        failed = work_over_ranks(pack, self.together, group, stop)
        if ranks.here().is_first:
            raise_failed(pack, failed)

    def checkpoint(self, path: str) -> object:
        """submitit's own hook, for a signal before `__call__` has begun: nothing is lost."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, path)


class ClosingJob:
    def __call__(self, sweep: str) -> None:
        console()
        if write_sweep_page(Path(sweep)) is None:
            raise UserError("no comparison page")


def count_start(path: Path, mark: tuple[int, ...], most: int) -> int:
    """How many starts of the pack's job in a row, before this one, had saved nothing.

    Raises UserError if those are more than `most` are good for.
    """
    file = path.with_name(path.stem + STARTS)
    kept = read_json(file) if file.is_file() else {}
    vain = kept["vain"] + 1 if kept.get("mark") == list(mark) else 0
    write_json(file, {"mark": list(mark), "vain": vain})
    if vain > most:
        raise UserError(
            f"started {vain} times and nothing was saved (a node that fails, or preemption before "
            "the first save): given up. Leave the node out (hydra.launcher.exclude), lower "
            "training.checkpoint_every, or raise hydra.launcher.max_retries; the same command "
            "goes on"
        )
    if vain:
        log.warning(f"started again, and nothing was saved since: retry {vain} of {most}")
    return vain


def progress_mark(path: Path) -> tuple[int, ...]:
    """Numbers that grow whenever something of the pack's work has been saved."""
    pack = read_pack(path)
    made = sum(part.exists() for job in pack for part in _parts(job.files))
    steps = [
        int(file.stem.partition("-")[2])
        for job in pack
        for file in job.files.checkpoints.glob("step-*.safetensors")
    ]
    stores = {Path(job.config.store.dir).expanduser() for job in pack}
    shards = sum(1 for store in stores for _ in store.rglob("*.safetensors"))
    return made, sum(steps), shards


def _parts(files: RunFiles) -> tuple[Path, ...]:
    """What a run has made after its training, stage by stage."""
    return files.sae_cfg, files.eval.core, files.analysis.path, files.final_info


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _be_queued_again(path: Path, is_stuck: bool) -> None:
    """Leave, in a way that Slurm starts this job again unless somebody has cancelled it.

    Slurm queues a preempted job again only if it has to kill it: one that saves and ends by itself
    counts as ended. So it queues itself again, at once, which also frees the node sooner than the
    grace time would.

    Raises UserError if the time limit is too short for any progress.
    """
    # As "12_3": the plain id of an array's last task is that of the whole array.
    job_id = slurm_job_id()
    assert job_id is not None
    shown = _slurm("scontrol", "show", "job", job_id, "--oneliner").stdout
    facts = dict(part.split("=", 1) for part in shown.split() if "=" in part)
    if facts.get("JobState", "RUNNING") != "RUNNING":
        log.warning(f"{facts['JobState']}: leaving")  # Slurm ends it, and knows whether for good
        sys.exit(INTERRUPTED_EXIT_CODE)
    was_preempted = facts.get("PreemptTime", "None") != "None"
    if is_stuck and not was_preempted:
        raise UserError(
            f"the time limit ({facts.get('TimeLimit', 'of this job')}) is shorter than one "
            "interval: nothing was saved since the job began; raise hydra.launcher.timeout_min or "
            "lower training.checkpoint_every"
        )
    answer = _slurm("scontrol", "requeue", job_id)
    if answer.returncode:
        log.warning(f"cannot queue this job again ({answer.stderr.strip()}): waiting for Slurm")
        time.sleep(KILL_WAIT)
    log.warning("queued again")
    for job in read_pack(path):
        if not job.is_finished:
            queued(job.folder, job_id)
    sys.exit(INTERRUPTED_EXIT_CODE)
