"""Ours beside SAELens' own trainer: the same activations, order, steps and sparsity.

    python scripts/compare_peers.py --architectures topk gated [--tokens 1000000] [key=value ...]

Both trainers take the same batches (the valid tokens, scaled as ours), learning rates, warm-ups
and precision, and start as each does by default. They take turns, so that their times compare. Each
is then saved, loaded again (SAELens' by SAELens), and measured on the same held-out contexts:
explained variance and L0, over valid tokens. Where a coefficient sets the L0, ours is trained again
with others until it is near the peer's L0; where a threshold does, it is moved. What is compared is
the explained variance at the peer's L0, interpolated linearly in log L0 between our nearest two.
Writes a row an architecture to --out (JSON) and prints the table. Further arguments are overrides
of conf/.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.config import Config, parse
from tcsae.data.store import shuffled_indices
from tcsae.data.stream import Stream, open_stream
from tcsae.memory import keep_large_blocks
from tcsae.sae.base import SparseAutoencoder
from tcsae.signals import StopRequest
from tcsae.train import conf_folder, numbers
from tcsae.training.member import Member

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")
COEFFICIENT = {
    "standard": "l1_coefficient",
    "gated": "l1_coefficient",
    "jumprelu": "l0_coefficient",
}
PEER_CLASSES = {
    "standard": "StandardTrainingSAE",
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
    "gated": "GatedTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}
TURN = 10  # steps before the other trainer goes on


class Measured(NamedTuple):
    """Of one trained SAE, on the held-out contexts."""

    explained_variance: float
    l0: float
    dead_share: float
    """Features that fire at no held-out token."""


def composed(overrides: list[str]) -> Config:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    numbers.install()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        container = OmegaConf.to_container(compose("train", overrides), resolve=True)
    return parse(container)  # type: ignore[arg-type]


def new_member(config: Config, stream: Stream) -> Member:
    bfloat16 = config.training.precision == "bfloat16"
    calibration = stream.train.calibration
    return Member(config, stream.model.d_in, calibration, "cpu", bfloat16)


def batches(config: Config, stream: Stream) -> Iterator[Any]:
    size = config.training.batch_contexts
    for step in range(config.steps):
        indices = shuffled_indices(step, size, len(stream.train), config.dataset.seed)
        yield stream.train.batch(indices)


# ------------------------------------------------------------------------------ the peer


def peer_sae(config: Config, d_in: int, steps: int, options: dict[str, Any]) -> Any:
    """SAELens' training SAE of the same architecture; `options` go over what is set here."""
    from sae_lens import saes

    cfg: Any = config.sae
    root, warm_up = math.sqrt(d_in), round(config.training.sparsity_warmup * steps)
    name, chosen = PEER_CLASSES[cfg.architecture], {}
    if cfg.architecture in ("standard", "gated"):
        chosen = {"l1_coefficient": cfg.l1_coefficient * root, "l1_warm_up_steps": warm_up}
    elif cfg.architecture == "jumprelu":
        chosen = {
            "l0_coefficient": cfg.l0_coefficient * d_in,
            "l0_warm_up_steps": warm_up,
            "jumprelu_sparsity_loss_mode": cfg.penalty,
        }
        if cfg.penalty == "tanh":
            chosen |= {
                "jumprelu_tanh_scale": cfg.tanh_scale / root,
                "jumprelu_bandwidth": cfg.bandwidth * root,
                "jumprelu_init_threshold": cfg.initial_threshold * root,
                "pre_act_loss_coefficient": cfg.preact_coefficient * root,
                "jumprelu_ste_to_input": True,
            }
    else:
        chosen = {"k": cfg.k}
    if cfg.architecture == "matryoshka":
        chosen["matryoshka_widths"] = torch.tensor(cfg.group_sizes).cumsum(0).tolist()
    peer_cfg = getattr(saes, f"{name}Config")
    return getattr(saes, name)(peer_cfg(d_in=d_in, d_sae=cfg.d_sae, **{**chosen, **options}))


