"""The Matryoshka SAE: nested BatchTopK dictionaries, each of which must rebuild the input alone.

Bussmann, Nabeshima, Karvonen and Nanda 2025 (arXiv 2503.17547). The first features serve in every
dictionary and become general ones; later ones add detail. Selection, threshold, initialisation and
AuxK are those of BatchTopK.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, ClassVar

from torch import Tensor

from tcsae.config.sae import MatryoshkaConfig, SAEConfig
from tcsae.products.plain import Chosen
from tcsae.sae.batchtopk import BatchTopKSAE
from tcsae.sae.codes import Codes, Moment, Places, SAELensState
from tcsae.sae.topk import chosen_of_token, largest_of_token


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK codes; the loss is the sum over the nested dictionaries i of the mean over valid
    tokens of |x - b_dec - sum of f_j W_dec_j over the groups 0 to i|^2.

    "reconstruction" is the largest dictionary's share, "inner" all others'. They are as many times
    the loss of BatchTopK as there are groups: so much less does the same lambda weigh.

    With `selection="token"` the codes are TopK's, in training and in use: there is no threshold.
    On a synthetic world a short training finds twice as many true features so (docs/meaning.md).
    """

    is_recordable: ClassVar[bool] = False
    config_class: ClassVar[type[SAEConfig]] = MatryoshkaConfig
    cfg: MatryoshkaConfig

    def activation(self, pre: Tensor) -> Tensor:
        if self.cfg.selection == "token":
            return largest_of_token(pre, self.cfg.k)
        return super().activation(pre)

    def chosen(self, pre_NF: Tensor, places: Places) -> Chosen:
        if self.cfg.selection == "token":
            return chosen_of_token(pre_NF, places, self.cfg.k)
        return super().chosen(pre_NF, places)

    def dense_codes(self, pre_NF: Tensor, places: Places) -> Codes:
        if self.cfg.selection == "token":
            features_NF, least = self.activation(pre_NF), None
        else:
            features_NF, least = self.batch_activation(pre_NF, places)
        sizes = self.cfg.group_sizes
        groups = zip(features_NF.split(sizes, dim=1), self.W_dec.split(sizes), strict=True)
        *inner, decoded_ND = accumulate((f @ W_dec).float() for f, W_dec in groups)
        return Codes(features_NF, decoded_ND, pre_NF, least=least, extra=tuple(inner))

    def architecture_losses(
        self, codes: Codes, x_ND: Tensor, places: Places, now: Moment
    ) -> dict[str, Tensor]:
        target_ND = x_ND - self.b_dec
        errors = [(decoded_ND - target_ND).square().sum() for decoded_ND in codes.extra]
        return {"inner": sum(errors, start=target_ND.new_zeros(())) / places.n_valid}

    def after_step(self, codes: Codes, *, progress: float) -> None:
        if self.cfg.selection == "batch":
            super().after_step(codes, progress=progress)

    def saelens_state(self) -> SAELensState:
        state = super().saelens_state()
        if self.cfg.selection == "batch":
            return state
        tensors = {name: value for name, value in state.tensors.items() if name != "threshold"}
        fields = {"k": self.cfg.k, "rescale_acts_by_decoder_norm": False}
        return SAELensState("topk", fields, tensors)

    def load_saelens(self, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        # TopK's have no threshold: ours keeps its 0.
        super().load_saelens(cfg, {"threshold": self.threshold, **tensors})
