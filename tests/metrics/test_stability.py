"""Seeds that found the same features are matched, and chance is known."""

from __future__ import annotations

import pytest
import torch

from tcsae.metrics import stability as module
from tcsae.metrics.stability import (
    match_seeds,
    mcc,
    pairs_of,
    random_mcc,
    rank_correlation,
    share_above,
    stability,
)


def directions(n: int, d_in: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def all_live(*decoders: torch.Tensor) -> list[torch.Tensor]:
    return [torch.ones(len(w), dtype=torch.bool) for w in decoders]


@pytest.fixture(params=["Hungarian", "mutual nearest neighbours"])
def matching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "Hungarian":
        monkeypatch.setattr(module, "HUNGARIAN_LIMIT", 10)
        monkeypatch.setattr(module, "_AT_ONCE", 512)
        random_mcc.cache_clear()
    return str(request.param)


def test_an_sae_with_itself_and_with_a_permuted_copy_is_1(matching: str) -> None:
    w = directions(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.5, 2, 64)[:, None]
    found = stability([w, w, scale * w[order]], all_live(w, w, w))
    random_mcc.cache_clear()
    assert found.matching == matching
    assert found.mcc == pytest.approx([1, 1, 1]) and found.shared == [1, 1, 1]
    assert all(torch.allclose(x, torch.ones(64).double()) for x in found.features)
    assert torch.equal(found.family[2], found.family[0][order])
    assert len(found.family[0].unique()) == 64
    assert found.pw_mcc == (pytest.approx(1) if matching == "Hungarian" else None)


def test_random_dictionaries_are_within_their_null(matching: str) -> None:
    null = random_mcc(200, 32)
    draws = [
        mcc(match_seeds(directions(200, seed=2 * i + 5), directions(200, seed=2 * i + 6)))
        for i in range(8)
    ]
    random_mcc.cache_clear()
    spread = torch.tensor(draws).std()
    assert torch.tensor(draws).mean() == pytest.approx(null, abs=float(3 * spread))
    assert 0.1 < null < 0.7


def test_dead_features_count_in_pw_mcc_alone() -> None:
    w, other = directions(40), directions(40, seed=3)
    mixed = torch.cat([w[:20], other[20:]])
    live = torch.arange(40) < 20
    found = stability([w, mixed], [live, live])
    assert found.mcc == pytest.approx([1.0])
    assert found.pw_mcc is not None and found.pw_mcc < 0.9
    assert found.features[0][20:].isnan().all() and (found.family[0][20:] == -1).all()


def test_features_without_a_match_count_as_0() -> None:
    w = directions(30)
    pair = match_seeds(w, w[:10])
    assert mcc(pair) == pytest.approx(20 / 40) and share_above(pair) == 20 / 40
    assert (pair[0].match[:10] == torch.arange(10)).all() and (pair[0].match[10:] == -1).all()


def test_of_many_seeds_each_is_matched_as_often() -> None:
    assert len(pairs_of(6)) == 15
    times = torch.bincount(torch.tensor(pairs_of(10)).flatten(), minlength=10)
    assert len(times.unique()) == 1 and len(pairs_of(10)) <= 15


def test_rank_correlation_is_known_and_density_is_taken_out() -> None:
    generator = torch.Generator().manual_seed(0)
    density = torch.rand(2, 400, generator=generator)
    noise = torch.randn(2, 2, 400, generator=generator)
    # Both follow density and nothing else: the partial correlation is 0.
    seeds = [
        {"x": d + 0.1 * n[0], "y": d + 0.1 * n[1], "density": d}
        for d, n in zip(density, noise, strict=True)
    ]
    family = [torch.arange(400), torch.arange(400)]
    found = rank_correlation(seeds, family, 0.95)
    assert found["value"] > 0.8 and found["low"] > 0.7
    given = found["given_density"]
    assert given["low"] < 0 < given["high"] and abs(given["value"]) < 0.12
    alone = rank_correlation(seeds, [family[0], family[1] + 400], 0.95)
    assert found["n_families"] == 400 and alone["n_families"] == 800


def test_copies_in_one_family_make_no_interval_narrower() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 100, generator=generator)
    one = {"x": x, "y": y, "density": torch.rand(100, generator=generator)}
    nine = {name: value.repeat(9) for name, value in one.items()}
    own = rank_correlation([one], [torch.arange(100)], 0.95)
    copies = rank_correlation([nine], [torch.arange(100).repeat(9)], 0.95)
    widths = [e["high"] - e["low"] for e in (own, copies)]
    assert widths[1] == pytest.approx(widths[0], rel=0.2)


def test_too_few_features_have_a_reason() -> None:
    few = {name: torch.rand(5) for name in ("x", "y", "density")}
    found = rank_correlation([few], [torch.arange(5)], 0.95)
    assert found["value"] is None and "too few features" in found["reason"]
