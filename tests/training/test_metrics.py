"""What the log says of a step: from sparse codes' entries as from dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import small_config
from torch import Tensor

from tcsae import consistency
from tcsae.data.batches import Batch, Calibration
from tcsae.products import BY_DEVICE
from tcsae.products.cpu import CPU
from tcsae.sae.codes import TrainingOutput
from tcsae.training.member import Member

D_IN, CONTEXTS, POSITIONS = 12, 4, 16
SPARSE = ["topk", "batchtopk", "matryoshka", "tsae"]
DENSE = ["standard", "tfa", "persistent"]
WINDOWS = ["4", "document"]


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(CONTEXTS, POSITIONS, D_IN, generator=generator)
        x += torch.randn(CONTEXTS, 1, D_IN, generator=generator)
        valid = torch.rand(CONTEXTS, POSITIONS, generator=generator) > 0.05
        segments = (torch.rand(CONTEXTS, POSITIONS, generator=generator) < 0.1).cumsum(1)
        x[~valid] = 1e4  # massive: it must not count
        yield Batch(x, segments, segments, valid, valid)


def by_definition(output: TrainingOutput, batch: Batch, x: Tensor, window: str) -> dict[str, float]:
    """Every window of every context, in float64."""
    f, valid = output.features.double(), batch.valid
    held: list[Tensor] = []
    for n in range(CONTEXTS):
        for document in batch.segments[n].unique():
            here = batch.segments[n] == document
            if window == "document":
                held += [f[n, here & valid[n]]]
            else:
                place = here.nonzero()[:, 0]
                runs = place.unfold(0, int(window), 1) if len(place) >= int(window) else []
                held += [f[n, run] for run in runs if valid[n, run].all()]
    held = [one for one in held if len(one) >= 2]
    within = torch.stack([one.var(0) for one in held]).mean(0)
    # By the windows' own measure: within and between windows.
    inside = torch.stack([one.var(0, correction=0) for one in held])
    means = torch.stack([one.mean(0) for one in held])
    measured = inside.mean(0) + means.var(0, correction=0)
    kept = x[valid].double()
    error = kept - output.reconstruction[valid].double()
    spread = (kept - kept.mean(0)).square().sum()
    return {
        "l0": (f > 0).sum().item() / len(kept),
        "explained_variance": 1 - (error.square().sum() / spread).item(),
        "window_variance": within.sum().item(),
        "window_consistency": 1 - (within.sum() / measured.sum()).item(),
    }


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", [*SPARSE, *DENSE])
def test_the_log_says_what_the_definitions_say(
    name: str, window: str, tiny_gpt2: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BY_DEVICE, "cpu", CPU())
    monkeypatch.setattr(consistency, "IN_CACHE", POSITIONS * 64)  # one context at a time
    own = {} if name == "standard" else {"sae__k": "2"}
    own |= {"sae__n_heads": "2", "sae__bottleneck_factor": "4"} if name == "tfa" else {}
    fixed = {"sae__d_sae": "64", "training__precision": "float32", "layer": "1"}
    tokens = {"training__tokens": str(100 * CONTEXTS * POSITIONS), "training__lr": "1e-2"}
    config = small_config(tiny_gpt2, texts, sae=name, window=window, **fixed, **tokens, **own)
    stream = batches()
    sample = next(stream).x.flatten(0, 1).clamp(-5, 5)
    member = Member(config, D_IN, Calibration(3.0, torch.inf, 0.0, sample), "cpu", False)
    outputs: list[TrainingOutput] = []
    forward = member.forward
    monkeypatch.setattr(
        member, "forward", lambda *a, **k: outputs.append(forward(*a, **k)) or outputs[-1]
    )
    for _ in range(3):
        batch = next(stream)
        x = batch.x * member.scale
        logged = member.train_step(batch, x, log=True)
    assert logged is not None
    codes = outputs[-1].codes
    assert (codes.sparse is not None) == (name in SPARSE)
    assert codes.sparse is None or codes._features_NF is None, "dense codes were made"
    wanted = by_definition(outputs[-1], batch, x, window)
    assert {key: logged[key] for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert wanted["window_variance"] > 0 and wanted["l0"] > 0
