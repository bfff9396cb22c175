"""The cost of a job as counted beforehand, against operations, bytes and tensors of real ones.

Tolerances: products are counted exactly, but for the few of rank one. Bytes and memory are fitted
in whole passes over the large tensors, and the small ones are left out: 15 % at these sizes, less
at real ones. Language models differ in what they do beside their products: a factor of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config
from launch.traffic import BAGS, Traffic, size_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tcsae.config import Config
from tcsae.config.sae import architectures
from tcsae.data import batches
from tcsae.data.batches import Batch, Calibration
from tcsae.data.language_model import LanguageModel
from tcsae.launch import counted, estimate
from tcsae.launch.counted import Machine, Sizes, sizes
from tcsae.launch.model_facts import ModelFacts, model_facts
from tcsae.measure import analysis_pass, evaluation
from tcsae.metrics.reconstruction import ReconstructionMetrics, next_token_ce, score_forward
from tcsae.metrics.suite import ConsistencySuite
from tcsae.sae import fast, sae_class
from tcsae.training.checkpoint import save_checkpoint
from tcsae.training.member import Member

CPU = Machine(1, 1, device="cpu")
D, B, T, F = 64, 16, 32, 1024
N = B * T
FACTS = ModelFacts(1, D, 1, 1, 1, 1, 1)


Step = Callable[..., Any]


@pytest.fixture
def job(tiny_llama: Path, texts: Path) -> Callable[..., Config]:
    """A job with steps of N tokens on inputs of width D (the model beneath is not run)."""
    fixed = {
        "training__batch_contexts": str(B),
        "dataset__context_size": str(T),
        "sae__d_sae": str(F),
        "lambda": "0.1",
        "training__lambda_warmup": "0",
    }
    return lambda **changes: small_config(tiny_llama, texts, **fixed | changes)


def member_and_step(
    config: Config, n_dead: int = 0, log: bool = False, width: int = D
) -> tuple[Member, Step]:
    """A member after its first steps, and the next one."""
    generator = torch.Generator().manual_seed(0)
    contexts = config.training.batch_contexts
    x = torch.randn(contexts, T, width, generator=generator)
    valid = torch.rand(contexts, T, generator=generator) > 0.01
    segments = torch.zeros(contexts, T, dtype=torch.int32)
    batch = Batch(x, segments, segments, valid, valid)
    in_bfloat16 = config.training.precision == "bfloat16"
    calibration = Calibration(width**0.5, 1e9, 0.0, x[valid])
    member = Member(config, width, calibration, "cpu", in_bfloat16)
    for _ in range(2):
        member.train_step(batch, x, log=False)
    member.tokens_since_fired.zero_()[:n_dead] = config.sae.dead_after_tokens
    return member, partial(member.train_step, batch, x, log=log)


JOBS: dict[str, dict[str, str]] = {
    "standard": {"sae": "standard"},
    "standard, bfloat16": {"sae": "standard", "training__precision": "bfloat16"},
    "standard, literal loss": {"sae": "standard", "consistency": "window_variance"},
    "standard, no loss": {"sae": "standard", "consistency": "none"},
    "topk, dense": {"sae__k": "100"},
    "topk, dense, bfloat16": {"sae__k": "100", "training__precision": "bfloat16"},
    "topk, sparse": {"sae__k": "16"},
    "topk, sparse, bfloat16": {"sae__k": "16", "training__precision": "bfloat16"},
    "topk, sparse, no loss": {"sae__k": "16", "lambda": "0"},
    "topk, sparse, many entries": {"sae__k": "64"},
    "batchtopk": {"sae": "batchtopk", "sae__k": "16"},
    "batchtopk, bfloat16": {"sae": "batchtopk", "sae__k": "16", "training__precision": "bfloat16"},
}


def z_of(config: Config) -> Sizes:
    return sizes(config, FACTS, CPU)


# --------------------------------------------------------------------------------- language model


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama"])
def test_products_of_a_harvest_are_those_of_the_model(
    kind: str, layer: int, texts: Path, request: pytest.FixtureRequest
) -> None:
    cfg = small_config(request.getfixturevalue(f"tiny_{kind}"), texts).model
    facts, model = model_facts(cfg), LanguageModel(cfg, layer)
    ids = torch.randint(3, 300, (4, 16))
    assert facts is not None and facts.d_model == model.d_in
    # The counter knows attention by its products only.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.activations(ids)
    assert counted.forward_flops(facts, layer + 1, 16) * ids.numel() == counter.get_total_flops()


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama"])
def test_bytes_and_kernels_of_a_block_are_right_within_a_factor_of_two(
    kind: str, texts: Path, request: pytest.FixtureRequest
) -> None:
    cfg = small_config(request.getfixturevalue(f"tiny_{kind}"), texts).model
    facts, ids, seen = model_facts(cfg), torch.randint(3, 300, (4, 64)), []
    assert facts is not None
    for layer in (0, 1):
        model = LanguageModel(cfg, layer)
        model.activations(ids)
        with Traffic() as traffic:
            model.activations(ids)
        seen.append(traffic)
    expected = counted.forward_bytes(facts, 1, 64, 4) * ids.numel()
    assert 0.5 < expected / (seen[1].bytes - seen[0].bytes) < 2
    assert 0.5 < counted.BLOCK_KERNELS / (seen[1].kernels - seen[0].kernels) < 2


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", JOBS)
def test_products_of_a_training_step_are_those_it_makes(
    name: str, job: Callable[..., Config]
) -> None:
    config = job(**JOBS[name])
    _, step = member_and_step(config)
    with FlopCounterMode(display=False, custom_mapping=BAGS) as counter:
        step()
    expected = counted.step_flops(config, z_of(config), dead_share=0)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("n_dead", [64, 512])
def test_auxk_costs_five_products_with_the_dead_features(
    n_dead: int, job: Callable[..., Config]
) -> None:
    config = job(sae__k="16")
    _, step = member_and_step(config, n_dead)
    with FlopCounterMode(display=False, custom_mapping=BAGS) as counter:
        step()
    expected = counted.step_flops(config, z_of(config), dead_share=n_dead / F)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", JOBS)
def test_bytes_and_kernels_of_a_training_step_are_those_it_moves(
    name: str, job: Callable[..., Config]
) -> None:
    config = job(**JOBS[name])
    _, step = member_and_step(config)
    with Traffic() as traffic:
        step()
    z = z_of(config)
    expected = sum(counted.step_bytes(config, z, dead_share=0))
    assert expected == pytest.approx(traffic.bytes, rel=0.15)
    kernels = counted.STEP_KERNELS + z.penalty[1]
    assert kernels == pytest.approx(traffic.kernels, rel=0.25)


@pytest.mark.parametrize("name", ["standard", "topk, sparse", "topk, sparse, bfloat16"])
def test_bytes_of_a_step_on_few_tokens_are_mostly_those_of_the_weights(
    name: str, job: Callable[..., Config]
) -> None:
    config = job(**JOBS[name] | {"training__batch_contexts": "1", "consistency": "none"})
    _, step = member_and_step(config, width=256)
    with Traffic() as traffic:
        step()
    z = sizes(config, dataclasses.replace(FACTS, d_model=256), CPU)
    activations, weights = counted.step_bytes(config, z, dead_share=0)
    assert weights > 0.75 * traffic.bytes
    assert activations + weights == pytest.approx(traffic.bytes, rel=0.15)


def test_logging_a_step_moves_what_is_counted_for_it(job: Callable[..., Config]) -> None:
    config = job(sae="standard")
    seen = []
    for log in (False, True):
        _, step = member_and_step(config, log=log)
        with Traffic() as traffic:
            step()
        seen.append(traffic)
    expected = counted.LOGGED_PASSES * N * (F + D)
    assert expected == pytest.approx(seen[1].bytes - seen[0].bytes, rel=0.15)
    more = seen[1].kernels - seen[0].kernels
    assert more == pytest.approx(counted.LOGGED_KERNELS, rel=0.15)


@pytest.mark.parametrize("name", [*JOBS, "standard, averaged", "standard, history"])
def test_memory_of_a_member_is_that_of_its_tensors(name: str, job: Callable[..., Config]) -> None:
    more = {
        "standard, averaged": {"sae": "standard", "training__ema_decay": "0.9"},
        "standard, history": {"sae": "standard", "consistency": "batch_history", "window": "8"},
    }
    config = job(**(JOBS | more)[name])
    member, step = member_and_step(config)
    step()
    tensors = [*member.sae.state_dict().values(), *member.consistency.state_dict().values()]
    tensors += [p.grad for p in member.sae.parameters() if p.grad is not None]
    tensors += [v for state in member.optimizer.state.values() for v in state.values()]
    tensors += [] if member.average is None else [*member.average.state_dict().values()]
    tensors += [member.tokens_since_fired, member.tokens_seen]
    held = sum(size_of(x) for x in tensors)
    # What is left is the random state, which a checkpoint has and a device has not.
    assert counted.member_bytes(config, z_of(config)) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_has_the_parameters_counted_for_it(name: str) -> None:
    chosen = sae_class(name)
    config = chosen.config_class.model_validate({"architecture": name, "d_sae": F})
    sae = chosen(config, D)
    held = sum(p.numel() for p in sae.parameters())
    assert counted.parameters(config, D) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("name", ["standard", "topk, sparse"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_logged_step_needs_the_workspace_counted_for_it(
    name: str, precision: str, job: Callable[..., Config]
) -> None:
    config = job(**JOBS[name] | {"training__precision": precision})
    member, step = member_and_step(config, log=True)
    with Traffic() as traffic:
        step()
    gradients = 4 * sum(p.numel() for p in member.sae.parameters())
    # Above what was allocated: raw and scaled inputs, and casts of the weights.
    assert 0.95 < counted.step_workspace(z_of(config)) / (traffic.peak - gradients) < 1.25


def test_a_checkpoint_has_the_size_counted_for_it(
    job: Callable[..., Config], tmp_path: Path
) -> None:
    for changes in ({}, {"training__ema_decay": "0.9"}):
        config = job(**changes)
        member, _ = member_and_step(config)
        path = save_checkpoint(tmp_path, member.checkpoint({"seconds": 1.0}))
        expected = counted.checkpoint_bytes(config, z_of(config))
        assert expected == pytest.approx(path.stat().st_size, rel=0.01)


# ------------------------------------------------------------------------------------- evaluation


SUITE: dict[str, str] = {
    "sae__d_sae": "128",
    "evaluation__max_lag": "8",
    "evaluation__bootstrap": "100",
    "dataset__context_size": str(T),
}
CONTEXTS = 96


def _work(config: Config, what: str) -> counted.Work:
    z = z_of(config)
    works = counted.evaluate_stage(config, FACTS, z, CONTEXTS)
    return next(work for work in works if work.what == what)


@pytest.fixture
def measured(job: Callable[..., Config]) -> tuple[Config, ConsistencySuite, Traffic]:
    """A suite that has seen 96 contexts, and the traffic of all that the last 16 went through."""
    config = job(**SUITE)
    made = ConsistencySuite(128, T, max_lag=8, n_boot=config.evaluation.bootstrap)
    reconstruction = ReconstructionMetrics(D, 128)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CONTEXTS, T, D, generator=generator)
    sae = sae_class("topk")(config.sae, D)
    with torch.inference_mode():
        for contexts in x.split(evaluation.ENCODE_CONTEXTS):
            valid = torch.ones(contexts.shape[:2], dtype=torch.bool)
            with Traffic() as traffic:
                f = sae.encode(contexts)
                reconstruction.update(contexts, sae.decode(f), f, valid=valid)
                made.update(f, inputs=contexts)
    return config, made, traffic


def test_measuring_features_moves_what_is_counted_for_it(
    measured: tuple[Config, ConsistencySuite, Traffic],
) -> None:
    config, _, traffic = measured
    batches = CONTEXTS / evaluation.ENCODE_CONTEXTS
    # At a d_sae of 128 the inputs, which are left out, are a good part.
    assert 0.7 < _work(config, "features").bytes / batches / traffic.bytes < 1.1
    assert 0.7 < _work(config, "features").kernels / batches / traffic.kernels < 1.4


def test_the_bootstrap_moves_and_holds_what_is_counted_for_it(
    measured: tuple[Config, ConsistencySuite, Traffic],
) -> None:
    config, made, _ = measured
    states = [v for part in made._accumulators() for v in part._state.values()]
    held = sum(size_of(v) for v in states if v.ndim and v.shape[-1] in (128, T))
    assert counted.suite_bytes(z_of(config), 8, config.evaluation.windows) == pytest.approx(
        held, rel=0.05
    )
    with Traffic() as draws:
        made.draws()
    assert 0.7 < _work(config, "bootstrap").bytes / draws.bytes < 1.3
    assert 0.7 < _work(config, "bootstrap").kernels / draws.kernels < 1.3
    assert 0.5 < (1.6 - 1) * held / draws.peak < 1.5


def test_scoring_logits_moves_what_is_counted_for_it(job: Callable[..., Config]) -> None:
    vocabulary, config = 4000, job(**SUITE, evaluation__model_contexts="2")
    logits = [torch.randn(2, T, vocabulary).bfloat16() for _ in range(3)]
    tokens, keep = torch.randint(0, vocabulary, (2, T)), torch.ones(2, T, dtype=torch.bool)
    with Traffic() as alone:
        next_token_ce(logits[0], tokens, keep)
        score_forward(logits[0], logits[1], tokens, keep)
    with Traffic() as spliced:
        score_forward(logits[0], logits[2], tokens, keep)
    facts = ModelFacts(1, D, 1, 1, 1, 1, vocabulary)
    for stage, what, traffic in (
        (counted.reference_stage, "logits alone", alone),
        (counted.evaluate_stage, "logits", spliced),
    ):
        works = stage(config, facts, z_of(config), CONTEXTS)
        expected = next(work.bytes for work in works if work.what == what)
        assert expected == pytest.approx(traffic.bytes, rel=0.15)


def test_a_wide_sae_is_analysed_pair_by_pair(job: Callable[..., Config]) -> None:
    def seconds(d_sae: int) -> float:
        config = job(**SUITE | {"sae__d_sae": str(d_sae), "evaluation__analysis": "true"})
        return _work(config, "analysis").host_seconds

    pairs = counted.PAIR_SECONDS * 5462**2
    assert seconds(5461) == seconds(1024)
    assert seconds(5462) - seconds(5461) == pytest.approx(17 * pairs)
    assert seconds(131072) - seconds(5461) == pytest.approx(counted.PAIR_SECONDS * 131072**2)


# ------------------------------------------------------------------------------------------- rest


def test_numbers_that_stand_here_too_are_those_of_the_code() -> None:
    assert counted.SPARSE_FROM_RATIO == fast.SPARSE_FROM_RATIO
    assert counted.LOGITS == evaluation._LOGITS
    assert counted.ENCODE_CONTEXTS == evaluation.ENCODE_CONTEXTS
    assert counted.DENSE_PAIRS == analysis_pass.DENSE_ENTRIES
    assert counted.SPARSE_PAIRS == analysis_pass.SPARSE_ENTRIES
    assert counted.CLOSE_FEATURES == analysis_pass.CLOSE_FEATURES
    assert ConsistencySuite(4, 8).n_blocks == counted.G
    assert estimate.CALIBRATION_CONTEXTS == batches.CALIBRATION_CONTEXTS


def test_the_slowest_rate_decides_on_the_device_and_the_disk_comes_on_top() -> None:
    machine = Machine(2, 100, disk_gb_s=0.5, hash_gb_s=1.0, launch_us=5)
    assert counted.Work("", flops=4e12, bytes=1e11, kernels=1e5).seconds(machine) == 2
    assert counted.Work("", flops=1e12, bytes=3e11, kernels=1e5).seconds(machine) == 3
    assert counted.Work("", flops=1e12, bytes=1e11, kernels=8e5).seconds(machine) == 4
    assert counted.Work("", float32_flops=2e12).seconds(machine) == 11
    assert counted.Work("", disk_bytes=1e9, hash_bytes=1e9, host_seconds=4).seconds(machine) == 7
