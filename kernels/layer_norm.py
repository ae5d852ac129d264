"""Layer norm over rows of D, with a residual added on the way in.

    total = x + residual;  y = (total - mean) * rstd * weight + bias
    dtotal' = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dtotal,  g = dy * weight,  xhat = (total - mean) * rstd
    dweight = sum over rows of dy * xhat;  dbias = sum over rows of dy

Kept for the backward: total, mean, rstd. Statistics and sums are float32 (float64 for float64). The sums over rows are
taken in a fixed order: each program adds up rows of its own, and one more kernel adds up the programs. No atomics.
Source: Ba et al., arXiv 1607.06450.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import FLOAT8_ARCHS, MULTIPROCESSORS, AotCase, accumulator, arch, on_device, programs

from lbfast.kernels import configs

_WIDEST = 8192

# A tile of rows is a tuple of CHUNKS pieces [BLOCK_M, INNER], INNER columns apart: as many as the warps of a row (one,
# up to D = 1280) load at once. So a row lies in one warp, and is summed up by shuffles, without a barrier.


@triton.jit
def _columns(c: tl.constexpr, m_m, D: tl.constexpr, INNER: tl.constexpr):
    """Columns [BLOCK_M, INNER] of piece c, and where they are within the rows m_m and D."""
    o_d = tl.broadcast_to((c * INNER + tl.arange(0, INNER))[None, :], [m_m.shape[0], INNER])
    return o_d, m_m[:, None] if (c + 1) * INNER <= D else m_m[:, None] & (o_d < D)


@triton.jit
def _load(ptr, o_m, m_m, D: tl.constexpr, CHUNKS: tl.constexpr, INNER: tl.constexpr):
    """The rows at offsets o_m (one for all of them: a weight) where m_m, as they are; 0 elsewhere."""
    pieces = ()
    for c in tl.static_range(CHUNKS):
        o_d, m_d = _columns(c, m_m, D, INNER)
        pieces += (tl.load(ptr + o_m[:, None] + o_d, mask=m_d, other=0.0),)
    return pieces


@triton.jit
def _store(ptr, pieces, o_m, m_m, D: tl.constexpr, CHUNKS: tl.constexpr, INNER: tl.constexpr):
    """Writes what _load would read, rounded to the pointer's type."""
    for c in tl.static_range(CHUNKS):
        o_d, m_d = _columns(c, m_m, D, INNER)
        tl.store(ptr + o_m[:, None] + o_d, pieces[c].to(ptr.dtype.element_ty), mask=m_d)


