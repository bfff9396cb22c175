"""Whole training steps on a GPU that does not exist. `test_fake_cuda` runs this in a process of its
own, with a device guard in place of CUDA's (fake_cuda.cpp).

torch's fake tensors have a device and no values: tensors on two devices in one operation raise, and
so does every look at a value (`.item()`, an `if`) or at a size that hangs on one (`nonzero`, a mask
as an index, `bincount`). They cannot see values, streams or speed. Kernels are not launched; their
arguments must lie on the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import test_no_synchronisation as here
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tcsae.base.signals import StopRequest
from tcsae.config.compose import config_of
from tcsae.config.sae import config_class
from tcsae.data.batches import Calibration
from tcsae.measure import evaluation
from tcsae.products import BY_DEVICE, triton_gpu
from tcsae.products import kernels as kernel_module
from tcsae.products.plain import GPU, Plain
from tcsae.sae import base
from tcsae.sae.registry import sae_class
from tcsae.training.member import Member

SEEN = "DataDependent|DynamicOutputShape|DeviceMismatch|index_put_"


class Launch:
    """Stands for a kernel: `kernel[grid](...)` looks at where its arguments lie."""

    launches = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        Launch.launches += 1
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        assert tensors and {tensor.device.type for tensor in tensors} == {"cuda"}


def moved(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """torch's own swaps the tensors of a parameter, which fake ones do not allow."""
    if torch.device(device).type != "cuda":
        return module
    for part in module.modules():
        for kept, make in ((part._parameters, torch.nn.Parameter), (part._buffers, Tensor.detach)):
            kept.update({k: make(v.detach().to(device)) for k, v in kept.items() if v is not None})
    return module


plain_adam = torch._fused_adam_


