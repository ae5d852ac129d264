"""The backward of attention with one program a head, from q, k, v, O and lse. See attention_bwd.py, which calls it.

dK and dV of KEYS keys stay in registers while the queries pass by, COLS a step, and a step's dQ is complete: five
products, each score computed once. Images have 257 tokens, one more than a tile of 256 keys, so one key may stay
outside the tile: token 0, the class token. What it takes and gives is worked out beforehand, from large tiles of
queries, while registers are free: its own dK and dV, and each query's dS, which joins dQ in the step. The queries that
whole steps leave, one of 257, come first, as 16 rows: so they meet no full registers either.
-lse, delta and the class token's dS wait in scratch, [3, 2 KEYS] a head, aligned, to be read as vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from lbfast.kernels.attention_tiles import first_kept, load_padded, mask_scores
from lbfast.kernels.primitives import dot_nn, dot_nt, dot_tn, load_rows, store_rows

WIDTH = tl.constexpr(8)  # columns of the class token's products; one is in use


@triton.jit
def zeros(ROWS: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, ACC: tl.constexpr):
    """A sum in two parts of D."""
    return tl.zeros([ROWS, D_1], ACC), tl.zeros([ROWS, D_2 if D_2 else 1], ACC)


@triton.jit
def row_deltas(do_1, do_2, o_1, o_2, D_2: tl.constexpr, ACC: tl.constexpr):
    """Row sums of dO O."""
    delta = tl.sum(do_1.to(ACC) * o_1.to(ACC), 1)
    if D_2:
        delta += tl.sum(do_2.to(ACC) * o_2.to(ACC), 1)
    return delta


@triton.jit
def _score_queries(
    heads,
    o_head,
    scratch_ptr,
    class_key,
    sums,
    mask,
    start,
    N,
    M,
    scale,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
    EXTRA: tl.constexpr,
    PITCH: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes -lse and delta of ROWS queries to scratch. With EXTRA also their dS with key 0, and adds up its dK and dV,
    transposed: [D_1, WIDTH] and [D_2, WIDTH], of which column 0 counts."""
    do_ptr, stride_dn, q_ptr, stride_qn = heads
    o_ptr, lse_ptr, stride_on = o_head
    o_m = start + tl.arange(0, ROWS)
    m_m = o_m < N if RAGGED else tl.full([ROWS], True, tl.int1)
    do_1, do_2 = load_rows(do_ptr, o_m * stride_dn, m_m, D, D_1, D_2)
    o_1, o_2 = load_rows(o_ptr, o_m * stride_on, m_m, D, D_1, D_2)
    delta = row_deltas(do_1, do_2, o_1, o_2, D_2, ACC)
    lse = tl.load(lse_ptr + o_m, mask=m_m, other=0.0)
    tl.store(scratch_ptr + o_m, -lse, mask=m_m)
    tl.store(scratch_ptr + PITCH + o_m, delta, mask=m_m)
    if EXTRA:
        k_1, k_2, v_1, v_2 = class_key
        dk_1, dk_2, dv_1, dv_2 = sums
        pad_ptr, first = mask
        q_1, q_2 = load_rows(q_ptr, o_m * stride_qn, m_m, D, D_1, D_2)
        o_n = tl.arange(0, WIDTH)
        padded = load_padded(pad_ptr, o_n * 0, 0, M, HAS_MASK)
        s = dot_nt(q_1, q_2, k_1, k_2, D_2, PRECISION, ACC) * scale  # [ROWS, WIDTH]
        s = mask_scores(s, o_m[:, None], o_n[None, :] * 0, padded[None, :], first, M, CAUSAL, HAS_MASK, False)
        p = tl.where((o_n < 1)[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dp = dot_nt(do_1, do_2, v_1, v_2, D_2, PRECISION, ACC)
        ds = p * (dp - delta[:, None])
        tl.store(scratch_ptr + 2 * PITCH + o_m[:, None] + o_n[None, :] * 0, ds, mask=m_m[:, None] & (o_n < 1)[None, :])
        dv_1, dv_2 = dot_tn(do_1, do_2, p, dv_1, dv_2, D_2, PRECISION, ACC)
        dk_1, dk_2 = dot_tn(q_1, q_2, ds, dk_1, dk_2, D_2, PRECISION, ACC)
        sums = dk_1, dk_2, dv_1, dv_2
    return sums


@triton.jit
def _half_step(
    heads,
    scratch_ptr,
    keys,
    sums,
    mask,
    start,
    N,
    M,
    scale,
    COLS: tl.constexpr,
    RAGGED: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
    PITCH: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds what COLS queries give to the keys' dK and dV. Returns the sums and dS, [KEYS, COLS], rounded."""
    do_ptr, stride_dn, q_ptr, stride_qn = heads
    k_1, k_2, v_1, v_2, o_n = keys
    dk_1, dk_2, dv_1, dv_2 = sums
    padded, first = mask
    o_m = start + tl.arange(0, COLS)
    m_m = o_m < N if RAGGED else tl.full([COLS], True, tl.int1)
    q_1, q_2 = load_rows(q_ptr, o_m * stride_qn, m_m, D, D_1, D_2)  # [COLS, D_1], [COLS, D_2]
    do_1, do_2 = load_rows(do_ptr, o_m * stride_dn, m_m, D, D_1, D_2)
    scratch_ptr += start  # first, so that the lanes' offsets are constants
    minus_lse = tl.load(scratch_ptr + tl.arange(0, COLS), mask=m_m, other=0.0)
    s = dot_nt(k_1, k_2, q_1, q_2, D_2, PRECISION, ACC) * scale
    s = mask_scores(s, o_m[None, :], o_n[:, None], padded[:, None], first, M, CAUSAL, HAS_MASK, RAGGED_KEYS)
    p = tl.exp2(s + minus_lse[None, :])  # queries past N have q = dO = 0: they add nothing
    dv_1, dv_2 = dot_nn(p, do_1, do_2, dv_1, dv_2, D_2, PRECISION, ACC)
    delta = tl.load(scratch_ptr + PITCH + tl.arange(0, COLS), mask=m_m, other=0.0)
    dp = dot_nt(v_1, v_2, do_1, do_2, D_2, PRECISION, ACC)
    ds = (p * (dp - delta[None, :])).to(q_1.dtype)
    dk_1, dk_2 = dot_nn(ds, q_1, q_2, dk_1, dk_2, D_2, PRECISION, ACC)
    return (dk_1, dk_2, dv_1, dv_2), ds


@triton.jit
def _whole_step(
    heads,
    dq_head,
    scratch_ptr,
    keys,
    class_key,
    sums,
    mask,
    start,
    N,
    M,
    scale,
    COLS: tl.constexpr,
    RAGGED: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
    EXTRA: tl.constexpr,
    PITCH: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Takes COLS queries over all keys: writes their dQ, and adds to the keys' dK and dV. More than 32 go in halves,
    which cost fewer registers, and meet again in dQ's product."""
    dq_ptr, stride_on, share = dq_head
    KEYS: tl.constexpr = keys[0].shape[0]
    HALF: tl.constexpr = COLS // 2 if COLS > 32 else COLS
    sums, ds = _half_step(
        heads, scratch_ptr, keys, sums, mask, start, N, M, scale, HALF, RAGGED, RAGGED_KEYS, PITCH, D, D_1, D_2, CAUSAL,
        HAS_MASK, PRECISION, ACC,
    )  # fmt: skip
    if HALF < COLS:
        sums, ds_2 = _half_step(
            heads, scratch_ptr, keys, sums, mask, start + HALF, N, M, scale, HALF, RAGGED, RAGGED_KEYS, PITCH, D, D_1,
            D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
        ds = tl.join(ds, ds_2).permute(0, 2, 1).reshape(KEYS, COLS)
    o_m = start + tl.arange(0, COLS)
    m_m = o_m < N if RAGGED else tl.full([COLS], True, tl.int1)
    dq_1, dq_2 = tl.zeros([D_1, COLS], ACC), tl.zeros([D_2 if D_2 else 1, COLS], ACC)
    dq_1, dq_2 = dot_tn(
        keys[0], keys[1], ds, dq_1, dq_2, D_2, PRECISION, ACC
    )  # transposed: D rows fill the tensor cores
    if EXTRA:
        ds_0 = tl.load(scratch_ptr + start + 2 * PITCH + tl.arange(0, COLS), mask=m_m, other=0.0)
        dq_1 += class_key[0][:, None] * ds_0[None, :]
        if D_2:
            dq_2 += class_key[1][:, None] * ds_0[None, :]
    dq_1, dq_2 = tl.trans(dq_1 * share), tl.trans(dq_2 * share)
    store_rows(dq_ptr, o_m * stride_on, m_m, dq_1, dq_2, D, D_1, D_2)
    return sums


@triton.jit
def _tail_step(
    heads,
    dq_head,
    scratch_ptr,
    keys,
    class_key,
    sums,
    mask,
    start,
    N,
    M,
    scale,
    ROWS: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
    EXTRA: tl.constexpr,
    PITCH: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The same for the last queries, as rows of the scores."""
    do_ptr, stride_dn, q_ptr, stride_qn = heads
    dq_ptr, stride_on, share = dq_head
    k_1, k_2, v_1, v_2, o_n = keys
    dk_1, dk_2, dv_1, dv_2 = sums
    padded, first = mask
    o_m = start + tl.arange(0, ROWS)
    m_m = o_m < N
    q_1, q_2 = load_rows(q_ptr, o_m * stride_qn, m_m, D, D_1, D_2)  # [ROWS, D_1], [ROWS, D_2]
    do_1, do_2 = load_rows(do_ptr, o_m * stride_dn, m_m, D, D_1, D_2)
    minus_lse = tl.load(scratch_ptr + o_m, mask=m_m, other=0.0)
    delta = tl.load(scratch_ptr + PITCH + o_m, mask=m_m, other=0.0)
    s = dot_nt(q_1, q_2, k_1, k_2, D_2, PRECISION, ACC) * scale  # [ROWS, KEYS]
    s = mask_scores(s, o_m[:, None], o_n[None, :], padded[None, :], first, M, CAUSAL, HAS_MASK, RAGGED_KEYS)
    p = tl.exp2(s + minus_lse[:, None])
    dp = dot_nt(do_1, do_2, v_1, v_2, D_2, PRECISION, ACC)
    ds = (p * (dp - delta[:, None])).to(q_1.dtype)
    p = p.to(q_1.dtype)
    dv_1, dv_2 = dot_nn(tl.trans(p), do_1, do_2, dv_1, dv_2, D_2, PRECISION, ACC)
    dk_1, dk_2 = dot_nn(tl.trans(ds), q_1, q_2, dk_1, dk_2, D_2, PRECISION, ACC)
    dq_1, dq_2 = zeros(ROWS, D_1, D_2, ACC)
    dq_1, dq_2 = dot_nn(ds, k_1, k_2, dq_1, dq_2, D_2, PRECISION, ACC)
    if EXTRA:
        ds_0 = tl.load(scratch_ptr + 2 * PITCH + o_m, mask=m_m, other=0.0)
        dq_1 += ds_0[:, None] * class_key[0][None, :]
        if D_2:
            dq_2 += ds_0[:, None] * class_key[1][None, :]
    store_rows(dq_ptr, o_m * stride_on, m_m, dq_1 * share, dq_2 * share, D, D_1, D_2)
    return dk_1, dk_2, dv_1, dv_2


@triton.jit
def _attention_bwd_whole_kernel(
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
    stride_pb,
    stride_pm,
    N,
    M,
    H,
    scale,
    share,
    stride_on,
    KEYS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_COLS: tl.constexpr,
    RAGGED: tl.constexpr,
    EXTRA: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program a head. EXTRA: key 0 is outside the tile of keys. TAIL: a tile for queries that tiles of KEYS leave.
    TAIL_COLS: rows for those that steps of COLS leave; RAGGED: the last step takes them. share: scale, no log2(e)."""
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    b = (pid // H).to(tl.int64)
    queries = do_ptr + b * stride_db + h * stride_dh, stride_dn, q_ptr + b * stride_qb + h * stride_qh, stride_qn
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_query = (b * N * H + h) * D
    o_key = (b * M * H + h) * D
    scratch_ptr += pid.to(tl.int64) * (6 * KEYS)
    o_head = o_ptr + o_query, lse_ptr + pid.to(tl.int64) * N, stride_on
    if HAS_MASK:
        pad_ptr += b * stride_pb
    first = first_kept(pad_ptr, stride_pm, M, HAS_MASK, BLOCK_P)
    o_c = tl.arange(0, WIDTH)
    m_c = o_c < EXTRA
    k_1, k_2 = load_rows(k_ptr, o_c * 0, m_c, D, D_1, D_2)  # [WIDTH, D_1], [WIDTH, D_2]
    v_1, v_2 = load_rows(v_ptr, o_c * 0, m_c, D, D_1, D_2)
    dk_1 = tl.zeros([D_1, WIDTH], ACC)
    dk_2 = tl.zeros([D_2 if D_2 else 1, WIDTH], ACC)
    sums = dk_1, dk_2, dk_1, dk_2
    for tile in range(0, N // KEYS):
        sums = _score_queries(
            queries, o_head, scratch_ptr, (k_1, k_2, v_1, v_2), sums, (pad_ptr, first), tile * KEYS, N, M, scale, KEYS,
            False, EXTRA, 2 * KEYS, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    if TAIL:
        sums = _score_queries(
            queries, o_head, scratch_ptr, (k_1, k_2, v_1, v_2), sums, (pad_ptr, first), N // KEYS * KEYS, N, M, scale,
            TAIL, True, EXTRA, 2 * KEYS, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    if EXTRA:
        dk_1, dk_2, dv_1, dv_2 = sums
        dk_1, dk_2 = tl.trans(dk_1 * share), tl.trans(dk_2 * share)
        # o_key again, in other words: it need not be kept in registers from here on
        store_rows(dk_ptr + h * D + b * (M * stride_on), o_c * 0, m_c, dk_1, dk_2, D, D_1, D_2)
        store_rows(dv_ptr + h * D + b * (M * stride_on), o_c * 0, m_c, tl.trans(dv_1), tl.trans(dv_2), D, D_1, D_2)
    tl.debug_barrier()  # what one thread wrote to scratch others read
    o_n = EXTRA + tl.arange(0, KEYS)
    m_n = o_n < M if RAGGED_KEYS else tl.full([KEYS], True, tl.int1)
    k_1, k_2 = load_rows(k_ptr, o_n * stride_kn, m_n, D, D_1, D_2)  # [KEYS, D_1], [KEYS, D_2]
    v_1, v_2 = load_rows(v_ptr, o_n * stride_vn, m_n, D, D_1, D_2)
    keys = k_1, k_2, v_1, v_2, o_n
    o_1 = tl.arange(0, D_1)
    o_2 = D_1 + tl.arange(0, D_2 if D_2 else 1)
    class_key = (
        tl.load(k_ptr + o_1, mask=o_1 < D, other=0.0).to(ACC),
        tl.load(k_ptr + o_2, mask=o_2 < D, other=0.0).to(ACC),
    )
    padded = load_padded(pad_ptr, o_n, stride_pm, M, HAS_MASK)
    dk_1, dk_2 = zeros(KEYS, D_1, D_2, ACC)
    sums = dk_1, dk_2, dk_1, dk_2
    dq_head = dq_ptr + o_query, stride_on, share
    whole = N // COLS
    if TAIL_COLS:
        sums = _tail_step(
            queries, dq_head, scratch_ptr, keys, class_key, sums, (padded, first), whole * COLS, N, M, scale, TAIL_COLS,
            RAGGED_KEYS, EXTRA, 2 * KEYS, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    for step in range(0, tl.cdiv(N, COLS) if RAGGED else whole):
        sums = _whole_step(
            queries, dq_head, scratch_ptr, keys, class_key, sums, (padded, first), step * COLS, N, M, scale, COLS,
            RAGGED, RAGGED_KEYS, EXTRA, 2 * KEYS, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    dk_1, dk_2, dv_1, dv_2 = sums
    store_rows(dk_ptr + o_key, o_n * stride_on, m_n, dk_1 * share, dk_2 * share, D, D_1, D_2)
    store_rows(dv_ptr + o_key, o_n * stride_on, m_n, dv_1, dv_2, D, D_1, D_2)
