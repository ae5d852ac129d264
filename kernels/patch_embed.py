"""Patch embedding as an implicit GEMM: the pixels are read where they lie, and only those of patches that are kept.

    tokens[b, t, 1 + i] = A[b, t, kept[b, i]] @ weight.T + bias + position[1 + kept[b, i]]
    tokens[b, t, 0]     = class_embedding[t] + position[0]

A patch is R = C * tube * P kernel rows of P pixels. Each row is padded to a power of two by zero weights (14 -> 16),
so that a tile of BLOCK_K holds whole rows: `_pack_kernel` writes the weight so, folding mean and std of uint8 pixels
into it, and into a bias, in float32 before it rounds. uint8 pixels enter as x - 128, which is exact. The class token's
row is a row of zeros in A: the tokens come out in one piece. Kept for the backward: the inputs. Sums are float32
(float64 for float64), over rows in a fixed order: dweight by splits of the rows, then added up. No atomics.
Source: Dosovitskiy et al., arXiv 2010.11929.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import AotCase, accumulator, arch, on_device

from lbfast.kernels import configs


@triton.jit
def _pack_kernel(
    weight_ptr,
    mean_ptr,
    std_ptr,
    packed_ptr,
    bias_ptr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    PAD: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """weight (D, R, P) -> packed (D, KP), and bias (D,) where mean_ptr is not None. One program a row of D."""
    d = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    row, column = o_k // PAD, o_k % PAD
    m_k = (row < R) & (column < P)
    weight = tl.load(weight_ptr + d * (R * P) + row * P + column, mask=m_k, other=0.0).to(ACC)
    if mean_ptr is not None:
        channel = row // (R // C)
        mean = tl.load(mean_ptr + channel, mask=m_k, other=0.0).to(ACC)
        std = tl.load(std_ptr + channel, mask=m_k, other=1.0).to(ACC)
        tl.store(bias_ptr + d, tl.sum(weight * (128 / 255 - mean) / std, axis=0))
        weight = weight / (255 * std)
    tl.store(packed_ptr + d * KP + o_k, weight.to(packed_ptr.dtype.element_ty), mask=o_k < KP)


@triton.jit
def _token_rows(o_m, rows, n, frames, kept_ptr, columns, P: tl.constexpr, TUBE: tl.constexpr):
    """Of token rows o_m: where their patch begins, in strides (b, t, y, x); position row; frame; whether a patch."""
    token, image = o_m % n, o_m // n
    b, t = image // frames, image % frames
    is_patch = (o_m < rows) & (token > 0)
    if kept_ptr is not None:
        patch = tl.load(kept_ptr + b.to(tl.int64) * (n - 1) + token - 1, mask=is_patch, other=0).to(tl.int32)
    else:
        patch = tl.where(is_patch, token - 1, 0)
    return b, t * TUBE, patch // columns * P, patch % columns * P, tl.where(is_patch, patch + 1, 0), t, is_patch


@triton.jit
def _patch_columns(
    o_k, stride_c, stride_t, stride_h, stride_w, R: tl.constexpr, P: tl.constexpr, TUBE: tl.constexpr, PAD: tl.constexpr
):
    """Offsets of the numbers o_k of a padded patch from its beginning, and which of them are pixels."""
    row, column = o_k // PAD, o_k % PAD
    plane = row // P
    offset = plane // TUBE * stride_c + plane % TUBE * stride_t + row % P * stride_h + column * stride_w
    return offset, (row < R) & (column < P)


@triton.jit
def _load_patches(pixels_ptr, start, offset, m_a, DTYPE: tl.constexpr):
    """A tile of A of the weight's dtype, zero where not m_a."""
    if pixels_ptr.dtype.element_ty == tl.uint8:
        a = tl.load(pixels_ptr + start[:, None] + offset[None, :], mask=m_a, other=128).to(tl.float32) - 128
    else:
        a = tl.load(pixels_ptr + start[:, None] + offset[None, :], mask=m_a, other=0.0)
    return a.to(DTYPE)


