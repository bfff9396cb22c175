"""The fast training pass against the plain one: selection, codes, every gradient."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saes import VARIANTS, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcsae.consistency import Consistency
from tcsae.products import PLAIN
from tcsae.products.cpu import CPU
from tcsae.products.plain import Plain
from tcsae.sae import fast
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import Places, TrainingOutput
from tcsae.sae.fast import DenseCodes, SparseDecode
from tcsae.sae.standard import StandardSAE
from tcsae.tensors.sparse import SparseCodes, in_group_order
from tcsae.tensors.sums import RowNorms, column_sums, position_sums

GROUPED = ["matryoshka", "matryoshka, token", "tsae", "tsae, inner product"]
DENSE_CODES = ["standard", "persistent"]
FAST = ["topk", "batchtopk", *GROUPED, *DENSE_CODES]
D_SAE = 136


def use_plain_pass(monkeypatch: pytest.MonkeyPatch, sae: SparseAutoencoder) -> None:
    """From here on `sae` trains through autograd alone."""
    monkeypatch.setattr(CPU, "sparse_from_ratio", 10**9)
    if isinstance(sae, StandardSAE):
        plain = SparseAutoencoder.training_codes
        monkeypatch.setattr(type(sae), "training_codes", plain)


# ------------------------------------------------------------------------------ selection


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    d_sae=st.integers(6, 200),
    k=st.integers(1, 6),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_k_largest_of_each_token_are_found(
    seed: int, d_sae: int, k: int, tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few levels: many ties, in every dtype.
    pre_NF = torch.randint(-40, 40, (tokens, d_sae), generator=generator).to(dtype) / 4
    values_NK, index_NK = CPU().top_k(pre_NF, k)
    assert torch.equal(values_NK, pre_NF.gather(1, index_NK))
    assert all(len(set(row)) == k for row in index_NK.tolist())
    assert torch.equal(values_NK.sort(1).values, pre_NF.sort(1).values[:, -k:])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    d_sae=st.integers(1, 60),
    k=st.integers(1, 60),
    tokens=st.integers(1, 9),
    shift=st.sampled_from([0, 30, 60]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    products=st.sampled_from([PLAIN, CPU()]),
)
def test_the_largest_of_a_batch_are_found_with_all_that_tie(
    seed: int, d_sae: int, k: int, tokens: int, shift: int, dtype: torch.dtype, products: Plain
) -> None:
    k = min(k, d_sae)
    generator = torch.Generator().manual_seed(seed)
    pre_NF = (torch.randint(-40, 40, (tokens, d_sae), generator=generator) - shift).to(dtype)
    valid_N1 = torch.rand(tokens, 1, generator=generator) > 0.3
    values_M, feature_M, token_M = products.largest_of_batch(pre_NF, valid_N1, k)
    n = k * int(valid_N1.sum())
    positive = sorted((v for v in pre_NF[valid_N1[:, 0]].flatten().tolist() if v > 0), reverse=True)
    least = positive[min(n, len(positive)) - 1] if positive and n else float("inf")
    wanted = ((pre_NF >= least) & (pre_NF > 0) & valid_N1).nonzero().tolist()
    assert sorted(zip(token_M.tolist(), feature_M.tolist(), strict=True)) == [
        (t, j) for t, j in wanted
    ]
    assert torch.equal(values_M, pre_NF[token_M, feature_M])
    assert token_M.tolist() == sorted(token_M.tolist())


# ------------------------------------------------------------------------------ gradients


def test_the_gradients_of_dense_codes_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x_ND, W_enc, bias_F, W_dec = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=shape != (7, 4))
        for shape in ((7, 4), (4, 9), (9,), (9, 4))
    )
    valid_N1 = torch.tensor([[True], [False], [True], [True], [True], [True], [False]])
    assert torch.autograd.gradcheck(
        lambda *given: DenseCodes.apply(x_ND, *given, valid_N1), (W_enc, bias_F, W_dec)
    )


def test_an_output_of_dense_codes_may_go_unused() -> None:
    torch.manual_seed(0)
    x_ND, valid_N1 = torch.randn(6, 4), torch.ones(6, 1, dtype=torch.bool)
    W_enc, W_dec = torch.randn(4, 9, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    bias_F = torch.randn(9, requires_grad=True)
    for used in range(3):
        ours = DenseCodes.apply(x_ND, W_enc, bias_F, W_dec, valid_N1)[used].square().sum()
        f_NF = (x_ND @ W_enc + bias_F).relu()
        theirs = [f_NF, f_NF @ W_dec, f_NF.sum(0)][used].square().sum()
        for found, wanted in zip(
            torch.autograd.grad(ours, (W_enc, bias_F)),
            torch.autograd.grad(theirs, (W_enc, bias_F)),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def random_codes(dtype: torch.dtype) -> SparseCodes:
    """Tokens with no entry, one, or several; a feature without any."""
    token_M = torch.tensor([0, 0, 0, 2, 2, 3, 5])
    feature_M = torch.tensor([4, 1, 0, 1, 3, 4, 0])
    values_M = torch.rand(7, dtype=dtype) + 0.5
    return SparseCodes.of(values_M.requires_grad_(), feature_M, token_M, (6, 5), dtype)


def test_sparse_codes_are_decoded_as_dense_ones_with_the_same_gradients() -> None:
    torch.manual_seed(0)
    codes, W_dec = random_codes(torch.float32), torch.randn(5, 3, requires_grad=True)
    ours, theirs = SparseDecode.apply(codes.values_M, W_dec, codes), codes.dense() @ W_dec
    torch.testing.assert_close(ours, theirs)
    slope_ND = torch.randn(6, 3)
    for found, wanted in zip(
        torch.autograd.grad(ours, (codes.values_M, W_dec), slope_ND),
        torch.autograd.grad(theirs, (codes.values_M, W_dec), slope_ND),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("products", [PLAIN, CPU()])
@pytest.mark.parametrize("n_features", [1, 2, 4, 5])
def test_the_first_features_are_those_of_the_dense_codes(n_features: int, products: Plain) -> None:
    torch.manual_seed(0)
    codes = random_codes(torch.float64)
    wanted = codes.dense()[:, :n_features]
    first = products.first(codes, n_features)
    found = [codes.dense(n_features), first.dense()[:, :n_features]]
    assert first.dense()[:, n_features:].abs().sum() == 0
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    (slope_M,) = torch.autograd.grad((weights * wanted).sum(), codes.values_M, retain_graph=True)
    for dense_NG in found:
        assert torch.equal(dense_NG, wanted)
        (grad_M,) = torch.autograd.grad((weights * dense_NG).sum(), codes.values_M)
        assert torch.equal(grad_M, slope_M)
    # As made anew of the entries that are left.
    kept_M = first.values_M.detach() > 0
    again = SparseCodes.of(
        first.values_M[kept_M], first.feature_M[kept_M], first.token_M[kept_M],
        (6, first.d_sae), torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(products.sums(first, first.values_M), again.sums())
    if isinstance(products, CPU):
        assert all(torch.equal(a, b) for a, b in zip(first[1:-1], again[1:-1], strict=True))


@pytest.mark.parametrize("sizes", [[2, 3], [1, 1, 3], [4, 0, 1]])
def test_groups_of_features_are_decoded_one_after_another_with_the_same_gradients(
    sizes: list[int],
) -> None:
    torch.manual_seed(0)
    codes, W_dec = random_codes(torch.float64), torch.randn(5, 3, dtype=torch.float64)
    W_dec.requires_grad_()
    order_M = in_group_order(codes.feature_M, codes.token_M, sizes)
    values_M = codes.values_M.detach()[order_M].requires_grad_()
    codes = SparseCodes.of(
        values_M, codes.feature_M[order_M], codes.token_M[order_M], (6, 5), torch.float64
    )
    ours = SparseDecode.apply(values_M, W_dec, codes.in_groups(sizes), len(sizes))
    ends = list(accumulate(sizes))
    theirs = [codes.dense()[:, :end] @ W_dec[:end] for end in ends]
    weights = torch.randn(len(sizes), 6, 3, dtype=torch.float64)
    grads = []
    for decoded in (ours, theirs):
        torch.testing.assert_close(torch.stack(list(decoded)), torch.stack(theirs))
        total = sum((w * d).sum() for w, d in zip(weights, decoded, strict=True))
        grads.append(torch.autograd.grad(total, (values_M, W_dec)))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_sums_and_firings_of_sparse_codes_are_those_of_dense_ones() -> None:
    codes = random_codes(torch.float64)
    dense_NF = codes.dense()
    torch.testing.assert_close(codes.sums(), dense_NF.sum(0))
    assert codes.firings().tolist() == (dense_NF > 0).sum(0).tolist()
    assert codes.firings()[2] == 0


@pytest.mark.parametrize("n", [1, 127, 128, 300])
def test_column_sums_and_row_norms_are_the_plain_ones(n: int) -> None:
    rows = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(column_sums(rows), rows.sum(0))
    torch.testing.assert_close(RowNorms.apply(rows), rows.norm(dim=1))
    assert torch.autograd.gradcheck(RowNorms.apply, (rows[:4].detach().requires_grad_(),))
    rounded = column_sums(rows.detach().bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, rows.detach().float().sum(0), rtol=0.02, atol=0.3)


def test_sums_by_position_are_the_plain_ones_in_place_and_moved() -> None:
    generator = torch.Generator().manual_seed(0)
    f_BTF = torch.randn(4, 6, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(position_sums(f_BTF), f_BTF.sum(0))
    order_BT = torch.rand(4, 6, generator=generator).argsort(1)
    moved_BTF = f_BTF.gather(1, order_BT[..., None].expand_as(f_BTF))
    torch.testing.assert_close(position_sums(f_BTF, order_BT.argsort(1)), moved_BTF.sum(0))
    rounded = position_sums(f_BTF.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, f_BTF.float().sum(0), rtol=0.02, atol=0.05)


def test_a_row_of_zeros_has_norm_zero_and_no_gradient() -> None:
    rows = torch.zeros(2, 3, requires_grad=True)
    RowNorms.apply(rows).sum().backward()
    assert rows.grad is not None and rows.grad.abs().sum() == 0


# ------------------------------------------------------------------------------ whole passes


def given_to(sae: SparseAutoencoder, contexts: int = 6) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch, with tokens that do not count."""
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(contexts, 16, sae.d_in, generator=generator)
    valid_BT = torch.rand(contexts, 16, generator=generator) > 0.1
    x_BTD[~valid_BT] = torch.nan
    segments_BT = (torch.rand(contexts, 16, generator=generator) < 0.1).cumsum(1)
    return x_BTD, {"valid": valid_BT, "segments": segments_BT}


