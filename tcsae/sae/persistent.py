"""The Persistent SAE: a feature is a leaky memory of its sparse activations.

arXiv 2607.17117. Each feature keeps its state for a time of its own, learned with everything else:
features that stand for lasting things may be lasting without any penalty on their codes.

Shapes: B contexts, T positions, N = B * T tokens, F features.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tcsae.config.sae import LONGEST, PersistentConfig, SAEConfig
from tcsae.products import products_for
from tcsae.sae.codes import Codes, Places, SAELensState
from tcsae.sae.fast import sparse_codes
from tcsae.sae.topk import TopKSAE, chosen_of_token
from tcsae.tensors.positions import as_contexts, document_starts, permute_within_segments, reordered


class PersistentSAE(TopKSAE):
    """a_t = ReLU(the k largest pre-activations), h_t = l h_{t-1} + (1 - l) a_t,
    x_hat = h W_dec + b_dec

    with l_j = LONGEST * sigmoid(theta_j). The features are h: what is decoded. L0 therefore counts
    every feature whose memory is not yet empty, many more than k, and falls no faster than l does.
    Memory begins empty at every document; tokens that are not valid leave it as it is, and have no
    code of their own. A temporal loss acts on h.

    In training what is added is selected and gets its gradients as sparse codes do. The memory, its
    decoding and the temporal loss are dense: a token remembers what its document has added so far,
    several times k features, more than dense products of them cost.
    """

    is_recordable: ClassVar[bool] = False
    config_class: ClassVar[type[SAEConfig]] = PersistentConfig
    sequential: ClassVar[bool] = True
    cfg: PersistentConfig
    theta: torch.nn.Parameter

    def add_encoder_vectors(self) -> None:
        super().add_encoder_vectors()
        share = self.cfg.initial_retention / LONGEST
        self.theta = torch.nn.Parameter(torch.full((self.d_sae,), math.log(share / (1 - share))))

    @property
    def retention(self) -> Tensor:
        """l [d_sae]."""
        return LONGEST * self.theta.sigmoid()

    def encode(
        self, x: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Contexts [B, T, d_in], or one context [T, d_in], or one token [d_in] -> h."""
        contexts_BTD, segments_BT, valid_BT = as_contexts(x, segments, valid)
        kept_BTD = torch.where(valid_BT[..., None], contexts_BTD, self.b_dec)
        added_BTF = super().encode(kept_BTD) * valid_BT[..., None]
        h_BTF = remember(added_BTF, self.retention, segments_BT, valid_BT)
        return h_BTF.reshape(*x.shape[:-1], self.d_sae)

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        added_NF, pre_NF = self._added(centred_ND, places)
        added_BTF = added_NF.view(*places.valid_BT.shape, self.d_sae)
        order_BT = None
        if self.cfg.shuffle_positions:
            generator = places.generator or torch.default_generator
            order_BT = permute_within_segments(places.segments_BT, places.valid_BT, generator)
            added_BTF = reordered(added_BTF, order_BT)
        h_BTF = remember(added_BTF, self.retention, places.segments_BT, places.valid_BT)
        if order_BT is not None:
            h_BTF = reordered(h_BTF, order_BT.argsort(dim=1))
        h_NF = h_BTF.flatten(0, 1)
        return Codes(h_NF, h_NF @ self.W_dec, pre_NF)

    def _added(self, centred_ND: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        """(a [N, F] float32, dense; the pre-activations, where all of them are at hand)."""
        if not products_for(centred_ND.device).is_sparse(self.cfg.k, self.d_sae):
            pre_NF = self.training_pre_activations(centred_ND, places)
            return self.activation(pre_NF).float(), pre_NF
        bias_F = self.b_enc + self.b_dec_gradient_path()
        select = partial(chosen_of_token, places=places, k=self.cfg.k)
        codes = sparse_codes(centred_ND, self.W_enc, bias_F, select, self.cfg.group_sizes)
        return codes._replace(dtype=codes.values_M.dtype).dense(), None

    def saelens_state(self) -> SAELensState:
        return super().saelens_state()._replace(cfg={"k": self.cfg.k})


def remember(added_BTF: Tensor, l_F: Tensor, segments_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """h_t = l h_{t-1} + (1 - l) a_t over the valid tokens of each document, zero at the others.

    `added_BTF` must be zero where `valid_BT` is false.
    """
    kept_BT = (~document_starts(segments_BT)).to(added_BTF.dtype)
    return _Remember.apply(added_BTF, l_F, kept_BT, valid_BT)


class _Remember(torch.autograd.Function):
    """The recurrence and its gradient, position by position: each is one pass over [B, F].

    With r_t = 0 at a document's first token (else 1) and v_t = 1 at a valid one (else 0):

        s_t = r_t (1 - v_t (1 - l)) s_{t-1} + (1 - l) a_t,      h_t = v_t s_t
        g_t = dL/ds_t = v_t dL/dh_t + r_{t+1} (1 - v_{t+1} (1 - l)) g_{t+1}
        dL/da_t = (1 - l) g_t,      dL/dl = sum v_t (r_t s_{t-1} - a_t) g_t
    """

    @staticmethod
    def forward(
        ctx: Any, added_BTF: Tensor, l_F: Tensor, kept_BT: Tensor, valid_BT: Tensor
    ) -> Tensor:
        new_F = 1 - l_F
        states_BTF = added_BTF * new_F
        for t in range(1, added_BTF.shape[1]):
            states_BTF[:, t].addcmul_(_carried(t, new_F, kept_BT, valid_BT), states_BTF[:, t - 1])
        ctx.save_for_backward(added_BTF, states_BTF, l_F, kept_BT, valid_BT)
        return states_BTF * valid_BT[..., None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTF: Tensor) -> Any:
        added_BTF, states_BTF, l_F, kept_BT, valid_BT = ctx.saved_tensors
        new_F = 1 - l_F
        g_BTF = grad_BTF * valid_BT[..., None]
        for t in range(added_BTF.shape[1] - 1, 0, -1):
            g_BTF[:, t - 1].addcmul_(_carried(t, new_F, kept_BT, valid_BT), g_BTF[:, t])
        before_BTF = torch.zeros_like(states_BTF)
        before_BTF[:, 1:] = states_BTF[:, :-1] * kept_BT[:, 1:, None]
        pull_BTF = (before_BTF - added_BTF) * valid_BT[..., None]
        return g_BTF * new_F, (pull_BTF * g_BTF).sum((0, 1)), None, None


def _carried(t: int, new_F: Tensor, kept_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """[B, F]: what of the state at t - 1 is left at t."""
    return kept_BT[:, t, None] * (1 - valid_BT[:, t, None] * new_F)
