"""What packing a grid saves: 16 jobs on one stream, against one harvest and 16 lone runs.

    python scripts/bench_pack.py [--tokens 300000] [--folder DIR]

Runs the real command on the embedded model and text: the grid on an empty store, then the same job
alone three times on the store that it left, and prints

    training  (harvest + training of the grid) / (harvest + 16 x training of the lone run)
    whole     time of the grid's command / (harvest + 16 x time of the lone run's command)

The evaluation is cut short in both. Ten to fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = ("window=4,8,16,32", "lambda=0,0.1,0.3,1")
CHEAP = (
    "evaluation.analysis=false",
    "evaluation.model_contexts=8",
    "dataset.n_eval_contexts=64",
    "tracking=disabled",
)
HARVEST = re.compile(r"harvest(?: \(held-out\))?: ([\d,]+) tokens in (?:(\d+):)?(\d+):(\d+) ")


def run(*arguments: str) -> tuple[float, str]:
    """Seconds of the command, and its log."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tcsae.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.monotonic() - started, done.stderr


def harvested(log: str) -> tuple[int, float]:
    """(tokens, seconds) of every harvest in a log."""
    found = HARVEST.findall(log)
    tokens = sum(int(tokens.replace(",", "")) for tokens, *_ in found)
    return tokens, sum(3600 * int(h or 0) + 60 * int(m) + int(s) for _, h, m, s in found)


def training_seconds(folder: Path) -> list[float]:
    infos = folder.rglob("final_info.json")
    return [json.loads(info.read_text())["training_seconds"] for info in infos]


def measure(tokens: int, folder: Path) -> None:
    common = (*CHEAP, f"training.tokens={tokens}", f"store.dir={folder / 'store'}")
    grid = (*GRID, f"hydra.sweep.dir={folder / 'grid'}", "hydra.launcher.compare=false")
    grid_seconds, log = run("--multirun", *grid, *common)
    harvest_tokens, harvest_seconds = harvested(log)
    packed = training_seconds(folder / "grid")
    lone_seconds, lone_training = [], []
    for index in range(3):
        where = folder / f"lone-{index}"
        seconds, log = run("window=8", "lambda=0.1", f"hydra.run.dir={where}", *common)
        lone_seconds.append(seconds)
        lone_training += training_seconds(where)
        assert harvested(log)[0] == 0, "the lone run harvested"
    whole, alone = statistics.median(lone_seconds), statistics.median(lone_training)
    n = len(packed)
    training = (harvest_seconds + sum(packed)) / (harvest_seconds + n * alone)
    print(f"jobs {n}, harvested tokens {harvest_tokens:,}, harvest {harvest_seconds:.0f} s")
    print(f"training: packed {sum(packed):.1f} s in all, alone {alone:.1f} s (median of 3)")
    print(f"command: grid {grid_seconds:.1f} s, alone {whole:.1f} s (median of 3)")
    print(f"ratio of training {training:.2f}")
    print(f"ratio of the whole {grid_seconds / (harvest_seconds + n * whole):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--folder", type=Path, help="default: a temporary one, removed at the end")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="tcsae-bench-"))
    try:
        measure(given.tokens, folder)
    finally:
        if given.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
