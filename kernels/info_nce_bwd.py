"""InfoNCE, backward, from the statistics of rows and columns.

    p_row = exp(z - shift_row) / sum_row, p_col alike;  dS = p_row + p_col - target delta;  dx += dS @ y, dy += dS.T @ x

For some rows and columns at a time the tile is computed again, delta is subtracted before dS is rounded to the inputs'
type, and the two products are the library's, accumulated in float32 in place. No atomics: the same bits every time.

One exponential, with the forward's shift, serves both softmaxes: p = exp2(t) (w_row + w_col), w = 2^shift / exp(lse).
That is exact to 2^-62 where the lse of all the tile's rows and columns lie within reach of the shift (`_weights_kernel`
says where); elsewhere, and for float32, the tile takes two exponentials, with the row's and the column's own shift.
Source: CLIP, arXiv 2103.00020; Inf-CLIP, arXiv 2410.17243.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lbfast.kernels.info_nce import (
    FLAGS,
    MOST_KEPT,
    again,
    aot_shapes,
    shift_of,
    widen,
)
from lbfast.kernels.pairs import (
    LOG2_E,
    NO_DIAGONAL,
    add_product,
    chunk,
    diagonal,
    headroom_of,
    launch_of,
    options,
    products,
    rows_contiguous,
    same_label,
    tile_of,
)
from lbfast.kernels.primitives import AotCase, on_device, programs

_LOW, _HIGH = tl.constexpr(-64.0), tl.constexpr(120.0)


@triton.jit
def _weights_kernel(
    stats_ptr,
    scale_ptr,
    positives_ptr,
    cols_ptr,
    weights_ptr,
    near_ptr,
    exact_ptr,
    stride_stats,
    n,
    columns,
    diag,
    headroom,
    target,
    BLOCK: tl.constexpr,
):
    """Of statistics (2, n): weights (n,) headroom * 2^shift / exp(lse); near (blocks,): 1 where they can be used.

    exact (n,), of rows alone: headroom * dS of the positives, from the logit and each side's own shift.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < n
    shift = tl.load(stats_ptr + o, mask=mask, other=0.0)
    total = tl.load(stats_ptr + stride_stats + o, mask=mask, other=1.0)
    below = (shift_of(tl.load(scale_ptr)) - shift) * LOG2_E
    lse = tl.log2(total) - below
    near = (lse >= _LOW) & (lse <= _HIGH) | ~mask
    tl.store(near_ptr + tl.program_id(0), tl.min(near.to(tl.int32), axis=0).to(tl.int8))
    tl.store(weights_ptr + o, tl.exp2(below) * headroom / total, mask=mask)
    if exact_ptr is not None:
        column = o + diag
        here = mask & (column >= 0) & (column < columns)
        positive = tl.load(positives_ptr + o, mask=here, other=0.0)
        col_shift = tl.load(cols_ptr + column, mask=here, other=0.0)
        col_total = tl.load(cols_ptr + columns + column, mask=here, other=1.0)
        rows = tl.exp2((positive - shift) * LOG2_E) / total - target / 2
        cols = tl.exp2((positive - col_shift) * LOG2_E) / col_total - target / 2
        tl.store(exact_ptr + o, (rows + cols) * headroom, mask=here)