def temporal(form: str, output: TrainingOutput, masks: dict[str, Tensor], **options: Any) -> Tensor:
    codes = output.codes
    beta = 1.0 if form == "scale_free" else 0.0
    penalty = Consistency(form, 4, d_sae=D_SAE, position_weight=beta, **options)
    features = output.features if codes.sparse is None else codes.sparse
    return penalty(features, **masks, generator=torch.Generator().manual_seed(2))


def one_pass(
    name: str, autocast: bool, form: str, contexts: int = 6
) -> tuple[TrainingOutput, dict[str, Tensor]]:
    """Output and gradients of all losses, the temporal one among them."""
    sae = make(name, seed=0, d_sae=D_SAE)
    x_BTD, masks = given_to(sae, contexts)
    dead_F = torch.zeros(D_SAE, dtype=torch.bool)
    dead_F[:3] = True
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = sae.training_forward(
            x_BTD, masks["valid"], sparsity_warmup=1.0, dead_F=dead_F,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
    penalty = temporal(form, output, masks)
    (sum(output.losses.values()) + 0.5 * penalty).backward()
    output.losses["penalty"] = penalty
    return output, {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"shuffle_positions": True}, {"n_features": 40}])
@pytest.mark.parametrize("form", ["scale_free", "window_variance", "slow"])
def test_the_gradient_to_the_features_is_all_of_the_penaltys(
    form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For autograd.grad, for a hook, and beside another loss on the same features."""
    found = []
    for is_fast in (True, False):
        sae = make("standard", seed=0, d_sae=D_SAE)
        x_BTD, masks = given_to(sae)
        if not is_fast:
            use_plain_pass(monkeypatch, sae)
        output = sae.training_forward(x_BTD, masks["valid"], sparsity_warmup=1.0, dead_F=None)
        features_NF, hooked = output.codes.features_NF, []
        assert (output.codes.pre_NF is None) == is_fast
        features_NF.register_hook(hooked.append)
        penalty = temporal(form, output, masks, **options)
        (slope_NF,) = torch.autograd.grad(penalty, features_NF, retain_graph=True)
        on_NF = features_NF > 0
        assert (slope_NF * on_NF).count_nonzero() > 100
        (by_weights,) = torch.autograd.grad(penalty, sae.b_enc, retain_graph=True)
        torch.testing.assert_close((slope_NF * on_NF).sum(0), by_weights, rtol=1e-3, atol=1e-5)
        (penalty + features_NF.square().sum()).backward()
        torch.testing.assert_close(hooked[-1], slope_NF + 2 * features_NF)
        found.append(slope_NF)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["none", "scale_free", "window_variance", "slow", "batch_history"])
@pytest.mark.parametrize("name", FAST)
def test_the_fast_pass_gives_what_the_plain_one_gives(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, our_grads = one_pass(name, False, form)
    use_plain_pass(monkeypatch, make(name))
    theirs, their_grads = one_pass(name, False, form)
    assert (ours.codes.sparse is None) == (name in DENSE_CODES) and theirs.codes.sparse is None
    assert ours.codes.pre_NF is None
    assert ours.codes.sums_F is not None or name != "standard"
    assert theirs.codes.sums_F is None
    if theirs.codes.least is not None:
        assert torch.equal(ours.codes.least, theirs.codes.least)
    torch.testing.assert_close(ours.features, theirs.features)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction)
    assert ours.codes.n_active() == theirs.codes.n_active()
    assert torch.equal(ours.codes.fired_F(), theirs.codes.fired_F())
    for name_, value in theirs.losses.items():
        torch.testing.assert_close(ours.losses[name_], value, rtol=1e-4, atol=1e-5)
    assert our_grads.keys() == their_grads.keys()
    for name_, gradient in their_grads.items():
        torch.testing.assert_close(
            our_grads[name_], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name_: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", FAST)
def test_in_bfloat16_it_differs_by_rounding_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exact = one_pass(name, False, "scale_free", contexts=40)
    ours, our_grads = one_pass(name, True, "scale_free", contexts=40)
    use_plain_pass(monkeypatch, make(name))
    theirs, their_grads = one_pass(name, True, "scale_free", contexts=40)
    dtype = torch.float32 if name == "persistent" else torch.bfloat16  # a memory is not rounded
    assert ours.features.dtype == theirs.features.dtype == dtype
    for name_, gradient in exact.items():
        our_error, their_error = (
            ((grads[name_] - gradient).norm() / gradient.norm()).item()
            for grads in (our_grads, their_grads)
        )
        assert our_error < max(1.3 * their_error, 0.005), name_


class _Counted(TorchDispatchMode):
    """Counts the tensors of `numel` elements that operations make, views not."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = (*args, *(kwargs or {}).values())
        given = {t.untyped_storage().data_ptr() for t in taken if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, tuple) else (result,):
            is_big = isinstance(tensor, Tensor) and tensor.numel() == self.numel
            if is_big and tensor.untyped_storage().data_ptr() not in given:
                self.made.append(str(func))
        return result


@pytest.mark.parametrize(
    ("name", "n"),
    [("topk", 1), ("batchtopk", 1), ("matryoshka", 1), ("tsae", 1), ("standard", 4)],
)
def test_few_dense_codes_are_made(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse: the pre-activations. Dense: f, Q f, the penalty's gradient to f, g; without the third
    autograd would not know it. Pieces that stay in the cache do not count."""
    monkeypatch.setattr(fast, "ROWS", 64)
    with _Counted(40 * 16 * D_SAE) as counted:
        one_pass(name, True, "scale_free", contexts=40)
    assert len(counted.made) == n, counted.made


@pytest.mark.parametrize("options", [{}, {"n_features": 40}])
@pytest.mark.parametrize("form", ["scale_free", "slow", "batch_history"])
@pytest.mark.parametrize("name", GROUPED)
def test_a_step_with_the_loss_on_some_features_has_the_gradients_of_the_plain_pass(
    name: str, form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64."""
    found = []
    for is_sparse in (True, False):
        sae = make(name, seed=0, d_sae=D_SAE).double()
        x_BTD, masks = given_to(sae)
        if not is_sparse:
            use_plain_pass(monkeypatch, sae)
        centred_ND = torch.where(masks["valid"][..., None], x_BTD, 0).double().flatten(0, 1)
        codes = sae.training_codes(centred_ND, Places.of(masks["valid"], masks["segments"]))
        assert (codes.sparse is not None) == is_sparse
        output = TrainingOutput(codes, x_BTD.shape, sae.b_dec.detach(), {})
        loss = temporal(form, output, masks, **options)
        for n, decoded_ND in enumerate([*codes.extra, codes.decoded_ND]):
            loss = loss + (n + 1) * (decoded_ND.double() - centred_ND).square().mean()
        loss.backward()
        grads = [sae.W_enc.grad, sae.b_enc.grad, sae.W_dec.grad, sae.b_dec.grad]
        assert all(grad is not None and grad.dtype == torch.float64 for grad in grads)
        found.append([loss.detach(), *grads])
    for ours, theirs in zip(*found, strict=True):
        # The plain pass takes what the inner dictionaries decode in float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_every_architecture_with_a_fast_pass_is_among_the_variants() -> None:
    assert set(FAST) <= set(VARIANTS)
