"""Options of the adaptive sweeper (hydra.sweeper.KEY=VALUE); conf/hydra/sweeper has defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from tcsae.config.launcher import Count
from tcsae.config.strict import StrictModel


class AdaptiveOptions(StrictModel):
    """What `hydra/sweeper=optuna` takes."""

    objective: str | None = None
    """A number of final_info.json, by its dotted key or the end of it."""
    direction: Literal["maximize", "minimize"] = "maximize"
    constraints: dict[str, str] = {}
    """By key, as of `objective`: ">=0.8", "<=40", ">=baseline-0.01"."""
    baseline: str | None = None
    """Overrides of one job more, whose numbers `constraints` may name."""
    n_trials: Count = 20
    """Points in all, with those of earlier commands."""
    n_jobs: Count = 4
    """Points chosen at a time: from what is known before any of them has ended."""
    seed: int = Field(0, ge=0)
    params: dict[str, Any] = {}
    """For presets: axis -> its values as on the command line."""

    @field_validator("constraints", mode="before")
    @classmethod
    def _flat(cls, given: Any) -> Any:
        """Hydra makes a tree of `+hydra.sweeper.constraints.metrics.sparsity.l0=...`."""
        return {} if given is None else _flat(given) if isinstance(given, dict) else given


def _flat(tree: dict[Any, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{before}{key}.") if inner else {f"{before}{key}": value}
    return found
