"""InfoNCE, forward: softmax statistics of x @ y.T along both axes in one GEMM.

    z = scale * x @ y.T;  row_i = sum_j exp(z_ij), col_j = sum_i exp(z_ij), each as (shift, sum of exp(z - shift))

Each tile of logits leaves (shift, sum) of its rows and columns in buffers of its own; `_join_kernel` adds them up in a
fixed order. No atomics: the same bits every time.

A tile of 16-bit inputs has one shift, a constant of the scale (`shift_of`): no exponential of unit rows overflows it,
and no maximum is looked for. What underflows is below 2^-126; so each sum of at least LEAST = 2^-90 is right to 2^-29
of itself. A tile with a smaller sum (logits below shift - 62 all along a row), or one beyond MOST (embeddings that are
no unit rows), or NaN, is computed again with its rows' and columns' own maxima; float32 always takes these. Positives
stay out of the tiles' sums and join at the end, with their own logit for a shift where it is the largest: then the loss
of a row, log(1 + the rest), keeps its digits.

Kept for the backward of bfloat16 inputs, where it fits: exp2 of the tiles, which saves its first GEMM. In 16 bits, of a
sign none and of the exponent 7 (`narrow`): 9 are left for the mantissa, 2 more than bfloat16's, so that dS, which is
rounded to bfloat16, is hardly rounded twice. A tile with a sum beyond MOST_KEPT is computed again.
Contract: Implementation in lbfast/ops/info_nce.py. Source: CLIP, arXiv 2103.00020; Inf-CLIP, arXiv 2410.17243.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lbfast.kernels.pairs import (
    LOG2_E,
    NO_DIAGONAL,
    NONE,
    diagonal,
    launch_of,
    negatives,
    options,
    products,
    row_of,
    rows_contiguous,
    tile_of,
)
from lbfast.kernels.primitives import AotCase, on_device

from lbfast.kernels import configs

LEAST, MOST = tl.constexpr(2.0**-90), tl.constexpr(2.0**126)
_LEAST_BITS, _RANGE = tl.constexpr((127 - 90) << 23), tl.constexpr((126 + 90) << 23)
MOST_KEPT = tl.constexpr(2.0**50)
_RANGE_KEPT = tl.constexpr((50 + 90) << 23)
_SCALING = tl.constexpr(32.0)  # parts are summed up 2^32 times smaller, which 2^31 of them don't overflow
FLAGS = 1024  # of tiles, looked at together
_MOST_PARTS = 512  # that one program joins


@triton.jit
def shift_of(scale):
    """The tiles' shift: 0, or of a large scale 16 or 32, whose product with LOG2_E is exact."""
    return 16 * tl.minimum(tl.maximum(tl.ceil(tl.abs(scale) / 16) - 5, 0.0), 2.0)


@triton.jit
def _own_sums(z, sums_ptr, shifts_ptr, o, mask, AXIS: tl.constexpr):
    """Sums along an axis of logits, with the largest of each for its shift; 0 where there is none."""
    shift = tl.max(z, axis=AXIS, keep_dims=True)
    total = tl.sum(tl.exp2((z - shift) * LOG2_E), axis=AXIS)
    shift = tl.sum(shift, axis=AXIS)
    tl.store(shifts_ptr + o, shift, mask=mask)
    tl.store(sums_ptr + o, tl.where(shift == NONE, 0.0, total), mask=mask)


@triton.jit
def _worst(total, mask):
    """Of sums [BLOCK], how far from LEAST the worst is, in a float's steps: out of bounds, NaN too, is > any range."""
    bits = tl.where(mask, total, 1.0).to(tl.uint32, bitcast=True) - _LEAST_BITS
    return tl.max(bits, axis=0)


@triton.jit
def narrow(e):
    """Numbers from 0 to MOST_KEPT as int16, to 2^-10 of themselves down to 2^-75, and to 2^-85 below that."""
    bits = (e * (0.5 / MOST_KEPT)).to(tl.uint32, bitcast=True)
    return ((bits + (1 << 13)) >> 14).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def widen(kept):
    """What `narrow` was given, over 2 MOST_KEPT: float32."""
    return (kept.to(tl.uint16, bitcast=True).to(tl.uint32) << 14).to(tl.float32, bitcast=True)


