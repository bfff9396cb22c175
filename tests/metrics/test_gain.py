"""Where a difference lies: parts add up to the mean, gains to the difference, planted or not."""

from __future__ import annotations

import torch

from tcsae.metrics.accumulator import weighted_mean
from tcsae.metrics.gain import (
    counterparts,
    gain_of,
    matched,
    mean_without,
    parts_of,
)
from tcsae.metrics.windows import weighed


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    drawn = torch.rand(5, n, generator=seeded(seed)).double()
    C, D, c0, density, rho = drawn
    found = {"C_8": C, "D_8": D * C, "c0": c0, "density": density, "rho_1": rho}
    found["L_8"] = (C - found["D_8"]) / (1 - found["D_8"])
    found["density"][0] = 0.0
    found["C_8"][1] = torch.nan
    return found


def test_parts_add_up_to_the_mean_that_is_reported() -> None:
    known = values(40)
    live = known["density"] > 0
    for name in ("C_8", "L_8", "rho_1"):
        value, weights = weighed(name, known, known["c0"], known["density"])
        mean = weighted_mean(value[live], weights[live])
        assert torch.isclose(parts_of(name, known).sum(), mean)
    assert parts_of("C_8", known)[:2].tolist() == [0.0, 0.0]


def test_counterparts_are_found_whatever_their_order_and_one_to_one() -> None:
    W = torch.randn(30, 16, generator=seeded())
    order = torch.randperm(30, generator=seeded(1))
    partner, cosine = counterparts(W, 3 * W[order])
    assert order[partner].tolist() == list(range(30))
    assert torch.allclose(cosine, torch.ones(30))
    # Two of one direction: the nearer one takes the only one there is.
    near = torch.stack([W[0] + 0.1 * W[1], W[0] + 0.01 * W[1], -W[2]])
    partner, cosine = counterparts(near, W[:3])
    assert partner.tolist() == [-1, 0, -1]
    assert cosine[2] == 0


def test_of_features_that_are_matched_late_those_with_the_largest_weights_are_looked_at() -> None:
    W = torch.eye(5000, 8) + 0.01 * torch.randn(5000, 8, generator=seeded())
    weight = torch.zeros(5000)
    weight[[4990, 3]] = 1.0
    partner, _ = matched(W[4990:], W, weight[4990:], weight)
    assert partner[0] == 4990


def test_a_planted_gain_is_found_and_all_gains_add_up() -> None:
    first, second = values(50, 1), values(50, 1)
    second["C_8"] = first["C_8"].clone()
    second["C_8"][[7, 9]] -= torch.tensor([0.3, 0.1]).double() / first["c0"][[7, 9]]
    layout = torch.zeros(50, dtype=torch.bool)
    layout[7] = True
    parts = parts_of("C_8", first), parts_of("C_8", second)
    found = gain_of(*parts, torch.arange(50), (layout, layout))
    assert found.feature[:2].tolist() == [7, 9] == found.counterpart[:2].tolist()
    assert abs(found.share(1) - 0.75) < 1e-6  # type: ignore[operator]
    assert abs(found.layout_share - 0.75) < 1e-6  # type: ignore[operator]
    assert (found.n_for(0.5), found.n_for(0.75), found.n_for(0.76)) == (1, 1, 2)
    assert abs(float(found.gain.sum()) - found.change) < 1e-12
    assert abs(found.up - found.change) < 1e-12


def test_what_has_no_counterpart_is_gained_or_lost_whole() -> None:
    first = torch.tensor([0.3, 0.1], dtype=torch.float64)
    second = torch.tensor([0.2, 0.05, 0.1], dtype=torch.float64)
    found = gain_of(first, second, torch.tensor([1, -1]))
    # (0.3 - 0.05), 0.1, -0.2, -0.1
    rows = zip(found.feature.tolist(), found.counterpart.tolist(), strict=True)
    assert list(rows) == [(0, 1), (1, -1), (-1, 2), (-1, 0)]
    assert torch.allclose(found.gain, torch.tensor([0.25, 0.1, -0.1, -0.2]).double())
    assert abs(found.change - 0.05) < 1e-12
    assert found.is_layout is None and found.layout_share is None


def test_a_loss_is_ranked_by_what_was_lost_and_no_change_has_no_shares() -> None:
    first = torch.tensor([0.1, 0.2], dtype=torch.float64)
    fallen = gain_of(first, first + torch.tensor([0.1, 0.3]), torch.arange(2))
    assert fallen.feature.tolist() == [1, 0]
    assert abs(fallen.share(1) - 0.75) < 1e-6  # type: ignore[operator]
    same = gain_of(first, first, torch.arange(2))
    assert (same.share(1), same.n_for(0.5), same.layout_share) == (None, None, None)


def test_the_mean_without_some_features_is_that_of_the_others() -> None:
    known = values(40)
    kept = torch.arange(40) >= 20
    others = {name: value[kept] for name, value in known.items()}
    wanted = float(parts_of("L_8", others).sum())
    found = mean_without("L_8", known, ~kept)
    assert found is not None and abs(found - wanted) < 1e-12
    assert mean_without("L_8", known, torch.ones(40, dtype=torch.bool)) is None
