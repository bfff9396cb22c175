"""Explained variance at several limits of the norm: does a handful of tokens decide it?

Residual streams have massive tokens (hundreds of times the usual norm) and, in some models, a few
near-massive ones of 3 to 10 times the usual norm that hold a third of the remaining variance.
Between the two kinds and the rest there is a gap. A limit within the gap gives a number that does
not depend on the limit; a limit elsewhere lets a handful of tokens decide it.

Shape legend: B contexts in a batch, T positions, R counted tokens of a batch, D = d_in, K limits;
bin 0 has the tokens up to the lowest limit, bin K those beyond the highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LIMITS = (2.0, 3.0, 5.0, 10.0)
"""Multiples of the median norm at which explained variance is always measured."""
TOLERANCE = 0.01
"""Explained variances further apart than this disagree."""

NO_TOKEN = "no token was counted"
NO_VARIANCE = "the activations do not vary, or are not finite"
NOT_ENCODED = (
    "this SAE reads a token's past, and the run kept the tokens beyond its own limit from it: they "
    "have no reconstruction"
)


class NormLimits:
    """Explained variance with and without tokens of large norm, batch by batch.

    Counted at a limit: tokens that are not special (position 0 never is) with a norm of at most
    that multiple of the median; without a limit, all of them. Explained variance is that of
    `ReconstructionMetrics`, about the mean of the tokens counted, so the row of the run's own limit
    has the run's own number. Float64 sums per bin of the norm; (K + 1) x D of them.

    Args:
        d_in: D.
        median_norm: the calibration's median, of the training contexts.
        own: the run's `dataset.norm_filter`; measured too if it is not among LIMITS. 0: no limit.
    """

    def __init__(self, d_in: int, median_norm: float, own: float) -> None:
        self.median_norm = median_norm
        self.limits = sorted({*LIMITS, own} - {0})
        n_bins = len(self.limits) + 1
        self._n, self._error2, self._shifted2, self._not_encoded = torch.zeros(
            4, n_bins, dtype=torch.float64
        )
        self._shifted_KD = torch.zeros(n_bins, d_in, dtype=torch.float64)
        self._shift_D: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, *, counted: Tensor, encoded: Tensor) -> None:
        """Add a batch of contexts.

        Args:
            x: [B, T, D] activations.
            x_hat: [B, T, D] reconstructions, in the units of x.
            counted: [B, T] bool; True at tokens that are not special, whatever their norm.
            encoded: [B, T] bool; where x_hat is the SAE's reconstruction.
        """
        # As ActivationBatches does it, so that a token is on the same side of the limit here.
        norm_R = x.float().norm(dim=-1)[counted]
        beyond_KR = torch.stack([~(norm_R <= limit * self.median_norm) for limit in self.limits])
        bin_R = beyond_KR.sum(dim=0)
        x_RD = x[counted].double()
        if self._shift_D is None and len(x_RD) > 0:
            # Without the massive tokens: about their mean the others' sums would lose digits.
            usual_RD = x_RD[bin_R < len(self.limits)]
            self._shift_D = (usual_RD if len(usual_RD) else x_RD).mean(dim=0)
        if self._shift_D is None:
            return
        shifted_RD = x_RD - self._shift_D
        error2_R = (x_RD - x_hat[counted].double()).square().sum(dim=-1)
        encoded_R = encoded[counted]
        self._add(self._n, bin_R, torch.ones_like(error2_R))
        self._add(self._not_encoded, bin_R, (~encoded_R).double())
        self._add(self._error2, bin_R, error2_R.where(encoded_R, 0.0))
        self._add(self._shifted2, bin_R, shifted_RD.square().sum(dim=-1))
        self._add(self._shifted_KD, bin_R, shifted_RD)

    def _add(self, sums: Tensor, bin_R: Tensor, values: Tensor) -> None:
        added = torch.zeros_like(sums, device=values.device).index_add_(0, bin_R, values)
        sums += added.cpu()

    def compute(self) -> list[dict[str, Any]]:
        """A row for every limit, ascending, and last the one without a limit. JSON values.

        - `limit`: the multiple of the median norm; None: no limit.
        - `explained_variance`: of the tokens within; None where there is none, `reason` says why.
        - `n_tokens_left_out`, `token_share_left_out`: tokens beyond, of all that are not special.
        - `variance_share_left_out`: their share of the squared distance from the mean, the mean of
          all tokens that are not special. None without variance.
        """
        n, error2, shifted2, unknown = (
            sums.cumsum(0) for sums in (self._n, self._error2, self._shifted2, self._not_encoded)
        )
        shifted_KD = self._shifted_KD.cumsum(0)
        within_K = shifted2 - shifted_KD.square().sum(dim=-1) / n
        mean_D = shifted_KD[-1] / n[-1]
        about_all_K = shifted2 - 2 * shifted_KD @ mean_D + n * mean_D.square().sum()
        rows = []
        for k, limit in enumerate([*self.limits, None]):
            value = float(1 - error2[k] / within_K[k])
            reason = None
            if n[k] == 0:
                reason = NO_TOKEN
            elif unknown[k] > 0:
                reason = NOT_ENCODED
            elif not math.isfinite(value):
                reason = NO_VARIANCE
            left_out = int(n[-1] - n[k])
            rows.append(
                {
                    "limit": limit,
                    "explained_variance": value if reason is None else None,
                    "reason": reason,
                    "n_tokens_left_out": left_out,
                    "token_share_left_out": _share(left_out, float(n[-1])),
                    "variance_share_left_out": _share(
                        float(about_all_K[-1] - about_all_K[k]) if left_out else 0.0,
                        float(about_all_K[-1]),
                    ),
                }
            )
        return rows


def _share(part: float, whole: float) -> float | None:
    share = part / whole if whole else math.nan
    return share if math.isfinite(share) else None


def limit_words(limit: float | None) -> str:
    """A limit as people read it."""
    return "no limit" if limit is None else f"{limit:g} x the median"


def caution(rows: Sequence[Mapping[str, Any]], own: float) -> dict[str, Any] | None:
    """What to say if explained variance depends on the limit by more than TOLERANCE, else None.

    `decides_the_headline` is true if the run's own limit (`own`, its norm_filter; 0: none)
    disagrees with its nearest neighbour on either side among LIMITS: the run's limit is then not
    in the gap, and the tokens between the two limits decide its number. It is false if only limits
    further away disagree: the run's own number is sound, but it is not to be laid beside one that
    was measured at those limits.

    No limit at all is never a neighbour of a limit: with massive tokens in, which hold nearly all
    the variance, explained variance nearly always differs. The row is there to be looked at. For a
    run without a limit it is the run's own row, and the highest of LIMITS its neighbour.

    Values are compared with the run's own, not with each other; one that is None is passed over.
    `limits` are those that differ, `text` says their values and how many tokens lie between.
    """
    at = {math.inf if row["limit"] is None else row["limit"]: row for row in rows}
    own = own or math.inf
    values = {k: row["explained_variance"] for k, row in at.items()}
    # Infinity is among them only where it is the run's own.
    known = sorted(k for k in {*LIMITS, own} if values.get(k) is not None)
    if own not in known:
        return None
    here = known.index(own)
    near = {known[i] for i in (here - 1, here + 1) if 0 <= i < len(known)}
    differing = [k for k in known if abs(values[k] - values[own]) > TOLERANCE]
    if not differing:
        return None
    deciding = [k for k in differing if k in near]
    shown = deciding or differing
    told = "; ".join(_difference(at[k], at[own]) for k in shown)
    ours = f"{values[own]:.3f} at this run's limit ({limit_words(at[own]['limit'])})"
    end = (
        "A handful of near-massive tokens decides the number: choose dataset.norm_filter where its "
        "neighbours agree."
        if deciding
        else "The limits next to the run's own agree with it; do not lay its explained variance "
        "beside one measured at those limits."
    )
    return {
        "decides_the_headline": bool(deciding),
        "limits": shown,
        "text": f"Explained variance depends on the norm limit: {ours}, but {told}. {end}",
    }


def _difference(other: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    n = own["n_tokens_left_out"] - other["n_tokens_left_out"]
    tokens = f"{abs(n):,} token{'s' if abs(n) != 1 else ''} {'more' if n > 0 else 'fewer'}"
    value = other["explained_variance"]
    return f"{value:.3f} at {limit_words(other['limit'])}, which counts {tokens}"
