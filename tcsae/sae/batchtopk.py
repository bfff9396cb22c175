"""The BatchTopK SAE: the k * N largest pre-activations of a batch of N tokens, then ReLU.

Bussmann, Leask and Nanda 2024 (arXiv 2412.06410). A token gets as many features as it needs, k on
average. Outside training a token must not depend on its batch: there a feature fires above one
threshold, the mean over training batches of the least activation that was kept.
Initialisation and AuxK are those of TopK (Gao et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tcsae.config.sae import BatchTopKConfig, SAEConfig
from tcsae.products import products_for
from tcsae.products.plain import Chosen
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import Codes, Places, SAELensState
from tcsae.sae.fast import sparse_pass


class BatchTopKSAE(SparseAutoencoder):
    """Training: f = pre where it is among the k * N largest of the batch and above 0, else 0.
    Use: f = pre where pre > threshold, else 0.

    `threshold` [d_sae], the same for all features, is a buffer; it is the plain mean of the batches
    until 1 / threshold_rate of them were seen. In bfloat16 many pre-activations are equal: all that
    tie with the smallest chosen one are kept.
    """

    config_class: ClassVar[type[SAEConfig]] = BatchTopKConfig
    preactivation_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    is_recordable: ClassVar[bool] = True
    # As in topk: at 0.2 a resampled feature hardly gets among the largest.
    resampled_encoder_norm: ClassVar[float] = 1.0
    cfg: BatchTopKConfig
    threshold: Tensor
    n_batches: Tensor

    def add_encoder_vectors(self) -> None:
        super().add_encoder_vectors()
        self.register_buffer("threshold", torch.zeros(self.d_sae))
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.long))

    def activation(self, pre: Tensor) -> Tensor:
        return torch.where(pre > self.threshold, pre, 0).relu()

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        if not products_for(centred_ND.device).is_sparse(self.cfg.k, self.d_sae):
            return self.dense_codes(self.training_pre_activations(centred_ND, places), places)
        bias_F = self.b_enc + self.b_dec_gradient_path()
        select = partial(self.chosen, places=places)
        codes = sparse_pass(
            centred_ND, self.W_enc, bias_F, self.W_dec, select, self.cfg.group_sizes
        )
        assert codes.sparse is not None
        values_M = codes.sparse.values_M.detach()
        codes.least = values_M.new_full((), torch.inf)
        if len(values_M):  # entries of 0 fill up what was not chosen
            codes.least = torch.where(values_M > 0, values_M, torch.inf).min()
        return codes

    def dense_codes(self, pre_NF: Tensor, places: Places) -> Codes:
        """Those of all pre-activations, and their decoding."""
        features_NF, least = self.batch_activation(pre_NF, places)
        return Codes(features_NF, features_NF @ self.W_dec, pre_NF, least=least)

    def chosen(self, pre_NF: Tensor, places: Places) -> Chosen:
        """The pre-activations that a training batch keeps."""
        products = products_for(pre_NF.device)
        return products.largest_of_batch(pre_NF, places.valid_N1, self.cfg.k)

    def batch_activation(self, pre_NF: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """The k * (valid tokens) largest entries above 0, and the least of them (inf: none)."""
        products, usual = products_for(pre_NF.device), self.threshold[0]
        with torch.no_grad():
            least = products.least_kept(pre_NF, places.valid_N1, self.cfg.k, usual)
        # In this order a NaN is kept, and is noticed.
        return torch.where(pre_NF < least, 0, pre_NF), least

    @torch.no_grad()
    def after_step(self, codes: Codes, *, progress: float) -> None:
        """Take the least activation that the batch kept into the threshold."""
        assert codes.least is not None
        smallest = codes.least
        kept_any = smallest < torch.inf
        self.n_batches += kept_any
        rate = (1 / self.n_batches).clamp(min=self.cfg.threshold_rate)
        smallest = torch.where(kept_any, smallest, 0).to(self.threshold)
        self.threshold.lerp_(smallest.expand_as(self.threshold), torch.where(kept_any, rate, 0))

    def saelens_state(self) -> SAELensState:
        # SAELens saves its own BatchTopK SAEs under this name, and loads them under no other.
        state = super().saelens_state()
        tensors = {**state.tensors, "threshold": self.threshold}
        return SAELensState("jumprelu", {}, tensors)

    def load_saelens(self, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load_saelens(cfg, tensors)
        self.threshold.copy_(tensors["threshold"])
