"""Probes: what can be read from few features of an SAE, and from how many tokens of them.

k-sparse probes (Gurnee et al. 2023, arXiv 2305.01610; sae-probes, Kantamneni et al. 2025, arXiv
2502.16681): for each class the k features whose means differ most between it and the rest, on the
training part alone, and a logistic regression on these. One class against the rest and not the
union over classes (T-SAE, arXiv 2511.05541): so k says what it says, whatever the number of
classes. The class of a token is the one with the highest score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from tcsae.base.progress import Progress
from tcsae.config import Measured
from tcsae.data.language_model import LanguageModel
from tcsae.meaning.held_text import Findings, HeldText, Number
from tcsae.meaning.read_split import (
    HEADLINE_K,
    Scores,
    all_of,
    few,
    read,
    replicates_of,
    score,
    shuffled,
)
from tcsae.meaning.tasks import Task, make_tasks
from tcsae.meaning.token_labels import token_labels
from tcsae.meaning.transfer import across_positions, raw_across_positions, transfer_words
from tcsae.sae.base import SparseAutoencoder

KS = (1, 2, 5, 16)
CURVE = (1, 2, 4, 8, 16, 32, 64, 128)
"""Tokens averaged, until the score is that of the document."""
ENOUGH = 0.95
"""Share of the document's score over chance."""
DRAWS = 500
ENCODE_CONTEXTS = 16


def probes(sae: SparseAutoencoder, text: HeldText, config: Measured) -> Findings:
    """Every probe that the held-out text has labels for, of one SAE.

    Raises UserError for `evaluation.label_fields` that rows do not have.
    """
    material = _material(text, config)
    if not material.tasks:
        return Findings({}, list(material.said))
    with Progress("probes", len(material.tasks), unit="probes") as progress:
        codes = _codes(sae, text)
        found = {}
        for number, task in enumerate(material.tasks):
            text.stop.check()
            raw = text.once(
                f"probes raw {number} {config.evaluation.label_fields}",
                lambda task=task: _of_raw(task, material.raw),  # type: ignore[misc]
            )
            found[task.name] = _of_task(task, codes, sae.cfg.group_sizes, raw)
            if task.kind in ("context", "document"):
                of_raw = text.once(
                    f"probes positions {number} {config.evaluation.label_fields}",
                    lambda task=task: raw_across_positions(  # type: ignore[misc]
                        task, material.raw, material.size
                    ),
                )
                found[task.name] |= across_positions(task, codes, material.size, of_raw)
            progress.update(1)
    return _findings(found, material)


# ---------------------------------------------------------------------- what is of the text


@dataclass(frozen=True)
class _Material:
    raw: np.ndarray
    """[tokens, d_in] float32: the activations themselves, the ceiling."""
    tasks: list[Task]
    said: list[str]
    size: int
    """Tokens of a context."""


def _material(text: HeldText, config: Measured) -> _Material:
    fields = config.evaluation.label_fields

    def make() -> _Material:
        contexts = text.batches.source.contexts
        tokenizer = text.model.tokenizer if isinstance(text.model, LanguageModel) else None
        labels = token_labels(contexts, config.dataset, tokenizer, fields)
        raw, valid = _activations(text)
        return _Material(raw, *make_tasks(labels, valid), valid.shape[1])

    return text.once(f"probes {fields}", make)


def _activations(text: HeldText) -> tuple[np.ndarray, np.ndarray]:
    """Raw [tokens, d_in] and which count [contexts, T]."""
    x, valid = [], []
    for batch in text.batches.in_order(ENCODE_CONTEXTS):
        text.stop.check()
        x.append(batch.x.float().flatten(0, 1).cpu().numpy())
        valid.append(batch.valid.cpu().numpy())
    return np.concatenate(x), np.concatenate(valid)


