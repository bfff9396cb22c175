"""How a run's SAE came to be, in words: trained by the run, or loaded from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tcsae.base.labels import number
from tcsae.config import Config, LoadedConfig
from tcsae.runs.folder import LoadedRun

FAR_OFF = 0.1
"""How far from the wanted L0, as a share of it, a run may end without a caution."""


@dataclass(frozen=True)
class Origin:
    """What the page and the notes of a run say of it."""

    trained: bool
    """Whether there is a course of training to show."""
    lead: str
    rows: list[tuple[str, str]]
    """Names and values, for a table."""
    time: str
    cautions: list[str]
    """What to keep in mind when reading the results."""
    missed: str | None = None
    """What the training was to reach and did not; the first of the cautions."""


def origin(run: LoadedRun) -> Origin:
    if isinstance(run.config, LoadedConfig):
        return _loaded(run.config, run.final_info)
    return _trained(run.config, run.final_info)


def _trained(config: Config, info: dict[str, Any]) -> Origin:
    form = config.consistency.label
    said = form
    if config.consistency.shuffle_positions:
        form += " (positions shuffled)"
        said += ", on positions shuffled within their document (the control)"
    loss = f"window {config.window}, lambda {config.lambda_:g}"
    steps, tokens = (f"{info[name]:,}" for name in ("training_steps", "tokens"))
    rate = f"{info['tokens_per_second']:,.0f} tokens/s"
    missed = missed_l0(config, info["metrics"]["sparsity"]["l0"])
    cautions = [missed] if missed else []
    cautions += [
        "One run, one seed: the intervals are about the choice of held-out contexts, not about "
        "another seed or another text."
    ]
    if config.lambda_ and config.consistency.form != "none":
        cautions.append(
            "Whether the temporal loss changed anything is not in these numbers: compare with a "
            "run of lambda=0 and otherwise the same settings (python -m tcsae.compare), and with "
            "consistency=shuffled, which keeps the loss and takes away the order."
        )
    return Origin(
        trained=True,
        lead=f"consistency {form}, {loss}; {tokens} tokens in {steps} steps, seed {config.seed}",
        rows=[
            ("temporal loss", f"{said}; window {config.window}; lambda {config.lambda_:g}"),
            (
                "training",
                f"{steps} steps, {tokens} tokens, learning rate {config.training.lr:g}, "
                f"seed {config.seed}",
            ),
            ("last loss", number(info["final_loss"])),
            (
                "time",
                f"{info['training_seconds']:.0f} s of training, {rate}; "
                f"{info['wall_seconds']:.0f} s in all",
            ),
        ],
        time=f"Trained for {number(info['training_seconds'])} s "
        f"({number(info['tokens_per_second'])} tokens/s), {number(info['wall_seconds'])} s in all.",
        cautions=cautions,
        missed=missed,
    )


def missed_l0(config: Config, l0: float | None) -> str | None:
    """In words, that `l0` on held-out text is not what training.target_l0 asked for."""
    target = config.training.target_l0
    if target is None or l0 is None or abs(l0 / target - 1) <= FAR_OFF:
        return None
    return (
        f"L0 is {number(l0)} where training.target_l0 = {target:g} was asked for: the steering had "
        "not got there when training ended. Compare at the L0 that was reached, or train longer "
        "(training.tokens), or start nearer to it (sae.l1_coefficient, sae.l0_coefficient)."
    )


def _loaded(config: LoadedConfig, info: dict[str, Any]) -> Origin:
    source = config.source
    what = f"{source.library}, {source.architecture}"
    return Origin(
        trained=False,
        lead=f"loaded from {source.folder} ({what}), not trained here",
        rows=[
            ("loaded from", f"{source.folder} ({what})"),
            ("made for", source.made_for or "it does not say"),
            ("its weights", f"sha256 {source.sha256}"),
            ("training", "not by this run"),
            ("time", f"{info['wall_seconds']:.0f} s in all"),
        ],
        time=f"Measured in {number(info['wall_seconds'])} s.",
        cautions=[
            "The SAE was loaded, and on which text it was trained is not known here: held-out text "
            "may be text that it has seen. The intervals are about the choice of contexts.",
            *source.cautions,
        ],
    )
