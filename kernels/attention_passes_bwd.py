"""The backward of attention with one program a head that passes over its queries once for each tile of keys.

As in attention_whole_bwd.py, dK and dV of a tile of keys stay in registers while the queries pass by in steps, and the
scores are computed once. What a query's dQ gets from each tile is added up in scratch, in float32, by this one program
and in the order of the tiles: no atomics. A head's sums are read again soon, from L2: 160 KB of them for 593 tokens, 22
MB for a head on each multiprocessor of an H100. The last pass rounds them and writes dQ. No masks but for the last
keys: for others there are no registers left.

Steps are whole: the last query goes on in place of those past N, with an lse of infinity, and so a weight of 0.
Scratch of a head, for as many queries as the steps have: -lse, delta, and the sums, [D_1 + D_2, COLS] a step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from lbfast.kernels.attention_whole_bwd import row_deltas, zeros
from lbfast.kernels.primitives import dot_nn, dot_nt, dot_tn, load_rows, store_rows


@triton.jit
def _leave_deltas(
    do_ptr,
    stride_dn,
    o_head,
    scratch_ptr,
    start,
    N,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes -lse and delta of ROWS queries to scratch; of those past N, -inf and 0."""
    o_ptr, lse_ptr, stride_on, stride_s = o_head
    o_m = start + tl.arange(0, ROWS)
    m_m = o_m < N
    do_1, do_2 = load_rows(do_ptr, o_m * stride_dn, m_m, D, D_1, D_2)
    o_1, o_2 = load_rows(o_ptr, o_m * stride_on, m_m, D, D_1, D_2)
    lse = tl.load(lse_ptr + o_m, mask=m_m, other=float("inf"))
    tl.store(scratch_ptr + o_m, -lse, mask=o_m < stride_s)
    tl.store(scratch_ptr + stride_s + o_m, row_deltas(do_1, do_2, o_1, o_2, D_2, ACC), mask=o_m < stride_s)


