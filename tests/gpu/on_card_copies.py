"""Batches on their way to a GPU, beside what it computes. Without a card every test here fails.

python -m pytest -c /dev/null tests/gpu/on_card_copies.py
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2])]

from tcsae.base.files import save_tensors
from tcsae.config.compose import config_of
from tcsae.data.activation_model import ActivationModel
from tcsae.data.batches import ActivationBatches, Batch, Calibration, read_ahead, shuffled_indices
from tcsae.data.contexts import Contexts
from tcsae.data.store import ActivationStore
from tcsae.products import choose
from tcsae.training.member import Member

D_IN, POSITIONS, N, SHARD, PER_STEP, STEPS = 1024, 128, 96, 16, 16, 200


@pytest.fixture(autouse=True)
def a_card() -> Iterator[None]:
    assert torch.cuda.is_available(), "these tests need a GPU that torch sees: there is none"
    yield
    choose("auto", "cuda")


class NoModel:
    """Stands where a language model would: all shards are in the store."""

    identity: dict[str, str] = {"model": "none"}
    d_in = D_IN
    beside: tuple[ActivationModel, ...] = ()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(N * POSITIONS, dtype=torch.int32).view(N, POSITIONS)
    valid = torch.rand(N, POSITIONS, generator=generator) > 0.02
    segments = (torch.rand(N, POSITIONS, generator=generator) < 0.01).cumsum(1).int()
    contexts = Contexts(ids, segments, valid, ())
    model: ActivationModel = NoModel()  # type: ignore[assignment]
    found = ActivationStore(tmp_path_factory.mktemp("store"), model, contexts, SHARD)
    found.folder.mkdir(parents=True)
    for shard in range(found.n_shards):
        x = torch.randn(SHARD, POSITIONS, D_IN, generator=generator)
        x += 2 * torch.randn(SHARD, 1, D_IN, generator=generator)
        save_tensors(found.shard_path(shard), {"activations": x.bfloat16()}, {})
    return found


def calibration(store: ActivationStore) -> Calibration:
    sample = store.activations(torch.arange(8)).float().flatten(0, 1)
    norm = sample.norm(dim=-1)
    return Calibration(norm.median().item(), norm.quantile(0.99).item(), 0.01, sample)


def order(steps: int = STEPS) -> list[Tensor]:
    return [shuffled_indices(step, PER_STEP, N, 0) for step in range(steps)]


def ahead(store: ActivationStore, steps: int = STEPS) -> Iterator[Batch]:
    batches = ActivationBatches(store, calibration(store), "cuda")
    with contextlib.closing(read_ahead(batches, order(steps))) as found:
        yield from found


def plain(store: ActivationStore, steps: int = STEPS) -> Iterator[Batch]:
    """Read when its turn comes, and copied while the host waits."""
    limit = calibration(store).norm_limit
    for indices in order(steps):
        x = store.activations(indices).to("cuda")
        special = store.contexts.valid[indices].to("cuda")
        valid = special & (x.float().norm(dim=-1) <= limit)
        ids, segments = store.contexts.ids[indices], store.contexts.segments[indices]
        yield Batch(x, ids, segments.to("cuda"), valid, special)


def parts(batch: Batch) -> dict[str, Tensor]:
    names = ("x", "segments", "valid", "not_special", "ids")
    return {name: getattr(batch, name) for name in names}


def busy() -> None:
    """A few milliseconds of the GPU's time: the copies have to wait, or overtake."""
    a = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a = a @ a


@pytest.mark.parametrize("is_busy", [False, True])
def test_batches_are_those_of_plain_copies_in_order(store: ActivationStore, is_busy: bool) -> None:
    wrong, n = torch.zeros((), dtype=torch.long, device="cuda"), 0
    for found, wanted in zip(ahead(store), plain(store), strict=True):
        if is_busy:
            busy()
        for name, value in parts(found).items():
            assert value.is_cuda == (name != "ids"), name
            other = parts(wanted)[name]
            assert value.dtype == other.dtype and value.shape == other.shape, name
            # Counted on the device: a look at each would have the host wait for the copies.
            wrong += (value != other).sum().to("cuda", non_blocking=True)
        n += 1
    assert n == STEPS and wrong.item() == 0


def test_the_memory_of_a_batch_is_not_written_while_it_is_used(store: ActivationStore) -> None:
    """Sums that the GPU makes long after the host has let go of the batch."""
    sums: list[Tensor] = []
    for batch in ahead(store):
        busy()
        sums.append(batch.x.double().sum((1, 2)))
        del batch
    for found, indices in zip(sums, order(), strict=True):
        wanted = store.activations(indices).double().sum((1, 2))
        assert torch.allclose(found.cpu(), wanted, rtol=1e-9, atol=1e-6)


def test_evaluation_has_its_batches_whole_on_the_gpu(store: ActivationStore) -> None:
    batches = ActivationBatches(store, calibration(store), "cuda")
    seen = 0
    for batch, indices in zip(batches.in_order(10), torch.arange(N).split(10), strict=True):
        assert all(value.is_cuda for value in parts(batch).values())
        assert torch.equal(batch.ids.cpu(), store.contexts.ids[indices])
        assert torch.equal(batch.x.cpu(), store.activations(indices))
        seen += len(batch.x)
    assert seen == N


@pytest.mark.parametrize("products", ["triton", "plain"])
@pytest.mark.parametrize("name", ["topk", "standard"])
def test_training_has_the_bits_of_plain_copies(
    store: ActivationStore, name: str, products: str
) -> None:
    steps, ends = 60, []
    given = [f"sae={name}", "sae.d_sae=8192", "window=8", "lambda=1"]
    given += [f"training.products={products}", f"training.tokens={steps * PER_STEP * POSITIONS}"]
    given += [f"sae.dead_after_tokens={20 * PER_STEP * POSITIONS}"]
    given += ["sae.k=32"] if name == "topk" else []
    for source in (ahead, plain):
        assert choose(products, "cuda") == products
        torch.manual_seed(0)
        member = Member(config_of(*given), D_IN, calibration(store), "cuda", True)
        for batch in source(store, steps):
            member.train_step(batch, batch.x.float() * member.scale, log=False)
        assert member.step == steps and torch.isfinite(member.last_loss)
        ends.append({key: value.clone() for key, value in member.sae.state_dict().items()})
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key
