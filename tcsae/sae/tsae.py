"""The Temporal SAE: a Matryoshka SAE whose first features tell pairs of one text from others.

Bhalla, Oesterling, Verdun, Lakkaraju and Calmon, "Temporal Sparse Autoencoders" (arXiv 2511.05541),
and their code (github.com/AI4LIFE-GROUP/temporal-saes, trainers/temporal_sequence_top_k.py). Where
paper and code differ both can be had. Selection, threshold, initialisation and AuxK are those of
BatchTopK; the dictionaries those of Matryoshka.

Shapes: B contexts, T positions, N = B * T tokens, F features, G of the first group, P pairs.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tcsae.positions import document_starts, noise_like
from tcsae.sae.base import SAEConfig
from tcsae.sae.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from tcsae.sae.passing import Codes, Places


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
    contrast_pairs: int = Field(default=1024, ge=2)
    """Pairs that a step's InfoNCE draws; each has all others of other documents against it."""
    shuffle_positions: bool = False
    """The control: the partner is any other token of the document, so that order says nothing."""


class TSAE(MatryoshkaSAE):
    """Matryoshka BatchTopK codes and, beside its losses, with z the codes of the first group:

    pairs = pair_coefficient * d_in * (mean of CE_p(s[p, :]) + mean of CE_p(s[:, p])) / 2,
            s[p, q] = cosine or inner product of z[token of p] and z[partner of q],

    CE_p the cross-entropy, in nats, of picking q = p among p and all q of other documents; or

    pairs = pair_coefficient * mean over all pairs of |z[token] - z[partner]|^2,

    for adjacent pairs twice the window variance at W = 2. Inputs have norm sqrt(d_in), so the
    squared error, and this, are d_in times what they are for norm 1: the factor makes the
    coefficient of the InfoNCE count the same. (The scale is a choice: the paper does not say its
    inputs', and its sum over dictionaries is a weighted mean in the code.) The authors draw the
    tokens of a step from many texts, so that the others of a batch are other documents; whole
    contexts are in the batch here, hence the mask.
    """

    config_class: ClassVar[type[SAEConfig]] = TSAEConfig
    cfg: TSAEConfig

    def architecture_losses(
        self,
        codes: Codes,
        x_ND: Tensor,
        places: Places,
        *,
        sparsity_warmup: float | Tensor,
        progress: float,
    ) -> dict[str, Tensor]:
        losses = super().architecture_losses(
            codes, x_ND, places, sparsity_warmup=sparsity_warmup, progress=progress
        )
        if self.cfg.pair_coefficient > 0:
            first_NG = codes.features_NF[:, : self.cfg.group_sizes[0]]
            unit = 1 if self.cfg.pair_loss == "squared_difference" else self.d_in
            loss = self._pair_loss(first_NG, places)
            losses["pairs"] = self.cfg.pair_coefficient * unit * loss
        return losses

    def _pair_loss(self, first_NG: Tensor, places: Places) -> Tensor:
        pairs = draw_pairs(places, self.cfg.pairs, self.cfg.shuffle_positions)
        if self.cfg.pair_loss == "squared_difference":
            difference_NG = first_NG.float() - first_NG[pairs.partner_N].float()
            difference_NG = difference_NG * pairs.exists_N[:, None]
            return difference_NG.square().sum() / pairs.exists_N.sum().clamp(min=1)
        token_P, exists_P = pairs.some(self.cfg.contrast_pairs, places.generator)
        document_N = documents(places)
        z_PG = first_NG[token_P].float()
        other_PG = first_NG[pairs.partner_N[token_P]].float()
        if self.cfg.pair_loss == "cosine":
            # A token without a feature of the first group has no direction: cosine 0.
            z_PG, other_PG = normalize(z_PG, eps=1e-6), normalize(other_PG, eps=1e-6)
        return info_nce(z_PG @ other_PG.T, document_N[token_P], exists_P)


