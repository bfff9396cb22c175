"""How fast a training step is: beside the machine's floors and other libraries, and as it grows.

    python scripts/bench.py [--sections steps window ...] [--rounds 9] [--json FILE]
    python scripts/bench.py --page    write the tables of docs/performance.md from its JSON

Whole steps (loss, backward pass, clipping, decoder projection, Adam, normalisation, counters) on
random activations of the embedded model's shape, d_in 576, contexts of 128 tokens, products in
bfloat16 (float32 on processors that have none). The variants of a section take turns; figures are
medians over the rounds, ratios medians of the ratios within a round. Sections that are not asked
for keep their figures in the JSON. SAELens and dictionary_learning are measured where they are
installed, each in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_data
import torch
from compare_peers import peer_trainer
from pages import block, cpuinfo, replace_block
from torch import Tensor

from tcsae.base.allocator import keep_large_blocks
from tcsae.config.compose import config_of
from tcsae.data.batches import Batch, Calibration
from tcsae.data.devices import bfloat16_is_native
from tcsae.training.member import Member
from tcsae.training.trainer import ScaledBatch

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.json"
D_IN, D_SAE, CONTEXTS, POSITIONS = 576, 4608, 32, 128
TOKENS = CONTEXTS * POSITIONS
K = 32
ARCHITECTURES = ("standard", "topk", "batchtopk")
WARM_UP = 3
Step = Callable[[], object]


PRODUCTS = torch.bfloat16 if bfloat16_is_native("cpu") else torch.float32
"""What training takes by itself: emulated bfloat16 is far slower than float32."""

# ------------------------------------------------------------------------------ what is timed


def random_batches(n_contexts: int = CONTEXTS, n: int = 4) -> list[Batch]:
    """Activations as a store gives them: bfloat16, documents, one token in a hundred masked."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(n):
        shape = (n_contexts, POSITIONS)
        x_BTD = torch.randn(*shape, D_IN, generator=generator, dtype=torch.float32) * 7
        valid_BT = torch.rand(shape, generator=generator) > 0.01
        segments_BT = (torch.rand(shape, generator=generator) < 0.005).cumsum(1)
        tokens_BT = torch.zeros_like(segments_BT)
        batches.append(Batch(x_BTD.bfloat16(), tokens_BT, segments_BT, valid_BT, valid_BT))
    return batches


def overrides(architecture: str, *more: str) -> list[str]:
    # No feature dies within the measurement, here or with the peers.
    base = [f"sae={architecture}", f"sae.d_sae={D_SAE}", "sae.dead_after_tokens=100000000"]
    return [*base, f"training.tokens={1000 * TOKENS}", *more]


def new_member(batches: list[Batch], given: list[str]) -> Member:
    sample_ND = torch.cat([b.x[b.valid].float() for b in batches])
    median = sample_ND.norm(dim=-1).median().item()
    calibration = Calibration(median, float("inf"), 0.0, sample_ND)
    return Member(config_of(*given), D_IN, calibration, "cpu", PRODUCTS.itemsize == 2)


def ours(batches: list[Batch], given: list[str], members: int = 1) -> Step:
    """One step of `members` SAEs on one batch."""
    bank = [new_member(batches, given) for _ in range(members)]

    def step() -> None:
        batch = batches[bank[0].step % len(batches)]
        scaled = ScaledBatch(batch)
        for member in bank:
            member.train_step(batch, scaled.x(member.scale), log=False)

    return step


