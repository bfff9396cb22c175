"""The layout share of features with planted firings."""

from __future__ import annotations

import torch

from tcsae.metrics.layout import LayoutShare, is_layout_feature


def test_the_share_is_of_the_activation_and_of_valid_tokens() -> None:
    layout = torch.tensor([[True, False, True, False], [False, False, True, True]])
    valid = torch.tensor([[False, True, True, True], [True, True, True, True]])
    f = torch.zeros(2, 4, 5)
    f[0, 0, 0] = 100.0  # not valid: not counted
    f[0, 1, 0], f[1, 2, 0] = 1.0, 3.0  # three quarters
    f[1, 3, 1] = 0.1
    f[1, 0, 2] = 7.0
    f[0, 2, 3], f[0, 3, 3] = 2.0, 2.0  # one half: not more than half
    shares = LayoutShare(5)
    for b in range(2):
        shares.update(f[b : b + 1], layout[b : b + 1], valid[b : b + 1])
    found = shares.compute()
    assert torch.allclose(found[:4], torch.tensor([0.75, 1.0, 0.0, 0.5]).double())
    assert found[4].isnan()
    assert is_layout_feature(found).tolist() == [True, True, False, False, False]
    summary = shares.summary(torch.tensor([1.0, 2.0, 3.0, 4.0, float("nan")]))
    assert summary == {"token_share": 3 / 7, "n_features": 2, "energy_share": 0.3}


def test_nothing_measured_says_so() -> None:
    shares = LayoutShare(2)
    shares.update(
        torch.zeros(1, 3, 2),
        torch.ones(1, 3, dtype=torch.bool),
        torch.zeros(1, 3, dtype=torch.bool),
    )
    assert shares.compute().isnan().all()
    assert shares.summary(torch.zeros(2)) == {
        "token_share": None,
        "n_features": 0,
        "energy_share": None,
    }
