"""The Temporal SAE: its pairs and its losses against slow, obvious ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from saes import D_IN, batch, dead_at, make
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tcsae.config import identity, run_id
from tcsae.config.sae import TSAEConfig
from tcsae.consistency import window_variance
from tcsae.sae.codes import Places
from tcsae.sae.tsae import Pairs, documents, draw_pairs, info_nce


def random_places(seed: int, contexts: int = 3, positions: int = 12) -> Places:
    generator = torch.Generator().manual_seed(seed)
    segments_BT = (torch.rand(contexts, positions, generator=generator) < 0.25).cumsum(1)
    valid_BT = torch.rand(contexts, positions, generator=generator) > 0.25
    return Places.of(valid_BT, segments_BT, generator)


def partners_allowed(places: Places, kind: str, shuffled: bool) -> list[set[int]]:
    """By token: the numbers of the tokens that may be its partner."""
    valid, segments = places.valid_BT.tolist(), places.segments_BT.tolist()
    n_positions, allowed = len(valid[0]), []
    for b, row in enumerate(valid):
        for t, counts in enumerate(row):
            same = [
                u
                for u in range(n_positions)
                if counts and row[u] and segments[b][u] == segments[b][t] and u != t
            ]
            if kind == "adjacent" and not shuffled:
                same = [u for u in same if u == t - 1]
            elif not shuffled:
                same = [u for u in same if u < t]
            allowed.append({b * n_positions + u for u in same})
    return allowed


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["adjacent", "earlier"]),
    shuffled=st.booleans(),
)
def test_partners_are_those_allowed_and_every_token_that_can_has_one(
    seed: int, kind: Any, shuffled: bool
) -> None:
    places = random_places(seed)
    pairs = draw_pairs(places, kind, shuffled)
    for token, allowed in enumerate(partners_allowed(places, kind, shuffled)):
        partner = int(pairs.partner_N[token])
        assert bool(pairs.exists_N[token]) == bool(allowed)
        assert partner in (allowed or {token})


@pytest.mark.parametrize("shuffled", [False, True])
def test_random_partners_are_uniform(shuffled: bool) -> None:
    places = random_places(3, contexts=1)
    allowed = partners_allowed(places, "earlier", shuffled)
    token = max(range(len(allowed)), key=lambda t: len(allowed[t]))
    assert len(allowed[token]) >= 3
    drawn = [int(draw_pairs(places, "earlier", shuffled).partner_N[token]) for _ in range(3000)]
    for partner in allowed[token]:
        expected = len(drawn) / len(allowed[token])
        assert abs(drawn.count(partner) - expected) < 5 * math.sqrt(expected)


def test_drawn_pairs_exist_and_come_once_and_are_random() -> None:
    exists_N = torch.arange(100) % 3 == 0
    pairs = Pairs(torch.arange(100), exists_N)
    tokens, there = pairs.some(20, torch.Generator().manual_seed(0))
    assert there.all() and exists_N[tokens].all() and len(tokens.unique()) == 20
    assert not torch.equal(tokens, pairs.some(20, torch.Generator().manual_seed(1))[0])
    tokens, there = pairs.some(200, None)
    assert len(tokens) == 100 and torch.equal(tokens[there].sort().values, exists_N.nonzero()[:, 0])


def slow_info_nce(similarity: Tensor, document: list[int], exists: list[bool]) -> float:
    total, n = 0.0, sum(exists)
    for p, here in enumerate(exists):
        if not here:
            continue
        others = [q for q in range(len(exists)) if exists[q] and document[q] != document[p]]
        for logit in (lambda q, p=p: similarity[p, q], lambda q, p=p: similarity[q, p]):
            weights = [math.exp(logit(q)) for q in [p, *others]]
            total -= math.log(weights[0] / sum(weights)) / 2
    return total / max(n, 1)


def some_pairs(seed: int, n: int, size: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of tokens and partners, documents (0 to 3), and which pairs exist."""
    generator = torch.Generator().manual_seed(seed)
    z, other = torch.randn(2, n, size, generator=generator, dtype=torch.float64)
    document = torch.randint(0, 4, (n,), generator=generator)
    return z, other, document, torch.rand(n, generator=generator) > 0.3


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), rows=st.integers(1, 10))
def test_info_nce_is_the_mean_log_loss_of_both_directions(seed: int, n: int, rows: int) -> None:
    z, other, document, exists = some_pairs(seed, n)
    wanted = slow_info_nce(z @ other.T, document.tolist(), exists.tolist())
    found = info_nce(z, other, document, exists, rows)
    assert found.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 7, 20])
