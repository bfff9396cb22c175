"""Numbers as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any, digits: int | None = None) -> Any:
    """The same with None for NaN and infinity, and lists for tensors, arrays and tuples.

    Args:
        digits: significant digits that a float keeps; None: all of them. Whole numbers keep all.
    """
    if hasattr(value, "tolist"):  # a tensor, an array, or one number of them
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")
