"""The fast training pass: codes, their decoding and all gradients, written out.

Same numbers as the plain pass (`SparseAutoencoder.training_codes`; tests hold them together), with
fewer and smaller passes over memory. c = x - b_dec, zero at tokens that do not count; W, V the
encoder's and decoder's weights, b the encoder's bias, m the mask of the tokens that count.

Dense codes (`DenseCodes`), f = m relu(c W + b), decoded = f V, sums = sum over tokens of f.
With e, g_f, g_s the loss's gradients to the outputs,

    g = (f > 0) (e V^T + g_s + g_f)     dV = f^T e     dW = (g^T c)^T     db = sum of g

are five products of 2 N D F in all. Whatever is linear in f summed over tokens (L1) comes in
through g_s, one row that the product adds as its bias: no [N, F] tensor is made for it. The product
adds g_f, the temporal loss's, on its way too. The tokens that do not count need no mask: their f is
zero.

Sparse codes (`SparseEncode`, `SparseDecode`): only c W + b is dense. With M entries (token n,
feature j, value f), all that follows costs M D instead of N F D:

    decoded[n] = sum over the entries of n of f V[j]      (rows of V, summed by token)
    df = <e[n], V[j]>                                     (a product sampled at the entries)
    dV[j] = sum over the entries of j of f e[n]           (rows of e, summed by feature)
    dW[:, j] = sum over the entries of j of df c[n]       (rows of c, summed by feature)

Selection looks at the maxima of groups of GROUP features first. The k largest entries of a token
lie in the k groups with the largest maxima, for each of those groups has an entry at least as
large as any entry of another group; likewise the n largest of a batch. So what is sorted out is a
GROUPth of the codes, then GROUP entries of each chosen group. NumPy's partition does it with vector
instructions where the processor has them.

On another device than the CPU the dense pass serves every architecture (not measured), and nothing
in a step depends on a value the host would have to wait for (`values_at_hand`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, pad

from tcsae.sae.codes import Codes
from tcsae.tensors.sparse import SparseCodes
from tcsae.tensors.sums import column_sums

Selection = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Pre-activations [N, F] -> (values, features, tokens) of the chosen, in the order of tokens."""
GROUP = 8
ROWS = 1024
"""Tokens whose code gradients are masked and summed while they are in a processor's cache."""
# Sparse products cost ~k, dense ones ~d_sae; on a CPU they meet near d_sae / k = 16 in bfloat16
# (near 4 in float32).
SPARSE_FROM_RATIO = 16


def values_at_hand(device: torch.device) -> bool:
    """Whether the host can read a tensor, or make one as long as its values say, for nothing.

    On another device it would have to wait until all that is queued is done.
    """
    return device.type == "cpu"


def is_sparse(k: int, d_sae: int, device: torch.device) -> bool:
    """Whether the sparse pass is faster than the dense one for this k."""
    return values_at_hand(device) and SPARSE_FROM_RATIO * k <= d_sae


