"""Triton's kernels against float64 in PyTorch, for the interpreter on a CPU and for a card alike.

Every function takes a device and sizes, and asserts; `error` is ||found - wanted|| / ||wanted||.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tcsae.config.sae import config_class
from tcsae.consistency import Consistency
from tcsae.products import PLAIN
from tcsae.products.plain import Adam, Plain
from tcsae.tensors.sparse import SparseCodes

# With a small one the first step of a gradient that is nothing but rounding has size lr.
EPS = 1e-3


def sparse_codes(
    products: Plain, n: int, d_sae: int, k: int, device: str, seed: int = 0
) -> SparseCodes:
    """One feature is on nearly everywhere, one nowhere; some entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    chance_NF = torch.rand(n, d_sae, generator=generator)
    chance_NF[:, 3] += torch.rand(n, generator=generator) < 0.9
    chance_NF[:, 5] = -1
    feature_M = chance_NF.topk(k, 1).indices.flatten().to(device)
    token_M = torch.arange(n, device=device).repeat_interleave(k)
    values_M = (torch.rand(n * k, generator=generator) - 0.1).relu().to(device)
    return SparseCodes.of(values_M, feature_M, token_M, (n, d_sae), torch.float32)


def error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def check_rows(
    products: Plain, device: str, *, n: int, d_sae: int, k: int, width: int, dtype: torch.dtype
) -> None:
    """decode, at_entries, by_feature, sums."""
    codes = sparse_codes(products, n, d_sae, k, device)
    generator = torch.Generator().manual_seed(1)
    W_FD = torch.randn(d_sae, width, generator=generator).to(device, dtype)
    e_ND = torch.randn(n, width, generator=generator).to(device, dtype)
    dense_NF = codes.values_M.new_zeros(n, d_sae, dtype=torch.float64)
    dense_NF[codes.token_M, codes.feature_M] = codes.values_M.double()
    at = (codes.token_M, codes.feature_M)
    for found, wanted in (
        (products.decode(codes, W_FD), dense_NF @ W_FD.double()),
        (products.at_entries(codes, e_ND, W_FD), (e_ND.double() @ W_FD.double().T)[at]),
        (products.by_feature(codes, codes.values_M, e_ND), dense_NF.T @ e_ND.double()),
        (products.sums(codes, codes.values_M), dense_NF.sum(0)),
    ):
        assert found.dtype == torch.float32
        assert error(found, wanted) < 2e-6