@triton.jit
def _softmaxes(
    embeddings,
    statistics,
    m,
    n,
    headroom,
    first_m,
    first_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """headroom (p_row + p_col) of a tile, from the embeddings: [BLOCK_M, BLOCK_N]. Arguments: of the kernels."""
    x_ptr, y_ptr, scale_ptr, row_labels_ptr, col_labels_ptr, stride_x, stride_y = embeddings
    rows_ptr, cols_ptr, stride_rows, stride_cols, row_weights_ptr, col_weights_ptr, near = statistics
    o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < m, o_n < n
    scale = tl.load(scale_ptr)
    acc = products(x_ptr, y_ptr, m, n, stride_x, stride_y, first_m, first_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if near & (x_ptr.dtype.element_ty != tl.float32):
        row_weight = tl.load(row_weights_ptr + o_m, mask=m_m, other=0.0)
        col_weight = tl.load(col_weights_ptr + o_n, mask=m_n, other=0.0)
        t = acc * (scale * LOG2_E) - shift_of(scale) * LOG2_E
        p = tl.exp2(t) * (row_weight[:, None] + col_weight[None, :])
    else:
        row_shift = tl.load(rows_ptr + o_m, mask=m_m, other=0.0)
        row_sum = tl.load(rows_ptr + stride_rows + o_m, mask=m_m, other=1.0)
        col_shift = tl.load(cols_ptr + o_n, mask=m_n, other=0.0)
        col_sum = tl.load(cols_ptr + stride_cols + o_n, mask=m_n, other=1.0)
        z = acc * scale
        p = tl.exp2((z - row_shift[:, None]) * LOG2_E) * (headroom / row_sum)[:, None]
        p += tl.exp2((z - col_shift[None, :]) * LOG2_E) * (headroom / col_sum)[None, :]
    if row_labels_ptr is not None:
        p = tl.where(same_label(row_labels_ptr, col_labels_ptr, m, n, o_m, o_n), 0.0, p)
    return p


@triton.jit
def _store(p, exact_ptr, ds_ptr, stride_ds, m, n, diag, first_m, first_n):
    """The tile p [BLOCK_M, BLOCK_N], the positives as `exact` has them, rounded."""
    BLOCK_M: tl.constexpr = p.shape[0]
    BLOCK_N: tl.constexpr = p.shape[1]
    o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    first = first_m + diag - first_n  # column of the tile's first row's positive
    if (first < BLOCK_N) & (first + BLOCK_M > 0):
        column = o_m + diag
        here = (o_m < m) & (column >= first_n) & (column < first_n + BLOCK_N) & (column < n)
        exact = tl.load(exact_ptr + o_m, mask=here, other=0.0)
        p = tl.where((o_n[None, :] == column[:, None]) & here[:, None], exact[:, None], p)
    p_ds = ds_ptr + first_m.to(tl.int64) * stride_ds + first_n
    o_ds = tl.arange(0, BLOCK_M)[:, None] * stride_ds + tl.arange(0, BLOCK_N)[None, :]
    tl.store(p_ds + o_ds, p.to(ds_ptr.dtype.element_ty), mask=(o_m < m)[:, None] & (o_n < n)[None, :])


@triton.jit
def _info_nce_bwd_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_labels_ptr,
    col_labels_ptr,
    rows_ptr,
    cols_ptr,
    row_weights_ptr,
    col_weights_ptr,
    row_near_ptr,
    col_near_ptr,
    exact_ptr,
    ds_ptr,
    stride_rows,
    stride_cols,
    stride_x,
    stride_y,
    stride_ds,
    m,
    n,
    diag,
    headroom,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ds (m, n) = headroom * dS, rounded."""
    tile_m, tile_n = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    near = (tl.load(row_near_ptr + tile_m) & tl.load(col_near_ptr + tile_n)) > 0
    embeddings = (x_ptr, y_ptr, scale_ptr, row_labels_ptr, col_labels_ptr, stride_x, stride_y)
    statistics = (rows_ptr, cols_ptr, stride_rows, stride_cols, row_weights_ptr, col_weights_ptr, near)
    p = _softmaxes(embeddings, statistics, m, n, headroom, first_m, first_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    _store(p, exact_ptr, ds_ptr, stride_ds, m, n, diag, first_m, first_n)


@triton.jit
def _info_nce_bwd_kept_kernel(
    kept_ptr,
    poor_ptr,
    row_weights_ptr,
    col_weights_ptr,
    row_near_ptr,
    col_near_ptr,
    exact_ptr,
    ds_ptr,
    stride_kept,
    stride_poor,
    stride_ds,
    m,
    n,
    diag,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same from what the forward kept, kept (m, n); poor (tiles_m, tiles_n). Other tiles are left unwritten."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    poor = tl.load(poor_ptr + tile_m.to(tl.int64) * stride_poor + tile_n)
    if (tl.load(row_near_ptr + tile_m) & tl.load(col_near_ptr + tile_n) & (1 - poor)) > 0:
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        m_m, m_n = o_m < m, o_n < n
        p_kept = kept_ptr + first_m.to(tl.int64) * stride_kept + first_n
        o_kept = tl.arange(0, BLOCK_M)[:, None] * stride_kept + tl.arange(0, BLOCK_N)[None, :]
        e = widen(tl.load(p_kept + o_kept, mask=m_m[:, None] & m_n[None, :], other=0))
        row_weight = tl.load(row_weights_ptr + o_m, mask=m_m, other=0.0)
        col_weight = tl.load(col_weights_ptr + o_n, mask=m_n, other=0.0)
        p = e * ((row_weight * (2 * MOST_KEPT))[:, None] + (col_weight * (2 * MOST_KEPT))[None, :])
        _store(p, exact_ptr, ds_ptr, stride_ds, m, n, diag, first_m, first_n)


@triton.jit
def _info_nce_bwd_left_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_labels_ptr,
    col_labels_ptr,
    rows_ptr,
    cols_ptr,
    row_weights_ptr,
    col_weights_ptr,
    row_near_ptr,
    col_near_ptr,
    poor_ptr,
    exact_ptr,
    ds_ptr,
    stride_rows,
    stride_cols,
    stride_x,
    stride_y,
    stride_poor,
    stride_ds,
    m,
    n,
    diag,
    headroom,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """The tiles that `_info_nce_bwd_kept_kernel` left unwritten. A program: a row of tiles."""
    tile_m, tiles_n = tl.program_id(0), tl.cdiv(n, BLOCK_N)
    poor_ptr += tile_m.to(tl.int64) * stride_poor
    row_near = tl.load(row_near_ptr + tile_m)
    first_m = tile_m * BLOCK_M
    embeddings = (x_ptr, y_ptr, scale_ptr, row_labels_ptr, col_labels_ptr, stride_x, stride_y)
    statistics = (rows_ptr, cols_ptr, stride_rows, stride_cols, row_weights_ptr, col_weights_ptr, False)
    for some in range(0, tiles_n, FLAGS):
        o = some + tl.arange(0, FLAGS)
        kept = (1 - tl.load(poor_ptr + o, mask=o < tiles_n, other=0)) & row_near
        kept &= tl.load(col_near_ptr + o, mask=o < tiles_n, other=1)
        if tl.min(tl.where(o < tiles_n, kept, 1), axis=0) == 0:
            for tile_n in range(some, tl.minimum(some + FLAGS, tiles_n)):
                if ((1 - tl.load(poor_ptr + tile_n)) & tl.load(col_near_ptr + tile_n) & row_near) == 0:
                    first_n = tile_n * BLOCK_N
                    p = _softmaxes(
                        embeddings,
                        statistics,
                        m,
                        n,
                        headroom,
                        first_m,
                        first_n,
                        D,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                        PRECISION,
                    )
                    _store(p, exact_ptr, ds_ptr, stride_ds, m, n, diag, first_m, first_n)


def _weights(stats, scale, positives, cols, diag, block, headroom, target, exact):
    """weights (n,) and near (blocks,) of stats (2, n); fills exact (n,), where given."""
    n = stats.shape[1]
    blocks = triton.cdiv(n, block)
    weights, near = stats.new_empty(n), stats.new_empty(blocks, dtype=torch.int8)
    _weights_kernel[(blocks,)](
        stats,
        scale,
        None if exact is None else positives,
        None if exact is None else cols,
        weights,
        near,
        exact,
        stats.stride(0),
        n,
        cols.shape[1],
        diag,
        headroom,
        target,
        BLOCK=block,
        num_warps=4,
    )
    return weights, near


def info_nce_bwd(
    x, y, scale, rows, cols, positives, kept, poor, diag, row_labels, col_labels, workspace, target, dx, dy
):
    """Adds dS @ y to dx (m, D) and dS.T @ x to dy (n, D), float32 or None."""
    x, y = rows_contiguous(x), rows_contiguous(y)
    m, n = x.shape[0], y.shape[0]
    if m == 0 or n == 0:
        return
    kind = "" if row_labels is None else "labels"
    forward, launch = launch_of(x, kind or "kept"), launch_of(x, kind or "bwd")
    launch = launch if kept is None else forward  # its tiles
    block_m, block_n = launch.tile["BLOCK_M"], launch.tile["BLOCK_N"]
    headroom = headroom_of(x.dtype)
    step_m, step_n = chunk(m, n, x.shape[1], x.element_size(), workspace, launch, programs(x.device, 1))
    pitch = triton.cdiv(min(n, step_n), 8) * 8  # rows begin at multiples of 16 bytes
    ds = x.new_empty(min(step_m, m), pitch)
    exact = rows.new_empty(m)
    left = {k: v for k, v in options(again(launch), x).items() if k != "GROUP"}
    with on_device(x):
        first = NO_DIAGONAL if diag is None else diag
        row_weights, row_near = _weights(rows, scale, positives, cols, first, block_m, headroom, target, exact)
        col_weights, col_near = _weights(cols, scale, None, cols, 0, block_n, headroom, target, None)
        for a in range(0, m, step_m):
            for c in range(0, n, step_n):
                part_m, part_n = slice(a, min(a + step_m, m)), slice(c, min(c + step_n, n))
                x_c, y_c, ds_c = x[part_m], y[part_n], ds[: min(step_m, m - a), : min(step_n, n - c)]
                labels = (None, None) if row_labels is None else (row_labels[part_m], col_labels[part_n])
                embeddings = (x_c, y_c, scale, *labels)
                stats = (rows[:, part_m], cols[:, part_n])
                weights = (row_weights[part_m], col_weights[part_n])
                near = (row_near[a // block_m :], col_near[c // block_n :])
                strides = (rows.stride(0), cols.stride(0), x.stride(0), y.stride(0))
                sizes = (*ds_c.shape, first + a - c)
                tiles_m, tiles_n = (triton.cdiv(size, block) for size, block in zip(ds_c.shape, (block_m, block_n)))
                if kept is None:
                    _info_nce_bwd_kernel[(tiles_m * tiles_n,)](
                        *embeddings,
                        *stats,
                        *weights,
                        *near,
                        exact[part_m],
                        ds,
                        *strides,
                        pitch,
                        *sizes,
                        headroom,
                        **options(launch, x),
                    )
                else:
                    flags = poor[a // block_m :, c // block_n :]
                    _info_nce_bwd_kept_kernel[(tiles_m * tiles_n,)](
                        kept[part_m, part_n],
                        flags,
                        *weights,
                        *near,
                        exact[part_m],
                        ds,
                        kept.stride(0),
                        poor.stride(0),
                        pitch,
                        *sizes,
                        BLOCK_M=block_m,
                        BLOCK_N=block_n,
                        num_warps=8,
                    )
                    _info_nce_bwd_left_kernel[(tiles_m,)](
                        *embeddings,
                        *stats,
                        *weights,
                        *near,
                        flags,
                        exact[part_m],
                        ds,
                        *strides,
                        poor.stride(0),
                        pitch,
                        *sizes,
                        headroom,
                        FLAGS=FLAGS,
                        **left,
                    )
                if dx is not None:
                    add_product(dx[part_m], ds_c, y_c, 1 / headroom)
                if dy is not None:
                    add_product(dy[part_n], ds_c.t(), x_c, 1 / headroom)


def aot_cases(arch: str) -> list[AotCase]:
    """`aot_shapes` of the forward, 4,096 rows at a time."""
    cases = []
    for what, kind, b, (_, forward, launch), signature, constants in aot_shapes(arch):
        d, size, rows = constants["D"], 4 if kind == "fp32" else 2, 4096
        weights = dict.fromkeys(("row_weights_ptr", "col_weights_ptr", "exact_ptr"), "*fp32:16")
        weights |= {"row_near_ptr": "*i8:16", "col_near_ptr": "*i8:16", "ds_ptr": f"*{kind}:16", "stride_ds": "i32:16"}
        statistics = {"rows_ptr": "*fp32:16", "cols_ptr": "*fp32:16", "headroom": "fp32"}
        statistics |= {"stride_rows": "i32:16", "stride_cols": "i32:16"}
        poor = {"poor_ptr": "*i8:16", "stride_poor": "i32:16"}
        tiles, held = diagonal(launch, rows, b)
        trips = (triton.cdiv(d, launch.tile["BLOCK_K"]),)
        cases.append(
            AotCase(
                f"info_nce bwd rows {rows} {what}",
                _info_nce_bwd_kernel,
                signature | weights | statistics,
                constants | dict(launch.tile),
                launch.num_warps,
                launch.num_stages,
                2 * rows * b * d,
                rows * b * size,
                tiles,
                trips,
                (held,) if kind == "fp32" else (1, held),
            )
        )
        if kind != "bf16":
            continue
        tile = {"BLOCK_M": forward.tile["BLOCK_M"], "BLOCK_N": forward.tile["BLOCK_N"]}
        tiles, held = diagonal(forward, rows, b)
        kept = {"kept_ptr": "*i16:16", "stride_kept": "i32:16", "m": "i32:16", "n": "i32:16", "diag": "i32"}
        cases.append(
            AotCase(
                f"info_nce bwd kept rows {rows} {what}",
                _info_nce_bwd_kept_kernel,
                weights | poor | kept,
                tile,
                8,
                3,
                0,
                2 * rows * b * size,
                tiles,
                shares=(1, held),
            )
        )
        single = again(forward)
        cases.append(
            AotCase(
                f"info_nce bwd left, no tile, rows {rows} {what}",
                _info_nce_bwd_left_kernel,
                signature | weights | statistics | poor,
                constants | {**tile, "BLOCK_K": forward.tile["BLOCK_K"], "FLAGS": FLAGS},
                single.num_warps,
                single.num_stages,
                0,
                tiles,
                triton.cdiv(rows, tile["BLOCK_M"]),
                (1, 0, *trips),
                (0, 0, held),
            )
        )
    pointers = dict.fromkeys(("stats_ptr", "positives_ptr", "cols_ptr", "weights_ptr", "exact_ptr"), "*fp32:16")
    numbers = {"scale_ptr": "*fp32", "near_ptr": "*i8:16", "diag": "i32", "headroom": "fp32", "target": "fp32"}
    numbers |= dict.fromkeys(("stride_stats", "n", "columns"), "i32:16")
    block = launch.tile["BLOCK_M"]
    cases.append(
        AotCase(
            f"info_nce bwd weights {b}",
            _weights_kernel,
            pointers | numbers,
            {"BLOCK": block},
            4,
            3,
            0,
            32 * b,
            triton.cdiv(b, block),
        )
    )
    return cases
