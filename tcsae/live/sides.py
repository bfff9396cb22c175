"""What the live view's page asks, answered: one to three SAEs of one hook over one text.

The language model is loaded once and used by one request at a time. Every answer is JSON values.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tcsae.base.errors import UserError
from tcsae.base.labels import number
from tcsae.base.run_files import REPORT, RunFiles, runs_below
from tcsae.config import AVERAGED, Config
from tcsae.jobs.looking import seen_of
from tcsae.jobs.opening import OpenedSAE, open_
from tcsae.measure.steering import continuation
from tcsae.measure.strips import visible
from tcsae.measure.text_features import By, TextFeatures, check_feature
from tcsae.report.look_page import Seen, counterpart
from tcsae.runs.folder import LoadedRun

MOST_RUNS = 3
NO_LOSS, MEANS, LOSS, CONTROL, LOADED = ROLES = (
    *("no loss", AVERAGED, "loss", "control", "loaded"),
)
_KEPT = 8
"""Texts and unsteered continuations that are kept."""

Opened = LoadedRun | OpenedSAE
Value = TypeVar("Value")


def open_sides(folders: Sequence[Path], tell: Callable[[str], None]) -> Sides:
    """Open one to three runs, check that they fit together, load their language model.

    Args:
        folders: runs, SAEs, or folders with up to three finished runs.
        tell: hears of every step, since loading takes seconds.

    Raises:
        UserError: too many runs, one that is not there or unfinished, different models, hooks or
            context sizes, and whatever keeps one of them from being read.
    """
    named = [run for folder in folders for run in _runs_in(folder)]
    if len(named) > MOST_RUNS:
        raise UserError(f"{len(named)} runs: one to {MOST_RUNS} can lie side by side; name those")
    tell(f"opening {len(named)} run{'s' * (len(named) > 1)}")
    opened = [open_(folder) for folder in named]
    for one in opened[1:]:
        _check_alike(opened[0], one)
    tell(f"loading {opened[0].config.model.name}")
    for one in opened[1:]:
        if one.reader.model.identity != opened[0].reader.model.identity:
            raise _unlike(opened[0], one, "reads other weights, or in another precision, than")
    for one in opened:
        one.features("a")  # weights are read at the first use, which no visitor should wait for
    return Sides(sorted(opened, key=lambda one: ROLES.index(role(one))))


def _runs_in(folder: Path) -> list[Path]:
    """The finished runs in a folder of runs where they are few; else what `tcsae.open` takes."""
    if not folder.is_dir() or RunFiles(folder).is_run:
        return [folder]
    finished = [run for run in runs_below(folder) if RunFiles(run).is_finished]
    if len(finished) > MOST_RUNS:
        raise UserError(
            f"{folder} has {len(finished)} finished runs: one to {MOST_RUNS} can lie side by side; "
            "name those"
        )
    return finished or [folder]


def _check_alike(first: Opened, other: Opened) -> None:
    """Before anything large is loaded. Raises UserError."""
    if first.config.model != other.config.model or first.config.layer != other.config.layer:
        raise _unlike(first, other, "reads another model or hook than")
    sizes = [one.config.dataset.context_size for one in (first, other)]
    if sizes[0] != sizes[1]:
        raise _unlike(first, other, f"has contexts of {sizes[1]} tokens, not {sizes[0]} as")


def _unlike(first: Opened, other: Opened, how: str) -> UserError:
    return UserError(
        f"{other.folder} {how} {first.folder}: their features of one text have no common tokens "
        "to lie side by side on; serve them one by one"
    )


def role(opened: Opened) -> str:
    """One of ROLES."""
    config = opened.config
    if not isinstance(config, Config):
        return LOADED
    if config.averaged:
        return MEANS
    if config.lambda_ == 0 or config.consistency.form == "none":
        return NO_LOSS
    return CONTROL if config.consistency.shuffle_positions else LOSS


class Sides:
    """The runs of one page, in the order in which they lie side by side."""

    def __init__(self, opened: Sequence[Opened]) -> None:
        self.opened = list(opened)
        roles = [role(one) for one in opened]
        self.names = [
            f"{name} {roles[: i + 1].count(name)}" if roles.count(name) > 1 else name
            for i, name in enumerate(roles)
        ]
        self._lock = threading.Lock()
        self._texts: OrderedDict[str, list[Seen]] = OrderedDict()
        self._plain: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        self._counterpart = functools.lru_cache(maxsize=4096)(self._nearest)

    @property
    def lead(self) -> int:
        """The run whose features are shown unless another is asked for: one with the loss."""
        roles = [role(one) for one in self.opened]
        return roles.index(LOSS) if LOSS in roles else 0

    def report(self, run: int) -> Path | None:
        """The run's own page."""
        page = RunFiles(self._run(run).folder).report
        return page if page.is_file() else None

    def report_part(self, run: int, own: str, name: str) -> Path | None:
        """A file of the folder beside it: `<own>/<name>`."""
        folder = RunFiles(self._run(run).folder).report_features
        return next(
            (path for path in folder.glob("*/*.js") if path.parts[-2:] == (own, name)), None
        )

    def runs(self) -> dict[str, Any]:
        """What the page is about."""
        return {
            "lead": self.lead,
            "model": self.opened[0].config.model.name,
            "hook": self.opened[0].reader.model.hook_name,
            "context_size": self.opened[0].config.dataset.context_size,
            "runs": [
                {
                    "name": name,
                    "folder": one.folder.resolve().name,
                    "words": "; ".join(line.strip() for line in repr(one).splitlines()[1:-1]),
                    "d_sae": one.sae.d_sae,
                    "measured": isinstance(one, LoadedRun),
                    "report": self.report(i) is not None,
                }
                for i, (name, one) in enumerate(zip(self.names, self.opened, strict=True))
            ],
        }

    def map(self, run: int) -> dict[str, Any]:
        """Density and consistency of every feature: lists [F] by name, null where undefined.

        Raises UserError for a run that is not there or was not measured.
        """
        one = self._run(run)
        if not isinstance(one, LoadedRun):
            raise UserError("nothing was measured of this SAE: python -m tcsae.evaluate does")
        window = _window(one)
        wanted = {"density": "density", "C": f"C_{window}", "L": f"L_{window}"}
        found = {k: one.per_feature[n] for k, n in wanted.items() if n in one.per_feature}
        return {
            "names": {key: wanted[key] for key in found},
            "values": {
                key: [float(f"{x:.4g}") if x == x else None for x in column.tolist()]
                for key, column in found.items()
            },
        }

    def feature(self, run: int, feature: int) -> dict[str, Any]:
        """What is known of one feature, no text needed. Raises UserError for one not there."""
        check_feature(feature, self._run(run).sae.d_sae)
        with self._lock:
            seen = self._bare(run)
        return {"run": run, "feature": feature, **self._known(seen, run, feature)}

    def read(
        self, text: str, lead: int, by: By, top: int, pins: Sequence[tuple[int, int]]
    ) -> dict[str, Any]:
        """A text as every run has it: its tokens, and features as rows of one side a run.

        Args:
            lead: the run whose strongest features are shown, the others' counterparts beside.
            by: what strongest means, as of `TextFeatures.top`.
            top: how many.
            pins: (run, feature) of those that are shown first, whatever they do.

        Raises:
            UserError: as `TextReader.read`; a run or feature that is not there.
        """
        for run, feature in [(lead, 0), *pins]:
            check_feature(feature, self._run(run).sae.d_sae)
        with self._lock:
            seen = self._seen(text)
            strongest = [(lead, one.feature) for one in seen[lead].found.top(top, by)]
            chosen = list(dict.fromkeys([*pins, *strongest]))
            rows = [self._row(seen, run, j) for run, j in chosen]
        for row in rows:
            row["pinned"] = (row["run"], row["feature"]) in pins
        found = seen[lead].found
        return {
            "tokens": found.tokens,
            "pieces": [(p.start, p.stop, visible(p.text)) for p in found.pieces],
            "valid": found.valid.int().tolist(),
            "contexts": len(found.contexts.unique()),
            "rows": rows,
        }

    def steer(
        self,
        prompt: str,
        run: int,
        strengths: Mapping[int, float],
        *,
        tokens: int,
        temperature: float,
        seed: int,
    ) -> dict[str, Any]:
        """A prompt continued as the model does and with features set, in units of their means.

        Raises UserError as `steer`, and for a feature that never fired on the held-out text.
        """
        one = self._run(run)
        values = {j: strength * _usual(one, j) for j, strength in strengths.items()}
        key = (prompt, tokens, temperature, seed)
        how: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "seed": seed}
        with self._lock:
            plain = _kept(self._plain, key, lambda: continuation(one.reader, prompt, {}, **how))
            steered = continuation(one.reader, prompt, values, **how) if values else plain
        return {"prompt": prompt, "plain": plain, "steered": steered, "values": values}

    # ------------------------------------------------------------------------------ inside

    def _run(self, run: int) -> Opened:
        if not 0 <= run < len(self.opened):
            raise UserError(f"run {run}: there are 0 to {len(self.opened) - 1}")
        return self.opened[run]

    def _seen(self, text: str) -> list[Seen]:
        def read() -> list[Seen]:
            return [seen_of(one, one.features(text, parted=True)) for one in self.opened]

        return _kept(self._texts, text, read)

    @functools.lru_cache(maxsize=MOST_RUNS)  # noqa: B019 (one of these lives as long as its page)
    def _bare(self, run: int) -> Seen:
        one = self.opened[run]
        return seen_of(one, one.features("a"))

    def _row(self, seen: Sequence[Seen], run: int, feature: int) -> dict[str, Any]:
        sides = []
        for other in range(len(seen)):
            same = other == run
            j, cosine = (feature, 1.0) if same else self._counterpart(run, feature, other)
            sides.append(
                {
                    "run": other,
                    "feature": j,
                    "cosine": None if same else number(cosine),
                    **self._known(seen[other], other, j),
                    **_along(seen[other].found, j),
                }
            )
        return {"run": run, "feature": feature, "sides": sides}

    def _nearest(self, run: int, feature: int, other: int) -> tuple[int, float]:
        of, among = (self.opened[i].sae.W_dec.detach().cpu() for i in (run, other))
        return counterpart(feature, of, among)

    def _known(self, seen: Seen, run: int, feature: int) -> dict[str, Any]:
        mean = seen.per_feature.get("mean_activation")
        usual = None if mean is None else float(mean[feature])
        return {
            "words": seen.tokens(feature),
            "facts": seen.facts(feature),
            "mean": number(usual) if usual is not None and usual > 0 else None,
            "page": f"run/{run}/{REPORT}#feature-{feature}" if self.report(run) else None,
        }


