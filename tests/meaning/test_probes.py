"""Probes on planted features and shuffled labels, and what they say of texts without labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from tcsae.meaning.probes import CURVE, _of_raw, _of_task, sentence, tokens_needed
from tcsae.meaning.read_split import Side, few, prepare
from tcsae.meaning.tasks import GAP, WINDOW, Task, make_tasks
from tcsae.meaning.token_labels import Label, TokenLabels
from tcsae.meaning.transfer import across_positions, raw_across_positions

DOCUMENTS, T, F, D_IN = 48, 128, 40, 8
CLASSES = 4


def labels_of(*labels: Label, group: np.ndarray | None = None) -> TokenLabels:
    document = np.tile(np.arange(DOCUMENTS)[:, None], (1, T))
    document[:, 0] = -1
    return TokenLabels(
        document,
        document if group is None else group,
        np.zeros((DOCUMENTS, T), dtype=bool),
        list(labels),
    )


def topic() -> Label:
    """A class a document, as many documents each."""
    value = np.tile(np.arange(DOCUMENTS)[:, None] % CLASSES, (1, T))
    return Label("topic", "document", [f"topic {c}" for c in range(CLASSES)], value)


def counted() -> np.ndarray:
    there = np.ones((DOCUMENTS, T), dtype=bool)
    there[:, 0] = False
    return there


def task_of(name: str, *labels: Label) -> Task:
    tasks, said = make_tasks(labels_of(*labels), counted())
    assert said == []
    return next(task for task in tasks if task.name == name)


def noise(seed: int = 0) -> np.ndarray:
    """[tokens, F], 10 % of them on."""
    generator = np.random.default_rng(seed)
    on = generator.random((DOCUMENTS * T, F)) < 0.1
    return (on * generator.random((DOCUMENTS * T, F))).astype(np.float32)


def found(task: Task, f: np.ndarray, groups: tuple[int, ...] = ()) -> dict:
    raw = _of_raw(task, f[:, :D_IN].copy())
    return _of_task(task, csr_matrix(f), groups, raw)


@pytest.fixture(scope="module")
def shuffled() -> dict:
    """Features that know nothing of the topic."""
    return found(task_of("topic", topic()), noise())


def test_a_planted_feature_is_a_perfect_probe_at_k_1() -> None:
    task, f = task_of("topic", topic()), noise()
    label = topic().value.ravel()
    for c in range(CLASSES):
        f[:, 20 + c] = (label == c) * 0.5
    readings = found(task, f, groups=(20, 20))["readings"]
    for reading in ("token", "window", "document"):
        for name in ("k1", "k5", "other_groups"):
            assert readings[reading][name]["auc"].value == pytest.approx(1.0)
            assert readings[reading][name]["accuracy"].value == pytest.approx(1.0)
        assert readings[reading]["all"]["auc"].value > 0.98
    # The first group has none of them.
    assert readings["token"]["first_group"]["auc"].value == pytest.approx(0.5, abs=0.06)


def test_features_that_know_nothing_score_chance_within_the_interval(shuffled: dict) -> None:
    token = shuffled["readings"]["token"]
    for name in ("k1", "k5", "shuffled", "all"):
        low, high = token[name]["auc"].interval
        assert low < 0.5 < high and high - low < 0.1
    assert token["majority"]["accuracy"].value == pytest.approx(1 / CLASSES, abs=0.02)
    assert shuffled["tokens_needed"].value is None
    assert "not over chance" in sentence("topic", shuffled)


def test_a_feature_that_tells_the_test_part_alone_is_never_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    label = np.arange(200) % CLASSES
    leak = F - 1
    sides = []
    for leaks in (False, True):
        x = torch.rand(200, F, generator=generator)
        x[:, leak] = torch.from_numpy((label == 0) * 9.0) if leaks else torch.rand(200) * 1e-3
        x[:, :CLASSES] += torch.nn.functional.one_hot(torch.from_numpy(label), CLASSES)
        sides.append(Side(x, label, label))
    data = prepare(*sides, CLASSES)
    assert leak not in data.difference.topk(16, dim=1).indices
    # And the score is what it is without the leak.
    clean = Side(sides[1].x.clone(), label, label)
    clean.x[:, leak] = 0.0
    without = prepare(sides[0], clean, CLASSES)
    for k in (1, 5, 16):
        np.testing.assert_allclose(few(data, k), few(without, k))


def test_features_that_flicker_need_more_tokens() -> None:
    """On in 1 token of 10, at random, a feature of the topic is seen only in the mean of many."""
    task, label = task_of("topic", topic()), topic().value.ravel()
    needed = []
    for rate in (1.0, 0.5, 0.1):
        f = noise()
        on = np.random.default_rng(1).random(len(label)) < rate
        for c in range(CLASSES):
            f[:, c] = (label == c) & on
        result = found(task, f)
        assert result["readings"]["document"]["k5"]["accuracy"].value > 0.95
        needed.append(result["tokens_needed"].value)
        low, high = result["tokens_needed"].interval
        assert low <= needed[-1] <= high
    assert needed[0] == pytest.approx(1.0) and needed[0] < needed[1] < needed[2] < 64


def test_tokens_needed_lies_between_the_sizes_tried() -> None:
    rising = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]
    # 95 % of the way from .2 to 1 is .96, 80 % of the step from 8 to 16.
    assert tokens_needed(rising, 0.2) == pytest.approx(8 * 2**0.8)
    assert tokens_needed([0.3] * 9, 0.3) is None
    assert tokens_needed([0.5] * 8 + [1.0], 0.2) is None
    assert len(CURVE) == 8


def test_no_document_is_on_both_sides_but_of_the_context_probe() -> None:
    speaker = Label("speaker", "stretch", ["a", "b"], np.tile(np.arange(T) // 64, (DOCUMENTS, 1)))
    word = Label("tag", "word", ["N", "V"], np.tile(np.arange(T) % 2, (DOCUMENTS, 1)))
    tasks, said = make_tasks(labels_of(topic(), speaker, word), counted())
    assert [task.name for task in tasks] == ["context", "topic", "speaker", "tag"] and not said
    for task in tasks:
        assert len(task.splits) == 3
        tried = []
        for split in task.splits:
            sides = [{item.document for item in part} for part in (split.train, split.test)]
            tried += sorted(sides[1])
            assert (sides[0] == sides[1]) if task.kind == "context" else not sides[0] & sides[1]
        assert len(tried) == len(set(tried)) == DOCUMENTS
    assert "document" not in tasks[-1].readings
    assert all(len(item.tokens) <= WINDOW for split in tasks[-1].splits for item in split.train)


def test_the_halves_of_a_document_lie_apart() -> None:
    for split in task_of("context").splits:
        for first, second in zip(split.train, split.test, strict=True):
            assert second.tokens.min() - first.tokens.max() > GAP
            assert first.document == second.document


def test_a_group_is_held_out_as_a_whole_where_the_label_is_of_groups() -> None:
    """Plays of a genre: a scene of a play that is learned from would give the genre away."""
    play = np.tile(np.arange(DOCUMENTS)[:, None] // 4, (1, T))
    genre = Label("genre", "document", ["c", "t"], play % 2)
    of_play = Label("play", "document", [str(p) for p in range(12)], play)
    tasks, _ = make_tasks(labels_of(genre, of_play, group=play), counted())
    by_name = {task.name: task for task in tasks}
    for split in by_name["genre"].splits:
        sides = [{item.document // 4 for item in part} for part in (split.train, split.test)]
        assert not sides[0] & sides[1]
    for split in by_name["play"].splits:
        sides = [{item.document // 4 for item in part} for part in (split.train, split.test)]
        assert sides[0] & sides[1]


@pytest.mark.parametrize(
    ("classes", "value", "said"),
    [
        (["one"], np.zeros(DOCUMENTS, int), "it has 1 class in the held-out text (one)"),
        (
            [str(d) for d in range(DOCUMENTS)],
            np.arange(DOCUMENTS),
            f"it has {DOCUMENTS} classes in the held-out text, and takes 2 that are each in 3 doc",
        ),
        (["one"], np.full(DOCUMENTS, -1), "no held-out token has it"),
    ],
)
def test_labels_that_cannot_be_learned_are_one_clear_line(
    classes: list[str], value: np.ndarray, said: str
) -> None:
    label = Label("topic", "document", classes, np.tile(value[:, None], (1, T)))
    tasks, lines = make_tasks(labels_of(label), counted())
    assert [task.name for task in tasks] == ["context"]
    assert len(lines) == 1 and "no probe of topic" in lines[0] and said in lines[0]


def test_too_few_documents_for_the_context_are_one_clear_line() -> None:
    labels = labels_of()
    labels.document[:] = labels.document % 5
    tasks, lines = make_tasks(labels, counted())
    assert tasks == [] and len(lines) == 1 and "no probe of the context: 5 held-out" in lines[0]


def test_what_is_free_of_positions_loses_nothing_between_halves() -> None:
    task, f = task_of("topic", topic()), noise()
    label, position = topic().value.ravel(), np.tile(np.arange(T), DOCUMENTS)
    for c in range(CLASSES):
        f[:, 20 + c] = label == c
    positions = across_positions(task, csr_matrix(f), T, None)["positions"]
    assert positions["first"].value == positions["second"].value == 1.0
    assert positions["lost"].value == 0.0 and positions["lost"].interval == (0.0, 0.0)
    # Each class has a feature for either half: what was learned at one is silent at the other.
    bound = noise()
    for c in range(CLASSES):
        bound[:, 20 + c] = (label == c) & (position < T // 2)
        bound[:, 30 + c] = (label == c) & (position >= T // 2)
    positions = across_positions(task, csr_matrix(bound), T, None)["positions"]
    assert positions["second"].value == 1.0
    assert positions["first"].value < 0.5
    assert positions["lost"].interval[0] > 0.4
    raw = raw_across_positions(task, f, T)
    assert raw["raw_first"].value == raw["raw_second"].value == 1.0
    said = {"positions": {**positions, **raw}}
    task_found = {**found(task, f), **said}
    assert "learned there 100 % (activations 100 %, 100 %)" in sentence("topic", task_found)
