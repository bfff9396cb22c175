"""Which rank of a Slurm job does what; the job itself is in test_slurm_ranks.py."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import small_config

from tcsae.base.errors import UserError
from tcsae.config.launcher import LocalOptions, Options, SlurmOptions
from tcsae.launch.jobs import GridJob
from tcsae.launch.pack_ranks import check_busy, n_tasks, parts, trains_together
from tcsae.launch.plan import packed, plan_lines
from tcsae.launch.sweep_folder import SweepFolder


@pytest.fixture(scope="module")
def first(tiny_gpt2: Path, texts: Path) -> GridJob:
    return GridJob(0, "first", (), small_config(tiny_gpt2, texts), Path("/unused/0"), {})


def jobs_like(first: GridJob, n: int) -> list[GridJob]:
    return [replace(first, number=i, folder=Path(f"/unused/{i}")) for i in range(n)]


def four(**more: Any) -> SlurmOptions:
    return SlurmOptions(nodes=2, tasks_per_node=2, gpus_per_node=0, **more)


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        (Options(), 1),
        (LocalOptions(), 1),
        (SlurmOptions(), 1),
        (SlurmOptions(gpus_per_node=0), 1),
        (SlurmOptions(gpus_per_node=4), 4),
        (SlurmOptions(nodes=2, gpus_per_node=4), 8),
        (SlurmOptions(nodes=3, tasks_per_node=2, gpus_per_node=0), 6),
    ],
)
def test_there_is_a_task_for_every_gpu_unless_asked_otherwise(options: Options, tasks: int) -> None:
    assert n_tasks(options) == tasks


def test_every_job_of_a_pack_is_of_one_rank(first: GridJob) -> None:
    numbers = [[job.number for job in part] for part in parts(jobs_like(first, 6), 4)]
    assert numbers == [[0, 4], [1, 5], [2], [3]]
    assert parts(jobs_like(first, 1), 2)[1] == []


@pytest.mark.parametrize(
    ("options", "n_jobs", "together"),
    [
        (four(), 1, True),
        (four(), 2, False),
        (four(pack=1), 2, True),
        (four(pack=4), 8, False),
        (SlurmOptions(pack=1), 1, False),
        (Options(pack=1), 1, False),
    ],
)
def test_one_job_alone_is_trained_by_all(options: Options, n_jobs: int, together: bool) -> None:
    assert trains_together(options, n_jobs) == together


def test_a_job_that_ranks_cannot_share_is_refused_by_name(first: GridJob) -> None:
    dataset = first.config.training.model_copy(update={"batch_contexts": 7})
    small = replace(first, number=3, config=first.config.model_copy(update={"training": dataset}))
    said = r"job 3 \(first\): one SAE over 4 ranks: training.batch_contexts = 7 leaves"
    with pytest.raises(UserError, match=said):
        check_busy([[first], [small]], four(pack=1), 2)
    check_busy([[first], [small]], SlurmOptions(pack=1), 2)
    check_busy([[first]], four(), 1)


def test_idle_tasks_are_refused_but_for_the_rest_of_a_sweep(
    first: GridJob, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    jobs = jobs_like(first, 7)
    with pytest.raises(UserError, match=r"of 4 tasks 1 would have no job, as a pack has 3"):
        check_busy([jobs[:3], jobs[3:5]], four(), 5)
    check_busy([jobs[:4]], four(), 4)
    assert caplog.text == ""
    check_busy([jobs[:3]], four(), 4)  # one of four is finished
    assert "1 of 1 packs have fewer jobs than the 4 tasks" in caplog.text
    check_busy([jobs[:4], jobs[4:]], four(), 7)
    assert "1 of 2 packs have fewer jobs than the 4 tasks" in caplog.text


def test_a_pack_fills_every_task(first: GridJob, tmp_path: Path) -> None:
    jobs = jobs_like(first, 40)
    assert [len(pack) for pack in packed(jobs, SlurmOptions(), None, "cuda")] == [13, 13, 14]
    four_gpus = SlurmOptions(gpus_per_node=4)
    (pack,) = packed(jobs, four_gpus, None, "cuda")
    assert len(pack) == 40
    lines = plan_lines(jobs, [pack], set(), set(), four_gpus, SweepFolder(tmp_path), "cuda")
    said = "40 to do in one Slurm job of 4 tasks, which share out 40, on 1 stream"
    assert any(line.startswith(said) for line in lines), lines
