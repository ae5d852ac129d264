"""Attention over the T <= 32 frames of a clip at each (position, head), read in place from (B, T, N, H, D) views.

    fwd: P = softmax(scale Q K^T), O = P V
    bwd: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q

One program takes a tile of one head: POSITIONS x FRAMES rows (T rounded up to a power of two), in which row r is frame
r % FRAMES of position r // FRAMES. A block-diagonal mask keeps positions apart: the products waste a factor POSITIONS,
and still stay under the time that memory takes. Kept for the backward: q, k, v. It computes P again, in registers: no
log-sum-exp, no result, no atomics. Sums are in float32 (float64 for float64).
Source: divided space-time attention, Bertasius et al., arXiv 2102.05095; the tiling is our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from lbfast.kernels.primitives import (
    AotCase,
    accumulator,
    arch,
    dot_nn,
    dot_nt,
    dot_precision,
    load_rows,
    on_device,
    split_head,
    store_rows,
)

from lbfast.kernels import configs

_MAX_FRAMES = 32
_MAX_DIM = 128


@triton.jit
def _tile(N, H, T: tl.constexpr, FRAMES: tl.constexpr, POSITIONS: tl.constexpr):
    """This program's clip and head; the position, frame and bounds mask of its rows; which rows see which."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, POSITIONS)
    h = pid % H  # neighbouring programs share rows of H * D
    block = (pid // H) % blocks
    b = (pid // H // blocks).to(tl.int64)
    row = tl.arange(0, POSITIONS * FRAMES)
    o_n = (block * POSITIONS + row // FRAMES).to(tl.int64)
    o_t = (row % FRAMES).to(tl.int64)
    m_row = (o_n < N) & (o_t < T)
    m_pair = (row[:, None] // FRAMES == row[None, :] // FRAMES) & (row[None, :] % FRAMES < T)  # [ROWS, ROWS]
    return b, h.to(tl.int64), o_n, o_t, m_row, m_pair


@triton.jit
def _softmax(s, m_pair, scale):
    """Rows of P; exp2 takes log2(e) with the scale."""
    s = tl.where(m_pair, s * (scale * 1.4426950408889634), float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def _temporal_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vn,
    stride_vh,
    N,
    H,
    scale,
    T: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    FRAMES: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    ROWS: tl.constexpr = POSITIONS * FRAMES
    b, h, o_n, o_t, m_row, m_pair = _tile(N, H, T, FRAMES, POSITIONS)
    o_q = b * stride_qb + o_t * stride_qt + o_n * stride_qn + h * stride_qh
    o_k = b * stride_kb + o_t * stride_kt + o_n * stride_kn + h * stride_kh
    o_v = b * stride_vb + o_t * stride_vt + o_n * stride_vn + h * stride_vh
    o_o = (((b * T + o_t) * N + o_n) * H + h) * D
    q_1, q_2 = load_rows(q_ptr, o_q, m_row, D, D_1, D_2)  # [ROWS, D_1], [ROWS, D_2]
    k_1, k_2 = load_rows(k_ptr, o_k, m_row, D, D_1, D_2)
    v_1, v_2 = load_rows(v_ptr, o_v, m_row, D, D_1, D_2)
    zero_1 = tl.zeros([ROWS, D_1], ACC)
    zero_2 = tl.zeros([ROWS, D_2 if D_2 else 1], ACC)
    p = _softmax(dot_nt(q_1, q_2, k_1, k_2, D_2, PRECISION, ACC), m_pair, scale).to(v_1.dtype)
    o_1, o_2 = dot_nn(p, v_1, v_2, zero_1, zero_2, D_2, PRECISION, ACC)
    store_rows(o_ptr, o_o, m_row, o_1, o_2, D, D_1, D_2)


@triton.jit
def _temporal_attention_bwd_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_ob,
    stride_ot,
    stride_on,
    stride_oh,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vn,
    stride_vh,
    N,
    H,
    scale,
    T: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    FRAMES: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    ROWS: tl.constexpr = POSITIONS * FRAMES
    b, h, o_n, o_t, m_row, m_pair = _tile(N, H, T, FRAMES, POSITIONS)
    o_do = b * stride_ob + o_t * stride_ot + o_n * stride_on + h * stride_oh
    o_q = b * stride_qb + o_t * stride_qt + o_n * stride_qn + h * stride_qh
    o_k = b * stride_kb + o_t * stride_kt + o_n * stride_kn + h * stride_kh
    o_v = b * stride_vb + o_t * stride_vt + o_n * stride_vn + h * stride_vh
    o_grad = (((b * T + o_t) * N + o_n) * H + h) * D
    q_1, q_2 = load_rows(q_ptr, o_q, m_row, D, D_1, D_2)  # [ROWS, D_1], [ROWS, D_2]
    k_1, k_2 = load_rows(k_ptr, o_k, m_row, D, D_1, D_2)
    v_1, v_2 = load_rows(v_ptr, o_v, m_row, D, D_1, D_2)
    do_1, do_2 = load_rows(do_ptr, o_do, m_row, D, D_1, D_2)
    zero_1 = tl.zeros([ROWS, D_1], ACC)
    zero_2 = tl.zeros([ROWS, D_2 if D_2 else 1], ACC)
    p = _softmax(dot_nt(q_1, q_2, k_1, k_2, D_2, PRECISION, ACC), m_pair, scale)  # [ROWS, ROWS]
    p_t = tl.trans(p.to(v_1.dtype))
    dv_1, dv_2 = dot_nn(p_t, do_1, do_2, zero_1, zero_2, D_2, PRECISION, ACC)
    store_rows(dv_ptr, o_grad, m_row, dv_1, dv_2, D, D_1, D_2)
    dp = dot_nt(do_1, do_2, v_1, v_2, D_2, PRECISION, ACC)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q_1.dtype)  # rows past T have do = 0, and so ds = 0
    dq_1, dq_2 = dot_nn(ds, k_1, k_2, zero_1, zero_2, D_2, PRECISION, ACC)
    store_rows(dq_ptr, o_grad, m_row, dq_1 * scale, dq_2 * scale, D, D_1, D_2)
    ds_t = tl.trans(ds)
    dk_1, dk_2 = dot_nn(ds_t, q_1, q_2, zero_1, zero_2, D_2, PRECISION, ACC)
    store_rows(dk_ptr, o_grad, m_row, dk_1 * scale, dk_2 * scale, D, D_1, D_2)


def _constants(t: int, d: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernels' constexpr arguments for T frames, head dim D and about `rows` rows a tile."""
    d_1, d_2 = split_head(d)
    frames = triton.next_power_of_2(t)
    return {
        "T": t,
        "D": d,
        "D_1": d_1,
        "D_2": d_2,
        "FRAMES": frames,
        "POSITIONS": max(1, rows // frames),
        "PRECISION": dot_precision(dtype),
        "ACC": accumulator(dtype),
    }


def _launch(table: Mapping[str, configs.Launch], name: str, itemsize: int) -> configs.Launch:
    return configs.lookup(table, "wide" if itemsize > 2 else name)


def _readable(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def temporal_attention_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """O (B, T, N, H, D), contiguous."""
    b, t, n, h, d = q.shape
    q, k, v = _readable(q), _readable(k), _readable(v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    launch = _launch(configs.TEMPORAL_ATTENTION_FWD, arch(q.device), q.element_size())
    constants = _constants(t, d, launch.tile["ROWS"], q.dtype)
    with on_device(q):
        _temporal_attention_fwd_kernel[(b * triton.cdiv(n, constants["POSITIONS"]) * h,)](
            q,
            k,
            v,
            o,
            *q.stride()[:4],
            *k.stride()[:4],
            *v.stride()[:4],
            n,
            h,
            scale,
            **constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return o


def temporal_attention_bwd(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV (B, T, N, H, D), contiguous."""
    b, t, n, h, d = q.shape
    do, q, k, v = _readable(do), _readable(q), _readable(k), _readable(v)
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if q.numel() == 0:
        return dq, dk, dv
    launch = _launch(configs.TEMPORAL_ATTENTION_BWD, arch(q.device), q.element_size())
    constants = _constants(t, d, launch.tile["ROWS"], q.dtype)
    with on_device(q):
        _temporal_attention_bwd_kernel[(b * triton.cdiv(n, constants["POSITIONS"]) * h,)](
            do,
            q,
            k,
            v,
            dq,
            dk,
            dv,
            *do.stride()[:4],
            *q.stride()[:4],
            *k.stride()[:4],
            *v.stride()[:4],
            n,
            h,
            scale,
            **constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return dq, dk, dv


def why_not(q: torch.Tensor) -> list[str]:
    """Reasons why the kernels cannot take these inputs, q (B, T, N, H, D) for all three."""
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) and (q.is_cuda or q.dtype != torch.float64):
        reasons.append(f"the kernels take float16, bfloat16 and float32, not {q.dtype}")
    if q.shape[1] > _MAX_FRAMES or q.shape[4] > _MAX_DIM:
        reasons.append(f"the kernels take T <= {_MAX_FRAMES} and D <= {_MAX_DIM}, not T={q.shape[1]}, D={q.shape[4]}")
    return reasons


def aot_cases(arch: str) -> list[AotCase]:
    """Video L/14 and H/14: 32 clips of 8 frames, 257 positions, bfloat16; strides of separate projections."""
    cases = []
    b, t, n = 32, 8, 257
    for h, d in ((16, 64), (16, 80)):
        for what, kernel, table, names in (
            ("fwd", _temporal_attention_fwd_kernel, configs.TEMPORAL_ATTENTION_FWD, "q k v o"),
            ("bwd", _temporal_attention_bwd_kernel, configs.TEMPORAL_ATTENTION_BWD, "do q k v dq dk dv"),
        ):
            launch = configs.lookup(table, arch)
            strided = "q k v" if what == "fwd" else "o q k v"
            signature = {f"{name}_ptr": "*bf16:16" for name in names.split()}
            signature |= {f"stride_{name}{axis}": "i32:16" for name in strided.split() for axis in "btnh"}
            signature |= {"N": "i32", "H": "i32:16", "scale": "fp32"}
            constants = _constants(t, d, launch.tile["ROWS"], torch.bfloat16)
            cases.append(
                AotCase(
                    f"temporal_attention {what} {b}x{t}x{n}x{h}x{d}",
                    kernel,
                    signature,
                    constants,
                    launch.num_warps,
                    launch.num_stages,
                    flops=(4 if what == "fwd" else 10) * b * n * h * t * t * d,
                    bytes=len(names.split()) * b * t * n * h * d * 2,
                    programs=b * triton.cdiv(n, constants["POSITIONS"]) * h,
                )
            )
    return cases
