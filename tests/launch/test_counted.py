"""What is counted without values, against what a real step does, and for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import small_config

from tcsae.config import Config
from tcsae.config.sae import architectures
from tcsae.data.batches import Batch, Calibration
from tcsae.launch import counted
from tcsae.launch.counting import Counting
from tcsae.launch.machine import Machine, Work
from tcsae.metrics.suite import ConsistencySuite
from tcsae.sae import sae_class
from tcsae.training.checkpoint import save_checkpoint
from tcsae.training.member import Member

D, B, T, F = 64, 16, 32, 1024


@pytest.fixture
def job(tiny_llama: Path, texts: Path) -> Callable[..., Config]:
    """A job with steps of B x T tokens on inputs of width D (the model beneath is not run)."""
    fixed = {
        "training__batch_contexts": str(B),
        "dataset__context_size": str(T),
        "sae__d_sae": str(F),
        "lambda": "0.1",
        "training__lambda_warmup": "0",
    }
    return lambda **changes: small_config(tiny_llama, texts, **fixed | changes)


def real_step(config: Config) -> tuple[Counting, Member]:
    """The second step of a member on a CPU, counted as it runs."""
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
    valid, ids = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.int32)
    batch = Batch(x, ids, ids, valid, valid)
    member = Member(config, D, Calibration(D**0.5, 1e9, 0.0, x.flatten(0, 1)), "cpu", False)
    member.train_step(batch, x, log=False)
    with Counting(on_meta=False) as counting:
        member.train_step(batch, x, log=False)
    return counting, member


DENSE: dict[str, dict[str, str]] = {
    "standard": {"sae": "standard"},
    "literal loss": {"sae": "standard", "consistency": "window_variance"},
    "no loss": {"sae": "standard", "consistency": "none"},
    "gated": {"sae": "gated"},
    "topk": {"sae__k": "100"},
}


@pytest.mark.parametrize("name", DENSE)
def test_a_step_without_values_does_what_a_real_one_does(
    name: str, job: Callable[..., Config]
) -> None:
    config = job(**DENSE[name])
    real, _ = real_step(config)
    step = counted.training_of(config, D, False, True).step
    assert step.float32_flops == pytest.approx(real.float32_flops, rel=0.02)
    # On a CPU the passes over memory are written out in another way.
    assert 0.7 < step.bytes / real.bytes < 1.3


@pytest.mark.parametrize("sae", ["topk", "batchtopk"])
def test_the_sparse_route_of_a_cpu_is_counted_by_its_rule(
    sae: str, job: Callable[..., Config]
) -> None:
    config = job(sae=sae, sae__k="16", sae__revival="none")
    real, _ = real_step(config)
    here, on_gpu = (counted.training_of(config, D, False, cpu).step for cpu in (True, False))
    encoder = 2.0 * B * T * D * F
    entries = 4 * 2.0 * B * T * D * 16
    assert encoder < here.float32_flops < 1.2 * (encoder + entries)
    assert on_gpu.float32_flops > 4 * encoder
    # A real one sorts its entries, and the counter knows no products of looked-up rows.
    assert 0.5 < here.bytes / real.bytes < 1.5


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_is_counted_by_its_own_code(
    name: str, job: Callable[..., Config]
) -> None:
    config = job(sae=name)
    training = counted.training_of(config, D, True, False)
    sae = sae_class(name)(config.sae, D)
    held = 16 * sum(p.numel() for p in sae.parameters())
    assert training.held == pytest.approx(held, rel=0.05)
    assert training.step.flops >= 4.0 * B * T * D * F and training.logged.bytes > 0


def test_products_in_bfloat16_are_counted_apart_and_move_less(job: Callable[..., Config]) -> None:
    config = job(sae="standard", consistency="none")
    short, long = (counted.training_of(config, D, bf16, False).step for bf16 in (True, False))
    # Five products, and the sums over tokens of codes and of their gradient, by ones.
    assert short.flops == (10.0 * D + 4) * B * T * F and long.flops == 0
    assert short.bytes < long.bytes


def test_the_bootstrap_holds_what_is_counted_for_it_at_any_width(
    job: Callable[..., Config],
) -> None:
    config = job(evaluation__max_lag="8", evaluation__bootstrap="100", sae__d_sae="512")
    with Counting(on_meta=False) as real, torch.no_grad():
        suite = ConsistencySuite(512, T, max_lag=8, n_boot=100)
        for _ in range(4):
            suite.update(torch.rand(16, T, 512))
        real.restart()
        suite.draws()
    workspace = counted.evaluation_of(config, D, 400, False).workspace
    assert 0.85 < workspace / real.peak < 1.25


def test_counting_leaves_nothing_without_values_behind(job: Callable[..., Config]) -> None:
    """A sweep counts what its jobs cost in the process that then runs them."""
    config = job(evaluation__max_lag="8", evaluation__bootstrap="137", sae__d_sae="512")
    counted.evaluation_of(config, D, 400, False)
    suite = ConsistencySuite(64, T, max_lag=8, n_boot=137)
    suite.update(torch.rand(64, T, 64))
    assert suite.draws()["rho_1"].device.type == "cpu"
    assert suite.summary()["metrics"]["rho_1"]["energy_weighted_interval"][0] is not None


def test_a_checkpoint_has_the_size_counted_for_it(
    job: Callable[..., Config], tmp_path: Path
) -> None:
    config = job()
    _, member = real_step(config)
    path = save_checkpoint(tmp_path, member.checkpoint({"seconds": 1.0}))
    size = counted.training_of(config, D, False, True).checkpoint
    assert size == pytest.approx(path.stat().st_size, rel=0.01)


def test_the_device_has_its_products_bytes_and_launches_and_the_disk_comes_on_top() -> None:
    machine = Machine(2, 100, disk_gb_s=0.5, hash_gb_s=1.0, launch_us=5)
    assert Work("", flops=4e12, bytes=1e11, kernels=1e5).seconds(machine) == 3
    assert Work("", flops=1e12, bytes=1e11, kernels=8e5).seconds(machine) == 4
    assert Work("", float32_flops=2e12).seconds(machine) == 11
    assert Work("", disk_bytes=1e9, hash_bytes=1e9, host_seconds=4).seconds(machine) == 7
