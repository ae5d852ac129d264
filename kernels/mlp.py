"""The activation of the two-layer perceptron; its matrix products are the library's.

    a = act(h);  dh = da * act'(h);  dbias = sum over rows of dh
    act(h) = h Phi(h) (exact GELU, by erf), or h sigmoid(1.702 h) (quick GELU)

The backward reads da and h once and gives dh (over da), act(h) for fc2's weight gradient, and fc1's bias gradient.
In float32 (float64 for float64). For 16-bit tensors h Phi(h) = max(h, 0) - |h| Phi(-|h|), and the logarithm of that
tail is a polynomial: seven multiply-adds and one exponential give it within 1e-5 of itself, h Phi(h) within 1e-6. The
sum over rows is taken in a fixed order; no atomics.
Source: Hendrycks and Gimpel, arXiv 1606.08415.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import (
    FLOAT8_ARCHS,
    AotCase,
    accumulator,
    approximate,
    arch,
    divide,
    exp2,
    on_device,
)

from lbfast.kernels import configs


@triton.jit
def _tail(x, APPROX: tl.constexpr):
    """Phi(-x) for 0 <= x <= 16, within 1e-5 of itself up to 6.5; 0 from 11.6 on.

    The minimax polynomial of log2 Phi(-x) on [0, 6.5] by relative error in Phi, its first coefficient held at -1.
    """
    p = 6.0002001e-05 - 1.7603245e-06 * x
    p = 8.4510735e-03 + x * (-9.1704429e-04 + x * p)
    p = -4.5859789e-01 + x * (-5.3835530e-02 + x * p)
    p = -1.0 + x * (-1.1511941 + x * p)
    return exp2(p, APPROX)


@triton.jit
def _act(h, ACT: tl.constexpr, EXACT: tl.constexpr, APPROX: tl.constexpr):
    """act(h), or h for "none"."""
    if ACT == "none":
        return h
    if ACT == "quick_gelu":
        return divide(h, 1 + exp2(-2.4554669595930156 * h, APPROX), APPROX)  # 1.702 / ln 2
    if EXACT:
        return 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    x = tl.minimum(tl.abs(h), 16.0, propagate_nan=tl.PropagateNan.ALL)  # infinity times 0 would be NaN
    return tl.maximum(h, 0.0) - x * _tail(x, APPROX)


@triton.jit
def _act_slope(h, ACT: tl.constexpr, EXACT: tl.constexpr, APPROX: tl.constexpr):
    """act(h) and act'(h)."""
    if ACT == "quick_gelu":
        gate = divide(1.0, 1 + exp2(-2.4554669595930156 * h, APPROX), APPROX)
        a = h * gate
        return a, gate + 1.702 * (a * (1 - gate))
    if EXACT:
        phi = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        return h * phi, phi + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    x = tl.minimum(tl.abs(h), 16.0, propagate_nan=tl.PropagateNan.ALL)
    tail = _tail(x, APPROX)
    density = exp2(-0.7213475204444817 * (x * x) - 1.3257480647361592, APPROX)  # exp(-x^2 / 2) / sqrt(2 pi)
    bend = x * density - tail
    return tl.maximum(h, 0.0) - x * tail, tl.where(h > 0, 1 + bend, -bend)