def _along(found: TextFeatures, feature: int) -> dict[str, Any]:
    """Where it is on, masked tokens left out, and how strongly."""
    strip = found.strip(feature)
    on = ((strip.values > 0) & strip.valid).nonzero().flatten().tolist()
    return {
        "on": on,
        "values": [float(f"{float(strip.values[i]):.4g}") for i in on],
        "largest": strip.largest,
        "longest": strip.longest,
    }


def _usual(opened: Opened, feature: int) -> float:
    """Its mean where it is on, of held-out text. Raises UserError where there is none."""
    check_feature(feature, opened.sae.d_sae)
    if not isinstance(opened, LoadedRun):
        raise UserError(
            "nothing was measured of this SAE, so that a strength has no unit: "
            "python -m tcsae.evaluate makes a run of it"
        )
    usual = float(opened.per_feature["mean_activation"][feature])
    if not usual > 0:
        raise UserError(f"feature {feature} never fired on the held-out text: it has no unit")
    return usual


def _window(run: LoadedRun) -> int | None:
    """8 where it was measured, else the largest."""
    known = [n[2:] for n in run.per_feature if n.startswith("C_") and n[2:].isdigit()]
    return 8 if "8" in known else max(map(int, known), default=None)


def _kept(kept: OrderedDict[Any, Value], key: Any, make: Callable[[], Value]) -> Value:
    """`make()`, or what it was; the last few are kept."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
