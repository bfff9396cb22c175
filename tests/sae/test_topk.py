"""The TopK SAE against its definition, and its sparse training path against the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.config.sae import TopKConfig
from tcsae.products.cpu import CPU
from tcsae.sae.topk import TopKSAE

D_IN = 12


def random_sae(d_sae: int, k: int, seed: int = 0, shift: float = 0.0) -> TopKSAE:
    """`shift` lowers every pre-activation, so that some of the k largest are negative."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(TopKConfig(d_sae=d_sae, k=k), D_IN, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        sae.b_enc -= shift
    return sae


@pytest.mark.parametrize("shift", [0.0, 6.0])
def test_codes_are_the_k_largest_pre_activations_that_are_positive(shift: float) -> None:
    sae = random_sae(d_sae=20, k=5, shift=shift)
    x_ND = torch.randn(40, D_IN)
    pre_NF = ((x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc).tolist()
    for pre, found in zip(pre_NF, sae.encode(x_ND).tolist(), strict=True):
        largest = sorted(range(20), key=lambda j, pre=pre: -pre[j])[:5]
        wanted = [max(pre[j], 0.0) if j in largest else 0.0 for j in range(20)]
        assert found == pytest.approx(wanted, abs=1e-5)


def test_never_more_than_k_fire_and_fewer_where_pre_activations_are_negative() -> None:
    sae = random_sae(d_sae=20, k=5, shift=6.0)
    fired = (sae.encode(torch.randn(500, D_IN)) != 0).sum(-1)
    assert fired.max() <= 5 and fired.min() < 5


@pytest.mark.parametrize("k", [0, 21])
def test_a_k_that_does_not_fit_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="k"):
        TopKConfig(d_sae=20, k=k)


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 6),
    d_sae=st.integers(96, 130),
    tokens=st.integers(1, 20),
    shift=st.sampled_from([0.0, 8.0]),
)
@settings(max_examples=40, deadline=None)
def test_the_sparse_path_has_the_values_and_gradients_of_the_plain_loss(
    seed: int, k: int, d_sae: int, tokens: int, shift: float
) -> None:
    sae, plain = random_sae(d_sae, k, seed, shift), random_sae(d_sae, k, seed, shift)
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(2, tokens, D_IN, generator=generator)
    valid_BT = torch.rand(2, tokens, generator=generator) > 0.3
    valid_BT[0, 0] = True
    slope_BTF = torch.randn(2, tokens, d_sae, generator=generator)
    dead_F = torch.zeros(d_sae, dtype=torch.bool)
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F)
    (output.losses["reconstruction"] + (output.features * slope_BTF).sum()).backward()

    features = plain.encode(x_BTD)[valid_BT]
    squared = (plain.decode(features) - x_BTD[valid_BT]).square().sum(-1).mean()
    (squared + (features * slope_BTF[valid_BT]).sum()).backward()
    torch.testing.assert_close(output.features[valid_BT], features)
    torch.testing.assert_close(output.losses["reconstruction"], squared)
    for (name, ours), theirs in zip(sae.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_both_paths_train_to_the_same_gradients(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_BTD, valid_BT = torch.randn(8, 64, D_IN), torch.rand(8, 64) > 0.1
    dead_F = torch.zeros(128, dtype=torch.bool)
    sae = random_sae(d_sae=128, k=4)
    # Where the fourth and the fifth round alike in bfloat16, either may be chosen.
    top = ((x_BTD - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(5).values
    valid_BT &= top[..., 3] - top[..., 4] > 0.02 * top[..., 0]
    assert valid_BT.sum() > 100
    grads = []
    for ratio in (1, 10**9):
        monkeypatch.setattr(CPU, "sparse_from_ratio", ratio)
        sae = random_sae(d_sae=128, k=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F)
        output.losses["reconstruction"].backward()
        assert output.features.dtype == (torch.bfloat16 if autocast else torch.float32)
        grads.append(torch.cat([p.grad.flatten() for p in sae.parameters()]))
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < (0.02 if autocast else 1e-5)


def test_the_sparse_path_is_taken_only_where_k_is_small() -> None:
    x_BTD, valid_BT = torch.randn(1, 4, D_IN), torch.ones(1, 4, dtype=torch.bool)
    dead_F = torch.zeros(128, dtype=torch.bool)
    for k in (2, 8, 9, 100):
        output = random_sae(128, k).training_forward(
            x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F
        )
        assert (output.codes.sparse is not None) == (k <= 8)


def test_the_same_batch_gives_the_same_bits_twice() -> None:
    x_BTD, valid_BT = torch.randn(4, 64, D_IN), torch.rand(4, 64) > 0.1
    dead_F = torch.zeros(128, dtype=torch.bool)
    runs = []
    for _ in range(2):
        sae = random_sae(128, 4)
        output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F)
        output.losses["reconstruction"].backward()
        runs.append([p.grad for p in sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
