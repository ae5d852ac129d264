"""Tiles of x @ y.T, and what becomes of them: shared by the losses over all pairs of images and texts."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import arch, dot_precision

from lbfast.kernels import configs

NO_DIAGONAL = -(2**30)
NONE = tl.constexpr(-3.4028234663852886e38)  # logit of a pair that is left out
LOG2_E = tl.constexpr(1.4426950408889634)
_ROWS = 4096


@triton.jit
def tile_of(pid, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows of tiles, down the columns first: neighbours share their operands in the cache."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = pid % (GROUP * tiles_n)
    return group * GROUP + inside % height, inside // height


@triton.jit
def products(
    x_ptr,
    y_ptr,
    m,
    n,
    stride_x,
    stride_y,
    first_m,
    first_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of x from first_m on times those of y from first_n on: [BLOCK_M, BLOCK_N], float32."""
    o_k = tl.arange(0, BLOCK_K)
    # 64-bit addresses of the tile's first rows; within the tile 32-bit offsets, which take half the registers
    x_ptr += first_m.to(tl.int64) * stride_x
    y_ptr += first_n.to(tl.int64) * stride_y
    o_x = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - first_m)[:, None] * stride_x + o_k[None, :]
    o_y = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - first_n)[None, :] * stride_y + o_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            b_x, b_y = tl.load(x_ptr + o_x), tl.load(y_ptr + o_y)
        else:
            m_k = k + o_k < D
            b_x = tl.load(x_ptr + o_x, mask=m_k[None, :], other=0.0)
            b_y = tl.load(y_ptr + o_y, mask=m_k[:, None], other=0.0)
        acc = tl.dot(b_x, b_y, acc, input_precision=PRECISION)
        x_ptr += BLOCK_K
        y_ptr += BLOCK_K
    return acc


@triton.jit
def same_label(row_labels_ptr, col_labels_ptr, m, n, o_m, o_n):
    """[BLOCK_M, BLOCK_N]: pairs that share a label."""
    rows = tl.load(row_labels_ptr + o_m, mask=o_m < m, other=-1)
    cols = tl.load(col_labels_ptr + o_n, mask=o_n < n, other=-2)
    return rows[:, None] == cols[None, :]


@triton.jit
def negatives(t, row_labels_ptr, col_labels_ptr, m, n, diag, first_m, first_n):
    """t with NONE for positives, for pairs past the end, and for those that share a label. [BLOCK_M, BLOCK_N]."""
    BLOCK_M: tl.constexpr = t.shape[0]
    BLOCK_N: tl.constexpr = t.shape[1]
    o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    if row_labels_ptr is not None:
        t = tl.where(same_label(row_labels_ptr, col_labels_ptr, m, n, o_m, o_n), NONE, t)
    first = first_m + diag - first_n  # column of the tile's first row's positive
    if (first < BLOCK_N) & (first + BLOCK_M > 0) | (first_m + BLOCK_M > m) | (first_n + BLOCK_N > n):
        inside = (o_m < m)[:, None] & (o_n < n)[None, :]
        t = tl.where(inside & (o_n[None, :] != (o_m + diag)[:, None]), t, NONE)
    return t


def row_of(name: str, wide: bool, kind: str = "") -> configs.Launch:
    """The row of an architecture: "wide" for float32, or of a kind of kernel ("labels", "bwd"), or the plain one."""
    table = configs.INFO_NCE
    if wide:
        return table.get(f"{name} wide", table["wide"])
    plain = configs.lookup(table, name)
    return table.get(f"{name} {kind}", table.get(kind, plain) if kind else plain)


def launch_of(x: torch.Tensor, kind: str = "") -> configs.Launch:
    name = arch(x.device)
    if name == "interpreter":
        return configs.INFO_NCE[name]
    return row_of(name, x.dtype == torch.float32, kind)


def options(launch: configs.Launch, x: torch.Tensor) -> dict[str, Any]:
    tile = {"D": x.shape[1], "PRECISION": dot_precision(x.dtype), **launch.tile}
    return {**tile, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def headroom_of(dtype: torch.dtype) -> float:
    """float16 holds dS times this: probabilities of 1/B stay normal numbers."""
    return 4096.0 if dtype == torch.float16 else 1.0


def chunk(m: int, n: int, d: int, size: int, workspace: int, launch: configs.Launch, sms: int) -> tuple[int, int]:
    """Rows and columns of dS (m, n) to have at a time, multiples of the tile: about square, at most workspace bytes.

    dy is read and written once for all rows of a chunk, dx for all columns. About _ROWS rows, or so many that dx's
    product (128 x 256 numbers a multiprocessor) fills a GPU's multiprocessors; fewer, where that leaves fewer columns;
    all, where they fit.
    """
    if m * n * size <= workspace:
        return m, n
    across = -(-d // 256)
    waves = max(1, round(_ROWS / 128 * across / sms))
    numbers = workspace // size
    rows = min(waves * sms // across * 128 or _ROWS, math.isqrt(numbers), m)
    block_m, block_n = launch.tile["BLOCK_M"], launch.tile["BLOCK_N"]
    rows = max(1, rows // block_m) * block_m
    return rows, max(1, numbers // rows // block_n) * block_n


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
    """out += alpha * a @ b, out float32, in place; the library accumulates in float32."""
    if b.dtype == torch.float32:
        out.addmm_(a, b, alpha=alpha)
    elif b.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, alpha=alpha, out=out)
    else:  # the interpreter: torch has no such product on the CPU
        out.addmm_(a.float(), b.float(), alpha=alpha)


def diagonal(launch: configs.Launch, m: int, n: int) -> tuple[int, float]:
    """Tiles of the first m rows, and the share of them that hold positives."""
    height, width = launch.tile["BLOCK_M"], launch.tile["BLOCK_N"]
    tiles_m, tiles_n = triton.cdiv(m, height), triton.cdiv(n, width)
    held = sum(-(-(i + 1) * height // width) - i * height // width for i in range(tiles_m))
    return tiles_m * tiles_n, held / (tiles_m * tiles_n)
