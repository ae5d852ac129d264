"""Patch embedding as an implicit GEMM: the pixels are read where they lie, and only those of patches that are kept.

    tokens[b, t, 1 + i] = A[b, t, kept[b, i]] @ weight.T + bias + position[1 + kept[b, i]]
    tokens[b, t, 0]     = class_embedding[t] + position[0]

A patch is R = C * tube * P kernel rows of P pixels. Each row is padded to a power of two by zero weights (14 -> 16),
so that a tile of BLOCK_K holds whole rows: `_pack_kernel` writes the weight so, folding mean and std of uint8 pixels
into it, and into a bias, in float32 before it rounds. uint8 pixels enter as x - 128, which is exact. The class token's
row is a row of zeros in A: the tokens come out in one piece. Kept for the backward: the inputs. Sums are float32
(float64 for float64). The backward is in patch_embed_bwd.py.
Source: Dosovitskiy et al., arXiv 2010.11929.
"""

from __future__ import annotations

import dataclasses
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
def token_rows(o_m, rows, n, frames, kept_ptr, columns, P: tl.constexpr, TUBE: tl.constexpr):
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
def patch_columns(
    o_k, stride_c, stride_t, stride_h, stride_w, R: tl.constexpr, P: tl.constexpr, TUBE: tl.constexpr, PAD: tl.constexpr
):
    """Offsets of the numbers o_k of a padded patch from its beginning, and which of them are pixels."""
    row, column = o_k // PAD, o_k % PAD
    plane = row // P
    offset = plane // TUBE * stride_c + plane % TUBE * stride_t + row % P * stride_h + column * stride_w
    return offset, (row < R) & (column < P)


@triton.jit
def load_patches(pixels_ptr, start, offset, m_a, DTYPE: tl.constexpr):
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
    b, t0, y, x, position, t, is_patch = token_rows(o_m, rows, n, frames, kept_ptr, columns, P, TUBE)
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
        offset, m_k = patch_columns(o_k, stride_c, stride_t, stride_h, stride_w, R, P, TUBE, PAD)
        a = load_patches(pixels_ptr, start, offset, is_patch[:, None] & m_k[None, :], packed_ptr.dtype.element_ty)
        w = tl.load(packed_ptr + o_n[None, :] * KP + o_k[:, None], mask=m_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC)
    o_o = o_m.to(tl.int64)[:, None] * D + o_n[None, :]
    tl.store(tokens_ptr + o_o, acc.to(tokens_ptr.dtype.element_ty), mask=m_o)


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
    pixels = addressable(pixels)
    shape, numbers = geometry(pixels, weight, kept)
    launch = launch_row(configs.PATCH_EMBED_FWD, weight)
    packed, bias = pack(weight, mean, std, shape)
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
                **constants_of(weight, shape, launch),
            )
    return tokens


def addressable(pixels: torch.Tensor) -> torch.Tensor:
    """pixels, written out where the offsets inside a clip would not fit in 32 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(pixels.shape[1:], pixels.stride()[1:]))
    return pixels if reach < 2**31 else pixels.contiguous()


def geometry(
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


def padded(rows: int, patch: int) -> tuple[int, int]:
    """(PAD, KP): pixels of a padded kernel row; of a padded patch, a multiple of 64 (the largest step by BLOCK_K)."""
    pad = triton.next_power_of_2(patch)
    step = max(64, pad)
    return pad, triton.cdiv(rows * pad, step) * step


def pack(
    weight: torch.Tensor, mean: torch.Tensor | None, std: torch.Tensor | None, shape: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight (D, KP) with padded kernel rows; where mean and std are given, folded, and the bias (D,)."""
    pad, kp = padded(shape["R"], shape["P"])
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


def launch_row(table: Any, weight: torch.Tensor) -> configs.Launch:
    """The row for weight's device; wider numbers than 16 bits have one of their own, with smaller tiles."""
    return configs.lookup(table, arch(weight.device) if weight.element_size() == 2 else "wide")


def constants_of(weight: torch.Tensor, shape: dict[str, int], launch: configs.Launch) -> dict[str, Any]:
    """Every kernel's constexpr arguments and launch options, for this weight."""
    tf32 = weight.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    pad, kp = padded(shape["R"], shape["P"])
    constants = {name: shape[name] for name in ("R", "P", "TUBE")}
    constants |= {name: launch.tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constants |= {"D": len(weight), "PAD": pad, "KP": kp, "ACC": accumulator(weight.dtype)}
    constants |= {"PRECISION": "tf32" if tf32 else "ieee"}
    return constants | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}


