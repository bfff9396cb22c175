"""The p-annealed SAE: a ReLU SAE whose L1 penalty turns step by step into an Lp penalty, p < 1.

Karvonen et al. 2024 (arXiv 2408.00113, "p-annealing"), and their code in dictionary_learning.
L1 shrinks all activations alike; as p falls towards 0 the penalty counts features instead.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tcsae.config.sae import PAnnealConfig, SAEConfig
from tcsae.products import products_for
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import Codes, Moment, Places, SAELensState
from tcsae.tensors.over_ranks import summed

# An entry near 0 would have a gradient of f^(p - 1) without bound, in one batch worth more than all
# others together; this much, as a share of the inputs' norm, bounds it.
SMOOTHING = 1e-3


class PAnnealSAE(SparseAutoencoder):
    """f = ReLU(pre), with the sparsity term

    c_p * sqrt(d_in) * warmup * mean over valid tokens of sum_j ((f_j + e)^p - e^p),

    e = SMOOTHING * sqrt(d_in); p = 1 gives the L1 term of `standard`, c_1 = l1_coefficient.
    Whenever p falls, c_p is multiplied by penalty(old p) / penalty(new p), so that the strength of
    the term does not jump (the paper averages the ratio over the last batches, small ones; here it
    is that of the batch at hand). Units cancel in it. `exponent` and `strength` (c_p / c_1) are
    buffers: a run that is resumed goes on with them.
    """

    config_class: ClassVar[type[SAEConfig]] = PAnnealConfig
    shares_batches: ClassVar[bool] = True
    cfg: PAnnealConfig
    exponent: Tensor
    strength: Tensor

    def add_encoder_vectors(self) -> None:
        super().add_encoder_vectors()
        self.register_buffer("exponent", torch.ones(()))
        self.register_buffer("strength", torch.ones(()))
        self.exponent_now = 1.0  # `exponent`, as the host knows it
        self.register_load_state_dict_post_hook(_read_exponent)

    def activation(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def scheduled_exponent(self, progress: float) -> float:
        """p at `progress` in [0, 1]: 1 before anneal_start, then a stairway down to p_end."""
        cfg = self.cfg
        if progress < cfg.anneal_start:
            return 1.0
        done = (progress - cfg.anneal_start) / (1 - cfg.anneal_start)
        stage = min(int(done * cfg.anneal_stages) + 1, cfg.anneal_stages)
        return 1 - (1 - cfg.p_end) * stage / cfg.anneal_stages

    def architecture_losses(
        self, codes: Codes, x_ND: Tensor, places: Places, now: Moment
    ) -> dict[str, Tensor]:
        penalty = self._penalty(codes.features_NF, self.scheduled_exponent(now.progress))
        weight = self.cfg.l1_coefficient * math.sqrt(self.d_in) * now.sparsity_warmup
        strength = self._strength_at(codes.features_NF, now.progress)
        return {"sparsity": weight * strength * penalty / places.n_valid}

    @torch.no_grad()
    def after_step(self, codes: Codes, *, progress: float) -> None:
        """Go on with this step's exponent and strength."""
        exponent = self.scheduled_exponent(progress)
        if self._falls(exponent):
            self.strength.copy_(self._strength_at(codes.features_NF, progress))
            self.exponent.fill_(exponent)
            self.exponent_now = float(np.float32(exponent))  # as a checkpoint would have it

    def _falls(self, exponent: float) -> bool:
        """Whether it is another than that of the step before."""
        return not math.isclose(self.exponent_now, exponent, rel_tol=1e-6)

    @torch.no_grad()
    def _strength_at(self, features_NF: Tensor, progress: float) -> Tensor:
        """`strength`, or where the exponent falls what makes up for it in this batch."""
        exponent = self.scheduled_exponent(progress)
        if not self._falls(exponent):
            return self.strength.clone()  # the graph keeps it, and `after_step` changes it
        old = summed(self._penalty(features_NF, self.exponent_now))
        new = summed(self._penalty(features_NF, exponent))
        # A batch in which nothing fires says nothing about the ratio.
        return self.strength * torch.where((old > 0) & (new > 0), old / new, 1)

    def _penalty(self, features_NF: Tensor, exponent: float) -> Tensor:
        """Sum over tokens and features, float32."""
        if exponent == 1:
            return features_NF.sum(dtype=torch.float32)
        smoothing = SMOOTHING * math.sqrt(self.d_in)

        def power(f: Tensor) -> Tensor:
            return (f + smoothing).pow(exponent) - smoothing**exponent

        # Powers are dear, and those of zeros add nothing.
        return products_for(features_NF.device).sum_where_on(features_NF, power)

    def saelens_state(self) -> SAELensState:
        return super().saelens_state()._replace(architecture="standard")


def _read_exponent(module: Any, _keys: object) -> None:
    module.exponent_now = module.exponent.item()
