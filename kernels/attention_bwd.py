"""The backward of attention, from q, k, v, O and lse.

    P = exp2(S - lse);  delta = rowsum(dO O);  dS = P (dO V^T - delta)
    dV = P^T dO;  dQ = scale dS K;  dK = scale dS^T Q

Two forms; a table says which sizes take the first.
- Whole: one program a head and five products; attention_whole_bwd.py.
- Split, for longer sequences and larger heads, below: a launch over tiles of queries gives dQ, another over tiles of
  keys dK and dV. Each computes P again: seven products. Tiles of rows and of columns are whole, and so without masks,
  but for the last, of 16, 32, ...: no sequence is padded to 128. The first launch leaves -lse and delta where the
  second reads them as vectors.
Nothing is added up in memory: the result is the same every time. Source: Dao, arXiv 2307.08691.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import triton
import triton.language as tl
from lbfast.kernels.attention import LOG2_E, SHAPES, first_kept, load_padded, mask_scores, readable
from lbfast.kernels.attention_whole_bwd import _attention_bwd_whole_kernel, row_deltas, zeros
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


def _rest(size: int, block: int) -> int:
    """The tile that covers what whole tiles of `block` leave: 0, or a power of two from 16."""
    rest = size % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def _split_launch(name: str, itemsize: int, tokens: int, d: int) -> configs.Launch:
    """The row for float32 ("wide"), for captions and other short sequences, for heads above 64, or for the GPU."""
    table = configs.ATTENTION_BWD
    if itemsize > 2:
        return table["wide"]
    if tokens <= table["short"].tile["TOKENS"]:
        return table["short"]
    return table.get(f"{name} large", table["large"]) if d > 64 else configs.lookup(table, name)


def _whole_launch(name: str, itemsize: int, n: int, m: int, d: int, masked: bool) -> configs.Launch | None:
    """The first row of the table with room for m keys, one of which may be outside, and 2 KEYS queries; or None."""
    if itemsize > 2 and name != "default":
        return None
    for launch in configs.ATTENTION_BWD_WHOLE.get(name, ()):
        keys = launch.tile["KEYS"]
        if m <= keys + 1 and n <= 2 * keys and sum(split_head(d)) <= launch.tile["DIM"]:
            return launch if launch.tile["MASKS"] or not masked else None
    return None


def _constants(m: int, d: int, causal: bool, masked: bool, dtype: torch.dtype) -> dict[str, Any]:
    d_1, d_2 = split_head(d)
    return {
        "BLOCK_P": triton.next_power_of_2(m) if masked else 1,
        "D": d,
        "D_1": d_1,
        "D_2": d_2,
        "CAUSAL": causal,
        "HAS_MASK": masked,
        "PRECISION": dot_precision(dtype),
        "ACC": accumulator(dtype),
    }


def _split_tiles(form: str, n: int, m: int, launch: configs.Launch) -> dict[str, int]:
    """form: "DQ", over tiles of queries, or "DKDV", over tiles of keys."""
    rows, cols = (
        launch.tile.get(f"{form}_ROWS", launch.tile["ROWS"]),
        launch.tile.get(f"{form}_COLS", launch.tile["COLS"]),
    )
    size, across = (n, m) if form == "DQ" else (m, n)
    return {"ROWS": rows, "TAIL_ROWS": _rest(size, rows) or rows, "COLS": cols, "TAIL": _rest(across, cols)}


def _whole_tiles(n: int, m: int, launch: configs.Launch) -> dict[str, int | bool]:
    keys, cols = launch.tile["KEYS"], launch.tile["COLS"]
    extra = int(m == keys + 1)
    if m - extra < keys:  # masks take registers
        cols = launch.tile["RAGGED_COLS"]
    ragged = n % cols > 16
    return {
        "KEYS": keys,
        "COLS": cols,
        "TAIL": _rest(n, keys),
        "TAIL_COLS": 16 if n % cols and not ragged else 0,
        "RAGGED": ragged,
        "EXTRA": extra,
        "RAGGED_KEYS": m - extra < keys,
    }


def _near(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x with D innermost, and `rows` rows within reach of a 32-bit offset."""
    return readable(x) if rows * x.stride(1) < 2**31 else x.contiguous()


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
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v))
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    if m == 1:  # its weight is 1, whatever q and k are
        return dq.zero_(), dk.zero_(), dv.copy_(do.sum(1, keepdim=True))
    name = arch(q.device)
    masked = causal or padded is not None
    whole = _whole_launch(name, q.element_size(), n, m, d, masked)
    rows = whole.tile["KEYS"] * 2 if whole else 256
    do, q, k, v = (_near(x, rows) for x in (do, q, k, v))
    pad = None if padded is None else padded.view(torch.uint8)
    strides = (
        *do.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if padded is None else padded.stride()),
    )
    constants = _constants(m, d, causal, padded is not None, q.dtype)
    with on_device(q):
        if whole:
            scratch = torch.empty((b * h, 3, rows), dtype=lse.dtype, device=q.device)
            _attention_bwd_whole_kernel[(b * h,)](
                do, q, k, v, pad, o, lse, dq, dk, dv, scratch, *strides, n, m, h, scale * LOG2_E, scale, h * d,
                **_whole_tiles(n, m, whole), **constants, num_warps=whole.num_warps, num_stages=whole.num_stages,
            )  # fmt: skip
            return dq, dk, dv
        launch = _split_launch(name, q.element_size(), max(n, m), d)
        how = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        pitch = triton.cdiv(n, 16) * 16
        scratch = torch.empty((b * h, 2, pitch), dtype=lse.dtype, device=q.device)
        numbers = pitch, n, m, h, scale * LOG2_E
        tiles = _split_tiles("DQ", n, m, launch)
        _attention_bwd_dq_kernel[(b * h * triton.cdiv(n, tiles["ROWS"]),)](
            do, q, k, v, pad, o, lse, dq, scratch, *strides, *numbers, **tiles, **constants, **how
        )
        tiles = _split_tiles("DKDV", n, m, launch)
        _attention_bwd_dkdv_kernel[(b * h * triton.cdiv(m, tiles["ROWS"]),)](
            do, q, k, v, pad, dk, dv, scratch, *strides, *numbers, **tiles, **constants, **how
        )
    return dq, dk, dv