def check_error(products: Plain, device: str, *, n: int, width: int) -> None:
    """The reconstruction's error, the sum of its squares, and their gradients."""
    generator = torch.Generator().manual_seed(7)
    decoded_ND, x_ND = torch.randn(2, n, width, generator=generator).to(device)
    bias_D = torch.randn(width, generator=generator).to(device)
    found = []
    for of, dtype in ((products, torch.float32), (Plain(), torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (decoded_ND, bias_D)]
        squared, error_ND = of.squared_error(*leaves, x_ND.to(dtype))
        (3 * squared).backward()
        found.append([squared.detach(), error_ND.detach(), *(leaf.grad for leaf in leaves)])
    for ours, wanted in zip(*found, strict=True):
        assert error(ours, wanted) < 1e-6


def check_penalty(
    products: Plain, device: str, *, contexts: int, positions: int, d_sae: int, k: int
) -> None:
    """The primitives of the temporal loss, of values in the order of features."""
    n = contexts * positions
    codes = sparse_codes(products, n, d_sae, k, device)
    generator = torch.Generator().manual_seed(2)
    f_M = codes.values_M[codes.order_M]
    factor_M = torch.randn(len(f_M), generator=generator).to(device)
    position_M = codes.sorted_token_M % positions
    plain = Plain()
    for one in (1, contexts):
        within = torch.randn(one, positions, positions, generator=generator).to(device)
        within = within + within.mT
        wanted = plain.smooth(codes._replace(dtype=torch.float64), f_M.double(), within.double())
        assert error(products.smooth(codes, f_M, within), wanted) < 2e-6
    for factor in (None, factor_M):
        wanted = torch.zeros(d_sae, dtype=torch.float64, device=device)
        times = 1 if factor is None else factor.double()
        wanted.index_add_(0, codes.sorted_feature_M, f_M.double() * times)
        assert error(products.sorted_sums(codes, f_M, factor), wanted) < 2e-6
    wanted = torch.zeros(d_sae, positions, dtype=torch.float64, device=device)
    wanted.index_put_((codes.sorted_feature_M.long(), position_M), f_M.double(), accumulate=True)
    assert error(products.position_sums(codes, f_M, position_M, positions), wanted) < 2e-6


def check_selection(
    products: Plain, device: str, *, n: int, d_sae: int, k: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    pre_NF = torch.randn(n, d_sae, generator=generator)
    pre_NF[0] = 0.5 * (torch.rand(d_sae, generator=generator) < 0.5)  # ties
    pre_NF[1] = -pre_NF[1].abs()
    pre_NF = pre_NF.to(device, dtype)
    values_NK, index_NK = products.top_k(pre_NF, k)
    assert torch.equal(
        values_NK.float().sort(1).values, pre_NF.topk(k, 1).values.float().sort(1).values
    )
    assert torch.equal(pre_NF.gather(1, index_NK).float(), values_NK.float())
    assert (index_NK.sort(1).values.diff(dim=1) > 0).all()
    valid_N1 = torch.rand(n, 1, generator=generator).to(device) < 0.9
    pre_NF = pre_NF.masked_fill(~valid_N1, 0)
    values_M, feature_M, token_M = products.largest_of_batch(pre_NF, valid_N1, k)
    assert (token_M.diff() >= 0).all() and len(values_M) <= n * k
    on_M = values_M > 0
    assert torch.equal(values_M[on_M], pre_NF[token_M, feature_M][on_M])
    n_kept = min(int(k * valid_N1.sum()), int((pre_NF > 0).sum()))
    wanted = pre_NF.flatten().float().topk(n_kept).values
    found = values_M[on_M].float().sort(descending=True).values
    # Of those that tie with the smallest more may be kept, as long as there is room.
    assert torch.equal(found[:n_kept], wanted) and (found[n_kept:] == wanted[-1]).all()


def check_update(products: Plain, device: str, *, d_sae: int, width: int) -> None:
    """Three updates against Plain's in float64, and those against torch's own Adam."""
    generator = torch.Generator().manual_seed(6)
    W_FD = torch.nn.functional.normalize(torch.randn(d_sae, width, generator=generator), dim=1)
    weights = [W_FD.to(device), W_FD.to(device).double(), W_FD.to(device).double()]
    moments = [[torch.zeros_like(W) for _ in range(2)] for W in weights]
    theirs = weights[2].requires_grad_()
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.99), eps=EPS)
    for step in range(1, 4):
        grad_FD = torch.randn(d_sae, width, generator=generator).to(device)
        divisor = torch.tensor(1.5, device=device)
        for of, W, (mean, square) in zip((products, Plain()), weights, moments, strict=False):
            grad = grad_FD.to(W.dtype)
            along_F, squared_F = of.row_gradient(W, grad)
            rest = grad - along_F[:, None] * W
            assert error(squared_F, rest.square().sum(1)) < 1e-5
            now = torch.tensor(float(step), device=device)
            of.update_rows(
                W, grad, along_F, Adam(mean, square, now, 1e-2, (0.9, 0.99), EPS, divisor)
            )
        with torch.no_grad():
            grad = grad_FD.double()
            theirs.grad = (grad - (grad * theirs).sum(1, True) * theirs) / divisor
            adam.step()
            theirs.div_(theirs.norm(dim=1, keepdim=True))
    assert error(weights[1], theirs.detach()) < 1e-6
    assert error(weights[0], weights[1]) < 1e-5
    assert error(moments[0][1], moments[1][1]) < 1e-5


