"""Triton kernels for products with sparse codes. Nothing else imports Triton but `triton_gpu`.

Rules that they keep: every load of rows is followed by `.to(tl.float32)` (bfloat16 arithmetic is
wrong in Triton's interpreter, in which they are tested); no autotune (a timing would choose the
order of sums) and no atomics (their order changes): a step repeated has the same bits; pointers are
offset in 64 bits; every grid is known to the host without a look at the device.

Shapes: N tokens, F features, D = d_in, T positions, M entries, S entries in a piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ------------------------------------------------------------------ sums of gathered rows


@triton.jit
def _tile_sum(
    rows, index, weight, first, last, d, is_d, D, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK]: the sum over entries m in [first, last) of weight[m] * rows[index[m], d].

    TILE sums side by side, joined at the end: joined in the loop they would cost 8 barriers a turn,
    for warps share the rows.
    """
    acc = tl.zeros([TILE, BLOCK], tl.float32)
    for m in range(first, last, TILE):
        at = m + tl.arange(0, TILE)
        is_m = at < last
        row = tl.load(index + at, mask=is_m, other=0).to(tl.int64)
        w = tl.load(weight + at, mask=is_m, other=0.0).to(tl.float32)
        is_md = is_m[:, None] & is_d[None, :]
        x = tl.load(rows + row[:, None] * D + d[None, :], mask=is_md, other=0.0).to(tl.float32)
        acc += x * w[:, None]
    return tl.sum(acc, axis=0)


