"""The backward of attention, from q, k, v, O and lse.

    P = exp2(S - lse);  delta = rowsum(dO O);  dS = P (dO V^T - delta)
    dV = P^T dO;  dQ = scale dS K;  dK = scale dS^T Q

One launch: a head's programs are neighbours, so that what they read comes from L2. Some take a tile of keys over all
queries (dK, dV), the others a tile of queries over all keys (dQ). Each computes P again; nothing is added up in memory,
so that the result is the same every time. Token 0 stays outside the tiles, as in the forward; here its key and query
have programs of their own, for there is no room for them beside a tile.
Source: Dao, arXiv 2307.08691.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import triton
import triton.language as tl
from lbfast.kernels.attention import (
    LOG2_E,
    SHAPES,
    first_kept,
    launch_of,
    load_padded,
    mask_scores,
    readable,
    tail,
)
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


@triton.jit
def _load_queries(
    head,
    o_m,
    m_m,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    ACC: tl.constexpr,
):
    """Queries o_m: q and dO in two parts of D, lse, delta."""
    q_ptr, do_ptr, o_ptr, lse_ptr, stride_qn, stride_dn, stride_on = head
    row = o_m.to(tl.int64)
    q_1, q_2 = load_rows(q_ptr, row * stride_qn, m_m, D, D_1, D_2)
    do_1, do_2 = load_rows(do_ptr, row * stride_dn, m_m, D, D_1, D_2)
    o_1, o_2 = load_rows(o_ptr, row * stride_on, m_m, D, D_1, D_2)
    delta = tl.sum(do_1.to(ACC) * o_1.to(ACC), 1)
    if D_2:
        delta += tl.sum(do_2.to(ACC) * o_2.to(ACC), 1)
    lse = tl.load(lse_ptr + o_m, mask=m_m, other=0.0)
    return q_1, q_2, do_1, do_2, lse, delta


@triton.jit
def _load_keys(head, o_n, m_n, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr):
    """Keys o_n: k and v in two parts of D."""
    k_ptr, v_ptr, stride_kn, stride_vn = head
    row = o_n.to(tl.int64)
    k_1, k_2 = load_rows(k_ptr, row * stride_kn, m_n, D, D_1, D_2)
    v_1, v_2 = load_rows(v_ptr, row * stride_vn, m_n, D, D_1, D_2)
    return k_1, k_2, v_1, v_2


@triton.jit
def _zeros(ROWS: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, ACC: tl.constexpr):
    """A sum in two parts of D."""
    return tl.zeros([ROWS, D_1], ACC), tl.zeros([ROWS, D_2 if D_2 else 1], ACC)


@triton.jit
def _over_keys(
    rows,
    dq,
    key_head,
    o_m,
    pad_ptr,
    stride_pm,
    start,
    first,
    M,
    scale,
    COLS: tl.constexpr,
    RAGGED: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds what COLS keys from `start` give to the queries' dQ."""
    o_n = start + tl.arange(0, COLS)
    m_n = o_n < M if RAGGED else tl.full([COLS], True, tl.int1)
    k_1, k_2, v_1, v_2 = _load_keys(key_head, o_n, m_n, D, D_1, D_2)  # [COLS, D_1], [COLS, D_2]
    padded = load_padded(pad_ptr, o_n, stride_pm, M, HAS_MASK)
    q_1, q_2, do_1, do_2, lse, delta = rows
    s = dot_nt(q_1, q_2, k_1, k_2, D_2, PRECISION, ACC) * scale  # [ROWS, COLS]
    s = mask_scores(s, o_m[:, None], o_n[None, :], padded[None, :], first, M, CAUSAL, HAS_MASK, RAGGED)
    dp = dot_nt(do_1, do_2, v_1, v_2, D_2, PRECISION, ACC)
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    dq = dot_nn(ds, k_1, k_2, dq[0], dq[1], D_2, PRECISION, ACC)
    return dq


