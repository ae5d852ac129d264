"""Attention over N queries and M keys, read in place from (B, N, H, D) views.

    S = scale log2(e) Q K^T, masked;  lse = log2(sum(exp2(S)));  O = exp2(S - lse) V

Images have 257 tokens, audio 593: one more than whole tiles. So token 0, the class token, stays outside the tiles: as a
key it is the first step of every query's running softmax, a column of one; as a query it rides along with the head's
first program, over the keys that this program has on chip. Keys that fill no whole tile end in one tile of 16, 32, ...:
no token is padded to 128, nor a head of 80.

Masks: HIDDEN where a key is padding, or later than a causal query. A query that has no key left is "lost": it sees the
keys that only one of the two masks hides, all alike, as it does where both masks add finfo.min to float32 scores.
Kept for the backward: q, k, v, O, lse (B, H, N). Sums are in float32 (float64 for float64).
Source: Dao, arXiv 2307.08691; Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

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
    dot_tn,
    load_rows,
    on_device,
    split_head,
    store_rows,
)

from lbfast.kernels import configs

MAX_DIM = 128
LOG2_E = 1.4426950408889634
HIDDEN = tl.constexpr(-1.0e30)


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


@triton.jit
def _step(
    q_1,
    q_2,
    acc_1,
    acc_2,
    top,
    total,
    k_1,
    k_2,
    v_1,
    v_2,
    o_m,
    o_n,
    padded,
    first,
    M,
    scale,
    RAGGED: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One step of the running softmax of queries o_m over keys o_n."""
    s = dot_nt(q_1, q_2, k_1, k_2, D_2, PRECISION, ACC) * scale  # [ROWS, COLS]
    s = mask_scores(s, o_m[:, None], o_n[None, :], padded[None, :], first, M, CAUSAL, HAS_MASK, RAGGED)
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc_1 = acc_1 * shrink[:, None]
    if D_2:
        acc_2 = acc_2 * shrink[:, None]
    acc_1, acc_2 = dot_nn(p, v_1, v_2, acc_1, acc_2, D_2, PRECISION, ACC)
    return acc_1, acc_2, new_top, total


