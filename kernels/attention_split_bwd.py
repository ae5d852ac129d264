"""The split form of the backward of attention: a launch over tiles of queries, one over tiles of keys.

See attention_bwd.py, which calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from lbfast.kernels.attention_tiles import first_kept, load_padded, mask_scores
from lbfast.kernels.attention_whole_bwd import row_deltas, zeros
from lbfast.kernels.primitives import dot_nn, dot_nt, load_rows, store_rows


@triton.jit
def ahead(ptr, rows, stride):
    """The pointer that many rows further on: 64 bits for the start of a tile, so that 32 do within."""
    return ptr + tl.cast(rows, tl.int64) * stride


@triton.jit
def _over_keys(
    rows,
    dq,
    key_head,
    o_m,
    mask,
    start,
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
    k_ptr, v_ptr, stride_kn, stride_vn = key_head
    pad_ptr, stride_pm, first = mask
    q_1, q_2, do_1, do_2, lse, delta = rows
    row = tl.arange(0, COLS)
    o_n = start + row
    m_n = o_n < M if RAGGED else tl.full([COLS], True, tl.int1)
    k_1, k_2 = load_rows(ahead(k_ptr, start, stride_kn), row * stride_kn, m_n, D, D_1, D_2)  # [COLS, D_1], [COLS, D_2]
    v_1, v_2 = load_rows(ahead(v_ptr, start, stride_vn), row * stride_vn, m_n, D, D_1, D_2)
    padded = load_padded(pad_ptr, o_n, stride_pm, M, HAS_MASK)
    s = dot_nt(q_1, q_2, k_1, k_2, D_2, PRECISION, ACC) * scale  # [ROWS, COLS]
    s = mask_scores(s, o_m[:, None], o_n[None, :], padded[None, :], first, M, CAUSAL, HAS_MASK, RAGGED)
    dp = dot_nt(do_1, do_2, v_1, v_2, D_2, PRECISION, ACC)
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    return dot_nn(ds, k_1, k_2, dq[0], dq[1], D_2, PRECISION, ACC)


@triton.jit
def _dq_rows(
    query_head,
    key_head,
    mask,
    start_m,
    N,
    M,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """dQ of ROWS queries from start_m of one head, whose pointers these are; their -lse and delta to scratch."""
    do_ptr, q_ptr, o_ptr, lse_ptr, dq_ptr, scratch_ptr, stride_dn, stride_qn, stride_on, stride_s = query_head
    row = tl.arange(0, ROWS)
    o_m = start_m + row
    m_m = o_m < N
    do_1, do_2 = load_rows(ahead(do_ptr, start_m, stride_dn), row * stride_dn, m_m, D, D_1, D_2)
    o_1, o_2 = load_rows(ahead(o_ptr, start_m, stride_on), row * stride_on, m_m, D, D_1, D_2)
    q_1, q_2 = load_rows(ahead(q_ptr, start_m, stride_qn), row * stride_qn, m_m, D, D_1, D_2)
    delta = row_deltas(do_1, do_2, o_1, o_2, D_2, ACC)
    lse = tl.load(lse_ptr + o_m, mask=m_m, other=0.0)
    tl.store(scratch_ptr + o_m, -lse, mask=m_m)
    tl.store(scratch_ptr + stride_s + o_m, delta, mask=m_m)
    rows = q_1, q_2, do_1, do_2, lse, delta
    dq = zeros(ROWS, D_1, D_2, ACC)
    whole = M // COLS
    last = whole
    if CAUSAL:
        last = tl.minimum(whole, tl.cdiv(start_m + ROWS, COLS))
        if HAS_MASK:
            last = tl.where(mask[2] > start_m, whole, last)
    for tile in range(0, last):
        dq = _over_keys(
            rows, dq, key_head, o_m, mask, tile * COLS, M, scale, COLS, False, D, D_1, D_2, CAUSAL, HAS_MASK,
            PRECISION, ACC,
        )  # fmt: skip
    if TAIL:
        dq = _over_keys(
            rows, dq, key_head, o_m, mask, whole * COLS, M, scale, TAIL, True, D, D_1, D_2, CAUSAL, HAS_MASK,
            PRECISION, ACC,
        )  # fmt: skip
    share = scale * 0.6931471805599453  # ln(2): the scale came with log2(e)
    dq_ptr = ahead(dq_ptr, start_m, stride_on)
    store_rows(dq_ptr, row * stride_on, m_m, dq[0] * share, dq[1] * share, D, D_1, D_2)


@triton.jit
def _attention_bwd_dq_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    pad_ptr,
    o_ptr,
    lse_ptr,
    dq_ptr,
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
    stride_s,
    N,
    M,
    H,
    scale,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
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
    """Programs of one head are neighbours, so that its keys come from L2. The last takes TAIL_ROWS queries."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, ROWS)
    block = pid % blocks
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    o_query = (b * N * H + h) * D
    query_head = (
        do_ptr + b * stride_db + h * stride_dh,
        q_ptr + b * stride_qb + h * stride_qh,
        o_ptr + o_query,
        lse_ptr + (b * H + h) * N,
        dq_ptr + o_query,
        scratch_ptr + (b * H + h) * 2 * stride_s,
        stride_dn,
        stride_qn,
        H * D,
        stride_s,
    )
    key_head = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh, stride_kn, stride_vn
    if HAS_MASK:
        pad_ptr += b * stride_pb
    mask = pad_ptr, stride_pm, first_kept(pad_ptr, stride_pm, M, HAS_MASK, BLOCK_P)
    if TAIL_ROWS < ROWS:
        if block < blocks - 1:
            _dq_rows(
                query_head, key_head, mask, block * ROWS, N, M, scale, ROWS, COLS, TAIL, D, D_1, D_2, CAUSAL, HAS_MASK,
                PRECISION, ACC,
            )  # fmt: skip
        else:
            _dq_rows(
                query_head, key_head, mask, block * ROWS, N, M, scale, TAIL_ROWS, COLS, TAIL, D, D_1, D_2, CAUSAL,
                HAS_MASK, PRECISION, ACC,
            )  # fmt: skip
    else:
        _dq_rows(
            query_head, key_head, mask, block * ROWS, N, M, scale, ROWS, COLS, TAIL, D, D_1, D_2, CAUSAL, HAS_MASK,
            PRECISION, ACC,
        )  # fmt: skip


