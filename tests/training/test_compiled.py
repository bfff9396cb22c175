"""training.compile: the same training through the compiler, and without it where it gives up."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config

from tcsae.base.signals import StopRequest
from tcsae.config import run_id
from tcsae.data.batches import shuffled_indices
from tcsae.data.stream import Stream, open_stream
from tcsae.products.cpu import CPU
from tcsae.training import member as member_module
from tcsae.training.compiled import CompiledForward
from tcsae.training.member import Member
from tcsae.training.trainer import ScaledBatch


@pytest.fixture(scope="module")
def given(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = str(tmp_path_factory.mktemp("store"))

    def config(**changes: str) -> Any:
        fixed = {"layer": "1", "training__precision": "float32", "store__dir": store}
        return small_config(tiny_gpt2, texts, **{**fixed, **changes})

    return config, open_stream(config(), StopRequest())


def weights(config: Any, stream: Stream, steps: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    member = Member(config, stream.model.d_in, stream.train.calibration, "cpu", False)
    for step in range(steps):
        batch = stream.train.batch(shuffled_indices(step, 8, len(stream.train), 0))
        member.train_step(batch, ScaledBatch(batch).x(member.scale), log=False)
    assert member.optimizer_steps == steps
    return member.sae.state_dict()


@pytest.mark.parametrize("sae", ["standard", "topk", "jumprelu"])
def test_compiled_steps_leave_the_weights_of_plain_ones(
    sae: str, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stream = given
    monkeypatch.setattr(CPU, "sparse_from_ratio", 10**9)  # the pass that a GPU takes
    made: list[CompiledForward] = []

    def through_the_compiler(forward: Any) -> CompiledForward:
        made.append(CompiledForward(forward, backend="aot_eager"))
        return made[-1]

    monkeypatch.setattr(member_module, "CompiledForward", through_the_compiler)
    plain = weights(config(sae=sae), stream)
    found = weights(config(sae=sae, training__compile="true"), stream)
    assert len(made) == 1 and made[0].is_compiled
    for name, value in plain.items():
        close = torch.isclose(found[name], value, rtol=1e-3, atol=1e-5)
        assert close.float().mean() > 0.98, name


def test_a_compiler_that_gives_up_is_said_once_and_changes_nothing(
    given: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, stream = given

    def refuses(*_: object) -> None:
        raise RuntimeError("no such kernel\nand much more")

    monkeypatch.setattr(
        member_module, "CompiledForward", lambda forward: CompiledForward(forward, refuses)
    )
    with caplog.at_level(logging.WARNING):
        found = weights(config(training__compile="true"), stream)
    (said,) = [record.message for record in caplog.records if "compile" in record.message]
    assert "has no effect" in said and "goes on without" in said and "\n" not in said
    assert "RuntimeError: no such kernel and much more" in said
    for name, value in weights(config(), stream).items():
        assert torch.equal(found[name], value), name


def test_an_error_of_the_pass_itself_is_not_put_down_to_the_compiler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*, sparsity_warmup: Any) -> None:
        raise ValueError("ours")

    forward = CompiledForward(broken, backend="eager")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="ours"):
        forward(sparsity_warmup=1.0)
    assert not [record for record in caplog.records if "compile" in record.message]


def test_an_unused_compiler_leaves_the_names_of_runs(given: Any) -> None:
    config, _ = given
    assert run_id(config(training__compile="false")) == run_id(config())
    assert run_id(config(training__compile="true")) != run_id(config())
