"""hydra/launcher=slurm: a job array on a Slurm cluster, sent with submitit.

Every element of the array does one pack. A job that fails is FAILED for Slurm, with the traceback
in its log; one that is preempted, or nears its time limit, saves and is queued again
(tcsae/launch/slurm_job.py). A last job, which waits for the array, writes the comparison page.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.base.errors import INTERRUPTED_EXIT_CODE, UserError
from tcsae.base.progress import clock
from tcsae.base.run_files import SWEEP_FILE
from tcsae.config.launcher import SlurmOptions, checked
from tcsae.launch.jobs import write_pack
from tcsae.launch.launcher import GridLauncher, Packs
from tcsae.launch.pack_ranks import check_busy, n_tasks, tasks_per_node, trains_together
from tcsae.launch.preflight import check_reachable, warn_of_own_disks
from tcsae.launch.slurm_job import ClosingJob, PackJob
from tcsae.launch.sweep_folder import PACKS, SweepFolder
from tcsae.launch.telling import StatusPage
from tcsae.runs.state import queued

log = logging.getLogger(__name__)

LEAST_SECONDS = 60
"""What a job has at least between its start and the call to save."""
CLOSING_MINUTES = 60
SAY_EVERY = 60.0
PREEMPTED_EARLY = """\
code=$?
# Told to leave while Python was starting, nobody was there yet to queue the job again, and Slurm
# takes one that ends by itself for ended (tcsae/launch/slurm_job.py).
if [ "$code" -eq 143 ]; then
  id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  id=${id:-$SLURM_JOB_ID}
  case $(scontrol show job "$id" --oneliner) in
    *PreemptTime=None*) ;;
    *JobState=RUNNING*) scontrol requeue "$id" ;;
  esac
fi
exit "$code"
"""
QUIET_LOOKS = 3
"""Looks at the queue without a job after which it has ended: Slurm's lists lag behind."""


class SlurmLauncher(GridLauncher):
    kind = "slurm"

    @property
    def options(self) -> SlurmOptions:
        return checked(SlurmOptions, self.given)

    def processes(self) -> int | None:
        return None

    def device(self) -> str:
        return "cuda" if self.options.gpus_per_node else "cpu"

    def preflight(self, packs: Packs) -> None:
        options = self.options
        if shutil.which("sbatch") is None:
            raise UserError(
                "there is no Slurm on this machine (no sbatch): run this on a login node, or use "
                "hydra/launcher=local for several processes here"
            )
        if options.timeout_min * 60 < options.signal_delay_s + LEAST_SECONDS:
            raise UserError(
                f"hydra.launcher.timeout_min = {options.timeout_min}: shorter than one interval; a "
                f"job is told to save {options.signal_delay_s} s before the limit "
                f"(hydra.launcher.signal_delay_s) and needs {LEAST_SECONDS} s before that"
            )
        check_busy(packs, options, self.n_jobs)
        configs = [job.config for pack in packs for job in pack]
        check_reachable(configs)
        warn_of_own_disks(configs, self.sweep.path)

    def in_progress(self, sweep: SweepFolder) -> set[int]:
        return {number for numbers, _ in _sent_before(sweep) for number in numbers}

    def execute(self, sweep: SweepFolder, packs: Packs) -> dict[int, str] | None:
        options, said = self.options, f"python -m tcsae.status {sweep.path}"
        watched = _sent_before(sweep)
        closing = None
        if packs:
            together = trains_together(options, self.n_jobs)
            jobs, closing = submit(sweep, packs, options, self.compares, together)
            log.info(f"sent as Slurm job {jobs[0].job_id.partition('_')[0]}; {said} shows them")
            numbers = [[job.number for job in pack] for pack in packs]
            watched += list(zip(numbers, jobs, strict=True))
        if not options.wait:
            return None
        page = StatusPage(sweep.path)
        try:
            jobs = [job for _, job in watched]
            ended = _wait(jobs + ([closing] if closing else []), options, page.write)
        except KeyboardInterrupt:
            log.warning(f"no longer watching; the jobs go on: {said}; the same command watches on")
            sys.exit(INTERRUPTED_EXIT_CODE)
        page.write({}, is_last=True)
        if closing and ended[closing.job_id]:
            log.warning(f"no comparison page: {ended[closing.job_id]}")
        return {n: text for numbers, job in watched if (text := ended[job.job_id]) for n in numbers}


