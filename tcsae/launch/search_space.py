"""The axes of an adaptive sweep, in Hydra's own syntax: lists, ranges, intervals and their tags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from tcsae.base.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

DIGITS = 4
"""Significant digits of a number from an interval: commands and names stay short."""
_NOT_SEARCHED = {
    "seed": "the best of several seeds is luck; several seeds are a grid of their own",
    "name": "it is a label",
    "rerun": "it says how a job is run",
}


@dataclass(frozen=True)
class Axis:
    """What is chosen for one key: one of `values`, or a number from `low` to `high`."""

    key: str
    """As on the command line, a + before it with it."""
    written: str
    """What the user gave: interval(0.01,2)."""
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    is_whole: bool = False
    is_log: bool = False

    def chosen(self, trial: Trial) -> str:
        """The value that Optuna chooses, as on the command line."""
        if self.values:
            return str(trial.suggest_categorical(self.key, self.values))
        if self.is_whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return str(trial.suggest_int(self.key, low, high, step=step, log=self.is_log))
        value = trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.is_log)
        return self._as_written(value)

    @property
    def ends(self) -> tuple[str, str]:
        if self.values:
            return self.values[0], self.values[-1]
        return self._as_written(self.low), self._as_written(self.high)

    def _as_written(self, value: float) -> str:
        if self.is_whole:
            return str(int(value))
        if self.step is not None:
            return repr(float(f"{value:.10g}"))
        return repr(min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high))


@dataclass(frozen=True)
class Space:
    """What every job has, and what is searched."""

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    def point(self, trial: Trial) -> list[str]:
        """The overrides of one job."""
        return [*self.fixed, *(f"{axis.key}={axis.chosen(trial)}" for axis in self.axes)]

    def at(self, end: int, other: Axis | None = None) -> list[str]:
        """The overrides of the corner in which every axis is at its `end` (0 or 1), and `other` at
        its opposite one."""
        at = ((axis, 1 - end if axis is other else end) for axis in self.axes)
        return [*self.fixed, *(f"{axis.key}={axis.ends[side]}" for axis, side in at)]


def space_of(overrides: Sequence[str], config_loader: Any) -> Space:
    """Raises UserError for an axis that cannot be searched, or if there is none."""
    parser = OverridesParser.create(config_loader=config_loader)
    parsed = {o.get_key_element(): o for o in parser.parse_overrides(list(overrides))}
    fixed: list[str] = []
    axes: list[Axis] = []
    for key, override in parsed.items():
        axis = _axis(key, override) if override.is_sweep_override() else None
        if axis is None:
            fixed.append(f"{key}={override.get_value_element_as_str()}")
        elif len(axis.values) == 1:
            fixed.append(f"{key}={axis.values[0]}")
        else:
            axes.append(axis)
    if not axes:
        raise UserError(
            "hydra/sweeper=optuna: there is no axis to search; give one as "
            "lambda=interval(0.01,2), training.lr=tag(log,interval(1e-4,1e-2)) or "
            "window=choice(4,8,16)"
        )
    return Space(tuple(fixed), tuple(axes))


def _axis(key: str, override: Override) -> Axis:
    sweep, written = override.value(), override.get_value_string()
    name = key.lstrip("+")
    if name in _NOT_SEARCHED:
        raise UserError(f"{key}={written}: {name} is no axis of a search: {_NOT_SEARCHED[name]}")
    tags = set(getattr(sweep, "tags", ()))
    is_log = "log" in tags
    if tags - {"log"}:
        raise UserError(f"{key}={written}: the tag that an axis may have is log")
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        low, high, whole = sweep.start, sweep.end, isinstance(sweep.start, int)
        if not low < high or (is_log and low <= 0):
            least = "0 < low < high" if is_log else "low < high"
            raise UserError(f"{key}={written}: an interval is (low,high) with {least}")
        return Axis(key, written, low=low, high=high, is_whole=whole, is_log=is_log)
    if is_log:
        raise UserError(f"{key}={written}: tag(log,...) goes with interval(low,high)")
    if isinstance(sweep, RangeSweep) and len(numbers := list(sweep.range())) > 1:
        whole = all(isinstance(number, int) for number in numbers)
        low, high = min(numbers), max(numbers)
        step = float(abs(Decimal(str(numbers[1])) - Decimal(str(numbers[0]))))
        return Axis(key, written, low=low, high=high, step=step, is_whole=whole)
    values = tuple(dict.fromkeys(str(value) for value in override.sweep_string_iterator()))
    if not values:
        raise UserError(f"{key}={written}: it has no value")
    return Axis(key, written, values=values)
