"""Resamples of SAEBench's metrics, from sums by context that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tcsae.metrics.bootstrap import MIN_BLOCKS, resampling_weights

_MEANS = ("cossim", "l2_ratio", "l0", "l1")


def core_draws(
    reconstruction: Mapping[str, Tensor], model: Mapping[str, Tensor], d_in: int, n_boot: int
) -> dict[str, Tensor]:
    """Resamples [R] of SAEBench's metrics from sums by context [N], the same for every run.

    Explained variance is about the mean over all contexts, which is not resampled. Empty below
    `MIN_BLOCKS` contexts with a counted token.
    """
    draws: dict[str, Tensor] = {}
    if (drawn := _resampled(reconstruction, n_boot)) is not None:
        n = drawn["n_tokens"]
        draws |= {name: drawn[name] / n for name in _MEANS}
        draws["explained_variance"] = 1 - drawn["error2"] / drawn["variance2"]
        draws["mse"] = drawn["error2"] / n / d_in
        draws["relative_reconstruction_bias"] = drawn["x_hat2"] / drawn["x_dot_x_hat"]
    if (drawn := _resampled(model, n_boot)) is not None:
        clean, sae, zero = (
            drawn[f"ce_loss_{which}"] / drawn["n_predictions"]
            for which in ("without_sae", "with_sae", "with_ablation")
        )
        draws["ce_loss_with_sae"] = sae
        draws["ce_loss_score"] = (zero - sae) / (zero - clean)
        draws["kl_div_with_sae"] = drawn["kl_div_with_sae"] / drawn["n_tokens"]
        draws["kl_div_score"] = 1 - drawn["kl_div_with_sae"] / drawn["kl_div_with_ablation"]
    return {name: value for name, value in draws.items() if value.isfinite().all()}


def _resampled(sums: Mapping[str, Tensor], n_boot: int) -> dict[str, Tensor] | None:
    counted = sums["n_tokens"] > 0
    n = int(counted.sum())
    if n < MIN_BLOCKS:
        return None
    weights_RN = resampling_weights(n, n, n_boot, seed=0).double()
    return {name: weights_RN @ value[counted] for name, value in sums.items()}
