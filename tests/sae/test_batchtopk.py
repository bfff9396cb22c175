"""The BatchTopK SAE against its definition, and its threshold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.config.sae import BatchTopKConfig
from tcsae.products import BY_DEVICE, PLAIN
from tcsae.products.cpu import CPU
from tcsae.sae.batchtopk import BatchTopKSAE
from tcsae.sae.codes import Codes, Places

D_IN, D_SAE = 8, 40


def random_sae(seed: int = 0, **options: float) -> BatchTopKSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = BatchTopKSAE(BatchTopKConfig(**{"d_sae": D_SAE, "k": 3, **options}), D_IN, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


def train_pass(sae: BatchTopKSAE, x_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    dead_F = torch.zeros(D_SAE, dtype=torch.bool)
    output = sae.training_forward(x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=dead_F)
    sae.after_step(output.codes, progress=0.0)
    return output.features


@given(seed=st.integers(0, 10_000), k=st.integers(1, 40), shift=st.sampled_from([0.0, 2.0, 9.0]))
@settings(max_examples=60, deadline=None)
def test_the_largest_k_times_n_of_the_batch_are_kept_if_they_are_positive(
    seed: int, k: int, shift: float
) -> None:
    sae = random_sae(seed, k=k)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_enc -= shift
    # Whatever the threshold so far, it only says where to look first.
    sae.threshold.fill_(float(torch.rand((), generator=generator)) * 4)
    x_BTD = torch.randn(2, 6, D_IN, generator=generator)
    valid_BT = torch.rand(2, 6, generator=generator) > 0.3
    valid_BT[0, 0] = True
    features = train_pass(sae, x_BTD, valid_BT)
    pre = [
        (((x - sae.b_dec) @ sae.W_enc[:, j] + sae.b_enc[j]).item(), token, j)
        for token, x in enumerate(x_BTD[valid_BT])
        for j in range(D_SAE)
    ]
    kept = {(t, j): p for p, t, j in sorted(pre, reverse=True)[: k * int(valid_BT.sum())] if p > 0}
    found = {(int(t), int(j)) for t, j in features[valid_BT].nonzero()}
    assert found == kept.keys()
    for (token, j), value in kept.items():
        assert features[valid_BT][token, j].item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 40),
    shift=st.sampled_from([0.0, 2.0, 9.0, 90.0]),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_without_a_look_at_the_values_the_same_are_kept_and_counted(
    dtype: torch.dtype, seed: int, k: int, shift: float, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = []
    noise_NF = torch.randn(12, D_SAE, generator=generator)
    pre_NF = (3 * noise_NF - shift).round(decimals=1).to(dtype)  # many are equal
    valid_BT = torch.rand(2, 6, generator=generator) < share
    pre_NF *= valid_BT.view(-1, 1)
    for products in (CPU(), PLAIN):
        sae = random_sae(seed, k=k)
        sae.threshold.fill_(2.0)
        sae.n_batches += seed % 3
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(BY_DEVICE, "cpu", products)
            features_NF, least = sae.batch_activation(pre_NF, Places.of(valid_BT))
        sae.after_step(Codes(features_NF, features_NF, least=least), progress=0.0)
        found.append((features_NF, sae.threshold, sae.n_batches))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert (found[1][0] > 0).sum() >= min(k * int(valid_BT.sum()), int((pre_NF > 0).sum()))


def test_a_token_may_take_more_than_k_and_another_fewer() -> None:
    x_BTD = torch.randn(4, 8, D_IN) * torch.rand(4, 8, 1) * 3
    on = (train_pass(random_sae(), x_BTD, torch.ones(4, 8).bool()) > 0).sum(-1)
    assert on.float().mean() == 3 and on.min() < 3 < on.max()


def test_the_threshold_is_the_mean_of_the_least_kept_activations_then_a_moving_one() -> None:
    sae, least = random_sae(threshold_rate=0.25), []
    wanted = 0.0
    for seed in range(7):
        generator = torch.Generator().manual_seed(seed)
        x_BTD = torch.randn(4, 8, D_IN, generator=generator)
        features = train_pass(sae, x_BTD, torch.ones(4, 8).bool())
        least.append(features[features > 0].min().item())
        wanted = sum(least) / len(least) if seed < 4 else 0.75 * wanted + 0.25 * least[-1]
        assert sae.threshold.tolist() == pytest.approx([wanted] * D_SAE, rel=1e-5)


def test_a_batch_in_which_nothing_can_fire_leaves_the_threshold_alone() -> None:
    sae = random_sae()
    x_BTD = torch.randn(2, 4, D_IN)
    train_pass(sae, x_BTD, torch.ones(2, 4).bool())
    before = sae.threshold.clone()
    assert train_pass(sae, x_BTD, torch.zeros(2, 4).bool()).abs().sum() == 0
    with torch.no_grad():
        sae.b_enc -= 1e3
    assert train_pass(sae, x_BTD, torch.ones(2, 4).bool()).abs().sum() == 0
    assert torch.equal(sae.threshold, before) and before[0] > 0 and sae.n_batches == 1


def test_in_use_about_k_features_fire_and_no_token_depends_on_another() -> None:
    sae = random_sae()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        train_pass(sae, torch.randn(8, 32, D_IN, generator=generator), torch.ones(8, 32).bool())
    x_ND = torch.randn(4000, D_IN)
    codes = sae.encode(x_ND)
    assert (codes > 0).sum(-1).float().mean() == pytest.approx(3, rel=0.05)
    torch.testing.assert_close(codes[7], sae.encode(x_ND[7]))
    on = codes > 0
    pre = (x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert torch.equal(on, pre > sae.threshold) and torch.equal(codes[on], pre[on])


def test_an_untrained_one_is_a_relu() -> None:
    sae = random_sae()
    x_ND = torch.randn(20, D_IN)
    pre = (x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(sae.encode(x_ND), pre.relu())


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 41}, {"threshold_rate": 0.0}])
def test_what_does_not_fit_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        BatchTopKConfig(**{"d_sae": D_SAE, **options})
