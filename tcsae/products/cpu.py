"""The operations of a training step on a CPU, where the host reads a tensor for nothing.

What a tensor holds may then decide how much is computed: only the dead columns, only the rows that
do not count, only the entries that can be among the largest.

Selection looks at the maxima of groups of GROUP features first. The k largest entries of a token
lie in the k groups with the largest maxima, for each of those groups has an entry at least as
large as any entry of another group; likewise the n largest of a batch. So what is sorted out is a
GROUPth of the codes, then GROUP entries of each chosen group. NumPy's partition does it with vector
instructions where the processor has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tcsae.products.plain import Chosen, Plain
from tcsae.tensors.sparse import SparseCodes

GROUP = 8


class CPU(Plain):
    """As `Plain`, with fewer and smaller passes over memory."""

    name: ClassVar[str] = "cpu"
    # Sparse products cost ~k, dense ones ~d_sae; they meet near d_sae / k = 16 in bfloat16 (near 4
    # in float32).
    sparse_from_ratio: ClassVar[float] = 16

    def at_once(self, n: int, fitting: int) -> int:
        return fitting

    def linear(
        self,
        rows_ND: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor,
        *,
        relu: bool = False,
        plus_NF: Tensor | None = None,
    ) -> Tensor:
        is_fused = rows_ND.dtype == torch.bfloat16 and weight_FD.is_contiguous()
        if not (is_fused and _fuses_bfloat16()):
            return super().linear(rows_ND, weight_FD, bias_F, relu=relu, plus_NF=plus_NF)
        # One pass over the result.
        fused = torch.ops.mkldnn._linear_pointwise
        if plus_NF is not None:
            return fused.binary(rows_ND, plus_NF.contiguous(), weight_FD, bias_F, "add")
        return fused(rows_ND, weight_FD, bias_F, "relu" if relu else "none", [], "")

    def zero_rows(self, rows_NF: Tensor, valid_N1: Tensor) -> Tensor:
        # They are few: a pass over them alone.
        return rows_NF.index_fill_(0, (~valid_N1[:, 0].bool()).nonzero()[:, 0], 0)

    def sum_where_on(self, features_NF: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(features_NF[features_NF > 0].float()).sum()

    def top_k(self, pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
        grouped_NGg = _grouped(pre_NF)
        n_groups = grouped_NGg.shape[2]
        if n_groups <= 2 * k:
            return super().top_k(pre_NF, k)
        group_NK = _largest(grouped_NGg.amax(1), k)
        at_NGK = group_NK[:, None].expand(-1, GROUP, -1)
        candidates_NC = grouped_NGg.gather(2, at_NGK).flatten(1)
        best_NK = _largest(candidates_NC, k)
        offset_NK = best_NK.div(k, rounding_mode="floor") * n_groups
        return candidates_NC.gather(1, best_NK), group_NK.gather(1, best_NK % k) + offset_NK

    def least_kept(self, pre_NF: Tensor, valid_N1: Tensor, k: int, usual: Tensor) -> Tensor:
        n_kept = k * int(valid_N1.sum())
        # Few entries are far above the usual: to select among them is several times quicker than
        # among all, and gives the same.
        candidates = pre_NF[pre_NF > 0.7 * usual]
        if len(candidates) < n_kept:
            candidates = pre_NF[pre_NF > 0]
        if n_kept == 0 or len(candidates) == 0:
            return pre_NF.new_full((), torch.inf)
        return candidates.kthvalue(max(len(candidates) - n_kept, 0) + 1).values

    def largest_of_batch(self, pre_NF: Tensor, valid_N1: Tensor, k: int) -> Chosen:
        n = k * int(valid_N1.sum())
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
            least = float(np.partition(_numpy(values_M), len(values_M) - n)[-n]) if n else torch.inf
            kept_M = (values_M >= least).nonzero()[:, 0]
            chosen_M, values_M = chosen_M.index_select(0, kept_M), values_M.index_select(0, kept_M)
        token_M = token_P.index_select(0, chosen_M.div(GROUP, rounding_mode="floor"))
        feature_M = at_PG.view(-1).index_select(0, chosen_M) - token_M * (n_groups * GROUP)
        return values_M, feature_M, token_M

    def first(self, codes: SparseCodes, n_features: int) -> SparseCodes:
        # Those alone. They are in front by feature: nothing is sorted again.
        is_kept_M = codes.feature_M < n_features
        at_M, before_M = is_kept_M.nonzero()[:, 0], pad(is_kept_M.cumsum(0), (1, 0))
        in_front = slice(len(at_M))
        return SparseCodes(
            codes.values_M.index_select(0, at_M),
            codes.feature_M.index_select(0, at_M),
            codes.token_M.index_select(0, at_M),
            before_M.index_select(0, codes.start_N),
            before_M.index_select(0, codes.order_M[in_front]),
            codes.sorted_feature_M[in_front],
            codes.sorted_token_M[in_front],
            codes.start_F[:n_features],
            codes.dtype,
        )

    def dead(self, dead_F: Tensor) -> tuple[Tensor, Tensor | None]:
        # Only their columns are computed: the cost follows their number, not d_sae.
        return dead_F.nonzero()[:, 0], None


@functools.cache
def _fuses_bfloat16() -> bool:
    """oneDNN has bfloat16 products for some processors only (AVX512 and newer)."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


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
    """[N, K] columns of the k largest values of each row, in any order."""
    array = _numpy(values_NG)
    least = array.shape[1] - k

    def part(rows: Any) -> Any:
        return np.argpartition(rows, least, axis=1)[:, least:]

    pieces = np.array_split(array, torch.get_num_threads())
    with ThreadPoolExecutor(len(pieces)) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(part, pieces))))