@triton.jit
def _dq_rows(
    query_head,
    key_head,
    pad_ptr,
    dq_ptr,
    stride_pm,
    start_m,
    stop_m,
    M,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """dQ of ROWS queries from start_m of one head, whose pointers these are."""
    o_m = start_m + tl.arange(0, ROWS)
    rows = _load_queries(query_head, o_m, o_m < stop_m, D, D_1, D_2, ACC)
    dq = _zeros(ROWS, D_1, D_2, ACC)
    first = first_kept(pad_ptr, stride_pm, M, HAS_MASK, BLOCK_P)
    whole = (M - 1) // COLS
    last = whole
    if CAUSAL:
        last = tl.minimum(whole, tl.cdiv(start_m + ROWS - 1, COLS))
        if HAS_MASK:
            last = tl.where(first > start_m, whole, last)
    dq = _over_keys(
        rows, dq, key_head, o_m, pad_ptr, stride_pm, 0, first, M, scale, 1, False, D, D_1,
        D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
    )  # fmt: skip
    for tile in range(0, last):
        dq = _over_keys(
            rows, dq, key_head, o_m, pad_ptr, stride_pm, 1 + tile * COLS, first, M, scale, COLS,
            False, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    if TAIL:
        dq = _over_keys(
            rows, dq, key_head, o_m, pad_ptr, stride_pm, 1 + whole * COLS, first, M, scale, TAIL,
            True, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    share = scale * 0.6931471805599453  # ln(2): the scale came with log2(e)
    stride_on = query_head[6]
    store_rows(dq_ptr, o_m.to(tl.int64) * stride_on, o_m < stop_m, dq[0] * share, dq[1] * share, D, D_1, D_2)


@triton.jit
def _over_queries(
    rows,
    dk,
    dv,
    query_head,
    o_n,
    padded,
    start,
    first,
    N,
    M,
    scale,
    COLS: tl.constexpr,
    RAGGED: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds what COLS queries from `start` give to the keys' dK and dV."""
    o_m = start + tl.arange(0, COLS)
    m_m = o_m < N if RAGGED else tl.full([COLS], True, tl.int1)
    q_1, q_2, do_1, do_2, lse, delta = _load_queries(query_head, o_m, m_m, D, D_1, D_2, ACC)  # [COLS, ...]
    k_1, k_2, v_1, v_2 = rows
    s = dot_nt(k_1, k_2, q_1, q_2, D_2, PRECISION, ACC) * scale  # [ROWS, COLS]
    s = mask_scores(s, o_m[None, :], o_n[:, None], padded[:, None], first, M, CAUSAL, HAS_MASK, False)
    p = tl.exp2(s - lse[None, :])  # queries past N have q = dO = 0: they add nothing
    dv = dot_nn(p, do_1, do_2, dv[0], dv[1], D_2, PRECISION, ACC)
    dp = dot_nt(v_1, v_2, do_1, do_2, D_2, PRECISION, ACC)
    dk = dot_nn(p * (dp - delta[None, :]), q_1, q_2, dk[0], dk[1], D_2, PRECISION, ACC)
    return dk, dv


@triton.jit
def _dkdv_rows(
    query_head,
    key_head,
    pad_ptr,
    dk_ptr,
    dv_ptr,
    stride_pm,
    start_n,
    stop_n,
    N,
    M,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """dK and dV of ROWS keys from start_n of one head, whose pointers these are."""
    o_n = start_n + tl.arange(0, ROWS)
    rows = _load_keys(key_head, o_n, o_n < stop_n, D, D_1, D_2)
    padded = load_padded(pad_ptr, o_n, stride_pm, M, HAS_MASK)
    dk, dv = _zeros(ROWS, D_1, D_2, ACC), _zeros(ROWS, D_1, D_2, ACC)
    first = first_kept(pad_ptr, stride_pm, M, HAS_MASK, BLOCK_P)
    whole = (N - 1) // COLS
    begin = 0
    if CAUSAL and not HAS_MASK:
        begin = tl.minimum(whole, tl.maximum(start_n - 1, 0) // COLS)
    dk, dv = _over_queries(
        rows, dk, dv, query_head, o_n, padded, 0, first, N, M, scale, 1,
        False, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
    )  # fmt: skip
    for tile in range(begin, whole):
        dk, dv = _over_queries(
            rows, dk, dv, query_head, o_n, padded, 1 + tile * COLS, first,
            N, M, scale, COLS, False, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    if TAIL:
        dk, dv = _over_queries(
            rows, dk, dv, query_head, o_n, padded, 1 + whole * COLS,
            first, N, M, scale, TAIL, True, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    share = scale * 0.6931471805599453
    stride_on = query_head[6]  # H * D, as contiguous gradients have it
    row = o_n.to(tl.int64) * stride_on
    store_rows(dk_ptr, row, o_n < stop_n, dk[0] * share, dk[1] * share, D, D_1, D_2)
    store_rows(dv_ptr, row, o_n < stop_n, dv[0], dv[1], D, D_1, D_2)


@triton.jit
def _attention_bwd_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    pad_ptr,
    o_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_db,
    stride_dn,
    stride_dh,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_pb,
    stride_pm,
    N,
    M,
    H,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL_N: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of a head's programs the first take ROWS keys each, the next ROWS queries each, the last two token 0."""
    pid = tl.program_id(0)
    key_blocks = tl.cdiv(M - 1, ROWS)
    blocks = 2 + key_blocks + tl.cdiv(N - 1, ROWS)
    block = pid % blocks
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    o_query = (b * N * H + h) * D
    o_key = (b * M * H + h) * D
    query_head = (
        q_ptr + b * stride_qb + h * stride_qh,
        do_ptr + b * stride_db + h * stride_dh,
        o_ptr + o_query,
        lse_ptr + (b * H + h) * N,
        stride_qn,
        stride_dn,
        H * D,
    )
    key_head = (k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh, stride_kn, stride_vn)
    if HAS_MASK:
        pad_ptr += b * stride_pb
    if block < key_blocks:
        _dkdv_rows(
            query_head, key_head, pad_ptr, dk_ptr + o_key, dv_ptr + o_key, stride_pm, 1 + block * ROWS, M, N, M, scale,
            ROWS, COLS, TAIL_N, BLOCK_P, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    elif block < blocks - 2:
        _dq_rows(
            query_head, key_head, pad_ptr, dq_ptr + o_query, stride_pm, 1 + (block - key_blocks) * ROWS, N, M, scale,
            ROWS, COLS, TAIL_M, BLOCK_P, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    elif block == blocks - 2:
        _dkdv_rows(
            query_head, key_head, pad_ptr, dk_ptr + o_key, dv_ptr + o_key, stride_pm, 0, 1, N, M, scale,
            16, COLS, TAIL_N, BLOCK_P, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    else:
        _dq_rows(
            query_head, key_head, pad_ptr, dq_ptr + o_query, stride_pm, 0, 1, M, scale,
            16, COLS, TAIL_M, BLOCK_P, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip


def _constants(
    n: int, m: int, d: int, launch: configs.Launch, causal: bool, masked: bool, dtype: torch.dtype
) -> dict[str, Any]:
    d_1, d_2 = split_head(d)
    return {
        "ROWS": launch.tile["ROWS"],
        "COLS": launch.tile["COLS"],
        "TAIL_N": tail(n, launch.tile["COLS"]),
        "TAIL_M": tail(m, launch.tile["COLS"]),
        "BLOCK_P": triton.next_power_of_2(m) if masked else 1,
        "D": d,
        "D_1": d_1,
        "D_2": d_2,
        "CAUSAL": causal,
        "HAS_MASK": masked,
        "PRECISION": dot_precision(dtype),
        "ACC": accumulator(dtype),
    }


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padded: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ (B, N, H, D), dK and dV (B, M, H, D), contiguous. o and lse as attention_fwd gave them."""
    b, n, h, d = q.shape
    m = k.shape[1]
    do, q, k, v = readable(do), readable(q), readable(k), readable(v)
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v))
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    launch = launch_of(configs.ATTENTION_BWD, arch(q.device), q.element_size(), max(n, m))
    constants = _constants(n, m, d, launch, causal, padded is not None, q.dtype)
    blocks = sum(1 + triton.cdiv(size - 1, constants["ROWS"]) for size in (n, m))
    with on_device(q):
        _attention_bwd_kernel[(b * h * blocks,)](
            do,
            q,
            k,
            v,
            None if padded is None else padded.view(torch.uint8),
            o,
            lse,
            dq,
            dk,
            dv,
            *do.stride()[:3],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *((0, 0) if padded is None else padded.stride()),
            n,
            m,
            h,
            scale * LOG2_E,
            **constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return dq, dk, dv


def aot_cases(arch: str) -> list[AotCase]:
    """As in the forward."""
    cases = []
    for what, b, n, h, d, text in SHAPES:
        launch = launch_of(configs.ATTENTION_BWD, arch, 2, n)
        signature = {f"{name}_ptr": "*bf16:16" for name in ("do", "q", "k", "v", "o", "dq", "dk", "dv")}
        signature |= {"lse_ptr": "*fp32:16", "scale": "fp32", "N": "i32", "M": "i32"}
        signature |= {f"stride_{name}{axis}": "i32:16" for name in "dqkv" for axis in "bnh"}
        signature |= {"H": "i32:16" if h % 16 == 0 else "i32"}
        constants = _constants(n, n, d, launch, text, text, torch.bfloat16)
        if text:
            signature |= {"pad_ptr": "*u8:16", "stride_pb": "i32"}
            constants["stride_pm"] = 1
        else:
            signature |= {"stride_pb": "i32:16", "stride_pm": "i32:16"}
            constants["pad_ptr"] = None
        rows, cols = constants["ROWS"], constants["COLS"]
        blocks, whole = triton.cdiv(n - 1, rows), (n - 1) // cols
        last = [min(whole, triton.cdiv((block + 1) * rows, cols)) if text else whole for block in range(blocks)]
        cases.append(
            AotCase(
                f"attention bwd {what} x{b}",
                _attention_bwd_kernel,
                signature,
                constants,
                launch.num_warps,
                launch.num_stages,
                flops=(5 if text else 10) * b * h * n * n * d,
                bytes=b * n * h * (8 * d * 2 + 4),
                programs=2 * b * h * (1 + blocks),
                trips=(whole, statistics.fmean(last), whole, min(whole, 1) if text else whole),
                shares=(blocks / (2 * blocks + 2), blocks / (blocks + 2), 1 / 2),
            )
        )
    return cases
