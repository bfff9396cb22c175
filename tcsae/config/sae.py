"""Options of every SAE architecture. The table at the end is the list of architectures."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tcsae.config.strict import StrictModel

LONGEST = 0.999
"""persistent: no feature keeps more of its state from one token to the next."""


class SAEConfig(StrictModel):
    """Options of every architecture. A subclass narrows `architecture` and adds its own."""

    architecture: str
    """Name in tcsae.sae.registry."""
    d_sae: int = Field(ge=2)
    """Number of features (dictionary size)."""
    revival: Literal["auxk", "resample", "none"] = "auxk"
    """What brings dead features back: an auxiliary loss (Gao et al. 2024), resampling them from
    badly reconstructed inputs (Bricken et al. 2023), or nothing."""
    dead_after_tokens: int = Field(default=100_000, ge=1)
    """A feature that has not fired for this many valid tokens counts as dead. With
    revival=resample also the number of tokens between two resamplings."""
    k_aux: int | None = Field(default=None, ge=1)
    """revival=auxk: dead features per token that rebuild the residual; None is d_in // 2."""
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """revival=auxk: weight of the auxiliary loss."""
    encoder_scale: float = Field(default=1.0, gt=0)
    """The encoder starts as this times the decoder's transpose. 1 (tied) is what runs had before
    there was such a key; conf/sae has what is better."""

    @property
    def group_sizes(self) -> list[int]:
        """Features in each group of the dictionary; they add up to d_sae. Most have one group."""
        return [self.d_sae]


class StandardConfig(SAEConfig):
    """ReLU SAE with an L1 penalty."""

    architecture: Literal["standard"] = "standard"
    revival: Literal["auxk", "resample", "none"] = "resample"
    """As SAEConfig.revival; the paper of this architecture resamples."""
    l1_coefficient: float = Field(default=0.04, ge=0)
    """Weight of the sparsity term for inputs of norm 1, as dictionary_learning counts it."""


class PAnnealConfig(SAEConfig):
    """ReLU SAE with a p-annealed penalty."""

    architecture: Literal["p_anneal"] = "p_anneal"
    revival: Literal["auxk", "resample", "none"] = "resample"
    """As SAEConfig.revival; the authors' code resamples."""
    l1_coefficient: float = Field(default=0.06, ge=0)
    """Weight of the penalty while p is 1, counted as in `standard`."""
    p_end: float = Field(default=0.2, gt=0, le=1)
    """The last exponent; the first is 1."""
    anneal_start: float = Field(default=0.2, ge=0, lt=1)
    """Share of the run after which p begins to fall; it should be over the sparsity warm-up."""
    anneal_stages: int = Field(default=10, ge=1)
    """Equal steps in which p falls; the last stage has p_end."""


class _KConfig(SAEConfig):
    """Of architectures with a number of features a token."""

    k: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}: it must be at most d_sae, {self.d_sae}")
        return self


class TopKConfig(_KConfig):
    """k features per token."""

    architecture: Literal["topk"] = "topk"
    k: int = Field(default=32, ge=1)
    """Features that may fire at one token."""


class BatchTopKConfig(_KConfig):
    """k features per token on average."""

    architecture: Literal["batchtopk"] = "batchtopk"
    k: int = Field(default=32, ge=1)
    """Features per token, on average over the valid tokens of a batch."""
    threshold_rate: float = Field(default=0.1, gt=0, le=1)
    """Weight of a batch in the moving average of the threshold. The threshold falls as training
    goes on: an average that reaches far back is too high, and too few features fire in use."""


class JumpReLUConfig(SAEConfig):
    """JumpReLU SAE. Coefficients, thresholds and widths are for inputs of norm 1."""

    architecture: Literal["jumprelu"] = "jumprelu"
    revival: Literal["auxk", "resample", "none"] = "none"
    """As SAEConfig.revival; neither paper of this architecture does either."""
    penalty: Literal["step", "tanh"] = "step"
    """step: the number of features that fire; tanh: sum of tanh(tanh_scale * f)."""
    l0_coefficient: float = Field(default=1e-3, ge=0)
    """Weight of the penalty, step or tanh."""
    initial_threshold: float = Field(default=1e-3, ge=0)
    """The thresholds' first value."""
    bandwidth: float = Field(default=0.02, gt=0)
    """Width of the kernel: entries this near a threshold, half on each side, move it. The paper's
    0.001 is for billions of tokens; with fewer so few entries are near that it hardly learns."""
    tanh_scale: float = Field(default=96.0, gt=0)
    """penalty=tanh: 96 is the update's 4 for inputs of norm sqrt(576)."""
    preact_coefficient: float = Field(default=0.0, ge=0)
    """Weight of sum_j ReLU(threshold_j - pre_j), which gives features that never fire a gradient
    (the update has it on all features; 0 is without)."""


