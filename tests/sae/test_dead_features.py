"""Dead features: AuxK and resampling, on every registered architecture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saes import (
    D_IN,
    D_SAE,
    SEQUENTIAL,
    VARIANTS,
    batch,
    biases,
    dead_at,
    every_variant,
    few_examples,
    fit,
    make,
    sparse_data,
    train_pass,
)

from tcsae.products import BY_DEVICE, PLAIN
from tcsae.products.cpu import CPU

every_that_resamples = pytest.mark.parametrize(
    "name", [name for name in VARIANTS if name not in SEQUENTIAL]
)


def revived(name: str, revival: str) -> int:
    """Of 32 features planted dead, how many fire in the second half of a run."""
    sae = make(name, biased=False, revival=revival)
    sae.set_b_dec(sparse_data(256, 0).mean(0))
    planted = torch.arange(0, D_SAE, 2)
    with torch.no_grad():
        for bias in biases(sae):
            bias[planted] = -1.0
        # Without a bias only an encoder of zeros never fires.
        sae.W_enc[:, planted] *= 0.1 if biases(sae) else 0.0
    steps = 200 if biases(sae) else 400  # an encoder of zeros takes longer to come back
    return int((fit(sae, steps, n_true=D_SAE, dead=planted)[planted] >= steps // 2).sum())


@every_variant
@pytest.mark.parametrize("revival", ["auxk", "resample"])
def test_planted_dead_features_fire_again_with_revival(name: str, revival: str) -> None:
    if revival == "resample" and name in SEQUENTIAL:
        with pytest.raises(ValueError, match="'auxk' or 'none'"):
            make(name, revival=revival)
    else:
        assert revived(name, revival) >= 16


@every_variant
def test_planted_dead_features_stay_dead_without_revival(name: str) -> None:
    if name == "jumprelu, tanh":
        # Its own loss on the pre-activations brings them back, and the estimator near a threshold.
        assert revived(name, "none") >= 8
    elif name == "tfa, predictive":
        assert revived(name, "none") > 0  # these codes are the attention's, not the encoder's
    else:
        assert revived(name, "none") == 0


@every_variant
def test_auxk_costs_nothing_and_is_zero_while_nothing_is_dead(name: str) -> None:
    x_BTD, valid_BT = batch()
    output, grads = train_pass(make(name, revival="auxk"), x_BTD, valid_BT)
    _, without = train_pass(make(name, revival="none"), x_BTD, valid_BT)
    assert output.losses["auxk"] == 0 and output.losses["auxk"].grad_fn is None
    assert all(torch.equal(grads[k], v) for k, v in without.items())


@pytest.mark.parametrize("k_aux", [None, 2])
@given(seed=st.integers(0, 1000))
@few_examples
def test_auxk_equals_a_loop_over_tokens(k_aux: int | None, seed: int) -> None:
    sae = make("standard", seed, revival="auxk", k_aux=k_aux, auxk_coefficient=0.5)
    x_BTD, valid_BT = batch(seed)
    dead = [0, 3, 7, 11, 20]
    with torch.no_grad():
        sae.b_enc[3] = -9.0  # nowhere above zero, so it goes in without ReLU
    output, _ = train_pass(sae, x_BTD, valid_BT, dead_at(*dead))
    x_ND = x_BTD[valid_BT].double()
    residual_ND = x_ND - output.reconstruction.detach()[valid_BT].double()
    silent_F = (sae.encode(x_BTD[valid_BT]) == 0).all(0)
    assert silent_F[3] and not silent_F[dead].all()
    rebuilt = []
    for token in x_ND:
        pre = (token - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
        pre = torch.where(silent_F, pre, pre.clamp(min=0))
        chosen = sorted(dead, key=lambda j, pre=pre: -pre[j].item())[: k_aux or D_IN // 2]
        rebuilt.append(sum(pre[j] * sae.W_dec[j].double() for j in chosen))
    error = (torch.stack(rebuilt) - residual_ND).square().sum(1).mean()
    variance = [(t - t.mean(0)).square().sum(1).mean() for t in (x_ND, residual_ND)]
    wanted = 0.5 * variance[0] / variance[1] * error
    torch.testing.assert_close(output.losses["auxk"].double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("k_aux", [None, 2, D_SAE])
@pytest.mark.parametrize("dead", [[], [3], [0, 3, 7, 11], range(1, 20), range(D_SAE)], ids=len)
@every_variant
def test_auxk_of_a_mask_over_all_features_is_that_of_the_dead_ones_picked_out(
    name: str, dead: list[int], k_aux: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make(name, revival="auxk", k_aux=k_aux)
    with torch.no_grad():
        for bias in biases(sae):
            bias[3] = -9.0  # nowhere above zero, so it goes in without ReLU
    found = []
    for products in (CPU(), PLAIN):
        monkeypatch.setitem(BY_DEVICE, "cpu", products)
        x_BTD, valid_BT = batch()
        x_BTD[~valid_BT] = torch.nan
        sae.zero_grad()
        output = sae.training_forward(
            x_BTD,
            valid_BT,
            sparsity_warmup=1.0,
            dead_F=dead_at(*dead),
            generator=torch.Generator().manual_seed(0),
        )
        if output.losses["auxk"].requires_grad:
            output.losses["auxk"].backward()
        zeros = {n: torch.zeros_like(p) for n, p in sae.named_parameters()}
        grads = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
        found.append((output.losses["auxk"].detach(), {**zeros, **grads}))
    (wanted, wanted_grads), (value, grads) = found
    assert (value > 0) == bool(dead)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(grads, wanted_grads)
    if not dead:
        assert not any(grad.any() for grad in grads.values())


@every_variant
def test_auxk_is_zero_where_nothing_can_be_dead_yet(name: str) -> None:
    x_BTD, valid_BT = batch()
    output = make(name, revival="auxk").training_forward(
        x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=None
    )
    assert output.losses["auxk"] == 0 and output.losses["auxk"].grad_fn is None


@every_variant
def test_auxk_moves_dead_features_only(name: str) -> None:
    sae = make(name, revival="auxk")
    x_BTD, valid_BT = batch()
    dead_F = dead_at(2, 6)
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F)
    output.losses["auxk"].backward()
    assert (sae.W_dec.grad[dead_F].abs().sum(1) > 0).all()
    assert (sae.W_enc.grad[:, dead_F].abs().sum(0) > 0).all()
    assert sae.W_dec.grad[~dead_F].abs().sum() == 0 and sae.W_enc.grad[:, ~dead_F].abs().sum() == 0
    assert sae.b_dec.grad is None or sae.b_dec.grad.abs().sum() == 0


@every_that_resamples
def test_resampling_takes_the_direction_of_a_token_and_clears_the_optimizer(name: str) -> None:
    sae = make(name, revival="resample")
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    x_BTD, valid_BT = batch()
    train_pass(sae, x_BTD, valid_BT)
    for parameter in sae.parameters():
        parameter.grad += 1.0
    optimizer.step()
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    x_ND = sparse_data(50, 0)
    dead_F = dead_at(1, 17)
    assert sae.revive(dead_F, optimizer, x_ND, torch.Generator().manual_seed(0)) == 2

    direction_ND = torch.nn.functional.normalize(x_ND - sae.b_dec, dim=1)
    nearest = (sae.W_dec[dead_F] @ direction_ND.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(2))
    assert nearest.indices.unique().numel() == 2
    norm = sae.resampled_encoder_norm * before["W_enc"][:, ~dead_F].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, dead_F], sae.W_dec[dead_F].T * norm)
    assert all(bias[dead_F].abs().sum() == 0 for bias in biases(sae))
    assert torch.equal(sae.W_enc[:, ~dead_F], before["W_enc"][:, ~dead_F])
    by_feature = {n: p for n, p in sae.named_parameters() if n not in ("b_dec", "W_enc")}
    assert all(torch.equal(p[~dead_F], before[n][~dead_F]) for n, p in by_feature.items())
    for moment in ("exp_avg", "exp_avg_sq"):
        size_F = optimizer.state[sae.W_enc][moment].abs().sum(0)
        assert torch.equal(size_F == 0, dead_F)
        for parameter in by_feature.values():
            size_F = optimizer.state[parameter][moment].abs().reshape(D_SAE, -1).sum(1)
            assert torch.equal(size_F == 0, dead_F)
        assert (optimizer.state[sae.b_dec][moment] != 0).all()


def test_resampling_draws_by_the_squared_loss() -> None:
    sae = make("standard", biased=False)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    # Nothing fires, so the loss of a token is its squared norm: 1 and 2 to the power 4 in chance.
    x_ND = torch.zeros(2, D_IN)
    x_ND[0, 0], x_ND[1, 1] = 1.0, 2.0**0.5
    optimizer = torch.optim.Adam(sae.parameters())
    generator = torch.Generator().manual_seed(0)
    heavy = 0
    for _ in range(1000):
        sae.revive(dead_at(0), optimizer, x_ND, generator)
        heavy += int(sae.W_dec[0, 1] > 0.5)
        with torch.no_grad():
            sae.b_enc.fill_(-1e6)
    assert heavy / 1000 == pytest.approx(0.8, abs=0.04)


@every_that_resamples
def test_resampling_more_features_than_tokens_or_all_of_them_works(name: str) -> None:
    sae = make(name)
    optimizer = torch.optim.Adam(sae.parameters())
    n = sae.revive(torch.ones(D_SAE).bool(), optimizer, sparse_data(5, 0))
    assert n == D_SAE and all(p.isfinite().all() for p in sae.parameters())


@every_that_resamples
def test_resampling_gives_every_dead_feature_a_token_of_its_own_while_they_last(name: str) -> None:
    sae = make(name)
    x_ND = torch.randn(D_SAE - 1, D_IN)
    dead_F = ~dead_at(0)
    sae.revive(dead_F, torch.optim.Adam(sae.parameters()), x_ND)
    direction_ND = torch.nn.functional.normalize(x_ND - sae.b_dec, dim=1)
    drawn = (sae.W_dec[dead_F] @ direction_ND.T).argmax(1)
    assert drawn.sort().values.tolist() == list(range(D_SAE - 1))
