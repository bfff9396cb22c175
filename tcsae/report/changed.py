"""The features that a loss changed most, each beside its counterparts in the baseline and in the
control, along the same held-out document.

A feature's part in window consistency is its share of the energy (c0) times its C_W; what it gained
is that less the part of the baseline's counterpart, the feature with the nearest decoder direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.labels import number
from tcsae.measure.strips import Strip, visible
from tcsae.report.contents import NO_ANALYSIS
from tcsae.report.controls import control_of, is_control
from tcsae.report.passage import NO_PASSAGE, Passage
from tcsae.report.rows import Row, row_of
from tcsae.runs.folder import LoadedRun, load_run

Group = Mapping[str, Any]

SHOWN = 6
CANDIDATES = 64
"""Features of the loss, by their part in C_W, whose counterparts are looked for."""
MAX_SETTINGS = 3
"""Settings that are shown, those with the largest C_W."""
MIN_ON = 3
"""Tokens of the document at which a feature must be on to be shown along it."""
BEFORE, AFTER = 30, 60
"""Tokens of text around the longest run."""


@dataclass(frozen=True)
class Side:
    """One SAE's feature along the document."""

    name: str
    """"baseline", "loss" or "control"."""
    words: str
    row: Row
    excerpt: Strip
    rho: list[float]
    """By lag from 1 on."""


@dataclass(frozen=True)
class Changed:
    """One feature of the loss, with its counterparts."""

    feature: int
    head: str
    tokens: list[str]
    sides: list[Side]


@dataclass(frozen=True)
class Block:
    """What is shown of one setting."""

    label: str
    words: str
    features: list[Changed]
    reason: str = ""
    """Why there are none."""