def penalties() -> Iterator[tuple[str, Any, bool, float]]:
    for form in ("scale_free", "slow", "window_variance"):
        for window in (4, "document"):
            for shuffle in (False, True):
                yield form, window, shuffle, 1.0
        yield form, 4, False, 0.0


def check_whole_penalty(
    products: Plain, device: str, *, contexts: int, positions: int, d_sae: int, k: int
) -> None:
    """Value and gradient of every form, with its position term and without, against autograd's
    dense float64."""
    from tcsae.products import BY_DEVICE

    codes = sparse_codes(products, contexts * positions, d_sae, k, device)
    generator = torch.Generator().manual_seed(4)
    valid = (torch.rand(contexts, positions, generator=generator) < 0.95).to(device)
    segments = (torch.rand(contexts, positions, generator=generator) < 0.1).cumsum(1).to(device)
    values_M = codes.values_M * valid.flatten()[codes.token_M]
    for form, window, shuffle, beta in penalties():
        loss = Consistency(form, window, shuffle_positions=shuffle, position_weight=beta)
        found = []
        for wide in (False, True):
            v_M = values_M.double().requires_grad_() if wide else values_M.clone().requires_grad_()
            of = codes._replace(values_M=v_M, dtype=v_M.dtype)
            given = of.dense().view(contexts, positions, d_sae) if wide else of
            with _by(BY_DEVICE, device, PLAIN if wide else products):
                value = loss(
                    given, segments=segments, valid=valid,
                    generator=torch.Generator().manual_seed(5),
                )  # fmt: skip
                value.backward()
            found += [value.detach(), v_M.grad]
        assert error(found[0], found[2]) < 1e-5, (form, window, shuffle, beta)
        assert error(found[1], found[3]) < 1e-4, (form, window, shuffle, beta)


def check_losses(
    products: Plain, device: str, name: str, *, contexts: int, positions: int, d_sae: int, k: int
) -> None:
    """All losses of a training pass, the temporal one on the first group where there are groups,
    and all gradients, against those of dense codes."""
    from tcsae.products import BY_DEVICE
    from tcsae.sae import sae_class
    from tcsae.training.metrics import features_of

    architecture, _, selection = name.partition(", ")
    options = {"selection": selection} if selection else {}
    cfg = config_class(architecture)(d_sae=d_sae, k=k, **options)
    generator = torch.Generator().manual_seed(8)
    x_BTD = torch.randn(contexts, positions, 24, generator=generator).to(device)
    valid = (torch.rand(contexts, positions, generator=generator) < 0.9).to(device)
    segments = torch.zeros_like(valid, dtype=torch.int32)
    first = cfg.group_sizes[0] if len(cfg.group_sizes) > 1 else None
    loss = Consistency("scale_free", 4, position_weight=1.0, n_features=first)
    found = []
    for of in (products, PLAIN):
        sae = sae_class(architecture)(cfg, 24, torch.Generator().manual_seed(0)).to(device)
        drawn = torch.Generator().manual_seed(9)
        with _by(BY_DEVICE, device, of):
            output = sae.training_forward(
                x_BTD, valid, sparsity_warmup=1.0, dead_F=None, generator=drawn
            )
            penalty = loss(features_of(output), segments=segments, valid=valid)
            total = sum(output.losses.values()) + penalty
            total.backward()
        assert (output.codes.pre_NF is None) == (of is products)
        grads = [p.grad for p in sae.parameters() if p.grad is not None]
        found.append([penalty.detach(), *(v.detach() for v in output.losses.values()), *grads])
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) < 1e-4


class _by:
    def __init__(self, of: dict[str, Plain], device: str, products: Plain) -> None:
        self.of, self.kind, self.products = of, torch.device(device).type, products

    def __enter__(self) -> None:
        self.before = copy.copy(self.of)
        self.of[self.kind] = self.products

    def __exit__(self, *_: object) -> None:
        self.of.clear()
        self.of.update(self.before)
