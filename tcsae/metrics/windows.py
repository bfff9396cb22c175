"""Which windows can be measured, and the metrics of a window that are made of other metrics.

Shapes: F features, K = max_lag, L bands of long lags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tcsae.metrics.document import local_part, long_lags, nested_shares

# Features on at a smaller share of the valid tokens are sparse: what a feature that is on most of
# the time keeps says little about what it stands for.
SPARSE = 0.1

# Window of the nested shares where it was measured: one for all runs, so that they compare.
SHARES_WINDOW = 8


def windows_left_out(windows: Sequence[int], max_lag: int, pairs_K: Tensor) -> dict[int, str]:
    """Windows without a C_W, each with the reason; pairs_K as of `Autocorrelation.pairs`."""
    reasons = {}
    for window in windows:
        needs = f"needs lags up to {window - 1}"
        if window > max_lag + 1:
            reasons[window] = f"{needs}; the largest measured is {max_lag}"
        elif not pairs_K[1:window].all():
            reasons[window] = f"{needs}; no segment has valid tokens that far apart"
    return reasons


def document_left_out(
    usable: Sequence[int], n_positions: int, pairs_of: Mapping[int, float]
) -> dict[int, str]:
    """Windows with a C_W but without a D_W, each with the reason.

    Args:
        usable: the windows with a C_W.
        n_positions: T.
        pairs_of: counted pairs in the band of every window that has one.
    """
    reasons = {}
    for window in usable:
        first, last = long_lags(window, n_positions)
        needs = f"needs lags from {first}"
        if window not in pairs_of:
            reasons[window] = f"{needs}; 3/4 of the context is {last}"
        elif not pairs_of[window]:
            reasons[window] = f"{needs}; no segment has valid tokens that far apart"
    return reasons


def shares_window(with_document: Sequence[int]) -> int | None:
    """W of the nested shares: 8, else the largest below it, else the smallest."""
    fitting = [w for w in with_document if w <= SHARES_WINDOW] or sorted(with_document)[:1]
    return max(fitting, default=None)


def window_metric_names(usable: Sequence[int]) -> list[str]:
    """C_W, D_W, L_W, and the first and last of sparse features, of every window with a C_W."""
    plain = [f"{part}_{w}" for w in usable for part in "CDL"]
    return plain + [f"{part}_{w}_sparse" for w in usable for part in "CL"]


def made_of_windows(
    values: Mapping[str, Tensor],
    document: Tensor,
    bands: Sequence[int],
    usable: Sequence[int],
    shares_at: int | None,
) -> dict[str, Tensor]:
    """D_W and L_W of every usable window, and the nested shares at one of them, [..., F] each.

    Args:
        values: C_W and omega_squared, [..., F].
        document: D by band, [..., L, F].
        bands: the window of every band.
        usable: the windows with a C_W.
        shares_at: W of the nested shares. None: no shares.
    """
    found = {}
    for w in usable:
        consistency = values[f"C_{w}"]
        found[f"D_{w}"] = torch.full_like(consistency, torch.nan)
        if w in bands:
            found[f"D_{w}"] = document[..., list(bands).index(w), :].to(consistency)
        found[f"L_{w}"] = local_part(consistency, found[f"D_{w}"])
    if shares_at is not None:
        part = found[f"D_{shares_at}"]
        omega = values["omega_squared"].to(part)
        found |= nested_shares(omega, part, values[f"C_{shares_at}"])
    return found


def weighed(
    name: str, values: Mapping[str, Tensor], energy: Tensor, density_F: Tensor
) -> tuple[Tensor, Tensor]:
    """A metric of every feature, [..., F], and the weights of its energy-weighted mean.

    L_W has the weights energy (1 - D_W), with which its mean is the ratio of the energy-weighted
    sums of C_W - D_W and of 1 - D_W: a feature of nothing but its document has no local part, and
    no weight. omega^2 and the nested shares have the whole variance for weights, energy /
    (1 - omega^2), with which their means are the shares of the summed variance. A name that ends
    in `_sparse` is NaN where the density is not under `SPARSE`.
    """
    plain = name.removesuffix("_sparse")
    value, weights = values[plain], energy
    if plain != name:
        value = torch.where(density_F < SPARSE, value, torch.nan)
    if plain == "omega_squared" or plain.startswith("share_"):
        weights = energy / (1.0 - values["omega_squared"])
    if plain.startswith("L_"):
        weights = energy * (1.0 - values[f"D_{plain[2:]}"]).clamp(min=0.0)
    return value, weights
