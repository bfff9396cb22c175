"""From a command line or a preset to the jobs of a grid, their names and their packs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import small_config
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcsae.base.errors import SweepFailed, UserError
from tcsae.config import number_options, run_id
from tcsae.config.folder import conf_folder
from tcsae.config.launcher import Options, SlurmOptions, checked
from tcsae.launch.jobs import (
    GridJob,
    make_packs,
    names_of,
    read_pack,
    reading_once,
    stream_key,
    write_pack,
)
from tcsae.launch.launcher import _Numbers
from tcsae.launch.plan import packed
from tcsae.launch.sweep_folder import SweepFolder
from tcsae.launch.sweeper import GridSweeper


class Recorder:
    """A launcher that keeps the jobs it was given, and says which of them failed."""

    def __init__(self, failed: Sequence[int]) -> None:
        self.failed = failed
        self.jobs: list[list[str]] = []

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list[JobReturn]:
        self.jobs = jobs
        bad = [number in self.failed for number in range(len(jobs))]
        return [JobReturn(status=JobStatus.FAILED if b else JobStatus.COMPLETED) for b in bad]


@pytest.fixture
def sweep() -> Callable[..., list[list[str]]]:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import HydraContext

    number_options.install()
    loader = ConfigLoaderImpl(create_config_search_path(f"file://{conf_folder()}"))

    def run(
        arguments: list[str], params: Any = None, points: Any = None, failed: Sequence[int] = ()
    ) -> list[list[str]]:
        sweeper = GridSweeper(params, points)
        sweeper.context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore
        sweeper.launcher = Recorder(failed)
        sweeper.sweep(arguments)
        return sweeper.launcher.jobs

    return run


Sweep = Callable[..., list[list[str]]]


def test_a_grid_is_every_combination_of_the_lists(sweep: Sweep) -> None:
    jobs = sweep(["window=4,8", "lambda=0,0.1,0.2", "seed=1"])
    assert len(jobs) == 6
    assert jobs[0] == ["window=4", "lambda=0", "seed=1"]
    assert jobs[-1] == ["window=8", "lambda=0.2", "seed=1"]


def test_points_add_up_and_each_is_crossed_with_the_lists(sweep: Sweep) -> None:
    points = ["lambda=0", "window=4,8 lambda=0.1 consistency=scale_free,shuffled"]
    jobs = sweep([], {"seed": "0,1,2"}, points)
    assert len(jobs) == 3 * (1 + 4)
    assert ["seed=2", "window=8", "lambda=0.1", "consistency=shuffled"] in jobs


def test_the_command_line_wins_over_a_preset_and_no_job_comes_twice(sweep: Sweep) -> None:
    jobs = sweep(["seed=7", "lambda=0.3"], {"seed": "0,1,2"}, ["lambda=0", "lambda=1"])
    assert jobs == [["seed=7", "lambda=0.3"]]


def test_a_sweep_with_failed_jobs_raises_once_all_have_ended(sweep: Sweep) -> None:
    with pytest.raises(SweepFailed, match="2 of 3 jobs did not finish"):
        sweep(["lambda=0,0.1,0.2"], failed=[0, 2])


def test_an_interval_has_no_place_in_a_grid(sweep: Sweep) -> None:
    with pytest.raises(HydraException, match="does not support sweep type"):
        sweep(["lambda=interval(0,1)"])


def test_names_say_what_varies_and_the_seed_last() -> None:
    jobs = [
        ["seed=0", "window=4", "lambda=0", "model=other"],
        ["seed=1", "window=4", "lambda=0.1", "model=other", "+consistency=shuffled"],
    ]
    assert names_of(jobs) == ["lambda=0,seed=0", "lambda=0.1,consistency=shuffled,seed=1"]
    assert names_of([["lambda=0"]]) == ["job"]


# ------------------------------------------------------------------------------------- packs


@pytest.fixture
def job(tiny_gpt2: Path, texts: Path, tmp_path: Path) -> Callable[..., GridJob]:
    def build(number: int = 0, **changes: str) -> GridJob:
        config = small_config(tiny_gpt2, texts, **changes)
        return GridJob(number, f"job {number}", ("a=1",), config, tmp_path / str(number), {})

    return build


def test_jobs_share_a_stream_unless_model_layer_text_or_batch_differ(
    job: Callable[..., GridJob],
) -> None:
    one = stream_key(job().config)
    for same in ({"window": "8"}, {"lambda": "1"}, {"seed": "3"}, {"sae": "standard"}):
        assert stream_key(job(**same).config) == one, same
    for other in (
        {"layer": "0"},
        {"dataset__n_contexts": "40"},
        {"dataset__seed": "1"},
        {"training__batch_contexts": "4"},
        {"training__device": "cuda:1"},
        {"model__hook": "mlp_out"},
        {"store": "stream"},
    ):
        assert stream_key(job(**other).config) != one, other


@pytest.fixture(scope="module")
def packable(tiny_gpt2: Path, texts: Path) -> GridJob:
    return GridJob(0, "", (), small_config(tiny_gpt2, texts), Path("/none"), {})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(streams=st.lists(st.integers(0, 3), max_size=40), size=st.integers(1, 9))
def test_packs_hold_every_job_once_one_stream_each_and_no_more_than_allowed(
    streams: list[int], size: int, packable: GridJob
) -> None:
    configs = [packable.config.model_copy(update={"layer": layer}) for layer in range(4)]
    jobs = [replace(packable, number=i, config=configs[s]) for i, s in enumerate(streams)]
    packs = make_packs(jobs, lambda together: size)
    assert sorted(job.number for pack in packs for job in pack) == list(range(len(jobs)))
    for pack in packs:
        assert len({stream_key(job.config) for job in pack}) == 1
        assert len(pack) <= size
    for stream in set(streams):
        sizes = [len(pack) for pack in packs if pack[0].config.layer == stream]
        assert max(sizes) - min(sizes) <= 1  # nobody waits long for the others
        assert len(sizes) == -(-streams.count(stream) // size)


def test_automatic_packs_are_spread_over_the_processes(packable: GridJob) -> None:
    jobs = [replace(packable, number=i) for i in range(20)]
    auto = checked(Options, {})
    assert [len(p) for p in packed(jobs, auto, 4, "cpu")] == [5, 5, 5, 5]
    assert max(len(p) for p in packed(jobs, auto, 1, "cpu")) <= 16
    assert [len(p) for p in packed(jobs, checked(Options, {"pack": 8}), None, "cpu")] == [6, 7, 7]
    assert len(packed(jobs, checked(Options, {"pack": 1}), None, "cpu")) == 20


def test_packs_of_one_text_know_of_each_others_places(job: Callable[..., GridJob]) -> None:
    first, second = job(0, layer="0"), job(1, layer="1", model__hook="mlp_out")
    other_text, streamed = job(2, dataset__seed="1"), job(3, store="stream")
    asked = job(4, layer="1", store__also="[2]", dataset__seed="5")
    packs = reading_once([[first], [second], [other_text], [streamed], [asked]])
    also = [pack[0].config.store.also for pack in packs]
    assert also == [["1.mlp_out"], ["0.resid_post"], [], [], ["2"]]
    assert run_id(packs[0][0].config) == run_id(first.config)


def test_a_pack_comes_back_from_its_file_as_it_was(
    job: Callable[..., GridJob], tmp_path: Path
) -> None:
    pack = [replace(job(i, seed=str(i)), hydra_files={"config.yaml": "a: 1\n"}) for i in range(3)]
    write_pack(tmp_path / "pack.json", pack, tmp_path)
    assert read_pack(tmp_path / "pack.json") == pack


# ------------------------------------------------------------------------------- the folder


def test_a_folder_keeps_what_was_launched_into_it(
    job: Callable[..., GridJob], tmp_path: Path
) -> None:
    sweep = SweepFolder(tmp_path)
    jobs = [job(0), job(1, seed="1")]
    assert sweep.jobs() == []
    sweep.describe(jobs, "here", ["seed=0,1"])
    sweep.add_submission([jobs], ["12"])
    sweep.describe(jobs[1:], "slurm", ["seed=0,1"])
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert [s["packs"] for s in content["submissions"]] == [[{"jobs": [0, 1], "job_id": "12"}]]
    assert [entry["folder"] for entry in content["jobs"]] == ["0", "1"]
    sweep.describe([job(2, seed="2")], "here", ["seed=2"])
    assert [entry["number"] for entry in sweep.jobs()] == [0, 1, 2]


def test_a_job_has_the_number_that_it_had() -> None:
    before = [{"run_id": "a", "number": 0}, {"run_id": "b", "number": 3}]
    numbers = _Numbers(before, 0)
    assert [numbers.of(run) for run in ("b", "new", "a", "a")] == [3, 4, 0, 5]
    assert [_Numbers([], 7).of(run) for run in "x"] == [7]


def test_options_are_checked_in_one_line() -> None:
    assert checked(SlurmOptions, {"mem_gb": 4, "pack": 8}).mem_gb == 4
    with pytest.raises(UserError) as raised:
        checked(SlurmOptions, {"pack": 0, "timeout_min": 0, "partitoin": "gpu"})
    text = str(raised.value)
    for part in ("hydra.launcher.pack = 0", "hydra.launcher.timeout_min = 0", "partitoin"):
        assert part in text
    assert "\n" not in text
