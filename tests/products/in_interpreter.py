"""The kernels in Triton's interpreter, on a CPU. `test_kernels` runs this in a process of its own:
Triton reads its flag when it is imported."""

from __future__ import annotations

import kernel_cases as cases
import pytest
import torch

from tcsae.products.triton_gpu import Triton

TRITON = Triton()
DTYPES = (torch.float32, torch.bfloat16)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_sae", [256, 200])
def test_selection(d_sae: int, dtype: torch.dtype) -> None:
    cases.check_selection(TRITON, "cpu", n=6, d_sae=d_sae, k=8, dtype=dtype)


@pytest.mark.parametrize("width", [64, 100])
def test_the_update_of_the_decoder(width: int) -> None:
    cases.check_update(TRITON, "cpu", d_sae=12, width=width)