@triton.jit
def _step(
    queries,
    dq_head,
    scratch_ptr,
    keys,
    sums,
    start,
    N,
    M,
    scale,
    COLS: tl.constexpr,
    LAST: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Takes COLS queries from `start` over one tile of keys: adds to their dQ and to the keys' dK and dV."""
    dq_ptr, stride_on, stride_s, share = dq_head
    do_ptr, stride_dn, q_ptr, stride_qn = queries
    k_1, k_2, v_1, v_2, o_n = keys
    dk_1, dk_2, dv_1, dv_2 = sums
    col = tl.arange(0, COLS)
    there = tl.full([COLS], True, tl.int1)
    o_m = start + col
    row = tl.minimum(o_m, N - 1)
    q_1, q_2 = load_rows(q_ptr, row * stride_qn, there, D, D_1, D_2)  # [COLS, D_1], [COLS, D_2]
    do_1, do_2 = load_rows(do_ptr, row * stride_dn, there, D, D_1, D_2)
    lse_ptr = scratch_ptr + start  # first, so that the lanes' offsets are constants
    minus_lse = tl.load(lse_ptr + col)
    s = dot_nt(k_1, k_2, q_1, q_2, D_2, PRECISION, ACC)  # [KEYS, COLS]
    p = tl.exp2(s * scale + minus_lse[None, :])
    if RAGGED_KEYS:
        p = tl.where((o_n < M)[:, None], p, 0.0)
    dv_1, dv_2 = dot_nn(p, do_1, do_2, dv_1, dv_2, D_2, PRECISION, ACC)
    delta = tl.load(lse_ptr + stride_s + col)
    dp = dot_nt(v_1, v_2, do_1, do_2, D_2, PRECISION, ACC)
    ds = (p * (dp - delta[None, :])).to(q_1.dtype)
    dk_1, dk_2 = dot_nn(ds, q_1, q_2, dk_1, dk_2, D_2, PRECISION, ACC)
    scratch_ptr += 2 * stride_s + start * (D_1 + D_2)
    at_1 = scratch_ptr + (tl.arange(0, D_1)[:, None] * COLS + col[None, :])
    at_2 = scratch_ptr + D_1 * COLS + (tl.arange(0, D_2 if D_2 else 1)[:, None] * COLS + col[None, :])
    dq_1 = tl.load(at_1)
    dq_2 = tl.load(at_2) if D_2 else dq_1
    dq_1, dq_2 = dot_tn(k_1, k_2, ds, dq_1, dq_2, D_2, PRECISION, ACC)  # transposed: D rows fill the tensor cores
    if LAST:
        dq_1, dq_2 = tl.trans(dq_1 * share), tl.trans(dq_2 * share)
        store_rows(dq_ptr, o_m * stride_on, o_m < N, dq_1, dq_2, D, D_1, D_2)
    else:
        tl.store(at_1, dq_1)
        if D_2:
            tl.store(at_2, dq_2)
    return dk_1, dk_2, dv_1, dv_2


@triton.jit
def _pass(
    queries,
    key_head,
    dq_head,
    scratch_ptr,
    start_n,
    N,
    M,
    scale,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """All queries over KEYS keys from start_n: writes these keys' dK and dV."""
    k_ptr, v_ptr, dk_ptr, dv_ptr, stride_kn, stride_vn = key_head
    _, stride_on, _, share = dq_head
    o_n = start_n + tl.arange(0, KEYS)
    m_n = o_n < M if RAGGED_KEYS else tl.full([KEYS], True, tl.int1)
    k_1, k_2 = load_rows(k_ptr, o_n * stride_kn, m_n, D, D_1, D_2)  # [KEYS, D_1], [KEYS, D_2]
    v_1, v_2 = load_rows(v_ptr, o_n * stride_vn, m_n, D, D_1, D_2)
    keys = k_1, k_2, v_1, v_2, o_n
    dk_1, dk_2 = zeros(KEYS, D_1, D_2, ACC)
    sums = dk_1, dk_2, dk_1, dk_2
    for step in range(0, tl.cdiv(N, COLS)):
        sums = _step(
            queries, dq_head, scratch_ptr, keys, sums, step * COLS, N, M, scale, COLS, LAST, RAGGED_KEYS, D,
            D_1, D_2, PRECISION, ACC,
        )  # fmt: skip
    dk_1, dk_2, dv_1, dv_2 = sums
    store_rows(dk_ptr, o_n * stride_on, m_n, dk_1 * share, dk_2 * share, D, D_1, D_2)
    store_rows(dv_ptr, o_n * stride_on, m_n, dv_1, dv_2, D, D_1, D_2)


@triton.jit
def _attention_bwd_passes_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    scratch_ptr,
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
    stride_s,
    stride_on,
    N,
    M,
    H,
    scale,
    share,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LAST_KEYS: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """ROWS queries at once for delta; steps of COLS. Tiles of KEYS keys, and a last one of LAST_KEYS, not all of them
    there if RAGGED_KEYS. stride_s: queries in all steps. share: scale, which came with log2(e)."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    queries = do_ptr + b * stride_db + h * stride_dh, stride_dn, q_ptr + b * stride_qb + h * stride_qh, stride_qn
    o_query = (b * N * H + h) * D
    o_key = (b * M * H + h) * D
    key_head = (
        k_ptr + b * stride_kb + h * stride_kh,
        v_ptr + b * stride_vb + h * stride_vh,
        dk_ptr + o_key,
        dv_ptr + o_key,
        stride_kn,
        stride_vn,
    )
    o_head = o_ptr + o_query, lse_ptr + (b * H + h) * N, stride_on, stride_s
    dq_head = dq_ptr, stride_on, stride_s, share  # the last pass alone writes dQ
    scratch_ptr += (b * H + h) * (stride_s * (2 + D_1 + D_2))
    for tile in range(0, tl.cdiv(stride_s, ROWS)):
        _leave_deltas(queries[0], stride_dn, o_head, scratch_ptr, tile * ROWS, N, ROWS, D, D_1, D_2, ACC)
    for step in range(0, tl.cdiv(N, COLS)):
        at = scratch_ptr + 2 * stride_s + step * ((D_1 + D_2) * COLS)
        tl.store(at + tl.arange(0, D_1 * COLS), tl.zeros([D_1 * COLS], ACC))
        if D_2:
            tl.store(at + D_1 * COLS + tl.arange(0, D_2 * COLS), tl.zeros([D_2 * COLS], ACC))
    tl.debug_barrier()  # what one thread wrote to scratch others read
    whole = tl.cdiv(M, KEYS) - 1
    for tile in tl.range(0, whole):
        _pass(
            queries, key_head, dq_head, scratch_ptr, tile * KEYS, N, M, scale, KEYS, False, False, COLS, D, D_1, D_2,
            PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()
    # o_query again, in other words: so it need not be kept in registers until now
    dq_head = dq_ptr + (h * D + b * (N * stride_on)), stride_on, stride_s, share
    _pass(
        queries, key_head, dq_head, scratch_ptr, whole * KEYS, N, M, scale, LAST_KEYS, True, RAGGED_KEYS, COLS, D, D_1,
        D_2, PRECISION, ACC,
    )  # fmt: skip
