"""What Slurm is asked for, with an sbatch that keeps what it was sent and refuses as Slurm does."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Outcome, run_here
from state_folders import write_sweep
from sweeps import grid_maker, words

from tcsae import status
from tcsae.base.errors import UserError
from tcsae.launch import slurm
from tcsae.launch.slurm_job import count_start

SBATCH = """#!/usr/bin/env bash
f="${@: -1}"; n=$(ls "$KEPT" | wc -l); cp "$f" "$KEPT/$n.sh"
end=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$f")
if [ -n "$end" ] && [ "$end" -gt 2 ]; then
  rm "$KEPT/$n.sh"
  echo "sbatch: error: Batch job submission failed: Invalid job array specification" >&2; exit 1
fi
refuse() { echo "sbatch: fatal: $1" >&2; exit 1; }
[ $(grep -c '^#SBATCH --mem' "$f") -gt 1 ] && refuse "mutually exclusive"
grep -q '^#SBATCH --mem=None' "$f" && refuse "Invalid --mem specification"
echo "Submitted batch job $((n + 7))"
"""
Send = Callable[..., tuple[Outcome, list[str]]]


@pytest.fixture
def send(tiny_gpt2: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Send:
    tools, kept = tmp_path / "bin", tmp_path / "kept"
    tools.mkdir()
    kept.mkdir()
    quiet = "#!/bin/sh\n"
    for name, text in (("sbatch", SBATCH), *((n, quiet) for n in ("squeue", "scancel", "srun"))):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("KEPT", str(kept))
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    grid = grid_maker(tiny_gpt2, texts, tmp_path / "store")

    def build(*more: str, seed: str = "0") -> tuple[Outcome, list[str]]:
        fixed = ("hydra/launcher=slurm", "hydra.launcher.wait=false", "hydra.launcher.pack=1")
        done = run_here(*grid(tmp_path / "sweep", seed=seed), *fixed, *more)
        files = sorted(kept.iterdir(), key=lambda file: int(file.stem))
        return done, [file.read_text() for file in files]

    return build


def asked(script: str, option: str) -> list[str]:
    return re.findall(rf"^#SBATCH --{option}[= ]?(.*)$", script, re.MULTILINE)


def test_an_array_that_is_too_large_is_sent_in_several(send: Send) -> None:
    done, scripts = send(seed="0,1,2,3,4")
    assert done.code == 0, words(done)
    assert [asked(script, "array")[0].partition("%")[0] for script in scripts[:2]] == ["0-2", "0-1"]
    (closing,) = scripts[2:]
    assert asked(closing, "dependency") == ["afterany:7:8"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("+hydra.launcher.additional_parameters.mem_per_cpu=3000",), ["mem-per-cpu=3000"]),
        (("hydra.launcher.mem_gb=null",), []),
        (("+hydra.launcher.additional_parameters.mem=null",), []),
        (("hydra.launcher.mem_gb=4",), ["mem=4096MB"]),
    ],
)
def test_memory_is_asked_for_in_one_form(
    send: Send, given: tuple[str, ...], wanted: list[str]
) -> None:
    done, scripts = send(*given)
    assert done.code == 0, words(done)
    assert re.findall(r"^#SBATCH --(mem.*)$", scripts[0], re.MULTILINE) == wanted


def test_the_closing_job_asks_for_no_gpu(send: Send) -> None:
    more = "+hydra.launcher.additional_parameters={gres:'gpu:a100:1',reservation:mine}"
    done, (array, closing) = send(more, "hydra.launcher.gpus_per_node=0")
    assert done.code == 0
    assert asked(array, "gres") == ["gpu:a100:1"] and asked(closing, "gres") == []
    assert asked(closing, "reservation") == ["mine"] and "gpu" not in closing.lower()


@pytest.mark.parametrize(
    ("given", "nodes", "tasks", "gpus"),
    [
        ((), "1", "1", ["1"]),
        (("hydra.launcher.gpus_per_node=4",), "1", "4", ["4"]),
        (("hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=2"), "2", "2", ["2"]),
        (("hydra.launcher.gpus_per_node=0", "hydra.launcher.tasks_per_node=3"), "1", "3", []),
    ],
)
def test_every_task_is_asked_for_with_its_gpu(
    send: Send, given: tuple[str, ...], nodes: str, tasks: str, gpus: list[str]
) -> None:
    done, (array, closing) = send(*given)
    assert done.code == 0, words(done)
    assert asked(array, "nodes") == [nodes] and asked(array, "ntasks-per-node") == [tasks]
    assert asked(array, "gpus-per-node") == gpus
    (srun,) = re.findall(r"^srun .*$", array, re.MULTILINE)
    alone = (nodes, tasks) == ("1", "1")
    for argument in ("--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=8"):
        assert (argument in srun) == (not alone)
    assert asked(closing, "nodes") == asked(closing, "ntasks-per-node") == ["1"]
    assert asked(closing, "gpus-per-node") == [] and "--wait=0" not in closing


def test_tasks_without_work_are_refused_before_anything_is_sent(send: Send, tmp_path: Path) -> None:
    two = "hydra.launcher.gpus_per_node=2"
    shared, _ = send(two, "sae=batchtopk")
    assert "one SAE over 2 ranks: sae=batchtopk chooses among all tokens" in shared.refusal()
    three, _ = send("hydra.launcher.gpus_per_node=3", "hydra.launcher.pack=auto", seed="0,1")
    assert "of 3 tasks 1 would have no job, as a pack has 2" in three.refusal()
    assert list((tmp_path / "kept").iterdir()) == [] and not (tmp_path / "sweep").exists()


def test_a_job_that_can_never_start_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    queue = "#!/bin/sh\necho '7_0 PENDING PartitionConfig'\necho '7_1 PENDING Nodes are DOWN'\n"
    for name, text in (("squeue", queue), ("scancel", f'#!/bin/sh\necho "$@" > {tmp_path}/gone\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    found = slurm.in_queue(["7_0", "7_1"])
    assert found is not None
    assert [job.said for job in found.values()] == [
        "pending (PartitionConfig)",
        "pending (Nodes are DOWN)",
    ]

    class Job:
        job_id = "7_0"

    ended = slurm._wait([Job()], slurm.SlurmOptions(poll_seconds=0.01))
    assert ended == {"7_0": "Slurm can never start it (PartitionConfig), so it was cancelled"}
    assert (tmp_path / "gone").read_text() == "7_0\n"


def test_a_job_that_slurm_holds_is_released_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "squeue": "echo '7_0 PENDING launch failed requeued held'",
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
        "scancel": f'echo "$@" > {tmp_path}/gone',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")

    class Job:
        job_id = "7_0"

    ended = slurm._wait([Job()], slurm.SlurmOptions(poll_seconds=0.01))
    assert (tmp_path / "asked").read_text() == slurm.MOST_RELEASES * "release 7_0\n"
    assert caplog.text.count("Slurm holds it: released") == slurm.MOST_RELEASES
    assert "can never start it (launch failed requeued held)" in ended["7_0"]
    assert (tmp_path / "gone").read_text() == "7_0\n"


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of three packs and a closing job, of which Slurm has ended the first; `gone` says
    what was cancelled."""
    sent = {
        "packs": [{"jobs": [n], "job_id": f"7_{n}"} for n in range(3)],
        "closing_job_id": "8",
        "folder": None,
    }
    sweep = write_sweep(tmp_path / "grid", ["a", "b", "c"], submissions=[sent])
    tools = tmp_path / "bin"
    tools.mkdir()
    queue = "7_1 RUNNING None\\n7_2 PENDING Priority\\n8 PENDING Dependency\\n9 RUNNING None\\n"
    for name, text in (("squeue", f"printf '{queue}'"), ("scancel", f'echo "$@" > {sweep}/gone')):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    return sweep


