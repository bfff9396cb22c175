"""What packing a grid saves, everything in: 16 points on one stream against 16 lone trainings.

    python scripts/bench_pack.py                              measures, writes docs/performance.md
    python scripts/bench_pack.py --points 4 --tokens 50000 [key=value ...]   a trial: prints only
    python scripts/bench_pack.py --page                       writes the page from docs/pack.json

The real command on the embedded model and text: the grid (window x lambda) with evaluation=quick
and with evaluation=default, each on an empty store: harvest, training, evaluation, all pages.
Beside them one of its points alone, three times, on the store that the first left. The ratio is

    time of the grid's command / (its harvest + points x training of the lone run)

About 40 minutes on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import block, processor, replace_block

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECORD, PAGE = DOCS / "pack.json", DOCS / "performance.md"
POINTS, TOKENS = 16, 300_000
GRIDS = {
    2: ("window=8", "lambda=0.1,1"),
    4: ("window=4,8", "lambda=0.1,1"),
    8: ("window=4,8", "lambda=0,0.1,0.3,1"),
    16: ("window=4,8,16,32", "lambda=0,0.1,0.3,1"),
}
ALONE = ("window=8", "lambda=0.1")
WANTED = {"quick": 1.6, "default": 2.5}
STAGES = {
    "harvest": "harvest",
    "train": "training of all, side by side",
    "evaluate model": "language model with each SAE in it",
}


def run(*arguments: str) -> float:
    """Seconds of the command."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tcsae.train", "tracking=disabled", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.monotonic() - started


def infos(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.rglob("final_info.json"))]


def grid(folder: Path, points: int, evaluation: str, more: Sequence[str]) -> dict[str, Any]:
    """The whole grid on an empty store, and where its time went."""
    store, sweep = folder / "store", folder / evaluation
    shutil.rmtree(store, ignore_errors=True)
    seconds = run(
        *("--multirun", *GRIDS[points], f"evaluation={evaluation}", *more),
        *(f"store.dir={store}", f"hydra.sweep.dir={sweep}"),
    )
    found = infos(sweep)
    assert len(found) == points, f"{len(found)} of {points} jobs are done"
    packs = {json.dumps(info["seconds"]["shared"]): info["seconds"] for info in found}
    shared = {
        name: sum(pack["shared"].get(name, 0.0) for pack in packs.values()) for name in STAGES
    }
    last = max(info["wall_seconds"] for info in found)
    own = {name for info in found for name in info["seconds"]["own"]}
    return {
        "seconds": seconds,
        "packs": len(packs),
        "shared": shared,
        # Of one pack: until the last job's numbers were written, pages of the others in it.
        "side_by_side": last - sum(shared.values()),
        "rest": seconds - last,
        "own_mean": {
            name: statistics.mean(info["seconds"]["own"].get(name, 0.0) for info in found)
            for name in sorted(own)
        },
    }


def alone(folder: Path, repeats: int, more: Sequence[str]) -> dict[str, Any]:
    """One of the quick grid's points by itself; are its numbers the same?"""
    times, training, found = [], [], {}
    for index in range(repeats):
        where = folder / f"alone-{index}"
        times.append(
            run(
                *(*ALONE, "evaluation=quick", *more),
                *(f"store.dir={folder / 'store'}", f"hydra.run.dir={where}"),
            )
        )
        (found,) = infos(where)
        training.append(found["seconds"]["shared"]["train"])
    beside = [info for info in infos(folder / "quick") if info["unique_id"] == found["unique_id"]]
    parts = ("metrics", "consistency", "final_loss")
    return {
        "seconds": times,
        "training": training,
        "same_numbers": len(beside) == 1 and all(beside[0][p] == found[p] for p in parts),
    }


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    points, tokens = given.points, given.tokens
    more = (f"training.tokens={tokens}", *given.overrides)
    quick = grid(folder, points, "quick", more)
    lone = alone(folder, given.repeats, more)
    grids = {"quick": quick, "default": grid(folder, points, "default", more)}
    train = statistics.median(lone["training"])
    for made in grids.values():
        made["against"] = made["shared"]["harvest"] + points * train
        made["ratio"] = made["seconds"] / made["against"]
    machine = f"{os.cpu_count()} cores, {processor()}"
    return {"points": points, "tokens": tokens, "machine": machine, "alone": lone, **grids}


def table(found: Mapping[str, Any]) -> str:
    quick, default = found["quick"], found["default"]
    n, lone = found["points"], found["alone"]
    rows = [("the command, everything in", quick["seconds"], default["seconds"])]
    rows += [(text, quick["shared"][k], default["shared"][k]) for k, text in STAGES.items()]
    rows += [
        (text, quick[key], default[key])
        for key, text in (
            ("side_by_side", "each job's own measurements and pages, side by side"),
            ("rest", "start, packing the text, the last pages, the comparison"),
            ("against", f"one harvest + {n} lone trainings"),
        )
    ]
    lines = ["| seconds | evaluation=quick | evaluation=default |", "|---|---|---|"]
    lines += [f"| {text} | {a:.0f} | {b:.0f} |" for text, a, b in rows]
    lines.append(f"| **times as long** | **{quick['ratio']:.2f}** | **{default['ratio']:.2f}** |")
    wanted = " | ".join(f"{WANTED[name]}" for name in ("quick", "default"))
    lines.append(f"| wanted, at most | {wanted} |")
    own = ", ".join(f"{k} {v:.0f} s" for k, v in default["own_mean"].items())
    same = "the same numbers as" if lone["same_numbers"] else "**other numbers than**"
    return (
        f"{n} points (window x lambda, topk, d_sae 2,304) of {found['tokens']:,} tokens on "
        f"{found['machine']}; `python scripts/bench_pack.py`.\n\n"
        + "\n".join(lines)
        + f"\n\nOne point alone: training {statistics.median(lone['training']):.0f} s, the command "
        f"with evaluation=quick {statistics.median(lone['seconds']):.0f} s (medians of "
        f"{len(lone['seconds'])}), with {same} in the grid. Of one job in the default grid, while "
        f"others were measured beside it, on average: {own}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=POINTS, choices=sorted(GRIDS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=3, help="of the lone run")
    parser.add_argument("--folder", type=Path, help="default: a temporary one, removed at the end")
    parser.add_argument(
        "--page", action="store_true", help="from docs/pack.json, without measuring"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the jobs, for a trial"
    )
    given = parser.parse_args()
    if given.page:
        found = json.loads(RECORD.read_text(encoding="utf-8"))
    else:
        folder = given.folder or Path(tempfile.mkdtemp(prefix="tcsae-bench-"))
        try:
            found = measure(given, folder.resolve())
        finally:
            if given.folder is None:
                shutil.rmtree(folder)
    print(table(found))
    if given.page or (given.points, given.tokens, given.overrides) == (POINTS, TOKENS, []):
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        replace_block(PAGE, block("pack", table(found)))


if __name__ == "__main__":
    main()
