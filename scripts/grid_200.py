"""A grid of hundreds on a real Slurm: failures, preemption, a node that goes down, and the rest.

    python scripts/grid_200.py                 measures, and writes docs/slurm.md  (root, Debian)
    python scripts/grid_200.py --jobs 12       a trial: prints only

Starts a one-node Slurm (scripts/start-slurm.sh) with pretended CPUs and a small MaxArraySize, and
sends that many tiny jobs of a synthetic world (`seed` x `lambda`) to its preemptible partition.
While they go on: a file lies where a run wants its folder, twice (two failures); a job of the
other partition takes the node from all that train, until three are preempted; and the node is set
down and up again. Then the obstacles are removed, and the same command does what is left. 200 jobs
take about six minutes on two cores that do little else: most of it is Python starting.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pages import block, processor, replace_block

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "slurm.md"
JOBS, PACK, MOST_IN_ARRAY = 200, 5, 8
TINY = (
    *("model=synthetic", "model.world.d_in=12", "model.world.document_tokens=31"),
    *("dataset.context_size=32", "dataset.n_contexts=256", "dataset.n_eval_contexts=32"),
    *("evaluation=quick", "evaluation.max_lag=8", "evaluation.windows=[2,4]"),
    *("training.batch_contexts=8", "training.precision=float32", "training.checkpoint_every=200"),
    *("sae=topk", "sae.d_sae=32", "training.target_l0=2", "window=4", "tracking=disabled"),
    *("hydra/launcher=slurm_cpu", "hydra.launcher.partition=low", "hydra.launcher.mem_gb=2"),
    *(
        "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.poll_seconds=1",
        "hydra.launcher.wait=true",
    ),
)


class Command:
    """A command that runs beside this script; its seconds and the most memory it had."""

    def __init__(self, module: str, *arguments: str, log: Path) -> None:
        self._started, self.log = time.monotonic(), log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdout=output, stderr=output
            )

    @property
    def ended(self) -> bool:
        return (
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        )

    def stop(self) -> None:
        """If it still goes on."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def finish(self) -> dict[str, Any]:
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return {
            "code": self._process.returncode,
            "seconds": time.monotonic() - self._started,
            "gigabytes": usage.ru_maxrss / 1e6,
        }


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def states(sweep: Path) -> list[dict[str, Any]]:
    """state.json of every job that has one."""
    found = []
    for file in sweep.glob("*/state.json"):
        with_content = file.read_text() or "{}"
        found.append(json.loads(with_content))
    return found


def until(condition: Callable[[], Any], command: Command) -> bool:
    """Waits for it; False if the command ended before."""
    while not (met := condition()) and not command.ended:
        time.sleep(0.2)
    return bool(met)


def block_two(sweep: Path) -> list[Path]:
    """Where the last two runs want their folders lies a file."""
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    blocked = [sweep / job["folder"] for job in jobs[-2:]]
    for path in blocked:
        shutil.rmtree(path, ignore_errors=True)
        path.write_text("in the way")
    return blocked


def running(sweep: Path) -> int:
    return sum(state.get("state") == "running" for state in states(sweep))


def preempted() -> int:
    """Array elements that Slurm has preempted since this morning, each time counted."""
    said = slurm("sacct", "-D", "-X", "-n", "-P", "-o", "State", "-S", "now-12hours")
    return sum(line.startswith(("PREEMPTED", "REQUEUED")) for line in said.splitlines())


def take_the_node(cpus: int) -> None:
    """As a more urgent job does: all that train save, and are queued again."""
    options = ["-p", "high", f"-c{cpus}", "-n1", "-o", os.devnull, "--mem=100"]
    slurm("sbatch", *options, "--wrap", "sleep 1")