@triton.jit
def _info_nce_fwd_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_labels_ptr,
    col_labels_ptr,
    row_sums_ptr,
    col_sums_ptr,
    row_shifts_ptr,
    col_shifts_ptr,
    poor_ptr,
    positives_ptr,
    kept_ptr,
    m,
    n,
    diag,
    stride_x,
    stride_y,
    stride_kept,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """row_sums (tiles_n, m) and col_sums (tiles_m, n) of exp(z - shift); poor (tiles_m, tiles_n): 1 if not so.

    Of float32 all tiles are poor: they have shifts of their own, in row_shifts and col_shifts, at once.
    kept (m, n), or None: exp(z - shift) as `narrow` has it.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < m, o_n < n
    scale = tl.load(scale_ptr)
    acc = products(x_ptr, y_ptr, m, n, stride_x, stride_y, first_m, first_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)

    first = first_m + diag - first_n
    if (first < BLOCK_N) & (first + BLOCK_M > 0):
        column = o_m + diag
        positive = tl.sum(tl.where(o_n[None, :] == column[:, None], acc * scale, 0.0), axis=1)
        here = m_m & (column >= first_n) & (column < first_n + BLOCK_N) & (column < n)
        tl.store(positives_ptr + o_m, positive, mask=here)

    p_poor = poor_ptr + tile_m * tl.cdiv(n, BLOCK_N) + tile_n
    p_row, p_col = tile_n.to(tl.int64) * m + o_m, tile_m.to(tl.int64) * n + o_n
    if x_ptr.dtype.element_ty == tl.float32:  # its rounding is finer than that of a logit far from the shift
        z = negatives(acc * scale, row_labels_ptr, col_labels_ptr, m, n, diag, first_m, first_n)
        _own_sums(z, row_sums_ptr, row_shifts_ptr, p_row, m_m, 1)
        _own_sums(z, col_sums_ptr, col_shifts_ptr, p_col, m_n, 0)
        tl.store(p_poor, 1)
    else:
        t = acc * (scale * LOG2_E) - shift_of(scale) * LOG2_E
        e = tl.exp2(negatives(t, row_labels_ptr, col_labels_ptr, m, n, diag, first_m, first_n))
        row_sum, col_sum = tl.sum(e, axis=1), tl.sum(e, axis=0)
        most = _RANGE if kept_ptr is None else _RANGE_KEPT
        tl.store(p_poor, (tl.maximum(_worst(row_sum, m_m), _worst(col_sum, m_n)) > most).to(tl.int8))
        tl.store(row_sums_ptr + p_row, row_sum, mask=m_m)
        tl.store(col_sums_ptr + p_col, col_sum, mask=m_n)
        if kept_ptr is not None:
            p_kept = kept_ptr + first_m.to(tl.int64) * stride_kept + first_n
            o_kept = tl.arange(0, BLOCK_M)[:, None] * stride_kept + tl.arange(0, BLOCK_N)[None, :]
            tl.store(p_kept + o_kept, narrow(e), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _info_nce_again_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_labels_ptr,
    col_labels_ptr,
    row_sums_ptr,
    col_sums_ptr,
    row_shifts_ptr,
    col_shifts_ptr,
    poor_ptr,
    m,
    n,
    diag,
    stride_x,
    stride_y,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Poor tiles with shifts of their own, (tiles_n, m) and (tiles_m, n) as the sums. A program: a row of tiles."""
    tile_m, tiles_n = tl.program_id(0), tl.cdiv(n, BLOCK_N)
    poor_ptr += tile_m.to(tl.int64) * tiles_n
    first_m = tile_m * BLOCK_M
    o_m = first_m + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr)
    for some in range(0, tiles_n, FLAGS):
        o = some + tl.arange(0, FLAGS)
        if tl.max(tl.load(poor_ptr + o, mask=o < tiles_n, other=0), axis=0) > 0:
            for tile_n in range(some, tl.minimum(some + FLAGS, tiles_n)):
                if tl.load(poor_ptr + tile_n) > 0:
                    first_n = tile_n * BLOCK_N
                    o_n = first_n + tl.arange(0, BLOCK_N)
                    acc = products(
                        x_ptr,
                        y_ptr,
                        m,
                        n,
                        stride_x,
                        stride_y,
                        first_m,
                        first_n,
                        D,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                        PRECISION,
                    )
                    z = negatives(acc * scale, row_labels_ptr, col_labels_ptr, m, n, diag, first_m, first_n)
                    _own_sums(z, row_sums_ptr, row_shifts_ptr, tl.cast(tile_n, tl.int64) * m + o_m, o_m < m, 1)
                    _own_sums(z, col_sums_ptr, col_shifts_ptr, tile_m.to(tl.int64) * n + o_n, o_n < n, 0)


