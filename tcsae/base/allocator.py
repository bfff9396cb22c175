"""Large blocks of memory that are kept instead of being returned and faulted in again."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_large_blocks() -> bool:
    """Have glibc serve every allocation from its heap and never give the heap back.

    A training step makes and drops [tokens, d_sae] tensors of tens of megabytes. By default glibc
    maps each of them anew and the kernel fills it with zeroed pages, which on a CPU takes longer
    than the arithmetic on it (scripts/bench.py --default-allocator shows it). Threads share the one
    heap, since only that can hold blocks of any size. Returns whether it took effect: not on other
    C libraries, where nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
    return all([bool(mallopt(name, value)) for name, value in wanted.items()])


def give_back() -> bool:
    """Return what is free in the heap to the kernel, wherever in it: between two stages, of which
    the next would not find room in what the last one left. Takes milliseconds.

    Returns whether anything was returned; never on other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False
