"""The TopK SAE: the k largest pre-activations of each token, then ReLU.

Gao et al. 2024 (arXiv 2406.04093, section 2.3). No sparsity term: k is the sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import embedding_bag

from tcsae.sae.base import SAEConfig, SparseAutoencoder
from tcsae.sae.passing import Codes, Places, SAELensState
from tcsae.sparse import SparseCodes

# Sparse products cost ~k, dense ones ~d_sae; on a CPU they meet near d_sae / k = 16 in bfloat16
# (near 4 in float32).
SPARSE_FROM_RATIO = 16


class TopKConfig(SAEConfig):
    """k features per token."""

    architecture: Literal["topk"] = "topk"
    k: int = Field(default=32, ge=1)
    """Features that may fire at one token."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}: it must be at most d_sae, {self.d_sae}")
        return self


class TopKSAE(SparseAutoencoder):
    """f = ReLU(the k largest pre-activations), zero elsewhere.

    In training on a CPU the products that follow the selection touch the k chosen features
    only. The values are those of the dense path, in float32 where autocast would round.
    """

    config_class: ClassVar[type[SAEConfig]] = TopKConfig
    # At 0.2, as for ReLU, a resampled feature hardly gets among the k largest.
    resampled_encoder_norm: ClassVar[float] = 1.0
    cfg: TopKConfig

    def activation(self, pre: Tensor) -> Tensor:
        values, index = pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, index, values.relu())

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        dense = centred_ND.device.type != "cpu" or SPARSE_FROM_RATIO * self.cfg.k > self.d_sae
        if dense:
            return super().training_codes(centred_ND, places)
        bias_F = self.b_enc + self.b_dec_gradient_path()
        values_NK, index_NK, *entries = _SparseEncode.apply(
            centred_ND, self.W_enc, bias_F, self.cfg.k
        )
        values_NK = values_NK.relu() * places.valid_N1
        features_NF = values_NK.new_zeros(len(centred_ND), self.d_sae)
        features_NF = features_NF.scatter(-1, index_NK, values_NK)
        values_NK = values_NK.float()
        decoded_ND = embedding_bag(
            index_NK, self.W_dec.detach(), per_sample_weights=values_NK, mode="sum"
        )
        decoded_ND = _DecoderGradient.apply(
            decoded_ND, self.W_dec, values_NK.detach(), _Entries(*entries)
        )
        sparse = SparseCodes(values_NK, index_NK, entries[0], self.d_sae)
        return Codes(features_NF, decoded_ND, sparse=sparse)

    def saelens_state(self) -> SAELensState:
        # Rows of norm 1 make rescaling by the decoder's norm an identity: the plain form is saved.
        extra = {"k": self.cfg.k, "rescale_acts_by_decoder_norm": False}
        return super().saelens_state()._replace(cfg=extra)

    @classmethod
    def saelens_fields(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        return {"d_sae": cfg["d_sae"], "k": cfg["k"]}

    def load_saelens(self, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load_saelens(cfg, tensors)
        if cfg.get("rescale_acts_by_decoder_norm", False):
            with torch.no_grad():
                norm_F = self.W_dec.norm(dim=1)
                self.W_enc.mul_(norm_F)
                self.b_enc.mul_(norm_F)
                self.W_dec.div_(norm_F[:, None])


class _Entries(NamedTuple):
    """The M = N * k chosen (token, feature) pairs, sorted by feature."""

    order_M: Tensor
    """Positions in the flattened [N, k] tensors."""
    token_M: Tensor
    start_F: Tensor
    """Where each feature's entries begin."""

    def gradient(self, weight_NK: Tensor, rows_ND: Tensor) -> Tensor:
        """[d_sae, d_in]: row j = sum over the entries of feature j of weight * rows[token]."""
        weight_M = weight_NK.flatten()[self.order_M]
        return embedding_bag(
            self.token_M, rows_ND, self.start_F, per_sample_weights=weight_M, mode="sum"
        )


def _sorted_by_feature(index_NK: Tensor, d_sae: int) -> _Entries:
    feature_M = index_NK.flatten()
    order_M = feature_M.argsort(stable=True)
    count_F = torch.bincount(feature_M, minlength=d_sae)
    return _Entries(order_M, order_M // index_NK.shape[1], count_F.cumsum(0) - count_F)


class _SparseEncode(torch.autograd.Function):
    """addmm and top-k; the backward pass visits the chosen entries only."""

    @staticmethod
    def forward(ctx, centred_ND, W_enc, bias_F, k):  # type: ignore[no-untyped-def]
        pre_NF = torch.addmm(bias_F, centred_ND, W_enc)
        values_NK, index_NK = pre_NF.topk(k, dim=-1, sorted=False)
        entries = _sorted_by_feature(index_NK, pre_NF.shape[1])
        ctx.save_for_backward(centred_ND, index_NK, *entries)
        ctx.mark_non_differentiable(index_NK, *entries)
        return values_NK, index_NK, *entries

    @staticmethod
    def backward(ctx, grad_NK, *_):  # type: ignore[no-untyped-def]
        centred_ND, index_NK, *saved = ctx.saved_tensors
        entries = _Entries(*saved)
        grad_NK = grad_NK.float()
        grad_bias_F = grad_NK.new_zeros(len(entries.start_F))
        grad_bias_F.index_add_(0, index_NK.flatten(), grad_NK.flatten())
        return None, entries.gradient(grad_NK, centred_ND).T, grad_bias_F, None


class _DecoderGradient(torch.autograd.Function):
    """Identity on the decoded batch that gives W_dec its gradient from the chosen entries.

    embedding_bag's own gradient for its weight goes entry by entry: ten times slower.
    """

    @staticmethod
    def forward(ctx, decoded_ND, W_dec, values_NK, entries):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values_NK, *entries)
        return decoded_ND.view_as(decoded_ND)

    @staticmethod
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        values_NK, *saved = ctx.saved_tensors
        return grad_ND, _Entries(*saved).gradient(values_NK, grad_ND), None, None