@triton.jit
def _patch_embed_fwd_kernel(
    pixels_ptr,
    packed_ptr,
    bias_ptr,
    class_ptr,
    position_ptr,
    kept_ptr,
    tokens_ptr,
    rows,
    n,
    frames,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    stride_class,
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
    """One program: BLOCK_N channels of BLOCK_M tokens. Programs of the same tokens are neighbours."""
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    o_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < D
    b, t0, y, x, position, t, is_patch = _token_rows(o_m, rows, n, frames, kept_ptr, columns, P, TUBE)
    start = b.to(tl.int64) * stride_b + t0.to(tl.int64) * stride_t + y * stride_h + x * stride_w  # [BLOCK_M]
    m_o = (o_m < rows)[:, None] & m_n[None, :]
    acc = tl.load(position_ptr + position[:, None] * D + o_n[None, :], mask=m_o, other=0.0).to(ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(ACC)
        acc += tl.where(is_patch[:, None], bias[None, :], 0.0)
    m_c = m_o & (position == 0)[:, None]
    acc += tl.load(class_ptr + t[:, None] * stride_class + o_n[None, :], mask=m_c, other=0.0).to(ACC)
    for k in range(0, KP, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        offset, m_k = _patch_columns(o_k, stride_c, stride_t, stride_h, stride_w, R, P, TUBE, PAD)
        a = _load_patches(pixels_ptr, start, offset, is_patch[:, None] & m_k[None, :], packed_ptr.dtype.element_ty)
        w = tl.load(packed_ptr + o_n[None, :] * KP + o_k[:, None], mask=m_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC)
    o_o = o_m.to(tl.int64)[:, None] * D + o_n[None, :]
    tl.store(tokens_ptr + o_o, acc.to(tokens_ptr.dtype.element_ty), mask=m_o)


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
    offset, m_k = _patch_columns(o_k, stride_c, stride_t, stride_h, stride_w, R, P, TUBE, PAD)
    last = tl.minimum((part + 1) * rows_each, rows)
    acc = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    for first in range(part * rows_each, last, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        b, t0, y, x, _, _, is_patch = _token_rows(o_m, last, n, frames, kept_ptr, columns, P, TUBE)
        start = b.to(tl.int64) * stride_b + t0.to(tl.int64) * stride_t + y * stride_h + x * stride_w
        a = _load_patches(
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
    b, t0, y, x, _, _, is_patch = _token_rows(o_m, rows, n, frames, kept_ptr, columns, P, TUBE)
    start = b.to(tl.int64) * stride_b + t0.to(tl.int64) * stride_t + y * stride_h + x * stride_w
    offset, m_k = _patch_columns(o_k, stride_c, stride_t, stride_h, stride_w, R, P, TUBE, PAD)
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


def why_not(pixels: torch.Tensor, weight: torch.Tensor) -> list[str]:
    """Reasons why these kernels cannot take pixels and weight."""
    if weight.dtype == torch.float64 and weight.is_cuda:
        return ["float64 has no kernel on a GPU"]
    return []


def patch_embed_fwd(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    class_embedding: torch.Tensor,
    position_embedding: torch.Tensor,
    kept: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
) -> torch.Tensor:
    """pixels (B, C, [T,] H, W), weight (D, C, [tube,] P, P) -> tokens (B*T', 1 + K, D). Inputs as ops.patch_embed's."""
    pixels = _addressable(pixels)
    shape, numbers = _geometry(pixels, weight, kept)
    launch = _launch(configs.PATCH_EMBED_FWD, weight)
    packed, bias = _pack(weight, mean, std, shape)
    tokens = torch.empty((shape["images"], numbers["n"], len(weight)), dtype=weight.dtype, device=weight.device)
    tiles = triton.cdiv(numbers["rows"], launch.tile["BLOCK_M"]) * triton.cdiv(len(weight), launch.tile["BLOCK_N"])
    if tiles:
        with on_device(weight):
            _patch_embed_fwd_kernel[(tiles,)](
                pixels_ptr=pixels,
                packed_ptr=packed,
                bias_ptr=bias,
                class_ptr=class_embedding.contiguous(),
                position_ptr=position_embedding.contiguous(),
                kept_ptr=None if kept is None else kept.contiguous(),
                tokens_ptr=tokens,
                stride_class=len(weight) if class_embedding.dim() == 2 else 0,
                **numbers,
                **_constants(weight, shape, launch),
            )
    return tokens


def patch_embed_bwd_weight(
    dtokens: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
) -> torch.Tensor:
    """dtokens.T @ A: the gradient of the folded weight (D, C*tube*P*P), in float32."""
    pixels = _addressable(pixels)
    shape, numbers = _geometry(pixels, weight, kept)
    launch = _launch(configs.PATCH_EMBED_BWD_WEIGHT, weight)
    constants = _constants(weight, shape, launch)
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
    shape, numbers = _geometry(dpixels, weight, kept)
    launch = _launch(configs.PATCH_EMBED_BWD_PIXELS, weight)
    packed, _ = _pack(weight, None, None, shape)
    constants = _constants(weight, shape, launch)
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


def _addressable(pixels: torch.Tensor) -> torch.Tensor:
    """pixels, written out where the offsets inside a clip would not fit in 32 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(pixels.shape[1:], pixels.stride()[1:]))
    return pixels if reach < 2**31 else pixels.contiguous()


def _geometry(
    pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
) -> tuple[dict[str, int], dict[str, int]]:
    """The kernel's compile-time sizes (and the number of images), and its run-time numbers."""
    tube, patch = (weight.shape[2] if weight.dim() == 5 else 1), weight.shape[-1]
    frames = 1 if pixels.dim() == 4 else pixels.shape[2] // tube
    lines, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    n = 1 + (lines * columns if kept is None else kept.shape[1])
    stride_t = 0 if pixels.dim() == 4 else pixels.stride(2)
    images = pixels.shape[0] * frames
    shape = {"C": pixels.shape[1], "R": pixels.shape[1] * tube * patch, "P": patch, "TUBE": tube, "images": images}
    numbers = {"rows": images * n, "n": n, "frames": frames, "columns": columns, "stride_t": stride_t}
    numbers |= {"stride_b": pixels.stride(0), "stride_c": pixels.stride(1)}
    return shape, numbers | {"stride_h": pixels.stride(-2), "stride_w": pixels.stride(-1)}


def _padded(rows: int, patch: int) -> tuple[int, int]:
    """(PAD, KP): pixels of a padded kernel row; of a padded patch, a multiple of 64 (the largest step by BLOCK_K)."""
    pad = triton.next_power_of_2(patch)
    step = max(64, pad)
    return pad, triton.cdiv(rows * pad, step) * step


def _pack(
    weight: torch.Tensor, mean: torch.Tensor | None, std: torch.Tensor | None, shape: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight (D, KP) with padded kernel rows; where mean and std are given, folded, and the bias (D,)."""
    pad, kp = _padded(shape["R"], shape["P"])
    packed = torch.empty((len(weight), kp), dtype=weight.dtype, device=weight.device)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    bias = None if mean is None else torch.empty(len(weight), dtype=wide, device=weight.device)
    with on_device(weight):
        _pack_kernel[(len(weight),)](
            weight_ptr=weight.contiguous(),
            mean_ptr=mean,
            std_ptr=std,
            packed_ptr=packed,
            bias_ptr=bias,
            C=shape["C"],
            R=shape["R"],
            P=shape["P"],
            PAD=pad,
            KP=kp,
            BLOCK=triton.next_power_of_2(kp),
            ACC=accumulator(weight.dtype),
            num_warps=configs.lookup(configs.PATCH_EMBED_PACK, arch(weight.device)).num_warps,
        )
    return packed, bias


def _launch(table: Any, weight: torch.Tensor) -> configs.Launch:
    """The row for weight's device; wider numbers than 16 bits have one of their own, with smaller tiles."""
    return configs.lookup(table, arch(weight.device) if weight.element_size() == 2 else "wide")


def _constants(weight: torch.Tensor, shape: dict[str, int], launch: configs.Launch) -> dict[str, Any]:
    """Every kernel's constexpr arguments and launch options, for this weight."""
    tf32 = weight.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    pad, kp = _padded(shape["R"], shape["P"])
    constants = {name: shape[name] for name in ("R", "P", "TUBE")}
    constants |= {name: launch.tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constants |= {"D": len(weight), "PAD": pad, "KP": kp, "ACC": accumulator(weight.dtype)}
    constants |= {"PRECISION": "tf32" if tf32 else "ieee"}
    return constants | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}


def aot_cases(arch: str) -> list[AotCase]:
    """L/14 and H/14 on 32 clips of 8 frames: bfloat16 from uint8 and from bfloat16, float32; half kept, tubes."""
    cases = []
    for d, tube, kind, kept in (
        (1024, 1, "u8", False),
        (1024, 1, "bf16", True),
        (1280, 1, "u8", True),
        (1024, 2, "bf16", False),
        (1024, 1, "fp32", True),
    ):
        cases += _aot(arch, d, tube, kind, kept)
    return cases


def _aot(arch: str, d: int, tube: int, kind: str, kept: bool) -> list[AotCase]:
    """The five kernels at one shape."""
    patch, k = 14, 128 if kept else 256
    images = 32 * 8 // tube
    rows, r = images * (1 + k), 3 * tube * patch
    pad, kp = _padded(r, patch)
    what = f"{kind} tube {tube} {images}x{1 + k}x{d}"
    tensor, wide = "*fp32:16" if kind == "fp32" else "*bf16:16", "*fp32:16"
    sizes = {"D": d, "R": r, "P": patch, "PAD": pad, "KP": kp}
    numbers = dict.fromkeys(("rows", "columns", "stride_b", "stride_c", "stride_t", "stride_h"), "i32:16")
    numbers |= {"n": "i32", "frames": "i32"}
    absent: dict[str, Any] = {"stride_w": 1}
    pixels = {"pixels_ptr": f"*{kind}:16"}
    if kept:
        pixels["kept_ptr"] = "*i64:16"
    else:
        absent["kept_ptr"] = None
    gemm = sizes | absent | {"TUBE": tube, "PRECISION": "ieee", "ACC": tl.float32}
    flops = 2 * images * k * d * r * patch
    width = 4 if kind == "fp32" else 2
    moved = images * k * r * patch * (1 if kind == "u8" else width) + rows * d * width

    def case(
        name: str, kernel: Any, table: Any, signature: dict[str, str], constants: dict[str, Any], work: Any
    ) -> AotCase:
        launch = configs.lookup(table, "wide" if kind == "fp32" else arch)
        tile = {key: value for key, value in launch.tile.items() if key in kernel.arg_names}
        return AotCase(
            f"patch_embed {name} {what}",
            kernel,
            signature,
            constants | tile,
            launch.num_warps,
            launch.num_stages,
            *work,
        )

    fwd = {"packed_ptr": tensor, "class_ptr": tensor, "position_ptr": tensor, "tokens_ptr": tensor}
    no_bias: dict[str, Any] = {}
    if kind == "u8":
        fwd["bias_ptr"] = wide
    else:
        no_bias = {"bias_ptr": None}
    bwd = {"dtokens_ptr": tensor, **{name: pixels[name] for name in pixels if name == "kept_ptr"}, **numbers}
    cases = [
        case(
            "fwd",
            _patch_embed_fwd_kernel,
            configs.PATCH_EMBED_FWD,
            fwd | pixels | numbers,
            gemm | no_bias | {"stride_class": 0},
            (flops, moved),
        ),
        case(
            "bwd weight",
            _patch_embed_bwd_weight_kernel,
            configs.PATCH_EMBED_BWD_WEIGHT,
            bwd | pixels | {"parts_ptr": wide, "rows_each": "i32:16"},
            gemm,
            (flops, moved),
        ),
    ]
    if kind != "u8":
        cases.append(
            case(
                "bwd pixels",
                _patch_embed_bwd_pixels_kernel,
                configs.PATCH_EMBED_BWD_PIXELS,
                bwd | {"packed_ptr": tensor, "dpixels_ptr": tensor},
                gemm,
                (flops, moved),
            )
        )
    where: dict[str, Any] = {} if kept else {"where_ptr": None}
    position = {"dtokens_ptr": tensor, "dposition_ptr": wide, **({"where_ptr": "*i32:16"} if kept else {})}
    position |= {"clips": "i32:16", "frames": "i32", "n": "i32", "positions": "i32"}
    cases.append(
        case(
            "bwd position",
            _patch_embed_bwd_position_kernel,
            configs.PATCH_EMBED_BWD_POSITION,
            position,
            {"D": d, "ACC": tl.float32, **where},
            (0, rows * d * width),
        )
    )
    if kind == "u8":
        pack = {"weight_ptr": tensor, "packed_ptr": tensor, "mean_ptr": wide, "std_ptr": wide, "bias_ptr": wide}
        block = {"BLOCK": triton.next_power_of_2(kp), "C": 3, "ACC": tl.float32}
        block |= {name: size for name, size in sizes.items() if name != "D"}
        cases.append(case("pack", _pack_kernel, configs.PATCH_EMBED_PACK, pack, block, (0, 4 * d * kp)))
    return cases