class GatedConfig(SAEConfig):
    """Gated SAE with an L1 penalty on its gates."""

    architecture: Literal["gated"] = "gated"
    revival: Literal["auxk", "resample", "none"] = "resample"
    """As SAEConfig.revival; the paper resamples."""
    l1_coefficient: float = Field(default=0.15, ge=0)
    """Weight of the sparsity term for inputs of norm 1, counted as in `standard`."""


class MatryoshkaConfig(BatchTopKConfig):
    """Nested dictionaries, k features per token on average in the largest."""

    architecture: Literal["matryoshka"] = "matryoshka"  # type: ignore[assignment]
    group_fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32), min_length=2
    )
    """Shares of d_sae, in order: dictionary i has the features of groups 0 to i. The default are
    the paper's; the last group takes what rounding leaves."""
    selection: Literal["batch", "token"] = "batch"
    """Which pre-activations are kept: the k * N largest of a batch of N tokens, as in BatchTopK
    (the paper), or the k largest of every token, as in TopK."""

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


class TSAEConfig(MatryoshkaConfig):
    """Two nested dictionaries, of which the first has the temporal loss."""

    architecture: Literal["tsae"] = "tsae"  # type: ignore[assignment]
    k: int = Field(default=20, ge=1)
    """Features per token, on average over the valid tokens of a batch."""
    group_fractions: tuple[float, ...] = Field(default=(0.2, 0.8), min_length=2)
    """As MatryoshkaConfig.group_fractions; the first group holds the high-level features."""
    pair_loss: Literal["cosine", "inner_product", "squared_difference"] = "cosine"
    """InfoNCE on the cosine of two tokens' codes (paper) or on their inner product (code), or the
    squared difference of the codes (the paper's ablation "No Contrastive")."""
    pairs: Literal["adjacent", "earlier"] = "adjacent"
    """A token's partner: the token before it (paper), or a random earlier one of its document
    (code)."""
    pair_coefficient: float = Field(default=1.0, ge=0)
    """Weight of the pair loss (alpha) for inputs of norm 1: 1.0 in the paper, 0.1 in the code."""
    contrast_pairs: int = Field(default=1024, ge=2, le=8192)
    """Pairs that a step's InfoNCE draws, or all where the batch has fewer: at most one for every
    valid token that has a partner, 127 of a context of 128 tokens. Time grows with its square."""
    same_document_negatives: bool = False
    """What a pair is told from: all other pairs (code), or those of other documents."""
    shuffle_positions: bool = False
    """The control: the partner is any other token of the document, so that order says nothing."""


class PersistentConfig(TopKConfig):
    """k new activations a token, added to what the features remember."""

    architecture: Literal["persistent"] = "persistent"  # type: ignore[assignment]
    revival: Literal["auxk", "none"] = "auxk"
    """As SAEConfig.revival; loose tokens, from which features are resampled, have no past."""
    k: int = Field(default=32, ge=1)
    """Features that may take up something at one token."""
    initial_retention: float = Field(default=0.1, gt=0, lt=LONGEST)
    """Share of its state that a feature keeps from one token to the next, at the start."""
    shuffle_positions: bool = False
    """The control: in training the tokens of each document are remembered in random order."""


class TFAConfig(TopKConfig):
    """Predictive codes by attention over the past, k novel codes a token."""

    architecture: Literal["tfa"] = "tfa"  # type: ignore[assignment]
    revival: Literal["auxk", "none"] = "auxk"
    """As SAEConfig.revival; loose tokens, from which features are resampled, have no past."""
    k: int = Field(default=32, ge=1)
    """Novel features per token."""
    n_heads: int = Field(default=4, ge=1)
    """Heads of the attention."""
    bottleneck_factor: int = Field(default=64, ge=1)
    """Queries and keys have d_sae / bottleneck_factor dimensions."""
    codes: Literal["novel", "predictive"] = "novel"
    """Which codes are the features: what is measured, and what a temporal loss acts on. The
    reconstruction has both."""
    shuffle_positions: bool = False
    """The control: in training the tokens of each document stand in random order."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        unit = self.n_heads * self.bottleneck_factor
        if self.d_sae % unit:
            raise ValueError(
                f"d_sae is {self.d_sae}: it must be a multiple of n_heads * bottleneck_factor, "
                f"{unit}"
            )
        return self


_CONFIGS: dict[str, type[SAEConfig]] = {
    "standard": StandardConfig,
    "topk": TopKConfig,
    "p_anneal": PAnnealConfig,
    "batchtopk": BatchTopKConfig,
    "jumprelu": JumpReLUConfig,
    "gated": GatedConfig,
    "matryoshka": MatryoshkaConfig,
    "tsae": TSAEConfig,
    "persistent": PersistentConfig,
    "tfa": TFAConfig,
}


def architectures() -> list[str]:
    """The known architecture names, in the order in which they are listed."""
    return list(_CONFIGS)


def config_class(name: str) -> type[SAEConfig]:
    """The configuration class of architecture `name`; ValueError with the choices if unknown."""
    if name not in _CONFIGS:
        raise ValueError(f"unknown SAE architecture {name!r}: choose from {', '.join(_CONFIGS)}")
    return _CONFIGS[name]