@pytest.mark.parametrize("same_document", [False, True])
def test_the_gradient_of_info_nce_is_that_of_finite_differences(
    rows: int, same_document: bool
) -> None:
    z, other, document, exists = some_pairs(0, 7)
    document = torch.arange(7) if same_document else document
    torch.autograd.gradcheck(
        lambda a, b: 0.7 * info_nce(a, b, document, exists, rows),
        (z.requires_grad_(), other.requires_grad_()),
    )


def plain_info_nce(z: Tensor, other: Tensor, document: Tensor, exists: Tensor) -> Tensor:
    """With all similarities in memory, by PyTorch's cross-entropy and its gradients."""
    s = z @ other.T
    allowed = (document[:, None] != document) & exists & exists[:, None]
    s = s.masked_fill(~(allowed | torch.eye(len(s), dtype=torch.bool)), -torch.inf)
    answer = torch.arange(len(s))
    each = cross_entropy(s, answer, reduction="none") + cross_entropy(s.T, answer, reduction="none")
    return (each * exists).sum() / (2 * exists.sum())


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"), [(torch.float32, 0.4, 1e-6), (torch.float64, 4, 1e-12)]
)
def test_in_blocks_it_is_what_it_is_with_all_similarities_in_memory(
    dtype: torch.dtype, scale: float, tolerance: float
) -> None:
    """At the default's 1024 pairs, with similarities up to some 5 and 500."""
    z, other, document, exists = some_pairs(0, 1024, size=64)
    results = []
    for form in (plain_info_nce, info_nce):
        a, b = ((scale * x).to(dtype).requires_grad_() for x in (z, other))
        loss = form(a, b, document, exists)
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad))
    for plain, blocks in zip(*results, strict=True):
        assert (plain - blocks).abs().max() <= tolerance * plain.abs().max()


class Largest(TorchDispatchMode):
    """Records the most elements that a tensor made in it had."""

    found = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.found = max(self.found, result.numel())
        return result


def test_all_similarities_are_never_in_memory() -> None:
    z, other, document, exists = some_pairs(0, 60)
    with Largest() as largest:
        info_nce(z.requires_grad_(), other.requires_grad_(), document, exists, 5).backward()
    assert largest.found == 5 * 60


def test_documents_of_different_contexts_are_different() -> None:
    places = Places.of(torch.ones(2, 3, dtype=torch.bool), torch.tensor([[0, 0, 1], [0, 2, 2]]))
    assert len(documents(places).unique()) == 4


def pass_of(sae: Any, seed: int = 0) -> tuple[Any, Places]:
    """A training pass over batch(), every position of which is its own document's."""
    x_BTD, valid_BT = batch(seed, contexts=4, positions=16)
    segments_BT = (torch.arange(16) >= 8).long().expand(4, 16)
    output = sae.training_forward(
        x_BTD,
        valid_BT,
        sparsity_warmup=1.0,
        dead_F=dead_at(),
        segments_BT=segments_BT,
        generator=torch.Generator().manual_seed(seed),
    )
    return output, Places.of(valid_BT, segments_BT)


