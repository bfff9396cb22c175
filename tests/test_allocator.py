"""Memory between stages: kept while a step repeats, given back where the next stage needs it."""

from __future__ import annotations

import subprocess
import sys

_ASK = """
import os
from tcsae.base.allocator import give_back, keep_large_blocks

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

assert keep_large_blocks()
import numpy as np
before = resident()
blocks = [np.ones(2_000_000) for _ in range(20)]  # 16 MB each
last = np.ones(1_000)
held = resident()
blocks = None
kept = resident()
gave = give_back()
print(held - before, kept - before, resident() - before, gave, last.sum())
"""


def test_what_is_free_goes_back_to_the_kernel_when_asked() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", _ASK], capture_output=True, text=True, check=True, timeout=120
    )
    held, kept, after, gave, total = answer.stdout.split()
    assert float(held) > 300 and float(total) == 1_000
    assert float(kept) > 300, "the setting that steps are quick by"
    assert gave == "True" and float(after) < 40
