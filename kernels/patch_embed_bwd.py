"""The backward of patch_embed.py: gradients of the weight, of float pixels, of the positions.

    dweight = dtokens.T @ A;  dpixels = dtokens @ weight, where the patches lie;  dposition = sums of dtokens

Sums are float32 (float64 for float64), over rows in a fixed order: the weight's in splits of the rows, which are then
added up; the positions' by looking up where each clip has a position. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lbfast.kernels.patch_embed import (
    SHAPES,
    addressable,
    aot_shape,
    constants_of,
    geometry,
    launch_row,
    load_patches,
    pack,
    patch_columns,
    token_rows,
)
from lbfast.kernels.primitives import AotCase, accumulator, arch, on_device

from lbfast.kernels import configs


@triton.jit
def _patch_embed_bwd_weight_kernel(
    dtokens_ptr,
    pixels_ptr,
    kept_ptr,
    parts_ptr,
    rows,
    rows_each,
    n,
    frames,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    D: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    TUBE: tl.constexpr,
    PAD: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: dtokens.T @ A over `rows_each` token rows, a tile [BLOCK_N, BLOCK_K] of parts (S, D, KP)."""
    tiles_k: tl.constexpr = (KP + BLOCK_K - 1) // BLOCK_K
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) // (tiles_k * tiles_n)
    o_n = tl.program_id(0) // tiles_k % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n = o_n < D
    offset, m_k = patch_columns(o_k, stride_c, stride_t, stride_h, stride_w, R, P, TUBE, PAD)
    last = tl.minimum((part + 1) * rows_each, rows)
    acc = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    for first in range(part * rows_each, last, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        b, t0, y, x, _, _, is_patch = token_rows(o_m, last, n, frames, kept_ptr, columns, P, TUBE)
        start = b.to(tl.int64) * stride_b + t0.to(tl.int64) * stride_t + y * stride_h + x * stride_w
        a = load_patches(
            pixels_ptr, start, offset, is_patch[:, None] & m_k[None, :], dtokens_ptr.dtype.element_ty
        )  # [BLOCK_M, BLOCK_K]
        o_d = o_m.to(tl.int64)[None, :] * D + o_n[:, None]
        d = tl.load(dtokens_ptr + o_d, mask=(o_m < last)[None, :] & m_n[:, None], other=0.0)  # [BLOCK_N, BLOCK_M]
        acc = tl.dot(d, a, acc, input_precision=PRECISION, out_dtype=ACC)
    o_p = (part.to(tl.int64) * D + o_n[:, None]) * KP + o_k[None, :]
    tl.store(parts_ptr + o_p, acc, mask=m_n[:, None] & (o_k < KP)[None, :])


@triton.jit
def _patch_embed_bwd_pixels_kernel(
    dtokens_ptr,
    packed_ptr,
    kept_ptr,
    dpixels_ptr,
    rows,
    n,
    frames,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    D: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    TUBE: tl.constexpr,
    PAD: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: dtokens @ packed, a tile [BLOCK_M, BLOCK_K] of patches, written to where their pixels lie."""
    tiles_k: tl.constexpr = (KP + BLOCK_K - 1) // BLOCK_K
    o_m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_m = o_m < rows
    acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    for start_n in range(0, D, BLOCK_N):
        o_n = start_n + tl.arange(0, BLOCK_N)
        m_n = o_n < D
        o_d = o_m.to(tl.int64)[:, None] * D + o_n[None, :]
        d = tl.load(dtokens_ptr + o_d, mask=m_m[:, None] & m_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        m_w = m_n[:, None] & (o_k < KP)[None, :]
        w = tl.load(packed_ptr + o_n[:, None] * KP + o_k[None, :], mask=m_w, other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(d, w, acc, input_precision=PRECISION, out_dtype=ACC)
    b, t0, y, x, _, _, is_patch = token_rows(o_m, rows, n, frames, kept_ptr, columns, P, TUBE)
    start = b.to(tl.int64) * stride_b + t0.to(tl.int64) * stride_t + y * stride_h + x * stride_w
    offset, m_k = patch_columns(o_k, stride_c, stride_t, stride_h, stride_w, R, P, TUBE, PAD)
    o_p = start[:, None] + offset[None, :]
    tl.store(dpixels_ptr + o_p, acc.to(dpixels_ptr.dtype.element_ty), mask=is_patch[:, None] & m_k[None, :])


@triton.jit
def _patch_embed_bwd_position_kernel(
    dtokens_ptr,
    where_ptr,
    dposition_ptr,
    clips,
    frames,
    n,
    positions,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: BLOCK_D channels of one position's gradient. where (clips, positions): its token, -1 for none."""
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    position = tl.program_id(0) // tiles_d
    o_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    acc = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    for first in range(0, clips * frames, BLOCK_B):
        o_b = first + tl.arange(0, BLOCK_B)
        m_b = o_b < clips * frames
        token = position
        if where_ptr is not None:
            token = tl.load(where_ptr + o_b // frames * positions + position, mask=m_b, other=-1)
            m_b = m_b & (token >= 0)
        o_t = (o_b.to(tl.int64) * n + token)[:, None] * D + o_d[None, :]
        acc += tl.load(dtokens_ptr + o_t, mask=m_b[:, None] & m_d[None, :], other=0.0).to(ACC)  # [BLOCK_B, BLOCK_D]
    tl.store(dposition_ptr + position * D + o_d, tl.sum(acc, axis=0), mask=m_d)


def patch_embed_bwd_weight(
    dtokens: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
) -> torch.Tensor:
    """dtokens.T @ A: the gradient of the folded weight (D, C*tube*P*P), in float32."""
    pixels = addressable(pixels)
    shape, numbers = geometry(pixels, weight, kept)
    launch = launch_row(configs.PATCH_EMBED_BWD_WEIGHT, weight)
    constants = constants_of(weight, shape, launch)
    rows_each = launch.tile["BLOCK_M"] * max(
        1, triton.cdiv(numbers["rows"], launch.tile["BLOCK_M"] * launch.tile["SPLITS"])
    )
    splits = max(1, triton.cdiv(numbers["rows"], rows_each))
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    parts = torch.empty((splits, len(weight), constants["KP"]), dtype=wide, device=weight.device)
    tiles = triton.cdiv(len(weight), launch.tile["BLOCK_N"]) * triton.cdiv(constants["KP"], launch.tile["BLOCK_K"])
    with on_device(weight):
        _patch_embed_bwd_weight_kernel[(tiles * splits,)](
            dtokens_ptr=dtokens.contiguous(),
            pixels_ptr=pixels,
            kept_ptr=None if kept is None else kept.contiguous(),
            parts_ptr=parts,
            rows_each=rows_each,
            **numbers,
            **constants,
        )
    rows, patch = constants["R"], constants["P"]
    padded = parts.sum(0)[:, : rows * constants["PAD"]].unflatten(1, (rows, -1))
    return padded[:, :, :patch].flatten(1)


def patch_embed_bwd_pixels(
    dtokens: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of float pixels, of their shape and dtype; zero where no kept patch lies."""
    dpixels = torch.zeros(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    shape, numbers = geometry(dpixels, weight, kept)
    launch = launch_row(configs.PATCH_EMBED_BWD_PIXELS, weight)
    packed, _ = pack(weight, None, None, shape)
    constants = constants_of(weight, shape, launch)
    tiles = triton.cdiv(numbers["rows"], launch.tile["BLOCK_M"]) * triton.cdiv(constants["KP"], launch.tile["BLOCK_K"])
    if tiles:
        with on_device(weight):
            _patch_embed_bwd_pixels_kernel[(tiles,)](
                dtokens_ptr=dtokens.contiguous(),
                packed_ptr=packed,
                kept_ptr=None if kept is None else kept.contiguous(),
                dpixels_ptr=dpixels,
                **numbers,
                **constants,
            )
    return dpixels


def patch_embed_bwd_position(
    dtokens: torch.Tensor, clips: int, kept: torch.Tensor | None, patches: int
) -> torch.Tensor:
    """dtokens (B*T', 1 + K, D) summed into the positions (1 + patches, D), in float32."""
    images, n, d = dtokens.shape
    where = None
    if kept is not None:  # which token has a position, if any
        where = torch.full((clips, 1 + patches), -1, dtype=torch.int32, device=dtokens.device)
        where[:, 0] = 0
        tokens = torch.arange(1, n, dtype=torch.int32, device=dtokens.device)
        where.scatter_(1, 1 + kept, tokens.expand(clips, n - 1))
    wide = torch.float64 if dtokens.dtype == torch.float64 else torch.float32
    dposition = torch.empty((1 + patches, d), dtype=wide, device=dtokens.device)
    launch = configs.lookup(configs.PATCH_EMBED_BWD_POSITION, arch(dtokens.device))
    with on_device(dtokens):
        _patch_embed_bwd_position_kernel[((1 + patches) * triton.cdiv(d, launch.tile["BLOCK_D"]),)](
            dtokens_ptr=dtokens.contiguous(),
            where_ptr=where,
            dposition_ptr=dposition,
            clips=clips,
            frames=images // max(1, clips),
            n=n,
            positions=1 + patches,
            D=d,
            ACC=accumulator(dtokens.dtype),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **launch.tile,
        )
    return dposition


def aot_cases(arch: str) -> list[AotCase]:
    """At the forward's SHAPES; bytes need no gradient."""
    cases = []
    for d, tube, kind, half in SHAPES:
        shape = aot_shape(arch, d, tube, kind, half)
        common = {"dtokens_ptr": shape.tensor, **shape.kept, **shape.numbers}
        signature = common | shape.pixels | {"parts_ptr": "*fp32:16", "rows_each": "i32:16"}
        kernel, table, kp = _patch_embed_bwd_weight_kernel, configs.PATCH_EMBED_BWD_WEIGHT, shape.sizes["KP"]
        tile = shape.tile(table)
        splits = triton.cdiv(shape.rows, tile["BLOCK_M"] * triton.cdiv(shape.rows, tile["BLOCK_M"] * tile["SPLITS"]))
        tiles = triton.cdiv(d, tile["BLOCK_N"]) * triton.cdiv(kp, tile["BLOCK_K"])
        launched = {"programs": tiles * splits, "trips": (triton.cdiv(shape.rows, tile["BLOCK_M"]) / splits,)}
        cases.append(shape.case("bwd weight", kernel, table, signature, shape.gemm, **launched))
        if kind != "u8":
            signature = common | {"packed_ptr": shape.tensor, "dpixels_ptr": shape.tensor}
            kernel, table = _patch_embed_bwd_pixels_kernel, configs.PATCH_EMBED_BWD_PIXELS
            tile = shape.tile(table)
            launched = {
                "programs": triton.cdiv(shape.rows, tile["BLOCK_M"]) * triton.cdiv(kp, tile["BLOCK_K"]),
                "trips": (triton.cdiv(d, tile["BLOCK_N"]),),
            }
            cases.append(shape.case("bwd pixels", kernel, table, signature, shape.gemm, **launched))
        signature = {"dtokens_ptr": shape.tensor, "dposition_ptr": "*fp32:16", "clips": "i32:16"}
        signature |= dict.fromkeys(("frames", "n", "positions"), "i32")
        constants = {"D": d, "ACC": tl.float32}
        if half:
            signature["where_ptr"] = "*i32:16"
        else:
            constants["where_ptr"] = None
        moved = 32 * 8 // tube * (129 if half else 257) * d * (4 if kind == "fp32" else 2)
        kernel = _patch_embed_bwd_position_kernel
        table = configs.PATCH_EMBED_BWD_POSITION
        tile, n = shape.tile(table), 129 if half else 257
        launched = {
            "programs": 257 * triton.cdiv(d, tile["BLOCK_D"]),
            "trips": (triton.cdiv(shape.rows // n, tile["BLOCK_B"]),),
        }
        cases.append(shape.case("bwd position", kernel, table, signature, constants, 0, moved, **launched))
    return cases
