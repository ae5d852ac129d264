"""The sigmoid loss of pairs: value and gradients from one pass over the tiles of x @ y.T.

    z = scale * x @ y.T + bias, t = -z for positives and z for all others
    loss = sum log(1 + e^t);  dS = sigmoid(t), of positives -sigmoid(t);  dx += dS @ y, dy += dS.T @ x

No row needs to know another, so that dS is there as soon as a tile is: for some rows and columns at a time it is
written, rounded to the inputs' type, and the two products are the library's, accumulated in float32 in place. One
exponential and one division serve loss and dS: with u = e^-|t|, log(1 + u) / u is a polynomial whose error is 2^-27 of
itself. Each tile leaves three sums in a place of its own. No atomics: the same bits every time.
Contract: Implementation in lbfast/ops/sigmoid_loss.py. Source: SigLIP, arXiv 2303.15343.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lbfast.kernels.pairs import (
    LOG2_E,
    NO_DIAGONAL,
    add_product,
    chunk,
    diagonal,
    headroom_of,
    launch_of,
    negatives,
    options,
    products,
    row_of,
    rows_contiguous,
    tile_of,
)
from lbfast.kernels.primitives import AotCase, approximate, divide, exp2, on_device, programs

from lbfast.kernels import configs

LN_2 = tl.constexpr(0.6931471805599453)
SUMS = tl.constexpr(3)  # of the losses, of dS, and of dS times x @ y.T


@triton.jit
def _terms(t, APPROX: tl.constexpr):
    """log(1 + e^z) and its slope, sigmoid(z), of t = z LOG2_E."""
    u = exp2(-tl.abs(t), APPROX)
    series = u * -0.0032440233875606138 + 0.01985145428346611
    series = series * u - 0.056959519057985894
    series = series * u + 0.10603653340659377
    series = series * u - 0.15305591657653136
    series = series * u + 0.19675938939649146
    series = series * u - 0.24954133593830585
    series = series * u + 0.33329962410539477
    series = series * u - 0.4999990242254586
    series = series * u + 1
    return tl.maximum(t, 0.0) * LN_2 + u * series, divide(tl.where(t >= 0, 1.0, u), 1 + u, APPROX)  # NaN stays


@triton.jit
def _halves(x):
    """The left and the right half of the columns of x [M, N]."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _part(acc, totals, shared, PART: tl.constexpr, APPROX: tl.constexpr, HEADROOM: tl.constexpr):
    """The PART-th columns of a tile, WIDTH of them: stores their dS; totals, with what each row adds to them."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    WIDTH: tl.constexpr = acc.shape[1]
    own_ds, factor, offset, labels, ds_ptr, sizes, first_m, first_n = shared
    m, n, diag, stride_ds = sizes
    first_n += PART * WIDTH
    t = negatives(acc * factor + offset, labels[0], labels[1], m, n, diag, first_m, first_n)
    loss, ds = _terms(t, APPROX)
    totals = (totals[0] + tl.sum(loss, axis=1), totals[1] + tl.sum(ds, axis=1), totals[2] + tl.sum(ds * acc, axis=1))
    if ds_ptr is not None:
        o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, WIDTH)
        first = first_m + diag - first_n
        if (first < WIDTH) & (first + BLOCK_M > 0):
            ds = tl.where(o_n[None, :] == (o_m + diag)[:, None], own_ds[:, None], ds)
        if HEADROOM != 1:
            ds *= HEADROOM
        p_ds = ds_ptr + first_m.to(tl.int64) * stride_ds + first_n
        o_ds = tl.arange(0, BLOCK_M)[:, None] * stride_ds + tl.arange(0, WIDTH)[None, :]
        tl.store(p_ds + o_ds, ds.to(ds_ptr.dtype.element_ty), mask=(o_m < m)[:, None] & (o_n < n)[None, :])
    return totals


@triton.jit
def _sigmoid_loss_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    row_labels_ptr,
    col_labels_ptr,
    sums_ptr,
    ds_ptr,
    m,
    n,
    diag,
    stride_x,
    stride_y,
    stride_ds,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROX: tl.constexpr,
    HEADROOM: tl.constexpr,
):
    """sums (tiles, SUMS); ds (m, n) = HEADROOM * dS, rounded, or None."""
    tile_m, tile_n = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    acc = products(x_ptr, y_ptr, m, n, stride_x, stride_y, first_m, first_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)

    # positives, one of a row at most, by themselves: few tiles have any
    o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    column = o_m + diag
    dot = tl.zeros((BLOCK_M,), tl.float32)
    first = first_m + diag - first_n  # column of the tile's first row's positive
    if (first < BLOCK_N) & (first + BLOCK_M > 0):
        dot = tl.sum(tl.where(o_n[None, :] == column[:, None], acc, 0.0), axis=1)
    here = (o_m < m) & (column >= first_n) & (column < first_n + BLOCK_N) & (column < n)
    own_loss, own_slope = _terms((dot * scale + bias) * -LOG2_E, APPROX)
    own_loss, own_ds = tl.where(here, own_loss, 0.0), tl.where(here, -own_slope, 0.0)

    # the others, a quarter of the columns at a time: what a whole tile needs would not fit into the registers
    totals = (own_loss, own_ds, own_ds * dot)
    factor, offset = scale * LOG2_E, bias * LOG2_E
    labels, sizes = (row_labels_ptr, col_labels_ptr), (m, n, diag, stride_ds)
    shared = (own_ds, factor, offset, labels, ds_ptr, sizes, first_m, first_n)
    left, right = _halves(acc)
    acc_0, acc_1 = _halves(left)
    acc_2, acc_3 = _halves(right)
    totals = _part(acc_0, totals, shared, 0, APPROX, HEADROOM)
    totals = _part(acc_1, totals, shared, 1, APPROX, HEADROOM)
    totals = _part(acc_2, totals, shared, 2, APPROX, HEADROOM)
    totals = _part(acc_3, totals, shared, 3, APPROX, HEADROOM)
    p_sums = sums_ptr + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(p_sums, tl.sum(totals[0]))
    tl.store(p_sums + 1, tl.sum(totals[1]))
    tl.store(p_sums + 2, tl.sum(totals[2]))


def sigmoid_loss_pass(x, y, scale, bias, diag, row_labels, col_labels, workspace, dx, dy):
    """Sums (3,) float64; adds dS @ y to dx (m, D) and dS.T @ x to dy (n, D), float32 or None."""
    x, y = rows_contiguous(x), rows_contiguous(y)
    m, n = x.shape[0], y.shape[0]
    total = x.new_zeros(SUMS.value, dtype=torch.float64)
    if m == 0 or n == 0:
        return total
    launch = launch_of(x, "sigmoid" if row_labels is None else "sigmoid labels")
    block_m, block_n = launch.tile["BLOCK_M"], launch.tile["BLOCK_N"]
    headroom = headroom_of(x.dtype)
    step_m, step_n = chunk(m, n, x.shape[1], x.element_size(), workspace, launch, programs(x.device, 1))
    pitch = triton.cdiv(min(n, step_n), 8) * 8  # rows begin at multiples of 16 bytes
    choices = {**options(launch, x), "APPROX": approximate(x), "HEADROOM": headroom}
    ds = None if dx is None and dy is None else x.new_empty(min(step_m, m), pitch)
    with on_device(x):
        for a in range(0, m, step_m):
            for c in range(0, n, step_n):
                part_m, part_n = slice(a, min(a + step_m, m)), slice(c, min(c + step_n, n))
                x_c, y_c = x[part_m], y[part_n]
                labels = (None, None) if row_labels is None else (row_labels[part_m], col_labels[part_n])
                tiles = triton.cdiv(len(x_c), block_m) * triton.cdiv(len(y_c), block_n)
                sums = x.new_empty(tiles, SUMS.value, dtype=torch.float32)
                first = NO_DIAGONAL if diag is None else diag + a - c
                sizes = (len(x_c), len(y_c), first, x.stride(0), y.stride(0), pitch)
                _sigmoid_loss_kernel[(tiles,)](x_c, y_c, scale, bias, *labels, sums, ds, *sizes, **choices)
                total += sums.sum(0, dtype=torch.float64)
                if ds is None:
                    continue
                ds_c = ds[: len(x_c), : len(y_c)]
                if dx is not None:
                    add_product(dx[part_m], ds_c, y_c, 1 / headroom)
                if dy is not None:
                    add_product(dy[part_n], ds_c.t(), x_c, 1 / headroom)
    return total


def aot_cases(arch: str) -> list[AotCase]:
    """4,096 rows of B 32768 at D 768 and 1024, with gradients and without, with labels and without."""
    b, rows, cases = 32768, 4096, []
    for d, kind, labels, precision, gradients in (
        (768, "bf16", False, "ieee", True),
        (768, "bf16", False, "ieee", False),
        (1024, "bf16", True, "ieee", True),
        (768, "fp16", False, "ieee", True),
        (768, "fp32", False, "tf32", True),
        (768, "fp32", False, "ieee", True),
    ):
        wide, size = kind == "fp32", 4 if kind == "fp32" else 2
        launch = row_of(arch, wide, "sigmoid labels" if labels else "sigmoid")
        what = f"{kind}{' ' + precision if wide else ''}{' labels' if labels else ''}{'' if gradients else ', no dS'}"
        signature = {"x_ptr": f"*{kind}:16", "y_ptr": f"*{kind}:16", "scale_ptr": "*fp32", "bias_ptr": "*fp32"}
        signature |= dict.fromkeys(("m", "n", "stride_x", "stride_y", "stride_ds"), "i32:16")
        signature |= {"sums_ptr": "*fp32:16", "diag": "i32"}
        signature |= dict.fromkeys(("row_labels_ptr", "col_labels_ptr"), "*i32:16") if labels else {}
        signature |= {"ds_ptr": f"*{kind}:16"} if gradients else {}
        constants = {"D": d, "PRECISION": precision, "APPROX": not wide and arch.startswith("sm_"), **launch.tile}
        constants |= {"HEADROOM": 4096.0 if kind == "fp16" else 1.0}
        constants |= {} if labels else {"row_labels_ptr": None, "col_labels_ptr": None}
        constants |= {} if gradients else {"ds_ptr": None}
        tiles, held = diagonal(launch, rows, b)
        part = configs.Launch({**launch.tile, "BLOCK_N": launch.tile["BLOCK_N"] // 4}, launch.num_warps)
        of_part = (diagonal(part, rows, b)[1],) * (1 + gradients)
        cases.append(
            AotCase(
                f"sigmoid_loss rows {rows} {what} {b}x{d}",
                _sigmoid_loss_kernel,
                signature,
                constants,
                launch.num_warps,
                launch.num_stages,
                2 * rows * b * d,
                rows * b * size * gradients + b * d * size,
                tiles,
                (triton.cdiv(d, launch.tile["BLOCK_K"]),),
                (held, *of_part * 4),
            )
        )
    return cases