SHAPES = (
    (1024, 1, "u8", False),
    (1024, 1, "bf16", True),
    (1280, 1, "u8", True),
    (1024, 2, "bf16", False),
    (1024, 1, "fp32", True),
)
"""(D, tube, pixels, half of the patches kept): 32 clips of 8 frames, L/14 and H/14; bfloat16 or float32 weights."""


@dataclasses.dataclass(frozen=True)
class AotShape:
    """What the cases of one of SHAPES share: names and types of arguments, and the work of a pass."""

    what: str
    row: str
    tensor: str
    rows: int
    sizes: dict[str, Any]
    pixels: dict[str, str]
    kept: dict[str, str]
    numbers: dict[str, str]
    gemm: dict[str, Any]
    flops: float
    bytes: float

    def case(
        self,
        name: str,
        kernel: Any,
        table: Any,
        signature: dict[str, str],
        constants: dict[str, Any],
        *work: float,
        programs: int,
        trips: tuple[float, ...] = (),
    ) -> AotCase:
        """With the table's tile sizes, as far as the kernel has them; work: (flops, bytes) if not the GEMM's."""
        row = configs.lookup(table, self.row)
        tile = {key: value for key, value in row.tile.items() if key in kernel.arg_names}
        work = work or (self.flops, self.bytes)
        name, constants = f"patch_embed {name} {self.what}", constants | tile
        return AotCase(name, kernel, signature, constants, row.num_warps, row.num_stages, *work, programs, trips)

    def tile(self, table: Any) -> dict[str, int]:
        """Of the table's row."""
        return dict(configs.lookup(table, self.row).tile)


def aot_shape(arch: str, d: int, tube: int, kind: str, half: bool) -> AotShape:
    """Of one of SHAPES."""
    patch, k = 14, 128 if half else 256
    images = 32 * 8 // tube
    rows, r = images * (1 + k), 3 * tube * patch
    pad, kp = padded(r, patch)
    sizes = {"D": d, "R": r, "P": patch, "PAD": pad, "KP": kp}
    numbers = dict.fromkeys(("rows", "columns", "stride_b", "stride_c", "stride_t", "stride_h"), "i32:16")
    numbers |= {"n": "i32", "frames": "i32"}
    gemm = sizes | {"stride_w": 1, "TUBE": tube, "PRECISION": "ieee", "ACC": tl.float32}
    gemm |= {} if half else {"kept_ptr": None}
    width = 4 if kind == "fp32" else 2
    return AotShape(
        what=f"{kind} tube {tube} {images}x{1 + k}x{d}",
        row="wide" if kind == "fp32" else arch,
        tensor="*fp32:16" if kind == "fp32" else "*bf16:16",
        rows=rows,
        sizes=sizes,
        pixels={"pixels_ptr": f"*{kind}:16"},
        kept={"kept_ptr": "*i64:16"} if half else {},
        numbers=numbers,
        gemm=gemm,
        flops=2 * images * k * d * r * patch,
        bytes=images * k * r * patch * (1 if kind == "u8" else width) + rows * d * width,
    )


def aot_cases(arch: str) -> list[AotCase]:
    """The forward, and the packing of weights for bytes, at SHAPES."""
    cases = []
    for d, tube, kind, half in SHAPES:
        shape = aot_shape(arch, d, tube, kind, half)
        signature = {f"{name}_ptr": shape.tensor for name in ("packed", "class", "position", "tokens")}
        signature |= shape.pixels | shape.kept | shape.numbers
        constants = shape.gemm | {"stride_class": 0}
        if kind == "u8":
            signature["bias_ptr"] = "*fp32:16"
        else:
            constants["bias_ptr"] = None
        table = configs.PATCH_EMBED_FWD
        tile = shape.tile(table)
        launched = {
            "programs": triton.cdiv(shape.rows, tile["BLOCK_M"]) * triton.cdiv(d, tile["BLOCK_N"]),
            "trips": (triton.cdiv(shape.sizes["KP"], tile["BLOCK_K"]),),
        }
        cases.append(shape.case("fwd", _patch_embed_fwd_kernel, table, signature, constants, **launched))
        if kind == "u8":
            signature = {f"{name}_ptr": "*fp32:16" for name in ("mean", "std", "bias")}
            signature |= {f"{name}_ptr": shape.tensor for name in ("weight", "packed")}
            constants = {name: size for name, size in shape.sizes.items() if name != "D"}
            constants |= {"BLOCK": triton.next_power_of_2(shape.sizes["KP"]), "C": 3, "ACC": tl.float32}
            moved = 4 * d * shape.sizes["KP"]
            table = configs.PATCH_EMBED_PACK
            cases.append(shape.case("pack", _pack_kernel, table, signature, constants, 0, moved, programs=d))
    return cases
