"""The operations of a training step in PyTorch, on any device; what the other objects are held to.

Shape suffixes: N tokens, D = d_in, F = d_sae, K kept a token, M entries of sparse codes, J dead
features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from tcsae.products.penalty import Normalised, Weights, penalty_of_entries
from tcsae.tensors.sparse import SparseCodes, split_tokens

T = TypeVar("T")
Chosen = tuple[Tensor, Tensor, Tensor]
"""(values, features, tokens) [M] of chosen pre-activations, in the order of tokens."""


class Adam(NamedTuple):
    """An update of Adam for one weight; scalars are numbers or on its device."""

    mean: Tensor
    square: Tensor
    step: Tensor
    """Counted from 1."""
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    divisor: Tensor | None
    """What the gradient is divided by; None: by 1."""

    def numbers(self) -> Tensor:
        """[6] float32: rate over the mean's correction, root of the square's correction, both
        betas, eps, divisor."""
        beta1, beta2 = self.betas
        one = torch.ones_like(self.step)
        parts = (
            self.lr / (1 - beta1**self.step),
            (1 - beta2**self.step).sqrt(),
            beta1 * one,
            beta2 * one,
            self.eps * one,
            one if self.divisor is None else self.divisor,
        )
        return torch.stack([part.float() for part in parts])


class Plain:
    """Dense codes for every architecture; in a step the host waits for no value of a tensor."""

    name: ClassVar[str] = "plain"
    sparse_from_ratio: ClassVar[float] = math.inf
    """From this d_sae / k on products with sparse codes are faster than with dense ones."""

    dead_every: ClassVar[int] = 1
    """After so many steps it is looked up which features are dead."""

    takes_counts: ClassVar[bool] = False
    """Whether the temporal penalty needs no matrix of windows of so many positions."""

    records: ClassVar[bool] = False
    """Whether a step may be recorded once and replayed."""

    def is_sparse(self, k: int, d_sae: int) -> bool:
        """Whether codes with k features on a token are to be sparse."""
        return self.sparse_from_ratio * k <= d_sae

    def at_once(self, n: int, fitting: int) -> int:
        """Of n rows, how many to take at a time; `fitting` of them stay in a CPU's cache."""
        return max(n, 1)

    def aside(self, device: torch.device, work: Callable[[], T]) -> Callable[[], T]:
        """Starts `work`, on which nothing waits yet; called, what is returned has its result.
        Here: all of it is done at once."""
        done = work()
        return lambda: done

    # ---- dense codes ----

    def linear(
        self,
        rows_ND: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor,
        *,
        relu: bool = False,
        plus_NF: Tensor | None = None,
    ) -> Tensor:
        """rows @ weight.T + bias (+ plus, or its relu), [N, F]."""
        result_NF = torch.addmm(bias_F, rows_ND, weight_FD.T)
        if plus_NF is not None:
            result_NF.add_(plus_NF)
        return result_NF.relu_() if relu else result_NF

    def attention(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        """Softmax attention where `allowed`; shapes as of torch's own."""
        return scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    def zero_rows(self, rows_NF: Tensor, valid_N1: Tensor) -> Tensor:
        """In place: zeros at the tokens that are not valid."""
        return rows_NF.mul_(valid_N1)

    def sum_where_on(self, features_NF: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over all features above zero of `function` (entry by entry) of them, float32."""
        return torch.where(features_NF > 0, function(features_NF.float()), 0).sum()

    def squared_error(
        self, decoded_ND: Tensor, bias_D: Tensor, x_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(sum of the squares of e, e [N, D]) of e = decoded + bias - x."""
        error_ND = decoded_ND + bias_D - x_ND
        return error_ND.square().sum(), error_ND

    # ---- selection ----

    def top_k(self, pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(values, features), both [N, K], of the k largest entries of each row, in any order."""
        values_NK, index_NK = pre_NF.topk(k, dim=-1, sorted=False)
        return values_NK, index_NK

    def least_kept(self, pre_NF: Tensor, valid_N1: Tensor, k: int, usual: Tensor) -> Tensor:
        """The k * (valid tokens)-th largest entry, or the least above 0 if that is larger; inf if
        there is none. A scalar. Entries at tokens that are not valid must be 0.

        `usual` is about what it was in other batches: a hint, on which the result does not hang.
        """
        largest_M = pre_NF.flatten().topk(k * len(pre_NF)).values
        n_kept = (k * valid_N1.sum()).minimum((largest_M > 0).sum())
        return torch.where(n_kept > 0, largest_M.take((n_kept - 1).clamp(min=0)), torch.inf)

    def largest_of_batch(self, pre_NF: Tensor, valid_N1: Tensor, k: int) -> Chosen:
        """The k * (valid tokens) largest entries of the valid rows that are above zero; all that
        tie with the smallest of them are kept."""
        pre_NF = torch.where(valid_N1, pre_NF, 0)
        least = self.least_kept(pre_NF, valid_N1, k, pre_NF.new_zeros(()))
        token_M, feature_M = (pre_NF >= least).nonzero(as_tuple=True)
        return pre_NF[token_M, feature_M], feature_M, token_M

    def dead(self, dead_F: Tensor) -> tuple[Tensor, Tensor | None]:
        """(indices [J] of features, which of these are dead [J]; None: all), with all the dead."""
        return torch.arange(len(dead_F), device=dead_F.device), dead_F

    # ---- the update of a weight whose rows keep norm 1 ----

    def updates_rows(self, weight_FD: Tensor) -> bool:
        """Whether the two that follow are to be used: in place of a projection of the gradient,
        Adam and a normalisation, which each pass over all of it."""
        return False

    def row_gradient(self, weight_FD: Tensor, grad_FD: Tensor) -> tuple[Tensor, Tensor]:
        """(along [F], squared [F]): the gradient's part along each row, in units of the row, and
        the squared norm of what is left without it."""
        along_F = (grad_FD * weight_FD).sum(1) / weight_FD.square().sum(1)
        return along_F, (grad_FD - along_F[:, None] * weight_FD).square().sum(1)

    def update_rows(self, weight_FD: Tensor, grad_FD: Tensor, along_F: Tensor, adam: Adam) -> None:
        """In place: Adam by the gradient without its part along each row; then norm 1."""
        rate, root, beta1, beta2, eps, divisor = adam.numbers().unbind()
        grad_FD = (grad_FD - along_F[:, None] * weight_FD) / divisor
        adam.mean.add_((grad_FD - adam.mean) * (1 - beta1))
        adam.square.mul_(beta2).add_((1 - beta2) * grad_FD.square())
        weight_FD.sub_(rate * adam.mean / (adam.square.sqrt() / root + eps))
        weight_FD.div_(weight_FD.norm(dim=1, keepdim=True).clamp_(min=1e-12))

    # ---- sparse codes ----

    def to_gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows that are to be gathered, in the products' `dtype` where that is less to read."""
        return rows

    def decode(self, codes: SparseCodes, rows_FD: Tensor) -> Tensor:
        """[N, D]: of each token the sum over its entries of value * rows[feature]."""
        return embedding_bag(
            codes.feature_M,
            rows_FD,
            codes.start_N,
            per_sample_weights=codes.values_M.detach(),
            mode="sum",
        )

    def at_entries(self, codes: SparseCodes, left_ND: Tensor, right_FD: Tensor) -> Tensor:
        """[M]: <left[token], right[feature]> of each entry."""
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            left_ND, right_FD, codes.feature_M, codes.start_N, codes.token_M, 0
        )

    def by_feature(self, codes: SparseCodes, weight_M: Tensor, rows_ND: Tensor) -> Tensor:
        """[F, D]: of each feature the sum over its entries of weight * rows[token]."""
        weight_M = weight_M.index_select(0, codes.order_M)
        return embedding_bag(
            codes.sorted_token_M, rows_ND, codes.start_F, per_sample_weights=weight_M, mode="sum"
        )

    def first(self, codes: SparseCodes, n_features: int) -> SparseCodes:
        """The codes of the first so many features, carrying the graph: the entries of others are 0,
        so that no length hangs on which they are."""
        kept_M = codes.feature_M < n_features
        return codes._replace(values_M=torch.where(kept_M, codes.values_M, 0))

    def sums(self, codes: SparseCodes, values_M: Tensor) -> Tensor:
        """[F]: of each feature the sum of its entries' values."""
        return values_M.new_zeros(codes.d_sae).index_add_(0, codes.feature_M, values_M)

    def window_penalty(
        self, codes: SparseCodes, values_M: Tensor, weights: Weights, normalised: Normalised | None
    ) -> tuple[Tensor, Tensor]:
        """(value, gradient [M]) of a batch's temporal penalty; see `penalty`."""
        return penalty_of_entries(self, codes, values_M, weights, normalised)

    # Of values in the order of features (`codes.order_M`):

    def sorted_sums(
        self, codes: SparseCodes, values_M: Tensor, factor_M: Tensor | None = None
    ) -> Tensor:
        """[F]: of each feature the sum of its entries' values (times factors)."""
        entries_M = torch.arange(len(values_M), device=values_M.device)
        return embedding_bag(
            entries_M, values_M[:, None], codes.start_F, mode="sum", per_sample_weights=factor_M
        )[:, 0]

    def position_sums(
        self, codes: SparseCodes, values_M: Tensor, position_M: Tensor, n_positions: int
    ) -> Tensor:
        """[F, T]: of each feature the sums of its entries' values by position."""
        # Feature by feature, as the entries lie.
        at_M = torch.add(position_M, codes.sorted_feature_M, alpha=n_positions)
        sums_FT = values_M.new_zeros(codes.d_sae, n_positions)
        sums_FT.view(-1).index_add_(0, at_M, values_M)
        return sums_FT

    def smooth(self, codes: SparseCodes, values_M: Tensor, within_BTT: Tensor) -> Tensor:
        """[M]: `within` @ values of each feature in each context, where it has entries.

        The entries of one feature in one context lie together: a bag. The bag's sum of
        f_u within[u, :] is its column of the result, read where the bag has entries. The sums are
        made in the dtype of the codes' products.
        """
        feature_M, token_M = codes.sorted_feature_M, codes.sorted_token_M
        n_positions = within_BTT.shape[-1]
        context_M, position_M = split_tokens(token_M, n_positions)
        begins_M = torch.ones_like(feature_M, dtype=torch.bool)
        begins_M[1:] = (feature_M[1:] != feature_M[:-1]) | (context_M[1:] != context_M[:-1])
        columns_GT = embedding_bag(
            token_M if len(within_BTT) > 1 else position_M,
            within_BTT.to(codes.dtype).flatten(0, 1),
            begins_M.nonzero()[:, 0],
            per_sample_weights=values_M.to(codes.dtype),
            mode="sum",
        )
        begins_M[:1] = False  # the first bag is number 0
        at_M = torch.add(position_M, begins_M.cumsum(0), alpha=n_positions)
        return columns_GT.view(-1).index_select(0, at_M).to(values_M)


class GPU(Plain):
    """As `Plain`, where a look at what a tensor holds makes the host wait for the device."""

    dead_every: ClassVar[int] = 8

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def aside(self, device: torch.device, work: Callable[[], T]) -> Callable[[], T]:
        # Dozens of kernels that take next to nothing each, beside a product that takes long.
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        beside, here = self._streams[device], torch.cuda.current_stream(device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            done = work()

        def result() -> T:
            torch.cuda.current_stream(device).wait_stream(beside)
            return done

        return result

    def attention(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        # The gradients of the fused forms are added in an order that changes.
        with sdpa_kernel(SDPBackend.MATH):
            return super().attention(q, k, v, allowed)
