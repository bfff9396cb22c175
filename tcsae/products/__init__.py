"""The operations that a training step spends its time in: one object of them for each device.

`plain` is PyTorch, right on every device; another object may do the same faster where it knows
more. Nothing outside of this package asks which device it is on.
"""

from __future__ import annotations

import torch

from tcsae.products.cpu import CPU
from tcsae.products.plain import Plain

PLAIN = Plain()
BY_DEVICE: dict[str, Plain] = {"cpu": CPU()}
"""By a device's type; the others have `PLAIN`."""


def products_for(device: torch.device) -> Plain:
    return BY_DEVICE.get(device.type, PLAIN)
