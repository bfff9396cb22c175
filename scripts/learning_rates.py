"""Which learning rate and start of the encoder: what held-out text says of each, by itself.

    python scripts/learning_rates.py "sae=topk training.lr=3e-3" "sae=topk training.lr=6e-3" ...

Every argument is one job: overrides of conf/ over those of COMMON, all on the same activations. It
is trained, measured on the held-out contexts and written into --out (docs/rates.json); one that is
there already is not run again. Then the table of docs/architectures.md is written; without jobs,
nothing but that. It measures neither the language model nor consistency, and so takes little more
than the training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from compare_peers import DOCS, ours, processor
from pages import block, replace_block

from tcsae.base.allocator import keep_large_blocks
from tcsae.base.files import read_json, write_json
from tcsae.base.labels import markdown_table
from tcsae.base.signals import StopRequest
from tcsae.config import Config
from tcsae.config.compose import config_of
from tcsae.data.stream import Stream, open_stream
from tcsae.metrics.reconstruction import ReconstructionMetrics
from tcsae.sae.base import SparseAutoencoder

COMMON = ["lambda=0", "consistency=none", "training.batch_contexts=16", "training.tokens=400000"]
Run = dict[str, Any]


def measured(config: Config, stream: Stream) -> Run:
    started = time.perf_counter()
    sae = ours(config, stream)
    seconds = time.perf_counter() - started
    return held_out(sae, stream) | {"seconds": seconds, "processor": processor()}


@torch.no_grad()
def held_out(sae: SparseAutoencoder, stream: Stream) -> Run:
    metrics = ReconstructionMetrics(sae.d_in, sae.d_sae)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for batch in stream.evaluation.in_order(16):
        x, places = batch.x.float(), {"segments": batch.segments, "valid": batch.valid}
        features, x_hat = sae.encode_and_decode(x, **places)
        metrics.update(x, x_hat, features, valid=batch.valid)
        fired |= (features[batch.valid] > 0).any(0)
    found = metrics.compute()
    return {
        "explained_variance": found["explained_variance"],
        "l0": found["l0"],
        "live": fired.float().mean().item(),
    }


def described(config: Config, job: str) -> Run:
    """What the table has of a job. jumprelu_tanh is an option of conf/, not an architecture."""
    return {
        "job": job,
        "sae": next(p.partition("=")[2] for p in job.split() if p.startswith("sae=")),
        "lr": config.training.lr,
        "encoder_scale": config.sae.encoder_scale,
        "target_l0": config.training.target_l0,
        "seed": config.seed,
        "steps": config.steps,
        "tokens_per_step": config.training.batch_contexts * config.dataset.context_size,
    }


def table(runs: list[Run]) -> str:
    """A line for every kind of run, a column for every rate: explained variance / L0 / live."""
    rates = sorted({run["lr"] for run in runs})
    kind_of = ("sae", "encoder_scale", "steps", "tokens_per_step", "target_l0", "seed")
    lines: dict[tuple[Any, ...], dict[float, str]] = {}
    for run in runs:
        cell = f"{run['explained_variance']:.4f} / {run['l0']:.1f} / {run['live']:.3f}"
        lines.setdefault(tuple(run[name] for name in kind_of), {})[run["lr"]] = cell
    rows = [
        [name, f"{scale:g}", f"{steps} x {tokens}", "" if target is None else f"{target:g}",
         str(seed), *(found.get(rate, "") for rate in rates)]
        for (name, scale, steps, tokens, target, seed), found in lines.items()
    ]  # fmt: skip
    head = ["sae", "encoder_scale", "steps x tokens", "target_l0", "seed"]
    return markdown_table([*head, *(f"{rate:g}" for rate in rates)], rows)


def page_block(runs: list[Run]) -> str:
    machines = ", ".join(sorted({run["processor"] for run in runs}))
    return block("rates", f"On {machines}.\n\n{table(runs)}")


def write_page(page: Path, runs: list[Run]) -> None:
    replace_block(page, page_block(runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", metavar="JOB")
    parser.add_argument("--common", nargs="*", default=[], help="further overrides of all jobs")
    parser.add_argument("--out", type=Path, default=DOCS / "rates.json")
    parser.add_argument("--page", type=Path, default=DOCS / "architectures.md")
    args = parser.parse_args()
    keep_large_blocks()
    runs: list[Run] = read_json(args.out) if args.out.is_file() else []
    stream = None
    for job in args.jobs:
        if job in {run["job"] for run in runs}:
            continue
        config = config_of(*COMMON, *args.common, *job.split())
        stream = stream or open_stream(config, StopRequest())
        runs.append(described(config, job) | measured(config, stream))
        write_json(args.out, runs)
        print(runs[-1], flush=True)
    write_page(args.page, runs)


if __name__ == "__main__":
    main()