def aot_cases(arch: str) -> list[AotCase]:
    """As in the forward; the split form in its two launches."""
    cases = []
    for what, b, n, h, d, text in SHAPES:
        signature = {f"{name}_ptr": "*bf16:16" for name in "qkv"} | {"do_ptr": "*bf16:16", "scratch_ptr": "*fp32:16"}
        signature |= {"scale": "fp32", "N": "i32", "M": "i32", "H": "i32:16" if h % 16 == 0 else "i32"}
        signature |= {f"stride_{name}{axis}": "i32:16" for name in "dqkv" for axis in "bnh"}
        constants = _constants(n, d, text, text, torch.bfloat16)
        if text:
            signature |= {"pad_ptr": "*u8:16", "stride_pb": "i32"}
            constants["stride_pm"] = 1
        else:
            signature |= {"stride_pb": "i32:16", "stride_pm": "i32:16"}
            constants["pad_ptr"] = None
        written = {f"{name}_ptr": "*bf16:16" for name in ("dq", "dk", "dv")}
        read = {"o_ptr": "*bf16:16", "lse_ptr": "*fp32:16"}
        flops, size = (1 if text else 2) * b * h * n * n * d, b * n * h * d * 2
        if whole := _whole_launch(arch, 2, n, n, d, text):
            tiles = _whole_tiles(n, n, whole)
            cases.append(
                AotCase(
                    f"attention bwd {what} x{b}",
                    _attention_bwd_whole_kernel,
                    signature | read | written | {"share": "fp32", "stride_on": "i32:16"},
                    constants | tiles,
                    whole.num_warps,
                    whole.num_stages,
                    flops=5 * flops,
                    bytes=8 * size + b * n * h * 4,
                    programs=b * h,
                    trips=(n // tiles["KEYS"], -(-n // tiles["COLS"]) if tiles["RAGGED"] else n // tiles["COLS"]),
                )
            )
            continue
        launch = _split_launch(arch, 2, n, d)
        for form, kernel, more, products in (
            ("dq", _attention_bwd_dq_kernel, read | {"dq_ptr": "*bf16:16"}, 3),
            ("dkdv", _attention_bwd_dkdv_kernel, {name: written[name] for name in ("dk_ptr", "dv_ptr")}, 4),
        ):
            tiles = _split_tiles(form.upper(), n, n, launch)
            rows, trips = tiles["ROWS"], n // tiles["COLS"]
            blocks = triton.cdiv(n, rows)
            means = [float(trips)] * blocks
            if text and form == "dq":
                means = [min(trips, triton.cdiv((block + 1) * rows, tiles["COLS"])) for block in range(blocks)]
            one = tiles["TAIL_ROWS"] == rows
            cases.append(
                AotCase(
                    f"attention bwd {form} {what} x{b}",
                    kernel,
                    signature | more | {"stride_s": "i32:16"},
                    constants | tiles,
                    launch.num_warps,
                    launch.num_stages,
                    flops=products * flops,
                    bytes=6 * size + b * n * h * 8,
                    programs=b * h * blocks,
                    trips=(statistics.fmean(means),) if one else (statistics.fmean(means[:-1] or [0]), means[-1]),
                    shares=() if one else ((blocks - 1) / blocks,),
                )
            )
    return cases