@triton.jit
def _class_step(
    q_1,
    q_2,
    acc_1,
    acc_2,
    top,
    total,
    k_1,
    k_2,
    v_1,
    v_2,
    o_m,
    o_n,
    padded,
    first,
    M,
    scale,
    RAGGED: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The same with keys as rows: S^T = K Q^T, O^T = V^T P^T, so that 16 columns of one query cost next to nothing."""
    s = dot_nt(k_1, k_2, q_1, q_2, D_2, PRECISION, ACC) * scale  # [COLS, 16]
    s = mask_scores(s, o_m[None, :], o_n[:, None], padded[:, None], first, M, CAUSAL, HAS_MASK, RAGGED)
    new_top = tl.maximum(top, tl.max(s, 0))
    p = tl.exp2(s - new_top[None, :])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 0)
    acc_1 = acc_1 * shrink[None, :]
    if D_2:
        acc_2 = acc_2 * shrink[None, :]
    acc_1, acc_2 = dot_tn(v_1, v_2, p, acc_1, acc_2, D_2, PRECISION, ACC)
    return acc_1, acc_2, new_top, total


@triton.jit
def _attend(
    queries,
    state,
    class_query,
    class_state,
    k_ptr,
    v_ptr,
    pad_ptr,
    stride_kn,
    stride_vn,
    stride_pm,
    start,
    first,
    M,
    scale,
    COLS: tl.constexpr,
    RAGGED: tl.constexpr,
    CLASS: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Loads COLS keys from `start`, and takes the queries and, where CLASS, the class query over them."""
    o_n = start + tl.arange(0, COLS)
    m_n = o_n < M if RAGGED else tl.full([COLS], True, tl.int1)
    row = o_n.to(tl.int64)
    k_1, k_2 = load_rows(k_ptr, row * stride_kn, m_n, D, D_1, D_2)  # [COLS, D_1], [COLS, D_2]
    v_1, v_2 = load_rows(v_ptr, row * stride_vn, m_n, D, D_1, D_2)
    padded = load_padded(pad_ptr, o_n, stride_pm, M, HAS_MASK)
    if CLASS:
        q_1, q_2, o_m = class_query
        acc_1, acc_2, top, total = class_state
        class_state = _class_step(
            q_1, q_2, acc_1, acc_2, top, total, k_1, k_2, v_1, v_2, o_m, o_n, padded, first, M, scale, RAGGED, D_2,
            CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    q_1, q_2, o_m = queries
    acc_1, acc_2, top, total = state
    state = _step(
        q_1, q_2, acc_1, acc_2, top, total, k_1, k_2, v_1, v_2, o_m, o_n, padded, first, M, scale, RAGGED, D_2,
        CAUSAL, HAS_MASK, PRECISION, ACC,
    )  # fmt: skip
    return state, class_state


@triton.jit
def _begin(q_ptr, stride_qn, o_m, N, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, ACC: tl.constexpr):
    """Queries o_m, and their running softmax before any key: result in two parts of D, maximum, sum."""
    ROWS: tl.constexpr = o_m.shape[0]
    q_1, q_2 = load_rows(q_ptr, o_m.to(tl.int64) * stride_qn, o_m < N, D, D_1, D_2)  # [ROWS, D_1], [ROWS, D_2]
    acc_1 = tl.zeros([ROWS, D_1], ACC)
    acc_2 = tl.zeros([ROWS, D_2 if D_2 else 1], ACC)
    return (q_1, q_2, o_m), (acc_1, acc_2, tl.full([ROWS], float("-inf"), ACC), tl.zeros([ROWS], ACC))


@triton.jit
def _begin_class(q_ptr, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, ACC: tl.constexpr):
    """Query 0 in 16 equal rows, and its running softmax, transposed."""
    o_m = tl.zeros([16], tl.int32)
    q_1, q_2 = load_rows(q_ptr, o_m, o_m == 0, D, D_1, D_2)  # [16, D_1], [16, D_2]
    acc_1 = tl.zeros([D_1, 16], ACC)
    acc_2 = tl.zeros([D_2 if D_2 else 1, 16], ACC)
    return (q_1, q_2, o_m), (acc_1, acc_2, tl.full([16], float("-inf"), ACC), tl.zeros([16], ACC))


@triton.jit
def _finish_class(o_ptr, lse_ptr, state, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr):
    """Writes the first of the 16."""
    acc_1, acc_2, top, total = state
    o_c = tl.arange(0, 16)
    share = (1 / total)[None, :]
    store_rows(o_ptr, o_c, o_c == 0, tl.trans(acc_1 * share), tl.trans(acc_2 * share), D, D_1, D_2)
    tl.store(lse_ptr + o_c, top + tl.log2(total), mask=o_c == 0)


@triton.jit
def _finish(o_ptr, lse_ptr, stride_on, state, o_m, N, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr):
    """Writes results and lse of queries o_m."""
    acc_1, acc_2, top, total = state
    m_m = o_m < N
    share = (1 / total)[:, None]
    store_rows(o_ptr, o_m.to(tl.int64) * stride_on, m_m, acc_1 * share, acc_2 * share, D, D_1, D_2)
    tl.store(lse_ptr + o_m, top + tl.log2(total), mask=m_m)


@triton.jit
def _fwd_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    pad_ptr,
    o_ptr,
    lse_ptr,
    stride_qn,
    stride_kn,
    stride_vn,
    stride_pm,
    stride_on,
    start_m,
    N,
    M,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
    CLASS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """ROWS queries from start_m of one head, whose pointers these are; with CLASS query 0 too."""
    queries, state = _begin(q_ptr, stride_qn, start_m + tl.arange(0, ROWS), N, D, D_1, D_2, ACC)
    class_query, class_state = _begin_class(q_ptr, D, D_1, D_2, ACC)
    first = first_kept(pad_ptr, stride_pm, M, HAS_MASK, BLOCK_P)
    whole = (M - 1) // COLS  # tiles of keys 1, 2, ...
    last = whole
    if CAUSAL:
        last = tl.minimum(whole, tl.cdiv(start_m + ROWS - 1, COLS))
        if HAS_MASK:
            last = tl.where(first > (0 if CLASS else start_m), whole, last)
    state, class_state = _attend(
        queries, state, class_query, class_state, k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm, 0, first, M,
        scale, 1, False, CLASS, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
    )  # fmt: skip
    for tile in range(0, last):
        state, class_state = _attend(
            queries, state, class_query, class_state, k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm,
            1 + tile * COLS, first, M, scale, COLS, False, CLASS, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    if TAIL:
        state, class_state = _attend(
            queries, state, class_query, class_state, k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm,
            1 + whole * COLS, first, M, scale, TAIL, True, CLASS, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    _finish(o_ptr, lse_ptr, stride_on, state, queries[2], N, D, D_1, D_2)
    if CLASS:
        _finish_class(o_ptr, lse_ptr, class_state, D, D_1, D_2)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pad_ptr,
    o_ptr,
    lse_ptr,
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
    """Programs of one head are neighbours and share its keys in L2. The first takes query 0 besides its ROWS."""
    pid = tl.program_id(0)
    blocks = tl.maximum(tl.cdiv(N - 1, ROWS), 1)
    block = pid % blocks
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += (b * N * H + h) * D
    lse_ptr += (b * H + h) * N
    if HAS_MASK:
        pad_ptr += b * stride_pb
    if block == 0:
        _fwd_rows(
            q_ptr, k_ptr, v_ptr, pad_ptr, o_ptr, lse_ptr, stride_qn, stride_kn, stride_vn, stride_pm, H * D,
            1, N, M, scale, ROWS, COLS, TAIL, True, BLOCK_P, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION, ACC,
        )  # fmt: skip
    else:
        _fwd_rows(
            q_ptr, k_ptr, v_ptr, pad_ptr, o_ptr, lse_ptr, stride_qn, stride_kn, stride_vn, stride_pm, H * D,
            1 + block * ROWS, N, M, scale, ROWS, COLS, TAIL, False, BLOCK_P, D, D_1, D_2, CAUSAL, HAS_MASK, PRECISION,
            ACC,
        )  # fmt: skip


def tail(size: int, block: int) -> int:
    """The tile that covers what whole tiles of `block` leave of tokens 1, 2, ...: 0, or a power of two from 16."""
    rest = (size - 1) % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def launch_of(table: Mapping[str, configs.Launch], name: str, itemsize: int, tokens: int) -> configs.Launch:
    """The row for float32 ("wide"), for captions and other short sequences ("short"), or for the architecture."""
    if itemsize > 2:
        return configs.lookup(table, "wide")
    return configs.lookup(table, "short" if tokens <= table["short"].tile["TOKENS"] else name)


def _constants(m: int, d: int, launch: configs.Launch, causal: bool, masked: bool, dtype: torch.dtype) -> dict:
    d_1, d_2 = split_head(d)
    return {
        "ROWS": launch.tile["ROWS"],
        "COLS": launch.tile["COLS"],
        "TAIL": tail(m, launch.tile["COLS"]),
        "BLOCK_P": triton.next_power_of_2(m) if masked else 1,
        "D": d,
        "D_1": d_1,
        "D_2": d_2,
        "CAUSAL": causal,
        "HAS_MASK": masked,
        "PRECISION": dot_precision(dtype),
        "ACC": accumulator(dtype),
    }


def readable(x: torch.Tensor) -> torch.Tensor:
    """x with D innermost."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padded: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """O (B, N, H, D), contiguous, and lse (B, H, N) in base 2. padded: (B, M) bool."""
    b, n, h, d = q.shape
    m = k.shape[1]
    q, k, v = readable(q), readable(k), readable(v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, n), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if o.numel() == 0:
        return o, lse
    launch = launch_of(configs.ATTENTION_FWD, arch(q.device), q.element_size(), max(n, m))
    constants = _constants(m, d, launch, causal, padded is not None, q.dtype)
    with on_device(q):
        _attention_fwd_kernel[(b * h * max(1, triton.cdiv(n - 1, constants["ROWS"])),)](
            q,
            k,
            v,
            None if padded is None else padded.view(torch.uint8),
            o,
            lse,
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
    return o, lse


def why_not(q: torch.Tensor) -> list[str]:
    """Reasons why the kernels cannot take these inputs, of q's dtype and head dim."""
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) and (q.is_cuda or q.dtype != torch.float64):
        reasons.append(f"the kernels take float16, bfloat16 and float32, not {q.dtype}")
    if q.shape[3] > MAX_DIM:
        reasons.append(f"the kernels take D <= {MAX_DIM}, not D={q.shape[3]}")
    return reasons


SHAPES = (
    # what, B, N, H, D, causal and padded
    ("L/14 257", 256, 257, 16, 64, False),
    ("H/14 257", 256, 257, 16, 80, False),
    ("audio L/14 593", 256, 593, 16, 64, False),
    ("text L 77", 256, 77, 12, 64, True),
)
"""LanguageBind's shapes, for the benches and for compiling ahead of time."""


def aot_cases(arch: str) -> list[AotCase]:
    """The towers' shapes in bfloat16: strides of separate projections; captions causal and padded."""
    cases = []
    for what, b, n, h, d, text in SHAPES:
        launch = launch_of(configs.ATTENTION_FWD, arch, 2, n)
        signature = {f"{name}_ptr": "*bf16:16" for name in "qkvo"}
        signature |= {"lse_ptr": "*fp32:16", "scale": "fp32", "N": "i32", "M": "i32"}
        signature |= {f"stride_{name}{axis}": "i32:16" for name in "qkv" for axis in "bnh"}
        signature |= {"H": "i32:16" if h % 16 == 0 else "i32"}
        constants = _constants(n, d, launch, text, text, torch.bfloat16)
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
                f"attention fwd {what} x{b}",
                _attention_fwd_kernel,
                signature,
                constants,
                launch.num_warps,
                launch.num_stages,
                flops=(2 if text else 4) * b * h * n * n * d,
                bytes=b * n * h * (4 * d * 2 + 4),
                programs=b * h * blocks,
                trips=(last[0], statistics.fmean(last[1:])),
                shares=(1 / blocks,),
            )
        )
    return cases