def node_failure(node: str) -> None:
    """Its jobs are lost, and Slurm queues them again. It comes back when their processes have
    ended: a node that did fail has none, and Slurm drains one that still has."""
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=pretended")
    while subprocess.run(["pgrep", "-x", "slurmstepd"], capture_output=True).returncode == 0:
        time.sleep(0.2)
    # Refused where it has come back by itself.
    subprocess.run(
        ["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True, check=False
    )


def disturbed(sweep: Path, command: Command, cpus: int, before: int) -> dict[str, Any]:
    """What is done to the grid while it goes on."""
    done: dict[str, Any] = {"node_failures": 0}
    if not until((sweep / "sweep.json").is_file, command):
        sys.exit(command.log.read_text())
    done["blocked"] = block_two(sweep)
    while preempted() - before < 3 and until(lambda: running(sweep) >= 3, command):
        take_the_node(cpus)
        until(lambda: running(sweep) == 0, command)
    done["preempted"] = preempted() - before
    if until(lambda: running(sweep) >= 1, command):
        node_failure(socket.gethostname().split(".")[0])
        done["node_failures"] = 1
    return done


def measure(n_jobs: int, pack: int, cpus: int, folder: Path) -> dict[str, Any]:
    sweep = folder / "grid"
    seeds = ",".join(map(str, range(n_jobs // 2)))
    arguments = (
        *("--multirun", *TINY, f"seed={seeds}", "lambda=0,0.1", "training.tokens=40000"),
        *(f"store.dir={folder / 'store'}", f"hydra.sweep.dir={sweep}"),
        f"hydra.launcher.pack={pack}",
    )
    before = preempted()
    first = Command("tcsae.train", *arguments, log=folder / "first.log")
    try:
        done = disturbed(sweep, first, cpus, before)
        status = Command("tcsae.status", str(sweep), log=folder / "status.log").finish()
        found = {"first": first.finish()}
    finally:
        first.stop()
    after_first = finished(sweep)
    for path in done["blocked"]:
        path.unlink()
    found["second"] = Command("tcsae.train", *arguments, log=folder / "second.log").finish()
    compare = Command("tcsae.compare", str(sweep), log=folder / "compare.log").finish()
    return found | {
        "jobs": n_jobs,
        "pack": pack,
        "most_in_array": MOST_IN_ARRAY,
        "cpus": cpus,
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "done_after_first": after_first,
        "done_after_second": finished(sweep),
        "preempted": done["preempted"],
        "node_failures": done["node_failures"],
        "status": status,
        "compare": compare,
        "submissions": len(json.loads((sweep / "sweep.json").read_text())["submissions"]),
    }


def finished(sweep: Path) -> int:
    return len(list(sweep.glob("*/final_info.json")))


def text(found: dict[str, Any]) -> str:
    first, second, status, compare = (found[k] for k in ("first", "second", "status", "compare"))
    return (
        f"`python scripts/grid_200.py`: {found['jobs']} tiny jobs of a synthetic world in packs of "
        f"{found['pack']}, arrays of at most {found['most_in_array'] - 1} (MaxArraySize), "
        f"{found['cpus']} pretended CPUs on {found['machine']}. Two runs made to fail, "
        f"{found['preempted']} array elements preempted, the node down "
        f"{found['node_failures']} time(s):\n\n"
        "| what | jobs done | seconds | peak memory, GB | exit code |\n|---|---|---|---|---|\n"
        f"| the command | {found['done_after_first']} | {first['seconds']:.0f} | "
        f"{first['gigabytes']:.2f} | {first['code']} |\n"
        f"| the same command again | {found['done_after_second']} | {second['seconds']:.0f} | "
        f"{second['gigabytes']:.2f} | {second['code']} |\n"
        f"| `tcsae.status`, while it goes on | | {status['seconds']:.1f} | "
        f"{status['gigabytes']:.2f} | {status['code']} |\n"
        f"| `tcsae.compare` of all | | {compare['seconds']:.0f} | {compare['gigabytes']:.2f} | "
        f"{compare['code']} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=JOBS, help="an even number")
    parser.add_argument("--pack", type=int, default=PACK, help="jobs in a process")
    parser.add_argument("--cpus", type=int, default=8, help="that the node claims to have")
    parser.add_argument("--folder", type=Path, help="default: a temporary one, removed at the end")
    given = parser.parse_args(arguments)
    if subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0:
        sys.exit("a Slurm runs here already: end it first (scripts/stop-slurm.sh)")
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="tcsae-grid-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"FAKE_CPUS": str(given.cpus), "FAKE_GPUS": "0", "MAX_ARRAY": str(MOST_IN_ARRAY)}
    subprocess.run(["bash", HERE / "start-slurm.sh"], env={**os.environ, **asked}, check=True)
    try:
        found = measure(given.jobs, given.pack, given.cpus, folder)
    finally:
        subprocess.run(["bash", HERE / "stop-slurm.sh"], check=False)
        if given.folder is None:
            shutil.rmtree(folder)
    print(json.dumps(found, indent=1))
    print(text(found))
    if given.jobs == JOBS:
        replace_block(PAGE, block("grid 200", text(found)))


if __name__ == "__main__":
    main()
