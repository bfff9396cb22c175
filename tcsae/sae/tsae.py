"""The Temporal SAE: a Matryoshka SAE whose first features tell pairs of one text from others.

Bhalla, Oesterling, Verdun, Lakkaraju and Calmon, "Temporal Sparse Autoencoders" (arXiv 2511.05541),
and their code (github.com/AI4LIFE-GROUP/temporal-saes, trainers/temporal_sequence_top_k.py). Where
paper and code differ both can be had. Selection, threshold, initialisation and AuxK are those of
BatchTopK; the dictionaries those of Matryoshka.

Shapes: B contexts, T positions, N = B * T tokens, F features, G of the first group, P pairs, R of
them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from tcsae.config.sae import SAEConfig, TSAEConfig
from tcsae.sae.codes import Codes, Moment, Places
from tcsae.sae.matryoshka import MatryoshkaSAE
from tcsae.tensors.positions import document_starts, noise_like

ROWS = 512
"""Pairs whose similarities to all pairs are in memory at a time: 16 MiB at 8192 pairs."""


class TSAE(MatryoshkaSAE):
    """Matryoshka BatchTopK codes and, beside its losses, with z the codes of the first group:

    pairs = pair_coefficient * d_in * (mean of CE_p(s[p, :]) + mean of CE_p(s[:, p])) / 2,
            s[p, q] = cosine or inner product of z[token of p] and z[partner of q],

    CE_p the cross-entropy, in nats, of picking q = p among p and all q of other documents, or with
    same_document_negatives among all q; or

    pairs = pair_coefficient * mean over all pairs of |z[token] - z[partner]|^2,

    for adjacent pairs twice the window variance at W = 2. Inputs have norm sqrt(d_in), so the
    squared error, and this, are d_in times what they are for norm 1: the factor makes the
    coefficient of the InfoNCE count the same. The scale is a choice: the paper does not say its
    inputs', and its code's training script passes no normalisation. The code also halves the
    weighted sum .2 and .8 over the dictionaries, where the paper and this class add them up.

    The code draws the pairs of a step at random from a buffer of 1,000 contexts of one document
    each, and masks none. Its batch has 8,192 pairs (the default of the library it builds on), so
    of the other pairs 1 in 1,000 is of the same document. Here a batch is a few whole contexts, 32
    by default: 1 in 32, hence the mask.
    """

    is_recordable: ClassVar[bool] = False
    config_class: ClassVar[type[SAEConfig]] = TSAEConfig
    cfg: TSAEConfig

    def architecture_losses(
        self, codes: Codes, x_ND: Tensor, places: Places, now: Moment
    ) -> dict[str, Tensor]:
        losses = super().architecture_losses(codes, x_ND, places, now)
        if self.cfg.pair_coefficient > 0:
            first_NG = codes.first_features(self.cfg.group_sizes[0])
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
        if self.cfg.same_document_negatives:
            document_P = torch.arange(len(token_P), device=token_P.device)  # each its own
        else:
            document_P = documents(places)[token_P]
        z_PG = first_NG[token_P].float()
        other_PG = first_NG[pairs.partner_N[token_P]].float()
        if self.cfg.pair_loss == "cosine":
            # A token without a feature of the first group has no direction: cosine 0.
            z_PG, other_PG = normalize(z_PG, eps=1e-6), normalize(other_PG, eps=1e-6)
        return info_nce(z_PG, other_PG, document_P, exists_P)


class Pairs(NamedTuple):
    """A partner for every token; [N] each."""

    partner_N: Tensor
    """Token number; the token itself where there is no partner."""
    exists_N: Tensor

    def some(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """`n` tokens with a partner, drawn without order, or all where there are fewer.

        Returns (tokens [P], exists [P]), P = min(n, N): the shape does not depend on how many
        have a partner, which the host would have to wait for. Those beyond do not exist.
        """
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


def info_nce(
    z_PG: Tensor, other_PG: Tensor, document_P: Tensor, exists_P: Tensor, rows: int = ROWS
) -> Tensor:
    """Symmetric InfoNCE of pairs p with similarities s[p, q] = <z[p], other[q]>, in nats.

    The right answer of row and column p is p; the wrong ones are the pairs of other documents.
    Pairs that do not exist take no part. 0 where none does. `rows` of s are in memory at a time.
    """
    loss: Tensor = InfoNCE.apply(z_PG, other_PG, document_P, exists_P, rows)
    return loss


class InfoNCE(torch.autograd.Function):
    """`info_nce` by blocks of rows, made anew in the backward pass.

    With rows_p and columns_p the log of the sum of exp(s) over the allowed entries of row and
    column p, and v_p = 1 / (2 * number of pairs) for pairs that exist, 0 for others,

        loss = sum over p of v_p (rows_p + columns_p - 2 s[p, p]),
        d loss / d s[p, q] = v_p exp(s[p, q] - rows_p) + v_q exp(s[p, q] - columns_q)
                             - 2 v_p [p = q].
    """

    @staticmethod
    def forward(
        ctx: Any, z_PG: Tensor, other_PG: Tensor, document_P: Tensor, exists_P: Tensor, rows: int
    ) -> Tensor:
        v_P = exists_P.to(z_PG.dtype) / (2 * exists_P.sum().clamp(min=1))
        rows_P, itself_P = torch.empty_like(v_P), torch.empty_like(v_P)
        columns_P = torch.full_like(v_P, -torch.inf)
        for block, s_RP in _blocks(z_PG, other_PG, document_P, exists_P, rows):
            itself_P[block] = s_RP.diagonal(block.start)
            rows_P[block] = s_RP.logsumexp(1)
            columns_P = torch.logaddexp(columns_P, s_RP.logsumexp(0))
        ctx.rows = rows
        ctx.save_for_backward(z_PG, other_PG, document_P, exists_P, v_P, rows_P, columns_P)
        return (v_P * (rows_P + columns_P - 2 * itself_P)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        z_PG, other_PG, document_P, exists_P, v_P, rows_P, columns_P = ctx.saved_tensors
        v_P = v_P * grad
        grad_z_PG, grad_other_PG = torch.empty_like(z_PG), torch.zeros_like(other_PG)
        # As the forward pass ran, whatever the backward pass is called under.
        with torch.autocast(z_PG.device.type, enabled=False):
            for block, s_RP in _blocks(z_PG, other_PG, document_P, exists_P, ctx.rows):
                by_row_RP = (s_RP - rows_P[block, None]).exp_().mul_(v_P[block, None])
                grad_RP = s_RP.sub_(columns_P).exp_().mul_(v_P).add_(by_row_RP)
                grad_RP.diagonal(block.start).sub_(2 * v_P[block])
                grad_z_PG[block] = grad_RP @ other_PG
                grad_other_PG.addmm_(grad_RP.T, z_PG[block])
        return grad_z_PG, grad_other_PG, None, None, None


def _blocks(
    z_PG: Tensor, other_PG: Tensor, document_P: Tensor, exists_P: Tensor, rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of s = z @ other.T, -inf where an answer is not allowed: (rows, s [R, P])."""
    for start in range(0, len(z_PG), rows):
        block = slice(start, min(start + rows, len(z_PG)))
        barred_RP = document_P[block, None] == document_P
        barred_RP |= ~exists_P
        barred_RP |= ~exists_P[block, None]
        barred_RP.diagonal(start).fill_(False)
        yield block, (z_PG[block] @ other_PG.T).masked_fill_(barred_RP, -torch.inf)