@triton.jit
def decode_kernel(
    out, rows, index, weight, start, N, M, D, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[n] = sum of weight[m] * rows[index[m]] over the entries of token n.
    Grid (N, D / BLOCK)."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(start + n), tl.load(start + n + 1, mask=n + 1 < N, other=M)
    acc = _tile_sum(rows, index, weight, first, last, d, d < D, D, TILE, BLOCK)
    tl.store(out + n * D + d, acc, mask=d < D)


@triton.jit
def pieces_kernel(
    out, partial, rows, index, weight, start, of_piece, first_piece, first_part, F, M, D, S,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of one feature's entries. A feature of one piece (also of none) writes its row;
    of several, each writes to `partial`. Grid (F + M / S, D / BLOCK)."""
    p = tl.program_id(0)
    j = tl.load(of_piece + p)
    if j < F:
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        begin, end = tl.load(start + j), tl.load(start + j + 1, mask=j + 1 < F, other=M)
        number = p - tl.load(first_piece + j)
        first = begin + number * S
        last = tl.minimum(first + S, end)
        acc = _tile_sum(rows, index, weight, first, last, d, d < D, D, TILE, BLOCK)
        if end - begin <= S:
            tl.store(out + j.to(tl.int64) * D + d, acc, mask=d < D)
        else:
            part = (tl.load(first_part + j) + number).to(tl.int64)
            tl.store(partial + part * D + d, acc, mask=d < D)


@triton.jit
def join_kernel(out, partial, several, start, first_part, F, M, D, S, BLOCK: tl.constexpr):
    """Features of several pieces: the sum of their parts, in order. `several` lists them, F at its
    unused end. Grid (at most M / S, D / BLOCK)."""
    j = tl.load(several + tl.program_id(0)).to(tl.int64)
    if j < F:
        n = tl.load(start + j + 1, mask=j + 1 < F, other=M) - tl.load(start + j)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        part = partial + tl.load(first_part + j).to(tl.int64) * D + d
        acc = tl.zeros([BLOCK], tl.float32)
        for p in range(0, (n + S - 1) // S):
            acc += tl.load(part + p * D, mask=d < D, other=0.0)
        tl.store(out + j * D + d, acc, mask=d < D)


@triton.jit
def sampled_kernel(parts, rows, W, index, start, N, M, D, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """parts[b, m] = <rows[n], W[index[m]]> over block b of D, for the entries m of token n.

    Grid (N, D / BLOCK): all tokens of one block come before the next, whose columns of W (F x
    BLOCK) fit in the device's second cache where the whole of W does not.
    """
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1)
    d = b * BLOCK + tl.arange(0, BLOCK)
    is_d = d < D
    x = tl.load(rows + n * D + d, mask=is_d, other=0.0).to(tl.float32)
    first, last = tl.load(start + n), tl.load(start + n + 1, mask=n + 1 < N, other=M)
    for m in range(first, last, TILE):
        at = m + tl.arange(0, TILE)
        is_m = at < last
        row = tl.load(index + at, mask=is_m, other=0).to(tl.int64)
        is_md = is_m[:, None] & is_d[None, :]
        w = tl.load(W + row[:, None] * D + d[None, :], mask=is_md, other=0.0).to(tl.float32)
        tl.store(parts + b.to(tl.int64) * M + at, tl.sum(w * x[None, :], axis=1), mask=is_m)


# ------------------------------------------------------------------ sums by feature


@triton.jit
def sums_kernel(out, a, b, start, F, M, BLOCK: tl.constexpr):
    """out[j] = sum of a[m] * b[m] over the entries m of feature j, which are sorted. Grid (F,)."""
    j = tl.program_id(0)
    first, last = tl.load(start + j), tl.load(start + j + 1, mask=j + 1 < F, other=M)
    acc = tl.zeros([BLOCK], tl.float32)
    for m in range(first, last, BLOCK):
        at = m + tl.arange(0, BLOCK)
        x = tl.load(a + at, mask=at < last, other=0.0).to(tl.float32)
        acc += x * tl.load(b + at, mask=at < last, other=0.0).to(tl.float32)
    tl.store(out + j, tl.sum(acc))


@triton.jit
def penalty_sums_kernel(
    sums, half, f, smooth, token, measure, place, spread, counted, joint, start, F, M, T,
    POSITIONS: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Of feature j: sums[0] of smooth f, [1] of measure f, [2] of measure f^2 and, with POSITIONS,
    [3] its part between contexts and half[j] that part's half gradient by position. Grid (F,)."""
    j = tl.program_id(0)
    first, last = tl.load(start + j), tl.load(start + j + 1, mask=j + 1 < F, other=M)
    energy = tl.zeros([BLOCK], tl.float32)
    drawn = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    t = tl.arange(0, PLACES)
    at_place = tl.zeros([PLACES], tl.float32)
    for m in range(first, last, BLOCK):
        at = m + tl.arange(0, BLOCK)
        is_m = at < last
        x = tl.load(f + at, mask=is_m, other=0.0).to(tl.float32)
        n = tl.load(token + at, mask=is_m, other=0)
        w = tl.load(measure + n, mask=is_m, other=0.0).to(tl.float32)
        energy += x * tl.load(smooth + at, mask=is_m, other=0.0).to(tl.float32)
        drawn += w * x
        square += w * x * x
        if POSITIONS:
            p = tl.load(place + n, mask=is_m, other=-1) if PLACED else n % T
            here = (p[:, None] == t[None, :]) & is_m[:, None]
            at_place += tl.sum(tl.where(here, x[:, None], 0.0), axis=0)
    tl.store(sums + j, tl.sum(energy))
    tl.store(sums + F + j, tl.sum(drawn))
    tl.store(sums + 2 * F + j, tl.sum(square))
    if POSITIONS:
        c = tl.load(counted + t, mask=t < T, other=0.0).to(tl.float32)
        s = tl.load(spread + t, mask=t < T, other=0.0).to(tl.float32)
        h = s * at_place - c * (tl.load(joint).to(tl.float32) * tl.sum(c * at_place))
        tl.store(sums + 3 * F + j, tl.sum(at_place * h))
        tl.store(half + j.to(tl.int64) * T + t, h, mask=t < T)


@triton.jit
def penalty_gradient_kernel(
    gradient, order, f, smooth, feature, token, measure, place, weight, pull, pull_mean, share,
    half, M, T, POSITIONS: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient[order[m]] = weight smooth - pull measure f + pull_mean measure (+ 2 share half) at
    each entry m, whose feature says which of each. Grid (M / BLOCK,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_m = at < M
    j = tl.load(feature + at, mask=is_m, other=0)
    n = tl.load(token + at, mask=is_m, other=0)
    x = tl.load(f + at, mask=is_m, other=0.0).to(tl.float32)
    m = tl.load(measure + n, mask=is_m, other=0.0).to(tl.float32)
    g = tl.load(smooth + at, mask=is_m, other=0.0).to(tl.float32)
    g = g * tl.load(weight + j, mask=is_m, other=0.0)
    g -= tl.load(pull + j, mask=is_m, other=0.0) * (m * x)
    g += tl.load(pull_mean + j, mask=is_m, other=0.0) * m
    if POSITIONS:
        p = tl.load(place + n, mask=is_m, other=0) if PLACED else n % T
        h = tl.load(half + j.to(tl.int64) * T + p, mask=is_m, other=0.0)
        g += 2 * tl.load(share + j, mask=is_m, other=0.0) * h
    to = tl.load(order + at, mask=is_m, other=0)
    tl.store(gradient + to, g, mask=is_m)


@triton.jit
def _is_near(feature, token, own_feature, own_context, near, M, T):
    """Whether entry `near`, if it is one, is of that feature in that context."""
    is_there = (near >= 0) & (near < M)
    near_feature = tl.load(feature + near, mask=is_there, other=-2)
    near_context = tl.load(token + near, mask=is_there, other=0).to(tl.int32) // T
    return (near_feature == own_feature) & (near_context == own_context)


@triton.jit
def _smoothed_by(f, feature, token, j, context, row, begin, M, T, BLOCK: tl.constexpr):
    """[BLOCK]: what the entries from `begin` on give to those of feature j in the context."""
    at = begin + tl.arange(0, BLOCK)
    is_k = at < M
    j2 = tl.load(feature + at, mask=is_k, other=-2)
    n2 = tl.load(token + at, mask=is_k, other=0).to(tl.int32)
    x = tl.load(f + at, mask=is_k, other=0.0).to(tl.float32)
    same = (j[:, None] == j2[None, :]) & (context[:, None] == (n2 // T)[None, :])
    q = tl.load(row[:, None] + (n2 % T)[None, :], mask=same, other=0.0).to(tl.float32)
    return tl.sum(q * x[None, :], axis=1)


@triton.jit
def smooth_kernel(out, f, feature, token, Q, M, T, PER_CONTEXT: tl.constexpr, BLOCK: tl.constexpr):
    """(Q f)[m] from the entries of its feature in its context, which lie beside it in the order
    (feature, token): BLOCK entries with the blocks before and behind them, as far as the first
    one's and the last one's go. Grid (M / BLOCK,)."""
    begin = tl.program_id(0) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    is_m = at < M
    j = tl.load(feature + at, mask=is_m, other=-1)
    n = tl.load(token + at, mask=is_m, other=0).to(tl.int32)
    context, t = n // T, n % T
    row = Q + (context * T + t if PER_CONTEXT else t).to(tl.int64) * T
    acc = _smoothed_by(f, feature, token, j, context, row, begin, M, T, BLOCK)
    end = tl.minimum(begin + BLOCK, M)
    for side in tl.static_range(2):
        own = begin if side == 0 else end - 1
        own_feature = tl.load(feature + own)
        own_context = tl.load(token + own).to(tl.int32) // T
        step = (2 * side - 1) * BLOCK
        from_, near = begin + step, begin - 1 if side == 0 else begin + BLOCK
        while _is_near(feature, token, own_feature, own_context, near, M, T):
            acc += _smoothed_by(f, feature, token, j, context, row, from_, M, T, BLOCK)
            from_ += step
            near += step
    tl.store(out + at, acc, mask=is_m)


@triton.jit
def _counts_of(
    f, feature, token, up_to, before, place, counted, begin, M, T,
    PER_CONTEXT: tl.constexpr, POSITIONS: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the entries from `begin` on: (feature, context, position, value, both counts, counted)."""
    at = begin + tl.arange(0, BLOCK)
    is_m = at < M
    j = tl.load(feature + at, mask=is_m, other=-1)
    n = tl.load(token + at, mask=is_m, other=0).to(tl.int32)
    x = tl.load(f + at, mask=is_m, other=0.0).to(tl.float32)
    context = n // T
    p = tl.load(place + n, mask=is_m, other=0).to(tl.int32) if PLACED else n % T
    window_at = context * T + p if PER_CONTEXT else p
    up = tl.load(up_to + window_at, mask=is_m, other=0.0).to(tl.float32)
    low = tl.load(before + window_at, mask=is_m, other=0.0).to(tl.float32)
    c = tl.zeros([BLOCK], tl.float32)
    if POSITIONS:
        c = tl.load(counted + p, mask=is_m, other=0.0).to(tl.float32)
    return j, context, p, x, up, low, c


@triton.jit
def _shared(j, context, up, low, c, j2, context2, x2, up2, low2, c2, both, joint):
    """[BLOCK]: what entries 2 give to the others by the windows that hold both, and by pairs."""
    same = (j[:, None] == j2[None, :]) & (context[:, None] == context2[None, :])
    held = tl.minimum(up[:, None], up2[None, :]) - tl.maximum(low[:, None], low2[None, :])
    q = tl.maximum(held, 0.0) * both + joint * c[:, None] * c2[None, :]
    return tl.sum(tl.where(same, q * x2[None, :], 0.0), axis=1)


@triton.jit
def smooth_by_counts_kernel(
    out, f, feature, token, up_to, before, place, spread, counted, joint, windows, M, T, window,
    PER_CONTEXT: tl.constexpr, POSITIONS: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `smooth_kernel`, for the Q that `WindowCounts` and the position term make. Grid (M /
    BLOCK,)."""
    begin = tl.program_id(0) * BLOCK
    j, context, p, x, up, low, c = _counts_of(
        f, feature, token, up_to, before, place, counted, begin, M, T,
        PER_CONTEXT, POSITIONS, PLACED, BLOCK,
    )  # fmt: skip
    both, pairs = -1.0 / (window * (window - 1)), 0.0
    own = (up - low) / (window - 1)
    if POSITIONS:
        n_windows = tl.load(windows).to(tl.float32)
        pairs = n_windows * tl.load(joint).to(tl.float32)
        own -= n_windows * tl.load(spread + p).to(tl.float32)
    acc = own * x + _shared(j, context, up, low, c, j, context, x, up, low, c, both, pairs)
    end = tl.minimum(begin + BLOCK, M)
    for side in tl.static_range(2):
        edge = begin if side == 0 else end - 1
        own_feature = tl.load(feature + edge)
        own_context = tl.load(token + edge).to(tl.int32) // T
        step = (2 * side - 1) * BLOCK
        from_, near = begin + step, begin - 1 if side == 0 else begin + BLOCK
        while _is_near(feature, token, own_feature, own_context, near, M, T):
            j2, context2, p2, x2, up2, low2, c2 = _counts_of(
                f, feature, token, up_to, before, place, counted, from_, M, T,
                PER_CONTEXT, POSITIONS, PLACED, BLOCK,
            )  # fmt: skip
            acc += _shared(j, context, up, low, c, j2, context2, x2, up2, low2, c2, both, pairs)
            from_ += step
            near += step
    at = begin + tl.arange(0, BLOCK)
    tl.store(out + at, acc, mask=at < M)


# ------------------------------------------------------------------ the reconstruction's error


@triton.jit
def error_kernel(error, squares, decoded, bias, x, D, BLOCK: tl.constexpr):
    """error = decoded + bias - x and, by token, the sum of its squares. Grid (N,)."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_d = d < D
    e = tl.load(decoded + n * D + d, mask=is_d, other=0.0).to(tl.float32)
    e += tl.load(bias + d, mask=is_d, other=0.0).to(tl.float32)
    e -= tl.load(x + n * D + d, mask=is_d, other=0.0).to(tl.float32)
    tl.store(error + n * D + d, e, mask=is_d)
    tl.store(squares + n, tl.sum(e * e))


# ------------------------------------------------------------------ selection


@triton.jit
def _keys(x):
    """float32 -> int32 in the same order."""
    b = x.to(tl.int32, bitcast=True)
    return tl.where(b < 0, b ^ 0x7FFFFFFF, b)


@triton.jit
def _chosen(key, k, BITS: tl.constexpr):
    """Bool: the k largest keys, of those that tie with the last the first ones."""
    # The k-th largest, bit by bit; the sign first (keys are signed).
    threshold = -2147483648
    for bit in tl.static_range(BITS):
        step = (1 << (31 - bit)) if bit > 0 else 0
        higher = 0 if bit == 0 else threshold + step
        enough = tl.sum((key >= higher).to(tl.int32)) >= k
        threshold = tl.where(enough, higher, threshold)
    above = key > threshold if BITS == 32 else key > (threshold | ((1 << (32 - BITS)) - 1))
    equal = (key >= threshold) & ~above
    left = k - tl.sum(above.to(tl.int32))
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))


@triton.jit
def groups_kernel(
    groups, pre, F, k, n_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr
):
    """The k groups with the largest maxima; group g holds features g, g + n_groups, and so on.
    Grid (N,)."""
    n = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, GROUPS)
    largest = tl.full([GROUPS], float("-inf"), tl.float32)
    for part in tl.static_range(GROUP):
        at = part * n_groups + g
        x = tl.load(pre + n * F + at, mask=(g < n_groups) & (at < F), other=float("-inf"))
        largest = tl.maximum(largest, x.to(tl.float32))
    chosen = _chosen(_keys(largest), k, BITS)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(groups + n * k + place, g, mask=chosen & (place < k))


@triton.jit
def top_k_kernel(
    values, index, groups, pre, F, k, n_groups,
    GROUP: tl.constexpr, KS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The k largest of the k groups' GROUP * k entries. Grid (N,)."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, GROUP * KS)
    part, place = c // KS, c % KS
    g = tl.load(groups + n * k + place, mask=place < k, other=0)
    at = part * n_groups + g
    is_c = (place < k) & (at < F)
    x = tl.load(pre + n * F + at, mask=is_c, other=float("-inf")).to(tl.float32)
    chosen = _chosen(_keys(x), k, BITS)
    to = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(values + n * k + to, x, mask=chosen & (to < k))
    tl.store(index + n * k + to, at.to(tl.int64), mask=chosen & (to < k))


# ------------------------------------------------------------------ the decoder's update


@triton.jit
def row_gradient_kernel(along, squared, W, grad, D, BLOCK: tl.constexpr):
    """along[j] = <g, w> / <w, w> and squared[j] = |g - along w|^2 of row j. Grid (F,)."""
    j = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    w = tl.load(W + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    g = tl.load(grad + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    a = tl.sum(g * w) / tl.sum(w * w)
    rest = g - a * w
    tl.store(along + j, a)
    tl.store(squared + j, tl.sum(rest * rest))


@triton.jit
def update_rows_kernel(W, mean, square, grad, along, numbers, D, BLOCK: tl.constexpr):
    """A row in one pass: gradient along the row off, clipped, Adam, norm 1. Grid (F,)."""
    j = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_d = d < D
    at = j * D + d
    rate, root = tl.load(numbers), tl.load(numbers + 1)
    beta1, beta2 = tl.load(numbers + 2), tl.load(numbers + 3)
    eps, divisor = tl.load(numbers + 4), tl.load(numbers + 5)
    w = tl.load(W + at, mask=is_d, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=is_d, other=0.0).to(tl.float32)
    g = (g - tl.load(along + j) * w) / divisor
    m = tl.load(mean + at, mask=is_d, other=0.0).to(tl.float32)
    v = tl.load(square + at, mask=is_d, other=0.0).to(tl.float32)
    m = m + (g - m) * (1 - beta1)
    v = beta2 * v + (1 - beta2) * g * g
    w = w - rate * m / (tl.sqrt(v) / root + eps)
    w = w / tl.maximum(tl.sqrt(tl.sum(w * w)), 1e-12)
    tl.store(mean + at, m, mask=is_d)
    tl.store(square + at, v, mask=is_d)
    tl.store(W + at, w, mask=is_d)