def saelens(batches: list[Batch], architecture: str, compiled: bool = False) -> Step:
    config = config_of(*overrides(architecture), "training.precision=bfloat16")
    trainer = peer_trainer(config, D_IN, config.training.lr, {})
    if compiled:
        trainer.sae.training_forward_pass = torch.compile(trainer.sae.training_forward_pass)
    scale = new_member(batches, overrides("standard")).scale

    def step() -> None:
        batch = batches[trainer.n_training_steps % len(batches)]
        trainer.step(batch.x[batch.valid].float() * scale)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(batches: list[Batch], architecture: str) -> Step:
    from dictionary_learning.trainers import batch_top_k, standard, top_k

    found = {"standard": standard.StandardTrainer, "topk": top_k.TopKTrainer,
             "batchtopk": batch_top_k.BatchTopKTrainer}  # fmt: skip
    options: dict[str, Any] = {} if architecture == "standard" else {"k": K}
    trainer = found[architecture](
        steps=100_000, activation_dim=D_IN, dict_size=D_SAE, layer=0, lm_name="none", device="cpu",
        **options,
    )  # fmt: skip
    scale, done = new_member(batches, overrides("standard")).scale, iter(range(10**9))

    def step() -> None:
        number = next(done)
        batch = batches[number % len(batches)]
        trainer.update(number, batch.x[batch.valid].float() * scale)

    return step


def products(d_sae: int = D_SAE, n_tokens: int = TOKENS) -> dict[str, Step]:
    """The bare products of a dense step, and the encoder's alone."""
    x_ND, e_ND = torch.randn(2, n_tokens, D_IN).to(PRODUCTS)
    W_FD = torch.randn(d_sae, D_IN).to(PRODUCTS)
    f_NF = (x_ND @ W_FD.T).relu_()

    def five() -> tuple[Tensor, ...]:
        return x_ND @ W_FD.T, f_NF @ W_FD, e_ND @ W_FD.T, f_NF.T @ e_ND, f_NF.T @ x_ND

    return {"the five products": five, "the encoder's product": lambda: x_ND @ W_FD.T}


PEERS: dict[str, Callable[..., Step]] = {
    "SAELens, bfloat16": saelens,
    "SAELens, bfloat16, compiled": functools.partial(saelens, compiled=True),
    "dictionary_learning, float32": dictionary_learning,
}


# ------------------------------------------------------------------------------ timing


def serve(name: str, architecture: str, pipe: Any) -> None:
    """Steps of a peer in a process of its own: a message in, the seconds of a step out."""
    logging.disable()
    try:
        step = PEERS[name](random_batches(), architecture)
        step()
    except Exception as error:  # whatever fails, the peer is left out and the page says why
        pipe.send(type(error).__name__)
        return
    pipe.send("ready")
    while pipe.recv():
        started = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - started)


