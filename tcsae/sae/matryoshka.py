"""The Matryoshka SAE: nested BatchTopK dictionaries, each of which must rebuild the input alone.

Bussmann, Nabeshima, Karvonen and Nanda 2025 (arXiv 2503.17547). The first features serve in every
dictionary and become general ones; later ones add detail. Selection, threshold, initialisation and
AuxK are those of BatchTopK.
"""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

from torch import Tensor

from tcsae.config.sae import MatryoshkaConfig, SAEConfig
from tcsae.sae.batchtopk import BatchTopKSAE
from tcsae.sae.codes import Codes, Moment, Places


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK codes; the loss is the sum over the nested dictionaries i of the mean over valid
    tokens of |x - b_dec - sum of f_j W_dec_j over the groups 0 to i|^2.

    "reconstruction" is the largest dictionary's share, "inner" all others'. They are as many times
    the loss of BatchTopK as there are groups: so much less does the same lambda weigh.
    """

    is_recordable: ClassVar[bool] = False
    config_class: ClassVar[type[SAEConfig]] = MatryoshkaConfig
    cfg: MatryoshkaConfig

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        pre_NF = self.training_pre_activations(centred_ND, places)
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
