"""InfoNCE: softmax statistics of x @ y.T along both axes in one GEMM, and its gradients chunk by chunk.

    z = scale * x @ y.T;  p_row = exp(z - lse_row), p_col = exp(z - lse_col)
    dS = p_row + p_col - 2 delta;  dx += dS @ y, dy += dS.T @ x

Forward: each tile of logits leaves (shift, sum) of its rows and columns in buffers of its own; `_join_kernel` adds them
up in a fixed order. Backward: for a chunk of rows the tile is computed again, delta is subtracted before dS is
rounded to the inputs' type, and the two products are the library's, accumulated in float32 in place. No atomics: the
same bits every time. Kept for the backward: the statistics; and, where asked for and it fits, exp(z - shift of the
tile) in bfloat16 for bfloat16 inputs, which saves the second GEMM.

One exponential serves both softmaxes while a tile's shifts lie within SPREAD of each other; else it takes two.
Contract: Implementation in lbfast/ops/info_nce.py. Source: CLIP, arXiv 2103.00020; Inf-CLIP, arXiv 2410.17243.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import AotCase, arch, dot_precision, on_device

from lbfast.kernels import configs

_NO_DIAGONAL = -(2**30)
_ROUNDING_HEADROOM = 4096.0  # float16 holds dS times this: probabilities of 1/B stay normal numbers
NONE = tl.constexpr(-3.4028234663852886e38)  # logit of a pair that is left out
SPREAD = tl.constexpr(16.0)


@triton.jit
def _tile_of(pid, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows of tiles, down the columns first: neighbours share their operands in the cache."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = pid % (GROUP * tiles_n)
    return group * GROUP + inside % height, inside // height


@triton.jit
def _products(
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
def _logits(acc, scale, row_labels_ptr, col_labels_ptr, m, n, diag, o_m, o_n):
    """Scaled; pairs past the end, and negatives that share a label, at NONE. [BLOCK_M, BLOCK_N]."""
    z = tl.where((o_m < m)[:, None] & (o_n < n)[None, :], acc * scale, NONE)
    if row_labels_ptr is not None:
        rows = tl.load(row_labels_ptr + o_m, mask=o_m < m, other=-1)
        cols = tl.load(col_labels_ptr + o_n, mask=o_n < n, other=-2)
        z = tl.where((rows[:, None] == cols[None, :]) & (o_n[None, :] != o_m[:, None] + diag), NONE, z)
    return z


@triton.jit
def _info_nce_fwd_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_labels_ptr,
    col_labels_ptr,
    row_parts_ptr,
    col_parts_ptr,
    positives_ptr,
    kept_ptr,
    kept_shift_ptr,
    m,
    n,
    diag,
    stride_x,
    stride_y,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """row_parts (2, tiles_n, m) and col_parts (2, tiles_m, n): [0] shift, [1] sum of exp(z - shift)."""
    tile_m, tile_n = _tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < m, o_n < n
    acc = _products(x_ptr, y_ptr, m, n, stride_x, stride_y, first_m, first_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    z = _logits(acc, tl.load(scale_ptr), row_labels_ptr, col_labels_ptr, m, n, diag, o_m, o_n)

    first = first_m + diag - first_n  # column of the tile's first row's positive
    if (first < BLOCK_N) & (first + BLOCK_M > 0):
        column = o_m + diag
        positive = tl.sum(tl.where(o_n[None, :] == column[:, None], z, 0.0), axis=1)
        here = m_m & (column >= first_n) & (column < first_n + BLOCK_N) & (column < n)
        tl.store(positives_ptr + o_m, positive, mask=here)

    row_shift, col_shift = tl.max(z, axis=1, keep_dims=True), tl.max(z, axis=0, keep_dims=True)
    top = tl.max(col_shift)
    lowest_row = tl.min(tl.where(m_m[:, None], row_shift, top))
    near = top - tl.minimum(lowest_row, tl.min(tl.where(m_n[None, :], col_shift, top))) <= SPREAD
    if near:
        e = tl.exp(z - top)
        row_sum, col_sum = tl.sum(e, axis=1, keep_dims=True), tl.sum(e, axis=0, keep_dims=True)
        row_shift, col_shift = tl.zeros_like(row_shift) + top, tl.zeros_like(col_shift) + top
        if kept_ptr is not None:
            p_kept = kept_ptr + first_m.to(tl.int64) * n + first_n
            o_kept = tl.arange(0, BLOCK_M)[:, None].to(tl.int64) * n + tl.arange(0, BLOCK_N)[None, :]
            tl.store(p_kept + o_kept, e.to(tl.bfloat16), mask=m_m[:, None] & m_n[None, :])
    else:
        row_sum = tl.sum(tl.exp(z - row_shift), axis=1, keep_dims=True)
        col_sum = tl.sum(tl.exp(z - col_shift), axis=0, keep_dims=True)
    if kept_ptr is not None:  # infinite where nothing was kept
        tl.store(kept_shift_ptr + tile_m * tiles_n + tile_n, tl.where(near, top, float("inf")))

    p_row = row_parts_ptr + tile_n.to(tl.int64) * m + o_m[:, None]
    tl.store(p_row, row_shift, mask=m_m[:, None])
    tl.store(p_row + tiles_n.to(tl.int64) * m, row_sum, mask=m_m[:, None])
    p_col = col_parts_ptr + tile_m.to(tl.int64) * n + o_n[None, :]
    tl.store(p_col, col_shift, mask=m_n[None, :])
    tl.store(p_col + tiles_m.to(tl.int64) * n, col_sum, mask=m_n[None, :])


@triton.jit
def _join_kernel(parts_ptr, stats_ptr, parts, n, BLOCK: tl.constexpr):
    """Joins parts (2, parts, n) with the statistics stats (2, n), in place, one after the other."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < n
    shift = tl.load(stats_ptr + o, mask=mask, other=0.0)
    total = tl.load(stats_ptr + n + o, mask=mask, other=0.0)
    p_part = parts_ptr + o
    for _ in range(parts):
        more = tl.load(p_part, mask=mask, other=0.0)
        summand = tl.load(p_part + tl.cast(parts, tl.int64) * n, mask=mask, other=0.0)
        top = tl.maximum(shift, more, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(shift - top) + summand * tl.exp(more - top)
        shift = top
        p_part += n
    tl.store(stats_ptr + o, shift, mask=mask)
    tl.store(stats_ptr + n + o, total, mask=mask)


@triton.jit
def _both_softmaxes(z, row_shift, row_sum, col_shift, col_sum, m_m, m_n):
    """exp(z - row_shift) / row_sum + exp(z - col_shift) / col_sum, by one exponential where the shifts are near."""
    highest = tl.maximum(tl.max(tl.where(m_m, row_shift, NONE), axis=0), tl.max(tl.where(m_n, col_shift, NONE), axis=0))
    lowest = tl.minimum(
        tl.min(tl.where(m_m, row_shift, highest), axis=0), tl.min(tl.where(m_n, col_shift, highest), axis=0)
    )
    if highest - lowest <= 2 * SPREAD:
        middle = lowest + (highest - lowest) / 2
        row, col = tl.exp(middle - row_shift) / row_sum, tl.exp(middle - col_shift) / col_sum
        p = tl.exp(z - middle) * (row[:, None] + col[None, :])
    else:
        p = tl.exp(z - row_shift[:, None]) / row_sum[:, None] + tl.exp(z - col_shift[None, :]) / col_sum[None, :]
    return p


@triton.jit
def _info_nce_bwd_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_labels_ptr,
    col_labels_ptr,
    rows_ptr,
    cols_ptr,
    positives_ptr,
    kept_ptr,
    kept_shift_ptr,
    ds_ptr,
    stride_rows,
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
):
    """ds (m, n) = headroom * dS, rounded."""
    tile_m, tile_n = _tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < m, o_n < n
    row_shift = tl.load(rows_ptr + o_m, mask=m_m, other=0.0)
    row_sum = tl.load(rows_ptr + stride_rows + o_m, mask=m_m, other=1.0)
    col_shift = tl.load(cols_ptr + o_n, mask=m_n, other=0.0)
    col_sum = tl.load(cols_ptr + n + o_n, mask=m_n, other=1.0)
    inside = m_m[:, None] & m_n[None, :]
    if kept_ptr is None:
        acc = _products(
            x_ptr, y_ptr, m, n, stride_x, stride_y, first_m, first_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        z = _logits(acc, tl.load(scale_ptr), row_labels_ptr, col_labels_ptr, m, n, diag, o_m, o_n)
        p = _both_softmaxes(z, row_shift, row_sum, col_shift, col_sum, m_m, m_n)
    else:
        top = tl.load(kept_shift_ptr + tile_m * tl.cdiv(n, BLOCK_N) + tile_n)
        if top < float("inf"):
            p_kept = kept_ptr + o_m.to(tl.int64)[:, None] * n + o_n[None, :]
            e = tl.load(p_kept, mask=inside, other=0.0).to(tl.float32)
            row, col = tl.exp(top - row_shift) / row_sum, tl.exp(top - col_shift) / col_sum
            p = e * (row[:, None] + col[None, :])
        else:
            acc = _products(
                x_ptr, y_ptr, m, n, stride_x, stride_y, first_m, first_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
            z = _logits(acc, tl.load(scale_ptr), row_labels_ptr, col_labels_ptr, m, n, diag, o_m, o_n)
            p = _both_softmaxes(z, row_shift, row_sum, col_shift, col_sum, m_m, m_n)

    first = first_m + diag - first_n
    if (first < BLOCK_N) & (first + BLOCK_M > 0):  # p - 1 cancels: from the logit and each side's own shift
        column = o_m + diag
        here = m_m & (column >= first_n) & (column < first_n + BLOCK_N) & (column < n)
        positive = tl.load(positives_ptr + o_m, mask=here, other=0.0)
        shift = tl.load(cols_ptr + column, mask=here, other=0.0)
        total = tl.load(cols_ptr + n + column, mask=here, other=1.0)
        exact = (tl.exp(positive - row_shift) / row_sum - 1) + (tl.exp(positive - shift) / total - 1)
        p = tl.where((o_n[None, :] == column[:, None]) & here[:, None], exact[:, None], p)

    p_ds = ds_ptr + first_m.to(tl.int64) * stride_ds + first_n
    o_ds = tl.arange(0, BLOCK_M)[:, None] * stride_ds + tl.arange(0, BLOCK_N)[None, :]
    tl.store(p_ds + o_ds, (p * headroom).to(ds_ptr.dtype.element_ty), mask=inside)


def _row(name: str, wide: bool, busy: bool, backward: bool) -> configs.Launch:
    """The row of an architecture; one for float32 ("wide"), one for kernels with more to hold in registers ("busy").

    A "bwd" row, where there is one, is the backward's, unless it is wide or busy.
    """
    table = configs.INFO_NCE
    for suffix, wanted in (("wide", wide), ("busy", busy)):
        if wanted:
            return table.get(f"{name} {suffix}", table[suffix])
    plain = configs.lookup(table, name)
    return table.get(f"{name} bwd", plain) if backward else plain


def _launch(x: torch.Tensor, busy: bool, backward: bool) -> configs.Launch:
    if not x.is_cuda:
        return configs.INFO_NCE["interpreter"]
    return _row(arch(x.device), x.dtype == torch.float32, busy, backward)


def _tiles(launch: configs.Launch, m: int, n: int) -> tuple[int, int]:
    return triton.cdiv(m, launch.tile["BLOCK_M"]), triton.cdiv(n, launch.tile["BLOCK_N"])


def _steps(m: int, bytes_a_row: int, workspace: int, launch: configs.Launch) -> range:
    """First rows of chunks of whole tiles that need at most `workspace` bytes each (one tile's rows at least)."""
    block = launch.tile["BLOCK_M"]
    return range(0, m, max(1, workspace // bytes_a_row // block) * block)


def _options(launch: configs.Launch, x: torch.Tensor) -> dict[str, Any]:
    tile = {"D": x.shape[1], "PRECISION": dot_precision(x.dtype), **launch.tile}
    return {**tile, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _join(parts: torch.Tensor, stats: torch.Tensor) -> None:
    count, n = parts.shape[1:]
    _join_kernel[(triton.cdiv(n, 128),)](parts, stats, count, n, BLOCK=128, num_warps=4)


def info_nce_fwd(x, y, scale, diag, row_labels, col_labels, workspace, keep):
    """x (m, D), y (n, D), scale () float32 -> rows (2, m), cols (2, n), positives (m,), kept: tensors or None.

    kept, where `keep` and 2 m n bytes fit in `workspace`: (m, n) bfloat16 and the tiles' shifts.
    """
    x, y = _rows_contiguous(x), _rows_contiguous(y)
    m, n = x.shape[0], y.shape[0]
    keep = keep and x.dtype == torch.bfloat16 and 2 * m * n <= workspace
    launch = _launch(x, keep or row_labels is not None, False)
    rows, cols = (x.new_zeros(2, size, dtype=torch.float32) for size in (m, n))
    rows[0], cols[0] = NONE.value, NONE.value
    positives = x.new_zeros(m, dtype=torch.float32)
    kept = kept_shift = None
    if keep:
        kept = x.new_empty(m, n, dtype=torch.bfloat16)
        kept_shift = x.new_empty(_tiles(launch, m, n), dtype=torch.float32)
    if m == 0 or n == 0:
        return rows, cols, positives, kept, kept_shift
    tiles_n = _tiles(launch, m, n)[1]
    steps = _steps(m, 8 * (tiles_n + n // launch.tile["BLOCK_M"] + 1), workspace, launch)
    with on_device(x):
        for a in steps:
            b = min(a + steps.step, m)
            tiles_m = _tiles(launch, b - a, n)[0]
            row_parts = x.new_empty(2, tiles_n, b - a, dtype=torch.float32)
            col_parts = x.new_empty(2, tiles_m, n, dtype=torch.float32)
            _info_nce_fwd_kernel[(tiles_m * tiles_n,)](
                x[a:b],
                y,
                scale,
                None if row_labels is None else row_labels[a:b],
                col_labels,
                row_parts,
                col_parts,
                positives[a:b],
                None if kept is None else kept[a:b],
                None if kept_shift is None else kept_shift[a // launch.tile["BLOCK_M"] :],
                b - a,
                n,
                _NO_DIAGONAL if diag is None else diag + a,
                x.stride(0),
                y.stride(0),
                **_options(launch, x),
            )
            own = torch.stack([rows[0, a:b], rows[1, a:b]])
            _join(row_parts, own)
            rows[:, a:b] = own
            _join(col_parts, cols)
    return rows, cols, positives, kept, kept_shift


def info_nce_bwd(x, y, scale, rows, cols, positives, kept, kept_shift, diag, row_labels, col_labels, workspace, dx, dy):
    """Adds dS @ y to dx (m, D) and dS.T @ x to dy (n, D), float32 or None."""
    x, y = _rows_contiguous(x), _rows_contiguous(y)
    m, n, launch = x.shape[0], y.shape[0], _launch(x, kept is not None or row_labels is not None, True)
    if m == 0 or n == 0:
        return
    headroom = _ROUNDING_HEADROOM if x.dtype == torch.float16 else 1.0
    pitch = triton.cdiv(n, 8) * 8  # rows begin at multiples of 16 bytes
    steps = _steps(m, pitch * x.element_size(), workspace, launch)
    ds = x.new_empty(min(steps.step, m), pitch)
    with on_device(x):
        for a in steps:
            b = min(a + steps.step, m)
            tiles_m, tiles_n = _tiles(launch, b - a, n)
            _info_nce_bwd_kernel[(tiles_m * tiles_n,)](
                x[a:b],
                y,
                scale,
                None if row_labels is None else row_labels[a:b],
                col_labels,
                rows[:, a:b],
                cols,
                positives[a:b],
                None if kept is None else kept[a:b],
                None if kept_shift is None else kept_shift[a // launch.tile["BLOCK_M"] :],
                ds,
                rows.stride(0),
                b - a,
                n,
                _NO_DIAGONAL if diag is None else diag + a,
                x.stride(0),
                y.stride(0),
                pitch,
                headroom,
                **_options(launch, x),
            )
            if dx is not None:
                _add_product(dx[a:b], ds[: b - a, :n], y, 1 / headroom)
            if dy is not None:
                _add_product(dy, ds[: b - a, :n].t(), x[a:b], 1 / headroom)


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
    """out += alpha * a @ b, out float32, in place; the library accumulates in float32."""
    if b.dtype == torch.float32:
        out.addmm_(a, b, alpha=alpha)
    elif b.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, alpha=alpha, out=out)
    else:  # the interpreter: torch has no such product on the CPU
        out.addmm_(a.float(), b.float(), alpha=alpha)


def aot_cases(arch: str) -> list[AotCase]:
    """B 32768 at D 768 and 1024 in bfloat16, with and without labels; float16, and float32 as tf32 and exactly."""
    cases = []
    for d, kind, labels, precision in (
        (768, "bf16", False, "ieee"),
        (1024, "bf16", True, "ieee"),
        (768, "fp16", False, "ieee"),
        (768, "fp32", False, "tf32"),
        (768, "fp32", False, "ieee"),
    ):
        cases += _aot(arch, d, kind, labels, precision)
    return cases


def _aot(arch: str, d: int, kind: str, labels: bool, precision: str) -> list[AotCase]:
    launch, launch_bwd = (_row(arch, kind == "fp32", labels, backward) for backward in (False, True))
    b, chunk, size = 32768, 4096, 4 if kind == "fp32" else 2
    what = f"{kind}{' ' + precision if kind == 'fp32' else ''}{' labels' if labels else ''} {b}x{d}"
    operands = {"x_ptr": f"*{kind}:16", "y_ptr": f"*{kind}:16", "scale_ptr": "*fp32", "positives_ptr": "*fp32:16"}
    numbers = dict.fromkeys(("m", "n", "stride_x", "stride_y"), "i32:16") | {"diag": "i32"}
    absent: dict[str, Any] = {}
    if labels:
        operands |= {"row_labels_ptr": "*i32:16", "col_labels_ptr": "*i32:16"}
    else:
        absent = {"row_labels_ptr": None, "col_labels_ptr": None}
    kept = {"kept_ptr": "*bf16:16", "kept_shift_ptr": "*fp32"}
    parts = {"row_parts_ptr": "*fp32:16", "col_parts_ptr": "*fp32:16"}
    stats = {"rows_ptr": "*fp32:16", "cols_ptr": "*fp32:16", "ds_ptr": f"*{kind}:16"}
    more = {"stride_rows": "i32:16", "stride_ds": "i32:16", "headroom": "fp32"}

    def case(name, kernel, signature, rows, moved, launch=launch) -> AotCase:
        tiles, diagonal = _diagonal(launch, chunk if "bwd" in name else b, b)
        shares = (1.0, *(1.0,) * ("kept" in name), diagonal) if "bwd" in name else (diagonal, 1.0)
        trips = (triton.cdiv(d, launch.tile["BLOCK_K"]),)
        constants = absent | {"D": d, "PRECISION": precision} | dict(launch.tile)
        constants |= {} if "kept_ptr" in signature else {"kept_ptr": None, "kept_shift_ptr": None}
        options = (launch.num_warps, launch.num_stages, 2 * rows * b * d, moved)
        return AotCase(f"info_nce {name} {what}", kernel, signature, constants, *options, tiles, trips, shares)

    fwd, bwd = operands | parts | numbers, operands | stats | numbers | more
    cases = [
        case("fwd", _info_nce_fwd_kernel, fwd, b, 2 * b * d * size),
        case(f"bwd rows {chunk}", _info_nce_bwd_kernel, bwd, chunk, chunk * b * size, launch_bwd),
    ]
    if kind == "bf16":
        busy = _row(arch, False, True, False)
        cases.append(case("fwd kept", _info_nce_fwd_kernel, fwd | kept, b, 2 * b * b, busy))
        cases.append(case(f"bwd kept rows {chunk}", _info_nce_bwd_kernel, bwd | kept, 0, 2 * chunk * b * size, busy))
    if kind == "bf16" and not labels:
        signature = {"parts_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "parts": "i32", "n": "i32:16"}
        columns = -(-b // launch.tile["BLOCK_M"])
        cases.append(
            AotCase(
                f"info_nce join {columns}x{b}",
                _join_kernel,
                signature,
                {"BLOCK": 128},
                4,
                3,
                0,
                8 * columns * b,
                programs=triton.cdiv(b, 128),
                trips=(columns,),
            )
        )
    return cases


def _diagonal(launch: configs.Launch, m: int, n: int) -> tuple[int, float]:
    """Tiles of the first m rows, and the share of them that hold positives."""
    tiles_m, tiles_n = _tiles(launch, m, n)
    height, width = launch.tile["BLOCK_M"], launch.tile["BLOCK_N"]
    held = sum(-(-(i + 1) * height // width) - i * height // width for i in range(tiles_m))
    return tiles_m * tiles_n, held / (tiles_m * tiles_n)
