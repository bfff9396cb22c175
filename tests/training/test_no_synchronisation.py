"""The host never waits for the device within a training step.

On a GPU the host runs ahead and queues the work; reading a value (`.item()`, an `if` on a tensor),
a tensor as long as other tensors' values say (`nonzero`, a mask as an index) and a plain copy
between devices make it wait until the queue is empty. Without a GPU two things are seen instead:

- On the meta device, whose tensors have no values, a step is what it is on any device but the CPU,
  and there is nothing that could be read: such an operation raises. Copies to it are recorded.
- On the CPU, with the operations of the other devices in place of its own, the operations of the
  same steps are recorded on real values: all branches that values could take are free.

Outside of the step, and not covered: what is logged, checked and saved every so many steps, and
revival=resample, which looks for dead features every `dead_after_tokens` tokens (a step number the
host knows) and is off here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcsae.config import Config
from tcsae.config.sae import architectures
from tcsae.data.batches import Batch, Calibration
from tcsae.products import BY_DEVICE, PLAIN
from tcsae.sae import base
from tcsae.training.member import Member

D_IN, CONTEXTS, POSITIONS, STEPS = 12, 4, 16, 4
READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_unique",
    "_unique2", "bincount",
}  # fmt: skip
"""Operations (of aten) whose result the host reads, or whose result's size it must know."""
OPTIONS: dict[str, dict[str, str]] = {
    "standard": {"training__target_l0": "5", "training__grad_clip": "1"},
    "p_anneal": {"sae__anneal_start": "0", "sae__anneal_stages": "100"},  # another p every step
    "topk": {"sae__k": "2", "training__ema_decay": "0.9"},
    "batchtopk": {"sae__k": "2", "training__ema_decay": "0.9"},
    "jumprelu": {"sae__bandwidth": "0.3", "sae__revival": "auxk"},
    "jumprelu_tanh": {"sae__preact_coefficient": "1e-6"},
    "gated": {"sae__revival": "auxk", "training__target_l0": "5"},
    "matryoshka": {"sae__k": "2"},
    "persistent": {"sae__k": "2", "sae__shuffle_positions": "true"},
    "tfa": {"sae__k": "2", "sae__n_heads": "2", "sae__bottleneck_factor": "4"},
    "tsae": {"sae__k": "2", "sae__pairs": "earlier"},
}
"""Options of conf/sae."""
FORMS = ["none", "scale_free", "window_variance", "shuffled", "batch_history", "slow"]
"""Options of conf/consistency, beside first_group, which is for GROUPED alone."""
GROUPED = ["matryoshka", "tsae"]
every_option = pytest.mark.parametrize("name", OPTIONS)
every_form = pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in OPTIONS for form in FORMS]
    + [(name, "first_group") for name in GROUPED],
)


class Waits(TorchDispatchMode):
    """Records, by name, the operations that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.n_seen = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        self.n_seen += 1
        if (
            name in READS
            or (name.startswith(("index", "_index_put", "_unsafe_index")) and masked(args))
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
            or (name in ("_to_copy", "copy_") and waits_to_copy(args, kwargs))
        ):
            self.found.append(name)
        return func(*args, **kwargs)


def masked(args: Any) -> bool:
    """Whether an index is a mask."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else []
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def waits_to_copy(args: Any, kwargs: Any) -> bool:
    """Whether a copy goes to another device, from memory or in a way that must be waited for."""
    if len(args) > 1:  # copy_(to, source, non_blocking)
        device, source = args[0].device, args[1]
        non_blocking = args[2] if len(args) > 2 else False
    else:
        source, device = args[0], kwargs.get("device") or args[0].device
        non_blocking = kwargs.get("non_blocking", False)
    return source.device.type != torch.device(device).type and not non_blocking


@pytest.fixture(scope="module")
def job(tiny_gpt2: Path, texts: Path) -> Callable[..., Config]:
    def build(name: str, form: str, **changes: str) -> Config:
        fixed = {
            "sae": name,
            "sae__d_sae": "32",
            "sae__dead_after_tokens": str(CONTEXTS * POSITIONS),  # AuxK from the second step on
            "consistency": form,
            "window": "4",
            "lambda": "0.5",
            "training__tokens": str(100 * CONTEXTS * POSITIONS),
            "layer": "1",
        }
        if name in ("standard", "p_anneal"):
            fixed["sae__revival"] = "auxk"
        return small_config(tiny_gpt2, texts, **{**fixed, **OPTIONS[name], **changes})

    return build


def batches(device: str = "cpu") -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x_BTD = torch.randn(CONTEXTS, POSITIONS, D_IN, generator=generator)
        valid_BT = torch.rand(CONTEXTS, POSITIONS, generator=generator) > 0.1
        segments_BT = (torch.rand(CONTEXTS, POSITIONS, generator=generator) < 0.1).cumsum(1)
        parts = (x_BTD, torch.zeros_like(segments_BT), segments_BT, valid_BT, valid_BT)
        yield Batch(*(part.to(device) for part in parts))


