"""The sigmoid loss of pairs: value and gradients from one pass over the tiles of x @ y.T.

    z = scale * x @ y.T + bias, t = -z for positives and z for all others
    loss = sum log(1 + e^t);  dS = sigmoid(t), of positives -sigmoid(t);  dx += dS @ y, dy += dS.T @ x

No row needs to know another, so that dS is there as soon as a tile is: for some rows and columns at a time it is
written, rounded to the inputs' type, and the two products are the library's, accumulated in float32 in place. One
exponential and one division serve loss and dS: with u = e^-|t| and w = u / (2 + u), log(1 + u) is 2 atanh(w), w at most
1/3, by a polynomial whose error is 2^-26 of itself. Each tile leaves three sums in a place of its own. No atomics: the
same bits every time.
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
    headroom_of,
    launch_of,
    options,
    products,
    row_of,
    rows_contiguous,
    same_label,
    tile_of,
)
from lbfast.kernels.primitives import AotCase, approximate, divide, exp2, on_device, programs

SUMS = tl.constexpr(3)  # of the losses, of dS, and of dS times x @ y.T


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
    headroom,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROX: tl.constexpr,
):
    """sums (tiles, SUMS); ds (m, n) = headroom * dS, rounded, or None."""
    tile_m, tile_n = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < m, o_n < n
    acc = products(x_ptr, y_ptr, m, n, stride_x, stride_y, first_m, first_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    # no branches: a tile that lives across one would not fit into the registers beside the products
    positive = o_n[None, :] == (o_m + diag)[:, None]
    inside = m_m[:, None] & m_n[None, :]
    if row_labels_ptr is not None:
        inside &= positive | ~same_label(row_labels_ptr, col_labels_ptr, m, n, o_m, o_n)
    z = acc * tl.load(scale_ptr) + tl.load(bias_ptr)
    t = tl.where(positive, -z, z)
    u = exp2(tl.abs(t) * -LOG2_E, APPROX)
    inverse = divide(1.0, u * (u + 3) + 2, APPROX)  # of (1 + u)(2 + u)
    w = u * (1 + u) * inverse
    w2 = w * w
    series = w2 * (1 / 13) + 1 / 11
    series = series * w2 + 1 / 9
    series = series * w2 + 1 / 7
    series = series * w2 + 1 / 5
    series = series * w2 + 1 / 3
    series = series * w2 + 1
    loss = tl.where(t < 0, 0.0, t) + 2 * w * series  # NaN stays
    slope = tl.where(t >= 0, 1.0, u) * (2 + u) * inverse
    loss = tl.where(inside, loss, 0.0)
    ds = tl.where(inside, tl.where(positive, -slope, slope), 0.0)
    p_sums = sums_ptr + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(p_sums, tl.sum(loss))
    tl.store(p_sums + 1, tl.sum(ds))
    tl.store(p_sums + 2, tl.sum(ds * acc))
    if ds_ptr is not None:
        p_ds = ds_ptr + first_m.to(tl.int64) * stride_ds + first_n
        o_ds = tl.arange(0, BLOCK_M)[:, None] * stride_ds + tl.arange(0, BLOCK_N)[None, :]
        tl.store(p_ds + o_ds, (ds * headroom).to(ds_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


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
    choices = {**options(launch, x), "APPROX": approximate(x)}
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
                sizes = (len(x_c), len(y_c), first, x.stride(0), y.stride(0), pitch, headroom)
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
        signature |= {"sums_ptr": "*fp32:16", "diag": "i32", "headroom": "fp32"}
        signature |= dict.fromkeys(("row_labels_ptr", "col_labels_ptr"), "*i32:16") if labels else {}
        signature |= {"ds_ptr": f"*{kind}:16"} if gradients else {}
        constants = {"D": d, "PRECISION": precision, "APPROX": not wide and arch.startswith("sm_"), **launch.tile}
        constants |= {} if labels else {"row_labels_ptr": None, "col_labels_ptr": None}
        constants |= {} if gradients else {"ds_ptr": None}
        tiles = triton.cdiv(rows, launch.tile["BLOCK_M"]) * triton.cdiv(b, launch.tile["BLOCK_N"])
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
            )
        )
    return cases
