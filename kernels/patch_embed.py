"""Patch embedding's own part: the left and the right side of its GEMM, which is the library's.

    rows[b, t, 1 + i] = patch kept[b, i] of frames t * tube .. of clip b, then two ones, then zeros
    rows[b, t, 0]     = 0, for the class token
    matrix            = [weight, coarse bias, fine bias, 0];  tokens = rows @ matrix.T

A fused implicit GEMM reads, converts and addresses each pixel D / BLOCK_N times: here that is done once, and the GEMM
runs at the library's rate. Rows are padded to a multiple of 8 numbers, the 16 bytes that its loads want. uint8 pixels
enter as x - 128, which is exact; `_matrix_kernel` folds their mean and std into the weight and a bias, in float32,
before it rounds. The bias is two columns of the matrix, the second what the first's rounding left: as good as float32,
and its gradient is a column of the weight's.
Of the backward, here is only the sum of token gradients by position, where patches were dropped: in float32 (float64
for float64), in a fixed order, by looking up where each clip has a position. No atomics.
Source: Dosovitskiy et al., arXiv 2010.11929.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import AotCase, accumulator, arch, on_device

from lbfast.kernels import configs


@triton.jit
def _matrix_kernel(
    weight_ptr,
    mean_ptr,
    std_ptr,
    matrix_ptr,
    C: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A row of weight (D, K) -> of matrix (D, KP); where mean_ptr is not None, with a bias in columns K and K + 1."""
    d = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < K
    weight = tl.load(weight_ptr + d * K + o_k, mask=m_k, other=0.0).to(ACC)
    if mean_ptr is not None:
        channel = o_k // (K // C)
        mean = tl.load(mean_ptr + channel, mask=m_k, other=0.0).to(ACC)
        std = tl.load(std_ptr + channel, mask=m_k, other=1.0).to(ACC)
        bias = tl.sum(weight * (128 / 255 - mean) / std, axis=0)
        coarse = bias.to(tl.bfloat16).to(ACC)  # exact in TF32, too
        weight = weight / (255 * std)
        weight = tl.where(o_k == K, coarse, tl.where(o_k == K + 1, bias - coarse, weight))
    tl.store(matrix_ptr + d * KP + o_k, weight.to(matrix_ptr.dtype.element_ty), mask=o_k < KP)


