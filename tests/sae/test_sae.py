"""What holds for every registered architecture."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from tcsae.sae import architectures, config_class, sae_class
from tcsae.sae.base import SAEConfig, SparseAutoencoder, TrainingOutput, geometric_median

D_IN, D_SAE = 10, 64  # at k = 4 topk takes its sparse path
OPTIONS: dict[str, dict[str, Any]] = {"topk": {"k": 4}}

every_architecture = pytest.mark.parametrize("name", architectures())
few_examples = settings(max_examples=25, deadline=None)


def make(name: str, seed: int = 0, biased: bool = True, **options: Any) -> SparseAutoencoder:
    """A small SAE; `biased`: with random biases and encoder, as after some training."""
    cfg = config_class(name)(**{"d_sae": D_SAE, **OPTIONS.get(name, {}), **options})
    generator = torch.Generator().manual_seed(seed)
    sae = sae_class(name)(cfg, D_IN, generator)
    if biased:
        with torch.no_grad():
            for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return sae


def batch(seed: int = 0, contexts: int = 3, positions: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(contexts, positions, D_IN, generator=generator) + 0.5
    valid_BT = torch.rand(contexts, positions, generator=generator) > 0.3
    valid_BT[0, :2] = torch.tensor([False, True])
    return x_BTD, valid_BT


def dead_at(*features: int) -> Tensor:
    return torch.zeros(D_SAE, dtype=torch.bool).index_fill_(0, torch.tensor(features).long(), True)


def train_pass(
    sae: SparseAutoencoder, x_BTD: Tensor, valid_BT: Tensor, dead_F: Tensor | None = None
) -> tuple[TrainingOutput, dict[str, Tensor]]:
    """The output and the gradients, by parameter name, of the sum of the losses."""
    sae.zero_grad()
    dead_F = dead_at() if dead_F is None else dead_F
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F)
    sum(output.losses.values()).backward()
    return output, {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}


def sparse_data(n: int, seed: int, n_true: int = 16, active: float = 0.125) -> Tensor:
    """[n, D_IN] tokens: sparse positive mixtures of `n_true` random directions."""
    generator = torch.Generator().manual_seed(1234)
    directions = torch.nn.functional.normalize(
        torch.randn(n_true, D_IN, generator=generator), dim=1
    )
    generator.manual_seed(seed)
    on = torch.rand(n, n_true, generator=generator) < active
    return (on * (1 + torch.rand(n, n_true, generator=generator))) @ directions * 2 + 1.0


def fit(sae: SparseAutoencoder, steps: int, n_true: int = 16, dead: Tensor | None = None) -> Tensor:
    """Train on sparse_data; the last step at which each feature fired, -1 if it never did.

    A feature counts as dead after 10 steps without firing, those in `dead` from the start.
    """
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    valid_BT = torch.ones(16, 16, dtype=torch.bool)
    fired_at, quiet = torch.full((D_SAE,), -1), torch.zeros(D_SAE)
    quiet[[] if dead is None else dead] = 99
    for step in range(steps):
        x_BTD = sparse_data(256, step, n_true, active=2 / n_true).view(16, 16, D_IN)
        output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=quiet > 10)
        optimizer.zero_grad()
        sum(output.losses.values()).backward()
        sae.project_decoder_gradient()
        optimizer.step()
        sae.normalise_decoder()
        fired = (output.features > 0).flatten(0, 1).any(0)
        fired_at[fired] = step
        quiet = torch.where(fired, 0, quiet + 1)
        if sae.cfg.revival == "resample" and step % 20 == 19:
            generator = torch.Generator().manual_seed(step)
            sae.revive(quiet > 10, optimizer, x_BTD.flatten(0, 1), generator)
    return fired_at


def explained_variance(sae: SparseAutoencoder) -> float:
    x_ND = sparse_data(4096, seed=99_999)
    with torch.no_grad():
        error = (x_ND - sae(x_ND)).square().sum()
    return 1 - (error / (x_ND - x_ND.mean(0)).square().sum()).item()


# ---------------------------------------------------------------- construction and registry


def test_an_unknown_architecture_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="nosuch.*standard, topk"):
        sae_class("nosuch")


@every_architecture
def test_the_registry_finds_the_class_and_its_configuration(name: str) -> None:
    assert issubclass(sae_class(name), SparseAutoencoder)
    assert config_class(name)(d_sae=64).architecture == name


def test_the_registry_needs_no_torch() -> None:
    code = "import sys, tcsae.sae; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@every_architecture
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"d_sae": 1}, "d_sae"),
        ({"d_sae": "24"}, "d_sae"),
        ({"revival": "prayer"}, "auxk"),
        ({"auxk_coefficient": float("nan")}, "auxk_coefficient"),
        ({"nosuch": 1}, "nosuch"),
        ({"architecture": "other"}, "architecture"),
    ],
)
def test_a_bad_option_is_refused_by_name(name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config_class(name)(**{"d_sae": D_SAE, **options})


@every_architecture
def test_the_start_is_tied_unit_norm_and_decided_by_the_generator(name: str) -> None:
    first, again, other = (make(name, seed, biased=False) for seed in (3, 3, 4))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first.W_dec, other.W_dec)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(first.W_enc, first.W_dec.T) and first.W_enc.is_contiguous()
    assert first.W_enc.data_ptr() != first.W_dec.data_ptr()
    assert first.b_enc.abs().sum() == 0 and first.b_dec.abs().sum() == 0


@every_architecture
def test_the_state_survives_a_round_trip(name: str) -> None:
    sae, copy = make(name, 0), make(name, 1)
    copy.load_state_dict(sae.state_dict())
    x_ND = sparse_data(32, 0)
    assert torch.equal(copy(x_ND), sae(x_ND))


@every_architecture
@pytest.mark.parametrize("shape", [(), (7,), (2, 5)])
def test_shapes_follow_the_input(name: str, shape: tuple[int, ...]) -> None:
    sae = make(name)
    x = torch.randn(*shape, D_IN)
    features = sae.encode(x)
    assert features.shape == (*shape, D_SAE) and sae(x).shape == x.shape
    assert (features >= 0).all() and torch.equal(sae(x), sae.decode(features))
    assert sae.dtype == torch.float32 and sae.device == torch.device("cpu")


# ---------------------------------------------------------------- training pass


@every_architecture
def test_a_training_pass_has_finite_losses_and_a_gradient_on_every_parameter(name: str) -> None:
    sae = make(name, revival="auxk")
    x_BTD, valid_BT = batch()
    output, grads = train_pass(sae, x_BTD, valid_BT, dead_at(0, 5))
    assert output.features.shape == (3, 8, D_SAE)
    assert output.reconstruction.shape == x_BTD.shape
    assert all(value.isfinite() and value.ndim == 0 for value in output.losses.values())
    assert set(grads) == {n for n, _ in sae.named_parameters()}
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads.values())


@every_architecture
def test_the_reconstruction_term_is_the_mean_over_valid_tokens_of_the_summed_square(
    name: str,
) -> None:
    sae = make(name)
    x_BTD, valid_BT = batch()
    output, _ = train_pass(sae, x_BTD, valid_BT)
    per_token = (output.reconstruction - x_BTD).square().sum(-1)
    torch.testing.assert_close(output.losses["reconstruction"], per_token[valid_BT].mean())
    torch.testing.assert_close(output.reconstruction, sae.decode(output.features))


@every_architecture
@given(seed=st.integers(0, 10_000), junk=st.sampled_from([0.0, 1e30, -1e30, np.inf, np.nan]))
@few_examples
def test_what_invalid_positions_hold_changes_nothing(name: str, seed: int, junk: float) -> None:
    sae = make(name, revival="auxk")
    x_BTD, valid_BT = batch(seed)
    dead_F = dead_at(1, 2, 3)
    clean, clean_grads = train_pass(sae, x_BTD, valid_BT, dead_F)
    dirty, dirty_grads = train_pass(
        sae, x_BTD.masked_fill(~valid_BT[..., None], junk), valid_BT, dead_F
    )
    assert all(torch.equal(dirty.losses[k], v) for k, v in clean.losses.items())
    assert all(torch.equal(dirty_grads[k], v) for k, v in clean_grads.items())
    assert torch.equal(dirty.features, clean.features)
    assert dirty.features[~valid_BT].abs().sum() == 0


@every_architecture
@given(seed=st.integers(0, 10_000))
@few_examples
def test_masking_equals_leaving_the_tokens_out(name: str, seed: int) -> None:
    sae = make(name, revival="auxk")
    x_BTD, valid_BT = batch(seed)
    only = x_BTD[valid_BT][None]
    masked, masked_grads = train_pass(sae, x_BTD, valid_BT, dead_at(4, 9))
    packed, packed_grads = train_pass(sae, only, torch.ones(only.shape[:2]).bool(), dead_at(4, 9))
    torch.testing.assert_close(masked.losses, packed.losses)
    torch.testing.assert_close(masked_grads, packed_grads, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.features[valid_BT], packed.features[0])


@every_architecture
def test_a_batch_without_a_valid_token_gives_zero_losses(name: str) -> None:
    x_BTD, valid_BT = batch()
    output, grads = train_pass(
        make(name, revival="auxk"), x_BTD, torch.zeros_like(valid_BT), dead_at(1)
    )
    assert all(value == 0 for value in output.losses.values())
    assert all((g == 0).all() for g in grads.values())


@every_architecture
def test_a_loss_on_the_features_trains_the_encoder(name: str) -> None:
    sae = make(name)
    x_BTD, valid_BT = batch()
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=0.0, dead_F=dead_at())
    output.features.square().sum().backward()
    plain = make(name)
    plain.encode(x_BTD)[valid_BT].square().sum().backward()
    for parameter in ("W_enc", "b_enc", "b_dec"):
        torch.testing.assert_close(
            getattr(sae, parameter).grad, getattr(plain, parameter).grad, atol=1e-4, rtol=1e-4
        )


@every_architecture
def test_under_bfloat16_autocast_losses_and_gradients_are_float32_and_near(name: str) -> None:
    sae = make(name, revival="auxk")
    x_BTD, valid_BT = batch(contexts=32, positions=64)
    dead_F = dead_at(0, 1)
    exact, exact_grads = train_pass(sae, x_BTD, valid_BT, dead_F)
    with torch.autocast("cpu", torch.bfloat16):
        output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F)
    sae.zero_grad()
    sum(output.losses.values()).backward()
    assert {value.dtype for value in output.losses.values()} == {torch.float32}
    assert output.reconstruction.dtype == torch.float32
    # A sum kept in bfloat16 would be off by up to 0.4 % however exact its terms are.
    rounded = (output.reconstruction - x_BTD).square().sum(-1)[valid_BT].mean()
    torch.testing.assert_close(output.losses["reconstruction"], rounded, rtol=1e-5, atol=0)
    for term, value in exact.losses.items():
        torch.testing.assert_close(output.losses[term], value, rtol=0.02, atol=1e-4)
    for parameter, value in sae.named_parameters():
        assert value.dtype == torch.float32 and value.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(value.grad.flatten(), exact_grads[parameter].flatten(), 0)
        assert cosine > 0.98


# ---------------------------------------------------------------- decoder norm, scale


@every_architecture
def test_the_decoder_keeps_norm_one_and_its_gradient_is_across_the_rows(name: str) -> None:
    sae = make(name)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.05)
    for seed in range(5):
        x_BTD, valid_BT = batch(seed)
        train_pass(sae, x_BTD, valid_BT)
        before, rows = sae.W_dec.grad.clone(), sae.W_dec.detach()
        sae.project_decoder_gradient()
        along_F1 = (before * rows).sum(1, keepdim=True)
        assert along_F1.abs().max() > 1e-3
        torch.testing.assert_close(sae.W_dec.grad, before - along_F1 * rows, atol=1e-5, rtol=1e-4)
        optimizer.step()
        sae.normalise_decoder()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@every_architecture
def test_projecting_before_a_backward_pass_says_so(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"after backward\(\)"):
        make(name).project_decoder_gradient()


@every_architecture
@given(log_scale=st.floats(-3, 3), seed=st.integers(0, 1000))
@few_examples
def test_a_folded_scale_takes_raw_in_and_gives_raw_out(
    name: str, log_scale: float, seed: int
) -> None:
    scale = 10.0**log_scale
    trained, folded = make(name, seed), make(name, seed)
    folded.fold_input_scale(scale)
    raw_ND = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(seed)) / scale
    with torch.no_grad():
        codes = trained.encode(raw_ND * scale) / scale
        wanted = trained(raw_ND * scale) / scale
        tolerance = {"atol": 2e-5 / scale, "rtol": 1e-4}
        torch.testing.assert_close(folded.encode(raw_ND), codes, **tolerance)
        torch.testing.assert_close(folded(raw_ND), wanted, **tolerance)
    assert torch.equal(folded.W_dec, trained.W_dec)


@every_architecture
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(name: str, scale: float) -> None:
    with pytest.raises(ValueError, match="finite number above 0"):
        make(name).fold_input_scale(scale)


# ---------------------------------------------------------------- dead features


@every_architecture
@pytest.mark.parametrize(
    ("revival", "at_least", "at_most"), [("auxk", 16, 32), ("resample", 16, 32), ("none", 0, 0)]
)
def test_planted_dead_features_fire_again_with_revival_and_only_then(
    name: str, revival: str, at_least: int, at_most: int
) -> None:
    sae = make(name, biased=False, revival=revival)
    sae.set_b_dec(sparse_data(256, 0).mean(0))
    planted = torch.arange(0, D_SAE, 2)
    with torch.no_grad():
        sae.b_enc[planted] = -1.0
        sae.W_enc[:, planted] *= 0.1
    fired_at = fit(sae, 200, n_true=D_SAE, dead=planted)[planted]
    assert at_least <= (fired_at >= 150).sum() <= at_most


@every_architecture
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


@every_architecture
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


@every_architecture
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
    assert sae.b_enc[dead_F].abs().sum() == 0
    for parameter, old in (("W_dec", before["W_dec"]), ("b_enc", before["b_enc"])):
        assert torch.equal(getattr(sae, parameter)[~dead_F], old[~dead_F])
    assert torch.equal(sae.W_enc[:, ~dead_F], before["W_enc"][:, ~dead_F])
    for moment in ("exp_avg", "exp_avg_sq"):
        rows = optimizer.state[sae.W_dec][moment].abs().sum(1)
        columns = optimizer.state[sae.W_enc][moment].abs().sum(0)
        biases = optimizer.state[sae.b_enc][moment].abs()
        for values in (rows, columns, biases):
            assert torch.equal(values == 0, dead_F)
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


@every_architecture
def test_resampling_more_features_than_tokens_or_all_of_them_works(name: str) -> None:
    sae = make(name)
    optimizer = torch.optim.Adam(sae.parameters())
    n = sae.revive(torch.ones(D_SAE).bool(), optimizer, sparse_data(5, 0))
    assert n == D_SAE and all(p.isfinite().all() for p in sae.parameters())


@every_architecture
def test_resampling_gives_every_dead_feature_a_token_of_its_own_while_they_last(name: str) -> None:
    sae = make(name)
    x_ND = torch.randn(D_SAE - 1, D_IN)
    dead_F = ~dead_at(0)
    sae.revive(dead_F, torch.optim.Adam(sae.parameters()), x_ND)
    direction_ND = torch.nn.functional.normalize(x_ND - sae.b_dec, dim=1)
    drawn = (sae.W_dec[dead_F] @ direction_ND.T).argmax(1)
    assert drawn.sort().values.tolist() == list(range(D_SAE - 1))


# ---------------------------------------------------------------- b_dec, recovery


@given(seed=st.integers(0, 1000), n=st.integers(3, 30))
@few_examples
def test_the_geometric_median_has_the_least_sum_of_distances(seed: int, n: int) -> None:
    x_ND = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    found = geometric_median(x_ND)

    def cost(point: np.ndarray) -> float:
        return float(np.linalg.norm(x_ND.numpy() - point, axis=1).sum())

    best = minimize(cost, x_ND.mean(0).numpy(), method="Nelder-Mead", options={"xatol": 1e-7})
    assert cost(found.numpy()) <= best.fun * (1 + 1e-4)


@every_architecture
def test_b_dec_from_data_ignores_a_massive_token(name: str) -> None:
    sae = make(name)
    x_ND = torch.randn(500, D_IN) + 3.0
    x_ND[0] = 1e6
    sae.initialise_from_data(x_ND)
    assert (x_ND.mean(0) > 1000).all()
    torch.testing.assert_close(sae.b_dec.detach(), torch.full((D_IN,), 3.0), atol=0.3, rtol=0)


@every_architecture
def test_data_from_a_known_sparse_dictionary_is_fitted(name: str) -> None:
    sae = make(name, biased=False)
    sae.initialise_from_data(sparse_data(1000, 0))
    start = explained_variance(sae)
    fit(sae, 400)
    assert start < 0.7 and explained_variance(sae) > 0.9


def test_the_base_configuration_lists_its_choices() -> None:
    with pytest.raises(ValueError, match="'auxk', 'resample' or 'none'"):
        SAEConfig(architecture="standard", d_sae=4, revival="x")