class Pairs(NamedTuple):
    """A partner for every token; [N] each."""

    partner_N: Tensor
    """Token number; the token itself where there is no partner."""
    exists_N: Tensor

    def some(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """At most `n` tokens with a partner, drawn without order: (tokens [P], exists [P])."""
        noise_N = noise_like(self.exists_N, generator)
        drawn = torch.where(self.exists_N, noise_N, -1).topk(min(n, len(noise_N)), sorted=False)
        return drawn.indices, drawn.values >= 0


def documents(places: Places) -> Tensor:
    """[N] a number for every document of the batch, different between contexts."""
    segments_BT = places.segments_BT.long()
    contexts_B1 = torch.arange(len(segments_BT), device=segments_BT.device)[:, None]
    return (contexts_B1 * (segments_BT.max() + 1) + segments_BT).flatten()


def draw_pairs(
    places: Places, kind: Literal["adjacent", "earlier"], shuffled: bool = False
) -> Pairs:
    """Partners among the valid tokens of a document: the one before, a random earlier one, or
    (`shuffled`) any random other one."""
    valid_BT, segments_BT = places.valid_BT, places.segments_BT
    n_positions = valid_BT.shape[1]
    position_T = torch.arange(n_positions, device=valid_BT.device)
    if kind == "adjacent" and not shuffled:
        partner_BT = (position_T - 1).clamp(min=0).expand_as(segments_BT)
        exists_BT = valid_BT & valid_BT.roll(1, 1) & ~document_starts(segments_BT)
    else:
        # rank: valid tokens of the context before this one; of the document: those from `first` on.
        count_BT = valid_BT.long()
        rank_BT = count_BT.cumsum(1) - count_BT
        starts_BT = document_starts(segments_BT)
        first_BT = torch.where(starts_BT, rank_BT, 0).cummax(1).values
        among_BT = rank_BT - first_BT
        if shuffled:
            ends_BT = starts_BT.roll(-1, 1)
            ends_BT[:, -1] = True
            after_BT = rank_BT + count_BT
            last_BT = torch.where(ends_BT, after_BT, n_positions).flip(1).cummin(1).values.flip(1)
            among_BT = last_BT - first_BT - 1
        noise_BT = noise_like(valid_BT, places.generator)
        chosen_BT = first_BT + (noise_BT * among_BT).long().clamp(max=among_BT - 1)
        if shuffled:
            chosen_BT = chosen_BT + (chosen_BT >= rank_BT)  # any but the token itself
        by_rank_BT = (~valid_BT).long().argsort(dim=1, stable=True)
        exists_BT = valid_BT & (among_BT > 0)
        chosen_BT = torch.where(exists_BT, chosen_BT, 0)
        partner_BT = by_rank_BT.gather(1, chosen_BT)
    partner_BT = torch.where(exists_BT, partner_BT, position_T)
    start_B1 = torch.arange(len(valid_BT), device=valid_BT.device)[:, None] * n_positions
    return Pairs((start_B1 + partner_BT).flatten(), exists_BT.flatten())


def info_nce(similarity_PP: Tensor, document_P: Tensor, exists_P: Tensor) -> Tensor:
    """Symmetric InfoNCE of pairs p with similarities s[p, q], in nats.

    The right answer of row and column p is p; the wrong ones are the pairs of other documents.
    Pairs that do not exist take no part. 0 where none does.
    """
    n = len(exists_P)
    itself_PP = torch.eye(n, dtype=torch.bool, device=exists_P.device)
    allowed_PP = (document_P[:, None] != document_P[None]) & exists_P & exists_P[:, None]
    logits_PP = similarity_PP.masked_fill(~(allowed_PP | itself_PP), -torch.inf)
    answer_P = torch.arange(n, device=exists_P.device)
    rows_P = cross_entropy(logits_PP, answer_P, reduction="none")
    columns_P = cross_entropy(logits_PP.T, answer_P, reduction="none")
    return ((rows_P + columns_P) / 2 * exists_P).sum() / exists_P.sum().clamp(min=1)