@triton.jit
def _rows_kernel(
    pixels_ptr,
    kept_ptr,
    rows_ptr,
    patches,
    frames,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    K: tl.constexpr,
    P: tl.constexpr,
    TUBE: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program writes BLOCK_M of an image's patches, BLOCK_K numbers of each at a time; the first also row 0."""
    image, block = tl.program_id(0), tl.program_id(1)
    b = (image // frames).to(tl.int64)
    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < patches
    patch = o_m
    if kept_ptr is not None:
        patch = tl.load(kept_ptr + b * patches + o_m, mask=m_m, other=0).to(tl.int32)
    p_image = pixels_ptr + b * stride_b + image % frames * TUBE * stride_t
    p_patch = p_image + (patch // columns * P * stride_h + patch % columns * P * stride_w)  # [BLOCK_M]
    p_rows = rows_ptr + image.to(tl.int64) * (patches + 1) * KP
    for k in range(0, KP, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        line = o_k // P
        plane = line // P
        o_p = plane // TUBE * stride_c + plane % TUBE * stride_t + line % P * stride_h + o_k % P * stride_w
        m_a = m_m[:, None] & (o_k < K)[None, :]
        one = m_m[:, None] & (o_k < K + 2)[None, :]  # where no pixel is
        if pixels_ptr.dtype.element_ty == tl.uint8:
            a = tl.load(p_patch[:, None] + o_p[None, :], mask=m_a, other=(128 + one.to(tl.int32)).to(tl.uint8))
            a = a.to(tl.float32) - 128
        else:
            a = tl.load(p_patch[:, None] + o_p[None, :], mask=m_a, other=one.to(pixels_ptr.dtype.element_ty))
        a = a.to(rows_ptr.dtype.element_ty)
        m_k = o_k < KP
        # two numbers a thread, not eight: a warp's loads then lie in five lines of pixels, not eighteen
        p_a = tl.max_contiguous(p_rows + (o_m[:, None] + 1) * KP + o_k[None, :], [1, 2])  # [BLOCK_M, BLOCK_K]
        tl.store(p_a, a, mask=m_m[:, None] & m_k[None, :])
        if block == 0:
            tl.store(p_rows + o_k, tl.zeros([BLOCK_K], rows_ptr.dtype.element_ty), mask=m_k)


@triton.jit
def _bwd_position_kernel(
    dtokens_ptr,
    where_ptr,
    dposition_ptr,
    images,
    n,
    positions,
    T: tl.constexpr,
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
    for first in range(0, images, BLOCK_B):
        o_b = first + tl.arange(0, BLOCK_B)
        token = tl.load(where_ptr + o_b // T * positions + position, mask=o_b < images, other=-1)
        o_t = (o_b * n + token).to(tl.int64)[:, None] * D + o_d[None, :]
        m_t = (token >= 0)[:, None] & m_d[None, :]
        acc += tl.load(dtokens_ptr + o_t, mask=m_t, other=0.0).to(ACC)  # [BLOCK_B, BLOCK_D]
    tl.store(dposition_ptr + position * D + o_d, tl.sum(acc, axis=0), mask=m_d)


def padded(k: int) -> int:
    """KP: columns of the two sides for a patch of k numbers. Two are the bias's."""
    return triton.cdiv(k + 2, 8) * 8


def matrix(weight: torch.Tensor, mean: torch.Tensor | None, std: torch.Tensor | None) -> torch.Tensor:
    """weight (D, C, ...) -> (D, KP) of its dtype; where mean and std (C,) are given, for uint8 pixels."""
    k = weight[0].numel()
    out = torch.empty((len(weight), padded(k)), dtype=weight.dtype, device=weight.device)
    with on_device(weight):
        _matrix_kernel[(len(weight),)](
            weight_ptr=weight.contiguous(),
            mean_ptr=mean,
            std_ptr=std,
            matrix_ptr=out,
            C=weight.shape[1],
            K=k,
            KP=padded(k),
            BLOCK=triton.next_power_of_2(padded(k)),
            ACC=accumulator(weight.dtype),
            num_warps=configs.lookup(configs.PATCH_EMBED_MATRIX, arch(weight.device)).num_warps,
        )
    return out


def patch_rows(pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """pixels (B, C, [T,] H, W), weight (D, C, [tube,] P, P) -> (B*T', 1 + K, KP), of weight's dtype."""
    pixels = _addressable(pixels)
    tube, patch = (weight.shape[2] if weight.dim() == 5 else 1), weight.shape[-1]
    frames = 1 if pixels.dim() == 4 else pixels.shape[2] // tube
    lines, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    patches = lines * columns if kept is None else kept.shape[1]
    images, k = pixels.shape[0] * frames, weight[0].numel()
    rows = torch.empty((images, 1 + patches, padded(k)), dtype=weight.dtype, device=pixels.device)
    launch = configs.lookup(configs.PATCH_EMBED_ROWS, arch(pixels.device))
    if images:
        with on_device(pixels):
            _rows_kernel[(images, max(1, triton.cdiv(patches, launch.tile["BLOCK_M"])))](
                pixels_ptr=pixels,
                kept_ptr=None if kept is None else kept.contiguous(),
                rows_ptr=rows,
                patches=patches,
                frames=frames,
                columns=columns,
                stride_b=pixels.stride(0),
                stride_c=pixels.stride(1),
                stride_t=0 if pixels.dim() == 4 else pixels.stride(2),
                stride_h=pixels.stride(-2),
                stride_w=pixels.stride(-1),
                K=k,
                P=patch,
                TUBE=tube,
                KP=padded(k),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                **launch.tile,
            )
    return rows


def _addressable(pixels: torch.Tensor) -> torch.Tensor:
    """pixels, written out where the offsets inside a clip would not fit in 32 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(pixels.shape[1:], pixels.stride()[1:]))
    return pixels if reach < 2**31 else pixels.contiguous()


def bwd_position(dtokens: torch.Tensor, clips: int, kept: torch.Tensor, patches: int) -> torch.Tensor:
    """dtokens (B*T', 1 + K, D) summed into the positions (1 + patches, D), in float32."""
    images, n, d = dtokens.shape
    where = torch.full((clips, 1 + patches), -1, dtype=torch.int32, device=dtokens.device)  # a position's token
    where[:, 0] = 0
    tokens = torch.arange(1, n, dtype=torch.int32, device=dtokens.device)
    where.scatter_(1, 1 + kept, tokens.expand(clips, n - 1))
    wide = torch.float64 if dtokens.dtype == torch.float64 else torch.float32
    dposition = torch.empty((1 + patches, d), dtype=wide, device=dtokens.device)
    launch = configs.lookup(configs.PATCH_EMBED_BWD_POSITION, arch(dtokens.device))
    with on_device(dtokens):
        _bwd_position_kernel[((1 + patches) * triton.cdiv(d, launch.tile["BLOCK_D"]),)](
            dtokens_ptr=dtokens.contiguous(),
            where_ptr=where,
            dposition_ptr=dposition,
            images=images,
            n=n,
            positions=1 + patches,
            T=max(1, images // max(1, clips)),
            D=d,
            ACC=accumulator(dtokens.dtype),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **launch.tile,
        )
    return dposition


def aot_cases(arch: str) -> list[AotCase]:
    """32 clips of 8 frames, L/14 and H/14, bfloat16 or float32: bytes and floats, half of the patches, tubes."""
    cases = []
    launch = configs.lookup(configs.PATCH_EMBED_ROWS, arch)
    for kind, dtype, tube, half in (
        ("u8", "bf16", 1, False),
        ("u8", "bf16", 1, True),
        ("bf16", "bf16", 1, False),
        ("fp32", "bf16", 2, False),
        ("fp32", "fp32", 1, True),
    ):
        patches, images, k = 128 if half else 256, 32 * 8 // tube, 588 * tube
        blocks = triton.cdiv(patches, launch.tile["BLOCK_M"])
        width, wide = {"u8": 1, "bf16": 2, "fp32": 4}[kind], 4 if dtype == "fp32" else 2
        signature = {"pixels_ptr": f"*{kind}:16", "rows_ptr": f"*{dtype}:16", "patches": "i32:16", "frames": "i32"}
        signature |= dict.fromkeys(("columns", "stride_b", "stride_c", "stride_t", "stride_h"), "i32:16")
        signature |= {"kept_ptr": "*i64:16"} if half else {}
        constants = {"K": k, "P": 14, "TUBE": tube, "KP": padded(k), "stride_w": 1, **launch.tile}
        constants |= {} if half else {"kept_ptr": None}
        cases.append(
            AotCase(
                f"patch_embed rows {kind}->{dtype} tube {tube} {images}x{1 + patches}x{padded(k)}",
                _rows_kernel,
                signature,
                constants,
                launch.num_warps,
                launch.num_stages,
                0,
                images * (patches * k * width + (1 + patches) * padded(k) * wide),
                programs=images * blocks,
                trips=(triton.cdiv(padded(k), launch.tile["BLOCK_K"]),),
                shares=(1 / blocks,),
            )
        )
    for d in (1024, 1280):
        cases.append(
            AotCase(
                f"patch_embed matrix {d}x592",
                _matrix_kernel,
                {"weight_ptr": "*bf16:16", "mean_ptr": "*fp32:16", "std_ptr": "*fp32:16", "matrix_ptr": "*bf16:16"},
                {"C": 3, "K": 588, "KP": 592, "BLOCK": 1024, "ACC": tl.float32},
                configs.lookup(configs.PATCH_EMBED_MATRIX, arch).num_warps,
                1,
                0,
                d * (588 + 592) * 2,
                programs=d,
            )
        )
        row = configs.lookup(configs.PATCH_EMBED_BWD_POSITION, arch)
        signature = {"dtokens_ptr": "*bf16:16", "where_ptr": "*i32:16", "dposition_ptr": "*fp32:16", "images": "i32:16"}
        cases.append(
            AotCase(
                f"patch_embed bwd position 256x129x{d}",
                _bwd_position_kernel,
                signature | dict.fromkeys(("n", "positions"), "i32"),
                {"T": 8, "D": d, "ACC": tl.float32, **row.tile},
                row.num_warps,
                row.num_stages,
                0,
                256 * 129 * d * 2 + 257 * d * 4,
                programs=257 * triton.cdiv(d, row.tile["BLOCK_D"]),
                trips=(triton.cdiv(256, row.tile["BLOCK_B"]),),
            )
        )
    return cases
