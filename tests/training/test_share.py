"""One SAE over several ranks: every sum over a batch is over all of them."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.ranks import Place
from tcsae.data.batches import Batch, Calibration
from tcsae.tensors.over_ranks import shared_batch
from tcsae.training.member import Member
from tcsae.training.share import Share, check_alike, why_not_shared

D_IN, B, T, STEPS = 48, 8, 16, 12
PENALTY = {"consistency__position_weight": "0.5", "lambda": "1"}
CASES: dict[str, dict[str, str]] = {
    "topk": {"sae": "topk", **PENALTY},
    "topk, dead features": {"sae": "topk", "sae__dead_after_tokens": "200", "lambda": "0.3"},
    "topk, document": {"sae": "topk", "window": "document", "consistency__form": "slow"},
    "standard": {"sae": "standard", **PENALTY},
    "standard, literal": {"sae": "standard", "consistency__form": "window_variance"},
    "jumprelu": {"sae": "jumprelu", "training__target_l0": "10"},
    "gated": {"sae": "gated"},
    "p_anneal": {"sae": "p_anneal"},
}


def member(weights: str, texts: str, changes: dict[str, str]) -> Member:
    config = small_config(Path(weights), Path(texts), **{"window": "4", **changes})
    sample = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    return Member(config, D_IN, Calibration(7.0, 99.0, 0.0, sample), "cpu", autocast=False)


def batch(step: int) -> Batch:
    """Contexts of two documents, with tokens that are not valid: not the same number in each."""
    generator = torch.Generator().manual_seed(step)
    x_BTD = torch.randn(B, T, D_IN, generator=generator).cumsum(1)
    segments = (torch.arange(T) >= 10).int().expand(B, T)
    valid = torch.rand(B, T, generator=generator) > 0.1
    valid[:, 0] = False
    valid[:2, 3:9] = False
    return Batch(x_BTD, torch.zeros(B, T, dtype=torch.long), segments, valid, valid)


def trained(one: Member, share: Share) -> dict[str, Any]:
    """Weights, counters and the last step's metrics."""
    with shared_batch(share.group):
        for step in range(STEPS):
            whole = batch(step)
            part = share.of(torch.arange(B))
            own = Batch(*(field[part] for field in vars(whole).values()))
            metrics = one.train_step(own, own.x * one.scale, log=step == STEPS - 1)
        check_alike(one.sae)
    assert metrics is not None
    tensors = {name: value.clone() for name, value in one.sae.state_dict().items()}
    counters = {"since": one.tokens_since_fired, "seen": one.tokens_seen}
    return {"tensors": tensors, "counters": counters, "metrics": metrics}


def one_rank(rank: int, size: int, port: int, weights: str, texts: str, out: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    share = Share(Place(rank=rank, size=size), None, dist.group.WORLD)
    found = {name: trained(member(weights, texts, case), share) for name, case in CASES.items()}
    torch.save(found, f"{out}/{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def of_ranks(
    request: pytest.FixtureRequest,
    tiny_gpt2: Path,
    texts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """By rank: by case what `trained` says."""
    size, out = request.param, tmp_path_factory.mktemp("ranks")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    shared = (size, port, str(tiny_gpt2), str(texts), str(out))
    processes = [context.Process(target=one_rank, args=(rank, *shared)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(out / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().norm() / other.double().norm().clamp(min=1e-6))


@pytest.mark.parametrize("name", CASES)
def test_several_ranks_end_as_one_does(
    of_ranks: list[dict[str, Any]], tiny_gpt2: Path, texts: Path, name: str
) -> None:
    alone = trained(member(str(tiny_gpt2), str(texts), CASES[name]), Share())
    if "dead" in name:
        assert alone["metrics"]["loss/auxk"] > 0
    for rank in of_ranks:
        found = rank[name]
        for key, value in alone["tensors"].items():
            first = of_ranks[0][name]["tensors"][key]
            assert torch.equal(found["tensors"][key], first), key  # bit for bit among themselves
            assert distance(found["tensors"][key], value) < 1e-5, key
        for key, value in alone["counters"].items():
            assert torch.equal(found["counters"][key], value), key
        for key, number in alone["metrics"].items():
            assert found["metrics"][key] == pytest.approx(number, rel=1e-4, abs=1e-5), key


def test_the_parts_are_not_the_whole(tiny_gpt2: Path, texts: Path) -> None:
    """What the ranks do with their contexts alone, without the sums, is something else."""
    one = member(str(tiny_gpt2), str(texts), CASES["topk"])
    part = trained(one, Share(Place(rank=1, size=2)))
    whole = trained(member(str(tiny_gpt2), str(texts), CASES["topk"]), Share())
    assert distance(part["tensors"]["W_dec"], whole["tensors"]["W_dec"]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sae": "batchtopk", "sae__k": "8"}, "sae=batchtopk chooses among all tokens of a batch"),
        ({"consistency__form": "batch_history"}, "batch_history keeps whole batches"),
        ({"training__batch_contexts": "3"}, "training.batch_contexts = 3 leaves a rank fewer"),
    ],
)
def test_what_joins_a_batch_otherwise_is_refused(
    tiny_gpt2: Path, texts: Path, changes: dict[str, str], said: str
) -> None:
    line = why_not_shared(small_config(tiny_gpt2, texts, **changes), 2)
    assert line is not None and said in line
    assert why_not_shared(small_config(tiny_gpt2, texts), 2) is None


def test_ranks_with_different_weights_are_noticed(
    tiny_gpt2: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = member(str(tiny_gpt2), str(texts), CASES["topk"]).sae
    check_alike(sae)  # alone: nothing to compare
    monkeypatch.setattr("tcsae.training.share.is_shared", lambda: True)
    check_alike(sae)
    monkeypatch.setattr("tcsae.training.share.largest", lambda bits: bits + 1)
    with pytest.raises(UserError, match="the ranks hold different weights"):
        check_alike(sae)
