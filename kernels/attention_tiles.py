"""What the kernels of attention share: masks, and queries over tiles of keys. attention.py says how they are used."""

from __future__ import annotations

import triton
import triton.language as tl
from lbfast.kernels.primitives import dot_nn, dot_nt, dot_tn, load_rows, store_rows

HIDDEN = tl.constexpr(-1.0e30)
PADDED = tl.constexpr(1 << 29)
OUTSIDE = tl.constexpr(1 << 30)


@triton.jit
def first_kept(pad_ptr, stride_pm, M, HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr):
    """The first key that is no padding; M where all are, 0 where there is no mask."""
    if HAS_MASK:
        o_p = tl.arange(0, BLOCK_P)
        padded = tl.load(pad_ptr + o_p * stride_pm, mask=o_p < M, other=1)
        first = tl.min(tl.where(padded == 0, o_p, M), 0)
    else:
        first = 0
    return first


@triton.jit
def load_padded(pad_ptr, o_n, stride_pm, M, HAS_MASK: tl.constexpr):
    """True where key o_n is padding."""
    if HAS_MASK:
        padded = tl.load(pad_ptr + o_n * stride_pm, mask=o_n < M, other=1) != 0
    else:
        padded = o_n < 0
    return padded


@triton.jit
def mask_scores(s, o_m, o_n, padded, first, M, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, RAGGED: tl.constexpr):
    """Scores, HIDDEN where masked. o_m, o_n and padded broadcast to s; RAGGED: keys may lie past M."""
    if HAS_MASK:
        if CAUSAL:
            later = o_n > o_m
            lost = o_m < first
            s = tl.where(lost, tl.where(padded & later, HIDDEN, 0.0), tl.where(padded | later, HIDDEN, s))
        else:
            s = tl.where(first == M, 0.0, tl.where(padded, HIDDEN, s))
    elif CAUSAL:
        s = tl.where(o_n > o_m, HIDDEN, s)
    if RAGGED:
        s = tl.where(o_n < M, s, HIDDEN)
    return s


# A key has a rank, a query a limit; the query sees the keys whose rank is not above it. Both are positions where the
# mask is causal, else 0. The rank is PADDED more for padding, OUTSIDE past M; a lost query's limit is PADDED more.


@triton.jit
def ranks(pad_ptr, stride_pm, o_n, M, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr):
    """Ranks of keys o_n."""
    rank = o_n if CAUSAL else tl.zeros_like(o_n)
    if HAS_MASK:
        rank += tl.where(load_padded(pad_ptr, o_n, stride_pm, M, HAS_MASK), PADDED, 0)
    return tl.where(o_n < M, rank, OUTSIDE)


@triton.jit
def limits(o_m, first, M, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr):
    """Limits of queries o_m, and which of them are lost."""
    limit = o_m.to(tl.int32) if CAUSAL else tl.zeros(o_m.shape, tl.int32)
    lost = o_m < 0
    if HAS_MASK:
        lost = (o_m < first if CAUSAL else o_m < 0) | (first == M)
        limit += tl.where(lost, PADDED, 0)
    return limit, lost


