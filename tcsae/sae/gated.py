"""The Gated SAE: one path decides which features fire, another how strongly.

Rajamanoharan et al. 2024a (arXiv 2404.16014, section 3). The L1 penalty sits on the gates alone, so
that it does not shrink the activations; the encoders of both paths share their directions.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from tcsae.config.sae import GatedConfig, SAEConfig
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import Codes, Moment, Places


class GatedSAE(SparseAutoencoder):
    """gate = (x - b_dec) @ W_enc + b_gate, mag = (x - b_dec) @ (W_enc * exp(r_mag)) + b_mag,
    f = ReLU(mag) where gate > 0, else 0. Beside the reconstruction:

    sparsity = l1_coefficient * sqrt(d_in) * warmup * mean of sum_j ReLU(gate_j)
    gate     = mean of |x - ReLU(gate) @ W_dec - b_dec|^2, decoder and b_dec there frozen

    The step has no gradient: the gates learn from these two terms, and the frozen copy keeps them
    from spoiling the decoder. r_mag, b_gate, b_mag start as 0. Two products more
    than a ReLU SAE. A loss on the features reaches the encoder through the magnitudes.
    """

    config_class: ClassVar[type[SAEConfig]] = GatedConfig
    shares_batches: ClassVar[bool] = True
    preactivation_units: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag")
    cfg: GatedConfig

    def add_encoder_vectors(self) -> None:
        self.b_gate = torch.nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = torch.nn.Parameter(torch.zeros(self.d_sae))
        self.r_mag = torch.nn.Parameter(torch.zeros(self.d_sae))

    @property
    def b_enc(self) -> torch.nn.Parameter:  # type: ignore[override]
        """b_mag, the bias of the activations' size; there is no tensor of this name."""
        return self.b_mag

    def pre_activations(self, centred: Tensor) -> Tensor:
        """The projections, before either path's bias."""
        return centred @ self.W_enc

    def activation(self, pre: Tensor) -> Tensor:
        magnitude = torch.relu(pre * self.r_mag.exp() + self.b_mag)
        return torch.where(pre + self.b_gate > 0, magnitude, 0)

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        path_F = self.b_dec_gradient_path()
        projected_NF = torch.addmm(path_F, centred_ND, self.W_enc)
        dtype = projected_NF.dtype
        gate_NF = (projected_NF + self.b_gate.to(dtype)).relu() * places.valid_N1
        magnitude_NF = torch.addcmul(
            self.b_mag.to(dtype), projected_NF, self.r_mag.exp().to(dtype)
        ).relu()
        features_NF = torch.where(gate_NF > 0, magnitude_NF, 0)
        decoded_by_gate_ND = gate_NF @ self.W_dec.detach()
        return Codes(features_NF, features_NF @ self.W_dec, extra=(gate_NF, decoded_by_gate_ND))

    def architecture_losses(
        self, codes: Codes, x_ND: Tensor, places: Places, now: Moment
    ) -> dict[str, Tensor]:
        gate_NF, decoded_by_gate_ND = codes.extra
        weight = self.cfg.l1_coefficient * math.sqrt(self.d_in) * now.sparsity_warmup
        error_ND = decoded_by_gate_ND.float() - (x_ND - self.b_dec.detach())
        return {
            "sparsity": weight * gate_NF.sum(dtype=torch.float32) / places.n_valid,
            "gate": error_ND.square().sum() / places.n_valid,
        }

    def dead_pre_activations(self, centred_ND: Tensor, dead_J: Tensor) -> Tensor:
        return torch.addmm(self.b_gate[dead_J], centred_ND, self.W_enc[:, dead_J])

    def reset_encoder_vectors(self, dead_J: Tensor) -> None:
        for vector in (self.b_gate, self.b_mag, self.r_mag):
            vector[dead_J] = 0.0
