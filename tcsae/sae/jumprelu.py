"""The JumpReLU SAE: a threshold for every feature, learned with a straight-through estimator.

Rajamanoharan et al. 2024b (arXiv 2407.14435): the L0 ("step") penalty, with a rectangle kernel.
Conerly et al. 2025 (Anthropic's January update): the tanh penalty, the estimator also towards the
encoder, a loss on the pre-activations that keeps features from dying, and an encoder that starts
small and dense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tcsae.config.sae import JumpReLUConfig, SAEConfig
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import Codes, Moment, Places, SAELensState

FIRST_FIRINGS = 10_000
"""Features per token that the tanh form starts with (January update); at most half of d_sae."""


class JumpReLUSAE(SparseAutoencoder):
    """f = pre where pre > threshold, else 0, with the sparsity term

    l0_coefficient * d_in * warmup * mean over valid tokens of sum_j H(pre_j - threshold_j)

    (step), H the Heaviside step, or of sum_j tanh(tanh_scale / sqrt(d_in) * f_j). Estimators, with
    K = 1 where |pre - threshold| < bandwidth / 2, else 0 (section 3 of the first paper):

        df / dthreshold = -threshold / bandwidth * K        dH / dthreshold = -1 / bandwidth * K

    and, for tanh only, df / dpre = 1 where it fires + threshold / bandwidth * K. Decoder norms,
    which the update has in its losses, are 1 here. tanh starts with W_enc = d_in / d_sae * W_dec^T
    and biases at which a feature fires in FIRST_FIRINGS / d_sae of the tokens.

    The parameter is threshold / `threshold_unit`: Adam moves a parameter by at most the learning
    rate a step, and with the step penalty thresholds alone make features rare, so that they have as
    far to go as the inputs' norm is large. (The papers learn the logarithm, which in short runs
    hardly moves.) It never falls below 0.
    """

    config_class: ClassVar[type[SAEConfig]] = JumpReLUConfig
    shares_batches: ClassVar[bool] = True
    preactivation_units: ClassVar[tuple[str, ...]] = ("b_enc", "scaled_threshold")
    cfg: JumpReLUConfig

    def __init__(
        self, cfg: JumpReLUConfig, d_in: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(cfg, d_in, generator)
        if cfg.penalty == "tanh":
            with torch.no_grad():
                self.W_enc.mul_(d_in / cfg.d_sae)

    def add_encoder_vectors(self) -> None:
        super().add_encoder_vectors()
        first_F = torch.full((self.d_sae,), self.first_scaled_threshold)
        self.scaled_threshold = torch.nn.Parameter(first_F)

    @property
    def first_scaled_threshold(self) -> float:
        return self.cfg.initial_threshold * math.sqrt(self.d_in) / self.threshold_unit

    @property
    def threshold_unit(self) -> float:
        """The norm of the training inputs, as a power of two: no bit is lost on the way.

        1 for tanh, where the encoder does most of it.
        """
        if self.cfg.penalty == "tanh":
            return 1.0
        return 2.0 ** round(math.log2(math.sqrt(self.d_in)))

    @property
    def threshold(self) -> Tensor:
        """[d_sae], in the units of the pre-activations."""
        return self.scaled_threshold * self.threshold_unit

    @property
    def bandwidth(self) -> float:
        """In the units of training."""
        return self.cfg.bandwidth * math.sqrt(self.d_in)

    def activation(self, pre: Tensor) -> Tensor:
        return torch.where(pre > self.threshold, pre, 0)

    def initialise_from_data(self, x_ND: Tensor) -> None:
        """b_dec as for all; for tanh also b_enc, so that features fire as often as they should."""
        super().initialise_from_data(x_ND)
        if self.cfg.penalty == "tanh":
            share = min(FIRST_FIRINGS / self.d_sae, 0.5)
            with torch.no_grad():
                pre_NF = (x_ND.float() - self.b_dec) @ self.W_enc
                rank = max(round((1 - share) * len(pre_NF)), 1)
                self.b_enc.copy_(self.threshold - pre_NF.kthvalue(rank, dim=0).values)

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        pre_NF = self.training_pre_activations(centred_ND, places)
        to_input = self.cfg.penalty == "tanh"
        features_NF, firings = _JumpReLU.apply(
            pre_NF, self.threshold, places.valid_N1, self.bandwidth, to_input
        )
        return Codes(features_NF, features_NF @ self.W_dec, pre_NF, extra=(firings,))

    def architecture_losses(
        self, codes: Codes, x_ND: Tensor, places: Places, now: Moment
    ) -> dict[str, Tensor]:
        cfg, (count,) = self.cfg, codes.extra
        if cfg.penalty == "tanh":
            scaled_NF = codes.features_NF * (cfg.tanh_scale / math.sqrt(self.d_in))
            count = scaled_NF.tanh().sum(dtype=torch.float32)
        weight = cfg.l0_coefficient * self.d_in * now.sparsity_warmup
        losses = {"sparsity": weight * count / places.n_valid}
        if cfg.preact_coefficient > 0:
            assert codes.pre_NF is not None
            threshold_F = self.threshold.to(codes.pre_NF.dtype)
            below_NF = (threshold_F - codes.pre_NF).relu() * places.valid_N1
            weight = cfg.preact_coefficient * math.sqrt(self.d_in)
            losses["preact"] = weight * below_NF.sum(dtype=torch.float32) / places.n_valid
        return losses

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.scaled_threshold.clamp_(min=0)

    def reset_encoder_vectors(self, dead_J: Tensor) -> None:
        super().reset_encoder_vectors(dead_J)
        self.scaled_threshold[dead_J] = self.first_scaled_threshold

    def saelens_state(self) -> SAELensState:
        tensors = dict(super().saelens_state().tensors)
        del tensors["scaled_threshold"]
        tensors["threshold"] = self.threshold.detach()
        return SAELensState("jumprelu", {}, tensors)

    def load_saelens(self, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        # A negative threshold lets through what SAELens' ReLU takes away: the same as 0.
        scaled = tensors["threshold"].float().clamp(min=0) / self.threshold_unit
        super().load_saelens(cfg, {**tensors, "scaled_threshold": scaled})


class _JumpReLU(torch.autograd.Function):
    """(features [N, F], number of entries that fire), with the straight-through estimators.

    Tokens that are not valid must have pre-activation 0: they neither fire nor move a threshold.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pre_NF: Tensor,
        threshold_F: Tensor,
        valid_N1: Tensor,
        bandwidth: float,
        to_input: bool,
    ) -> tuple[Tensor, Tensor]:
        on_NF = pre_NF > threshold_F
        near_NF = ((pre_NF - threshold_F).abs() < bandwidth / 2) & valid_N1
        ctx.save_for_backward(on_NF, near_NF, threshold_F)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return torch.where(on_NF, pre_NF, 0), on_NF.sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor, grad_count: Tensor) -> Any:
        on_NF, near_NF, threshold_F = ctx.saved_tensors
        near_grad_NF = torch.where(near_NF, grad_NF, 0)
        pull_F = threshold_F * near_grad_NF.sum(0, dtype=torch.float32)
        grad_threshold_F = -(pull_F + grad_count * near_NF.sum(0)) / ctx.bandwidth
        grad_pre_NF = torch.where(on_NF, grad_NF, 0)
        if ctx.to_input:
            slope_F = (threshold_F / ctx.bandwidth).to(grad_NF.dtype)
            grad_pre_NF = grad_pre_NF.addcmul(near_grad_NF, slope_F)
        return grad_pre_NF, grad_threshold_F, None, None, None