@triton.jit
def _activation_fwd_kernel(
    h_ptr,
    a_ptr,
    size,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    APPROX: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program takes BLOCK numbers."""
    o_h = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < size
    a = _act(tl.load(h_ptr + o_h, mask=m_h, other=0.0).to(ACC), ACT, EXACT, APPROX)
    tl.store(a_ptr + o_h, a.to(a_ptr.dtype.element_ty), mask=m_h)


@triton.jit
def _activation_bwd_kernel(
    da_ptr,
    h_ptr,
    a_ptr,
    sums_ptr,
    rows,
    rows_each,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    APPROX: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program takes BLOCK_F columns of `rows_each` rows; dh goes over da. a_ptr and sums_ptr (., F) may be None."""
    columns = tl.cdiv(F, BLOCK_F)
    part = tl.program_id(0) // columns
    o_f = tl.program_id(0) % columns * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    last = tl.minimum((part + 1) * rows_each, rows)
    dbias = tl.zeros([BLOCK_M, BLOCK_F], ACC)
    for first in range(part * rows_each, last, BLOCK_M):
        o_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_h = (o_m < last)[:, None] & m_f[None, :]
        o_h = o_m[:, None] * F + o_f[None, :]
        da = tl.load(da_ptr + o_h, mask=m_h, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_F]
        a, slope = _act_slope(tl.load(h_ptr + o_h, mask=m_h, other=0.0).to(ACC), ACT, EXACT, APPROX)
        dh = da * slope
        tl.store(da_ptr + o_h, dh.to(da_ptr.dtype.element_ty), mask=m_h)
        if a_ptr is not None:
            tl.store(a_ptr + o_h, a.to(a_ptr.dtype.element_ty), mask=m_h)
        if sums_ptr is not None:
            dbias += dh
    if sums_ptr is not None:
        tl.store(sums_ptr + part.to(tl.int64) * F + o_f, tl.sum(dbias, axis=0), mask=m_f)


@triton.jit
def _activation_float8_kernel(
    h_ptr,
    values_ptr,
    scales_ptr,
    stride_hm,
    F: tl.constexpr,
    CHUNKS: tl.constexpr,
    INNER: tl.constexpr,
    ACT: tl.constexpr,
    APPROX: tl.constexpr,
):
    """One program takes a row: act(h) times what makes its largest number 448, as e4m3, and the factor back."""
    row = tl.program_id(0).to(tl.int64)
    o_f = tl.arange(0, CHUNKS)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    m_f = o_f < F
    h = tl.load(h_ptr + row * stride_hm + o_f, mask=m_f, other=0.0).to(tl.float32)  # [CHUNKS, INNER]
    a = _act(h, ACT, False, APPROX)
    largest = tl.maximum(tl.max(tl.max(tl.abs(a), axis=0), axis=0), 1e-12)
    tl.store(scales_ptr + row, largest / 448)
    o_v = tl.max_contiguous(o_f, [1, 8])  # stored from the threads that loaded them
    tl.store(values_ptr + row * F + o_v, (a * (448 / largest)).to(values_ptr.dtype.element_ty), mask=m_f)


def activation_fwd(h: torch.Tensor, activation: str, *, in_place: bool) -> torch.Tensor:
    """act(h) of a contiguous h, over it or into a new tensor."""
    a = h if in_place else torch.empty_like(h)
    launch = configs.lookup(configs.MLP_FWD, arch(h.device))
    if h.numel():
        with on_device(h):
            _activation_fwd_kernel[(triton.cdiv(h.numel(), launch.tile["BLOCK"]),)](
                h_ptr=h,
                a_ptr=a,
                size=h.numel(),
                ACT=activation,
                EXACT=h.element_size() > 2,
                APPROX=approximate(h),
                ACC=accumulator(h.dtype),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                **launch.tile,
            )
    return a


def activation_float8(h: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act(h) of h (..., F), or h for "none" -> e4m3 (..., F) and float32 (..., 1), whose product it is."""
    f = h.shape[-1]
    flat = h.reshape(-1, f)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    values = torch.empty(h.shape, dtype=torch.float8_e4m3fn, device=h.device)
    scales = torch.empty((*h.shape[:-1], 1), dtype=torch.float32, device=h.device)
    launch = configs.lookup(configs.MLP_FLOAT8, arch(h.device))
    tile, warps = _row_tile(f, launch)
    if h.numel():
        with on_device(h):
            _activation_float8_kernel[(len(flat),)](
                h_ptr=flat,
                values_ptr=values,
                scales_ptr=scales,
                stride_hm=flat.stride(0),
                ACT=activation,
                APPROX=approximate(h),
                num_warps=warps,
                num_stages=launch.num_stages,
                **tile,
            )
    return values, scales


def _row_tile(f: int, launch: configs.Launch) -> tuple[dict[str, int], int]:
    """The row kernel's F, CHUNKS and INNER (16 bytes a thread), and warps: about NUMBERS of a row in each thread."""
    warps = min(launch.num_warps, 1 << (max(1, f // (32 * launch.tile["NUMBERS"])).bit_length() - 1))
    inner = warps * 32 * 8
    return {"F": f, "CHUNKS": triton.next_power_of_2(triton.cdiv(f, inner)), "INNER": inner}, warps


def activation_bwd(
    da: torch.Tensor, h: torch.Tensor, activation: str, *, need_a: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """da, h (M, F) contiguous -> dh (da's memory, overwritten), act(h), and dh summed over rows, of h's dtype."""
    rows, f = h.shape
    a = torch.empty_like(h) if need_a else None
    launch = configs.lookup(configs.MLP_BWD, arch(h.device))
    rows_each = launch.tile["ROWS_EACH"]
    parts = triton.cdiv(rows, rows_each)
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    sums = torch.empty((parts, f), dtype=wide, device=h.device) if need_bias else None
    if rows:
        with on_device(h):
            _activation_bwd_kernel[(parts * triton.cdiv(f, launch.tile["BLOCK_F"]),)](
                da_ptr=da,
                h_ptr=h,
                a_ptr=a,
                sums_ptr=sums,
                rows=rows,
                rows_each=rows_each,
                F=f,
                BLOCK_M=launch.tile["BLOCK_M"],
                BLOCK_F=launch.tile["BLOCK_F"],
                ACT=activation,
                EXACT=h.element_size() > 2,
                APPROX=approximate(h),
                ACC=accumulator(h.dtype),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return da, a, None if sums is None else sums.sum(0).to(h.dtype)


def aot_cases(arch: str) -> list[AotCase]:
    """L/14 and H/14 video layers: 32 clips of 8 frames, bfloat16; float8 from what attention gives, too."""
    cases = []
    rows = 32 * 8 * 257
    fwd, bwd = configs.lookup(configs.MLP_FWD, arch), configs.lookup(configs.MLP_BWD, arch)
    float8 = configs.lookup(configs.MLP_FLOAT8, arch)
    parts = triton.cdiv(rows, bwd.tile["ROWS_EACH"])
    tensor, approx = "*bf16:16", arch.startswith("sm_")
    for f, act in itertools.product((4096, 5120), ("gelu", "quick_gelu")):
        what, moved = f"{act} {rows}x{f}", rows * f * 2
        shared = {"ACT": act, "EXACT": False, "APPROX": approx, "ACC": tl.float32}
        cases.append(
            AotCase(
                f"mlp fwd {what}",
                _activation_fwd_kernel,
                {"h_ptr": tensor, "a_ptr": tensor, "size": "i32:16"},
                {"BLOCK": fwd.tile["BLOCK"], **shared},
                fwd.num_warps,
                fwd.num_stages,
                0,
                2 * moved,
                programs=triton.cdiv(rows * f, fwd.tile["BLOCK"]),
            )
        )
        pointers = {"da_ptr": tensor, "h_ptr": tensor, "a_ptr": tensor, "sums_ptr": "*fp32:16"}
        cases.append(
            AotCase(
                f"mlp bwd {what}",
                _activation_bwd_kernel,
                pointers | {"rows": "i32:16", "rows_each": "i32:16"},
                {"F": f, "BLOCK_M": bwd.tile["BLOCK_M"], "BLOCK_F": bwd.tile["BLOCK_F"], **shared},
                bwd.num_warps,
                bwd.num_stages,
                0,
                4 * moved,
                programs=parts * triton.cdiv(f, bwd.tile["BLOCK_F"]),
                trips=(rows / parts / bwd.tile["BLOCK_M"],),
            )
        )
    widths = ((1024, "none"), (4096, "gelu"), (1280, "none"), (5120, "gelu")) if arch in FLOAT8_ARCHS else ()
    for f, act in widths:
        tile, warps = _row_tile(f, float8)
        cases.append(
            AotCase(
                f"mlp float8 {act} {rows}x{f}",
                _activation_float8_kernel,
                {"h_ptr": tensor, "values_ptr": "*fp8e4nv:16", "scales_ptr": "*fp32:16", "stride_hm": "i32:16"},
                {**tile, "ACT": act, "APPROX": approx},
                warps,
                float8.num_stages,
                0,
                3 * rows * f,
                programs=rows,
            )
        )
    return cases