def _sent_before(sweep: SweepFolder) -> list[tuple[list[int], Any]]:
    """(numbers of jobs, submitit's job) of every pack that an earlier command has sent and that
    Slurm has not ended."""
    import submitit

    sent: list[tuple[list[int], Any]] = [
        (pack["jobs"], submitit.SlurmJob(sweep.path / submission["folder"] / "%j", pack["job_id"]))
        for submission in sweep.submissions()
        if submission["folder"] is not None
        for pack in submission["packs"]
        if pack["job_id"] is not None
    ]
    if not sent or shutil.which("squeue") is None:
        return []
    queue = in_queue([job.job_id for _, job in sent])
    if queue is None:
        raise UserError(
            "Slurm does not say which of the jobs sent before have ended (squeue fails): try again "
            "when it does"
        )
    return [(numbers, job) for numbers, job in sent if job.job_id in queue]


def submit(
    sweep: SweepFolder, packs: Packs, options: SlurmOptions, compares: bool, together: bool
) -> tuple[list[Any], Any]:
    """The array's jobs and the closing job (or None). Raises UserError if Slurm refuses them.

    `together`: all tasks of a Slurm job train its one job.
    """
    folder = sweep.path / PACKS / time.strftime("slurm-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    with _nothing_left_of_a_refusal(folder, sweep):
        files = [folder / f"{index}.json" for index in range(len(packs))]
        for file, pack in zip(files, packs, strict=True):
            write_pack(file, pack, sweep.path)
        executor = _executor(folder, options, "tcsae-" + sweep.name)
        jobs = _sent(
            executor, PackJob(options.max_retries, together), [str(file) for file in files]
        )
    closing = None
    if compares:
        arrays = ":".join(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
        executor = _executor(folder, _closing_options(options, arrays), "tcsae-compare")
        closing = executor.submit(ClosingJob(), str(sweep.path))
    ids = [job.job_id for job in jobs]
    sweep.add_submission(packs, ids, closing.job_id if closing else None, folder)
    _mark_queued(packs, ids)
    return jobs, closing


def _sent(executor: Any, job: PackJob, files: list[str]) -> list[Any]:
    """The jobs of an array, or of several where Slurm takes none as large (MaxArraySize)."""
    from submitit.core.utils import FailedJobError

    try:
        return executor.map_array(job, files)
    except FailedJobError as error:
        if len(files) == 1 or "job array specification" not in str(error):
            raise
    half = -(-len(files) // 2)
    first = _sent(executor, job, files[:half])
    try:
        return first + _sent(executor, job, files[half:])
    except BaseException:
        cancel([job.job_id for job in first])
        raise


def _executor(folder: Path, options: SlurmOptions, name: str) -> Any:
    import submitit

    executor = submitit.SlurmExecutor(folder=folder / "%j", max_num_timeout=1_000_000)
    given = options.additional_parameters
    extra = {"requeue": True} | {k: v for k, v in given.items() if v is not None}
    # Slurm takes one form of a request for memory; one of the user's own stands for ours.
    mem_gb = None if any(key in given for key in _MEMORY) else options.mem_gb
    chosen = {
        "job_name": name,
        "time": options.timeout_min,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "nodelist": options.nodelist,
        "gpus_per_node": options.gpus_per_node or None,
        "cpus_per_task": options.cpus_per_task,
        "mem": None if mem_gb is None else f"{round(mem_gb * 1024)}MB",
        "setup": options.setup or None,
        "teardown": PREEMPTED_EARLY.splitlines(),
        "signal_delay_s": options.signal_delay_s,
        "array_parallelism": options.array_parallelism,
        "stderr_to_stdout": True,
        "nodes": options.nodes,
        "ntasks_per_node": tasks_per_node(options),
        "srun_args": _srun_args(options),
        "additional_parameters": extra,
    }
    executor.update_parameters(**{key: value for key, value in chosen.items() if value is not None})
    return executor


def _srun_args(options: SlurmOptions) -> list[str] | None:
    """Where there are several tasks: one that ends leaves the others alone, whatever the site's
    default, as they see to that themselves, and save; and each has its CPUs, which srun does not
    take over from sbatch."""
    if n_tasks(options) == 1:
        return None
    return ["--kill-on-bad-exit=0", "--wait=0", f"--cpus-per-task={options.cpus_per_task}"]


_MEMORY = ("mem", "mem_per_cpu", "mem_per_gpu")


def _is_of_a_gpu(key: str, value: Any) -> bool:
    return "gpu" in key or (key == "gres" and "gpu" in str(value)) or key == "tres_bind"


def _closing_options(options: SlurmOptions, arrays: str) -> SlurmOptions:
    """Small, without a GPU, after the arrays' end however that comes."""
    extra = {k: v for k, v in options.additional_parameters.items() if not _is_of_a_gpu(k, v)}
    extra["dependency"] = f"afterany:{arrays}"
    return options.model_copy(
        update={
            "partition": options.closing_partition or options.partition,
            "nodes": 1,
            "tasks_per_node": 1,
            "gpus_per_node": 0,
            "cpus_per_task": min(options.cpus_per_task, 2),
            "mem_gb": None if options.mem_gb is None else min(options.mem_gb, 16),
            "timeout_min": CLOSING_MINUTES,
            "additional_parameters": extra,
        }
    )


@contextlib.contextmanager
def _nothing_left_of_a_refusal(folder: Path, sweep: SweepFolder) -> Iterator[None]:
    """Slurm's own words in one line, and the folder as it was, if it takes no job."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            yield
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder)
        only_ours = [path for path in sweep.path.rglob("*") if path.is_file()]
        if [path.name for path in only_ours] == [SWEEP_FILE]:
            shutil.rmtree(sweep.path)
        text = " ".join(str(error).split())
        reason = re.sub(r"sbatch: (error: )?", "; ", text).strip("; ") or "no reason was given"
        raise UserError(
            f"Slurm refused the jobs: {reason} (asked for with hydra.launcher.partition, "
            "nodes, tasks_per_node, gpus_per_node, cpus_per_task, mem_gb, timeout_min, account; "
            "sinfo shows what there is)"
        ) from error


def _mark_queued(packs: Packs, job_ids: list[str]) -> None:
    for pack, job_id in zip(packs, job_ids, strict=True):
        for job in pack:
            queued(job.folder, job_id)


# ---------------------------------------------------------------------------- waiting for them


def _wait(
    jobs: list[Any],
    options: SlurmOptions,
    tell: Callable[[dict[str, str]], None] = lambda said: None,
) -> dict[str, str]:
    """By job id: empty for a job that ended well, else what there is to say of it."""
    started = said_at = time.monotonic()
    ended: dict[str, str] = {}
    missing = dict.fromkeys((job.job_id for job in jobs), 0)
    hopeless, released = dict(missing), dict(missing)
    while len(ended) < len(jobs):
        queue = in_queue([job.job_id for job in jobs if job.job_id not in ended])
        tell({name: found.said for name, found in (queue or {}).items()})
        for job in jobs:
            name = job.job_id
            if name in ended:
                continue
            if queue is not None:
                missing[name] = 0 if name in queue else missing[name] + 1
                reason = queue[name].reason if name in queue else ""
                is_hopeless = reason in NEVER or reason in HELD and released[name] == MOST_RELEASES
                hopeless[name] = hopeless[name] + 1 if is_hopeless else 0
                if reason in HELD and released[name] < MOST_RELEASES:
                    released[name] += 1
                    release(name)
            if hopeless[name] >= QUIET_LOOKS:
                cancel([name])
                ended[name] = f"Slurm can never start it ({reason}), so it was cancelled"
                continue
            if missing[name] and job.paths.result_pickle.exists():
                ended[name] = _failure(job.task(0))
            elif missing[name] >= QUIET_LOOKS:
                ended[name] = _failure_of_another(job) or (
                    f"{accounting_state(name)}, with no result; its log: {job.paths.stdout}"
                )
        if time.monotonic() - said_at >= SAY_EVERY:
            said_at = time.monotonic()
            states = sorted(found.said for found in (queue or {}).values())
            counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
            queued = counted or "the queue is not known"
            log.info(f"{clock(said_at - started)}: {len(ended)} ended, {queued}")
        if len(ended) < len(jobs):
            time.sleep(_pause(options.poll_seconds, time.monotonic() - started))
    return ended


def _pause(least: float, waited: float) -> float:
    """Seconds to the next look: a thirtieth of what has been waited, a minute at most. Hundreds of
    users who ask every few seconds for days are a load that sites forbid."""
    return max(least, min(60.0, waited / 30))


def _failure(job: Any) -> str:
    """Empty, or the last line of what the job raised."""
    error = job.exception()
    if error is None:
        return ""
    traced = re.search(r"-{10,}\n(.*?)\n-{10,}", str(error), re.DOTALL)
    lines = (traced[1] if traced else str(error)).strip().splitlines()
    return f"{lines[-1].partition(': ')[2] or lines[-1]}; its log: {job.paths.stdout}"


def _failure_of_another(job: Any) -> str:
    """What another task says whose first one has died without a word."""
    first = job.paths.result_pickle
    for file in sorted(first.parent.glob(f"{job.job_id}_*_result.pkl")):
        number = file.name.removeprefix(f"{job.job_id}_").partition("_")[0]
        if said := _failure(type(job)(first.parent, job.job_id, tasks=(int(number),))):
            return said
    return ""


# Reasons of squeue that no waiting ends.
NEVER = frozenset(
    (
        *("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints"),
        *("InvalidAccount", "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed"),
    )
)


HELD = frozenset(("launch failed requeued held", "JobHoldMaxRequeue"))
"""Reasons of squeue for a job that Slurm has set aside, because a node could not start it: it waits
for somebody to let it go."""
MOST_RELEASES = 3


class InQueue(NamedTuple):
    state: str
    reason: str

    @property
    def said(self) -> str:
        waits = self.state == "PENDING" and self.reason not in ("", "None", "Priority")
        return self.state.lower() + (f" ({self.reason})" if waits else "")


def release(job_id: str) -> None:
    log.warning(f"a node could not start job {job_id}, and Slurm holds it: released")
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(["scontrol", "release", job_id], capture_output=True, timeout=60)


def cancel(job_ids: list[str]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(["scancel", *job_ids], capture_output=True, timeout=60)


def in_queue(job_ids: list[str], seconds: float = 60) -> dict[str, InQueue] | None:
    """State and reason by job id ("12_3") of those that Slurm still has to end; None if it does not
    answer within `seconds`."""
    main = ",".join(dict.fromkeys(name.partition("_")[0] for name in job_ids))
    command = ["squeue", "--noheader", "--array", "--jobs", main, "--format", "%i %T %r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (subprocess.TimeoutExpired, OSError):
        return None
    if answer.returncode:
        return {} if "Invalid job id" in answer.stderr else None
    found = {}
    for line in answer.stdout.splitlines():
        name, state, *reason = line.split(maxsplit=2)
        found[name] = InQueue(state, "".join(reason).strip())
    return found


def accounting_state(job_id: str) -> str:
    """CANCELLED, OUT_OF_MEMORY, ... where the cluster keeps accounts; else what is sure."""
    command = ["sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State"]
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if answer.returncode == 0 and answer.stdout.split():
            return answer.stdout.split()[0]
    return "it left the queue"
