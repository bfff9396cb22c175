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

Of nested dictionaries each entry is decoded once, into the sum of its token and its group of
features; the dictionaries are sums of these over groups, and the gradient to a group is the sum of
the errors of those that hold it. So N tokens in G groups are N G tokens to the four operations.

What is done where, and how the entries are selected, is the business of `tcsae/products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tcsae.products import products_for
from tcsae.products.plain import Chosen
from tcsae.sae.codes import Codes
from tcsae.tensors.sparse import SparseCodes, in_group_order
from tcsae.tensors.sums import column_sums

ROWS = 1024
"""Tokens whose code gradients are masked and summed while they are in a processor's cache."""


def products_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make products of float32 tensors in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


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
        products = products_for(centred_ND.device)
        f_NF = products.linear(centred_ND, W_enc.T.to(dtype), bias_F.to(dtype), relu=True)
        products.zero_rows(f_NF, valid_N1)
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
        products = products_for(f_NF.device)
        g_NF = products.linear(error_ND, decoder_FD, row_F, plus_NF=grad_f_NF)
        sums_F: Tensor | float = 0.0
        rows = products.at_once(len(g_NF), ROWS)
        for g_RF, f_RF in zip(g_NF.split(rows), f_NF.split(rows), strict=True):
            torch.ops.aten.threshold_backward.grad_input(g_RF, f_RF, 0, grad_input=g_RF)
            sums_F = sums_F + column_sums(g_RF)
        grad_W_enc = (g_NF.T @ centred_ND).to(wide).T
        return None, grad_W_enc, sums_F, (f_NF.T @ error_ND).to(wide), None


# ------------------------------------------------------------------------------ sparse codes


def sparse_pass(
    centred_ND: Tensor,
    W_enc: Tensor,
    bias_F: Tensor,
    W_dec: Tensor,
    select: Callable[[Tensor], Chosen],
    sizes: Sequence[int],
) -> Codes:
    """relu of the pre-activations that `select` chooses, and their decoding; with several groups of
    features, of these `sizes`, `extra` has what each dictionary but the last decodes."""
    codes = sparse_codes(centred_ND, W_enc, bias_F, select, sizes)
    if len(sizes) == 1:
        return Codes(None, SparseDecode.apply(codes.values_M, W_dec, codes), sparse=codes)
    groups = codes.in_groups(sizes)
    *inner, decoded_ND = SparseDecode.apply(codes.values_M, W_dec, groups, len(sizes))
    return Codes(None, decoded_ND, sparse=codes, extra=tuple(inner))


def sparse_codes(
    centred_ND: Tensor,
    W_enc: Tensor,
    bias_F: Tensor,
    select: Callable[[Tensor], Chosen],
    sizes: Sequence[int],
) -> SparseCodes:
    """relu of the pre-activations that `select` chooses, by token and by groups of these sizes."""
    dtype, products = products_dtype(centred_ND), products_for(centred_ND.device)
    with torch.no_grad():
        rows_ND = products.to_gather(centred_ND, dtype)
        pre_NF = products.linear(rows_ND.to(dtype), W_enc.T.to(dtype), bias_F.to(dtype))
        values_M, feature_M, token_M = select(pre_NF)
        if len(sizes) > 1:
            order_M = in_group_order(feature_M, token_M, sizes)
            values_M, feature_M, token_M = (
                of_M.index_select(0, order_M) for of_M in (values_M, feature_M, token_M)
            )
        values_M = values_M.to(torch.promote_types(dtype, torch.float32)).relu()
        codes = SparseCodes.of(values_M, feature_M, token_M, pre_NF.shape, dtype)
    return codes._replace(values_M=SparseEncode.apply(codes, rows_ND, W_enc, bias_F))


class SparseEncode(torch.autograd.Function):
    """The values of `codes`, with their gradients to the encoder's weights and bias."""

    @staticmethod
    def forward(
        ctx: Any, codes: SparseCodes, rows_ND: Tensor, W_enc: Tensor, bias_F: Tensor
    ) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(rows_ND)
        return codes.values_M.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> Any:
        (rows_ND,) = ctx.saved_tensors
        grad_M = grad_M * (ctx.codes.values_M > 0)
        products = products_for(grad_M.device)
        grad_W_DF = products.by_feature(ctx.codes, grad_M, rows_ND).T
        return None, None, grad_W_DF, products.sums(ctx.codes, grad_M)


class SparseDecode(torch.autograd.Function):
    """codes @ W_dec, [N, D], from the entries alone.

    Of the codes of N tokens in G groups (`SparseCodes.in_groups`): what the first group, the first
    two and so on decode, G times [N, D].
    """

    @staticmethod
    def forward(
        ctx: Any, values_M: Tensor, W_dec: Tensor, codes: SparseCodes, n_groups: int = 1
    ) -> Tensor | tuple[Tensor, ...]:
        products = products_for(W_dec.device)
        rows_FD = products.to_gather(W_dec, codes.dtype)
        ctx.codes, ctx.n_groups = codes, n_groups
        ctx.save_for_backward(rows_FD)
        decoded_ND = products.decode(codes, rows_FD)
        if n_groups == 1:
            return decoded_ND
        decoded_NGD = decoded_ND.view(-1, n_groups, W_dec.shape[1])
        for group in range(1, n_groups):
            decoded_NGD[:, group] += decoded_NGD[:, group - 1]
        return decoded_NGD.unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *errors_ND: Tensor) -> Any:
        (rows_FD,) = ctx.saved_tensors
        codes, products = ctx.codes, products_for(rows_FD.device)
        error_ND = errors_ND[0].contiguous()
        if ctx.n_groups > 1:
            error_NGD = torch.stack(errors_ND, 1)
            for group in reversed(range(1, ctx.n_groups)):
                error_NGD[:, group - 1] += error_NGD[:, group]
            error_ND = error_NGD.flatten(0, 1)
        error_ND = products.to_gather(error_ND, codes.dtype)
        grad_M = products.at_entries(codes, error_ND, rows_FD)
        return grad_M, products.by_feature(codes, codes.values_M.detach(), error_ND), None, None
