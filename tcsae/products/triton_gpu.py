"""The operations of a training step on a GPU, with Triton kernels where codes are sparse.

The host reads nothing of what it computes: it knows every length beforehand, so that the device
never waits. No sum is made in an order that changes: a step repeated has the same bits.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from tcsae.products import kernels
from tcsae.products.penalty import Normalised, Weights
from tcsae.products.plain import GPU, Adam, Chosen
from tcsae.tensors.sparse import SparseCodes

GROUP = 8
"""Features whose maximum stands for them in a selection (see `cpu`)."""
PIECE = 128
"""Entries of one feature that one program sums."""
DECODE, SAMPLED, BY_FEATURE = (4, 256, 1), (8, 256, 1), (2, 512, 1)
"""Rows and columns that a program takes at a time, and its warps: the best of a search on an H100
at d_in 2,304, d_sae 16,384 and 65,536. With 4 warps a program they take two to four times as long.
"""
MOST_COLUMNS = 8192
"""Of a row that one program of the update holds."""
MOST_PLACES = 2048
SMOOTH = (32, 1)
"""Entries that a program of the windows' product takes at a time, and its warps."""


class Triton(GPU):
    """As `GPU`, with codes by their entries."""

    name: ClassVar[str] = "triton"
    records: ClassVar[bool] = True
    takes_counts: ClassVar[bool] = True
    # Dense products cost 2 d_sae / (780 TFLOP/s) a number, gathers 2 k / (4.5 TB/s).
    sparse_from_ratio: ClassVar[float] = 128

    def try_on(self, device: torch.device) -> None:
        """A selection, a decoding and its gradient; whatever fails is raised."""
        rows_FD = torch.ones(4 * GROUP, 16, device=device)
        values_NK, index_NK = self.top_k(torch.rand(2, len(rows_FD), device=device), 2)
        token_M = torch.arange(4, device=device) // 2
        shape = (2, len(rows_FD))
        codes = SparseCodes.of(
            values_NK.flatten(), index_NK.flatten(), token_M, shape, torch.float32
        )
        self.by_feature(codes, codes.values_M, self.decode(codes, rows_FD))
        torch.cuda.synchronize(device)

    # ---- selection ----

    def top_k(self, pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
        n, d_sae = pre_NF.shape
        n_groups = triton.cdiv(d_sae, GROUP)
        if n_groups <= k:
            return super().top_k(pre_NF, k)
        bits = 16 if pre_NF.dtype == torch.bfloat16 else 32
        groups_NK = torch.empty(n, k, dtype=torch.int32, device=pre_NF.device)
        values_NK = torch.empty(n, k, device=pre_NF.device)
        index_NK = torch.empty(n, k, dtype=torch.long, device=pre_NF.device)
        with _on(pre_NF):
            kernels.groups_kernel[(n,)](
                groups_NK, pre_NF, d_sae, k, n_groups, GROUP=GROUP,
                GROUPS=triton.next_power_of_2(n_groups), BITS=bits, num_warps=8,
            )  # fmt: skip
            kernels.top_k_kernel[(n,)](
                values_NK, index_NK, groups_NK, pre_NF, d_sae, k, n_groups, GROUP=GROUP,
                KS=triton.next_power_of_2(k), BITS=bits, num_warps=4,
            )  # fmt: skip
        return values_NK, index_NK

    def largest_of_batch(self, pre_NF: Tensor, valid_N1: Tensor, k: int) -> Chosen:
        """As of `GPU`, but exactly k N entries, of which those in excess are 0 and add nothing to
        any sum; of entries that tie with the smallest kept one those for which there is room."""
        n, d_sae = pre_NF.shape
        n_groups, m = triton.cdiv(d_sae, GROUP), k * n
        missing = n_groups * GROUP - d_sae
        padded = torch.nn.functional.pad(pre_NF, (0, missing), value=-torch.inf)
        grouped = padded.view(n, GROUP, n_groups)
        maxima_P = torch.where(valid_N1, grouped.amax(1), -torch.inf).flatten()
        group_P = maxima_P.topk(min(m, len(maxima_P)), sorted=False).indices
        token_P, column_P = group_P // n_groups, group_P % n_groups
        offset_G = torch.arange(GROUP, device=pre_NF.device) * n_groups
        at_PG = (token_P * (n_groups * GROUP) + column_P)[:, None] + offset_G
        values_M, place_M = padded.view(-1).take(at_PG).flatten().topk(m)
        n_kept = (k * valid_N1.sum()).minimum((values_M > 0).sum())
        least = torch.where(n_kept > 0, values_M.take((n_kept - 1).clamp(min=0)), torch.inf)
        values_M = torch.where((values_M >= least) & (values_M > 0), values_M, 0)
        flat_M, order_M = at_PG.view(-1).index_select(0, place_M).sort()
        token_M = flat_M // (n_groups * GROUP)
        feature_M = (flat_M - token_M * (n_groups * GROUP)).clamp(max=d_sae - 1)
        return values_M.index_select(0, order_M), feature_M, token_M

    # ---- the update ----

    def updates_rows(self, weight_FD: Tensor) -> bool:
        return weight_FD.shape[1] <= MOST_COLUMNS and weight_FD.is_contiguous()

    def row_gradient(self, weight_FD: Tensor, grad_FD: Tensor) -> tuple[Tensor, Tensor]:
        d_sae, width = weight_FD.shape
        along_F, squared_F = torch.empty(2, d_sae, device=weight_FD.device)
        with _on(weight_FD):
            kernels.row_gradient_kernel[(d_sae,)](
                along_F, squared_F, weight_FD, grad_FD, width,
                BLOCK=triton.next_power_of_2(width), num_warps=8 if width <= 4096 else 16,
            )  # fmt: skip
        return along_F, squared_F

    def update_rows(self, weight_FD: Tensor, grad_FD: Tensor, along_F: Tensor, adam: Adam) -> None:
        d_sae, width = weight_FD.shape
        with _on(weight_FD):
            kernels.update_rows_kernel[(d_sae,)](
                weight_FD, adam.mean, adam.square, grad_FD, along_F, adam.numbers(), width,
                BLOCK=triton.next_power_of_2(width), num_warps=8 if width <= 4096 else 16,
            )  # fmt: skip

    # ---- sparse codes ----

    def to_gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return rows.to(dtype)

    def decode(self, codes: SparseCodes, rows_FD: Tensor) -> Tensor:
        n, width = len(codes.start_N), rows_FD.shape[1]
        out_ND = torch.empty(n, width, device=rows_FD.device)
        tile, block, warps = _shape(DECODE, width)
        with _on(rows_FD):
            kernels.decode_kernel[(n, triton.cdiv(width, block))](
                out_ND, rows_FD, codes.feature_M, codes.values_M.detach(), codes.start_N, n,
                len(codes.feature_M), width, TILE=tile, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        return out_ND

    def at_entries(self, codes: SparseCodes, left_ND: Tensor, right_FD: Tensor) -> Tensor:
        n, width = left_ND.shape
        n_entries = len(codes.feature_M)
        tile, block, warps = _shape(SAMPLED, width)
        blocks = triton.cdiv(width, block)
        parts = torch.empty(blocks, n_entries, device=left_ND.device)
        with _on(left_ND):
            kernels.sampled_kernel[(n, blocks)](
                parts, left_ND, right_FD, codes.feature_M, codes.start_N, n, n_entries, width,
                TILE=tile, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        return parts.sum(0)

    def by_feature(self, codes: SparseCodes, weight_M: Tensor, rows_ND: Tensor) -> Tensor:
        n_entries, d_sae, width = len(weight_M), codes.d_sae, rows_ND.shape[1]
        weight_M = weight_M.index_select(0, codes.order_M)
        of_piece_P, first_piece_F, first_part_F, several_Q = _pieces(codes)
        out_FD = torch.empty(d_sae, width, device=rows_ND.device)
        tile, block, warps = _shape(BY_FEATURE, width)
        # A feature of c > PIECE entries has less than 2 c / PIECE pieces.
        partial = torch.empty(2 * n_entries // PIECE + 1, width, device=rows_ND.device)
        blocks = triton.cdiv(width, block)
        with _on(rows_ND):
            kernels.pieces_kernel[(len(of_piece_P), blocks)](
                out_FD, partial, rows_ND, codes.sorted_token_M, weight_M, codes.start_F,
                of_piece_P, first_piece_F, first_part_F, d_sae, n_entries, width, PIECE,
                TILE=tile, BLOCK=block, num_warps=warps,
            )  # fmt: skip
            if len(several_Q):
                kernels.join_kernel[(len(several_Q), blocks)](
                    out_FD, partial, several_Q, codes.start_F, first_part_F, d_sae, n_entries,
                    width, PIECE, BLOCK=block, num_warps=warps,
                )  # fmt: skip
        return out_FD

    def sums(self, codes: SparseCodes, values_M: Tensor) -> Tensor:
        return self.sorted_sums(codes, values_M.index_select(0, codes.order_M))

    def sorted_sums(
        self, codes: SparseCodes, values_M: Tensor, factor_M: Tensor | None = None
    ) -> Tensor:
        factor_M = torch.ones_like(values_M) if factor_M is None else factor_M
        sums_F = torch.empty(codes.d_sae, device=values_M.device)
        with _on(values_M):
            kernels.sums_kernel[(codes.d_sae,)](
                sums_F, values_M, factor_M, codes.start_F, codes.d_sae, len(values_M),
                BLOCK=128, num_warps=1,
            )  # fmt: skip
        return sums_F

    def smooth(self, codes: SparseCodes, values_M: Tensor, within_BTT: Tensor) -> Tensor:
        within_BTT, smooth_M = within_BTT.contiguous(), torch.empty_like(values_M)
        n_entries, block = len(values_M), SMOOTH[0]
        if n_entries:
            with _on(values_M):
                kernels.smooth_kernel[(triton.cdiv(n_entries, block),)](
                    smooth_M, values_M, codes.sorted_feature_M, codes.sorted_token_M, within_BTT,
                    n_entries, within_BTT.shape[-1], PER_CONTEXT=len(within_BTT) > 1, BLOCK=block,
                    num_warps=SMOOTH[1],
                )  # fmt: skip
        return smooth_M

    def _smooth_by_counts(self, codes: SparseCodes, f_M: Tensor, weights: Weights) -> Tensor:
        """As `smooth` by the weights' matrix, which is not made."""
        counts = weights.counts
        if counts is None:
            return self.smooth(codes, f_M, weights.matrix())
        smooth_M, n_positions = torch.empty_like(f_M), counts.up_to_BT.shape[1]
        has_term, place_BT = weights.spread_T is not None, weights.place_BT
        none = counts.up_to_BT
        term = (none,) * 3 if not has_term else (weights.spread_T, weights.counted_T, weights.joint)
        with _on(f_M):
            kernels.smooth_by_counts_kernel[(triton.cdiv(len(f_M), SMOOTH[0]),)](
                smooth_M, f_M, codes.sorted_feature_M, codes.sorted_token_M, counts.up_to_BT,
                counts.before_BT, none if place_BT is None else place_BT.contiguous(), *term,
                weights.n_windows, len(f_M), n_positions, counts.window,
                PER_CONTEXT=len(counts.up_to_BT) > 1, POSITIONS=has_term,
                PLACED=place_BT is not None, BLOCK=SMOOTH[0], num_warps=SMOOTH[1],
            )  # fmt: skip
        return smooth_M

    def window_penalty(
        self, codes: SparseCodes, values_M: Tensor, weights: Weights, normalised: Normalised | None
    ) -> tuple[Tensor, Tensor]:
        n_positions = weights.measure_BT.shape[1]
        if n_positions > MOST_PLACES or not len(values_M):
            return super().window_penalty(codes, values_M, weights, normalised)
        d_sae, n_entries, device = codes.d_sae, len(values_M), values_M.device
        is_placed, has_term = weights.place_BT is not None, weights.spread_T is not None
        f_M = values_M.index_select(0, codes.order_M)
        smooth_M = self._smooth_by_counts(codes, f_M, weights)
        measure_BT = weights.measure_BT.to(codes.dtype).to(f_M).contiguous()
        none = measure_BT  # read where there is no such argument: never
        place_BT = none if weights.place_BT is None else weights.place_BT.contiguous()
        term = (none,) * 3 if not has_term else (weights.spread_T, weights.counted_T, weights.joint)
        sums = torch.empty(4 if has_term else 3, d_sae, device=device)
        half_FT = torch.empty(d_sae, n_positions, device=device) if has_term else none
        places = triton.next_power_of_2(n_positions)
        with _on(values_M):
            kernels.penalty_sums_kernel[(d_sae,)](
                sums, half_FT, f_M, smooth_M, codes.sorted_token_M, measure_BT, place_BT, *term,
                codes.start_F, d_sae, n_entries, n_positions, POSITIONS=has_term,
                PLACED=is_placed, BLOCK=max(2048 // places, 2) if has_term else 32,
                PLACES=places, num_warps=1,
            )  # fmt: skip
        e_F = sums[0] / weights.n_windows
        if has_term:
            e_F = e_F + sums[3]
        share_F, pull_F, pull_mean_F = torch.ones_like(e_F), *torch.zeros(2, d_sae, device=device)
        if normalised is not None:
            total = measure_BT.sum().clamp(min=1)
            mean_F, square_F = sums[1:3] / total
            share_F, ratio_F = normalised(e_F, mean_F, square_F - mean_F.square())
            pull_F = 2 * share_F * ratio_F / total
            pull_mean_F = pull_F * mean_F
        weight_F, gradient_M = 2 * share_F / weights.n_windows, torch.empty_like(values_M)
        with _on(values_M):
            kernels.penalty_gradient_kernel[(triton.cdiv(n_entries, 256),)](
                gradient_M, codes.order_M, f_M, smooth_M, codes.sorted_feature_M,
                codes.sorted_token_M, measure_BT, place_BT, weight_F, pull_F, pull_mean_F, share_F,
                half_FT, n_entries, n_positions, POSITIONS=has_term, PLACED=is_placed, BLOCK=256,
                num_warps=4,
            )  # fmt: skip
        return (share_F * e_F).sum(), gradient_M

    # ---- the reconstruction ----

    def squared_error(
        self, decoded_ND: Tensor, bias_D: Tensor, x_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        if decoded_ND.shape[1] > MOST_COLUMNS:
            return super().squared_error(decoded_ND, bias_D, x_ND)
        error_ND = torch.empty_like(decoded_ND, memory_format=torch.contiguous_format)
        return _SquaredError.apply(decoded_ND, bias_D, x_ND, error_ND), error_ND


class _SquaredError(torch.autograd.Function):
    """The sum of the squares of decoded + bias - x, which `error_ND` becomes."""

    @staticmethod
    def forward(
        ctx: Any, decoded_ND: Tensor, bias_D: Tensor, x_ND: Tensor, error_ND: Tensor
    ) -> Tensor:
        n, width = decoded_ND.shape
        squares_N = torch.empty(n, device=decoded_ND.device)
        with _on(decoded_ND):
            kernels.error_kernel[(n,)](
                error_ND, squares_N, decoded_ND.contiguous(), bias_D, x_ND.contiguous(), width,
                BLOCK=triton.next_power_of_2(width), num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(error_ND)
        return squares_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (error_ND,) = ctx.saved_tensors
        grad_ND = error_ND * (2 * grad)
        return grad_ND, grad_ND.sum(0), None, None


def _pieces(codes: SparseCodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(feature of each piece, F where there is none; first piece of each feature; where those of
    several pieces have their parts; the features of several pieces, F where there are no more)."""
    n_entries, d_sae, device = len(codes.order_M), codes.d_sae, codes.start_F.device
    ends_F = torch.cat([codes.start_F[1:], codes.start_F.new_full((1,), n_entries)])
    pieces_F = (ends_F - codes.start_F - 1).div(PIECE, rounding_mode="floor").clamp_(min=0).add_(1)
    end_F = pieces_F.cumsum(0)
    every_P = torch.arange(d_sae + n_entries // PIECE, device=device)
    of_piece_P = torch.searchsorted(end_F, every_P, right=True, out_int32=True)
    several_F = pieces_F > 1
    parts_F = torch.where(several_F, pieces_F, 0)
    every_Q = torch.arange(1, n_entries // PIECE + 1, device=device)
    several_Q = torch.searchsorted(several_F.cumsum(0), every_Q, out_int32=True)
    return of_piece_P, end_F - pieces_F, parts_F.cumsum(0) - parts_F, several_Q


def _shape(of: tuple[int, int, int], width: int) -> tuple[int, int, int]:
    tile, block, warps = of
    return tile, min(triton.next_power_of_2(width), block), warps


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
