"""How fast a training step is on a GPU, beside other libraries' on the same card.

    python scripts/bench_gpu.py [--d-sae 16384 65536] [--tokens 4096 16384] [--json FILE] [--smoke]
    python scripts/bench_gpu.py --page     write the table of docs/performance.md from docs/gpu.json

Whole steps on random activations with the correlation of contexts, d_in 2,304, contexts of 128
tokens, products in bfloat16 where a line says no other. Steps are timed by the host's clock in
blocks of BLOCK, which end when the card has done them; the variants take turns. ms are medians over
the rounds, peak GB is what a variant holds and takes in a step beside the data. "same bits twice":
two runs of ten steps from one seed end with equal weights. Needs no model and no hub. --smoke: tiny
sizes, also without a GPU. The JSON is written after every size, so that what was measured is kept
whatever comes after.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tcsae.config.compose import config_of
from tcsae.data.batches import Batch, Calibration
from tcsae.products import choose
from tcsae.training.member import Member

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "gpu.json"
POSITIONS, BLOCK = 128, 5
Step = Callable[[], object]


class Sizes:
    """What is measured: d_in, d_sae, k, tokens a step, the device."""

    def __init__(self, d_in: int, d_sae: int, k: int, tokens: int, device: str) -> None:
        self.d_in, self.d_sae, self.k, self.tokens, self.device = d_in, d_sae, k, tokens, device

    @property
    def title(self) -> str:
        return f"d_sae {self.d_sae:,}, k {self.k}, {self.tokens:,} tokens"


def data(sizes: Sizes, n: int = 2) -> list[Batch]:
    generator = torch.Generator(sizes.device).manual_seed(0)
    found, contexts, device = [], sizes.tokens // POSITIONS, sizes.device
    for _ in range(n):
        x = torch.randn(contexts, POSITIONS, sizes.d_in, generator=generator, device=device)
        x += torch.randn(contexts, 1, sizes.d_in, generator=generator, device=device)
        shape = x.shape[:2]
        valid = torch.rand(shape, generator=generator, device=device) > 0.01
        segments = (torch.rand(shape, generator=generator, device=device) < 0.005).cumsum(1)
        found.append(Batch(x.bfloat16(), torch.zeros_like(segments), segments, valid, valid))
    return found


def ours(sizes: Sizes, batches: list[Batch], products: str, *more: str) -> Step:
    """One step of our TopK; `more` are overrides."""
    given = [f"sae.d_sae={sizes.d_sae}", f"sae.k={sizes.k}", "lambda=1", "window=8"]
    given += [f"training.tokens={10_000 * sizes.tokens}", f"sae.dead_after_tokens={10**9}"]
    given += [f"training.batch_contexts={sizes.tokens // POSITIONS}", *more]
    config = config_of("sae=topk", *given)
    choose(products, sizes.device)
    x = batches[0].x[:2].flatten(0, 1).float().cpu()
    calibration = Calibration(x.norm(dim=-1).median().item(), float("inf"), 0.0, x)
    autocast = config.training.precision != "float32"
    member = Member(config, sizes.d_in, calibration, sizes.device, autocast)

    def step() -> Member:
        batch = batches[member.step % len(batches)]
        member.train_step(batch, batch.x.float() * member.scale, log=False)
        return member

    return step


def saelens(sizes: Sizes, batches: list[Batch], autocast: bool) -> Step:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    cfg = SAETrainerConfig(
        total_training_samples=10_000 * sizes.tokens, train_batch_size_samples=sizes.tokens,
        lr=1e-3, lr_end=1e-4, lr_warm_up_steps=100, lr_decay_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, autocast=autocast, dead_feature_window=10**6, device=sizes.device,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    options = {"d_in": sizes.d_in, "d_sae": sizes.d_sae, "k": sizes.k, "device": sizes.device}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**options))
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))

    def step() -> None:
        batch = batches[trainer.n_training_steps % len(batches)]
        trainer.step(batch.x.flatten(0, 1).float() * 0.05)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(sizes: Sizes, batches: list[Batch], autocast: bool) -> Step:
    # Its package imports nnsight for buffers that nothing here uses; a stand-in is enough.
    stand_in = types.ModuleType("nnsight")
    stand_in.LanguageModel = None  # type: ignore[attr-defined]
    sys.modules.setdefault("nnsight", stand_in)
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10_000, activation_dim=sizes.d_in, dict_size=sizes.d_sae, k=sizes.k, layer=0,
        lm_name="none", device=sizes.device,
    )  # fmt: skip
    done = iter(range(10**9))

    def step() -> None:
        number = next(done)
        x = batches[number % len(batches)].x.flatten(0, 1).float() * 0.05
        with torch.autocast(sizes.device, dtype=torch.bfloat16, enabled=autocast):
            trainer.update(number, x)

    return step


def variants(sizes: Sizes, kernels: str) -> dict[str, Callable[[list[Batch]], Step]]:
    def of(*given: str) -> Callable[[list[Batch]], Step]:
        return lambda batches: ours(sizes, batches, *given)

    return {
        "ours, plain, no loss": of("plain", "consistency=none"),
        "ours, plain, window 8": of("plain"),
        f"ours, {kernels}, no loss": of(kernels, "consistency=none"),
        f"ours, {kernels}, window 8": of(kernels),
        "SAELens, autocast": lambda batches: saelens(sizes, batches, True),
        "SAELens as it starts (float32)": lambda batches: saelens(sizes, batches, False),
        "dictionary_learning, autocast": lambda batches: dictionary_learning(sizes, batches, True),
    }


# ------------------------------------------------------------------ timing


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def block_ms(step: Step, device: str) -> float:
    """Milliseconds of a step, over BLOCK of them in a row, as a run makes them."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(BLOCK):
        step()
    synchronise(device)
    return 1000 * (time.perf_counter() - started) / BLOCK