def fused_adam(*tensors: Any, lr: Any, **more: Any) -> None:
    """Of the form with the rate on the device torch does not know what it does to fake tensors."""
    assert not isinstance(lr, Tensor) or lr.device.type == "cuda"
    plain_adam(*tensors, lr=1e-3, **more)


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """As if this torch knew GPUs."""
    from torch.cuda.amp import common

    monkeypatch.setattr(common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(torch.nn.utils, "skip_init", lambda kind, *a, **k: kind(*a, **k))
    monkeypatch.setattr(torch, "_fused_adam_", fused_adam)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(base, "geometric_median", lambda x_ND: x_ND.mean(0))
    monkeypatch.setattr(triton_gpu, "_on", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(GPU, "aside", Plain.aside)  # on one stream
    for name in vars(kernel_module):
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernel_module, name, Launch())
    monkeypatch.setitem(BY_DEVICE, "cuda", GPU())
    with FakeTensorMode(allow_non_fake_inputs=False) as found:
        yield found


def member(name: str, form: str, *more: str, device: str = "cuda") -> Member:
    given = {k.replace("__", "."): v for k, v in here.OPTIONS[name].items()}
    given.pop("training.ema_decay", None)  # a copy of fake tensors is of another world
    given |= {"sae.dead_after_tokens": "1"}
    if name in ("standard", "p_anneal"):
        given["sae.revival"] = "auxk"
    tokens = 100 * here.CONTEXTS * here.POSITIONS
    fixed = [f"sae={name}", f"consistency={form}", "window=4", "lambda=0.5"]
    fixed += [f"training.tokens={tokens}", "sae.d_sae=1024", *more]
    sample_ND = torch.randn(64, here.D_IN)
    config = config_of(*fixed, *(f"{k}={v}" for k, v in given.items()))
    found = Member(config, here.D_IN, Calibration(3.0, float("inf"), 0.0, sample_ND), device, True)
    # Found by a look at the device every eighth step, which is the one that is allowed.
    found.dead_J, found.step = torch.arange(5, device=device), 1
    return found


def steps(of: Member) -> None:
    stream = here.batches(of.device)
    for _ in range(2):
        batch = next(stream)
        waits = here.Waits()
        with waits:
            of.train_step(batch, batch.x * of.scale, log=False)
        assert waits.found == [] and waits.n_seen > 50
    assert of.last_loss.device.type == "cuda"


@pytest.mark.parametrize("products", [GPU, triton_gpu.Triton], ids=["plain", "triton"])
@pytest.mark.parametrize("name", here.OPTIONS)
def test_a_step_stays_on_the_gpu_and_reads_nothing(
    name: str, products: type[Plain], mode: FakeTensorMode
) -> None:
    BY_DEVICE["cuda"] = products()
    Launch.launches = 0
    steps(member(name, "scale_free"))
    assert (Launch.launches > 0) or products is GPU


@pytest.mark.parametrize("form", sorted({*here.FORMS} - {"scale_free"}))
def test_so_do_the_forms_of_the_temporal_loss(form: str, mode: FakeTensorMode) -> None:
    BY_DEVICE["cuda"] = triton_gpu.Triton()
    steps(member("topk", form))


@pytest.mark.parametrize("name", here.GROUPED)
def test_so_does_the_loss_on_the_first_group(name: str, mode: FakeTensorMode) -> None:
    BY_DEVICE["cuda"] = triton_gpu.Triton()
    steps(member(name, "first_group"))


def an_sae(device: str) -> torch.nn.Module:
    cfg = config_class("topk")(d_sae=64, k=3)
    return sae_class("topk")(cfg, here.D_IN, torch.Generator().manual_seed(0)).to(device)


PLACES = [("cpu", "cuda:1"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")]


@pytest.mark.parametrize(("model", "sae"), PLACES)
def test_a_reconstruction_is_made_where_the_sae_is_and_comes_back(
    model: str, sae: str, mode: FakeTensorMode
) -> None:
    batch = next(here.batches(sae))
    x_BTD = batch.x.to(model, torch.bfloat16)
    found = evaluation._splice(an_sae(sae), batch)(x_BTD)
    assert found.device == torch.device(model)
    assert (found.shape, found.dtype) == (x_BTD.shape, x_BTD.dtype)


class Passes:
    """Stands for the language model: it has the shapes of its results, on its device."""

    no_model: str | None = None
    vocabulary, replaced = 50, 0

    def __init__(self, device: str) -> None:
        self.device = device

    def repeated(self, ids_BT: Tensor) -> Any:
        return contextlib.nullcontext(functools.partial(self.logits, ids_BT.to(self.device)))

    def logits(self, ids_BT: Tensor, replace: Any = None) -> Tensor:
        if replace is not None:
            x_BTD = torch.randn(*ids_BT.shape, here.D_IN, device=self.device)
            assert replace(x_BTD).device == x_BTD.device
            Passes.replaced += 1
        return torch.randn(*ids_BT.shape, self.vocabulary, device=self.device)


class HeldOut:
    """Stands for the held-out activations: one batch, on the SAE's device."""

    def __init__(self, device: str) -> None:
        self.device = device
        documents = SimpleNamespace(documents=range(here.CONTEXTS))
        self.source = SimpleNamespace(contexts=documents)

    def in_order(self, contexts: int, indices: Tensor | None = None) -> Iterator[Any]:
        yield next(here.batches(self.device))


@pytest.mark.parametrize(("model", "sae"), PLACES)
def test_what_the_model_loses_is_measured_with_the_sae_elsewhere(
    model: str, sae: str, mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(evaluation, "model_contexts", lambda *_: torch.arange(here.CONTEXTS))
    monkeypatch.setattr(evaluation, "held_out_units", lambda _: None)
    # Sums over the tokens that count are as long as their number says, which is no fake's.
    monkeypatch.setattr(evaluation, "next_token_ce", lambda *of: same_device(*of))
    monkeypatch.setattr(evaluation, "score_forward", lambda *of: same_device(*of))
    monkeypatch.setattr(
        evaluation.ModelMetrics, "add", lambda _, *of, keep: found.append(same_device(keep, *of))
    )
    Passes.replaced = 0
    config: Any = SimpleNamespace(dataset=SimpleNamespace(context_size=here.POSITIONS))
    of: Any = (Passes(model), HeldOut(sae), StopRequest())
    evaluation.on_the_model([an_sae("cpu")], config, *of)
    assert [x.device for x in found] == [torch.device(model)] and Passes.replaced == 2


def same_device(*of: Tensor) -> Tensor:
    assert len({x.device for x in of}) == 1, [x.device for x in of]
    return of[0]


@pytest.mark.parametrize("name", ["topk", "standard", "matryoshka"])
def test_a_step_may_be_on_another_gpu_than_the_current_one(name: str, mode: FakeTensorMode) -> None:
    BY_DEVICE["cuda"] = triton_gpu.Triton()
    of = member(name, "scale_free", device="cuda:1")
    steps(of)
    assert of.last_loss.device == of.sae.W_dec.device == torch.device("cuda:1")


def on_another_device(x: Tensor) -> Tensor:
    return x + torch.ones(x.shape)


@pytest.mark.parametrize("planted", [*here.WAITS.values(), on_another_device])
def test_what_is_planted_into_a_step_is_seen(
    planted: Callable[[Tensor], object], mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = member("standard", "none")
    forward = of.forward

    def with_it(x_BTD: Tensor, *rest: Any, **more: Any) -> Any:
        planted(x_BTD[0, 0, :3].float())
        return forward(x_BTD, *rest, **more)

    of.forward = with_it
    with pytest.raises((AssertionError, RuntimeError)) as found:
        steps(of)
    assert re.search(SEEN, f"{found.type.__name__} {found.value}"), found.value
