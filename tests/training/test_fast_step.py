"""Whole optimizer steps: fast equals plain, and the fused optimizer torch's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import small_config
from torch import Tensor

from tcsae.base.signals import StopRequest
from tcsae.config import Config, TrainingConfig
from tcsae.data.batches import shuffled_indices
from tcsae.data.stream import Stream, open_stream
from tcsae.products.cpu import CPU
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.standard import StandardSAE
from tcsae.training.member import Member
from tcsae.training.optimizer import build_optimizer
from tcsae.training.trainer import ScaledBatch

FAST = ["standard", "topk", "batchtopk", "matryoshka", "tsae", "persistent"]
STEPS = 60


@pytest.fixture(scope="module")
def job(
    tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    store = str(tmp_path_factory.mktemp("store"))

    def build(name: str, **changes: str) -> Config:
        fixed = {
            "sae": name,
            "sae__d_sae": "64",
            "training__tokens": str(STEPS * 8 * 16),
            "training__lr": "1e-2",
            "store__dir": store,
            "layer": "1",
            **({} if name == "standard" else {"sae__k": "3"}),
        }
        return small_config(tiny_gpt2, texts, **{**fixed, **changes})

    return build


@pytest.fixture(scope="module")
def stream(job: Callable[..., Config]) -> Stream:
    return open_stream(job("topk"), StopRequest())


class PlainMember(Member):
    """Trains with torch's own Adam and gradient clipping."""

    def _update(self, total: Tensor, lr: float) -> None:
        if not hasattr(self, "plain"):
            cfg = self.config.training
            self.plain = torch.optim.Adam(self.sae.parameters(), betas=cfg.adam_betas)
        self.plain.zero_grad()
        total.backward()
        self.sae.project_decoder_gradient()
        if self.config.training.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.training.grad_clip)
        self.plain.param_groups[0]["lr"] = lr
        self.plain.step()
        self.sae.constrain()


def trained(
    kind: type[Member], config: Config, stream: Stream, steps: int
) -> tuple[Member, dict[str, float]]:
    torch.manual_seed(0)
    bfloat16 = config.training.precision == "bfloat16"
    member = kind(config, stream.model.d_in, stream.train.calibration, "cpu", bfloat16)
    metrics = None
    for step in range(steps):
        batch = stream.train.batch(shuffled_indices(step, 8, len(stream.train), 0))
        metrics = member.train_step(batch, ScaledBatch(batch).x(member.scale), log=True)
    assert metrics is not None
    return member, metrics


def plain_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU, "sparse_from_ratio", 10**9)
    monkeypatch.setattr(StandardSAE, "training_codes", SparseAutoencoder.training_codes)


@pytest.mark.parametrize("clip", ["null", "1e-3", "1e6"])
@pytest.mark.parametrize("name", FAST)
def test_a_fast_step_leaves_the_weights_of_a_plain_one(
    name: str,
    clip: str,
    job: Callable[..., Config],
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = job(name, training__grad_clip=clip, training__precision="float32")
    ours, our_metrics = trained(Member, config, stream, 3)
    plain_pass(monkeypatch)
    theirs, their_metrics = trained(PlainMember, config, stream, 3)
    assert our_metrics == pytest.approx(their_metrics, rel=1e-3, abs=1e-5)
    for (parameter, found), wanted in zip(
        ours.sae.named_parameters(), theirs.sae.parameters(), strict=True
    ):
        # Adam makes a step of size lr of a gradient that is nothing but rounding.
        close = torch.isclose(found, wanted, rtol=1e-3, atol=1e-5)
        assert close.float().mean() > 0.98, parameter
        moments = theirs.plain.state[wanted]["exp_avg"]  # type: ignore[attr-defined]
        found_moments = ours.optimizer.state[found]["exp_avg"]
        assert (found_moments - moments).norm() < 2e-3 * moments.norm(), parameter
    assert torch.equal(ours.tokens_since_fired, theirs.tokens_since_fired)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAST)
def test_fast_and_plain_training_end_at_the_same_metrics(
    name: str,
    precision: str,
    job: Callable[..., Config],
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = job(name, training__precision=precision)
    _, ours = trained(Member, config, stream, STEPS)
    plain_pass(monkeypatch)
    _, theirs = trained(PlainMember, config, stream, STEPS)
    assert ours["explained_variance"] > 0.3
    for metric, tolerance in {"explained_variance": 0.03, "window_consistency": 0.03}.items():
        assert ours[metric] == pytest.approx(theirs[metric], abs=tolerance), metric
    assert ours["l0"] == pytest.approx(theirs["l0"], rel=0.05)


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_the_fused_optimizer_is_adam_with_clipping_whatever_lies_in_memory(
    max_norm: float | None,
) -> None:
    cfg = TrainingConfig(tokens=1, lr=0.01, grad_clip=max_norm)
    torch.manual_seed(0)
    first = [torch.randn(4, 7), torch.randn(7, 4), torch.randn(7)]
    ours = torch.nn.ParameterList([first[0].T.contiguous().T, first[1].clone(), first[2].clone()])
    theirs = torch.nn.ParameterList([f.clone() for f in first])
    assert not ours[0].is_contiguous()
    optimizer = build_optimizer(ours, cfg)
    plain = torch.optim.Adam(theirs.parameters(), lr=0.01, betas=cfg.adam_betas)
    for _ in range(6):
        gradients = [torch.randn(f.shape) for f in first]
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        ours[0].grad = gradients[0].T.contiguous().T
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        optimizer.step()
        plain.step()
        for found, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, wanted)
    assert all(int(optimizer.state[p]["step"]) == 6 for p in ours)


def test_a_bank_converts_a_batch_once_for_each_scale(stream: Stream) -> None:
    batch = stream.train.batch(torch.arange(4))
    scaled = ScaledBatch(batch)
    assert scaled.x(0.5) is scaled.x(0.5)
    assert scaled.x(0.5).dtype == torch.float32
    torch.testing.assert_close(scaled.x(2.0), batch.x.float() * 2)


def test_the_trainers_penalty_gives_the_features_its_gradient(
    job: Callable[..., Config], stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trainer calls it: fast and plain, autograd.grad says the same."""
    config, slopes = job("standard", training__precision="float32"), []
    batch = stream.train.batch(shuffled_indices(0, 8, len(stream.train), 0))
    for is_fast in (True, False):
        if not is_fast:
            plain_pass(monkeypatch)
        member = Member(config, stream.model.d_in, stream.train.calibration, "cpu", False)
        output = member.forward(
            batch.x.float() * member.scale,
            batch.valid,
            sparsity_warmup=1.0,
            dead_F=None,
            segments_BT=batch.segments,
        )
        weights = member._weights(batch.valid, batch.segments)()
        penalty = member.consistency(
            output.features, segments=batch.segments, valid=batch.valid, weights=weights
        )
        slopes.append(torch.autograd.grad(penalty, output.codes.features_NF)[0])
    assert slopes[0].count_nonzero() > 100
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