def products_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make products of float32 tensors in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@functools.cache
def _fuses_bfloat16() -> bool:
    """oneDNN has bfloat16 products for some processors only (AVX512 and newer)."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _linear(
    rows_ND: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor,
    *,
    relu: bool = False,
    plus_NF: Tensor | None = None,
) -> Tensor:
    """rows @ weight.T + bias (+ plus, or its relu), in one pass over the result if possible."""
    is_fused = rows_ND.device.type == "cpu" and rows_ND.dtype == torch.bfloat16
    if is_fused and weight_FD.is_contiguous() and _fuses_bfloat16():
        fused = torch.ops.mkldnn._linear_pointwise
        if plus_NF is not None:
            return fused.binary(rows_ND, plus_NF.contiguous(), weight_FD, bias_F, "add")
        return fused(rows_ND, weight_FD, bias_F, "relu" if relu else "none", [], "")
    result_NF = torch.addmm(bias_F, rows_ND, weight_FD.T)
    if plus_NF is not None:
        result_NF.add_(plus_NF)
    return result_NF.relu_() if relu else result_NF


def _masked(rows_NF: Tensor, valid_N1: Tensor) -> Tensor:
    """In place: the rows of tokens that are not valid, zero."""
    if not values_at_hand(rows_NF.device):
        return rows_NF.mul_(valid_N1)
    # They are few: a pass over them alone.
    return rows_NF.index_fill_(0, (~valid_N1[:, 0].bool()).nonzero()[:, 0], 0)


class DenseCodes(torch.autograd.Function):
    """(features [N, F], features @ W_dec [N, D], column sums [F]) of a ReLU encoder."""

    @staticmethod
    def forward(
        ctx: Any,
        centred_ND: Tensor,
        W_enc: Tensor,
        bias_F: Tensor,
        W_dec: Tensor,
        valid_N1: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = products_dtype(centred_ND)
        centred_ND, decoder_FD = centred_ND.to(dtype), W_dec.to(dtype)
        f_NF = _linear(centred_ND, W_enc.T.to(dtype), bias_F.to(dtype), relu=True)
        _masked(f_NF, valid_N1)
        ctx.save_for_backward(centred_ND, decoder_FD, f_NF)
        ctx.set_materialize_grads(False)
        return f_NF, f_NF @ decoder_FD, column_sums(f_NF)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_f_NF: Tensor | None, error_ND: Tensor | None, grad_sums_F: Tensor | None
    ) -> Any:
        centred_ND, decoder_FD, f_NF = ctx.saved_tensors
        dtype, wide = f_NF.dtype, torch.promote_types(f_NF.dtype, torch.float32)
        if error_ND is None:
            error_ND = f_NF.new_zeros(centred_ND.shape)
        error_ND = error_ND.to(dtype)
        row_F = f_NF.new_zeros(f_NF.shape[1]) if grad_sums_F is None else grad_sums_F.to(dtype)
        g_NF = _linear(error_ND, decoder_FD, row_F, plus_NF=grad_f_NF)
        sums_F: Tensor | float = 0.0
        rows = ROWS if values_at_hand(g_NF.device) else max(len(g_NF), 1)
        for g_RF, f_RF in zip(g_NF.split(rows), f_NF.split(rows), strict=True):
            torch.ops.aten.threshold_backward.grad_input(g_RF, f_RF, 0, grad_input=g_RF)
            sums_F = sums_F + column_sums(g_RF)
        grad_W_enc = (g_NF.T @ centred_ND).to(wide).T
        return None, grad_W_enc, sums_F, (f_NF.T @ error_ND).to(wide), None


# ------------------------------------------------------------------------------ sparse codes


def _rows_by_feature(codes: SparseCodes, weight_M: Tensor, rows_ND: Tensor) -> Tensor:
    """[d_sae, D]: row j = sum over the entries of feature j of weight * rows[token]."""
    weight_M = weight_M.index_select(0, codes.order_M)
    return embedding_bag(
        codes.sorted_token_M, rows_ND, codes.start_F, per_sample_weights=weight_M, mode="sum"
    )


def sparse_pass(
    centred_ND: Tensor, W_enc: Tensor, bias_F: Tensor, W_dec: Tensor, select: Selection
) -> Codes:
    """relu of the pre-activations that `select` chooses, and their decoding."""
    dtype = products_dtype(centred_ND)
    with torch.no_grad():
        pre_NF = _linear(centred_ND.to(dtype), W_enc.T.to(dtype), bias_F.to(dtype))
        values_M, feature_M, token_M = select(pre_NF)
        values_M = values_M.to(torch.promote_types(dtype, torch.float32)).relu()
        codes = SparseCodes.of(values_M, feature_M, token_M, pre_NF.shape, dtype)
    codes = codes._replace(values_M=SparseEncode.apply(codes, centred_ND, W_enc, bias_F))
    decoded_ND = SparseDecode.apply(codes.values_M, W_dec, codes)
    return Codes(None, decoded_ND, sparse=codes)


class SparseEncode(torch.autograd.Function):
    """The values of `codes`, with their gradients to the encoder's weights and bias."""

    @staticmethod
    def forward(
        ctx: Any, codes: SparseCodes, centred_ND: Tensor, W_enc: Tensor, bias_F: Tensor
    ) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(centred_ND)
        return codes.values_M.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> Any:
        (centred_ND,) = ctx.saved_tensors
        grad_M = grad_M * (ctx.codes.values_M > 0)
        grad_bias_F = grad_M.new_zeros(ctx.codes.d_sae).index_add_(0, ctx.codes.feature_M, grad_M)
        return None, None, _rows_by_feature(ctx.codes, grad_M, centred_ND).T, grad_bias_F