def held(device: str) -> float:
    gc.collect()
    return torch.cuda.memory_allocated() / 1e9 if device == "cuda" else 0.0


def measure(sizes: Sizes, rounds: int, kernels: str) -> dict[str, Any]:
    batches, steps = data(sizes), {}
    rows: dict[str, Any] = {}
    for name, build in variants(sizes, kernels).items():
        before = held(sizes.device)
        try:
            step = build(batches)
            if sizes.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(4):
                step()
            synchronise(sizes.device)
        except Exception as error:  # whatever fails, this variant is left out and the reason kept
            rows[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        peak = torch.cuda.max_memory_allocated() / 1e9 if sizes.device == "cuda" else 0.0
        steps[name], rows[name] = step, {"peak_gb": peak - before}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if name.startswith("ours"):
                choose("plain" if "plain" in name else kernels, sizes.device)
            times[name].append(block_ms(step, sizes.device))
    base = times.get("SAELens, autocast")
    for name, taken in times.items():
        ms = statistics.median(taken)
        rows[name] |= {
            "ms": ms,
            "least_ms": min(taken),
            "tokens_per_second": sizes.tokens / ms * 1e3,
        }
        if base:
            ratio = statistics.median(b / a for a, b in zip(taken, base, strict=True))
            rows[name]["times_saelens_autocast"] = ratio
    return rows


def same_bits(sizes: Sizes, products: str) -> bool:
    batches, weights = data(sizes), []
    for _ in range(2):
        torch.manual_seed(0)
        step = ours(sizes, batches, products)
        for _ in range(10):
            member: Any = step()
        weights.append([p.detach().clone() for p in member.sae.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def products_ms(sizes: Sizes) -> dict[str, float]:
    """What the card does at most: a bare product in bfloat16, a copy."""
    x = torch.randn(sizes.tokens, sizes.d_in, device=sizes.device).bfloat16()
    w = torch.randn(sizes.d_sae, sizes.d_in, device=sizes.device).bfloat16()
    pre = x @ w.T
    for _ in range(3):
        block_ms(lambda: torch.mm(x, w.T, out=pre), sizes.device)
    ms = statistics.median(
        block_ms(lambda: torch.mm(x, w.T, out=pre), sizes.device) for _ in range(5)
    )
    other = torch.empty_like(pre)
    copy = statistics.median(block_ms(lambda: other.copy_(pre), sizes.device) for _ in range(5))
    flops, moved = 2 * sizes.tokens * sizes.d_sae * sizes.d_in, 2 * pre.numel() * pre.itemsize
    return {"encoder_product_ms": ms, "tflops": flops / ms / 1e9, "copy_gb_s": moved / copy / 1e6}


def card(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, torch {torch.__version__}"


def table(rows: dict[str, Any]) -> str:
    lines = [
        "| step | ms | tokens/s | peak GB | times as fast as SAELens, autocast |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | not measured: {row['failed']} | | | |")
            continue
        ratio = row.get("times_saelens_autocast")
        shown = "" if ratio is None else f"{ratio:.2f}"
        rate = f"{row['tokens_per_second']:,.0f}"
        lines.append(f"| {name} | {row['ms']:.2f} | {rate} | {row['peak_gb']:.1f} | {shown} |")
    return "\n".join(lines)


def write_page() -> None:
    from pages import block, replace_block

    results = json.loads(RESULTS.read_text())
    bits = ", ".join(f"{k} {'yes' if v else 'no'}" for k, v in results["same_bits_twice"].items())
    parts = [
        f"{results['card']}; medians of {results['rounds']} rounds of {BLOCK} steps; the same bits "
        f"twice: {bits}."
    ]
    for title, found in results["sizes"].items():
        bare = found["bare"]
        parts += [
            f"**{title}** (the encoder's product alone {bare['encoder_product_ms']:.2f} ms, "
            f"{bare['tflops']:.0f} TFLOP/s)",
            table(found["rows"]),
        ]
    replace_block(PAGE, block("gpu", "\n\n".join(parts)))


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """With the options of every benchmark for a card."""
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--page", action="store_true", help="write docs/performance.md, no more")
    return parser.parse_args()


def device_for(args: argparse.Namespace) -> str:
    """Where it is measured; SystemExit without a GPU, but for --smoke."""
    logging.disable()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        name = Path(sys.argv[0]).stem
        raise SystemExit(f"{name}: torch sees no GPU here; --smoke tries the script on a CPU")
    return device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-sae", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--k", type=int, nargs="+", default=[32])
    parser.add_argument("--rounds", type=int, default=9)
    args = parsed(parser)
    if args.page:
        write_page()
        return
    device = device_for(args)
    d_in, kernels = 2304, "triton" if device == "cuda" else "auto"
    if args.smoke:
        d_in, args.d_sae, args.tokens, args.k, args.rounds = 64, [512], [256], [8], 2
    results: dict[str, Any] = {"card": card(device), "rounds": args.rounds, "sizes": {}}
    for d_sae in args.d_sae:
        for k in args.k:
            for tokens in args.tokens:
                sizes = Sizes(d_in, d_sae, k, tokens, device)
                found: dict[str, Any] = {"bare": products_ms(sizes)}
                found["rows"] = measure(sizes, args.rounds, kernels)
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
                results["sizes"][sizes.title] = found
                print(f"\n{results['card']}: {sizes.title}\n{found['bare']}", flush=True)
                print(table(found["rows"]), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
    small = Sizes(d_in, args.d_sae[0], args.k[0], args.tokens[0], device)
    results["same_bits_twice"] = {name: same_bits(small, name) for name in ("plain", kernels)}
    print(f"same bits twice: {results['same_bits_twice']}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
