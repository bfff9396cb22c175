"""The temporal-consistency loss: windows of positions -> a graph Laplacian -> a penalty.

Shapes: B contexts, T positions, F features. A window is `window` consecutive positions (stride 1),
all valid and all in one segment; for "document" it is the valid positions of one segment. With
s2[w, j] the unbiased variance of feature j in window w (notation as in
docs/method.md):

    window_variance = (1 / windows) * sum over windows w, features j of s2[w, j]

The sum over windows is a quadratic form in the positions of each context, sum_j f_j^T Q f_j, with

    Q = sum over windows (I_w - 1 1^T / W) / (W - 1)          [T, T], banded, rows sum to zero

so that value and gradient, 2 Q f, cost one [T, T] x [T, F] product a context whatever W is, and no
[windows, W, F] tensor is ever made. Every smoothness penalty on positions is such a Laplacian.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tcsae.positions import permute_within_segments
from tcsae.sparse import SparseCodes
from tcsae.sums import ColumnSums, GradientPart
from tcsae.window_penalty import Form, SparseWindowPenalty, WindowPenalty

Window = int | str  # a number of positions, or "document"


class Laplacian(NamedTuple):
    """Q [B, T, T] (or [1, T, T], the same for every context) and the number of windows, a scalar
    tensor, which may be 0."""

    matrix: Tensor
    n_windows: Tensor


def _window_pairs(window: int, allowed_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, T]: how many allowed windows hold both positions; allowed_BS by first position."""
    before_BT = nn.functional.pad(allowed_BS.to(dtype).cumsum(-1), (1, 0))
    # Windows that hold both start from u - W + 1 to t, where t <= u. Both counts only grow with the
    # position: the lesser of two is that of the earlier position, the greater that of the later.
    padding = window - 1
    up_to_BT = nn.functional.pad(before_BT[:, None, 1:], (0, padding), mode="replicate")[:, 0]
    before_BT = nn.functional.pad(before_BT[:, :-1], (padding, 0))
    pairs_BTT = torch.minimum(up_to_BT[:, :, None], up_to_BT[:, None, :])
    pairs_BTT.sub_(torch.maximum(before_BT[:, :, None], before_BT[:, None, :]))
    return pairs_BTT.clamp_(min=0)


