"""Every architecture in the trainer: with every form of the loss, resumed, and in a bank."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import small_config

from tcsae.base.signals import StopRequest
from tcsae.config import Config
from tcsae.config.sae import architectures
from tcsae.data.batches import shuffled_indices
from tcsae.data.stream import Stream, open_stream
from tcsae.sae.formats.saelens import load_saelens, save_saelens
from tcsae.training.checkpoint import load_checkpoint, save_checkpoint
from tcsae.training.member import Member

# Options of conf/sae, with settings in which everything stateful happens within a few steps.
BUSY: dict[str, dict[str, str]] = {
    "standard": {"sae__revival": "resample"},
    "p_anneal": {"sae__revival": "resample", "sae__anneal_stages": "4"},
    "topk": {"sae__k": "2"},
    "batchtopk": {"sae__k": "2"},
    "jumprelu": {"sae__bandwidth": "0.1", "sae__revival": "auxk"},
    "jumprelu_tanh": {},
    "gated": {"sae__revival": "resample", "training__ema_decay": "0.9"},
    "matryoshka": {"sae__k": "2", "training__ema_decay": "0.9"},
    "persistent": {"sae__k": "2"},
    "tfa": {"sae__k": "2", "sae__n_heads": "2", "sae__bottleneck_factor": "4"},
    "tsae": {"sae__k": "2", "sae__pairs": "earlier", "consistency": "scale_free"},
}
STEPS = 8

every_option = pytest.mark.parametrize("name", BUSY)


def test_no_architecture_is_left_out() -> None:
    assert {name.removesuffix("_tanh") for name in BUSY} == set(architectures())


@pytest.fixture(scope="module")
def job(
    tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    store = str(tmp_path_factory.mktemp("store"))

    def build(name: str, **changes: str) -> Config:
        fixed = {
            "sae": name,
            "sae__dead_after_tokens": "256",
            "training__tokens": str(STEPS * 8 * 16),
            "training__lr": "1e-2",
            "store__dir": store,
            "layer": "1",
        }
        return small_config(tiny_gpt2, texts, **{**fixed, **BUSY[name], **changes})

    return build


@pytest.fixture(scope="module")
def stream(job: Callable[..., Config]) -> Stream:
    return open_stream(job("topk"), StopRequest())


def new_member(config: Config, stream: Stream) -> Member:
    torch.manual_seed(config.seed)
    bfloat16 = config.training.precision == "bfloat16"
    return Member(config, stream.model.d_in, stream.train.calibration, "cpu", bfloat16)


def train(members: list[Member], stream: Stream, until: int) -> dict[str, float]:
    """Side by side to step `until`; the last step's metrics of the first."""
    metrics: dict[str, float] | None = None
    for step in range(members[0].step, until):
        batch = stream.train.batch(shuffled_indices(step, 8, len(stream.train), 0))
        for member in members:
            found = member.train_step(batch, batch.x.float() * member.scale, log=True)
            metrics = found if member is members[0] else metrics
    assert metrics is not None
    return metrics


def state(member: Member) -> dict[str, torch.Tensor]:
    return {k: v for k, v in member.checkpoint({}).tensors.items() if not k.startswith("rng.")}


def assert_same(one: Member, other: Member) -> None:
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@every_option
@pytest.mark.parametrize(
    ("form", "precision"),
    [
        ("none", "float32"),
        ("scale_free", "float32"),
        ("scale_free", "bfloat16"),
        ("window_variance", "float32"),
    ],
)
def test_it_trains_with_every_form_of_the_loss_and_is_saved_and_read(
    name: str,
    form: str,
    precision: str,
    job: Callable[..., Config],
    stream: Stream,
    tmp_path: Path,
) -> None:
    config = job(name, consistency=form, training__precision=precision, **{"lambda": "0.5"})
    member = new_member(config, stream)
    first, metrics = train([member], stream, 1), train([member], stream, STEPS)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["loss/reconstruction"] < first["loss/reconstruction"]
    assert (metrics.get("loss/consistency", 0) > 0) == (form != "none")
    assert {p.dtype for p in member.sae.parameters()} == {torch.float32}
    torch.testing.assert_close(member.sae.W_dec.norm(dim=1), torch.ones(config.sae.d_sae))
    sae = member.finished_sae()
    save_saelens(tmp_path, sae)
    x = stream.evaluation.batch(torch.arange(4)).x
    assert torch.equal(load_saelens(tmp_path)[0](x), sae(x))


@every_option
def test_the_temporal_loss_reaches_the_encoder(
    name: str, job: Callable[..., Config], stream: Stream
) -> None:
    weights = []
    for weight in ("0", "50"):
        config = job(name, consistency="scale_free", training__tokens="256", **{"lambda": weight})
        member = new_member(config, stream)
        train([member], stream, 2)
        weights.append(member.sae.W_enc.detach().clone())
    assert not torch.equal(*weights)


@every_option
def test_resumed_it_ends_with_the_same_bits(
    name: str, job: Callable[..., Config], stream: Stream, tmp_path: Path
) -> None:
    config = job(name)
    whole = new_member(config, stream)
    train([whole], stream, STEPS)
    part = new_member(config, stream)
    train([part], stream, 5)
    save_checkpoint(tmp_path, part.checkpoint({"run_id": "x"}))
    checkpoint = load_checkpoint(tmp_path, "x")
    assert checkpoint is not None
    resumed = new_member(config, stream)
    resumed.restore(checkpoint)
    train([resumed], stream, STEPS)
    assert_same(whole, resumed)
    assert torch.equal(whole.finished_sae().W_enc, resumed.finished_sae().W_enc)


def test_members_of_a_mixed_bank_end_as_each_would_alone(
    job: Callable[..., Config], stream: Stream
) -> None:
    configs = [job(name, consistency="window_variance") for name in BUSY]
    bank = [new_member(config, stream) for config in configs]
    train(bank, stream, STEPS)
    for config, member in zip(configs, bank, strict=True):
        alone = new_member(config, stream)
        train([alone], stream, STEPS)
        assert_same(alone, member)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka", "p_anneal"])
def test_buffers_that_training_estimates_go_into_the_averaged_copy(
    name: str, job: Callable[..., Config], stream: Stream
) -> None:
    config = job(name, training__ema_decay="0.9")
    member = new_member(config, stream)
    train([member], stream, STEPS)
    assert member.average is not None
    moved = [value for value in member.sae.buffers() if value.ndim < 2]
    assert all(torch.equal(a, b) for a, b in zip(moved, member.average.buffers(), strict=True))
    assert not torch.equal(member.sae.W_enc, member.average.W_enc)


def test_the_last_batch_of_a_run_is_annealed_the_furthest(
    job: Callable[..., Config], stream: Stream
) -> None:
    config = job("p_anneal")
    member = new_member(config, stream)
    train([member], stream, 1)
    assert member.sae.exponent == 1
    train([member], stream, STEPS)
    assert member.sae.exponent.item() == pytest.approx(0.2)
    assert member.sae.strength.item() != 1