def test_a_sweep_is_cancelled_with_its_closing_job_once_agreed(
    queued: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        status.main([str(queued), "--cancel"])
    said = capsys.readouterr().out
    assert "3 jobs: 1 running, 1 pending, 1 pending (Dependency)" in said
    assert "--yes does it" in said and not (queued / "gone").exists()
    status.main([str(queued), "--cancel", "--yes"])
    assert (queued / "gone").read_text() == "7_1 7_2 8\n"
    assert "the sweep's command goes on from there" in capsys.readouterr().out


def test_a_sweep_without_slurm_has_nothing_to_cancel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(tmp_path / "grid", ["a"])
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue, and none is needed
    status.main([str(sweep), "--cancel", "--yes"])
    assert "Slurm has no job of it" in capsys.readouterr().out


def test_without_squeue_a_sent_sweep_is_not_called_ended(
    queued: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(queued))
    with pytest.raises(SystemExit) as left:
        status.main([str(queued), "--cancel", "--yes"])
    assert left.value.code == 2 and "no squeue" in capsys.readouterr().err


def test_looks_at_the_queue_grow_rare() -> None:
    pauses = [slurm._pause(5.0, waited) for waited in (0, 60, 300, 900, 1800, 10**6)]
    assert pauses == [5.0, 5.0, 10.0, 30.0, 60.0, 60.0]
    assert slurm._pause(120.0, 10**6) == 120.0


def test_a_job_that_is_started_in_vain_is_given_up(tmp_path: Path) -> None:
    """Counted in a row: whatever was saved in between begins the count anew."""
    pack = tmp_path / "0.json"
    assert [count_start(pack, (0, 100, 3), 2) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"started 3 times and nothing was saved .* given up"):
        count_start(pack, (0, 100, 3), 2)
    assert [count_start(pack, mark, 2) for mark in [(0, 200, 3)] * 2 + [(0, 300, 3)]] == [0, 1, 0]
    assert count_start(tmp_path / "1.json", (0, 100, 3), 0) == 0
