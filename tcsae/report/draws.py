"""Draws of SAEBench's metrics, from sums by context that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tcsae.metrics.units import MIN_UNITS, Units, jackknife_draws

_MEANS = ("cossim", "l2_ratio", "l0", "l1")


def core_draws(
    reconstruction: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    d_in: int,
    n_draws: int,
    units: Units,
    model_contexts: Tensor,
) -> dict[str, Tensor]:
    """Draws [R] of the error of SAEBench's metrics from sums by context, the same for every run.

    Explained variance is about the mean over all contexts, whichever are left out.

    Args:
        reconstruction: sums [N] of every context.
        model: sums [M] of the contexts that went through the model.
        d_in: of the activations.
        n_draws: R.
        units: of the N contexts.
        model_contexts: [M], which of them went through the model.

    Returns:
        Metrics with a value and at least `MIN_UNITS` documents.
    """
    found: dict[str, Tensor] = {}
    if (sums := _without_each(reconstruction, units, None)) is not None:
        n = sums["n_tokens"]
        found |= {name: sums[name] / n for name in _MEANS}
        found["explained_variance"] = 1 - sums["error2"] / sums["variance2"]
        found["mse"] = sums["error2"] / n / d_in
        found["relative_reconstruction_bias"] = sums["x_hat2"] / sums["x_dot_x_hat"]
    if (sums := _without_each(model, units, model_contexts)) is not None:
        clean, sae, zero = (
            sums[f"ce_loss_{which}"] / sums["n_predictions"]
            for which in ("without_sae", "with_sae", "with_ablation")
        )
        found["ce_loss_with_sae"] = sae
        found["ce_loss_score"] = (zero - sae) / (zero - clean)
        found["kl_div_with_sae"] = sums["kl_div_with_sae"] / sums["n_tokens"]
        found["kl_div_score"] = 1 - sums["kl_div_with_sae"] / sums["kl_div_with_ablation"]
    return {
        name: jackknife_draws(value[1:], value[0], n_draws)
        for name, value in found.items()
        if value.isfinite().all()
    }


def _without_each(
    sums: Mapping[str, Tensor], units: Units, contexts: Tensor | None
) -> dict[str, Tensor] | None:
    """Sums of all and without each block [1 + G]; None with too few documents."""
    document = units.document if contexts is None else units.document[contexts]
    if len(document[sums["n_tokens"] > 0].unique()) < MIN_UNITS:
        return None
    return {name: units.without_each(value, contexts) for name, value in sums.items()}