def peer_trainer(config: Config, d_in: int, lr: float, options: dict[str, Any]) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    training, steps = config.training, config.steps
    per_step = training.batch_contexts * config.dataset.context_size
    cfg = SAETrainerConfig(
        total_training_samples=steps * per_step,
        train_batch_size_samples=per_step,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=round(training.lr_warmup * steps),
        lr_decay_steps=round(training.lr_decay * steps),
        adam_beta1=training.adam_betas[0],
        adam_beta2=training.adam_betas[1],
        autocast=training.precision == "bfloat16",
        dead_feature_window=math.ceil(config.sae.dead_after_tokens / per_step),
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(config.seed)
    return SAETrainer(cfg, peer_sae(config, d_in, steps, options), data_provider=iter(()))


def peer_inference(trainer: Any) -> Any:
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as folder:
        trainer.sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


# ------------------------------------------------------------------------------ the comparison


@torch.no_grad()
def measure(encode: Callable[[Tensor], Tensor], decode: Any, stream: Stream) -> Measured:
    """On raw held-out activations; `encode` and `decode` take and give them."""
    tokens = torch.cat([b.x[b.valid].float() for b in stream.evaluation.in_order(32)])
    variance = (tokens - tokens.mean(0)).square().sum()
    error, fired, firings = 0.0, torch.zeros((), dtype=torch.bool), 0
    for x_ND in tokens.split(4096):
        features_NF = encode(x_ND)
        error += (decode(features_NF) - x_ND).square().sum().item()
        on_NF = features_NF > 0
        firings += int(on_NF.sum())
        fired = fired | on_NF.any(0)
    dead = 1 - fired.float().mean().item()
    return Measured(1 - error / variance.item(), firings / len(tokens), dead)


def measure_ours(sae: SparseAutoencoder, stream: Stream) -> Measured:
    return measure(sae.encode, sae.decode, stream)


def side_by_side(
    config: Config, stream: Stream, peer_lr: float, options: dict[str, Any]
) -> tuple[Member, Any, dict[str, float]]:
    """Both trained to the end, and the milliseconds a step of each."""
    member = new_member(config, stream)
    trainer = peer_trainer(config, stream.model.d_in, peer_lr, options)
    seconds = {"ours": 0.0, "peer": 0.0}
    turn: list[Any] = []

    def take_turns() -> None:
        started = time.perf_counter()
        for batch in turn:
            member.train_step(batch, batch.x.float() * member.scale, log=False)
        between = time.perf_counter()
        for batch in turn:
            trainer.step(batch.x[batch.valid].float() * member.scale)
            trainer.n_training_steps += 1
        seconds["ours"] += between - started
        seconds["peer"] += time.perf_counter() - between
        turn.clear()

    for batch in batches(config, stream):
        turn.append(batch)
        if len(turn) == TURN:
            take_turns()
    take_turns()
    return member, trainer, {k: 1000 * v / config.steps for k, v in seconds.items()}


def train_ours(config: Config, stream: Stream) -> SparseAutoencoder:
    member = new_member(config, stream)
    for batch in batches(config, stream):
        member.train_step(batch, batch.x.float() * member.scale, log=False)
    return member.finished_sae()


def at_other_thresholds(sae: Any, stream: Stream, l0: float) -> list[Measured]:
    """`sae` with its threshold moved until its L0 is near the wanted one."""
    found, factor = [], 1.0
    first = sae.threshold.clone()
    for _ in range(4):
        sae.threshold.copy_(first * factor)
        found.append(measure_ours(sae, stream))
        factor *= (found[-1].l0 / l0) ** 0.4
    return found


def at_other_coefficients(
    config: Config, first: Measured, stream: Stream, l0: float, tries: int
) -> list[Measured]:
    """Trained again with other coefficients, `tries` times at most, towards the wanted L0."""
    name = COEFFICIENT[config.sae.architecture]
    tried = [(math.log(getattr(config.sae, name)), first)]
    for _ in range(tries):
        if abs(math.log(tried[-1][1].l0 / l0)) < 0.02:
            break
        slope = -1.0
        if len(tried) > 1:
            (c0, m0), (c1, m1) = tried[-2:]
            slope = min(math.log(m1.l0 / m0.l0) / (c1 - c0), -0.3)
        last, measured = tried[-1]
        coefficient = last + math.log(l0 / measured.l0) / slope
        changed = config.sae.model_copy(update={name: math.exp(coefficient)})
        sae = train_ours(config.model_copy(update={"sae": changed}), stream)
        tried.append((coefficient, measure_ours(sae, stream)))
        print(f"  {name} {math.exp(coefficient):.4g}: {tried[-1][1]}", flush=True)
    return [measured for _, measured in tried]


def interpolated(measured: list[Measured], l0: float) -> float | None:
    """Explained variance at `l0`, linear in log L0 between the nearest two on either side.

    The nearest one alone where it is within 2 %; None where all are on one side of `l0`.
    """
    distance = {m: math.log(m.l0 / l0) for m in measured}
    below = [m for m in measured if distance[m] <= 0]
    above = [m for m in measured if distance[m] > 0]
    if not below or not above:
        nearest = min(measured, key=lambda m: abs(distance[m]))
        return nearest.explained_variance if abs(distance[nearest]) < 0.02 else None
    a, b = max(below, key=distance.__getitem__), min(above, key=distance.__getitem__)
    share = -distance[a] / (distance[b] - distance[a])
    return a.explained_variance + share * (b.explained_variance - a.explained_variance)


def compare(
    config: Config, stream: Stream, peer_lr: float, options: dict[str, Any], tries: int
) -> dict[str, Any]:
    member, trainer, milliseconds = side_by_side(config, stream, peer_lr, options)
    theirs, scale = peer_inference(trainer), member.scale
    peer = measure(lambda x: theirs.encode(x * scale), lambda f: theirs.decode(f) / scale, stream)
    sae = member.finished_sae()
    ours = measure_ours(sae, stream)
    print(f"{config.sae.architecture}: peer {peer}\n  ours {ours}", flush=True)
    measured = [ours]
    if config.sae.architecture in COEFFICIENT:
        measured = at_other_coefficients(config, ours, stream, peer.l0, tries)
    elif config.sae.architecture != "topk":
        measured = [ours, *at_other_thresholds(sae, stream, peer.l0)]
    matched = interpolated(measured, peer.l0)
    return {
        "architecture": config.sae.architecture,
        "penalty": getattr(config.sae, "penalty", None),
        "steps": config.steps,
        "tokens_per_step": config.training.batch_contexts * config.dataset.context_size,
        "lr": config.training.lr,
        "peer_lr": peer_lr,
        "peer_options": options,
        "peer": peer._asdict(),
        "ours": [m._asdict() for m in measured],
        "ours_at_peer_l0": matched,
        "difference": None if matched is None else matched - peer.explained_variance,
        "milliseconds_per_step": milliseconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| architecture | steps | lr | L0 | EV, SAELens | EV, ours | difference "
        "| ms a step, SAELens | ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["architecture"] + (f" ({row['penalty']})" if row["penalty"] else "")
        ms = row["milliseconds_per_step"]
        ours, difference = "none near", ""
        if row["difference"] is not None:
            ours, difference = f"{row['ours_at_peer_l0']:.4f}", f"{row['difference']:+.4f}"
        lines.append(
            f"| {name} | {row['steps']} | {row['lr']:g} | {row['peer']['l0']:.1f} "
            f"| {row['peer']['explained_variance']:.4f} | {ours} | {difference} "
            f"| {ms['peer']:.0f} | {ms['ours']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    arguments.add_argument("--tokens", type=int, default=1_000_000)
    arguments.add_argument("--batch-contexts", type=int, default=16)
    arguments.add_argument("--d-sae", type=int, default=2304)
    arguments.add_argument("--peer-lr", type=float, default=None, help="default: ours")
    arguments.add_argument(
        "--peer", nargs="*", default=[], metavar="KEY=VALUE", help="SAELens' options, in JSON"
    )
    arguments.add_argument("--tries", type=int, default=3, help="further coefficients of ours")
    arguments.add_argument("--float32", action="store_true", help="default: bfloat16 products")
    arguments.add_argument("--out", type=Path, default=Path("compare_peers.json"))
    args, overrides = arguments.parse_known_args()
    keep_large_blocks()
    options = {k: json.loads(v) for k, _, v in (pair.partition("=") for pair in args.peer)}
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    for name in args.architectures:
        config = composed(
            [
                f"sae={name}",
                f"sae.d_sae={args.d_sae}",
                "consistency=none",
                f"training.tokens={args.tokens}",
                f"training.batch_contexts={args.batch_contexts}",
                f"training.precision={'float32' if args.float32 else 'bfloat16'}",
                *overrides,
            ]
        )
        stream = open_stream(config, StopRequest())
        peer_lr = config.training.lr if args.peer_lr is None else args.peer_lr
        rows.append(compare(config, stream, peer_lr, options, args.tries))
        args.out.write_text(json.dumps(rows, indent=1))
        print(table(rows[-1:]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
