"""Ours beside SAELens' and dictionary_learning's own trainers: the same batches, steps and L0.

    pip install --no-deps dictionary-learning==0.1.0 einops
    python scripts/compare_peers.py [--architectures topk] [--arms ours saelens] [key=value ...]

Every arm is a trainer with its own start and its own losses, given the same batches (the valid
tokens), steps, warm-up, decay and precision. Each is trained at every rate of --rates by the first
seed, and at the best of them by the other seeds. Each SAE is then saved in its own format, loaded
again and measured by one evaluator, ours, on the same held-out contexts, at the same L0: that of a
TopK SAE is k, the thresholds of the others are multiplied by what makes it so (L0 before that is
in the table). Every run goes into --out as it ends, and is not repeated: call it again, or twice at
once with other --arms, for the rest. Then the table in --page is written. --page-only: from what
--out has. Further arguments are overrides of conf/.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pages import block, processor, replace_block
from torch import Tensor

from tcsae.base.allocator import keep_large_blocks
from tcsae.base.files import locked, read_json, write_json
from tcsae.base.labels import markdown_table
from tcsae.base.signals import StopRequest
from tcsae.config import Config
from tcsae.config.compose import config_of
from tcsae.data.batches import shuffled_indices
from tcsae.data.devices import bfloat16_is_native
from tcsae.data.stream import Stream, open_stream
from tcsae.measure.evaluation import on_the_model
from tcsae.metrics.reconstruction import ReconstructionMetrics
from tcsae.runs.folder import load_sae
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.statistics import geometric_median
from tcsae.training.member import Member

DOCS = Path(__file__).resolve().parent.parent / "docs"
L0 = 32
ARCHITECTURES = ("topk", "batchtopk", "jumprelu")
ARMS = {
    "ours": "ours",
    "saelens": "SAELens as it starts (b_dec 0)",
    "saelens_b_dec": "SAELens with our start of b_dec",
    "dl_1": "dictionary_learning, inputs of norm 1",
    "dl_sqrt": "dictionary_learning, inputs of norm sqrt(d_in)",
}
PEER_CLASSES = {
    "standard": "StandardTrainingSAE",
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
    "gated": "GatedTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}
Run = dict[str, Any]
Job = tuple[str, str, float, int]
"""Architecture, arm, learning rate, seed."""


def in_bfloat16(config: Config) -> bool:
    wanted = config.training.precision
    return bfloat16_is_native("cpu") if wanted == "auto" else wanted == "bfloat16"


def new_member(config: Config, stream: Stream) -> Member:
    calibration = stream.train.calibration
    return Member(config, stream.model.d_in, calibration, "cpu", in_bfloat16(config))


def batches(config: Config, stream: Stream) -> Iterator[Any]:
    size = config.training.batch_contexts
    for step in range(config.steps):
        indices = shuffled_indices(step, size, len(stream.train), config.dataset.seed)
        yield stream.train.batch(indices)


# ------------------------------------------------------------------------------ SAELens


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
        autocast=in_bfloat16(config),
        dead_feature_window=math.ceil(config.sae.dead_after_tokens / per_step),
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(config.seed)
    return SAETrainer(cfg, peer_sae(config, d_in, steps, options), data_provider=iter(()))


def saelens(config: Config, stream: Stream, folder: Path, with_b_dec: bool) -> float:
    """Trained and saved into `folder`; returns what its inputs were multiplied by."""
    calibration, d_in = stream.train.calibration, stream.model.d_in
    scale = math.sqrt(d_in) / calibration.median_norm
    trainer = peer_trainer(config, d_in, config.training.lr, {})
    if with_b_dec:
        trainer.sae.b_dec.data.copy_(geometric_median(calibration.sample * scale))
    for batch in batches(config, stream):
        trainer.step(batch.x[batch.valid].float() * scale)
        trainer.n_training_steps += 1
    trainer.sae.save_inference_model(str(folder))
    return scale


# ------------------------------------------------------------------------------ dictionary_learning


def without_nnsight() -> None:
    """Its package imports nnsight for buffers that nothing here uses; a stand-in is enough."""
    try:
        import nnsight  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = None  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stand_in


def dl_trainer(config: Config, d_in: int) -> Any:
    without_nnsight()
    from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, TopKTrainer

    cfg, training, steps = config.sae, config.training, config.steps
    own: dict[str, tuple[Any, dict[str, Any]]] = {
        # Its thresholds are averaged from here on; at their default no step of a short run counts.
        "topk": (TopKTrainer, {"k": L0, "threshold_start_step": steps // 2}),
        "batchtopk": (BatchTopKTrainer, {"k": L0, "threshold_start_step": steps // 2}),
        "jumprelu": (
            JumpReluTrainer,
            {
                "target_l0": float(L0),
                "sparsity_warmup_steps": round(training.sparsity_warmup * steps),
            },
        ),
    }
    kind, options = own[cfg.architecture]
    return kind(
        steps=steps,
        activation_dim=d_in,
        dict_size=cfg.d_sae,
        layer=0,
        lm_name="none",
        lr=training.lr,
        warmup_steps=round(training.lr_warmup * steps),
        decay_start=steps - round(training.lr_decay * steps),
        seed=config.seed,
        device="cpu",
        **options,
    )


def dictionary_learning(config: Config, stream: Stream, folder: Path, norm: float) -> float:
    """As `saelens`, on inputs of median norm `norm`."""
    scale = norm / stream.train.calibration.median_norm
    torch.manual_seed(config.seed)
    trainer = dl_trainer(config, stream.model.d_in)
    bfloat16 = in_bfloat16(config)
    for step, batch in enumerate(batches(config, stream)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            trainer.update(step, batch.x[batch.valid].float() * scale)
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))
    return scale


# ------------------------------------------------------------------------------ the comparison


def ours(config: Config, stream: Stream) -> SparseAutoencoder:
    member = new_member(config, stream)
    for batch in batches(config, stream):
        member.train_step(batch, batch.x.float() * member.scale, log=False)
    return member.finished_sae()


def trained(arm: str, config: Config, stream: Stream) -> SparseAutoencoder:
    """On raw activations."""
    if arm == "ours":
        return ours(config, stream)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arm.startswith("saelens"):
            scale = saelens(config, stream, folder, arm == "saelens_b_dec")
        else:
            norm = 1.0 if arm == "dl_1" else math.sqrt(stream.model.d_in)
            scale = dictionary_learning(config, stream, folder, norm)
        sae = load_sae(folder)
    sae.fold_input_scale(scale)
    return sae


def multiplied(sae: Any, factor: float) -> None:
    """Its thresholds times `factor`."""
    (sae.scaled_threshold if hasattr(sae, "scaled_threshold") else sae.threshold).mul_(factor)


@torch.no_grad()
def move_thresholds(sae: Any, x_ND: Tensor, l0: float) -> float:
    """To where `l0` features fire on a token of `x_ND`, on average; returns the L0 before."""
    pre_NF = torch.cat([sae.pre_activations(x - sae.b_dec) for x in x_ND.split(4096)])
    if not bool(sae.threshold.any()):
        raise SystemExit("all thresholds are 0: no factor changes how many features fire")

    def found(factor: float) -> float:
        return int((pre_NF > sae.threshold * factor).sum()) / len(pre_NF)

    before, low, high = found(1.0), 1e-3, 1e3
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if found(middle) > l0 else (low, middle)
    multiplied(sae, high)
    return before


@torch.no_grad()
def measured(sae: SparseAutoencoder, config: Config, stream: Stream) -> Run:
    """At L0, on all held-out contexts; cross-entropy on evaluation.model_contexts of them."""
    tokens = torch.cat([b.x[b.valid].float() for b in stream.evaluation.in_order(32)])
    before = move_thresholds(sae, tokens, L0) if hasattr(sae, "threshold") else float(L0)
    metrics = ReconstructionMetrics(sae.d_in, sae.d_sae)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for batch in stream.evaluation.in_order(16):
        x = batch.x.float()
        features, x_hat = sae.encode_and_decode(x)
        metrics.update(x, x_hat, features, valid=batch.valid)
        fired |= (features[batch.valid] > 0).any(0)
    found = metrics.compute()
    model = on_the_model([sae], config, stream.model, stream.evaluation, StopRequest())[0]
    return {
        "explained_variance": found["explained_variance"],
        "l0": found["l0"],
        "l0_as_trained": before,
        "live": fired.float().mean().item(),
        "ce_score": model.compute()["ce_loss_score"],
    }


# ------------------------------------------------------------------------------ what there is


def key(run: Run) -> Job:
    return run["architecture"], run["arm"], run["lr"], run["seed"]


def best_rate(runs: list[Run], architecture: str, arm: str, seed: int = 0) -> float | None:
    """By explained variance; None where nothing was measured."""
    own = [r for r in runs if (r["architecture"], r["arm"]) == (architecture, arm)]
    of_seed = {r["explained_variance"]: r["lr"] for r in own if r["seed"] == seed}
    return of_seed[max(of_seed)] if of_seed else None


def recorded(out: Path, setting: dict[str, Any], run: Run | None = None) -> list[Run]:
    """The runs in `out`, with `run` added; another process may write there too."""
    with locked(out.with_suffix(".lock"), lambda: None):
        found: dict[str, Any] = {"setting": setting, "runs": []}
        if out.is_file():
            found = read_json(out)
        differs = {k for k, v in setting.items() if found["setting"].get(k) != v}
        if differs:
            raise SystemExit(f"{out} has another {', '.join(sorted(differs))}: take another --out")
        if run is not None:
            found["runs"] = sorted([*found["runs"], run], key=key)
            write_json(out, found)
    return list(found["runs"])


def setting_of(config: Config) -> dict[str, Any]:
    bfloat16 = in_bfloat16(config)
    return {
        "model": config.model.name,
        "dataset": config.dataset.model_dump(mode="json"),
        "d_sae": config.sae.d_sae,
        "steps": config.steps,
        "tokens_per_step": config.training.batch_contexts * config.dataset.context_size,
        "precision": "bfloat16" if bfloat16 else "float32",
        "model_contexts": config.evaluation.model_contexts,
        "processor": processor(),
        "saelens": version("sae-lens"),
    }


# ------------------------------------------------------------------------------ the page


def table(runs: list[Run]) -> str:
    rows = []
    for architecture in dict.fromkeys(r["architecture"] for r in runs):
        for arm, title in ARMS.items():
            rate = best_rate(runs, architecture, arm)
            if rate is None:
                continue
            own = [r for r in runs if (r["architecture"], r["arm"]) == (architecture, arm)]
            tried = ", ".join(f"{r['lr']:g}" for r in own if r["seed"] == 0)
            best = [r for r in own if r["lr"] == rate]
            rows.append([architecture, title, tried, f"{rate:g}", *_figures(best)])
    header = ["", "trainer", "rates tried", "best", "seeds", "explained variance", "CE score",
              "live", "L0 as trained"]  # fmt: skip
    return markdown_table(header, rows)


def _figures(best: list[Run]) -> list[str]:
    def of(name: str, digits: int) -> str:
        return ", ".join(f"{r[name]:.{digits}f}" for r in best)

    columns = (("explained_variance", 4), ("ce_score", 4), ("live", 3), ("l0_as_trained", 1))
    return [str(len(best)), *(of(name, digits) for name, digits in columns)]


def sentences(runs: list[Run]) -> list[str]:
    """Ours beside the best peer, each at its best rate: the mean over the seeds that both have."""
    said = []
    for architecture in dict.fromkeys(r["architecture"] for r in runs):
        means: dict[str, float] = {}
        for arm in ARMS:
            rate = best_rate(runs, architecture, arm)
            chosen = [r for r in runs if key(r)[:3] == (architecture, arm, rate)]
            if chosen:
                means[arm] = sum(r["explained_variance"] for r in chosen) / len(chosen)
        peers = {arm: mean for arm, mean in means.items() if arm != "ours"}
        if "ours" in means and peers:
            best = max(peers, key=peers.__getitem__)
            said.append(
                f"{architecture}: ours {means['ours'] - peers[best]:+.4f} beside the best peer, "
                f"{ARMS[best]}."
            )
    return said


def page_block(found: dict[str, Any]) -> str:
    s, data = found["setting"], found["setting"]["dataset"]
    intro = (
        f"{s['model']}, {data['name']}, norm limit {data['norm_filter']:g}; d_sae {s['d_sae']}, L0 "
        f"{L0}, {s['steps']} steps of {s['tokens_per_step']} tokens, {s['precision']}, on "
        f"{s['processor']}; SAELens {s['saelens']}, dictionary_learning 0.1.0. Two numbers: two "
        "seeds. The best rate is by the first seed."
    )
    parts = [intro, "", table(found["runs"]), "", *sentences(found["runs"])]
    return block("peers", "\n".join(parts))


def write_page(page: Path, found: dict[str, Any]) -> None:
    replace_block(page, page_block(found))


# ------------------------------------------------------------------------------ the command


def jobs(args: argparse.Namespace, runs: Callable[[], list[Run]]) -> Iterator[Job]:
    """One after the other: which the later ones are depends on what the earlier ones found."""
    for architecture in args.architectures:
        for arm in args.arms:
            for rate in args.rates:
                yield architecture, arm, rate, 0
            best = best_rate(runs(), architecture, arm)
            for seed in range(1, args.seeds):
                assert best is not None
                yield architecture, arm, best, seed


def job_config(args: argparse.Namespace, overrides: list[str], job: Job) -> Config:
    architecture, _, rate, seed = job
    steered = ["training.target_l0=32"] if architecture == "jumprelu" else [f"sae.k={L0}"]
    return config_of(
        *[
            f"sae={architecture}",
            "consistency=none",
            "lambda=0",
            f"training.tokens={args.tokens}",
            f"training.batch_contexts={args.batch_contexts}",
            f"training.lr={rate}",
            f"seed={seed}",
            "evaluation.model_contexts=8",
            *steered,
            *overrides,
        ]
    )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 6e-3])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--batch-contexts", type=int, default=16)
    parser.add_argument("--out", type=Path, default=DOCS / "peers.json")
    parser.add_argument("--page", type=Path, default=DOCS / "architectures.md")
    parser.add_argument("--page-only", action="store_true")
    return parser


def main() -> None:
    args, overrides = arguments().parse_known_args()
    if args.page_only:
        return write_page(args.page, read_json(args.out))
    keep_large_blocks()
    first = job_config(args, overrides, (args.architectures[0], args.arms[0], args.rates[0], 0))
    setting, stream = setting_of(first), open_stream(first, StopRequest())
    for job in jobs(args, lambda: recorded(args.out, setting)):
        if job in map(key, recorded(args.out, setting)):
            continue
        config = job_config(args, overrides, job)
        found = measured(trained(job[1], config, stream), config, stream)
        names = ("architecture", "arm", "lr", "seed")
        run = {**dict(zip(names, job, strict=True)), **found}
        recorded(args.out, setting, run)
        print(run, flush=True)
    write_page(args.page, read_json(args.out))


if __name__ == "__main__":
    main()
