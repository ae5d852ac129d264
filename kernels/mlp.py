"""The activation of the two-layer perceptron; its matrix products are the library's.

    a = act(h);  dh = da * act'(h);  dbias = sum over rows of dh
    act(h) = h Phi(h) (exact GELU, by erf), or h sigmoid(1.702 h) (quick GELU)

The backward reads da and h once and gives dh (over da), act(h) for fc2's weight gradient, and fc1's bias gradient.
In float32 (float64 for float64). For 16-bit tensors Phi is a polynomial times exp(-h^2/2), within 1.5e-7, which shares
that exponential with the density in the derivative. The sum over rows is taken in a fixed order; no atomics.
Source: Hendrycks and Gimpel, arXiv 1606.08415; Abramowitz and Stegun, formula 7.1.26.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import AotCase, accumulator, arch, on_device

from lbfast.kernels import configs


@triton.jit
def _normal(h, EXACT: tl.constexpr):
    """Phi(h) and exp(-h^2/2)."""
    bell = tl.exp(-0.5 * h * h)
    if EXACT:
        return 0.5 * (1 + tl.erf(h * 0.7071067811865476)), bell
    t = 1 / (1 + 0.2316418882663604 * tl.abs(h))  # 0.3275911 / sqrt(2)
    tail = (
        0.5 * bell * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    )
    return tl.where(h < 0, tail, 1 - tail), bell


@triton.jit
def _act(h, QUICK: tl.constexpr, EXACT: tl.constexpr):
    """act(h) and act'(h)."""
    if QUICK:
        gate = 1 / (1 + tl.exp(-1.702 * h))
        return h * gate, gate * (1 + 1.702 * h * (1 - gate))
    phi, bell = _normal(h, EXACT)
    return h * phi, phi + h * bell * 0.3989422804014327


@triton.jit
def _activation_fwd_kernel(
    h_ptr, a_ptr, size, QUICK: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """One program takes BLOCK numbers."""
    o_h = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < size
    a, _ = _act(tl.load(h_ptr + o_h, mask=m_h, other=0.0).to(ACC), QUICK, EXACT)
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
    QUICK: tl.constexpr,
    EXACT: tl.constexpr,
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
        a, slope = _act(tl.load(h_ptr + o_h, mask=m_h, other=0.0).to(ACC), QUICK, EXACT)
        dh = da * slope
        tl.store(da_ptr + o_h, dh.to(da_ptr.dtype.element_ty), mask=m_h)
        if a_ptr is not None:
            tl.store(a_ptr + o_h, a.to(a_ptr.dtype.element_ty), mask=m_h)
        if sums_ptr is not None:
            dbias += dh
    if sums_ptr is not None:
        tl.store(sums_ptr + part.to(tl.int64) * F + o_f, tl.sum(dbias, axis=0), mask=m_f)


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
                QUICK=activation == "quick_gelu",
                EXACT=h.element_size() > 2,
                ACC=accumulator(h.dtype),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                **launch.tile,
            )
    return a


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
                QUICK=activation == "quick_gelu",
                EXACT=h.element_size() > 2,
                ACC=accumulator(h.dtype),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return da, a, None if sums is None else sums.sum(0).to(h.dtype)


def aot_cases(arch: str) -> list[AotCase]:
    """L/14 and H/14 video layers: 32 clips of 8 frames, bfloat16."""
    cases = []
    rows = 32 * 8 * 257
    fwd, bwd = configs.lookup(configs.MLP_FWD, arch), configs.lookup(configs.MLP_BWD, arch)
    parts = triton.cdiv(rows, bwd.tile["ROWS_EACH"])
    tensor = "*bf16:16"
    for f in (4096, 5120):
        moved = rows * f * 2
        for quick in (False, True):
            what = f"{'quick_gelu' if quick else 'gelu'} {rows}x{f}"
            shared = {"QUICK": quick, "EXACT": False, "ACC": tl.float32}
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
    return cases
