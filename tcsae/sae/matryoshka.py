"""The Matryoshka SAE: nested BatchTopK dictionaries, each of which must rebuild the input alone.

Bussmann, Nabeshima, Karvonen and Nanda 2025 (arXiv 2503.17547). The first features serve in every
dictionary and become general ones; later ones add detail. Selection, threshold, initialisation and
AuxK are those of BatchTopK.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tcsae.sae.base import SAEConfig
from tcsae.sae.batchtopk import BatchTopKConfig, BatchTopKSAE
from tcsae.sae.passing import Codes, Places


class MatryoshkaConfig(BatchTopKConfig):
    """Nested dictionaries, k features per token on average in the largest."""

    architecture: Literal["matryoshka"] = "matryoshka"  # type: ignore[assignment]
    group_fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32), min_length=2
    )
    """Shares of d_sae, in order: dictionary i has the features of groups 0 to i. The default are
    the paper's; the last group takes what rounding leaves."""

    @field_validator("group_fractions", mode="before")
    @classmethod
    def _list_is_a_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if not math.isclose(total := sum(self.group_fractions), 1, abs_tol=1e-3):
            raise ValueError(f"group_fractions add up to {total:.4g}: they must add up to 1")
        if min(self.group_sizes) < 1:
            raise ValueError(
                f"group_fractions leave a group without a feature at d_sae {self.d_sae}: "
                f"sizes {self.group_sizes}"
            )
        return self

    @property
    def group_sizes(self) -> list[int]:
        """Features in each group; they add up to d_sae."""
        sizes = [int(fraction * self.d_sae) for fraction in self.group_fractions[:-1]]
        return [*sizes, self.d_sae - sum(sizes)]


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK codes; the loss is the sum over the nested dictionaries i of the mean over valid
    tokens of |x - b_dec - sum of f_j W_dec_j over the groups 0 to i|^2.

    "reconstruction" is the largest dictionary's share, "inner" all others'. They are as many times
    the loss of BatchTopK as there are groups: so much less does the same lambda weigh.
    """

    config_class: ClassVar[type[SAEConfig]] = MatryoshkaConfig
    cfg: MatryoshkaConfig

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        pre_NF = self.training_pre_activations(centred_ND, places)
        features_NF = self.batch_activation(pre_NF, places)
        sizes = self.cfg.group_sizes
        groups = zip(features_NF.split(sizes, dim=1), self.W_dec.split(sizes), strict=True)
        *inner, decoded_ND = accumulate((f @ W_dec).float() for f, W_dec in groups)
        return Codes(features_NF, decoded_ND, pre_NF, extra=tuple(inner))

    def architecture_losses(
        self,
        codes: Codes,
        x_ND: Tensor,
        places: Places,
        *,
        sparsity_warmup: float | Tensor,
        progress: float,
    ) -> dict[str, Tensor]:
        target_ND = x_ND - self.b_dec
        errors = [(decoded_ND - target_ND).square().sum() for decoded_ND in codes.extra]
        return {"inner": sum(errors, start=target_ND.new_zeros(())) / places.n_valid}
