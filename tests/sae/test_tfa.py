"""Temporal Feature Analysis: against a slow attention, and against SAELens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saes import D_IN, D_SAE, batch, dead_at, make
from torch import Tensor

from tcsae.sae.formats.saelens import load_saelens, save_saelens
from tcsae.sae.tfa import TFASAE


def slow_parts(
    sae: TFASAE, x: Tensor, segments: list[int], valid: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(novel, predictive, x_hat) of one context, a token and a head at a time."""
    attention, n_heads = sae.attn_layers[0], sae.cfg.n_heads
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    W_enc = sae.W_enc * sae.gain
    z = [((c - sae.b_dec) @ W_enc).relu() for c in x]
    for t, counts in enumerate(valid):
        if not counts:
            zeros = torch.zeros(D_SAE)
            rows.append((zeros, zeros, sae.b_dec))
            continue
        past = [z[u] for u in range(t) if valid[u] and segments[u] == segments[t]]
        keys = torch.stack([torch.zeros(D_SAE), *past])
        q, k, v = attention.q_target(z[t]), attention.k_ctx(keys), attention.v_ctx(keys)
        heads = []
        for h in range(n_heads):
            d_key, d_value = len(q) // n_heads, D_SAE // n_heads
            qh, kh = q[h * d_key : (h + 1) * d_key], k[:, h * d_key : (h + 1) * d_key]
            weights = torch.softmax(kh @ qh / d_key**0.5, 0)
            heads.append(weights @ v[:, h * d_value : (h + 1) * d_value])
        p = attention.c_proj(torch.cat(heads)).relu()
        direction, c = p @ sae.W_dec, x[t] - sae.b_dec
        scale = (direction @ c) / direction.square().sum()
        pre = ((c - scale * direction) @ W_enc).relu()
        least = pre.topk(sae.cfg.k).values[-1]
        novel = torch.where(pre >= least, pre, 0)
        rows.append((novel, p * scale, scale * direction + novel @ sae.W_dec + sae.b_dec))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))  # type: ignore[return-value]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_codes_and_reconstruction_are_those_of_the_formula(seed: int) -> None:
    novel, predictive = make("tfa", seed), make("tfa, predictive", seed)
    x_BTD, valid_BT = batch(seed, positions=10)
    segments_BT = (torch.arange(10) >= 6).long().expand(3, 10)
    places = {"segments": segments_BT, "valid": valid_BT}
    with torch.no_grad():
        for b in range(3):
            parts = slow_parts(novel, x_BTD[b], segments_BT[b].tolist(), valid_BT[b].tolist())
            codes, x_hat = novel.encode_and_decode(x_BTD, **places)
            wanted = dict(atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(codes[b], parts[0], **wanted)
            torch.testing.assert_close(predictive.encode(x_BTD, **places)[b], parts[1], **wanted)
            torch.testing.assert_close(x_hat[b], parts[2], **wanted)


def test_sae_lens_gives_the_same_codes_and_reconstructions(tmp_path: Path) -> None:
    from sae_lens import SAE

    sae = make("tfa")
    sae.fold_input_scale(0.1)
    save_saelens(tmp_path, sae)
    theirs = SAE.load_from_disk(tmp_path)
    x_BTD = torch.randn(2, 9, D_IN, generator=torch.Generator().manual_seed(0)) * 10
    with torch.no_grad():
        z_novel, z_predictive = theirs.encode_with_predictions(x_BTD)
        codes, x_hat = sae.encode_and_decode(x_BTD)
        assert codes.abs().max() > 1 and z_predictive.abs().max() > 0.1
        torch.testing.assert_close(codes, z_novel, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(x_hat, theirs(x_BTD), atol=1e-4, rtol=1e-4)
        loaded, _ = load_saelens(tmp_path)
        torch.testing.assert_close(loaded(x_BTD), x_hat, atol=1e-5, rtol=1e-5)


def test_a_folder_of_sae_lens_loads_without_ours_in_its_metadata(tmp_path: Path) -> None:
    from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

    torch.manual_seed(0)
    cfg = TemporalSAEConfig(
        d_in=D_IN, d_sae=64, n_heads=2, bottleneck_factor=8, kval_topk=4, tied_weights=False
    )
    theirs = TemporalSAE(cfg)
    theirs.save_model(tmp_path)
    ours, _ = load_saelens(tmp_path)
    x_BTD = torch.randn(2, 7, D_IN) * 10
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x_BTD), theirs.encode(x_BTD), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(x_BTD), theirs(x_BTD), atol=1e-3, rtol=1e-4)


def test_tied_weights_of_sae_lens_are_refused_by_name(tmp_path: Path) -> None:
    from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

    cfg = TemporalSAEConfig(d_in=D_IN, d_sae=64, n_heads=2, bottleneck_factor=8, kval_topk=4)
    TemporalSAE(cfg).save_model(tmp_path)
    with pytest.raises(ValueError, match="tied_weights=True is not computed here"):
        load_saelens(tmp_path)


def test_the_shuffled_control_sees_another_past_and_is_in_order_in_use() -> None:
    plain, shuffled = make("tfa"), make("tfa", shuffle_positions=True)
    x_BTD, valid_BT = batch(positions=12)
    found = [
        sae.training_forward(
            x_BTD,
            valid_BT,
            sparsity_warmup=1.0,
            dead_F=dead_at(),
            generator=torch.Generator().manual_seed(0),
        )
        for sae in (plain, shuffled)
    ]
    assert not torch.allclose(found[0].reconstruction, found[1].reconstruction, atol=1e-3)
    torch.testing.assert_close(
        found[0].reconstruction, plain(x_BTD, valid=valid_BT), atol=1e-4, rtol=1e-4
    )
    assert found[1].features[~valid_BT].abs().sum() == 0
    assert torch.equal(plain.encode(x_BTD), shuffled.encode(x_BTD))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of n_heads"):
        make("tfa", n_heads=3)
    with pytest.raises(ValueError, match="at most d_sae"):
        make("tfa", k=65)
