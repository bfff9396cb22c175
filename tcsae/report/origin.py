"""How a run's SAE came to be, in words: trained by the run, or loaded from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tcsae.base.labels import number
from tcsae.config import Config, LoadedConfig
from tcsae.runs.folder import LoadedRun

FAR_OFF = 0.1
"""How far from the wanted L0, as a share of it, a run may end without a caution."""
FEW_IN_WINDOWS = 0.5
"""Share of the tokens in windows below which the temporal loss says little of the text."""
MANY_SEEN = 0.01
"""Share of the held-out contexts that may have been trained on without a caution."""


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
    first: list[str]
    """Those of the cautions that stand before any number: they are of this run alone."""


def origin(run: LoadedRun) -> Origin:
    if isinstance(run.config, LoadedConfig):
        return _loaded(run.config, run.final_info)
    return _trained(run.config, run.final_info)


def _trained(config: Config, info: dict[str, Any]) -> Origin:
    form = config.loss_words
    said = form
    if config.consistency.shuffle_positions:
        form += " (positions shuffled)"
        said += ", on positions shuffled within their document (the control)"
    loss = f"window {config.window}, lambda {config.lambda_:g}"
    means = config.averaged
    of_means = [("trained on", f"{means}; measured on single tokens")] if means else []
    steps, tokens = (f"{info[name]:,}" for name in ("training_steps", "tokens"))
    rate = f"{info['tokens_per_second']:,.0f} tokens/s"
    missed = missed_l0(config, info["metrics"]["sparsity"]["l0"])
    in_windows = info.get("tokens_in_windows")  # not in folders of older versions
    seen = info.get("held_out_seen_in_training")
    few = few_in_windows(config, in_windows)
    thin = too_few_tokens(info["tokens"], info["dict_size"])
    of_tokens = not_of_tokens(config)
    first = [said for said in (of_tokens, missed, few, seen_in_training(seen), thin) if said]
    first += misleading(info["metrics"])
    cautions = [
        *first,
        "One run, one seed: the intervals are about the choice of held-out contexts, not about "
        "another seed or another text.",
    ]
    if config.lambda_ and config.consistency.form != "none":
        cautions.append(
            "Whether the temporal loss changed anything is not in these numbers: compare with a "
            "run of lambda=0 and otherwise the same settings (python -m tcsae.compare), and with "
            "consistency=shuffled, which keeps the loss and takes away the order."
        )
    return Origin(
        trained=True,
        lead=f"consistency {form}, {loss}; {tokens} tokens in {steps} steps, seed {config.seed}"
        + (f"; trained on {means}" if means else ""),
        rows=[
            *of_means,
            ("temporal loss", f"{said}; window {config.window}; lambda {config.lambda_:g}"),
            (
                "training",
                f"{steps} steps, {tokens} tokens, learning rate {config.training.lr:g}, "
                f"seed {config.seed}",
            ),
            *_of_the_text(in_windows, seen),
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
        first=first,
    )


def _of_the_text(in_windows: float | None, seen: float | None) -> list[tuple[str, str]]:
    rows = [
        ("in windows", in_windows, "of the training tokens"),
        ("held out, yet seen", seen, "of the held-out contexts stand in the training text too"),
    ]
    return [
        (name, f"{100 * share:.2f} % {what}") for name, share, what in rows if share is not None
    ]


def not_of_tokens(config: Config) -> str | None:
    """In words, that what is measured is not what was trained on."""
    if not config.averaged:
        return None
    return (
        f"Trained on {config.averaged} and measured on single tokens, as all others are: it "
        "explains less of them than of what it was trained on, and the course of training is of "
        "means."
    )


def few_in_windows(config: Config, share: float | None) -> str | None:
    """In words, that few training tokens lie in a window of the temporal loss."""
    if share is None or share >= FEW_IN_WINDOWS or not config.has_temporal_loss:
        return None
    return (
        f"window = {config.window}: only {100 * share:.1f} % of the training tokens lie where a "
        f"document has {in_a_row(config)}; the temporal loss sees no others. Take a smaller window "
        "or longer documents."
    )


def in_a_row(config: Config) -> str:
    """What the temporal loss needs of a document, in words."""
    n = config.loss_window
    return "two valid tokens" if n == "document" else f"{n} valid tokens in a row"


def seen_in_training(share: float | None) -> str | None:
    """In words, that held-out text was trained on."""
    if share is None or share <= MANY_SEEN:
        return None
    return (
        f"{100 * share:.1f} % of the held-out contexts stand in the training text too (half their "
        "tokens or more): what is measured on them is too good. Take copies out of the text."
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


FEW_TOKENS = 100
"""Tokens trained on for each feature, below which most features cannot have been learned."""


def too_few_tokens(tokens: int, d_sae: int) -> str | None:
    """In words, that the dictionary is wide for what it was trained on."""
    if tokens >= FEW_TOKENS * d_sae:
        return None
    return (
        f"{tokens:,} tokens for {d_sae:,} features are {tokens / d_sae:.0f} a feature: a look at "
        "how it works, not a result. Train longer (training.tokens), or narrower (sae.d_sae)."
    )


def misleading(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """In words, which headline numbers (`metrics` of final_info.json) cannot be read as usual."""
    explained = metrics["reconstruction_quality"]["explained_variance"]
    score = metrics["model_performance_preservation"]["ce_loss_score"]
    alive = metrics["misc_metrics"]["frac_alive"]
    said = []
    if alive == 0:
        said.append("No feature fired on held-out text: there is nothing to measure.")
    elif explained is not None and explained < 0:
        said.append(
            f"Explained variance is {number(explained)}: the reconstruction is further from the "
            "activations than their mean is. What is said of features below is not of the model."
        )
    if score is not None and not 0 <= score <= 1:
        why = (
            "the model does worse with the reconstruction than with nothing in its place"
            if score < 0
            else "the model does better with the reconstruction than with its own activations, "
            "which says that the loss hardly depends on this place, or on too few tokens"
        )
        said.append(f"CE score is {number(score)}, outside 0 to 1: {why}.")
    return said


def _loaded(config: LoadedConfig, info: dict[str, Any]) -> Origin:
    source = config.source
    first = [*source.cautions, *misleading(info["metrics"])]
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
            "The SAE was loaded, and on which documents it was trained is not known here: held-out "
            "text may be text that it has seen. The intervals are about the choice of contexts.",
            *first,
        ],
        first=first,
    )