def test_the_squared_difference_is_twice_the_window_variance_of_the_first_group() -> None:
    sae = make("tsae", pair_loss="squared_difference", pair_coefficient=0.7)
    output, places = pass_of(sae)
    first = output.features[..., : sae.cfg.group_sizes[0]].double()
    expected = window_variance(first, 2, segments=places.segments_BT, valid=places.valid_BT)
    assert expected > 0
    assert output.losses["pairs"].item() == pytest.approx(0.7 * 2 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("pair_loss", ["cosine", "inner_product"])
@pytest.mark.parametrize("pairs", ["adjacent", "earlier"])
@pytest.mark.parametrize("same_document", [False, True])
def test_the_pair_loss_is_info_nce_of_the_first_groups_codes(
    pair_loss: str, pairs: Any, same_document: bool
) -> None:
    sae = make(
        "tsae",
        pair_loss=pair_loss,
        pairs=pairs,
        pair_coefficient=0.3,
        contrast_pairs=1000,  # more than there are
        same_document_negatives=same_document,
    )
    output, places = pass_of(sae)
    # The same draws: the partners first, then the order of the pairs, which changes nothing.
    drawn = draw_pairs(places._replace(generator=torch.Generator().manual_seed(0)), pairs)
    tokens = drawn.exists_N.nonzero()[:, 0]
    z = output.features.flatten(0, 1)[:, : sae.cfg.group_sizes[0]].double().detach()
    a, b = z[tokens], z[drawn.partner_N[tokens]]
    similarity = a @ b.T
    if pair_loss == "cosine":
        similarity /= (a.norm(dim=1)[:, None] * b.norm(dim=1)).clamp(min=1e-6)
    document = list(range(len(tokens))) if same_document else documents(places)[tokens].tolist()
    wanted = 0.3 * D_IN * slow_info_nce(similarity, document, [True] * len(tokens))
    assert output.losses["pairs"].item() == pytest.approx(wanted, rel=1e-5)


def test_the_pair_loss_pulls_codes_of_a_document_together() -> None:
    """A few steps on the pair loss alone: documents become easier to tell apart."""
    sae = make("tsae", pair_loss="inner_product")
    optimizer = torch.optim.Adam([sae.W_enc, sae.b_enc], lr=1e-2)
    found = []
    for _ in range(30):
        output, _ = pass_of(sae)
        optimizer.zero_grad()
        output.losses["pairs"].backward()
        optimizer.step()
        found.append(output.losses["pairs"].item())
    assert found[-1] < 0.8 * found[0]


def test_without_a_weight_it_is_the_matryoshka_sae() -> None:
    fractions = {"group_fractions": (0.2, 0.8)}
    plain = make("matryoshka", **fractions)
    temporal = make("tsae", k=4, pair_coefficient=0.0, **fractions)
    x_BTD, valid_BT = batch()
    results = [
        sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_at())
        for sae in (plain, temporal)
    ]
    assert torch.equal(results[0].features, results[1].features)
    assert results[0].losses.keys() == results[1].losses.keys()
    for name, value in results[0].losses.items():
        assert torch.equal(value, results[1].losses[name])


def test_a_batch_without_pairs_has_a_loss_of_zero_and_finite_gradients() -> None:
    for pair_loss in ("cosine", "inner_product", "squared_difference"):
        sae = make("tsae", pair_loss=pair_loss)
        valid_BT = torch.zeros(2, 8, dtype=torch.bool)
        valid_BT[:, 3] = True
        x_BTD = torch.randn(2, 8, D_IN)
        output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_at())
        assert output.losses["pairs"].item() == 0
        sum(output.losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)


@pytest.mark.parametrize("n", [1, 8193])
def test_contrast_pairs_has_bounds(n: int) -> None:
    with pytest.raises(ValidationError, match="contrast_pairs"):
        TSAEConfig(d_sae=64, contrast_pairs=n)


def test_runs_from_before_same_document_negatives_load_and_keep_their_names(
    tiny_gpt2: Path, texts: Path
) -> None:
    config, other = (
        small_config(tiny_gpt2, texts, sae="tsae", sae__same_document_negatives=value)
        for value in ("false", "true")
    )
    raw = config.dump()
    for younger in ("same_document_negatives", "encoder_scale", "selection"):
        del raw["sae"][younger]
    old = type(config).model_validate(raw)
    assert old.sae.same_document_negatives is False
    assert identity(old)["sae"] == raw["sae"]
    assert run_id(old) == run_id(config) != run_id(other)
