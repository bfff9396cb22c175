"""What an adaptive sweep makes as large or small as it can, and what it must keep to: numbers of
final_info.json, by key. Which keys a run will have is known before it: from its config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tcsae.base.errors import UserError
from tcsae.config import Config

# tests/launch/test_adaptive.py holds these lists to what a run writes.
OF_A_RUN = (
    *("final_loss", "held_out_seen_in_training", "massive_token_share", "norm_limit"),
    *("tokens", "tokens_in_windows", "tokens_per_second", "training_seconds", "training_steps"),
    *("wall_seconds", "dict_size", "layer", "learning_rate", "lambda", "seed", "window_size"),
)
OF_THE_CORE = {
    "model_behavior_preservation": (*("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),),
    "model_performance_preservation": (
        *("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"),
    ),
    "reconstruction_quality": (
        *("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    ),
    "shrinkage": (*("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),),
    "sparsity": ("l0", "l1"),
    "misc_metrics": (
        *("freq_over_1_percent", "freq_over_10_percent", "frac_alive"),
        *("normalized_freq_over_1_percent", "normalized_freq_over_10_percent"),
        *("average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim"),
    ),
}
OF_WINDOWS = ("C_{}", "D_{}", "L_{}", "C_{}_sparse", "L_{}_sparse")
OF_FEATURES = (
    *("rho_1", "share_position", "share_document", "share_window", "share_flicker"),
    *("correlation_length", "tau_int", "eta_squared", "omega_squared"),
    *("mutual_information", "mutual_information_share", "persistence", "run_length"),
    *("density", "mean_activation", "amplitude_cv"),
)
STATISTICS = ("energy_weighted", "median", "mean", "q25", "q75", "q99", "n")
"""Over features; the first is what is meant where none is named."""
SINGLES = ("live_share", "edge_energy", "smoothness")
OF_TRUTH = (
    *("cosine", "found", "precision", "recall", "f1"),
    *("pieces", "broken", "missed", "delay", "lag"),
)
NO_NUMBERS = (
    *("consistency", "metrics", "eval_cfg", "model_checks", "seconds", "products", "unique_id"),
    *("sae_set", "sae_id", "explained_variance_by_norm_limit", "sparsity_penalty"),
    *("consistency.windows", "consistency.autocorrelation", "consistency.energy_by_position"),
    "consistency.interval_reason",
)
_MEASURES = "consistency.metrics."


def known_keys(config: Config) -> list[str]:
    """Numbers that final_info.json of such a run has. What the instruments of evaluation.meaning
    find is not among them: their names depend on the text."""
    return list(_keys(config))


def _keys(config: Config) -> Iterator[str]:
    yield from OF_A_RUN
    for group, names in OF_THE_CORE.items():
        yield from (f"metrics.{group}.{name}" for name in names)
    windows: Iterable[object] = config.evaluation.windows
    if config.window in config.evaluation.windows:
        windows = [*windows, "W"]  # the run's own
    measures = [*OF_FEATURES, *(form.format(w) for w in windows for form in OF_WINDOWS)]
    for measure in measures:
        yield from (f"{_MEASURES}{measure}.{statistic}" for statistic in STATISTICS)
    yield from (f"consistency.{name}.value" for name in SINGLES)
    if config.model.world is not None:
        yield "truth.mcc"
        yield from (f"truth.all.{name}" for name in OF_TRUTH)


def full_key(written: str, config: Config, of: str) -> str:
    """The whole key of what a user wrote: itself, or the end of one key alone (`l0`), or a measure
    of the consistency suite (`L_8`), whose mean weighted by energy is meant.

    Raises UserError, naming near ones. `of`: whose value it is, for that.
    """
    known = known_keys(config)
    if written in known:
        return written
    if written.startswith("meaning.") and config.evaluation.meaning:
        return written  # looked at when the first job has ended
    for measure in (written, _MEASURES + written):
        if f"{measure}.{STATISTICS[0]}" in known:
            return f"{measure}.{STATISTICS[0]}"
    ends = [key for key in known if key.endswith(f".{written}")]
    ends = ends or [key for key in known if key.endswith(f".{written}.value")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{of}: {written} is the end of several keys: {_some(ends)}")
    if written in NO_NUMBERS or any(key.startswith(f"{written}.") for key in known):
        raise UserError(f"{of}: {written} of final_info.json is not a number")
    raise UserError(f"{of}: final_info.json will have no {written}; {_nearest(written, known)}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _nearest(written: str, known: list[str]) -> str:
    """By whole keys, and by what people write of them."""
    short = {key.removeprefix(_MEASURES).removesuffix(".energy_weighted"): key for key in known}
    short |= {key.rpartition(".")[2]: key for key in known if not key.startswith("consistency")}
    near = [name for name in short if written.lower() in name.lower()][:3]
    near = near or difflib.get_close_matches(written, [*short, *known], n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "docs/formats.md has its keys"


def number_at(info: Mapping[str, Any], key: str) -> float | str:
    """The number that a finished run has at `key`, or in words why there is none.

    Raises UserError if the run has no such key at all.
    """
    parts = key.split(".")
    # W stands for the run's own window.
    parts = [re.sub(r"^([CDL])_W(?=$|_)", rf"\1_{info['window_size']}", part) for part in parts]
    value: Any = info
    for depth, part in enumerate(parts):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(f"final_info.json has no {'.'.join(parts[: depth + 1])}")
        above, value = value, value[part]
    if isinstance(value, bool) or not isinstance(value, int | float):
        why = above.get("reason") or above.get(f"{parts[-1]}_reason")
        return f"{key} is {value}" + (f": {why}" if why else "")
    return float(value)


_CONDITION = re.compile(
    r"\s*(?P<sign>>=|<=)\s*(?:(?P<base>baseline)\s*(?:(?P<by>[+-])\s*)?)?"
    r"(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)?\s*"
)


@dataclass(frozen=True)
class Constraint:
    """A number that must be at least, or at most, a bound."""

    key: str
    written: str
    is_least: bool
    from_baseline: bool
    by: float

    def bound(self, baseline: float | None) -> float:
        return self.by + (baseline or 0.0 if self.from_baseline else 0.0)

    def excess(self, value: float, baseline: float | None) -> float:
        """How far the bound is missed; 0 or less where it is kept."""
        bound = self.bound(baseline)
        return bound - value if self.is_least else value - bound


def constraint_of(key: str, written: str, of: str) -> Constraint:
    """Raises UserError, with `of` before it, for a condition that is none."""
    found = _CONDITION.fullmatch(written)
    has_sum = found is not None and found["base"] is not None and found["by"] is not None
    if (
        found is None
        or (found["base"] is None and found["number"] is None)
        or (found["base"] is not None and has_sum != (found["number"] is not None))
    ):
        raise UserError(f"{of} = {written}: write >=NUMBER, <=NUMBER or >=baseline-NUMBER")
    by = float(found["number"] or 0) * (-1 if found["by"] == "-" else 1)
    return Constraint(key, written.strip(), found["sign"] == ">=", found["base"] is not None, by)
