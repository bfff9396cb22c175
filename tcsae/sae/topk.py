"""The TopK SAE: the k largest pre-activations of each token, then ReLU.

Gao et al. 2024 (arXiv 2406.04093, section 2.3). No sparsity term: k is the sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tcsae.config.sae import SAEConfig, TopKConfig
from tcsae.products import products_for
from tcsae.products.plain import Chosen
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import Codes, Places, SAELensState
from tcsae.sae.fast import sparse_pass


def largest_of_token(pre: Tensor, k: int) -> Tensor:
    """ReLU of the k largest entries of the last dimension, zero elsewhere; [..., d_sae]."""
    values, index = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, index, values.relu())


def chosen_of_token(pre_NF: Tensor, places: Places, k: int) -> Chosen:
    """The k largest entries of every row; 0 at tokens that are not valid."""
    values_NK, index_NK = products_for(pre_NF.device).top_k(pre_NF, k)
    tokens_N = torch.arange(len(pre_NF), device=pre_NF.device)
    values_NK = values_NK * places.valid_N1
    return values_NK.flatten(), index_NK.flatten(), tokens_N.repeat_interleave(k)


class TopKSAE(SparseAutoencoder):
    """f = ReLU(the k largest pre-activations), zero elsewhere.

    In training on a CPU the products that follow the selection touch the k chosen features
    only. The values are those of the dense path, in float32 where autocast would round.
    """

    config_class: ClassVar[type[SAEConfig]] = TopKConfig
    shares_batches: ClassVar[bool] = True
    is_recordable: ClassVar[bool] = True
    # At 0.2, as for ReLU, a resampled feature hardly gets among the k largest.
    resampled_encoder_norm: ClassVar[float] = 1.0
    cfg: TopKConfig

    def activation(self, pre: Tensor) -> Tensor:
        return largest_of_token(pre, self.cfg.k)

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        if not products_for(centred_ND.device).is_sparse(self.cfg.k, self.d_sae):
            return super().training_codes(centred_ND, places)
        bias_F = self.b_enc + self.b_dec_gradient_path()
        select = partial(chosen_of_token, places=places, k=self.cfg.k)
        return sparse_pass(centred_ND, self.W_enc, bias_F, self.W_dec, select, self.cfg.group_sizes)

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
