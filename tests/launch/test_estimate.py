"""Costs of jobs and sweeps: what is shared is counted once, and what is on disk is what was said.

What the formulas stand on is in test_counted.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, environment, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.base.labels import size
from tcsae.base.signals import StopRequest
from tcsae.config import Config
from tcsae.config.compose import config_of
from tcsae.config.launcher import LocalOptions, Options, SlurmOptions
from tcsae.data.context_cache import load_or_build_contexts
from tcsae.data.devices import bfloat16_is_native
from tcsae.data.language_model import LanguageModel
from tcsae.data.store import ActivationStore
from tcsae.jobs.side_by_side import BYTES_A_FEATURE, HELPER_BYTES
from tcsae.launch.estimate import (
    Cost,
    Ranks,
    harvest_key,
    hours,
    job_cost,
    members_that_fit,
    span,
    sweep_cost,
)
from tcsae.launch.machine import MACHINES, Machine
from tcsae.launch.plan import _machine, cost_lines

A100, CPU = MACHINES["a100"], MACHINES["cpu"]
FLOAT32_CPU = Machine(1, 10, device="cpu", bfloat16=False)


@pytest.fixture
def job(tiny_gpt2: Path, texts: Path, tmp_path: Path) -> Callable[..., Config]:
    fixed = {"layer": "1", "store__dir": str(tmp_path / "store")}
    return lambda **changes: small_config(tiny_gpt2, texts, **fixed | changes)


@pytest.fixture
def gemma(job: Callable[..., Config]) -> Callable[..., Config]:
    """The job of a lab: Gemma-2-2b layer 19, 10 M tokens in contexts of 128."""
    fixed = {
        "model__name": "google/gemma-2-2b",
        "model__path": "null",
        "model__dtype": "auto",
        "layer": "19",
        "dataset__context_size": "128",
        "dataset__n_contexts": "78125",
        "dataset__n_eval_contexts": "1024",
        "training__tokens": "10_000_000",
        "training__batch_contexts": "32",
        "training__precision": "auto",
        "sae__d_sae": "2304",
    }
    return lambda **changes: job(**fixed | changes)


def cost_of(config: Config, machine: Machine = A100) -> Cost:
    cost = job_cost(config, machine)
    assert cost is not None
    return cost


def harvested_folder(config: Config) -> list[Path]:
    """The folders of the two stores of a job, harvested."""
    root = Path(config.store.dir)
    model = LanguageModel(config.model, config.layer)
    folders = []
    for contexts in load_or_build_contexts(config.dataset, model, root, StopRequest()):
        store = ActivationStore(root, model, contexts, config.store.shard_contexts)
        store.harvest(StopRequest())
        folders.append(store.folder)
    return folders


# ----------------------------------------------------------------------------------------- a job


def test_importing_it_does_not_load_torch() -> None:
    command = "import sys, tcsae.launch.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], env=environment()).returncode == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_takes_the_disk_that_was_said(dtype: str, job: Callable[..., Config]) -> None:
    config = job(model__dtype=dtype, dataset__context_size="32", store__shard_contexts="48")
    harvested_folder(config)
    files = [f for f in Path(config.store.dir).rglob("*.safetensors")]
    held = sum(f.stat().st_size for f in files)
    # The headers: about 400 bytes a file, which tell at this size.
    assert cost_of(config, FLOAT32_CPU).store_bytes == pytest.approx(held, rel=0.03)


def test_what_auto_means_depends_on_the_machine(job: Callable[..., Config]) -> None:
    config = job(model__dtype="auto")
    tokens = 56 * 16
    of_machine = [cost_of(config, m).store_bytes for m in (FLOAT32_CPU, A100)]
    assert of_machine == [tokens * (48 * 4 + 7), tokens * (48 * 2 + 7)]


def test_a_stream_takes_no_disk_and_runs_the_model_for_every_token_it_trains_on(
    job: Callable[..., Config],
) -> None:
    on_disk, streamed = cost_of(job()), cost_of(job(store="stream"))
    tokens, trained, held_out = 56 * 16, 12 * 8 * 16, 8 * 16
    assert [work.what for work in streamed.harvest] == ["pack the text"]
    assert streamed.harvest_tokens == 0 and streamed.store_bytes == 7 * tokens
    made, run = on_disk.harvest[1].flops + on_disk.harvest[1].float32_flops, streamed.stream[0]
    assert made / tokens == pytest.approx((run.flops + run.float32_flops) / (trained + held_out))


def test_training_twice_as_long_costs_twice_as_much(gemma: Callable[..., Config]) -> None:
    once, twice = cost_of(gemma()), cost_of(gemma(training__tokens="20_000_000"))
    assert hours(twice.train[:1], A100) == pytest.approx(2 * hours(once.train[:1], A100), rel=1e-3)
    assert twice.harvest == once.harvest and twice.evaluate == once.evaluate


def test_a_store_larger_than_memory_is_read_once_more(gemma: Callable[..., Config]) -> None:
    small, large = (
        cost_of(gemma(dataset__n_contexts=str(n), training__tokens=str(n * 128)))
        for n in (70_000, 3_906_250)
    )
    read = [sum(work.disk_bytes for work in cost.stream) for cost in (small, large)]
    on_disk = [cost.store_bytes - 7 * cost.harvest_tokens for cost in (small, large)]
    assert read[0] == on_disk[0]
    assert read[1] == pytest.approx(2 * on_disk[1], rel=1e-3)


def test_a_wider_sae_needs_more_of_everything(gemma: Callable[..., Config]) -> None:
    costs = [cost_of(gemma(sae__d_sae=str(d_sae))) for d_sae in (2304, 16384, 65536)]
    for what in ("run_bytes", "member_bytes", "device_bytes"):
        values = [getattr(cost, what) for cost in costs]
        assert values == sorted(set(values)), what
    assert len({cost.harvest for cost in costs}) == 1


def test_a_model_or_text_of_unknown_size_is_not_estimated(job: Callable[..., Config]) -> None:
    config = job(model__path="null")
    assert job_cost(config) is None
    endless = job().model_copy(
        update={"dataset": job().dataset.model_copy(update={"n_contexts": None, "source": "hub"})}
    )
    assert job_cost(endless) is None


# ------------------------------------------------------------------------------- shared stores

CHANGES: dict[str, dict[str, str]] = {
    "window": {"window": "8"},
    "lambda": {"lambda": "1"},
    "sae": {"sae": "standard"},
    "seed": {"seed": "1"},
    "training": {"training__tokens": "3072"},
    "norm filter": {"dataset__norm_filter": "5"},
    "masked ids": {"model__extra_masked_ids": "[5]"},
    "name of the text": {"dataset__name": "other"},
    "forward pass": {"model__forward_contexts": "2"},
    "the layer by name": {"layer": "middle"},
    "layer": {"layer": "2"},
    "hook": {"model__hook": "mlp_out"},
    "dtype": {"model__dtype": "bfloat16"},
    "contexts": {"dataset__n_contexts": "40"},
    "order": {"dataset__seed": "3"},
    "context size": {"dataset__context_size": "12"},
    "split": {"dataset__eval_fraction": "0.5"},
    "shards": {"store__shard_contexts": "4"},
    "bos": {"model__bos_id": "1"},
    "untrained": {"model__untrained": "true"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_jobs_have_one_harvest_key_if_they_read_one_store(
    name: str, job: Callable[..., Config], tmp_path: Path
) -> None:
    first, second = job(), job(**CHANGES[name])
    is_shared = harvested_folder(first) == harvested_folder(second)
    assert (harvest_key(first) == harvest_key(second)) == is_shared


def test_stores_in_two_places_are_two_harvests(job: Callable[..., Config], tmp_path: Path) -> None:
    assert harvest_key(job()) != harvest_key(job(store__dir=str(tmp_path / "elsewhere")))


# --------------------------------------------------------------------------------------- sweeps


@pytest.fixture
def grid(gemma: Callable[..., Config]) -> list[Config]:
    base = gemma()
    changes: list[dict[str, Any]] = [
        {"window": window, "lambda_": weight} for window in (4, 8) for weight in (0.0, 0.1)
    ]
    return [base.model_copy(update=change) for change in changes]


def alone(n: int) -> list[list[int]]:
    return [[index] for index in range(n)]


def test_a_sweep_costs_one_harvest_and_every_training(grid: list[Config]) -> None:
    costs = [cost_of(config) for config in grid]
    sweep = sweep_cost(grid, alone(4), A100)
    assert sweep.n_harvests == 1 and sweep.harvest_tokens == costs[0].harvest_tokens
    assert sweep.harvest_hours == pytest.approx(hours(costs[0].harvest, A100))
    trained = sum(hours(cost.train, A100) + hours(cost.stream, A100) for cost in costs)
    assert sweep.train_hours == pytest.approx(trained)
    evaluated = sum(hours(c.evaluate, A100) + hours(c.reference, A100) for c in costs)
    assert sweep.device_hours == pytest.approx(hours(costs[0].harvest, A100) + trained + evaluated)
    assert sweep.store_bytes == costs[0].store_bytes
    assert sweep.run_bytes == sum(cost.run_bytes for cost in costs)
    assert sweep.device_bytes == max(cost.device_bytes for cost in costs)


def test_a_pack_reads_the_store_once_and_holds_every_member(grid: list[Config]) -> None:
    costs = [cost_of(config) for config in grid]
    single, packed = sweep_cost(grid, alone(4), A100), sweep_cost(grid, [[0, 1, 2, 3]], A100)
    assert single.train_hours is not None and packed.train_hours is not None
    saved = 3 * hours(costs[0].stream, A100)
    assert single.train_hours - packed.train_hours == pytest.approx(saved)
    assert single.evaluate_hours is not None and packed.evaluate_hours is not None
    saved = 3 * hours(costs[0].reference, A100)
    assert single.evaluate_hours - packed.evaluate_hours == pytest.approx(saved)
    members = sum(cost.member_bytes for cost in costs)
    assert packed.device_bytes == max(cost.shared_bytes for cost in costs) + members
    assert packed.pack_hours == (pytest.approx(packed.device_hours),)


def test_every_process_waits_for_its_whole_harvest(grid: list[Config]) -> None:
    costs = [cost_of(config) for config in grid]
    sweep = sweep_cost(grid, [[0, 1, 2], [3]], A100)
    last = costs[3]
    stages = [last.harvest, last.stream, last.train, last.evaluate, last.reference]
    assert sweep.pack_hours[1] == pytest.approx(sum(hours(stage, A100) for stage in stages))
    assert sweep.pack_hours[0] > sweep.pack_hours[1]


def test_ranks_harvest_together_and_train_jobs_of_their_own(grid: list[Config]) -> None:
    costs = [cost_of(config) for config in grid]
    two = sweep_cost(grid, [[0, 1, 2, 3]], A100, ranks=Ranks(2))
    apart = sweep_cost(grid, [[0, 2], [1, 3]], A100)
    assert two.device_hours == pytest.approx(apart.device_hours)
    assert two.device_bytes == apart.device_bytes and two.host_bytes == apart.host_bytes
    saved = hours(costs[0].harvest, A100) / 2
    for ours, other in zip(two.pack_hours, apart.pack_hours, strict=True):
        assert ours == pytest.approx(other - saved)
    assert len(sweep_cost(grid, [[0, 1, 2, 3]], A100, ranks=Ranks(8)).pack_hours) == 4


def test_ranks_that_train_one_job_share_its_steps_and_not_its_evaluation(
    grid: list[Config],
) -> None:
    cost = cost_of(grid[0])
    alone_, four = (
        sweep_cost(grid[:1], alone(1), A100, ranks=ranks) for ranks in (Ranks(), Ranks(4, True))
    )
    assert four.device_hours == alone_.device_hours
    shared = sum(hours(stage, A100) for stage in (cost.harvest, cost.stream, cost.train)) / 4
    rest = sum(hours(stage, A100) for stage in (cost.evaluate, cost.reference))
    assert four.pack_hours == (pytest.approx(shared + rest),)


def test_what_is_in_the_store_costs_nothing(grid: list[Config]) -> None:
    sweep = sweep_cost(grid, alone(4), A100, lambda config: True)
    assert (sweep.n_harvests, sweep.harvest_hours, sweep.store_bytes) == (0, 0, 0)
    partly = [*grid, grid[0].model_copy(update={"layer": 5})]
    sweep = sweep_cost(partly, alone(5), A100, lambda config: config.layer == 5)
    assert sweep.n_harvests == 1
    assert sweep.harvest_hours == pytest.approx(hours(cost_of(grid[0]).harvest, A100))
    assert sweep.pack_hours[4] < min(sweep.pack_hours[:4])


def test_a_grid_over_layers_reads_the_text_once(grid: list[Config]) -> None:
    layers = [grid[0].model_copy(update={"layer": layer}) for layer in (9, 19, 14)]
    shallow, deepest, middle = (cost_of(config) for config in layers)
    sweep = sweep_cost(layers, alone(3), A100)
    assert sweep.n_harvests == 1 and sweep.harvest_tokens == deepest.harvest_tokens
    written = sum(hours(cost.harvest[-1:], A100) for cost in (shallow, middle))
    assert sweep.harvest_hours == pytest.approx(hours(deepest.harvest, A100) + written)
    assert sweep.store_bytes == sum(cost.store_bytes for cost in (shallow, deepest, middle))
    other_text = layers[0].model_copy(
        update={"dataset": layers[0].dataset.model_copy(update={"n_contexts": 7})}
    )
    assert sweep_cost([layers[1], other_text], alone(2), A100).n_harvests == 2


def test_a_world_costs_what_drawing_costs_and_no_language_model(tmp_path: Path) -> None:
    config = config_of("+experiment=synthetic_study", f"store.dir={tmp_path}", "sae=topk")
    cost, sweep = cost_of(config), sweep_cost([config] * 2, [[0, 1]], FLOAT32_CPU)
    (drawn,) = (work for work in cost.harvest if work.what == "draw the documents")
    contexts = config.dataset.n_contexts + config.dataset.n_eval_contexts
    assert 0.002 < drawn.host_seconds / contexts < 0.02  # 5.7 ms measured
    assert cost.reference == () and cost.shared_bytes < 1e9
    assert sweep.n_unknown == 0 and sweep.n_harvests == 1
    twice = config.model_copy(
        update={"dataset": config.dataset.model_copy(update={"n_contexts": 2 * 11904})}
    )
    assert hours(cost_of(twice).harvest, FLOAT32_CPU) > 1.9 * hours(cost.harvest, FLOAT32_CPU)
    truth = [work for work in cost.evaluate if work.what == "truth"]
    assert len(truth) == 1 and truth[0].host_seconds > 0


def test_unknown_jobs_are_named_and_left_out(
    grid: list[Config], job: Callable[..., Config]
) -> None:
    unknown = job(model__path="null")
    some = sweep_cost([*grid, unknown], alone(5), A100)
    assert some.n_unknown == 1
    assert some.device_hours == sweep_cost(grid, alone(4), A100).device_hours
    assert some.lines()[0].startswith("1 of 5 jobs are not estimated")
    none = sweep_cost([unknown], [[0]], A100)
    assert len(none.lines()) == 1


def test_the_lines_say_what_was_assumed_and_that_it_was_not_measured(grid: list[Config]) -> None:
    sweep = sweep_cost(grid, [[0, 1], [2, 3]], A100)
    first, about, assumed, disk, memory = sweep.lines()
    assert first == "1 harvest of 10.1 M tokens in all, if no store has them yet"
    assert f"about {span(sweep.device_hours)} of GPU time" in about
    assert "assumed 156 TFLOP/s and 1430 GB/s of memory, not measured" in assumed
    assert size(sweep.store_bytes) in disk and size(sweep.run_bytes) in disk
    assert f"finished {size(sweep.kept_bytes / 4)})" in disk
    assert 0 < sweep.kept_bytes < sweep.run_bytes
    assert size(sweep.device_bytes) in memory and size(sweep.host_bytes) in memory


def test_where_this_cpu_does_the_work_its_rates_are_tried(job: Callable[..., Config]) -> None:
    here, local = (_machine(options, "cpu") for options in (Options(), LocalOptions(processes=4)))
    assert here.tflops and here.bandwidth_gb_s and local.tflops and local.bandwidth_gb_s
    assert here.is_measured and here.bfloat16 == bfloat16_is_native("cpu")
    assert 0.005 < here.float32_tflops < 50 and 0.5 < here.bandwidth_gb_s < 2000
    left, right = torch.ones(1024, 1024), torch.ones(1024, 1024)
    taken = []
    for _ in range(20):
        begun = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - begun)
    by_hand = 2 * 1024**3 / sorted(taken)[10] / 1e12
    assert here.float32_tflops == pytest.approx(by_hand, rel=0.7)  # other work may begin or end
    for one, fourth in (
        (here.tflops, local.tflops),
        (here.bandwidth_gb_s, local.bandwidth_gb_s),
        (here.float32_tflops, local.float32_tflops),
    ):
        assert fourth == pytest.approx(one / 4)
    lines = cost_lines([job()], [[0]], Options(), "cpu")
    kind = "bfloat16" if here.bfloat16 else "float32"
    assert f"{here.tflops:.2g} TFLOP/s in {kind}" in lines[2] and "tried here" in lines[2]
    asked = cost_lines([job()], [[0]], Options(tflops=3, bandwidth_gb_s=40), "cpu")
    assert "assumed 3 TFLOP/s and 40 GB/s of memory, not measured" in asked[2]
    assert _machine(Options(), "cuda").tflops is None is _machine(SlurmOptions(), "cpu").tflops


def test_without_rates_there_are_no_hours(grid: list[Config]) -> None:
    sweep = sweep_cost(grid, alone(4), Machine(None, None))
    assert sweep.device_hours is None and sweep.pack_hours == ()
    assert sweep.lines()[1].startswith("hours: not estimated")
    assert sweep.store_bytes == sweep_cost(grid, alone(4), A100).store_bytes


def test_on_a_cpu_the_host_holds_everything(grid: list[Config]) -> None:
    sweep = sweep_cost(grid, [[0, 1, 2, 3]], CPU)
    assert sweep.host_bytes > sweep.device_bytes
    assert "device" not in sweep.lines()[-1]


def test_jobs_that_are_measured_at_the_same_time_take_more(grid: list[Config]) -> None:
    quick, whole = (
        [
            config.model_copy(
                update={"evaluation": config.evaluation.model_copy(update={"analysis": analysis})}
            )
            for config in grid
        ]
        for analysis in (False, True)
    )
    each = BYTES_A_FEATURE * grid[0].sae.d_sae
    two, alone = (replace(CPU, cores=cores) for cores in (2, 1))
    assert sweep_cost(whole, [[0, 1, 2, 3]], two).beside_bytes == (each, 2 * HELPER_BYTES)
    assert sweep_cost(whole, [[0], [1], [2], [3]], two).beside_bytes == (0, 0)
    assert sweep_cost(whole, [[0, 1, 2, 3]], alone).beside_bytes == (0, 0)
    said = sweep_cost(whole, [[0, 1, 2, 3]], two).lines()[-1]
    assert f"; up to {size(each + 2 * HELPER_BYTES)} more while several jobs are measured" in said
    on_gpu = sweep_cost(whole, [[0, 1, 2, 3]], A100)  # cores not known: as many as ever
    assert on_gpu.beside_bytes == (3 * each, 4 * HELPER_BYTES)
    assert f"device {size(3 * each)}, host {size(4 * HELPER_BYTES)} more" in on_gpu.lines()[-1]
    assert sweep_cost(quick, [[0, 1, 2, 3]], two).beside_bytes == (each, 0)


@settings(max_examples=30, deadline=None)
@given(device_gb=st.floats(1, 200), d_sae=st.sampled_from([2304, 16384, 65536]))
def test_as_many_members_fit_as_the_memory_holds(
    device_gb: float, d_sae: int, gemma_base: Config
) -> None:
    sae = gemma_base.sae.model_copy(update={"d_sae": d_sae})
    config = gemma_base.model_copy(update={"sae": sae})
    cost = cost_of(config)
    n = members_that_fit(config, device_gb)
    assert n >= 1
    assert n == 1 or cost.shared_bytes + n * cost.member_bytes <= device_gb * 1e9
    assert cost.shared_bytes + (n + 1) * cost.member_bytes > device_gb * 1e9


@pytest.fixture(scope="module")
def gemma_base(tiny_gpt2: Path, texts: Path) -> Config:
    changes = {"model__name": "google/gemma-2-2b", "model__path": "null", "layer": "19"}
    return small_config(tiny_gpt2, texts, **changes)


def test_one_member_fits_where_nothing_is_known(job: Callable[..., Config]) -> None:
    assert members_that_fit(job(model__path="null"), 80) == 1


def test_on_a_cpu_fewer_members_fit_than_on_a_gpu_of_that_size(gemma_base: Config) -> None:
    assert members_that_fit(gemma_base, 16, CPU) < members_that_fit(gemma_base, 16)


# ------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [(0, "0 MB"), (7_800_000, "7.8 MB"), (4.56e10, "45.6 GB"), (1.234e12, "1.23 TB")],
)
def test_sizes_read_well(n_bytes: float, words: str) -> None:
    assert size(n_bytes) == words


@pytest.mark.parametrize(
    ("n_hours", "words"),
    [
        (None, "0"),
        (0, "0"),
        (0.01, "<1 min"),
        (0.0719, "4.3 min"),
        (0.2, "12 min"),
        (1.96, "2 h"),
        (12.3, "12 h"),
        (1234.5, "1,234 h"),
    ],
)
def test_times_have_no_more_digits_than_an_estimate_has(n_hours: float | None, words: str) -> None:
    assert span(n_hours) == words


@pytest.mark.slow
def test_the_tables_of_the_document_are_what_the_script_prints() -> None:
    script = REPOSITORY / "scripts" / "scaling.py"
    printed = subprocess.run(
        [sys.executable, str(script)], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    document = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    tables = [table.strip() for table in printed.split("\n\n") if table.startswith("|")]
    assert len(tables) >= 5
    for table in tables:
        assert table in document, "run scripts/scaling.py and put its tables into docs/scaling.md"
    n_rows = sum(line.startswith("|") for line in document.splitlines())
    assert n_rows == sum(table.count("\n") + 1 for table in tables)