def _codes(sae: SparseAutoencoder, text: HeldText) -> csr_matrix:
    """The features of every held-out token, [tokens, F]."""
    parts = []
    for batch in text.batches.in_order(ENCODE_CONTEXTS):
        text.stop.check()
        f = sae.encode(batch.x.float(), segments=batch.segments, valid=batch.valid)
        parts.append(csr_matrix(f.flatten(0, 1).cpu().numpy().astype(np.float32)))
    return vstack(parts, format="csr")


# ---------------------------------------------------------------------- one task


def _of_raw(task: Task, raw: np.ndarray) -> dict[str, dict[str, Any]]:
    """The ceiling and the majority, {reading: {probe: numbers}}."""
    replicates, found = replicates_of(task), {}
    for reading, size in task.readings.items():
        raw_scores, majority = Scores(), Scores()
        for split in task.splits:
            data = read(task, split, raw, size)
            score(raw_scores, all_of(data), data, replicates)
            most = np.zeros((len(data.test.label), len(task.classes)))
            most[:, np.bincount(data.train.label).argmax()] = 1
            score(majority, most, data, replicates)
        found[reading] = {
            "raw": raw_scores.dump(replicates),
            "majority": majority.dump(replicates),
        }
    return found


def _of_task(
    task: Task,
    codes: csr_matrix,
    groups: Sequence[int],
    raw: Mapping[str, Mapping[str, dict[str, Number]]],
) -> dict[str, Any]:
    """{classes, kind, readings: {reading: {probe: {accuracy, auc, f1}}}, density, curve ...}."""
    replicates = replicates_of(task)
    readings: dict[str, dict[str, dict[str, Number]]] = {}
    density = []
    for reading, size in task.readings.items():
        scores: dict[str, Scores] = {}
        for number, split in enumerate(task.splits):
            data = read(task, split, codes, size)
            made = {f"k{k}": few(data, k) for k in KS}
            made["all"] = all_of(data)
            made["shuffled"] = few(data, HEADLINE_K, y=shuffled(data, number))
            if len(groups) > 1:
                made["first_group"] = few(data, HEADLINE_K, slice(0, groups[0]))
                made["other_groups"] = few(data, HEADLINE_K, slice(groups[0], None))
            for name, z in made.items():
                score(scores.setdefault(name, Scores()), z, data, replicates)
            if reading == "token":
                chosen = data.difference.topk(HEADLINE_K, 1).indices
                density.append(float((data.train.x[:, chosen] > 0).float().mean()))
        readings[reading] = {n: s.dump(replicates) for n, s in scores.items()} | dict(raw[reading])
    found: dict[str, Any] = {
        "kind": task.kind,
        "classes": task.classes,
        "n_documents": replicates.n_documents,
        "splits": len(task.splits),
        "density": float(np.mean(density)),
        "readings": readings,
    }
    if "document" in task.readings:
        found |= _needed(task, codes, readings["document"])
    return found


# ---------------------------------------------------------------------- how many tokens


def _needed(
    task: Task, codes: csr_matrix, document: Mapping[str, dict[str, Number]]
) -> dict[str, Any]:
    """The curve of accuracy by tokens averaged, and how many reach the document's (k = 5)."""
    sizes = [*CURVE, None]
    by_document: list[dict[int, np.ndarray]] = []
    for size in sizes:
        sums: dict[int, np.ndarray] = {}
        for split in task.splits:
            data = read(task, split, codes, size)
            right = few(data, HEADLINE_K).argmax(1) == data.test.label
            for d in np.unique(data.test.document):
                own = data.test.document == d
                sums[int(d)] = sums.get(int(d), np.zeros(2)) + [right[own].sum(), own.sum()]
        by_document.append(sums)
    known = sorted(set().union(*by_document))
    table = np.array([[sums.get(d, np.zeros(2)) for d in known] for sums in by_document])
    chance = document["majority"]["accuracy"].value or 0.0
    curve = table.sum(1)
    accuracy = (curve[:, 0] / curve[:, 1]).tolist()
    generator = np.random.default_rng(0)
    draws = generator.multinomial(len(known), np.full(len(known), 1 / len(known)), DRAWS)
    drawn = np.einsum("sdk,rd->rsk", table, draws)
    values = [tokens_needed((row[:, 0] / row[:, 1]).tolist(), chance) for row in drawn]
    value = tokens_needed(accuracy, chance)
    low, high = document["k5"]["accuracy"].interval
    shown = value is not None and (low is None or low > chance)
    interval = _percentiles(values) if shown and low is not None else (None, None)
    return {
        "curve": {"tokens": [*CURVE, "document"], "accuracy": accuracy, "chance": chance},
        "tokens_needed": Number(value if shown else None, interval),
    }


