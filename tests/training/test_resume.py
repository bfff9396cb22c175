"""Interrupted and resumed equals uninterrupted, bit for bit; a bank equals its members alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import metric_lines, small_config, weights_digest

from tcsae.base.errors import Interrupted
from tcsae.base.files import load_tensors
from tcsae.base.signals import StopRequest
from tcsae.config import Config
from tcsae.data.stream import Stream, open_stream
from tcsae.jobs.bank import run
from tcsae.jobs.tracking import JsonLines
from tcsae.sae.base import SparseAutoencoder
from tcsae.training.member import Member
from tcsae.training.trainer import Seat, train_bank

STEPS = 12
JOBS: dict[str, dict[str, str]] = {
    "topk": {},
    "topk with AuxK": {"sae__dead_after_tokens": "128", "sae__k": "2"},
    "standard with resampling": {
        "sae": "standard",
        "sae__l1_coefficient": "10",
        "training__lr": "1e-1",
        "sae__dead_after_tokens": "128",
    },
    "moving average": {"training__ema_decay": "0.9"},
    "batch history": {"consistency": "batch_history", "lambda": "1"},
    "shuffled": {"consistency": "shuffled", "lambda": "1"},
    "literal, whole documents": {"consistency": "window_variance", "window": "document"},
    "first version of the loss": {
        "consistency__variance_over": "positions",
        "consistency__position_weight": "0",
    },
    "first group": {"sae": "matryoshka", "sae__k": "8", "consistency": "first_group"},
    "bfloat16 products": {"training__precision": "bfloat16"},
    "streamed": {"store": "stream"},
    "steered L0": {"sae": "standard", "training__target_l0": "6"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def job(tiny_gpt2: Path, texts: Path, store: Path) -> Callable[..., Config]:
    def build(**changes: str) -> Config:
        # The last checkpoint has what the weights alone do not show.
        fixed = {"store__dir": str(store), "layer": "1", "training__keep_checkpoints": "true"}
        return small_config(tiny_gpt2, texts, **fixed, **changes)

    return build


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Do something just before the training step of that number; training is as ever."""
    original = Member.train_step

    def train_step(self: Member, *args: Any) -> Any:
        if self.step == step:
            action()
        return original(self, *args)

    monkeypatch.setattr(Member, "train_step", train_step)


def die() -> None:
    raise MemoryError


def final_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, metadata = load_tensors(folder / "checkpoint" / f"step-{STEPS:08d}.safetensors", "")
    facts = json.loads(metadata["facts"])
    return tensors, {k: v for k, v in facts.items() if k != "seconds"}


def results(folder: Path) -> dict[str, Any]:
    info = json.loads((folder / "final_info.json").read_text())
    clock = ("training_seconds", "tokens_per_second", "wall_seconds", "seconds")
    return {key: value for key, value in info.items() if key not in clock}


def assert_same_run(one: Path, other: Path) -> None:
    tensors, facts = final_state(one)
    others, other_facts = final_state(other)
    assert facts == other_facts
    assert tensors.keys() == others.keys()
    for name in tensors:
        assert torch.equal(tensors[name], others[name]), name
    assert weights_digest(one) == weights_digest(other)
    assert metric_lines(one) == metric_lines(other)
    assert results(one) == results(other)


# -------------------------------------------------------------------------------- one SAE


