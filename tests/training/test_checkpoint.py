"""Checkpoints: whole or absent, the last two kept, the newest good one found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import leftovers, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.base.errors import UserError
from tcsae.base.signals import StopRequest
from tcsae.consistency import Consistency
from tcsae.data.stream import open_stream
from tcsae.jobs.bank import run
from tcsae.jobs.tracking import JsonLines
from tcsae.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tcsae.training.member import Member
from tcsae.training.trainer import Seat, train_bank


def checkpoint(step: int, run_id: str = "mine") -> Checkpoint:
    return Checkpoint(step, {"sae.W": torch.full((3,), float(step))}, {"run_id": run_id})


def steps_in(folder: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("step-")) for file in folder.glob("step-*"))


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.tensor(5),
        "c": torch.tensor([True, False]),
        "d": torch.randn(4).to(torch.bfloat16),
        "transposed": torch.randn(2, 3).T,
    }
    save_checkpoint(tmp_path, Checkpoint(7, tensors, {"run_id": "mine", "seconds": 0.25}))
    found = load_checkpoint(tmp_path, "mine")
    assert found is not None
    assert (found.step, found.facts) == (7, {"step": 7, "run_id": "mine", "seconds": 0.25})
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 9, 30):
        save_checkpoint(tmp_path, checkpoint(step))
    assert steps_in(tmp_path) == [9, 30]
    assert leftovers(tmp_path) == []


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent", "mine") is None
    assert load_checkpoint(tmp_path, "mine") is None


@pytest.mark.parametrize("cut", [0, 50, -1])
def test_a_damaged_one_is_removed_and_the_one_before_it_taken(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, checkpoint(4))
    newest = save_checkpoint(tmp_path, checkpoint(8))
    newest.write_bytes(newest.read_bytes()[:cut])
    found = load_checkpoint(tmp_path, "mine")
    assert found is not None and found.step == 4
    assert torch.equal(found.tensors["sae.W"], torch.full((3,), 4.0))
    assert "step-00000008.safetensors is damaged" in caplog.text
    # It must not count as one of the newest two when the next ones are written.
    save_checkpoint(tmp_path, checkpoint(6))
    assert steps_in(tmp_path) == [4, 6]


def test_when_all_are_damaged_the_run_begins_again(tmp_path: Path) -> None:
    for step in (4, 8):
        save_checkpoint(tmp_path, checkpoint(step)).write_bytes(b"junk")
    assert load_checkpoint(tmp_path, "mine") is None
    save_checkpoint(tmp_path, checkpoint(1))
    assert steps_in(tmp_path) == [1]


def test_one_of_another_config_is_refused_and_stays(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(4, "theirs"))
    with pytest.raises(UserError, match=r"another configuration \(theirs, this is mine\)"):
        load_checkpoint(tmp_path, "mine")
    assert steps_in(tmp_path) == [4]


@settings(max_examples=40, deadline=None)
@given(
    saved=st.lists(st.integers(0, 10**7), min_size=1, max_size=6, unique=True),
    killed=st.integers(0, 5),
)
def test_a_kill_while_writing_costs_that_checkpoint_alone(saved: list[int], killed: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in sorted(saved):
            save_checkpoint(folder, checkpoint(step))
        # A killed writer leaves its temporary folder, with some of the file or none of it.
        left = folder / f".step-{10**8:08d}.safetensors.k1ll.tmp"
        left.mkdir()
        (left / ".tmpSAFE").write_bytes(b"x" * killed)
        found = load_checkpoint(folder, "mine")
        assert found is not None and found.step == max(saved)
        assert leftovers(folder) == []


# ----------------------------------------------------------------- only good ones are written


@pytest.fixture
def seat(tiny_gpt2: Path, texts: Path, tmp_path: Path) -> Callable[..., Seat]:
    def build(**changes: str) -> Seat:
        fixed = {"store__dir": str(tmp_path / "store"), "layer": "1"}
        config = small_config(tiny_gpt2, texts, **fixed, **changes)
        stream = open_stream(config, StopRequest())
        member = Member(config, stream.model.d_in, stream.train.calibration, "cpu", False)
        seat = Seat(member, tmp_path / "run", JsonLines(tmp_path / "run" / "metrics.jsonl"))
        seat.folder.mkdir()
        seat.stream = stream  # type: ignore[attr-defined]
        return seat

    return build


def train(seat: Seat) -> None:
    train_bank([seat], seat.stream.train, StopRequest())  # type: ignore[attr-defined]
    if seat.error is not None:
        raise seat.error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_term_and_keeps_the_last_good_checkpoint(
    value: float, seat: Callable[..., Seat], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, trained = Consistency.forward, seat()

    def penalty(self: Consistency, *args: Any, **named: Any) -> torch.Tensor:
        found = original(self, *args, **named)
        return found * value if trained.member.step == 6 else found

    monkeypatch.setattr(Consistency, "forward", penalty)
    with pytest.raises(UserError, match=r"not finite at step 6 \(term: consistency\)") as raised:
        train(trained)
    assert "step 4" in str(raised.value) and str(trained.checkpoints) in str(raised.value)
    assert steps_in(trained.checkpoints) == [4]


def test_weights_that_are_not_finite_are_no_checkpoint(
    seat: Callable[..., Seat], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient may overflow where the loss does not: the loss says so one step later only."""
    original = Member._update

    def update(self: Member, total: torch.Tensor, lr: float) -> None:
        original(self, total, lr)
        if self.step == 7:  # the step that the checkpoint of step 8 is made after
            with torch.no_grad():
                self.sae.W_enc[0, 0] = float("nan")

    monkeypatch.setattr(Member, "_update", update)
    trained = seat(training__log_every="100")
    with pytest.raises(UserError, match=r"sae.W_enc is not finite after step 7") as raised:
        train(trained)
    assert "the last good checkpoint is kept: step 4" in str(raised.value)
    assert steps_in(trained.checkpoints) == [4]


def test_the_last_good_checkpoint_goes_on_once_the_cause_is_gone(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = {"store__dir": str(tmp_path / "store"), "layer": "1"}
    config = small_config(tiny_gpt2, texts, **fixed)
    original = Consistency.forward
    with monkeypatch.context() as patch:
        patch.setattr(Consistency, "forward", lambda *a, **k: original(*a, **k) * float("nan"))
        with pytest.raises(UserError, match="last good checkpoint is kept: none yet"):
            run(config, tmp_path / "run")
    assert run(config, tmp_path / "run")["training_steps"] == 12


def test_steps_made_by_something_else_are_said_when_they_go_on(
    seat: Callable[..., Seat], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = seat()
    train(first)
    first.save()
    for autocast, said in ((False, False), (True, True)):
        caplog.clear()
        stream, config = first.stream, first.member.config  # type: ignore[attr-defined]
        member = Member(config, stream.model.d_in, stream.train.calibration, "cpu", autocast)
        Seat(member, first.folder, first.metrics).resume()
        assert "resuming at step 12 of 12" in caplog.text
        assert ("the steps so far were made by cpu products in float32" in caplog.text) is said
        assert ("the rest by cpu products in bfloat16 on cpu" in caplog.text) is said
