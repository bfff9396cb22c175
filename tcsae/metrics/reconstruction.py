"""SAEBench's "core" metrics as accumulators that see one batch of contexts at a time.

`ReconstructionMetrics` compares activations with their reconstructions, `ModelMetrics` the language
model's predictions with and without the SAE. Both keep float64 sums per context: their totals give
the metric, totals without each document in turn its interval. Definitions follow SAEBench (arXiv
2503.09532; sae-bench 0.6.0, `evals/core/main.py`); where one differs, the docstring says how and
why.

Shape legend: B contexts in a batch, N contexts seen, T positions, R valid tokens of a batch,
D = d_in, F = d_sae features, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tcsae.metrics.units import MIN_UNITS, Units, jackknife_interval

# Elements of one logits chunk in float32: 16 MB, which is 16 rows of Gemma's 262,144 tokens.
_LOGITS_CHUNK = 2**22
# A quantity per token, then its mean over tokens.
_TOKEN_MEANS = (
    "mse_sae_bench explained_variance_legacy cossim l2_norm_in l2_norm_out l2_ratio l0 l1"
)


class _ContextAccumulator:
    """Named float64 sums with one entry (a number or a vector) per context, kept on the CPU."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._batches: list[dict[str, Tensor]] = []

    def _append(self, sums: dict[str, Tensor]) -> None:
        self._batches.append({name: value.double().cpu() for name, value in sums.items()})

    def _columns(self) -> dict[str, Tensor]:
        if not self._batches:
            raise ValueError("no batch has been seen: call update before compute")
        return {
            name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]
        }

    def _ratios(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The metrics that follow from sums over contexts, which may carry a leading dimension."""
        raise NotImplementedError

    def _totals(self) -> dict[str, Tensor]:
        return {name: value.sum(dim=0) for name, value in self._columns().items()}

    def compute_intervals(
        self, level: float = 0.95, *, units: Units | None = None
    ) -> dict[str, tuple[float, float]]:
        """Intervals over documents, of every metric that is a mean or a ratio.

        Each is computed again without each block of documents (`units.jackknife_interval`). The
        ends are NaN with fewer than `units.MIN_UNITS` documents that have a counted token.

        Args:
            level: coverage.
            units: of the contexts in the order seen. None: each from a document of its own.
        """
        columns = self._columns()
        units = units or Units.of_contexts(len(columns["n_tokens"]))
        counted = units.document[columns["n_tokens"] > 0].unique()
        estimates = self._ratios(self._totals())
        if len(counted) < MIN_UNITS:
            return dict.fromkeys(estimates, (math.nan, math.nan))
        rows = self._ratios({name: units.without_each(v) for name, v in columns.items()})
        found = {}
        for name, value_R in rows.items():
            low, high = jackknife_interval(value_R[1:], value_R[0], level)
            found[name] = (_as_float(low), _as_float(high))
        return found

    def context_sums(self) -> dict[str, Tensor]:
        """Per-context sums over counted tokens, [N] float64 each, in the order seen."""
        return {name: value for name, value in self._columns().items() if value.ndim == 1}


def _as_float(value: Tensor) -> float:
    """The number, with every undefined result (0 / 0, x / 0) as NaN."""
    number = float(value)
    return number if math.isfinite(number) else math.nan


class ReconstructionMetrics(_ContextAccumulator):
    """Reconstruction, shrinkage and sparsity of an SAE over valid tokens, batch by batch.

    `compute()` returns, with e = x - x_hat and E the mean over all valid tokens seen:

    - `mse`: E|e|^2 / d_in. `mse_sae_bench`: SAEBench's own, |e_t|^2 divided by the number of valid
      tokens in the token's batch, then the mean over tokens; it depends on the batch size.
    - `explained_variance`: 1 - E|e|^2 / (E|x|^2 - |E x|^2), about the mean over all tokens. 1 is
      perfect, 0 is what predicting the mean gives. The sums are taken about the mean of the first
      batch, because E|x|^2 - |E x|^2 cancels when the mean carries most of the power.
      (sae-bench 0.6.0 subtracts (E|x|^2 / d_in)^2 where |E x|^2 belongs.)
    - `explained_variance_legacy`: E[1 - |e_t|^2 / |x_t - m|^2], m the mean of the token's own
      batch. It therefore depends on how the contexts were batched; kept for comparison only.
    - `cossim` (0 for a zero vector), `l2_norm_in`, `l2_norm_out`, `l2_ratio` = |x_hat| / |x|: per
      token, then mean.
    - `relative_reconstruction_bias`: E|x_hat|^2 / E<x, x_hat> (arXiv 2404.16014, eq. 10) over all
      tokens; SAEBench averages the ratio over batches.
    - `l0`: features != 0 per token. `l1`: sum of |f| per token (SAEBench: sum of f).
    - `frac_alive`: share of features that fired on a valid token. `n_tokens`: valid tokens seen.

    A metric without a value (no valid token, no variance, zero reconstruction) is NaN.
    Memory: N x d_in float64 (the per-context sums of x, for the intervals) beside the batch.

        metrics = ReconstructionMetrics(d_in=576, d_sae=2304)
        metrics.update(x, x_hat, features, valid=valid)
        metrics.compute()["explained_variance"]
    """

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.d_in = d_in
        self.d_sae = d_sae
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self._n_tokens = 0
        self._shift_D = torch.zeros(self.d_in, dtype=torch.float64)
        self._tokens_fired_F = torch.zeros(self.d_sae, dtype=torch.int64)
        self._contexts_fired_F = torch.zeros(self.d_sae, dtype=torch.int64)

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, features: Tensor, *, valid: Tensor) -> None:
        """Add a batch of contexts. ValueError if a shape does not fit.

        Args:
            x: [B, T, d_in] activations.
            x_hat: [B, T, d_in] reconstructions, in the units of x.
            features: [B, T, d_sae] SAE codes.
            valid: [B, T] bool; tokens where it is False enter nothing, whatever they hold.
        """
        D, F = self.d_in, self.d_sae
        for name, tensor, width in (("x", x, D), ("x_hat", x_hat, D), ("features", features, F)):
            if tensor.shape != (*valid.shape, width):
                raise ValueError(
                    f"{name} must be {[*valid.shape, width]} beside valid {list(valid.shape)}, "
                    f"not {list(tensor.shape)}"
                )
        x_RD = x[valid].double()
        if self._n_tokens == 0 and len(x_RD) > 0:
            self._shift_D = x_RD.mean(dim=0).cpu()
        self._n_tokens += len(x_RD)
        terms = _token_terms(x_RD, x_hat[valid].double(), self._shift_D.to(x.device))
        context_R = valid.nonzero()[:, 0]
        sums = {
            name: value.new_zeros(len(x), *value.shape[1:]).index_add_(0, context_R, value)
            for name, value in terms.items()
        }
        self._append(sums | self._sparsity_sums(features, valid))

    def _sparsity_sums(self, features: Tensor, valid: Tensor) -> dict[str, Tensor]:
        active_BTF = features != 0
        active_BTF &= valid[..., None]
        fired_BF = active_BTF.sum(dim=1)
        self._tokens_fired_F += fired_BF.sum(dim=0).cpu()
        self._contexts_fired_F += (fired_BF > 0).sum(dim=0).cpu()
        dtype = torch.promote_types(features.dtype, torch.float32)
        l1_BT = torch.linalg.vector_norm(features, ord=1, dim=-1, dtype=dtype).double()
        return {"l0": fired_BF.sum(dim=1), "l1": l1_BT.where(valid, 0.0).sum(dim=1)}

    def compute(self) -> dict[str, float]:
        """The metrics above as plain floats. ValueError before the first update."""
        values = {name: _as_float(value) for name, value in self._ratios(self._totals()).items()}
        alive = float((self._tokens_fired_F > 0).double().mean()) if self._n_tokens else math.nan
        return {**values, "frac_alive": alive, "n_tokens": float(self._n_tokens)}

    def compute_features(self) -> dict[str, Tensor]:
        """Per feature, each [d_sae] float64.

        `feature_density`: share of valid tokens on which the feature is not 0; NaN without tokens.
        `consistent_activation_heuristic`: tokens on which it fires per context in which it fires.
        A dead feature has 0 (SAEBench divides 0 by 0 and writes -1); a live one has at least 1.
        """
        fired_F = self._tokens_fired_F.double()
        return {
            "feature_density": fired_F / self._n_tokens,
            "consistent_activation_heuristic": fired_F / self._contexts_fired_F.clamp(min=1),
        }

    def context_sums(self) -> dict[str, Tensor]:
        """Per-context sums over valid tokens, [N] float64 each, in the order seen.

        With `variance2`, |x - E x|^2: explained variance is 1 - sum(error2) / sum(variance2).
        """
        sums, shifted_ND = super().context_sums(), self._columns()["shifted"]
        mean_D = shifted_ND.sum(dim=0) / self._n_tokens
        cross_N = shifted_ND @ mean_D
        variance2 = sums.pop("shifted2") - 2 * cross_N + sums["n_tokens"] * mean_D.square().sum()
        return {**sums, "variance2": variance2}

    def _ratios(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        n = sums["n_tokens"]
        shifted_mean_D = sums["shifted"] / n[..., None]
        variance = sums["shifted2"] / n - shifted_mean_D.square().sum(dim=-1)
        return {
            "mse": sums["error2"] / n / self.d_in,
            "explained_variance": 1 - sums["error2"] / n / variance,
            "relative_reconstruction_bias": sums["x_hat2"] / sums["x_dot_x_hat"],
            **{name: sums[name] / n for name in _TOKEN_MEANS.split()},
        }


def _token_terms(x_RD: Tensor, x_hat_RD: Tensor, shift_D: Tensor) -> dict[str, Tensor]:
    """What each valid token adds to the sums, float64: [R], and [R, D] for `shifted`."""
    error2_R = (x_RD - x_hat_RD).square().sum(dim=-1)
    batch_variance_R = (x_RD - x_RD.mean(dim=0)).square().sum(dim=-1)
    norm_in_R, norm_out_R = x_RD.norm(dim=-1), x_hat_RD.norm(dim=-1)
    shifted_RD = x_RD - shift_D
    return {
        "n_tokens": torch.ones_like(error2_R),
        "error2": error2_R,
        "mse_sae_bench": error2_R / max(len(x_RD), 1),
        "shifted": shifted_RD,
        "shifted2": shifted_RD.square().sum(dim=-1),
        "explained_variance_legacy": 1 - error2_R / batch_variance_R,
        "cossim": functional.cosine_similarity(x_RD, x_hat_RD, dim=-1),
        "l2_norm_in": norm_in_R,
        "l2_norm_out": norm_out_R,
        # As SAEBench: a vanishing input counts as norm 1.
        "l2_ratio": norm_out_R / norm_in_R.where(norm_in_R >= 1e-4, 1.0),
        "x_hat2": norm_out_R.square(),
        "x_dot_x_hat": (x_RD * x_hat_RD).sum(dim=-1),
    }


class ForwardScore(NamedTuple):
    """`next_token_ce` and `kl_divergence` of one changed pass (SAE spliced in, or ablated), [B]."""

    ce: Tensor
    kl: Tensor


def _row_chunks(keep_BT: Tensor, *logits: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Indices of kept rows, and those rows of each [B, T, V] logits in float32 or better."""
    rows = keep_BT.flatten().nonzero()[:, 0]
    for chunk in torch.split(rows, max(1, _LOGITS_CHUNK // logits[0].shape[-1])):
        picked = [tensor.flatten(0, 1)[chunk] for tensor in logits]
        yield chunk, *(p.to(torch.promote_types(p.dtype, torch.float32)) for p in picked)


def _sum_by_context(parts: list[Tensor], keep_BT: Tensor) -> Tensor:
    per_position_BT = torch.zeros(keep_BT.shape, dtype=torch.float64, device=keep_BT.device)
    per_position_BT[keep_BT] = torch.cat(parts).double()
    return per_position_BT.sum(dim=1)


def _predicting(keep_BT: Tensor) -> Tensor:
    """Kept positions that have a next token."""
    return torch.cat([keep_BT[:, :-1], torch.zeros_like(keep_BT[:, -1:])], dim=1)


@torch.no_grad()
def next_token_ce(logits: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
    """Cross-entropy of the next token in nats, summed over each context's positions: [B] float64.

    A prediction counts if the position it is made from is kept; the last position predicts nothing.

    Args:
        logits: [B, T, V], any float type; worked on a few rows at a time.
        tokens: [B, T] token ids.
        keep: [B, T] bool.
    """
    keep_BT = _predicting(keep)
    targets = tokens.roll(-1, dims=1).flatten().long()
    parts = [
        functional.cross_entropy(chunk, targets[rows], reduction="none")
        for rows, chunk in _row_chunks(keep_BT, logits)
    ]
    return _sum_by_context(parts, keep_BT)


@torch.no_grad()
def kl_divergence(clean: Tensor, changed: Tensor, keep: Tensor) -> Tensor:
    """KL(clean || changed) in nats, summed over each context's kept positions: [B] float64.

    sum_v p (log p - log q) from log_softmax: the log of a softmax underflows to -inf for unlikely
    tokens. Counts every kept position, the last one included, as SAEBench does. `clean` and
    `changed` are logits [B, T, V], worked on a few rows at a time.
    """
    parts = [
        functional.kl_div(
            q.log_softmax(dim=-1), p.log_softmax(dim=-1), reduction="none", log_target=True
        ).sum(dim=-1)
        for _, p, q in _row_chunks(keep, clean, changed)
    ]
    return _sum_by_context(parts, keep)


def score_forward(clean: Tensor, changed: Tensor, tokens: Tensor, keep: Tensor) -> ForwardScore:
    """Cross-entropy and KL divergence of one changed forward pass, from [B, T, V] logits."""
    return ForwardScore(next_token_ce(changed, tokens, keep), kl_divergence(clean, changed, keep))


class ModelMetrics(_ContextAccumulator):
    """How well the language model predicts with the SAE spliced in, batch by batch.

    `compute()` returns, as means over kept positions, in nats:

    - `ce_loss_without_sae`, `ce_loss_with_sae`, `ce_loss_with_ablation`, and `ce_loss_score` =
      (CE_ablation - CE_sae) / (CE_ablation - CE_without): 1 is no loss, 0 is as bad as ablation.
    - `kl_div_with_sae`, `kl_div_with_ablation` (from the clean distribution), and `kl_div_score` =
      (KL_ablation - KL_sae) / KL_ablation.
    - `n_tokens`: kept positions; `n_predictions`: those with a next token in the context.

    NaN where nothing was kept, and for a score whose denominator is 0.
    The passes are scored one by one, so that the logits of only two are in memory, and the clean
    and ablated ones are scored once for several SAEs:

        clean = next_token_ce(logits_clean, tokens, keep)
        ablated = score_forward(logits_clean, forward_ablated(), tokens, keep)
        for sae, metrics in zip(saes, metrics_of_saes):
            changed = score_forward(logits_clean, forward(sae), tokens, keep)
            metrics.add(clean, changed, ablated, keep=keep)
    """

    def add(self, clean: Tensor, sae: ForwardScore, ablated: ForwardScore, *, keep: Tensor) -> None:
        """Add a batch whose passes were scored one by one, all with this `keep`."""
        self._append(
            {
                "n_tokens": keep.sum(dim=1),
                "n_predictions": _predicting(keep).sum(dim=1),
                "ce_loss_without_sae": clean,
                "ce_loss_with_sae": sae.ce,
                "ce_loss_with_ablation": ablated.ce,
                "kl_div_with_sae": sae.kl,
                "kl_div_with_ablation": ablated.kl,
            }
        )

    def compute(self) -> dict[str, float]:
        """The metrics above as plain floats. ValueError before the first update."""
        totals = self._totals()
        counts = {name: totals[name] for name in ("n_tokens", "n_predictions")}
        return {name: _as_float(value) for name, value in (self._ratios(totals) | counts).items()}

    def _ratios(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        means = {
            name: value / sums["n_predictions" if name.startswith("ce") else "n_tokens"]
            for name, value in sums.items()
            if not name.startswith("n_")
        }
        ce, kl = means["ce_loss_with_ablation"], means["kl_div_with_ablation"]
        return means | {
            "ce_loss_score": (ce - means["ce_loss_with_sae"]) / (ce - means["ce_loss_without_sae"]),
            "kl_div_score": (kl - means["kl_div_with_sae"]) / kl,
        }