class SparseDecode(torch.autograd.Function):
    """codes @ W_dec, [N, D], from the entries alone."""

    @staticmethod
    def forward(ctx: Any, values_M: Tensor, W_dec: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(W_dec)
        return embedding_bag(
            codes.feature_M, W_dec, codes.start_N, per_sample_weights=values_M, mode="sum"
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error_ND: Tensor) -> Any:
        (W_dec,) = ctx.saved_tensors
        codes, error_ND = ctx.codes, error_ND.contiguous()
        grad_M = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            error_ND, W_dec, codes.feature_M, codes.start_N, codes.token_M, 0
        )
        return grad_M, _rows_by_feature(codes, codes.values_M.detach(), error_ND), None


# ------------------------------------------------------------------------------ selection


def _grouped(pre_NF: Tensor) -> Tensor:
    """[N, GROUP, groups]; group g holds the features g, g + groups, ..."""
    missing = -pre_NF.shape[1] % GROUP
    if missing:
        pre_NF = pad(pre_NF, (0, missing), value=-torch.inf)
    return pre_NF.view(len(pre_NF), GROUP, -1)


def _numpy(values: Tensor) -> Any:
    """As an array; NumPy has no bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).numpy()


def _largest(values_NG: Tensor, k: int) -> Tensor:
    """[N, k] columns of the k largest values of each row, in any order."""
    array = _numpy(values_NG)
    least = array.shape[1] - k

    def part(rows: Any) -> Any:
        return np.argpartition(rows, least, axis=1)[:, least:]

    pieces = np.array_split(array, torch.get_num_threads())
    with ThreadPoolExecutor(len(pieces)) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(part, pieces))))


def top_k(pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, features), both [N, k], of the k largest entries of each row, in any order."""
    grouped_NGg = _grouped(pre_NF)
    n_groups = grouped_NGg.shape[2]
    if pre_NF.device.type != "cpu" or n_groups <= 2 * k:
        values_NK, index_NK = pre_NF.topk(k, dim=-1, sorted=False)
        return values_NK, index_NK
    group_NK = _largest(grouped_NGg.amax(1), k)
    at_NGK = group_NK[:, None].expand(-1, GROUP, -1)
    candidates_NC = grouped_NGg.gather(2, at_NGK).flatten(1)
    best_NK = _largest(candidates_NC, k)
    index_NK = group_NK.gather(1, best_NK % k) + best_NK.div(k, rounding_mode="floor") * n_groups
    return candidates_NC.gather(1, best_NK), index_NK


def largest_of_batch(pre_NF: Tensor, valid_N1: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, features, tokens) of the n largest entries of the valid rows that are above zero.

    All that tie with the smallest of them are kept. In the order of tokens. On the CPU.
    """
    grouped_NGg = _grouped(pre_NF)
    n_groups = grouped_NGg.shape[2]
    maxima_P = _numpy(grouped_NGg.amax(1).relu_().mul_(valid_N1)).ravel()
    low = 0.0
    if 0 < n <= len(maxima_P):
        # At least n entries are as large as the n-th largest maximum.
        low = float(np.partition(maxima_P, len(maxima_P) - n)[-n])
    large_P = maxima_P >= low if low > 0 else maxima_P > 0
    group_P = torch.from_numpy(np.flatnonzero(large_P))
    token_P = group_P.div(n_groups, rounding_mode="floor")
    first_P = token_P * (n_groups * GROUP) + group_P - token_P * n_groups
    at_PG = first_P[:, None] + torch.arange(GROUP) * n_groups
    values_PG = grouped_NGg.view(-1).take(at_PG)
    chosen_M = ((values_PG >= low) & (values_PG > 0)).flatten().nonzero()[:, 0]
    values_M = values_PG.view(-1).index_select(0, chosen_M)
    if n < len(values_M):
        smallest = float(np.partition(_numpy(values_M), len(values_M) - n)[-n]) if n else torch.inf
        kept_M = (values_M >= smallest).nonzero()[:, 0]
        chosen_M, values_M = chosen_M.index_select(0, kept_M), values_M.index_select(0, kept_M)
    token_M = token_P.index_select(0, chosen_M.div(GROUP, rounding_mode="floor"))
    feature_M = at_PG.view(-1).index_select(0, chosen_M) - token_M * (n_groups * GROUP)
    return values_M, feature_M, token_M
