"""The kernels in Triton's interpreter, on a CPU. `test_kernels` runs this in a process of its own:
Triton reads its flag when it is imported. Every launch is watched for races (race_check.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kernel_cases as cases
import pytest
import torch
import triton
import triton.language as tl
from race_check import Seen, watch

from tcsae.products.triton_gpu import Triton

TRITON = Triton()
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def watched() -> Iterator[Seen]:
    with watch() as seen:
        yield seen
    assert seen.launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [dict(n=24, d_sae=40, k=5, width=80), dict(n=200, d_sae=33, k=4, width=100)]
)
def test_sums_of_rows(sizes: dict[str, int], dtype: torch.dtype) -> None:
    cases.check_rows(TRITON, "cpu", dtype=dtype, **sizes)


@pytest.mark.parametrize("width", [64, 100])
def test_the_error_of_a_reconstruction(width: int) -> None:
    cases.check_error(TRITON, "cpu", n=5, width=width)


@pytest.mark.parametrize("positions", [16, 13])
def test_the_primitives_of_the_temporal_loss(positions: int) -> None:
    cases.check_penalty(TRITON, "cpu", contexts=3, positions=positions, d_sae=24, k=4)


def test_the_windows_product_across_many_blocks() -> None:
    """One feature is on at nearly all of 100 positions: four blocks to either side."""
    cases.check_penalty(TRITON, "cpu", contexts=2, positions=100, d_sae=6, k=2)


def test_the_temporal_loss_in_every_form() -> None:
    cases.check_whole_penalty(TRITON, "cpu", contexts=3, positions=16, d_sae=24, k=4)


@pytest.mark.parametrize("name", ["matryoshka", "matryoshka, token", "tsae", "persistent"])
def test_the_losses_of_an_architecture(name: str) -> None:
    cases.check_losses(TRITON, "cpu", name, contexts=3, positions=8, d_sae=256, k=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_sae", [256, 200])
def test_selection(d_sae: int, dtype: torch.dtype) -> None:
    cases.check_selection(TRITON, "cpu", n=6, d_sae=d_sae, k=8, dtype=dtype)


@pytest.mark.parametrize("width", [64, 100])
def test_the_update_of_the_decoder(width: int) -> None:
    cases.check_update(TRITON, "cpu", d_sae=12, width=width)


# ------------------------------------------------------------------ what watches does see


@triton.jit
def all_write_one(out, n, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.program_id(0))


@triton.jit
def reads_what_another_writes(out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    tl.store(out + at, tl.load(out + (at + 1) % BLOCK) + 1)


@triton.jit
def reads_past_the_end(out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    tl.store(out + at, tl.load(out + at + 1, mask=at == n - 1, other=0))


@triton.jit
def writes_before_the_start(out, n, BLOCK: tl.constexpr):
    tl.store(out + tl.program_id(0) - 1, 1)


@triton.jit
def adds_to_what_is_there(out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    tl.store(out + at, tl.load(out + at) + 1)


@triton.jit
def forgets_the_last(out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    tl.store(out + at, 1, mask=at < n - 1)


PLANTED = {
    all_write_one: "two programs write one address",
    reads_what_another_writes: "writes what program",
    reads_past_the_end: "load outside every argument",
    writes_before_the_start: "store outside every argument",
}


@pytest.mark.parametrize("kernel", PLANTED, ids=lambda kernel: kernel.__name__)
def test_a_planted_offence_is_seen(kernel: Any) -> None:
    with pytest.raises(Exception, match=PLANTED[kernel]):
        kernel[(8,)](torch.zeros(8), 8, BLOCK=8)


def test_an_output_that_is_not_written_whole_is_seen() -> None:
    out = torch.empty(8)
    forgets_the_last[(8,)](out, 8, BLOCK=8)
    assert not cases.error(out, torch.ones(8)) < 1
    assert cases.error(out[:7], torch.ones(7)) == 0


def test_what_is_no_offence_passes(watched: Seen) -> None:
    out = torch.zeros(8)
    adds_to_what_is_there[(8,)](out, 8, BLOCK=8)
    assert out.tolist() == [1.0] * 8  # though it is launched forward and backward
    assert (watched.loads, watched.stores) == (16, 16)
