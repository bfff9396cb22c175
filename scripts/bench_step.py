"""What the temporal loss adds to a training step, and how its time depends on the window.

    python scripts/bench_step.py [--repeats 9] [--d-sae 2304] [--architecture topk]

Random activations of the embedded model's shape (d_in 576, 32 contexts of 128 tokens). Variants
take turns within each repeat; medians over the repeats, and the ratio to the step without the loss.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tcsae.config import parse
from tcsae.data.store import Batch, Calibration
from tcsae.memory import keep_large_blocks
from tcsae.train import conf_folder, numbers
from tcsae.training.member import Member

D_IN, CONTEXTS, POSITIONS = 576, 32, 128


def member(overrides: list[str], sample: torch.Tensor) -> Member:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    numbers.install()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = OmegaConf.to_container(compose("train", overrides), resolve=True)
    config = parse(composed)  # type: ignore[arg-type]
    median = sample.norm(dim=-1).median().item()
    calibration = Calibration(median, float("inf"), 0.0, sample)
    return Member(config, D_IN, calibration, "cpu", torch.cpu._is_avx512_bf16_supported())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--d-sae", type=int, default=2304)
    arguments.add_argument("--architecture", default="topk")
    arguments.add_argument("--default-allocator", action="store_true")
    args = arguments.parse_args()
    if not args.default_allocator:
        keep_large_blocks()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CONTEXTS, POSITIONS, D_IN, generator=generator) * 7
    valid = torch.rand(CONTEXTS, POSITIONS, generator=generator) > 0.01
    segments = (torch.rand(CONTEXTS, POSITIONS, generator=generator) < 0.005).cumsum(1)
    batch = Batch(x, torch.zeros_like(segments), segments, valid)
    base = [f"sae={args.architecture}", f"sae.d_sae={args.d_sae}"]
    variants = {"none": [*base, "consistency=none"]}
    for form in ("scale_free", "window_variance"):
        for window in ("2", "8", "64", "document"):
            variants[f"{form} {window}"] = [*base, f"consistency={form}", f"window={window}"]
    members = {name: member(overrides, x[valid]) for name, overrides in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in members}
    for repeat in range(args.repeats + 2):
        for name, one in members.items():
            started = time.perf_counter()
            one.train_step(batch, x * one.scale, log=False)
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    plain = statistics.median(times["none"])
    print(f"{'loss and window':<28} {'ms a step':>10} {'x none':>8}   (pairwise median)")
    for name, taken in times.items():
        pairs = [a / b for a, b in zip(taken, times["none"], strict=True)]
        print(
            f"{name:<28} {1000 * statistics.median(taken):>10.1f} {statistics.median(pairs):>8.3f}"
        )
    print(f"tokens/s without the loss: {CONTEXTS * POSITIONS / plain:,.0f}")


if __name__ == "__main__":
    main()
