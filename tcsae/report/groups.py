"""From runs to the entries of a comparison: streams, groups, arms, differences, grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tcsae.base.json_numbers import plain
from tcsae.config import AVERAGED
from tcsae.report.at_l0 import at_l0
from tcsae.report.family import jointly
from tcsae.report.matching import (
    FEATURE_DRAWS,
    Features,
    Match,
    Matched,
    Point,
    at_density,
    density_histogram,
    live_features,
    match_l0,
    pareto_front,
)
from tcsae.report.paired import LEVEL, ROUNDING, Estimate, Term, combine
from tcsae.report.runs import (
    LOADED,
    SPARSITY_KEYS,
    TEMPORAL_KEYS,
    Run,
    key_of,
    same_stream,
    settings_of,
)

_SETTINGS = {
    "architecture": "sae.architecture",
    "d_sae": "sae.d_sae",
    "k": "sae.k",
    "l1_coefficient": "sae.l1_coefficient",
    "consistency": "consistency",
    "window": "window",
    "lambda": "lambda",
    "tokens": "training.tokens",
    LOADED: LOADED,
    "sha256": "source.sha256",
}


@dataclass(frozen=True)
class Group:
    """One setting of one stream with all its seeds."""

    id: int
    stream: int
    settings: dict[str, Any]
    runs: tuple[Run, ...]
    """By seed."""
    chosen: tuple[tuple[str, str], ...] = ()
    """(setting, value) of the one baseline that all are compared with; empty: each with its own."""

    @property
    def is_loaded(self) -> bool:
        """Not trained here: neither a baseline nor to be compared with one."""
        return LOADED in self.settings

    @property
    def is_baseline(self) -> bool:
        if self.settings.get("consistency") != "none":
            return False
        return all(_in_words(self.settings.get(key)) == value for key, value in self.chosen)

    @property
    def arm_key(self) -> str:
        return f"{self.stream} {key_of(self.settings, SPARSITY_KEYS)}"

    @property
    def base_key(self) -> str:
        """Of the arm this one is compared with; its own for a baseline."""
        if self.chosen:
            return f"{self.stream}"
        without = (*SPARSITY_KEYS, *TEMPORAL_KEYS)
        return f"{self.stream} {key_of(self.settings, without)}"

    @cached_property
    def point(self) -> Point | None:
        """Where the group lies; None if it has no L0 or no explained variance."""
        found = [combine(name, [self.term()]).value for name in ("l0", "explained_variance")]
        if found[0] is None or found[1] is None:
            return None
        return Point(self.id, float(found[0]), float(found[1]))

    def term(self, weight: float = 1.0) -> Term:
        return Term(weight, self.runs)


def sort_streams(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one model, hook and set of held-out contexts together, in the order given."""
    streams: list[list[Run]] = []
    for run in runs:
        own = next((stream for stream in streams if same_stream(stream[0], run)), None)
        if own is None:
            streams.append([run])
        else:
            own.append(run)
    return streams


def make_groups(
    streams: Sequence[Sequence[Run]], chosen: Sequence[tuple[str, str]] = ()
) -> tuple[list[Group], list[tuple[Run, Run]]]:
    """Groups (of a stream: baselines first), and the runs left out with what they repeat.

    `chosen` as of `Group.chosen`.
    """
    found: dict[tuple[int, str], dict[int | None, Run]] = {}
    repeated = []
    for number, stream in enumerate(streams):
        for run in stream:
            seeds = found.setdefault((number, key_of(settings_of(run.config))), {})
            if run.seed in seeds:
                repeated.append((run, seeds[run.seed]))
            else:
                seeds[run.seed] = run
    unsorted = [
        (number, settings_of(next(iter(seeds.values())).config), seeds)
        for (number, _), seeds in found.items()
    ]
    unsorted.sort(key=lambda entry: (entry[0], _rank(entry[1])))
    groups = [
        Group(
            i,
            number,
            settings,
            tuple(sorted(seeds.values(), key=lambda run: run.seed or 0)),
            tuple(chosen),
        )
        for i, (number, settings, seeds) in enumerate(unsorted)
    ]
    return groups, repeated


