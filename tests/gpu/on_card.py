"""What only a GPU can show. `make test-gpu`; without a card every test here fails, loudly.

Runs on a bare machine too: torch, Triton, pytest and what tcsae's configuration needs, no hub.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "products"), str(Path(__file__).parents[2])]

import kernel_cases as cases

from tcsae.config.compose import config_of
from tcsae.data.batches import Batch, Calibration
from tcsae.products import choose
from tcsae.training.checkpoint import Checkpoint
from tcsae.training.member import Member

D_IN, POSITIONS, CONTEXTS = 256, 128, 8
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "tsae", "persistent")


@pytest.fixture(autouse=True)
def a_card() -> Iterator[None]:
    assert torch.cuda.is_available(), "these tests need a GPU that torch sees: there is none"
    yield
    choose("auto", "cuda")


@pytest.fixture(scope="module")
def triton() -> Any:
    from tcsae.products.triton_gpu import Triton

    return Triton()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_sae", [4096, 16384, 65536])
def test_sums_of_rows(triton: Any, d_sae: int, dtype: torch.dtype) -> None:
    n = 4096 if d_sae == 16384 else 1024
    cases.check_rows(triton, "cuda", n=n, d_sae=d_sae, k=32, width=2304, dtype=dtype)


@pytest.mark.parametrize("width", [2304, 5000])
def test_the_error_of_a_reconstruction(triton: Any, width: int) -> None:
    cases.check_error(triton, "cuda", n=4096, width=width)


@pytest.mark.parametrize("positions", [128, 100, 1024])
def test_the_primitives_of_the_temporal_loss(triton: Any, positions: int) -> None:
    contexts = 2048 // positions
    cases.check_penalty(triton, "cuda", contexts=contexts, positions=positions, d_sae=4096, k=32)


def test_the_temporal_loss_in_every_form(triton: Any) -> None:
    cases.check_whole_penalty(triton, "cuda", contexts=8, positions=128, d_sae=1024, k=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_sae", "k"), [(4608, 32), (16384, 64), (65536, 32), (65536, 100)])
def test_selection(triton: Any, d_sae: int, k: int, dtype: torch.dtype) -> None:
    cases.check_selection(triton, "cuda", n=512, d_sae=d_sae, k=k, dtype=dtype)


@pytest.mark.parametrize("width", [2304, 4096, 5000])
def test_the_update_of_the_decoder(triton: Any, width: int) -> None:
    cases.check_update(triton, "cuda", d_sae=4096, width=width)


# ------------------------------------------------------------------ whole steps


def batches(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        shape = (CONTEXTS, POSITIONS)
        x = torch.randn(*shape, D_IN, generator=generator)
        x += 2 * torch.randn(CONTEXTS, 1, D_IN, generator=generator)
        valid = torch.rand(shape, generator=generator) > 0.02
        segments = (torch.rand(shape, generator=generator) < 0.01).cumsum(1)
        tokens = torch.zeros(shape, dtype=torch.long)
        found.append(Batch(*(t.cuda() for t in (x, tokens, segments, valid, valid))))
    return found


def member(name: str, products: str, *more: str, autocast: bool = False) -> Member:
    assert choose(products, "cuda") == products
    per_step = CONTEXTS * POSITIONS
    given = [f"sae={name}", f"training.products={products}", "window=8", "lambda=1"]
    given += [f"training.tokens={40 * per_step}", f"sae.dead_after_tokens={4 * per_step}", *more]
    given += ["sae.d_sae=8192"] if name == "standard" else ["sae.d_sae=8192", "sae.k=16"]
    sample = torch.cat([b.x[b.valid] for b in batches(2)]).cpu()
    calibration = Calibration(sample.norm(dim=-1).median().item(), float("inf"), 0.0, sample)
    torch.manual_seed(0)
    return Member(config_of(*given), D_IN, calibration, "cuda", autocast)


def train(of: Member, data: list[Batch], start: int = 0) -> dict[str, torch.Tensor]:
    for step in range(start, start + 12):
        batch = data[step % len(data)]
        of.train_step(batch, batch.x * of.scale, log=False)
    return {name: value.clone() for name, value in of.sae.state_dict().items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_with_kernels_is_a_step_without(name: str) -> None:
    data, found = batches(3), []
    for products in ("triton", "plain"):
        of = member(name, products)
        for step in range(3):
            of.train_step(data[step], data[step].x * of.scale, log=False)
        found.append((of.last_loss.item(), dict(of.sae.named_parameters())))
    (loss, ours), (wanted_loss, wanted) = found
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    for key, value in wanted.items():
        # Adam makes a step of size lr of a gradient that is nothing but rounding.
        close = torch.isclose(ours[key], value, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, key


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("products", ["triton", "plain"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "standard", "tfa"])
def test_a_run_and_its_resumption_repeat_to_the_bit(
    name: str, products: str, autocast: bool, tmp_path: Path
) -> None:
    if name == "tfa" and products == "triton":
        return  # has no sparse codes
    data = batches(3)
    make: Callable[[], Member] = lambda: member(name, products, autocast=autocast)  # noqa: E731
    once, again = make(), make()
    train(once, data)
    kept = once.checkpoint({})
    kept = Checkpoint(kept.step, {k: v.cpu().clone() for k, v in kept.tensors.items()}, kept.facts)
    whole = train(once, data, 12)
    train(again, data)
    repeated = train(again, data, 12)
    resumed = make()
    resumed.restore(kept)
    after = train(resumed, data, 12)
    for key, value in whole.items():
        assert torch.equal(value, repeated[key]), f"repeated: {key}"
        assert torch.equal(value, after[key]), f"resumed: {key}"


@pytest.mark.parametrize("products", ["triton", "plain"])
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_the_host_never_waits(name: str, products: str) -> None:
    of = member(name, products, f"sae.dead_after_tokens={10**9}", autocast=True)
    data = batches(2)
    of.train_step(data[0], data[0].x * of.scale, log=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            of.train_step(data[step % 2], data[step % 2].x * of.scale, log=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(of.last_loss)


def test_memory_of_a_wide_dictionary() -> None:
    """d_sae 65,536, d_in 2,304, 16,384 tokens a step: under 20 GB."""
    torch.cuda.empty_cache()
    choose("triton", "cuda")
    given = ["sae=topk", "sae.d_sae=65536", "sae.k=32", "lambda=1", "window=8"]
    given += ["training.tokens=100000000", "training.batch_contexts=128"]
    x = torch.randn(128, 128, 2304, device="cuda")
    ones = torch.ones(128, 128, dtype=torch.bool, device="cuda")
    batch = Batch(x, ones.long(), torch.zeros_like(ones, dtype=torch.long), ones, ones)
    before = torch.cuda.memory_allocated()
    calibration = Calibration(48.0, float("inf"), 0.0, x[:4].flatten(0, 1).cpu())
    of = Member(config_of(*given), 2304, calibration, "cuda", True)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        of.train_step(batch, batch.x * of.scale, log=False)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    print(f"peak of a step at d_sae 65,536 and 16,384 tokens: {peak:.1f} GB")
    assert peak < 20