@triton.jit
def _join_kernel(
    sums_ptr,
    shifts_ptr,
    poor_ptr,
    scale_ptr,
    before_ptr,
    positives_ptr,
    out_ptr,
    n,
    parts,
    stride_out,
    stride_part,
    stride_tile,
    first_positive,
    positives,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    """Joins EACH parts a program of sums (parts, n) to out (2, groups, n), [0] shift, [1] sum of exp(z - shift).

    poor: as the forward left it: the shift is that of `scale` where 0, else that of shifts (parts, n); None: the latter
    everywhere. Where positives_ptr is given, this is the last join: with statistics `before` (2, n), if given, and with
    the positives of columns from first_positive on.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < n
    start = tl.program_id(1) * EACH
    end = tl.minimum(start + EACH, parts)
    top, total = tl.full((BLOCK,), NONE, tl.float32), tl.zeros((BLOCK,), tl.float32)
    if poor_ptr is not None:
        common = shift_of(tl.load(scale_ptr))
        poor_ptr += (tl.program_id(0) * BLOCK // TILE).to(tl.int64) * stride_tile
    for part in range(start, end, PARTS):
        o_part = part + tl.arange(0, PARTS)
        m_part = (o_part < end)[:, None] & mask[None, :]
        o_sum = o_part.to(tl.int64)[:, None] * n + o[None, :]
        summand = tl.load(sums_ptr + o_sum, mask=m_part, other=0.0)
        if poor_ptr is None:
            shift = tl.load(shifts_ptr + o_sum, mask=m_part, other=NONE)
        else:
            poor = tl.load(poor_ptr + o_part.to(tl.int64) * stride_part, mask=o_part < end, other=0) > 0
            own = tl.load(shifts_ptr + o_sum, mask=m_part & poor[:, None], other=common)
            shift = tl.where(m_part, own, NONE)
        higher = tl.maximum(top, tl.max(shift, axis=0))
        weight = tl.exp2((shift - higher[None, :]) * LOG2_E - _SCALING)
        total = total * tl.exp2((top - higher) * LOG2_E) + tl.sum(summand * weight, axis=0)
        top = higher
    nothing = total == 0
    powers = tl.log2(tl.where(nothing, 1.0, total)) + _SCALING
    steps = tl.where((total > 0) & (total <= MOST), tl.floor(powers / (16 * LOG2_E)), 0.0)
    top += 16 * steps
    total *= tl.exp2(steps * (-16 * LOG2_E) + _SCALING)  # in [1, e^16) where anything was joined
    p_out = out_ptr + tl.program_id(1).to(tl.int64) * n + o
    if positives_ptr is not None:
        m_positive = mask & (o >= first_positive) & (o < first_positive + positives)
        positive = tl.load(positives_ptr + o - first_positive, mask=m_positive, other=NONE)
        shift = tl.where(m_positive & (nothing | (positive - top > tl.log(total))), positive, top)
        if before_ptr is not None:
            earlier = tl.load(before_ptr + o, mask=mask, other=NONE)
            shift = tl.maximum(shift, earlier)
        total = tl.where(nothing, 0.0, total * tl.exp2((top - shift) * LOG2_E))
        total += tl.where(m_positive, tl.exp2((positive - shift) * LOG2_E), 0.0)
        if before_ptr is not None:
            total += tl.load(before_ptr + n + o, mask=mask, other=0.0) * tl.exp2((earlier - shift) * LOG2_E)
        top = shift
    tl.store(p_out, top, mask=mask)
    tl.store(p_out + stride_out, total, mask=mask)


def again(launch: configs.Launch) -> configs.Launch:
    """For the kernels that compute single tiles again, which have more to hold than those that compute all of them."""
    tile = launch.tile
    return configs.Launch(tile, 8 if tile["BLOCK_M"] * tile["BLOCK_N"] > 64 * 64 else 4, min(launch.num_stages, 2))


def _join(sums, shifts, poor, strides, tile, scale, before, positives, first_positive, count, out):
    """Statistics (2, n), n apart by out's stride, of parts (parts, n) and `count` positives from first_positive on."""
    parts, n = sums.shape

    def launch(groups, positives, out):
        _join_kernel[(triton.cdiv(n, 64), groups)](
            sums,
            shifts,
            poor,
            scale,
            before if positives is not None else None,
            positives,
            out,
            n,
            parts,
            out.stride(0),
            *strides,
            first_positive,
            count,
            TILE=tile,
            PARTS=32,
            BLOCK=64,
            EACH=_MOST_PARTS,
            num_warps=4,
        )

    while parts > _MOST_PARTS:
        some = sums.new_empty(2, triton.cdiv(parts, _MOST_PARTS), n)
        launch(some.shape[1], None, some)
        (shifts, sums), poor, parts = some, None, some.shape[1]
    launch(1, positives, out)


def info_nce_fwd(x, y, scale, diag, row_labels, col_labels, workspace, room):
    """x (m, D), y (n, D), scale () float32 -> rows (2, m), cols (2, n), positives (m,), kept: tensors or None.

    kept, where it takes at most `room` bytes: (m, n) int16, and which tiles are in it.
    """
    x, y = rows_contiguous(x), rows_contiguous(y)
    m, n = x.shape[0], y.shape[0]
    pitch = triton.cdiv(n, 8) * 8  # rows begin at multiples of 16 bytes
    keep = x.dtype == torch.bfloat16 and 2 * m * pitch <= room
    launch = launch_of(x, "labels" if row_labels is not None else "kept" if keep else "")
    block_m, block_n = launch.tile["BLOCK_M"], launch.tile["BLOCK_N"]
    rows, cols = (x.new_empty(2, size, dtype=torch.float32) for size in (m, n))
    positives = x.new_empty(m, dtype=torch.float32)
    if m == 0 or n == 0:
        for stats in (rows, cols):
            stats[0], stats[1] = NONE.value, 0
        return rows, cols, positives, None, None
    tiles_m, tiles_n = triton.cdiv(m, block_m), triton.cdiv(n, block_n)
    kept = x.new_empty(m, pitch, dtype=torch.int16) if keep else None
    poor = x.new_empty(tiles_m, tiles_n, dtype=torch.int8)
    bytes_a_tile_row = 8 * (tiles_n * block_m + n)
    step = max(1, workspace // bytes_a_tile_row) * block_m
    left = {name: value for name, value in options(again(launch), x).items() if name != "GROUP"}
    with on_device(x):
        for a in range(0, m, step):
            b = min(a + step, m)
            tiles = triton.cdiv(b - a, block_m)
            row_shifts, row_sums = x.new_empty(2, tiles_n, b - a, dtype=torch.float32)
            col_shifts, col_sums = x.new_empty(2, tiles, n, dtype=torch.float32)
            flags = poor[a // block_m :]
            first = NO_DIAGONAL if diag is None else diag + a
            labels = (None if row_labels is None else row_labels[a:b], col_labels)
            numbers = (b - a, n, first, x.stride(0), y.stride(0))
            operands = (x[a:b], y, scale, *labels, row_sums, col_sums, row_shifts, col_shifts, flags)
            _info_nce_fwd_kernel[(tiles * tiles_n,)](
                *operands, positives[a:b], None if kept is None else kept[a:b], *numbers, pitch, **options(launch, x)
            )
            if x.dtype != torch.float32:
                _info_nce_again_kernel[(tiles,)](*operands, *numbers, FLAGS=FLAGS, **left)
            count = 0 if diag is None else b - a
            here = positives[a:b]
            _join(row_sums, row_shifts, flags, (1, tiles_n), block_m, scale, None, here, 0, count, rows[:, a:b])
            before = cols if a else None
            _join(col_sums, col_shifts, flags, (tiles_n, 1), block_n, scale, before, here, max(0, first), count, cols)
    return rows, cols, positives, kept, poor if keep else None


def aot_shapes(arch: str):
    """B 32768 at D 768 and 1024 in bfloat16, with and without labels; float16, and float32 as tf32 and exactly.

    Yields what to print, dtype, rows, launches ("", "kept", "bwd"), and the signature and constants that all share.
    """
    b = 32768
    for d, kind, labels, precision in (
        (768, "bf16", False, "ieee"),
        (1024, "bf16", True, "ieee"),
        (768, "fp16", False, "ieee"),
        (768, "fp32", False, "tf32"),
        (768, "fp32", False, "ieee"),
    ):
        wide, special = kind == "fp32", "labels" if labels else ""
        what = f"{kind}{' ' + precision if wide else ''}{' labels' if labels else ''} {b}x{d}"
        signature = {"x_ptr": f"*{kind}:16", "y_ptr": f"*{kind}:16", "scale_ptr": "*fp32", "diag": "i32"}
        signature |= dict.fromkeys(("m", "n", "stride_x", "stride_y"), "i32:16")
        signature |= dict.fromkeys(("row_labels_ptr", "col_labels_ptr"), "*i32:16") if labels else {}
        constants = {"D": d, "PRECISION": precision}
        constants |= {} if labels else {"row_labels_ptr": None, "col_labels_ptr": None}
        yield what, kind, b, [row_of(arch, wide, special or row) for row in ("", "kept", "bwd")], signature, constants


def aot_cases(arch: str) -> list[AotCase]:
    cases = []
    for what, kind, b, (plain, keeping, _), signature, constants in aot_shapes(arch):
        d, size = constants["D"], 4 if kind == "fp32" else 2
        sums = dict.fromkeys(("row_sums_ptr", "col_sums_ptr", "row_shifts_ptr", "col_shifts_ptr"), "*fp32:16")
        sums |= {"poor_ptr": "*i8:16"}
        own = {"positives_ptr": "*fp32:16"}
        kept = {"kept_ptr": "*i16:16", "stride_kept": "i32:16"}
        for keep, launch in ((False, plain), (True, keeping))[: 1 + (kind == "bf16")]:
            tile, (tiles, held) = dict(launch.tile), diagonal(launch, b, b)
            trips = (triton.cdiv(d, launch.tile["BLOCK_K"]),)
            cases.append(
                AotCase(
                    f"info_nce fwd{' kept' if keep else ''} {what}",
                    _info_nce_fwd_kernel,
                    signature | sums | own | (kept if keep else {}),
                    constants | tile | ({} if keep else dict.fromkeys(kept)),
                    launch.num_warps,
                    launch.num_stages,
                    2 * b * b * d,
                    2 * b * d * size + 2 * b * b * keep,
                    tiles,
                    trips,
                    (held, held),
                )
            )
        if kind == "fp32":
            continue
        single, tile, (tiles, held) = again(plain), dict(plain.tile), diagonal(plain, b, b)
        del tile["GROUP"]
        cases.append(
            AotCase(
                f"info_nce fwd again, no tile {what}",
                _info_nce_again_kernel,
                signature | sums,
                constants | tile | {"FLAGS": FLAGS},
                single.num_warps,
                single.num_stages,
                0,
                tiles,
                triton.cdiv(b, plain.tile["BLOCK_M"]),
                (1, 0, *trips),
                (0, 0, held),
            )
        )
    return [*cases, _aot_join(row_of(arch, False), 32768)]


def _aot_join(launch: configs.Launch, n: int) -> AotCase:
    tile, parts = launch.tile["BLOCK_M"], triton.cdiv(n, launch.tile["BLOCK_M"])
    pointers = dict.fromkeys(("sums_ptr", "shifts_ptr", "positives_ptr", "out_ptr"), "*fp32:16")
    numbers = dict.fromkeys(("n", "stride_out", "stride_tile", "positives"), "i32:16")
    return AotCase(
        f"info_nce join {parts}x{n}",
        _join_kernel,
        pointers | {"poor_ptr": "*i8:16", "scale_ptr": "*fp32"} | numbers | {"parts": "i32", "first_positive": "i32"},
        {"before_ptr": None, "stride_part": 1, "TILE": tile, "PARTS": 32, "BLOCK": 64, "EACH": _MOST_PARTS},
        4,
        3,
        0,
        4 * parts * n,
        triton.cdiv(n, 64),
        (triton.cdiv(min(parts, _MOST_PARTS), 32),),
    )