class Peer:
    """Another library as its users run it: in its own process, with the default allocator."""

    def __init__(self, name: str, architecture: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        target = (name, architecture, far_end)
        self._process = context.Process(target=serve, args=target, daemon=True)
        self._process.start()
        self.state = self._pipe.recv()

    def __call__(self) -> float:
        self._pipe.send(True)
        return self._pipe.recv()

    def close(self) -> None:
        if self.state == "ready":
            self._pipe.send(False)
        self._process.join()


def take_turns(
    steps: Mapping[str, Step], rounds: int, warm_up: int | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each step in each round, after `warm_up` (WARM_UP) rounds that do not count.

    A step that gives a number has taken its own time, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    warm_up = WARM_UP if warm_up is None else warm_up
    for number in range(warm_up + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            own = step()
            seconds = own if isinstance(own, float) else time.perf_counter() - started
            if number >= warm_up:
                times[name].append(1000 * seconds)
    return times


def summary(times: Mapping[str, list[float]], against: Mapping[str, str]) -> dict[str, Any]:
    """By step: median and least ms, and how many times as long `against` another it takes."""
    found: dict[str, Any] = {}
    for name, taken in times.items():
        found[name] = {"ms": statistics.median(taken), "least_ms": min(taken)}
        if name in against:
            pairs = zip(taken, times[against[name]], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            found[name] |= {"against": against[name], "ratio": ratio}
    return found


# ------------------------------------------------------------------------------ sections


def steps_section(rounds: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    missing: list[str] = []
    for architecture in ARCHITECTURES:
        found, left_out = one_architecture(architecture, rounds)
        rows |= found
        missing += left_out
    return {"rows": rows, "missing": missing}


def one_architecture(architecture: str, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """Ours, the peers and the floor in turn; and a line for each peer that cannot take part."""
    batches = random_batches()
    floor = "the five products" if architecture == "standard" else "the encoder's product"
    steps: dict[str, Step] = {f"{architecture}: {floor}": products()[floor]}
    alone = f"{architecture}: ours, no temporal loss"
    steps[alone] = ours(batches, overrides(architecture, "consistency=none"))
    against, missing = {alone: f"{architecture}: {floor}"}, []
    for window in (2, 8, 64):
        name = f"{architecture}: ours, window {window}"
        steps[name] = ours(batches, overrides(architecture, f"window={window}"))
        against[name] = alone
    for name in PEERS:
        peer = Peer(name, architecture)
        if peer.state != "ready":
            missing.append(f"{name} ({architecture}): {peer.state}")
            continue
        steps[f"{architecture}: {name}"] = peer
        against[f"{architecture}: {name}"] = f"{architecture}: ours, window 8"
    rows = summary(take_turns(steps, rounds), against)
    for step in steps.values():
        if isinstance(step, Peer):
            step.close()
    return rows, missing


def tokens_section(rounds: int) -> dict[str, Any]:
    steps, against = {}, {}
    for architecture in ARCHITECTURES:
        for times in (1, 2, 4):
            name = f"{architecture}, {times * TOKENS:,} tokens"
            steps[name] = ours(random_batches(times * CONTEXTS, 1), overrides(architecture))
            against[name] = f"{architecture}, {TOKENS:,} tokens"
    return {"rows": summary(take_turns(steps, rounds), against)}


def d_sae_section(rounds: int) -> dict[str, Any]:
    batches, steps, against = random_batches(), {}, {}
    for d_sae in (1024, 2048, 4096, 8192, 16384):
        floor = f"the five products, d_sae {d_sae:,}"
        steps[floor] = products(d_sae)["the five products"]
        for architecture in ("standard", "topk"):
            name = f"{architecture}, d_sae {d_sae:,}"
            steps[name] = ours(batches, overrides(architecture, f"sae.d_sae={d_sae}"))
            against[name] = floor
    return {"rows": summary(take_turns(steps, rounds), against)}


def window_section(rounds: int) -> dict[str, Any]:
    batches, steps, against = random_batches(), {}, {}
    for architecture in ARCHITECTURES:
        alone = f"{architecture}, no temporal loss"
        steps[alone] = ours(batches, overrides(architecture, "consistency=none"))
        for window in (2, 4, 8, 16, 32, 64, "document"):
            name = f"{architecture}, window {window}"
            steps[name] = ours(batches, overrides(architecture, f"window={window}"))
            against[name] = alone
    return {"rows": summary(take_turns(steps, rounds), against)}


def forms_section(rounds: int) -> dict[str, Any]:
    """What the fair form and its position term add to a step with the first form."""
    batches, steps, against = random_batches(), {}, {}
    first, fair = "consistency.variance_over=positions", "consistency.variance_over=windows"
    for architecture in ARCHITECTURES:
        for window in (2, 8, 64):
            name = f"{architecture}, window {window}"
            for title, keys in (
                ("first form", (first, "consistency.position_weight=0")),
                ("over windows", (fair, "consistency.position_weight=0")),
                ("over windows, position term", (fair, "consistency.position_weight=1")),
            ):
                given = overrides(architecture, f"window={window}", *keys)
                steps[f"{name}, {title}"] = ours(batches, given)
                if title != "first form":
                    against[f"{name}, {title}"] = f"{name}, first form"
    return {"rows": summary(take_turns(steps, rounds), against)}


def bank_section(rounds: int) -> dict[str, Any]:
    batches, steps = random_batches(), {}
    sizes = {f"topk, {n} in a bank": n for n in (1, 2, 4, 8, 16)}
    for name, size in sizes.items():
        steps[name] = ours(batches, overrides("topk"), size)
    times = take_turns(steps, rounds)
    one = "topk, 1 in a bank"
    each = {name: [t / sizes[name] for t in taken] for name, taken in times.items()}
    return {"rows": summary(each, dict.fromkeys(sizes, one))}


def harvest_section(rounds: int) -> dict[str, Any]:
    times = take_turns(bench_data.harvest_steps(), rounds, warm_up=1)
    return {"rows": summary(times, {bench_data.OURS: bench_data.BARE})}


def evaluation_section(rounds: int) -> dict[str, Any]:
    times = take_turns(bench_data.evaluation_steps(), rounds, warm_up=1)
    return {"rows": summary(times, {bench_data.SUITE: bench_data.PASS})}


def startup_section(rounds: int) -> dict[str, Any]:
    with bench_data.startup_steps() as steps:
        return {"rows": summary(take_turns(steps, rounds, warm_up=1), {})}


SECTIONS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "steps": (f"One step of {TOKENS:,} tokens, d_sae {D_SAE:,}", steps_section),
    "window": ("The temporal loss by window", window_section),
    "forms": ("The fair loss beside its first form", forms_section),
    "tokens": ("More tokens a step", tokens_section),
    "d_sae": ("A wider dictionary", d_sae_section),
    "bank": ("More SAEs on one stream: time for each of them", bank_section),
    "harvest": ("Harvesting activations", harvest_section),
    "evaluation": ("Measuring an SAE on held-out contexts", evaluation_section),
    "startup": ("How soon training starts", startup_section),
    "store": ("A larger store: reading shuffled batches", bench_data.store_section),
}


# ------------------------------------------------------------------------------ the page


def machine() -> str:
    name = cpuinfo().get("model name", platform.processor() or platform.machine())
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{name}, {cores} cores, {threads} threads, torch {torch.__version__}"


def n_tokens(name: str) -> int:
    """How many tokens the step of that name takes."""
    digits = name.rpartition(", ")[2].removesuffix(" tokens").replace(",", "")
    return int(digits) if name.endswith(" tokens") else TOKENS


TABLES = {"startup": bench_data.startup_table, "store": bench_data.store_table}  # others: `table`
HEADER = "| step | ms | least ms | tokens/s | times as long | as |\n|---|---|---|---|---|---|"


def table(rows: Mapping[str, Any]) -> str:
    lines = [HEADER]
    for name, row in rows.items():
        rate = 1000 * n_tokens(name) / row["ms"]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        digits = -int(math.floor(math.log10(rate))) + 2
        lines.append(
            f"| {name} | {row['ms']:.1f} | {row['least_ms']:.1f} | {round(rate, digits):,.0f} "
            f"| {ratio} | {row.get('against', '')} |"
        )
    return "\n".join(lines)


def page_part(results: Mapping[str, Any]) -> str:
    """What stands between the markers of the page."""
    parts = []
    for key, (title, _) in SECTIONS.items():
        if key not in results:
            continue
        found = results[key]
        about = f"{found['machine']}; medians of {found['rounds']}."
        parts += [f"## {title}", about, TABLES.get(key, table)(found["rows"])]
        if found.get("missing"):
            parts.append("Left out: " + "; ".join(found["missing"]) + ".")
    return "\n\n".join(parts)


def write_page(results: Mapping[str, Any]) -> None:
    replace_block(PAGE, block("bench", page_part(results)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9, help="7 or more")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--default-allocator", action="store_true", help="without base/allocator.py"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    if not args.page:
        if not args.default_allocator:
            keep_large_blocks()
        for key in args.sections:
            results[key] = SECTIONS[key][1](args.rounds)
            results[key] |= {"machine": machine(), "rounds": args.rounds}
            args.json.write_text(json.dumps(results, indent=1) + "\n")
            print(TABLES.get(key, table)(results[key]["rows"]), flush=True)
    if args.json == RESULTS:
        write_page(results)


if __name__ == "__main__":
    main()