def window_laplacian(
    window: Window,
    n_positions: int,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Laplacian:
    """The Laplacian of all windows of a batch.

    Args:
        window: positions in a window, 2 to `n_positions`, or "document".
        segments: [B, T] integers, the document of every position; None: one document a context.
        valid: [B, T] bool; None: all valid.

    Raises:
        ValueError: a window that is no such number.
    """
    for given in (segments, valid):
        device = given.device if given is not None and device is None else device
    if segments is None:
        segments = torch.zeros(1, n_positions, dtype=torch.int32, device=device)
    if valid is None:
        valid = torch.ones(1, n_positions, dtype=torch.bool, device=device)
    if window == "document":
        return _document_laplacian(segments, valid, dtype)
    if not isinstance(window, int) or isinstance(window, bool) or not 2 <= window <= n_positions:
        raise ValueError(f'window = {window}: must be 2 to {n_positions} positions, or "document"')
    # A position breaks the run where it is invalid or starts another segment than its predecessor.
    n_invalid = nn.functional.pad((~valid).to(torch.int32).cumsum(-1), (1, 0))
    changes = nn.functional.pad((segments[:, 1:] != segments[:, :-1]).to(torch.int32), (1, 0))
    n_changes = changes.cumsum(-1)
    allowed_BS = (n_invalid[:, window:] == n_invalid[:, :-window]) & (
        n_changes[:, window - 1 :] == n_changes[:, : n_positions - window + 1]
    )
    matrix = _window_pairs(window, allowed_BS, dtype)
    diagonal_BT = matrix.diagonal(dim1=-2, dim2=-1)
    n_windows_BT = diagonal_BT.clone()
    matrix.div_(-window * (window - 1))
    diagonal_BT.add_(n_windows_BT / (window - 1))
    return Laplacian(matrix, allowed_BS.sum())


def _document_laplacian(segments: Tensor, valid: Tensor, dtype: torch.dtype) -> Laplacian:
    """One window for the valid positions of every segment that has at least two."""
    same = (segments[:, :, None] == segments[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    length_BT = same.sum(-1)
    counted = length_BT >= 2
    safe = length_BT.clamp(min=2).to(dtype)[:, :, None]
    weights = same.to(dtype) * counted[:, :, None].to(dtype)
    matrix = (torch.diag_embed(counted.to(dtype)) - weights / safe) / (safe - 1)
    first = torch.tril(same, diagonal=-1).any(-1)
    return Laplacian(matrix, (counted & ~first).sum())


def _expanded_count(laplacian: Laplacian, n_contexts: int) -> Tensor:
    repeats = n_contexts if laplacian.matrix.shape[0] == 1 else 1
    return (laplacian.n_windows * repeats).clamp(min=1)


def window_variance(
    features: Tensor,
    window: Window,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Mean over windows of the summed unbiased variance of all features, differentiable.

    Args:
        features: [B, T, F] activations.
        window: positions in a window (stride 1), or "document".
        segments: [B, T] integers, document of every position; windows never cross documents.
        valid: [B, T] bool; a window that holds an invalid position is left out.

    Returns:
        A scalar, in squared units of `features`; 0 where there is no window.

    Equal to ``features.unfold(1, W, 1).var(-1)`` summed over features and averaged over the counted
    windows, in O(B T^2 F) for any W (closed form at the top of this file).
    """
    per_feature = feature_window_variance(features, window, segments=segments, valid=valid)
    return per_feature.sum()


def feature_window_variance(
    features: Tensor,
    window: Window,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """`window_variance` feature by feature, [F]."""
    laplacian = window_laplacian(
        window,
        features.shape[1],
        segments=segments,
        valid=valid,
        device=features.device,
        dtype=features.dtype if features.dtype == torch.float64 else torch.float32,
    )
    centred, _ = _centred(features.to(laplacian.matrix.dtype), valid)
    smooth = laplacian.matrix @ centred
    return (centred * smooth).sum((0, 1)) / _expanded_count(laplacian, features.shape[0])


def _centred(features_BTF: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features less their mean over valid positions, invalid ones set to zero; and the number of
    valid positions. Q is blind to the mean and to invalid positions; without this, features far
    from zero would cancel in float32, and a huge invalid value would."""
    if valid_BT is None:
        count = torch.tensor(features_BTF.shape[0] * features_BTF.shape[1], dtype=torch.float32)
        return features_BTF - features_BTF.detach().mean((0, 1)), count.to(features_BTF.device)
    mask = valid_BT[..., None]
    kept = torch.where(mask, features_BTF, 0)
    count = valid_BT.sum().clamp(min=1).to(features_BTF.dtype)
    mean = kept.detach().sum((0, 1)) / count
    return torch.where(mask, kept - mean, 0), count


def scale_free_window_variance(
    features: Tensor,
    window: Window,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """sum_j sg(v_j) s2_j / v_j: the value of `window_variance`, blind in its gradient to scale.

    s2_j is the window variance of feature j over the batch and v_j its variance over the batch's
    valid positions (both as in `window_variance`; sg = stop-gradient). Arguments as there.
    """
    return _blind_to_offsets(features, window, segments, valid, "scale_free")


def slow_feature_penalty(
    features: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Slow features (Wiskott and Sejnowski 2002): the adjacent difference at variance 1.

    sum_j sg(mean v / v_j) s2_j with windows of 2, s2_j = mean (f_t - f_{t-1})^2 / 2 and the mean of
    v over features that have variance; the gradient is blind to the scale of a feature, as in
    `scale_free_window_variance`. So every feature weighs alike, where the other forms weigh by
    variance (but at most 100 times what it weighs there: a feature that fires twice in a batch must
    not decide the step). Arguments as of `window_variance`.
    """
    return _blind_to_offsets(features, 2, segments, valid, "slow")


def _blind_to_offsets(
    features: Tensor, window: Window, segments: Tensor | None, valid: Tensor | None, form: Form
) -> Tensor:
    """A form that divides by v_j: taking out the mean keeps float32 from cancelling."""
    if valid is None:
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    centred, _ = _centred(features, valid)
    return _window_penalty(centred, window, segments, valid, form)


def _window_penalty(
    features: Tensor | SparseCodes,
    window: Window,
    segments: Tensor | None,
    valid: Tensor,
    form: Form,
    *,
    sums_F: Tensor | None = None,
    order_BT: Tensor | None = None,
    parts: list[GradientPart] | None = None,
) -> Tensor:
    """The penalty of features [B, T, F] that are zero at invalid positions, or of sparse codes.

    `sums_F` and `parts` as of `Consistency.forward`. With `order_BT`, of the features at permuted
    positions, f[order]: the Laplacian is permuted.
    """
    dtype = features.dtype if isinstance(features, Tensor) else features.values_M.dtype
    wide = torch.promote_types(dtype, torch.float32)
    laplacian = window_laplacian(window, valid.shape[1], segments=segments, valid=valid, dtype=wide)
    matrix, count = laplacian.matrix, _expanded_count(laplacian, len(valid))
    if order_BT is not None:
        back_BT = order_BT.argsort(dim=1)
        matrix = matrix.expand(len(order_BT), -1, -1)
        matrix = matrix.gather(1, back_BT[:, :, None].expand_as(matrix))
        matrix = matrix.gather(2, back_BT[:, None, :].expand_as(matrix))
    n_valid = valid.sum().clamp(min=1)
    if not isinstance(features, Tensor):
        return SparseWindowPenalty.apply(features.values_M, features, matrix, count, n_valid, form)
    if sums_F is None and form != "window_variance":
        sums_F = ColumnSums.apply(features.flatten(0, 1))
    return WindowPenalty.apply(features, sums_F, matrix, count, n_valid, form, parts)


class Consistency(nn.Module):
    """A temporal penalty as the trainer calls it; `state_dict` holds all the state it has.

    Args:
        form: "scale_free", "window_variance", "slow", "batch_history" or "none".
        window: positions in a window (batches, for batch_history), or "document"; slow compares
            neighbours whatever it is.
        shuffle_positions: permute valid positions within their document first (the control).
        scale_by_window: batch_history's second version, divided by `window`.
    """

    history: Tensor
    filled: Tensor

    def __init__(
        self,
        form: str,
        window: Window,
        *,
        shuffle_positions: bool = False,
        scale_by_window: bool = False,
        d_sae: int = 0,
    ) -> None:
        super().__init__()
        self.form, self.window = form, window
        self.shuffle_positions, self.scale_by_window = shuffle_positions, scale_by_window
        if form == "batch_history":
            self.register_buffer("history", torch.zeros(int(window) - 1, d_sae))
            self.register_buffer("filled", torch.zeros((), dtype=torch.long))
            self.n_older = 0  # `filled`, as the host knows it
            self.register_load_state_dict_post_hook(_read_filled)

    def forward(
        self,
        features: Tensor | SparseCodes,
        *,
        segments: Tensor,
        valid: Tensor,
        generator: torch.Generator | None = None,
        sums_F: Tensor | None = None,
        parts: list[GradientPart] | None = None,
    ) -> Tensor:
        """The penalty, a scalar not yet multiplied by lambda.

        `features` [B, T, F] must be zero where `valid` is false, as an SAE's training pass gives
        them; `sums_F` are their sums over positions with a gradient of their own, if there are any.
        If whoever made the features takes `parts` of their gradient (`Codes.parts`), the backward
        pass may put its own there and give the features none.
        """
        if self.form == "none":
            return torch.zeros((), device=valid.device)
        if self.form == "batch_history":
            return self._batch_history(features, valid)
        order_BT = None
        if self.shuffle_positions:
            assert generator is not None
            order_BT = permute_within_segments(segments, valid, generator)
        return _window_penalty(
            features,
            2 if self.form == "slow" else self.window,
            segments,
            valid,
            self.form,  # type: ignore[arg-type]
            sums_F=sums_F,
            order_BT=order_BT,
            parts=parts,
        )

    def _batch_history(self, features: Tensor | SparseCodes, valid: Tensor) -> Tensor:
        """Variance (ddof 1) over the last `window` batch means, averaged over features."""
        if isinstance(features, Tensor):
            sums_F = torch.where(valid[..., None], features.float(), 0).sum((0, 1))
        else:
            sums_F = features.sums()
        mean_F = sums_F / valid.sum().clamp(min=1)
        older = self.history[len(self.history) - self.n_older :]
        penalty = mean_F.new_zeros(())
        if self.n_older:
            penalty = torch.cat([older, mean_F[None]]).var(0, correction=1).mean()
        if len(self.history):
            self.history = torch.cat([self.history[1:], mean_F.detach()[None]])
            self.n_older = min(self.n_older + 1, len(self.history))
            self.filled.fill_(self.n_older)
        return penalty / int(self.window) if self.scale_by_window else penalty


def _read_filled(module: Any, _keys: object) -> None:
    module.n_older = int(module.filled)


def build_consistency(cfg: Any, window: Window, d_sae: int) -> Consistency:
    """From a config with the keys form, shuffle_positions and scale_by_window."""
    options: Mapping[str, Any] = {
        "shuffle_positions": cfg.shuffle_positions,
        "scale_by_window": cfg.scale_by_window,
    }
    return Consistency(cfg.form, window, d_sae=d_sae, **options)
