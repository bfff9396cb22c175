"""The standard SAE: ReLU and an L1 penalty.

Bricken et al. 2023 (Towards Monosemanticity, Anthropic); the penalty weighted by the decoder's
norms as in Conerly et al. 2024 (Anthropic's April update).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from tcsae.config.sae import SAEConfig, StandardConfig
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import Codes, Moment, Places
from tcsae.sae.fast import DenseCodes
from tcsae.tensors.sums import RowNorms


class StandardSAE(SparseAutoencoder):
    """f = ReLU(pre), with the sparsity term

    l1_coefficient * sqrt(d_in) * warmup * mean over valid tokens of sum_j f_j |W_dec_j|.

    The factor makes the coefficient mean the same at any width: training inputs have norm
    sqrt(d_in), so activations grow with it and the squared error with its square.
    """

    config_class: ClassVar[type[SAEConfig]] = StandardConfig
    shares_batches: ClassVar[bool] = True
    cfg: StandardConfig

    def activation(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        bias_F = self.b_enc + self.b_dec_gradient_path()
        features_NF, decoded_ND, sums_F = DenseCodes.apply(
            centred_ND, self.W_enc, bias_F, self.W_dec, places.valid_N1
        )
        return Codes(features_NF, decoded_ND, sums_F=sums_F)

    def architecture_losses(
        self, codes: Codes, x_ND: Tensor, places: Places, now: Moment
    ) -> dict[str, Tensor]:
        # Summed over tokens first: no second [N, d_sae] tensor for the weighted features.
        sums_F = codes.sums_F
        if sums_F is None:
            sums_F = codes.features_NF.sum(0, dtype=torch.float32)
        l1 = sums_F @ RowNorms.apply(self.W_dec) / places.n_valid
        weight = self.cfg.l1_coefficient * math.sqrt(self.d_in) * now.sparsity_warmup
        return {"sparsity": weight * l1}
