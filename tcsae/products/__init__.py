"""The operations that a training step spends its time in: one object of them for each device.

`plain` is PyTorch, right on every device; another object may do the same faster where it knows
more. Nothing outside of this package asks which device it is on.
"""

from __future__ import annotations

import logging

import torch

from tcsae.base.errors import UserError
from tcsae.products.cpu import CPU
from tcsae.products.plain import GPU, Plain

log = logging.getLogger(__name__)

PLAIN = Plain()
BY_DEVICE: dict[str, Plain] = {"cpu": CPU(), "cuda": GPU()}
"""By a device's type, as `choose` left it; the others have `PLAIN`."""


def products_for(device: torch.device) -> Plain:
    return BY_DEVICE.get(device.type, PLAIN)


def choose(wanted: str, device: str) -> str:
    """Let this process train on `device` by `wanted` (training.products); its object's name.

    "auto" is what is fastest there: Triton's kernels on a GPU where they run, and a line in the log
    where they do not.

    Raises UserError: triton without a GPU, or where its kernels do not run.
    """
    kind = torch.device(device).type
    if wanted == "triton" and kind != "cuda":
        raise UserError(
            f"training.products = triton: its kernels run on a GPU, this job is on {device}; "
            "auto takes what is fastest there"
        )
    if kind == "cuda":
        BY_DEVICE[kind] = GPU() if wanted == "plain" else _on_gpu(wanted, device)
    elif kind == "cpu":
        BY_DEVICE[kind] = PLAIN if wanted == "plain" else CPU()
    return products_for(torch.device(device)).name


def _on_gpu(wanted: str, device: str) -> Plain:
    """Triton's kernels, tried once on a few numbers."""
    try:
        from tcsae.products.triton_gpu import Triton

        found = Triton()
        found.try_on(torch.device(device))
    # Compiler, driver and launch raise types of many libraries.
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if wanted == "triton":
            raise UserError(
                f"training.products = triton: its kernels do not run here ({said}); "
                "training.products=plain does without"
            ) from error
        log.warning(f"Triton's kernels do not run here ({said}): training goes on without them")
        return GPU()
    return found