def tokens_needed(accuracy: Sequence[float], chance: float) -> float | None:
    """Tokens averaged until ENOUGH of the last accuracy over chance, between the sizes of CURVE by
    the logarithm; None: the last is not over chance, or CURVE ends before."""
    goal = chance + ENOUGH * (accuracy[-1] - chance)
    if accuracy[-1] <= chance:
        return None
    if accuracy[0] >= goal:
        return 1.0
    for i in range(1, len(CURVE)):
        if accuracy[i] >= goal:
            part = (goal - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return float(CURVE[i - 1] * (CURVE[i] / CURVE[i - 1]) ** part)
    return None


def _percentiles(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Of draws; one that is never reached is more than the last of CURVE."""
    numbers = np.array([CURVE[-1] if value is None else value for value in values])
    low, high = np.quantile(numbers, [0.025, 0.975])
    return float(low), float(high)


# ---------------------------------------------------------------------- what is reported


def _findings(found: dict[str, dict[str, Any]], material: _Material) -> Findings:
    headline: dict[str, Number] = {}
    said = list(material.said)
    semantics = next((n for n, t in found.items() if t["kind"] == "document"), None)
    syntax = next((n for n, t in found.items() if t["kind"] == "word"), None)
    names = {"context": "context", semantics: "semantics", syntax: "syntax"}
    for name, task in found.items():
        if name not in names:
            continue
        short = names[name]
        readings = task["readings"]
        for reading in ("token", "document"):
            if reading in readings:
                key = f"probe_{short}_{reading}"
                headline[key] = readings[reading][f"k{HEADLINE_K}"]["accuracy"]
        if "tokens_needed" in task:
            headline[f"probe_{short}_tokens"] = task["tokens_needed"]
        if "positions" in task:
            headline[f"probe_{short}_transfer"] = task["positions"]["lost"]
    said += [sentence(name, task) for name, task in found.items()]
    details = {name: _plain(task) for name, task in found.items()}
    return Findings(headline, said, {"semantics": semantics, "syntax": syntax, "tasks": details})


def sentence(name: str, task: Mapping[str, Any]) -> str:
    token = task["readings"]["token"]
    k = f"k{HEADLINE_K}"
    text = (
        f"{name} ({len(task['classes'])} classes): {HEADLINE_K} features a class of one token are "
        f"right in {_percent(token[k])} (chance {_percent(token['majority'])}, shuffled labels "
        f"{_percent(token['shuffled'])}, all features {_percent(token['all'])}, the activations "
        f"{_percent(token['raw'])})"
    )
    if "tokens_needed" in task:
        whole = _percent(task["readings"]["document"][k])
        needed = task["tokens_needed"].value
        text += f"; of a document's mean {whole}, " + (
            "which is not over chance, or not reached by 128 tokens"
            if needed is None
            else f"nearly reached with {needed:.3g} tokens averaged"
        )
    if "positions" in task:
        text += f"; {transfer_words(task['positions'])}"
    return text


def _percent(numbers: Mapping[str, Number]) -> str:
    value = numbers["accuracy"].value
    return "n/a" if value is None else f"{100 * value:.0f} %"


def _plain(value: Any) -> Any:
    if isinstance(value, Number):
        return value.dump()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value