@triton.jit
def _over_queries(
    rows,
    sums,
    query_head,
    o_n,
    mask,
    start,
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
    do_ptr, q_ptr, scratch_ptr, stride_dn, stride_qn, stride_s = query_head
    k_1, k_2, v_1, v_2 = rows
    dk_1, dk_2, dv_1, dv_2 = sums
    padded, first = mask
    row = tl.arange(0, COLS)
    o_m = start + row
    m_m = o_m < N if RAGGED else tl.full([COLS], True, tl.int1)
    q_1, q_2 = load_rows(ahead(q_ptr, start, stride_qn), row * stride_qn, m_m, D, D_1, D_2)  # [COLS, D_1], [COLS, D_2]
    do_1, do_2 = load_rows(ahead(do_ptr, start, stride_dn), row * stride_dn, m_m, D, D_1, D_2)
    scratch_ptr += start
    minus_lse = tl.load(scratch_ptr + row, mask=m_m, other=0.0)
    delta = tl.load(scratch_ptr + stride_s + row, mask=m_m, other=0.0)
    s = dot_nt(k_1, k_2, q_1, q_2, D_2, PRECISION, ACC) * scale  # [ROWS, COLS]
    s = mask_scores(s, o_m[None, :], o_n[:, None], padded[:, None], first, M, CAUSAL, HAS_MASK, False)
    p = tl.exp2(s + minus_lse[None, :])  # queries past N have q = dO = 0: they add nothing
    dv_1, dv_2 = dot_nn(p, do_1, do_2, dv_1, dv_2, D_2, PRECISION, ACC)
    dp = dot_nt(v_1, v_2, do_1, do_2, D_2, PRECISION, ACC)
    dk_1, dk_2 = dot_nn(p * (dp - delta[None, :]), q_1, q_2, dk_1, dk_2, D_2, PRECISION, ACC)
    return dk_1, dk_2, dv_1, dv_2


@triton.jit
def _dkdv_rows(
    query_head,
    key_head,
    mask,
    start_n,
    N,
    M,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """dK and dV of ROWS keys from start_n of one head, whose pointers these are."""
    k_ptr, v_ptr, dk_ptr, dv_ptr, stride_kn, stride_vn, stride_on = key_head
    pad_ptr, stride_pm, first = mask
    row = tl.arange(0, ROWS)
    o_n = start_n + row
    m_n = o_n < M
    k_1, k_2 = load_rows(ahead(k_ptr, start_n, stride_kn), row * stride_kn, m_n, D, D_1, D_2)
    v_1, v_2 = load_rows(ahead(v_ptr, start_n, stride_vn), row * stride_vn, m_n, D, D_1, D_2)
    rows = k_1, k_2, v_1, v_2
    mask = load_padded(pad_ptr, o_n, stride_pm, M, HAS_MASK), first
    dk_1, dk_2 = zeros(ROWS, D_1, D_2, ACC)
    sums = dk_1, dk_2, dk_1, dk_2
    whole = N // COLS
    begin = 0
    if CAUSAL and not HAS_MASK:
        begin = tl.minimum(whole, start_n // COLS)
    for tile in range(begin, whole):
        sums = _over_queries(
            rows, sums, query_head, o_n, mask, tile * COLS, N, M, scale, COLS, False, D, D_1, D_2, CAUSAL, HAS_MASK,
            PRECISION, ACC,
        )  # fmt: skip
    if TAIL:
        sums = _over_queries(
            rows, sums, query_head, o_n, mask, whole * COLS, N, M, scale, TAIL, True, D, D_1, D_2, CAUSAL, HAS_MASK,
            PRECISION, ACC,
        )  # fmt: skip
    share = scale * 0.6931471805599453
    dk_1, dk_2, dv_1, dv_2 = sums
    dk_ptr, dv_ptr = ahead(dk_ptr, start_n, stride_on), ahead(dv_ptr, start_n, stride_on)
    store_rows(dk_ptr, row * stride_on, m_n, dk_1 * share, dk_2 * share, D, D_1, D_2)
    store_rows(dv_ptr, row * stride_on, m_n, dv_1, dv_2, D, D_1, D_2)


@triton.jit
def _attention_bwd_dkdv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    pad_ptr,
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
    stride_s,
    N,
    M,
    H,
    scale,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
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
    """The same for keys. Reads the -lse and delta that _attention_bwd_dq_kernel left."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, ROWS)
    block = pid % blocks
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    o_key = (b * M * H + h) * D
    query_head = (
        do_ptr + b * stride_db + h * stride_dh,
        q_ptr + b * stride_qb + h * stride_qh,
        scratch_ptr + (b * H + h) * 2 * stride_s,
        stride_dn,
        stride_qn,
        stride_s,
    )
    key_head = (
        k_ptr + b * stride_kb + h * stride_kh,
        v_ptr + b * stride_vb + h * stride_vh,
        dk_ptr + o_key,
        dv_ptr + o_key,
        stride_kn,
        stride_vn,
        H * D,
    )
    if HAS_MASK:
        pad_ptr += b * stride_pb
    mask = pad_ptr, stride_pm, first_kept(pad_ptr, stride_pm, M, HAS_MASK, BLOCK_P)
    if TAIL_ROWS < ROWS:
        if block < blocks - 1:
            _dkdv_rows(
                query_head, key_head, mask, block * ROWS, N, M, scale, ROWS, COLS, TAIL, D, D_1, D_2, CAUSAL, HAS_MASK,
                PRECISION, ACC,
            )  # fmt: skip
        else:
            _dkdv_rows(
                query_head, key_head, mask, block * ROWS, N, M, scale, TAIL_ROWS, COLS, TAIL, D, D_1, D_2, CAUSAL,
                HAS_MASK, PRECISION, ACC,
            )  # fmt: skip
    else:
        _dkdv_rows(
            query_head, key_head, mask, block * ROWS, N, M, scale, ROWS, COLS, TAIL, D, D_1, D_2, CAUSAL, HAS_MASK,
            PRECISION, ACC,
        )  # fmt: skip
