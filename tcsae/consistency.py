"""The temporal-consistency loss: windows of positions -> a graph Laplacian -> a penalty.

Shapes: B contexts, T positions, F features. A window is `window` consecutive positions (stride 1),
all valid and all in one segment; for "document" it is the valid positions of one segment. With
s2[w, j] the unbiased variance of feature j in window w (notation as in docs/method.md):

    window_variance = (1 / windows) * sum over windows w, features j of s2[w, j]

The sum over windows is a quadratic form in the positions of each context, sum_j f_j^T Q f_j, with

    Q = sum over windows (I_w - 1 1^T / W) / (W - 1)          [T, T], banded, rows sum to zero

so that value and gradient, 2 Q f, cost one [T, T] x [T, F] product a context whatever W is, and no
[windows, W, F] tensor is ever made. Every smoothness penalty on positions is such a Laplacian.

Windows see some positions more often than others: few hold one near the edge of a context or of a
document, or beside a position that is left out. Their own measure of positions is the diagonal of
Q: it adds up to the number of windows, and by it

    v_j = mean over windows of (W - 1) / W s2[w, j] + variance over windows of the windows' means

exactly, so that s2_j / v_j is a share. Against a variance over all positions alike it is none, and
falls when a feature moves its energy to where few windows look (`variance_over="positions"`, kept
to repeat what was done with it).

The position term b_j is the variance of feature j between positions, over pairs of different
contexts, so that its expectation is 0 for a feature that does not know its position, however long
it lasts. It too is a quadratic form: a part within contexts, which joins Q, and a part in the sums
over contexts S_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tcsae.losses.laplacian import Window, window_counts, window_laplacian
from tcsae.losses.window_penalty import Form, SparseWindowPenalty, WindowPenalty
from tcsae.products import products_for
from tcsae.products.penalty import Weights
from tcsae.tensors.over_ranks import summed
from tcsae.tensors.positions import permute_within_segments
from tcsae.tensors.sparse import SparseCodes

VarianceOver = Literal["windows", "positions"]


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
    return window_moments(features, window, segments=segments, valid=valid).within_F


class WindowMoments(NamedTuple):
    """By feature, [F] each, differentiable; 0 where there is no window."""

    within_F: Tensor
    """s2_j: mean over windows of the unbiased variance in a window."""
    measured_F: Tensor
    """v_j: the variance by the windows' own measure of positions. within / measured is the share of
    the variance that lies within windows (times W / (W - 1)); 1 minus it estimates C_W without the
    noise of what the windows do not see."""


def window_moments(
    features: Tensor | SparseCodes,
    window: Window,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> WindowMoments:
    """Both variances of every feature; arguments as of `window_variance`.

    Sparse codes, zero where `valid` [B, T] (which they need) is false, are taken by their entries.
    """
    if not isinstance(features, Tensor):
        return _sparse_moments(features, window, segments, valid)
    wide = torch.promote_types(features.dtype, torch.float32)
    if valid is None:
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    laplacian = window_laplacian(
        window, features.shape[1], segments=segments, valid=valid, dtype=wide
    )
    total = summed(laplacian.n_windows).clamp(min=1)
    # Q is blind to a mean and to invalid positions; without this, features far from zero would
    # cancel in float32, and a huge invalid value would.
    with torch.no_grad():
        sums = [_kept(f, v, wide).sum((0, 1)) for f, v in _pieces(features, valid)]
        n_valid = summed(valid.sum()).clamp(min=1)
        mean_F = summed(torch.stack(sums).sum(0)) / n_valid
    energy_F, sum_F, square_F = features.new_zeros(3, features.shape[2], dtype=wide)
    for f, v, within_BTT in _pieces(features, valid, laplacian.matrix):
        centred = _kept(f - mean_F, v, wide)
        drawn = within_BTT.diagonal(dim1=-2, dim2=-1)[..., None] * centred
        energy_F = energy_F + (centred * (within_BTT @ centred)).sum((0, 1))
        sum_F, square_F = sum_F + drawn.sum((0, 1)), square_F + (drawn * centred).sum((0, 1))
    energy_F, sum_F, square_F = summed(energy_F), summed(sum_F), summed(square_F)
    return WindowMoments(energy_F / total, square_F / total - (sum_F / total).square())


IN_CACHE, AT_MOST = 2**20, 2**27
"""Numbers in a piece of features that stays in a CPU's cache as float32, and in one of which a GPU
may make a few copies."""


def _pieces(features_BTF: Tensor, *others_BT: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few contexts at a time."""
    n_contexts, per_context = len(features_BTF), max(features_BTF[0].numel(), 1)
    products = products_for(features_BTF.device)
    contexts = products.at_once(n_contexts, max(IN_CACHE // per_context, 1))
    contexts = min(contexts, max(AT_MOST // per_context, 1))
    tensors = (features_BTF, *others_BT)
    return zip(*(tensor.split(contexts) for tensor in tensors), strict=True)


def _kept(features_BTF: Tensor, valid_BT: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(valid_BT[..., None], features_BTF, 0).to(dtype)


def _sparse_moments(
    codes: SparseCodes, window: Window, segments: Tensor | None, valid: Tensor | None
) -> WindowMoments:
    """Not centred: a feature that is off at most tokens has its mean near 0."""
    if valid is None:
        raise ValueError("sparse codes say nothing of contexts: their moments need `valid`")
    wide = codes.values_M.dtype
    laplacian = window_laplacian(window, valid.shape[1], segments=segments, valid=valid, dtype=wide)
    total = summed(laplacian.n_windows).clamp(min=1)
    products = products_for(codes.values_M.device)
    f_M = codes.values_M.index_select(0, codes.order_M)
    measure_BT = laplacian.matrix.diagonal(dim1=-2, dim2=-1)
    drawn_M = f_M * measure_BT.reshape(-1).index_select(0, codes.sorted_token_M)
    # Sums of bfloat16 products would be coarser than the codes themselves.
    smooth_M = products.smooth(codes._replace(dtype=wide), f_M, laplacian.matrix)
    energy_F = summed(products.sorted_sums(codes, smooth_M, f_M))
    sum_F, square_F = (
        summed(products.sorted_sums(codes, drawn_M, factor)) for factor in (None, f_M)
    )
    return WindowMoments(energy_F / total, square_F / total - (sum_F / total).square())


def _centred(features_BTF: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Features less their mean over valid positions, invalid ones set to zero. Q is blind to the
    mean and to invalid positions; without this, features far from zero would cancel in float32,
    and a huge invalid value would."""
    if valid_BT is None:
        return features_BTF - features_BTF.detach().mean((0, 1))
    mask = valid_BT[..., None]
    kept = torch.where(mask, features_BTF, 0)
    count = valid_BT.sum().clamp(min=1).to(features_BTF.dtype)
    mean = kept.detach().sum((0, 1)) / count
    return torch.where(mask, kept - mean, 0)


def position_variance(features: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """b_j: the variance of every feature between positions, without bias, [F], differentiable.

    With v_nt = 1 where position t of context n is valid, C_t = sum_n v_nt, S_t = sum_n f_nt,
    R_n = sum_t f_nt and Y_n = sum_t v_nt, over positions with C_t >= 2,

        b = sum_t (S_t^2 - sum_n f_nt^2) / (C_t - 1) / sum_t C_t
            - ((sum_n R_n)^2 - sum_n R_n^2) / ((sum_n Y_n)^2 - sum_n Y_n^2),

    the mean square of position means less the square of their mean, both over pairs of different
    contexts; a position weighs by its valid tokens. 0 in expectation for a feature that does not
    know its position, whatever its memory; may be negative. (The mean over valid tokens is taken
    out first: where masks differ between contexts that lessens the noise.)

    Args:
        features: [B, T, F] activations, B >= 2.
        valid: [B, T] bool; None: all valid.

    Raises:
        ValueError: a single context has no pairs.
    """
    if valid is None:
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    wide = torch.promote_types(features.dtype, torch.float32)
    f_BTF = _centred(features.to(wide), valid)
    pairs = _position_pairs(valid, wide)
    f_BTF = f_BTF * pairs.counted_T[:, None]
    squares_TF = f_BTF.square().sum(0)
    sums_TF, context_BF = f_BTF.sum(0), f_BTF.sum(1)
    spread_F = (pairs.spread_T[:, None] * (sums_TF.square() - squares_TF)).sum(0)
    joint_F = context_BF.sum(0).square() - context_BF.square().sum(0)
    return spread_F - pairs.joint * joint_F


class _PositionPairs(NamedTuple):
    """b = sum_t spread_t (S_t^2 - sum_n f_nt^2) - joint ((sum_n R_n)^2 - sum_n R_n^2), with R_n the
    sum over positions that are counted."""

    spread_T: Tensor
    joint: Tensor
    counted_T: Tensor
    """1 where the position is valid in two contexts or more, else 0."""


def _position_pairs(valid: Tensor, dtype: torch.dtype) -> _PositionPairs:
    if len(valid) < 2:
        raise ValueError("the position term compares contexts: a batch of one has no pair of them")
    count_T = summed(valid.sum(0)).to(dtype)
    counted_T = (count_T >= 2).to(dtype)
    n_tokens = (count_T * counted_T).sum().clamp(min=1)
    spread_T = counted_T / ((count_T - 1).clamp(min=1) * n_tokens)
    by_context_B = valid.to(dtype) @ counted_T
    n_pairs = summed(by_context_B.sum()).square() - summed(by_context_B.square().sum())
    joint = torch.where(n_pairs > 0, 1 / n_pairs.clamp(min=1), 0)
    return _PositionPairs(spread_T, joint, counted_T)


def scale_free_window_variance(
    features: Tensor,
    window: Window,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
    variance_over: VarianceOver = "windows",
    position_weight: float = 0.0,
) -> Tensor:
    """sum_j sg(v_j) (s2_j + beta b_j) / v_j: blind in its gradient to the scale of features.

    s2_j is the window variance of feature j over the batch, v_j its variance by the windows' own
    measure of positions (`window_moments`), b_j its `position_variance`, beta `position_weight`;
    sg = stop-gradient. Without beta, the value of `window_variance`.

    Args:
        variance_over: "positions" takes v_j over all valid positions alike, as the first version
            did: it can be lowered by moving a feature's energy to the edges of contexts.
        position_weight: beta.

    The others are as of `window_variance`.

    Raises:
        ValueError: a position term of a single context.
    """
    options = _Options("scale_free", variance_over, position_weight)
    return _blind_to_offsets(features, window, segments, valid, options)


def slow_feature_penalty(
    features: Tensor,
    *,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
    variance_over: VarianceOver = "windows",
) -> Tensor:
    """Slow features (Wiskott and Sejnowski 2002): the adjacent difference at variance 1.

    sum_j sg(mean v / v_j) s2_j with windows of 2, s2_j = mean (f_t - f_{t-1})^2 / 2 and the mean of
    v over features that have variance; the gradient is blind to the scale of a feature, as in
    `scale_free_window_variance`. So every feature weighs alike, where the other forms weigh by
    variance (but at most 100 times what it weighs there: a feature that fires twice in a batch must
    not decide the step). Arguments as of `scale_free_window_variance`.
    """
    return _blind_to_offsets(features, 2, segments, valid, _Options("slow", variance_over))


class _Options(NamedTuple):
    form: Form
    variance_over: VarianceOver = "windows"
    position_weight: float = 0.0


def _blind_to_offsets(
    features: Tensor,
    window: Window,
    segments: Tensor | None,
    valid: Tensor | None,
    options: _Options,
) -> Tensor:
    """A form that divides by v_j: taking out the mean keeps float32 from cancelling."""
    if valid is None:
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    wide = torch.promote_types(features.dtype, torch.float32)
    weights = _batch_weights(window, segments, valid, options, None, wide)
    return _penalty(_centred(features, valid), weights, options.form)


def _batch_weights(
    window: Window,
    segments: Tensor | None,
    valid: Tensor,
    options: _Options,
    order_BT: Tensor | None,
    dtype: torch.dtype,
) -> Weights:
    """What windows and pairs of a batch weigh; with `order_BT`, of the features at permuted
    positions, f[order]: all that is said of positions is permuted."""
    counts = windows_BTT = None
    if window == "document":
        windows_BTT, n_windows = window_laplacian(
            window, valid.shape[1], segments=segments, valid=valid, dtype=dtype
        )
        # Copied: the diagonal of what the position term is added to.
        measure_BT = windows_BTT.diagonal(dim1=-2, dim2=-1).clone()
    else:
        if segments is None:
            segments = torch.zeros_like(valid[:1], dtype=torch.int32)
        counts, n_windows = window_counts(window, valid.shape[1], segments, valid, dtype)
        measure_BT = counts.diagonal()
    if options.variance_over == "positions":
        measure_BT = valid.to(dtype)
    spread_T = joint = counted_T = None
    if options.position_weight:
        pairs = _position_pairs(valid, dtype)
        spread_T = options.position_weight * pairs.spread_T
        joint, counted_T = options.position_weight * pairs.joint, pairs.counted_T
    place_BT = None
    if order_BT is not None:
        place_BT = order_BT.argsort(dim=1)
        measure_BT = measure_BT.gather(1, place_BT)
    position = spread_T, joint, counted_T, place_BT
    n_windows = summed(n_windows).clamp(min=1)
    weights = Weights(windows_BTT, n_windows, measure_BT, *position, counts)
    if counts is not None and products_for(valid.device).takes_counts:
        return weights
    return weights._replace(within_BTT=weights.matrix())


def _dtype_of(features: Tensor | SparseCodes) -> torch.dtype:
    return features.dtype if isinstance(features, Tensor) else features.values_M.dtype


def _penalty(features: Tensor | SparseCodes, weights: Weights, form: Form) -> Tensor:
    """The penalty of features [B, T, F] that are zero at invalid positions, or of sparse codes."""
    if not isinstance(features, Tensor):
        return SparseWindowPenalty.apply(features.values_M, features, weights, form)
    return WindowPenalty.apply(features, weights, form)


class Consistency(nn.Module):
    """A temporal penalty as the trainer calls it. `state_dict` holds all its state.

    Args:
        form: "scale_free", "window_variance", "slow", "batch_history" or "none".
        window: positions in a window (batches, for batch_history), or "document"; slow compares
            neighbours whatever it is.
        shuffle_positions: permute valid positions within their document first (the control).
        scale_by_window: batch_history's second version, divided by `window`.
        variance_over: what v_j is taken over, as of `scale_free_window_variance`.
        position_weight: beta, the weight of the position term.
        n_features: the penalty is on the first so many features; None: on all.
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
        variance_over: VarianceOver = "windows",
        position_weight: float = 0.0,
        n_features: int | None = None,
        d_sae: int = 0,
    ) -> None:
        super().__init__()
        self.form, self.window = form, window
        self.shuffle_positions, self.scale_by_window = shuffle_positions, scale_by_window
        self.options = _Options(form, variance_over, position_weight)  # type: ignore[arg-type]
        self.n_features = n_features
        if form == "batch_history":
            self.register_buffer("history", torch.zeros(int(window) - 1, n_features or d_sae))
            self.register_buffer("filled", torch.zeros((), dtype=torch.long))
            self.n_older = 0  # `filled`, as the host knows it
            self.register_load_state_dict_post_hook(_read_filled)

    def weights(
        self,
        *,
        segments: Tensor,
        valid: Tensor,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Weights | None:
        """All that the penalty of a batch takes from its masks; None: nothing. `dtype`: in which.

        Raises:
            ValueError: a position term of a single context.
        """
        if self.form in ("none", "batch_history"):
            return None
        order_BT = None
        if self.shuffle_positions:
            assert generator is not None
            order_BT = permute_within_segments(segments, valid, generator)
        window = 2 if self.form == "slow" else self.window
        return _batch_weights(window, segments, valid, self.options, order_BT, dtype)

    def forward(
        self,
        features: Tensor | SparseCodes,
        *,
        segments: Tensor,
        valid: Tensor,
        generator: torch.Generator | None = None,
        weights: Weights | None = None,
    ) -> Tensor:
        """The penalty, a scalar not yet multiplied by lambda.

        `features` [B, T, F] must be zero where `valid` is false, as an SAE's training pass gives
        them. `weights`: those of the batch, where they are at hand already.

        Raises:
            ValueError: a position term of a single context.
        """
        if self.form == "none":
            return torch.zeros((), device=valid.device)
        if self.form == "batch_history":
            return self._batch_history(features, valid)
        features = self._chosen(features)
        if weights is None:
            wide = torch.promote_types(_dtype_of(features), torch.float32)
            weights = self.weights(segments=segments, valid=valid, generator=generator, dtype=wide)
            assert weights is not None
        return _penalty(features, weights, self.options.form)

    @torch.no_grad()
    def after_step(self, features: Tensor | SparseCodes, *, valid: Tensor) -> None:
        """Once after every optimizer step with a penalty: its batch joins batch_history's."""
        if self.form != "batch_history" or not len(self.history):
            return
        mean_F = self._batch_mean(features, valid)
        self.history = torch.cat([self.history[1:], mean_F[None]])
        self.n_older = min(self.n_older + 1, len(self.history))
        self.filled.fill_(self.n_older)

    def _chosen(self, features: Tensor | SparseCodes) -> Tensor | SparseCodes:
        """Those of the features that the penalty is on."""
        if self.n_features is None:
            return features
        if isinstance(features, Tensor):
            return features[..., : self.n_features]
        return products_for(features.values_M.device).first(features, self.n_features)

    def _batch_history(self, features: Tensor | SparseCodes, valid: Tensor) -> Tensor:
        """Variance (ddof 1) over the last `window` batch means, averaged over features."""
        mean_F = self._batch_mean(features, valid)
        older = self.history[len(self.history) - self.n_older :]
        penalty = mean_F.new_zeros(())
        if self.n_older:
            penalty = torch.cat([older, mean_F[None]]).var(0, correction=1).mean()
        return penalty / int(self.window) if self.scale_by_window else penalty

    def _batch_mean(self, features: Tensor | SparseCodes, valid: Tensor) -> Tensor:
        """[F] over the valid tokens, of those of the features that the penalty is on."""
        if isinstance(features, Tensor):
            kept_BTF = features[..., : self.n_features].float()
            sums_F = torch.where(valid[..., None], kept_BTF, 0).sum((0, 1))
        else:
            sums_F = features.sums()[: self.n_features]
        return sums_F / valid.sum().clamp(min=1)


def _read_filled(module: Any, _keys: object) -> None:
    module.n_older = int(module.filled)


def build_consistency(cfg: Any, window: Window, group_sizes: Sequence[int]) -> Consistency:
    """From a `ConsistencyConfig`, and the features in each group of the dictionary."""
    first = group_sizes[0] if cfg.features == "first_group" else None
    return Consistency(
        cfg.form,
        window,
        shuffle_positions=cfg.shuffle_positions,
        scale_by_window=cfg.scale_by_window,
        variance_over=cfg.variance_over,
        position_weight=cfg.position_weight,
        n_features=first,
        d_sae=sum(group_sizes),
    )