def _rank(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    window = settings.get("window", 0)
    long = math.inf if window == "document" else window
    sparsity = [settings.get(key) or 0 for key in SPARSITY_KEYS]
    consistency = settings.get("consistency", "")
    shown = (LOADED in settings, settings["sae.architecture"], consistency != "none", consistency)
    return (*shown, long, settings.get("lambda", 0), *sparsity, key_of(settings))


# ----------------------------------------------------------------------------------- labels


def differing(groups: Sequence[Group]) -> list[str]:
    """Settings that are not the same in all groups that were trained; of the temporal ones, in all
    variants."""
    groups = [group for group in groups if not group.is_loaded]
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    found = []
    for key in keys:
        among = [g for g in groups if not (g.is_baseline and key in TEMPORAL_KEYS)]
        if len({repr(g.settings.get(key)) for g in among}) > 1:
            found.append(key)
    return found


def label_of(group: Group, differs: Sequence[str], without: Sequence[str] = ()) -> str:
    """What sets the group apart: "lambda=1 window=8"."""
    if group.is_loaded:
        return f"{LOADED} {group.settings[LOADED]}"
    shown = [key for key in differs if key not in without and key in group.settings]
    if group.is_baseline:
        shown = [key for key in shown if key not in TEMPORAL_KEYS]
        return " ".join(["baseline", *(_said(group, key) for key in shown)])
    if group.settings["consistency"] == AVERAGED:  # lambda is of no loss there
        shown = [key for key in shown if key not in TEMPORAL_KEYS]
        shown = [key for key in ("window",) if key not in without] + shown
        return " ".join([AVERAGED, *(_said(group, key) for key in shown)])
    first = [key for key in ("lambda",) if key not in without]
    shown = [*first, *(key for key in shown if key != "lambda")]
    return " ".join(_said(group, key) for key in shown) or group.settings["consistency"]


def _said(group: Group, key: str) -> str:
    return f"{key.split('.')[-1]}={_in_words(group.settings[key])}"


def _in_words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------- entries


def _entry(estimate: Estimate) -> dict[str, Any]:
    named = ("value", "low", "high")
    return {n: plain(getattr(estimate, n)) for n in named} | {"reason": estimate.reason}


def _own(name: str, group: Group) -> Estimate:
    """A metric of the group; of a single run with the interval that the run itself shows."""
    found = combine(name, [group.term()])
    own = group.runs[0].intervals.get(name) if len(group.runs) == 1 else None
    if own is None or found.low is None:
        return found
    return found._replace(low=own[0], high=own[1])


class Entries:
    """Makes the entries of all groups of a comparison.

    Args:
        groups: of `make_groups`.
        metrics: the columns.
        window: W of the C_W in the density histogram. None: none.
    """

    def __init__(self, groups: Sequence[Group], metrics: Sequence[str], window: int | None) -> None:
        self.groups, self.metrics = list(groups), list(metrics)
        self.window_metric = None if window is None else f"C_{window}"
        self.differs = differing(groups)
        self.arm_keys = list(dict.fromkeys(group.arm_key for group in groups))

    def baseline_groups(self, group: Group) -> list[Group]:
        return [g for g in self.groups if g.is_baseline and g.base_key == group.base_key]

    def group(self, group: Group) -> dict[str, Any]:
        match = self._match(group)
        compared = []
        if not group.is_baseline:
            weighted = zip(match.groups, match.weights, strict=True)
            compared = [self.groups[i].term(weight) for i, weight in weighted]
        deltas, density_matched = self._differences(group, match, compared)
        settings = {k: group.settings.get(v) for k, v in _SETTINGS.items()}
        return {
            "id": group.id,
            "stream": group.stream,
            "arm": self.arm_keys.index(group.arm_key),
            "label": label_of(group, self.differs),
            "settings": {k: v for k, v in settings.items() if v is not None or k == "window"},
            "differs": {key: group.settings.get(key) for key in self.differs},
            "is_baseline": group.is_baseline,
            "seeds": [run.seed for run in group.runs if run.seed is not None],
            "runs": [run.name for run in group.runs],
            "metrics": {name: _entry(_own(name, group)) for name in self.metrics},
            "medians": _seed_means(self.metrics, [run.medians for run in group.runs]),
            "q99": _seed_means(self.metrics, [run.top for run in group.runs]),
            "energy_by_position": _energy(group.runs),
            "match": match._asdict(),
            "baseline_medians": self._baseline_medians(match) if compared else {},
            "deltas": deltas,
            "density_matched": density_matched,
            "curve": self._curve(group),
            "profile": _profile(group.runs),
            "density": self._density(group),
        }

    def _baseline_medians(self, match: Match) -> dict[str, float | None]:
        """Medians of what it is compared with, weighted as that is."""
        found: dict[str, float | None] = {}
        weighted = list(zip(match.groups, match.weights, strict=True))
        for name in self.metrics:
            sides = [
                (weight, _seed_means([name], [run.medians for run in self.groups[i].runs]))
                for i, weight in weighted
            ]
            values = [(weight, side.get(name)) for weight, side in sides]
            known = [weight * value for weight, value in values if value is not None]
            found |= {name: sum(known)} if len(known) == len(values) else {}
        return found

    def _density(self, group: Group) -> dict[str, Any]:
        name = self.window_metric
        if not all(name in run.features for run in group.runs):
            name = None
        features = live_features([group.term()], [] if name is None else [name])
        return density_histogram(features, name)

    def _match(self, group: Group) -> Match:
        point = group.point
        if group.is_baseline:
            l0 = None if point is None else point.l0
            return Match("self", [group.id], [1.0], l0, "it is the baseline")
        if group.is_loaded and not group.chosen:
            words = "it was not trained here, so no baseline has its settings"
            return Match("none", [], [], None, words)
        if point is None:
            return Match("none", [], [], None, "it has no L0 or no explained variance")
        others = [g.point for g in self.baseline_groups(group)]
        match = match_l0(point.l0, [p for p in others if p is not None])
        near = [g for g in self.groups if g.is_baseline and g.stream == group.stream]
        if match.kind == "none" and not others and near:
            other = _difference(group, near[0])
            return match._replace(words=f"{match.words}; the one there is differs in {other}")
        return match

    def _differences(
        self, group: Group, match: Match, baseline: Sequence[Term]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`deltas` and `density_matched`, in which what is called different is so beside all
        others of the group."""
        if not baseline:
            return {}, {}
        estimates = {name: self._delta(name, group, match) for name in self.metrics}
        deltas = {
            name: _entry(estimate) | {"baseline": plain(value)}
            for name, (estimate, value) in estimates.items()
        }
        drawn_so_far = [len(e.draws) for e, _ in estimates.values() if e.draws is not None]
        matched = self._at_density(group, baseline, (drawn_so_far or [FEATURE_DRAWS])[0])
        shown = {("deltas", name): estimate.draws for name, (estimate, _) in estimates.items()}
        shown |= {("density_matched", name): found.draws for name, found in matched.items()}
        entries = {"deltas": deltas, "density_matched": {n: m.entry for n, m in matched.items()}}
        value_of = {"deltas": "value", "density_matched": "delta"}
        # L0 is what was matched: it is not looked at.
        drawn = {
            key: (entries[key[0]][key[1]][value_of[key[0]]], draws)
            for key, draws in shown.items()
            if draws is not None and draws.isfinite().all() and key[1] != "l0"
        }
        rounding = {
            key: ROUNDING * abs(entries[key[0]][key[1]]["baseline"] or 0.0) for key in drawn
        }
        joint = jointly(drawn, LEVEL, rounding)
        for key in shown:
            entry, found = entries[key[0]][key[1]], joint.get(key)
            value = entry[value_of[key[0]]]
            smallest = None if found is None else found.smallest
            ends = (None, None) if found is None else (value - smallest, value + smallest)
            entry |= {
                "within_noise": None if found is None else not found.is_different,
                "smallest": smallest,
                "family_low": ends[0],
                "family_high": ends[1],
            }
        return entries["deltas"], entries["density_matched"]

    def _delta(self, name: str, group: Group, match: Match) -> tuple[Estimate, Any]:
        """A metric of the group less that of its baseline at the same L0, and the latter."""
        terms = [self.groups[i].term() for i in match.groups]
        own, others = combine(name, [group.term()]), [combine(name, [t]) for t in terms]
        if own.value is None or group.point is None or any(e.value is None for e in others):
            minus = [Term(-w, t.runs) for w, t in zip(match.weights, terms, strict=True)]
            return combine(name, [group.term(), *minus]), combine(name, terms).value
        front = self._front(group, name)
        found = at_l0(name, group.point.l0, match.groups, front)
        minus = [Term(-w, t.runs) for w, t in zip(found.weights, terms, strict=True)]
        delta = combine(
            name, [group.term(), *minus], value=own.value - found.value, error=found.error
        )
        return delta, found.value

    def _front(self, group: Group, name: str) -> dict[int, tuple[float, float]]:
        """L0 and the metric of the baselines on the front, and of those that stand in."""
        near = [g for g in self.baseline_groups(group) if g.point is not None]
        points = [g.point for g in near if g.point is not None]
        shown = {point.group for point in pareto_front(points)} | set(self._match(group).groups)
        found = {}
        for g in near:
            value = combine(name, [g.term()]).value
            if g.id in shown and value is not None and g.point is not None:
                found[g.id] = g.point.l0, float(value)
        return found

    def _at_density(
        self, group: Group, baseline: Sequence[Term], n_draws: int
    ) -> dict[str, Matched]:
        names = [
            name
            for name in self.metrics
            if (name.startswith("C_") or name in ("rho_1", "omega_squared"))
            and all(name in run.features for t in [group.term(), *baseline] for run in t.runs)
        ]
        if not names:
            return {}
        arms = [live_features(terms, names) for terms in ([group.term()], baseline)]
        if arms[0] is None or arms[1] is None:
            return {}
        by_seed = self._by_seed([group.term(), *baseline], names)
        return {name: at_density(arms[0], arms[1], name, n_draws, by_seed) for name in names}

    @staticmethod
    def _by_seed(terms: Sequence[Term], names: Sequence[str]) -> list[tuple[Features, Features]]:
        """The arms of each seed alone; none where the terms have not the same seeds."""
        if len({tuple(run.seed for run in term.runs) for term in terms}) > 1:
            return []
        found = []
        for i in range(len(terms[0].runs)):
            own, *others = (Term(term.weight, [term.runs[i]]) for term in terms)
            pair = live_features([own], names), live_features(others, names)
            if pair[0] is None or pair[1] is None:
                return []
            found.append((pair[0], pair[1]))
        return found

    def _curve(self, group: Group) -> dict[str, Any]:
        estimate = _own("autocorrelation", group)
        rho = plain(estimate.value)
        bands = {k: plain(getattr(estimate, k)) for k in ("low", "high")}
        lags = list(range(len(rho))) if rho else []
        return {"lags": lags, "rho": rho or [], **bands, "reason": estimate.reason}

    # ------------------------------------------------------------------------- arms, grids

    def arms(self) -> list[dict[str, Any]]:
        found = []
        for i, key in enumerate(self.arm_keys):
            groups = [g for g in self.groups if g.arm_key == key]
            points = sorted((g.point for g in groups if g.point), key=lambda p: p.l0)
            without = [g.id for g in groups if g.point is None]
            baseline = [g.arm_key for g in self.baseline_groups(groups[0])]
            first = groups[0]
            arm_of = self.arm_keys.index(baseline[0]) if baseline else None
            found.append(
                {
                    "id": i,
                    "stream": first.stream,
                    "label": label_of(first, self.differs, without=SPARSITY_KEYS),
                    "is_baseline": first.is_baseline,
                    "baseline": None if first.is_baseline else arm_of,
                    "groups": [p.group for p in points] + without,
                    "front": [p.group for p in pareto_front(points)],
                }
            )
        return found

    def grids(self, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Window x lambda, for everything else equal."""
        tables: dict[str, list[Group]] = {}
        for group in self.groups:
            if not group.is_baseline and "window" in group.settings:
                key = key_of(group.settings, ("window", "lambda"))
                tables.setdefault(f"{group.stream} {key}", []).append(group)
        return [self._grid(groups, entries) for groups in tables.values() if len(groups) > 1]

    def _grid(
        self, groups: Sequence[Group], entries: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        windows = sorted({g.settings["window"] for g in groups}, key=_length)
        lambdas = sorted({g.settings["lambda"] for g in groups})
        cells: list[list[int | None]] = [[None] * len(lambdas) for _ in windows]
        for g in groups:
            row, column = windows.index(g.settings["window"]), lambdas.index(g.settings["lambda"])
            cells[row][column] = g.id
        same = key_of(groups[0].settings, TEMPORAL_KEYS)
        zero = [
            g.id
            for g in self.baseline_groups(groups[0])
            if key_of(g.settings, TEMPORAL_KEYS) == same
        ]
        if zero:
            lambdas, cells = [0.0, *lambdas], [[zero[0], *row] for row in cells]

        def table(kind: str, name: str) -> list[list[float | None]]:
            def value(cell: int | None) -> float | None:
                return None if cell is None else entries[cell][kind].get(name, {}).get("value")

            return [[value(cell) for cell in row] for row in cells]

        return {
            "stream": groups[0].stream,
            "label": label_of(groups[0], self.differs, without=("window", "lambda")),
            "windows": windows,
            "lambdas": lambdas,
            "groups": cells,
            "metrics": {name: table("metrics", name) for name in self.metrics},
            "deltas": {name: table("deltas", name) for name in self.metrics},
        }


def _length(window: int | str) -> float:
    return math.inf if isinstance(window, str) else window


def _difference(first: Group, second: Group) -> str:
    keys = [k for k in {**first.settings, **second.settings} if k not in TEMPORAL_KEYS]
    different = [k for k in keys if first.settings.get(k) != second.settings.get(k)]
    return ", ".join(different)


def _profile(runs: Sequence[Run]) -> dict[str, Any]:
    """Firing rate by position over the feature's mean rate, mean over live features and seeds."""
    curves = []
    for run in runs:
        rate_TF = run.features["profile_rate"][:, run.features["density"] > 0]
        curves.append((rate_TF / rate_TF.nanmean(0)).nanmean(1))
    rate = torch.stack(curves).mean(0)
    return {"positions": list(range(len(rate))), "rate": plain(rate)}


def _seed_means(
    names: Sequence[str], by_run: Sequence[Mapping[str, float | None]]
) -> dict[str, float | None]:
    """Mean over seeds of what every seed has."""
    found: dict[str, float | None] = {}
    for name in names:
        values = [values.get(name) for values in by_run]
        known = [v for v in values if v is not None]
        if len(known) == len(values):
            found[name] = sum(known) / len(known)
    return found


def _energy(runs: Sequence[Run]) -> dict[str, Any]:
    """Energy by position relative to that from position 8 on, mean over seeds; empty if a seed
    has none."""
    curves = [run.energy_by_position for run in runs]
    if not all(curves):
        return {"positions": [], "energy": []}
    nan = float("nan")
    known = torch.tensor([[nan if v is None else v for v in c] for c in curves]).double()
    return {"positions": list(range(known.shape[1])), "energy": plain(known.mean(0))}