@pytest.mark.parametrize("name", JOBS)
def test_interrupted_and_resumed_equals_uninterrupted(
    name: str, job: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(**JOBS[name])
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        # Between two checkpoints, in the middle of the second pass over the contexts.
        before_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match="SIGTERM"):
            run(config, tmp_path / "parts")
    assert metric_lines(tmp_path / "parts")[-1]["step"] == 6
    assert (tmp_path / "parts" / "checkpoint" / "step-00000007.safetensors").is_file()
    with monkeypatch.context() as patch:
        before_step(patch, 10, die)  # two steps after the checkpoint of step 8
        with pytest.raises(MemoryError):
            run(config, tmp_path / "parts")
    assert metric_lines(tmp_path / "parts")[-1]["step"] == 10
    ran: list[int] = []
    with monkeypatch.context() as patch:
        for step in range(STEPS):
            before_step(patch, step, lambda step=step: ran.append(step))  # type: ignore[misc]
        run(config, tmp_path / "parts")
    assert ran == [8, 9, 10, 11]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_features_are_resampled_on_both_sides_of_the_interruption(
    job: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says that the test above means what its parameters say."""
    revived: list[tuple[int, int]] = []
    now: list[int] = []
    original = SparseAutoencoder.revive

    def revive(self: SparseAutoencoder, dead: torch.Tensor, *args: Any) -> int:
        n = original(self, dead, *args)
        revived.append((now[-1], n))
        return n

    monkeypatch.setattr(SparseAutoencoder, "revive", revive)
    for step in range(STEPS):
        before_step(monkeypatch, step, lambda step=step: now.append(step))  # type: ignore[misc]
    run(job(**JOBS["standard with resampling"]), tmp_path / "run")
    assert any(n > 0 and step < 6 for step, n in revived)
    assert any(n > 0 and step >= 6 for step, n in revived)


def test_dead_features_are_rebuilt_on_both_sides_of_the_interruption(
    job: Callable[..., Config], tmp_path: Path
) -> None:
    """Says the same for AuxK."""
    run(job(**JOBS["topk with AuxK"]), tmp_path / "run")
    terms = {line["step"]: line["loss/auxk"] for line in metric_lines(tmp_path / "run")}
    assert terms[6] > 0 and terms[8] > 0


def test_another_seed_is_another_run(job: Callable[..., Config], tmp_path: Path) -> None:
    """Says that equality above is not equality of everything."""
    run(job(), tmp_path / "0")
    run(job(seed="1"), tmp_path / "1")
    assert weights_digest(tmp_path / "0") != weights_digest(tmp_path / "1")


def test_the_order_of_interruptions_does_not_matter(
    job: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job()
    run(config, tmp_path / "whole")
    for step in range(STEPS):
        with monkeypatch.context() as patch:
            before_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(Interrupted, match="SIGINT"):
                run(config, tmp_path / "parts")
    run(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_after_training_only_measures_again(
    job: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job()
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("tcsae.jobs.finish.evaluate", lambda *_: die())
        with pytest.raises(MemoryError):
            run(config, tmp_path / "parts")
    assert not (tmp_path / "parts" / "final_info.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Member, "train_step", lambda *_: die())
        run(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_during_the_measurements_costs_no_training(
    job: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tcsae.measure.evaluation import evaluate

    config = job()
    run(config, tmp_path / "whole")

    def signalled(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("tcsae.jobs.finish.evaluate", signalled)
        with pytest.raises(Interrupted, match="SIGTERM"):
            run(config, tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(Member, "train_step", lambda *_: die())
        run(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# ------------------------------------------------------------------------------------ a bank


class Solo:
    """The members' configs, their stream, and each one's training alone."""

    def __init__(self, configs: list[Config], folder: Path) -> None:
        self.configs, self.folder = configs, folder
        self.stream: Stream = open_stream(configs[0], StopRequest())
        self.states = [self.train([i], "solo")[0].member for i in range(len(configs))]

    def seats(self, members: list[int], where: str) -> list[Seat]:
        seats = []
        for i in members:
            folder = self.folder / where / str(i)
            folder.mkdir(parents=True, exist_ok=True)
            member = Member(
                self.configs[i], self.stream.model.d_in, self.stream.train.calibration, "cpu", False
            )
            seats.append(Seat(member, folder, JsonLines(folder / "metrics.jsonl")))
        return seats

    def train(self, members: list[int], where: str) -> list[Seat]:
        seats = self.seats(members, where)
        train_bank(seats, self.stream.train, StopRequest())
        return seats

    def assert_equal(self, seats: list[Seat]) -> None:
        for i, seat in enumerate(seats):
            alone = self.states[i].checkpoint({}).tensors
            together = seat.member.checkpoint({}).tensors
            for name, tensor in alone.items():
                if not name.startswith("rng."):
                    assert torch.equal(tensor, together[name]), (i, name)
            solo = self.folder / "solo" / str(i)
            assert metric_lines(seat.folder) == metric_lines(solo)


@pytest.fixture
def solo(job: Callable[..., Config], tmp_path: Path) -> Solo:
    configs = [
        job(window="4", **{"lambda": "0"}),
        job(window="8", **{"lambda": "1"}),
        job(seed="5", consistency="batch_history", **{"lambda": "0.5"}),
        job(sae="standard", consistency="shuffled", **{"lambda": "1"}),
    ]
    return Solo(configs, tmp_path)


def test_members_of_a_bank_end_as_each_would_alone(solo: Solo) -> None:
    solo.assert_equal(solo.train([0, 1, 2, 3], "bank"))
    weights = [state.sae.W_enc for state in solo.states]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_a_bank_that_was_interrupted_unevenly_ends_as_it_would_have(
    solo: Solo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_in_the_third_member() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    calls: list[int] = []
    with monkeypatch.context() as patch:
        before_step(patch, 7, die_in_the_third_member)
        with pytest.raises(KeyboardInterrupt):
            solo.train([0, 1, 2, 3], "bank")
    # One member lost its newest checkpoint as well, another one every one.
    (solo.folder / "bank" / "1" / "checkpoint" / "step-00000004.safetensors").unlink()
    seats = solo.train([0, 1, 2, 3], "bank")
    solo.assert_equal(seats)


def test_a_member_that_fails_leaves_the_others_alone_and_can_catch_up(
    solo: Solo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_in_the_third_member() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError

    calls: list[int] = []
    with monkeypatch.context() as patch:
        before_step(patch, 7, fail_in_the_third_member)
        seats = solo.train([0, 1, 2, 3], "bank")
    assert [type(seat.error) for seat in seats] == [type(None), type(None), MemoryError, type(None)]
    assert [seat.member.step for seat in seats] == [STEPS, STEPS, 7, STEPS]
    solo.assert_equal(solo.train([0, 1, 2, 3], "bank"))