@triton.jit
def _within(piece, c: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr):
    """The piece, 0 past D."""
    if (c + 1) * INNER > D:
        piece = tl.where((c * INNER + tl.arange(0, INNER) < D)[None, :], piece, 0.0)
    return piece


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
    scale_ptr,
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
    CHUNKS: tl.constexpr,
    INNER: tl.constexpr,
    BROADCAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program normalises BLOCK_M rows. Row (i0, i1, i2) of the residual lies at the sum of i * stride_r.

    residual_ptr, total_ptr, mean_ptr with rstd_ptr, and scale_ptr may be None. With scale_ptr (rows,), y is float8.
    """
    o_i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_m = o_i.to(tl.int64)
    m_m = o_i < rows
    given = _load(x_ptr, o_m * stride_xm, m_m, D, CHUNKS, INNER)
    x = ()
    for c in tl.static_range(CHUNKS):
        x += (given[c].to(ACC),)
    if residual_ptr is not None:
        if BROADCAST:
            o_0, o_1, o_2 = o_i // size_r2 // size_r1, o_i // size_r2 % size_r1, o_i % size_r2
            o_r = o_0.to(tl.int64) * stride_r0 + o_1.to(tl.int64) * stride_r1 + o_2.to(tl.int64) * stride_r2
        else:
            o_r = o_m * stride_r2
        given = _load(residual_ptr, o_r, m_m, D, CHUNKS, INNER)
        total = ()
        for c in tl.static_range(CHUNKS):
            total_c = x[c] + given[c].to(ACC)
            if total_ptr is not None:
                total_c = total_c.to(total_ptr.dtype.element_ty).to(ACC)  # normalise what the backward will see
            total += (total_c,)
        x = total
        if total_ptr is not None:
            _store(total_ptr, x, o_m * D, m_m, D, CHUNKS, INNER)
    o_w = tl.zeros([BLOCK_M], tl.int32)
    m_w = o_w == 0
    weight = _load(weight_ptr, o_w, m_w, D, CHUNKS, INNER)
    bias = _load(bias_ptr, o_w, m_w, D, CHUNKS, INNER)
    sums = x[0]
    for c in tl.static_range(1, CHUNKS):
        sums += x[c]
    mean = tl.sum(sums, axis=1) / D  # [BLOCK_M]
    sums = tl.zeros([BLOCK_M, INNER], ACC)
    for c in tl.static_range(CHUNKS):
        centred = _within(x[c] - mean[:, None], c, D, INNER)
        sums += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(sums, axis=1) / D + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + o_m, mean, mask=m_m)
        tl.store(rstd_ptr + o_m, rstd, mask=m_m)
    y = ()
    for c in tl.static_range(CHUNKS):
        y += ((x[c] - mean[:, None]) * rstd[:, None] * weight[c].to(ACC) + bias[c].to(ACC),)
    if scale_ptr is not None:
        largest = tl.full([BLOCK_M, INNER], 1e-12, ACC)
        for c in tl.static_range(CHUNKS):
            largest = tl.maximum(largest, tl.abs(y[c]))  # past D both weight and bias are 0
        largest = tl.max(largest, axis=1)
        tl.store(scale_ptr + o_m, largest / 448, mask=m_m)
        given = y
        y = ()
        for c in tl.static_range(CHUNKS):
            y += (given[c] * (448 / largest)[:, None],)
    _store(y_ptr, y, o_m * D, m_m, D, CHUNKS, INNER)


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
    CHUNKS: tl.constexpr,
    INNER: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program p takes every P-th tile of BLOCK_M rows. dx_ptr or sums_ptr (P, 2, D) may be None, dtotal_ptr too."""
    p = tl.program_id(0)
    o_w = tl.zeros([BLOCK_M], tl.int32)
    weight = _load(weight_ptr, o_w, o_w == 0, D, CHUNKS, INNER)
    dweight, dbias = (), ()
    for _ in tl.static_range(CHUNKS):
        dweight += (tl.zeros([BLOCK_M, INNER], ACC),)
        dbias += (tl.zeros([BLOCK_M, INNER], ACC),)
    for tile in range(p, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        o_i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        o_m = o_i.to(tl.int64)
        m_m = o_i < rows
        mean = tl.load(mean_ptr + o_m, mask=m_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + o_m, mask=m_m, other=0.0)[:, None]
        dy = _load(dy_ptr, o_m * D, m_m, D, CHUNKS, INNER)
        total = _load(total_ptr, o_m * stride_tm, m_m, D, CHUNKS, INNER)
        if dx_ptr is not None and dtotal_ptr is not None:  # on its way while the sums are taken
            dtotal = _load(dtotal_ptr, o_m * D, m_m, D, CHUNKS, INNER)
        if sums_ptr is not None:
            dw, db = (), ()
            for c in tl.static_range(CHUNKS):
                dw += (dweight[c] + dy[c].to(ACC) * ((total[c].to(ACC) - mean) * rstd),)
                db += (dbias[c] + dy[c].to(ACC),)
            dweight, dbias = dw, db
        if dx_ptr is not None:
            sum_g = tl.zeros([BLOCK_M, INNER], ACC)
            sum_gx = tl.zeros([BLOCK_M, INNER], ACC)
            for c in tl.static_range(CHUNKS):
                g = dy[c].to(ACC) * weight[c].to(ACC)  # 0 past D
                sum_g += g
                sum_gx += g * ((total[c].to(ACC) - mean) * rstd)
            mean_g = tl.sum(sum_g, axis=1)[:, None] / D
            mean_gx = tl.sum(sum_gx, axis=1)[:, None] / D
            dx = ()
            for c in tl.static_range(CHUNKS):
                g = dy[c].to(ACC) * weight[c].to(ACC)
                dx_c = (g - mean_g - (total[c].to(ACC) - mean) * rstd * mean_gx) * rstd
                if dtotal_ptr is not None:
                    dx_c += dtotal[c].to(ACC)
                dx += (dx_c,)
            _store(dx_ptr, dx, o_m * D, m_m, D, CHUNKS, INNER)
    if sums_ptr is not None:
        for c in tl.static_range(CHUNKS):
            o_d = c * INNER + tl.arange(0, INNER)
            o_s = sums_ptr + p.to(tl.int64) * 2 * D + o_d
            tl.store(o_s, tl.sum(dweight[c], axis=0), mask=o_d < D)
            tl.store(o_s + D, tl.sum(dbias[c], axis=0), mask=o_d < D)


def why_not(x: torch.Tensor) -> list[str]:
    """Reasons why these kernels cannot take x."""
    reasons = []
    if x.shape[-1] > _WIDEST:
        reasons.append(f"rows of {x.shape[-1]} are longer than {_WIDEST}")
    if x.numel() // max(1, x.shape[-1]) >= 2**31 - 2**16:
        reasons.append(f"{tuple(x.shape)} has 2^31 rows or more")
    return reasons


def layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """x (..., D), residual broadcastable to it -> y, total (None without residual), mean and rstd (..., 1)."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, rstd = (torch.empty((*x.shape[:-1], 1), dtype=wide, device=x.device) for _ in range(2))
    _launch_fwd(x, residual, weight, bias, eps, y, total=total, mean=mean, rstd=rstd)
    return y, total, mean, rstd


def layer_norm_infer(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    keep_total: bool,
    float8: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Nothing kept for a backward: y of x's dtype, or e4m3 with scales (..., 1); total, of the dtypes' promotion."""
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn if float8 else x.dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if float8 else None
    total = None
    if keep_total and residual is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    _launch_fwd(x, residual, weight, bias, eps, y, total=total, scales=scales)
    return y, scales, total


def _launch_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    *,
    total: torch.Tensor | None,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """Fills y and what else is given."""
    flat = _rows(x)
    rows, d = flat.shape
    if not rows:
        return
    sizes, strides = (1, 1), (0, 0, 0)
    if residual is not None:
        residual, sizes, strides = _broadcast_rows(residual, x.shape)
    launch = _row(configs.LAYER_NORM_FWD, x)
    tile = _tile(d, x.element_size(), launch)
    with on_device(x):
        _layer_norm_fwd_kernel[(triton.cdiv(rows, tile["BLOCK_M"]),)](
            x_ptr=flat,
            residual_ptr=residual,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            y_ptr=y,
            total_ptr=total,
            mean_ptr=mean,
            rstd_ptr=rstd,
            scale_ptr=scales,
            rows=rows,
            eps=eps,
            stride_xm=flat.stride(0),
            size_r1=sizes[0],
            size_r2=sizes[1],
            stride_r0=strides[0],
            stride_r1=strides[1],
            stride_r2=strides[2],
            BROADCAST=sizes != (1, 1),
            ACC=accumulator(x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **tile,
        )


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
    flat = _rows(total)
    rows, d = flat.shape
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device) if mask[0] else None
    acc = torch.float64 if total.dtype == torch.float64 else torch.float32
    launch = _row(configs.LAYER_NORM_BWD, total)
    tile = _tile(d, total.element_size(), launch)
    grid = min(triton.cdiv(rows, tile["BLOCK_M"]), programs(total.device, launch.tile["PER_SM"]))
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
                ACC=accumulator(total.dtype),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                **tile,
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


def _row(table: Mapping[str, configs.Launch], x: torch.Tensor) -> configs.Launch:
    """The launch for rows like x's."""
    return configs.lookup(table, "wide" if x.shape[-1] * x.element_size() > 4096 else arch(x.device))


def _tile(d: int, itemsize: int, launch: configs.Launch) -> dict[str, int]:
    """The kernels' D, BLOCK_M, CHUNKS and INNER: whole rows, about NUMBERS in each of their threads."""
    numbers, warps = launch.tile["NUMBERS"], launch.num_warps
    together = min(warps, triton.next_power_of_2(triton.cdiv(d, 32 * numbers)))  # warps a row
    inner = min(triton.next_power_of_2(d), together * 32 * max(1, 16 // itemsize))  # 16 bytes a load
    chunks = triton.cdiv(d, inner)
    block_m = min(32, max(1, numbers * 32 * warps // (chunks * inner)))
    return {"D": d, "BLOCK_M": 1 << (block_m.bit_length() - 1), "CHUNKS": chunks, "INNER": inner}


def aot_cases(arch: str) -> list[AotCase]:
    """L/14 and H/14 video layers: 32 clips of 8 frames, bfloat16; a temporal embedding broadcast over positions.

    In inference the constants of a layer are added and the sum is left, and the result may be float8.
    """
    cases = []
    rows = 32 * 8 * 257
    kinds = [("", None, True), (" + residual", "rows", True), (" + temporal_embedding", "broadcast", True)]
    kinds += [(", inference + bias", "row", False)]
    kinds += [(", float8 + residual", "rows", False)] if arch in FLOAT8_ARCHS else []
    for d in (1024, 1280):
        fwd, bwd = configs.lookup(configs.LAYER_NORM_FWD, arch), configs.lookup(configs.LAYER_NORM_BWD, arch)
        cases += [_aot_fwd(f"layer_norm fwd{what} {rows}x{d}", rows, d, fwd, *kind) for what, *kind in kinds]
        pointers = {f"{name}_ptr": "*bf16:16" for name in ("dy", "dtotal", "total", "weight", "dx")}
        pointers |= {f"{name}_ptr": "*fp32:16" for name in ("mean", "rstd", "sums")}
        tile = _tile(d, 2, bwd)
        tiles = triton.cdiv(rows, tile["BLOCK_M"])
        grid = min(tiles, MULTIPROCESSORS[arch] * bwd.tile["PER_SM"])
        cases.append(
            AotCase(
                f"layer_norm bwd + dtotal {rows}x{d}",
                _layer_norm_bwd_kernel,
                pointers | {"rows": "i32:16", "stride_tm": "i32:16"},
                {**tile, "ACC": tl.float32},
                bwd.num_warps,
                bwd.num_stages,
                0,
                4 * rows * d * 2,
                programs=grid,
                trips=(tiles / grid,),
            )
        )
    return cases


def _aot_fwd(name: str, rows: int, d: int, launch: configs.Launch, residual: str | None, training: bool) -> AotCase:
    """residual: None, "rows", "row" (of a bias), or "broadcast"."""
    float8 = "float8" in name
    keep_total = residual is not None and (training or float8)
    tensors = {
        "x": True,
        "residual": residual is not None,
        "weight": True,
        "bias": True,
        "y": True,
        "total": keep_total,
    }
    wide = {"mean": training, "rstd": training, "scale": float8}
    pointers = {f"{key}_ptr": "*bf16:16" for key, given in tensors.items() if given}
    pointers |= {f"{key}_ptr": "*fp32:16" for key, given in wide.items() if given}
    pointers |= {"y_ptr": "*fp8e4nv:16"} if float8 else {}
    constants = {f"{key}_ptr": None for key, given in {**tensors, **wide}.items() if not given}
    tile = _tile(d, 2, launch)
    numbers = {"rows": "i32:16", "eps": "fp32", "stride_xm": "i32:16", "stride_r2": "i32:16"}
    if residual == "broadcast":
        numbers |= {"size_r1": "i32", "size_r2": "i32", "stride_r0": "i32:16", "stride_r1": "i32:16"}
    else:
        constants |= {"size_r1": 1, "size_r2": 1, "stride_r0": 0, "stride_r1": 0}
    moved = 2 + 2 * (residual == "rows") + 2 * keep_total + (1 if float8 else 2)  # bytes a number
    return AotCase(
        name,
        _layer_norm_fwd_kernel,
        pointers | numbers,
        {**constants, **tile, "BROADCAST": residual == "broadcast", "ACC": tl.float32},
        launch.num_warps,
        launch.num_stages,
        0,
        moved * rows * d,
        programs=triton.cdiv(rows, tile["BLOCK_M"]),
    )