class _Arm:
    """One run of the comparison, with what is asked of it."""

    def __init__(self, name: str, run: LoadedRun, metric: str) -> None:
        self.name, self.run = name, run
        self.passage = Passage.of(run.analysis)
        self.W_dec = run.sae.W_dec.detach()
        values = run.per_feature
        unmeasured = torch.full_like(values["c0"], torch.nan)
        self.C = values.get(metric, unmeasured).double()
        energy = torch.where(self.C.isfinite(), values["c0"].double(), 0.0).nan_to_num()
        self.part = energy / energy.sum().clamp(min=1e-12) * self.C.nan_to_num()
        self.density, self.rho = values["density"], values["rho"]

    def nearest(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and cosines of the features nearest to directions [M, d]."""
        unit = torch.nn.functional.normalize(directions, dim=1)
        norms = self.W_dec.norm(dim=1).clamp(min=1e-12)  # no second copy of a wide decoder
        cosine, number_of = (unit @ self.W_dec.T / norms).max(dim=1)
        return number_of, cosine


def changed_blocks(groups: Sequence[Group], content: Mapping[str, Any]) -> list[Block]:
    """For the settings of one stream that have a baseline; [] where no C_W was measured."""
    window = content["headline_window"]
    if window is None:
        return []
    metric = f"C_{window}"
    with_loss = [g for g in groups if not g["is_baseline"] and not is_control(g)]
    with_loss = [g for g in with_loss if _baseline_of(g, groups, content) is not None]
    with_loss.sort(key=lambda g: -(g["metrics"].get(metric, {}).get("value") or 0.0))
    return [_block(g, groups, content, metric) for g in with_loss[:MAX_SETTINGS]]


def _baseline_of(group: Group, groups: Sequence[Group], content: Mapping[str, Any]) -> Group | None:
    """The one that it is compared with, or the first of its baseline's arm."""
    ids = list(group["match"]["groups"])
    arms = {arm["id"]: arm for arm in content["arms"]}
    own = arms[group["arm"]]["baseline"]
    ids += arms[own]["groups"] if own is not None else []
    return next((g for i in ids for g in groups if g["id"] == i and g is not group), None)


def _folders(group: Group, content: Mapping[str, Any]) -> dict[Any, Path]:
    """Folder of the used runs of a group by seed."""
    used = [run for run in content["runs"] if run["group"] == group["id"]]
    return {run["seed"]: Path(run["folder"]) for run in used if run["status"] == "used"}


def _block(group: Group, groups: Sequence[Group], content: Mapping[str, Any], metric: str) -> Block:
    baseline, control = _baseline_of(group, groups, content), control_of(group, groups)
    assert baseline is not None
    mine, theirs = _folders(group, content), _folders(baseline, content)
    seed = next((s for s in mine if s in theirs), next(iter(mine)))
    try:
        loss = _Arm("loss", load_run(mine[seed]), metric)
        base = _Arm("baseline", load_run(theirs.get(seed, next(iter(theirs.values())))), metric)
        arms = [base, loss]
        if control is not None:
            of_control = _folders(control, content)
            folder = of_control.get(seed, next(iter(of_control.values())))
            arms.append(_Arm("control", load_run(folder), metric))
    except UserError as error:
        return Block(group["label"], "", [], f"cannot be shown: {error}")
    words = f"{loss.run.folder.name} beside {base.run.folder.name}"
    if control is None:
        words += "; its shuffled control is not among the runs"
    reason = _reason(arms)
    if reason:
        return Block(group["label"], words, [], reason)
    found = _most_changed(loss, base)
    if not found:
        return Block(group["label"], words, [], "none of them is on in this document")
    return Block(group["label"], words, [_changed(j, loss, arms, metric) for j in found])


def _reason(arms: Sequence[_Arm]) -> str:
    for arm in arms:
        if arm.passage is None:
            why = NO_ANALYSIS if arm.run.analysis is None else NO_PASSAGE
            return f"the document of {arm.run.folder.name} is {why}"
    first = arms[0].passage
    for arm in arms[1:]:
        if first is not None and arm.passage is not None and not first.same_text(arm.passage):
            return "the runs kept different documents, or leave out other tokens of it"
    return ""


def _most_changed(loss: _Arm, base: _Arm) -> list[int]:
    """Features of the loss that gained most and are on in the document, most first."""
    candidates = loss.part.argsort(descending=True, stable=True)[:CANDIDATES]
    counterpart, _ = base.nearest(loss.W_dec[candidates])
    gain = loss.part[candidates] - base.part[counterpart]
    assert loss.passage is not None
    on = loss.passage.n_on(len(loss.part))[candidates]
    order = gain.argsort(descending=True, stable=True)
    kept = order[(gain[order] > 0) & (on[order] >= MIN_ON)]
    return candidates[kept][:SHOWN].tolist()


def _changed(feature: int, loss: _Arm, arms: Sequence[_Arm], metric: str) -> Changed:
    direction = loss.W_dec[feature][None]
    assert loss.passage is not None and loss.run.analysis is not None
    run = next(run for run in loss.passage.runs if run.feature == feature)
    sides, values = [], {}
    for arm in arms:
        own, cosine = (feature, 1.0)
        if arm is not loss:
            found, cosines = arm.nearest(direction)
            own, cosine = int(found), float(cosines)
        assert arm.passage is not None
        strip = arm.passage.strip(own)
        values[arm.name] = float(arm.C[own])
        words = f"feature {own}, {metric} {number(values[arm.name])}, density "
        words += number(float(arm.density[own]))
        words += f", on at {strip.n_on} tokens here, at most {strip.longest} in a row"
        if arm is not loss:
            words += f"; decoder cosine {number(cosine)}"
        excerpt = strip.part(max(0, run.start - BEFORE), run.start + run.length + AFTER)
        rho = [float(r) for r in arm.rho[1:, own].nan_to_num()]
        sides.append(Side(arm.name, words, row_of(strip), excerpt, rho))
    head = f"{metric} {number(values['baseline'])} → {number(values['loss'])}"
    if "control" in values:
        head += f", control {number(values['control'])}"
    tokens = loss.run.analysis.specialization["features"]["top_tokens"][feature]
    return Changed(feature, head, [visible(t).replace("\n", "") for t in tokens], sides)