def new_member(config: Config, device: str = "cpu") -> Member:
    sample_ND = next(batches()).x.flatten(0, 1)
    calibration = Calibration(sample_ND.norm(dim=1).median().item(), float("inf"), 0.0, sample_ND)
    return Member(config, D_IN, calibration, device, config.training.precision == "bfloat16")


def waits_of_steps(member: Member, device: str = "cpu") -> set[str]:
    stream, waits = batches(device), Waits()
    for _ in range(STEPS):
        batch = next(stream)
        x_BTD = batch.x * member.scale
        with waits:
            member.train_step(batch, x_BTD, log=False)
    return set(waits.found)


def take_the_way_of_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """On the CPU, as if its values were not at hand."""
    patch.setitem(BY_DEVICE, "cpu", PLAIN)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no autocast, is unknown to the fused optimizer (which works on it), and
    has not the values by which the geometric median of the first batch ends."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(base, "geometric_median", lambda x_ND: x_ND.mean(0))


def test_no_architecture_and_no_form_is_left_out() -> None:
    conf = Path(__file__).parents[2] / "conf"
    assert {name.removesuffix("_tanh") for name in OPTIONS} == set(architectures())
    assert {*FORMS, "first_group"} == {file.stem for file in (conf / "consistency").glob("*.yaml")}


@every_form
def test_a_step_reads_no_value_and_waits_for_no_copy(
    name: str, form: str, job: Callable[..., Config], on_meta: None
) -> None:
    assert waits_of_steps(new_member(job(name, form), "meta"), "meta") == set()


@every_form
def test_no_value_sends_a_step_another_way(
    name: str, form: str, job: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_the_way_of_a_gpu(monkeypatch)
    member = new_member(job(name, form, training__precision="bfloat16"))
    assert waits_of_steps(member) == set()
    member.check_finite("none")


@every_option
def test_both_ways_end_with_the_same_weights(name: str, job: Callable[..., Config]) -> None:
    config, members = job(name, "scale_free", training__precision="float32"), []
    for at_hand in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not at_hand:
                take_the_way_of_a_gpu(patch)
            members.append(new_member(config))
            waits_of_steps(members[-1])
    ours, theirs = members
    for (parameter, found), wanted in zip(
        ours.sae.named_parameters(), theirs.sae.parameters(), strict=True
    ):
        # Adam makes a step of size lr of a gradient that is nothing but rounding.
        close = torch.isclose(found, wanted, rtol=1e-3, atol=1e-5)
        assert close.float().mean() > 0.98, parameter
    for (buffer, found), wanted in zip(ours.sae.named_buffers(), theirs.sae.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, msg=buffer)
    assert torch.equal(ours.tokens_since_fired, theirs.tokens_since_fired)


# ------------------------------------------------------------------ what sees it does see it


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: 1 if x.any() else 0,
    "a number": lambda x: int(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "values into a mask": lambda x: x.index_put_((x > 0,), x.new_ones(2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long()),
    "bincount": lambda x: (x > 0).long().bincount(),
}


def example(device: str = "cpu") -> Tensor:
    return torch.tensor([1.0, -1.0, 2.0]).to(device)


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_what_reads_values_is_recorded_on_the_cpu(wait: Callable[[Tensor], object]) -> None:
    with Waits() as waits:
        wait(example())
    assert waits.found


@pytest.mark.parametrize("wait", [*WAITS.values(), Tensor.cpu, Tensor.tolist, Tensor.numpy])
def test_what_reads_values_raises_on_the_meta_device(wait: Callable[[Tensor], object]) -> None:
    # Putting values into a mask needs no more than the size of the whole there.
    if wait is WAITS["values into a mask"]:
        with Waits() as waits:
            wait(example("meta"))
        assert waits.found
    else:
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            wait(example("meta"))


@pytest.mark.parametrize(
    "copy", [lambda x: x.to("meta"), lambda x: torch.empty(3, device="meta").copy_(x)]
)
def test_copies_to_the_device_are_recorded(copy: Callable[[Tensor], object]) -> None:
    with Waits() as waits:
        copy(example())
    assert waits.found
    with Waits() as waits:
        example().to("meta", non_blocking=True)
        torch.empty(3, device="meta").copy_(example(), non_blocking=True)
    assert not waits.found


def test_what_does_not_wait_is_not_recorded() -> None:
    with Waits() as waits:
        x = example()
        x[torch.tensor([0, 2])] = 3.0
        torch.where(x > 0, x[:2].sum(), 0).masked_fill_(x > 1, 2).bfloat16().topk(2)
        x.repeat_interleave(2)
    assert not waits.found and waits.n_seen > 5


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * grad.sum().item()


def test_the_backward_pass_of_a_function_is_seen() -> None:
    x = example().requires_grad_()
    with Waits() as waits:
        out = _ReadsInBackward.apply(x).sum()
        assert not waits.found
        out.backward()
    assert waits.found == ["_local_scalar_dense"]
