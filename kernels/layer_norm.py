"""Layer norm over rows of D, with a residual added on the way in.

    total = x + residual;  y = (total - mean) * rstd * weight + bias
    dtotal' = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dtotal,  g = dy * weight,  xhat = (total - mean) * rstd
    dweight = sum over rows of dy * xhat;  dbias = sum over rows of dy

Kept for the backward: total, mean, rstd. Statistics and sums are float32 (float64 for float64). The sums over rows are
taken in a fixed order: each program adds up rows of its own, and one more kernel adds up the programs. No atomics.
Source: Ba et al., arXiv 1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import MULTIPROCESSORS, AotCase, accumulator, arch, on_device, programs

from lbfast.kernels import configs

_WIDEST = 8192


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    eps,
    stride_xm,
    size_r1,
    size_r2,
    stride_r0,
    stride_r1,
    stride_r2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BROADCAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program normalises BLOCK_M rows. Row (i0, i1, i2) of the residual lies at the sum of i * stride_r."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < rows
    m_d = o_d < D
    m_x = m_m[:, None] & m_d[None, :]
    o_y = o_m[:, None] * D + o_d[None, :]
    x = tl.load(x_ptr + o_m[:, None] * stride_xm + o_d[None, :], mask=m_x, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_D]
    if residual_ptr is not None:
        if BROADCAST:
            o_r = o_m // size_r2
            o_r = (o_r // size_r1) * stride_r0 + (o_r % size_r1) * stride_r1 + (o_m % size_r2) * stride_r2
        else:
            o_r = o_m * stride_r2
        x += tl.load(residual_ptr + o_r[:, None] + o_d[None, :], mask=m_x, other=0.0).to(ACC)
        if total_ptr is not None:
            x = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + o_y, x, mask=m_x)
            x = x.to(ACC)  # normalise what the backward will see
    mean = tl.sum(x, axis=1) / D  # [BLOCK_M]
    centred = tl.where(m_d[None, :], x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    tl.store(mean_ptr + o_m, mean, mask=m_m)
    tl.store(rstd_ptr + o_m, rstd, mask=m_m)
    weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + o_y, y.to(y_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dtotal_ptr,
    total_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    stride_tm,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program p takes every P-th tile of BLOCK_M rows. dx_ptr or sums_ptr (P, 2, D) may be None, dtotal_ptr too."""
    p = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    dweight = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for tile in range(p, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        o_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < rows
        m_x = m_m[:, None] & m_d[None, :]
        o_y = o_m[:, None] * D + o_d[None, :]
        mean = tl.load(mean_ptr + o_m, mask=m_m, other=0.0)
        rstd = tl.load(rstd_ptr + o_m, mask=m_m, other=0.0)
        dy = tl.load(dy_ptr + o_y, mask=m_x, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_D]
        total = tl.load(total_ptr + o_m[:, None] * stride_tm + o_d[None, :], mask=m_x, other=0.0).to(ACC)
        xhat = tl.where(m_x, (total - mean[:, None]) * rstd[:, None], 0.0)
        if sums_ptr is not None:
            dweight += dy * xhat
            dbias += dy
        if dx_ptr is not None:
            g = dy * weight[None, :]
            mean_g = tl.sum(g, axis=1) / D
            mean_gx = tl.sum(g * xhat, axis=1) / D
            dx = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
            if dtotal_ptr is not None:
                dx += tl.load(dtotal_ptr + o_y, mask=m_x, other=0.0).to(ACC)
            tl.store(dx_ptr + o_y, dx.to(dx_ptr.dtype.element_ty), mask=m_x)
    if sums_ptr is not None:
        o_s = sums_ptr + p * 2 * D + o_d
        tl.store(o_s, tl.sum(dweight, axis=0), mask=m_d)
        tl.store(o_s + D, tl.sum(dbias, axis=0), mask=m_d)


def why_not(x: torch.Tensor) -> list[str]:
    """Reasons why these kernels cannot take x."""
    return [] if x.shape[-1] <= _WIDEST else [f"rows of {x.shape[-1]} are longer than {_WIDEST}"]


def layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    keep_total: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """x (..., D), residual broadcastable to it -> y, total (None without residual), mean and rstd (..., 1).

    Without `keep_total` there is none either, and y has x's dtype.
    """
    d = x.shape[-1]
    flat = _rows(x)
    rows = flat.shape[0]
    keep_total = keep_total and residual is not None
    dtype = torch.promote_types(x.dtype, residual.dtype) if keep_total and residual is not None else x.dtype
    total = None if not keep_total else torch.empty(x.shape, dtype=dtype, device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    acc = accumulator(dtype)
    mean = torch.empty((*x.shape[:-1], 1), dtype=torch.float64 if acc == tl.float64 else torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    sizes, strides = (1, 1), (0, 0, 0)
    if residual is not None:
        residual, sizes, strides = _broadcast_rows(residual, x.shape)
    if rows:
        launch = configs.lookup(configs.LAYER_NORM_FWD, arch(x.device))
        block_m, block_d = _tile(d, launch.tile["ELEMENTS"])
        with on_device(x):
            _layer_norm_fwd_kernel[(triton.cdiv(rows, block_m),)](
                x_ptr=flat,
                residual_ptr=residual,
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
                y_ptr=y,
                total_ptr=total,
                mean_ptr=mean,
                rstd_ptr=rstd,
                rows=rows,
                eps=eps,
                stride_xm=flat.stride(0),
                size_r1=sizes[0],
                size_r2=sizes[1],
                stride_r0=strides[0],
                stride_r1=strides[1],
                stride_r2=strides[2],
                D=d,
                BLOCK_M=block_m,
                BLOCK_D=block_d,
                BROADCAST=sizes != (1, 1),
                ACC=acc,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return y, total, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of total (dtotal added), weight and bias; the latter two in float32; None where `mask` says so."""
    d = total.shape[-1]
    flat = _rows(total)
    rows = flat.shape[0]
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device) if mask[0] else None
    acc = torch.float64 if total.dtype == torch.float64 else torch.float32
    launch = configs.lookup(configs.LAYER_NORM_BWD, arch(total.device))
    block_m, block_d = _tile(d, launch.tile["ELEMENTS"])
    grid = min(triton.cdiv(rows, block_m), programs(total.device, launch.tile["PER_SM"]))
    sums = torch.empty((grid, 2, d), dtype=acc, device=total.device) if mask[1] or mask[2] else None
    if rows:
        with on_device(total):
            _layer_norm_bwd_kernel[(grid,)](
                dy_ptr=dy.contiguous(),
                dtotal_ptr=None if dtotal is None else dtotal.contiguous(),
                total_ptr=flat,
                weight_ptr=weight.contiguous(),
                mean_ptr=mean,
                rstd_ptr=rstd,
                dx_ptr=dx,
                sums_ptr=sums,
                rows=rows,
                stride_tm=flat.stride(0),
                D=d,
                BLOCK_M=block_m,
                BLOCK_D=block_d,
                ACC=accumulator(total.dtype),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    if sums is None:
        return dx, None, None
    dweight, dbias = sums.sum(0)
    return dx, dweight if mask[1] else None, dbias if mask[2] else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, D) with D contiguous: a view where there is one (a class token's rows, say)."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _broadcast_rows(
    residual: torch.Tensor, shape: Sequence[int]
) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int, int]]:
    """The residual, and where its rows lie when it is broadcast to `shape`: two inner sizes, three strides.

    Axes that step evenly are one; where more than three are left, or D steps, the residual is written out.
    """
    wide = residual.expand(shape)
    axes: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(wide.shape[:-1], wide.stride()[:-1]):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 3 or (wide.stride(-1) != 1 and shape[-1] > 1):
        wide = wide.contiguous()
        axes = [(0, shape[-1])]
    axes = [(1, 0)] * (3 - len(axes)) + axes
    if axes[0] == axes[1] == (1, 0):
        return wide, (1, 1), (0, 0, axes[2][1])
    return wide, (axes[1][0], axes[2][0]), (axes[0][1], axes[1][1], axes[2][1])


def _tile(d: int, elements: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_D): whole rows, about `elements` numbers of them."""
    block_d = triton.next_power_of_2(d)
    return max(1, elements // block_d), block_d


def aot_cases(arch: str) -> list[AotCase]:
    """L/14 and H/14 video layers: 32 clips of 8 frames, bfloat16; a temporal embedding broadcast over positions."""
    cases = []
    rows = 32 * 8 * 257
    for d in (1024, 1280):
        moved = rows * d * 2
        fwd, bwd = configs.lookup(configs.LAYER_NORM_FWD, arch), configs.lookup(configs.LAYER_NORM_BWD, arch)
        tensor, wide = "*bf16:16", "*fp32:16"
        for what, residual in (("", None), (" + residual", "rows"), (" + temporal_embedding", "broadcast")):
            block_m, block_d = _tile(d, fwd.tile["ELEMENTS"])
            pointers = {"x_ptr": tensor, "weight_ptr": tensor, "bias_ptr": tensor, "y_ptr": tensor}
            pointers |= {"mean_ptr": wide, "rstd_ptr": wide}
            pointers |= {"residual_ptr": tensor, "total_ptr": tensor} if residual else {}
            numbers = {"rows": "i32:16", "eps": "fp32", "stride_xm": "i32:16", "stride_r2": "i32:16"}
            constants = {"D": d, "BLOCK_M": block_m, "BLOCK_D": block_d, "ACC": tl.float32}
            constants |= {} if residual else {"residual_ptr": None, "total_ptr": None}
            if residual == "broadcast":
                numbers |= {"size_r1": "i32", "size_r2": "i32", "stride_r0": "i32:16", "stride_r1": "i32:16"}
            else:
                constants |= {"size_r1": 1, "size_r2": 1, "stride_r0": 0, "stride_r1": 0}
            constants["BROADCAST"] = residual == "broadcast"
            traffic = moved * {None: 2, "rows": 4, "broadcast": 3}[residual]
            cases.append(
                AotCase(
                    f"layer_norm fwd{what} {rows}x{d}",
                    _layer_norm_fwd_kernel,
                    pointers | numbers,
                    constants,
                    fwd.num_warps,
                    fwd.num_stages,
                    0,
                    traffic,
                    programs=triton.cdiv(rows, block_m),
                )
            )
        block_m, block_d = _tile(d, bwd.tile["ELEMENTS"])
        tiles = triton.cdiv(rows, block_m)
        grid = min(tiles, MULTIPROCESSORS[arch] * bwd.tile["PER_SM"])
        pointers = {f"{name}_ptr": tensor for name in ("dy", "dtotal", "total", "weight", "dx")}
        pointers |= {f"{name}_ptr": wide for name in ("mean", "rstd", "sums")}
        cases.append(
            AotCase(
                f"layer_norm bwd + dtotal {rows}x{d}",
                _layer_norm_bwd_kernel,
                pointers | {"rows": "i32:16", "stride_tm": "i32:16"},
                {"D": d, "BLOCK_M": block_m, "BLOCK_D": block_d, "ACC": tl.float32},
                bwd.num_warps,
                bwd.num_stages,
                0,
                4 * moved,
                programs=grid,
                trips=(tiles / grid,),
            )
        )
    return cases
