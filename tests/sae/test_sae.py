"""What holds for every registered architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saes import (
    ALONE,
    D_IN,
    D_SAE,
    SEQUENTIAL,
    TWO_PARTS,
    VARIANTS,
    batch,
    biases,
    dead_at,
    every_architecture,
    every_variant,
    explained_variance,
    few_examples,
    fit,
    make,
    sparse_data,
    train_pass,
)
from scipy.optimize import minimize

from tcsae.config.sae import SAEConfig, config_class
from tcsae.sae import sae_class
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.statistics import geometric_median

# ---------------------------------------------------------------- construction and registry


def test_an_unknown_architecture_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="nosuch.*standard, topk"):
        sae_class("nosuch")


@every_architecture
def test_the_registry_finds_the_class_and_its_configuration(name: str) -> None:
    assert issubclass(sae_class(name), SparseAutoencoder)
    assert config_class(name)(d_sae=256).architecture == name


@every_architecture
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"d_sae": 1}, "d_sae"),
        ({"d_sae": "24"}, "d_sae"),
        ({"revival": "prayer"}, "auxk"),
        ({"auxk_coefficient": float("nan")}, "auxk_coefficient"),
        ({"encoder_scale": 0}, "encoder_scale"),
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
    assert torch.equal(first.W_enc, first.W_dec.T) and first.W_enc.T.is_contiguous()
    assert first.W_enc.data_ptr() != first.W_dec.data_ptr()
    assert all(bias.abs().sum() == 0 for bias in (first.b_dec, *biases(first)))


@every_architecture
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_encoder_starts_as_the_decoder_times_its_scale(name: str, scale: float) -> None:
    sae = make(name, biased=False, encoder_scale=scale)
    assert torch.equal(sae.W_enc, sae.W_dec.T * scale) and sae.W_enc.T.is_contiguous()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@every_variant
def test_the_state_survives_a_round_trip(name: str) -> None:
    sae, copy = make(name, 0), make(name, 1)
    copy.load_state_dict(sae.state_dict())
    x_ND = sparse_data(32, 0)
    assert torch.equal(copy(x_ND), sae(x_ND))


@every_variant
@pytest.mark.parametrize("shape", [(), (7,), (2, 5)])
def test_shapes_follow_the_input(name: str, shape: tuple[int, ...]) -> None:
    sae = make(name)
    x = torch.randn(*shape, D_IN)
    features, x_hat = sae.encode_and_decode(x)
    assert features.shape == (*shape, D_SAE) and x_hat.shape == x.shape
    assert torch.equal(features, sae.encode(x)) and torch.equal(x_hat, sae(x))
    if name not in TWO_PARTS:
        assert (features >= 0).all() and torch.equal(x_hat, sae.decode(features))
    assert sae.dtype == torch.float32 and sae.device == torch.device("cpu")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in SEQUENTIAL])
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30))
@few_examples
def test_in_use_a_token_does_not_depend_on_those_beside_it(name: str, seed: int, n: int) -> None:
    sae = make(name, seed)
    x_ND = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))
    alone = torch.stack([sae.encode(x_D) for x_D in x_ND])
    torch.testing.assert_close(sae.encode(x_ND), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.encode(x_ND.flip(0)).flip(0), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SEQUENTIAL)
@given(seed=st.integers(0, 10_000))
@few_examples
def test_in_use_a_token_depends_on_those_before_it_in_its_document_alone(
    name: str, seed: int
) -> None:
    sae = make(name, seed)
    x_BTD, valid_BT = batch(seed, positions=12)
    segments_BT = (torch.arange(12) >= 7).long().expand(3, 12)
    places = {"segments": segments_BT, "valid": valid_BT}
    whole = sae.encode_and_decode(x_BTD, **places)
    later = x_BTD.clone()
    later[:, 4:] = 9.0
    torch.testing.assert_close(
        [part[:, :4] for part in sae.encode_and_decode(later, **places)],
        [part[:, :4] for part in whole],
    )
    alone = sae.encode_and_decode(x_BTD[1, 7:], valid=valid_BT[1, 7:])
    torch.testing.assert_close([part[1, 7:] for part in whole], list(alone))
    assert whole[0][~valid_BT].abs().sum() == 0


# ---------------------------------------------------------------- training pass


@every_variant
def test_a_training_pass_has_finite_losses_and_a_gradient_on_every_parameter(name: str) -> None:
    sae = make(name, revival="auxk")
    x_BTD, valid_BT = batch()
    output, grads = train_pass(sae, x_BTD, valid_BT, dead_at(0, 5))
    assert output.features.shape == (3, 8, D_SAE)
    assert output.reconstruction.shape == x_BTD.shape
    assert all(value.isfinite() and value.ndim == 0 for value in output.losses.values())
    assert set(grads) == {n for n, _ in sae.named_parameters()}
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads.values())


@every_variant
def test_the_reconstruction_term_is_the_mean_over_valid_tokens_of_the_summed_square(
    name: str,
) -> None:
    sae = make(name)
    x_BTD, valid_BT = batch()
    output, _ = train_pass(sae, x_BTD, valid_BT)
    per_token = (output.reconstruction - x_BTD).square().sum(-1)
    torch.testing.assert_close(output.losses["reconstruction"], per_token[valid_BT].mean())
    if name not in TWO_PARTS:
        torch.testing.assert_close(output.reconstruction, sae.decode(output.features))


@every_variant
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


@every_variant
@given(seed=st.integers(0, 10_000))
@few_examples
def test_masking_equals_leaving_the_tokens_out(name: str, seed: int) -> None:
    sae = make(name, revival="auxk", **ALONE.get(name.partition(",")[0], {}))
    x_BTD, valid_BT = batch(seed, contexts=1 if name in SEQUENTIAL else 3)
    only = x_BTD[valid_BT][None]
    masked, masked_grads = train_pass(sae, x_BTD, valid_BT, dead_at(4, 9))
    packed, packed_grads = train_pass(sae, only, torch.ones(only.shape[:2]).bool(), dead_at(4, 9))
    torch.testing.assert_close(masked.losses, packed.losses)
    torch.testing.assert_close(masked_grads, packed_grads, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.features[valid_BT], packed.features[0])


@every_variant
def test_a_batch_without_a_valid_token_gives_zero_losses(name: str) -> None:
    x_BTD, valid_BT = batch()
    output, grads = train_pass(
        make(name, revival="auxk"), x_BTD, torch.zeros_like(valid_BT), dead_at(1)
    )
    assert all(value == 0 for value in output.losses.values())
    assert all((g == 0).all() for g in grads.values())


@every_variant
def test_a_loss_on_the_features_trains_the_encoder(name: str) -> None:
    sae = make(name)
    x_BTD, valid_BT = batch()
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=0.0, dead_F=dead_at())
    output.features.square().sum().backward()
    assert sae.W_enc.grad.abs().sum() > 0
    if name == "jumprelu, tanh":
        return  # its encoder has a gradient beyond that of the plain activation
    plain = make(name)
    if hasattr(plain, "n_batches"):
        # What the batch chose: all that is not below the least activation it kept.
        sae.after_step(output.codes, progress=0.0)
        plain.threshold.copy_(sae.threshold * (1 - 1e-6))
    plain.encode(x_BTD, valid=valid_BT)[valid_BT].square().sum().backward()
    for (parameter, ours), theirs in zip(sae.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=parameter)


@every_variant
def test_under_bfloat16_autocast_losses_and_gradients_are_float32_and_near(name: str) -> None:
    sae = make(name, revival="auxk")
    x_BTD, valid_BT = batch(contexts=32, positions=64)
    dead_F = dead_at(0, 1)
    exact, exact_grads = train_pass(sae, x_BTD, valid_BT, dead_F)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = train_pass(sae, x_BTD, valid_BT, dead_F)
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


@every_variant
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
        sae.constrain()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@every_variant
def test_projecting_before_a_backward_pass_says_so(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"after backward\(\)"):
        make(name).project_decoder_gradient()


@every_variant
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


@every_variant
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(name: str, scale: float) -> None:
    with pytest.raises(ValueError, match="finite number above 0"):
        make(name).fold_input_scale(scale)


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


@every_variant
def test_b_dec_from_data_ignores_a_massive_token(name: str) -> None:
    sae = make(name)
    x_ND = torch.randn(500, D_IN) + 3.0
    x_ND[0] = 1e6
    sae.initialise_from_data(x_ND)
    assert (x_ND.mean(0) > 1000).all()
    torch.testing.assert_close(sae.b_dec.detach(), torch.full((D_IN,), 3.0), atol=0.3, rtol=0)


@every_variant
def test_data_from_a_known_sparse_dictionary_is_fitted(name: str) -> None:
    sae = make(name, biased=False)
    sae.initialise_from_data(sparse_data(1000, 0))
    start = explained_variance(sae)
    fit(sae, 400)
    assert start < 0.7 and explained_variance(sae) > 0.9


def test_the_base_configuration_lists_its_choices() -> None:
    with pytest.raises(ValueError, match="'auxk', 'resample' or 'none'"):
        SAEConfig(architecture="standard", d_sae=4, revival="x")