@triton.jit
def load_queries(
    q_ptr,
    stride_qn,
    o_m,
    m_m,
    first,
    M,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Queries o_m in two parts of D, and their limits. Lost ones are 0, as all their scores are."""
    limit, lost = limits(o_m, first, M, CAUSAL, HAS_MASK)
    if HAS_MASK:
        m_m = m_m & ~lost
    q_1, q_2 = load_rows(q_ptr, o_m * stride_qn, m_m, D, D_1, D_2)  # [ROWS, D_1], [ROWS, D_2]
    return q_1, q_2, limit


@triton.jit
def load_keys(
    k_ptr,
    v_ptr,
    pad_ptr,
    stride_kn,
    stride_vn,
    stride_pm,
    start,
    M,
    COLS: tl.constexpr,
    RAGGED: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """COLS keys from `start`: k and v in two parts of D, ranks. RAGGED: some may lie past M."""
    o_n = tl.arange(0, COLS)
    m_n = o_n < M - start if RAGGED else tl.full([COLS], True, tl.int1)
    skipped = tl.cast(start, tl.int64)
    k_1, k_2 = load_rows(k_ptr + skipped * stride_kn, o_n * stride_kn, m_n, D, D_1, D_2)  # [COLS, D_1], [COLS, D_2]
    v_1, v_2 = load_rows(v_ptr + skipped * stride_vn, o_n * stride_vn, m_n, D, D_1, D_2)
    return k_1, k_2, v_1, v_2, ranks(pad_ptr, stride_pm, start + o_n, M, CAUSAL, HAS_MASK)


@triton.jit
def load_parts(
    k_ptr,
    v_ptr,
    pad_ptr,
    stride_kn,
    stride_vn,
    stride_pm,
    start,
    M,
    COLS_1: tl.constexpr,
    COLS_2: tl.constexpr,
    RAGGED: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """COLS_1 keys from `start` and the COLS_2 after them (the first again where COLS_2 is 0)."""
    part_1 = load_keys(
        k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm, start, M, COLS_1, RAGGED and COLS_2 == 0, D, D_1, D_2,
        CAUSAL, HAS_MASK,
    )  # fmt: skip
    part_2 = part_1
    if COLS_2:
        part_2 = load_keys(
            k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm, start + COLS_1, M, COLS_2, RAGGED, D, D_1, D_2,
            CAUSAL, HAS_MASK,
        )  # fmt: skip
    return part_1, part_2


@triton.jit
def scores(
    queries,
    keys,
    MASKED: tl.constexpr,
    AXIS: tl.constexpr,
    D_2: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Q K^T (AXIS 1: queries are rows) or K Q^T (AXIS 0: they are columns), unscaled, -inf where MASKED keys hide."""
    q_1, q_2, limit = queries
    k_1, k_2, _, _, rank = keys
    if AXIS == 1:
        s = dot_nt(q_1, q_2, k_1, k_2, D_2, PRECISION, ACC)
    else:
        s = dot_nt(k_1, k_2, q_1, q_2, D_2, PRECISION, ACC)
    if MASKED:
        s = tl.where(tl.expand_dims(rank, 1 - AXIS) > tl.expand_dims(limit, AXIS), float("-inf"), s)
    return s


@triton.jit
def attend(
    queries,
    part_1,
    part_2,
    scale,
    COLS_2: tl.constexpr,
    RAGGED: tl.constexpr,
    AXIS: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The queries over two parts of keys at once: O before its division in two parts of D, maximum, sum.

    O is [ROWS, D], or [D, ROWS] where queries are columns (AXIS 0).
    """
    s_1 = scores(queries, part_1, MASKED or (RAGGED and COLS_2 == 0), AXIS, D_2, PRECISION, ACC)
    top = tl.max(s_1, AXIS)
    if COLS_2:
        s_2 = scores(queries, part_2, MASKED or RAGGED, AXIS, D_2, PRECISION, ACC)
        top = tl.maximum(top, tl.max(s_2, AXIS))
    top = tl.maximum(top, HIDDEN) * scale  # finite where these keys are all hidden
    ROWS: tl.constexpr = queries[0].shape[0]
    if AXIS == 1:
        acc_1 = tl.zeros([ROWS, D_1], ACC)
        acc_2 = tl.zeros([ROWS, D_2 if D_2 else 1], ACC)
    else:
        acc_1 = tl.zeros([D_1, ROWS], ACC)
        acc_2 = tl.zeros([D_2 if D_2 else 1, ROWS], ACC)
    p = tl.exp2(s_1 * scale - tl.expand_dims(top, AXIS))
    total = tl.sum(p, AXIS)
    acc_1, acc_2 = add(p, part_1, acc_1, acc_2, AXIS, D_2, PRECISION, ACC)
    if COLS_2:
        p = tl.exp2(s_2 * scale - tl.expand_dims(top, AXIS))
        total += tl.sum(p, AXIS)
        acc_1, acc_2 = add(p, part_2, acc_1, acc_2, AXIS, D_2, PRECISION, ACC)
    return acc_1, acc_2, top, total


@triton.jit
def add(
    p,
    keys,
    acc_1,
    acc_2,
    AXIS: tl.constexpr,
    D_2: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """acc + P V, or V^T P where queries are columns."""
    _, _, v_1, v_2, _ = keys
    if AXIS == 1:
        acc_1, acc_2 = dot_nn(p, v_1, v_2, acc_1, acc_2, D_2, PRECISION, ACC)
    else:
        acc_1, acc_2 = dot_tn(v_1, v_2, p, acc_1, acc_2, D_2, PRECISION, ACC)
    return acc_1, acc_2


@triton.jit
def step(
    queries,
    keys,
    state,
    scale,
    D_2: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One step of the running softmax."""
    acc_1, acc_2, top, total = state
    s = scores(queries, keys, MASKED, 1, D_2, PRECISION, ACC)  # [ROWS, COLS]
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc_1 = acc_1 * shrink[:, None]
    if D_2:
        acc_2 = acc_2 * shrink[:, None]
    acc_1, acc_2 = add(p, keys, acc_1, acc_2, 1, D_2, PRECISION, ACC)
    return acc_1, acc_2, new_top, total


@triton.jit
def finish(
    o_ptr,
    lse_ptr,
    stride_on,
    state,
    o_m,
    m_m,
    AXIS: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
):
    """Writes results and lse of queries o_m."""
    acc_1, acc_2, top, total = state
    logarithm = tl.log2(total)
    # A division takes 9 instructions; after the logarithm this takes one, and is exact enough for 16 bits.
    share = tl.exp2(-logarithm) if o_ptr.dtype.element_ty.primitive_bitwidth == 16 else 1 / total
    share = tl.expand_dims(share, AXIS)
    acc_1 = acc_1 * share
    acc_2 = acc_2 * share
    if AXIS == 0:
        acc_1 = tl.trans(acc_1)
        acc_2 = tl.trans(acc_2)
    store_rows(o_ptr, o_m * stride_on, m_m, acc_1, acc_2, D, D_1, D_2)
    tl.store(lse_ptr + o_m, top + logarithm, mask=m_m)
