"""Attention over N queries and M keys, read in place from (B, N, H, D) views.

    S = scale log2(e) Q K^T, masked;  lse = log2(sum(exp2(S)));  O = exp2(S - lse) V

Up to 272 keys (images have 257, captions 77) a head's K and V stay on chip while its queries pass: one program a head,
a whole row of scores in registers, no running softmax. Beyond (audio has 593), a program takes a tile of queries along
the keys. Sizes are those of the inputs, not of whole tiles: keys are held in two parts, 257 as 256 + 16; of queries, up
to 16 that fill no tile go as columns (S^T = K Q^T), which cost next to nothing; a head of 80 is 64 + 16.

Masks hide a key that is padding, or later than a causal query. A query that has no key left is "lost": it sees the
keys that only one of the two masks hides, all alike, as it does where both masks add finfo.min to float32 scores.
Kept for the backward: q, k, v, O, lse (B, H, N). Sums are in float32 (float64 for float64).
Source: Dao, arXiv 2307.08691; Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl
from lbfast.kernels.attention_tiles import HIDDEN, attend, finish, first_kept, load_keys, load_parts, load_queries, step
from lbfast.kernels.primitives import AotCase, accumulator, arch, dot_precision, on_device, programs, split_head

from lbfast.kernels import configs

MAX_DIM = 128
LOG2_E = 1.4426950408889634
MOST_STRIDE = 1 << 22  # numbers from token to token: 272 of them are less than 2^31


@triton.jit(do_not_specialize=["PARTS"])  # a constant 1 there makes the loop longer
def _attention_fwd_head_kernel(
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
    PARTS,
    scale,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    FEW: tl.constexpr,
    COLS_1: tl.constexpr,
    COLS_2: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """A head's COLS_1 + COLS_2 keys on chip; its queries by tiles of ROWS, every PARTS-th, and the last FEW as columns.

    EVEN: tiles are whole. Loop invariants stay in the loop: hoisted addresses of V would take 100 registers. The last
    queries come first: behind the loop ptxas 12.8 loses the base of their factors (`lost_bases` in bench/sass.py).
    """
    pid = tl.program_id(0)
    part = pid % PARTS
    h = (pid // PARTS % H).to(tl.int64)
    b = (pid // PARTS // H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += (b * N * H + h) * D
    lse_ptr += (b * H + h) * N
    if HAS_MASK:
        pad_ptr += b * stride_pb
    MASKED: tl.constexpr = CAUSAL or HAS_MASK
    part_1, part_2 = load_parts(
        k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm, 0, M, COLS_1, COLS_2, RAGGED, D, D_1, D_2, CAUSAL,
        HAS_MASK,
    )  # fmt: skip
    first = first_kept(pad_ptr, stride_pm, M, HAS_MASK, BLOCK_P)
    whole = N // ROWS if FEW else tl.cdiv(N, ROWS)
    if FEW:  # noqa: SIM102 (a constant)
        if part == PARTS - 1:
            o_m = whole * ROWS + tl.arange(0, 16)
            if COLS_2:  # again, for as columns' factor it lies otherwise in shared memory
                part_2 = load_keys(
                    k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm, COLS_1, M, COLS_2, RAGGED, D, D_1, D_2,
                    CAUSAL, HAS_MASK,
                )  # fmt: skip
            queries = load_queries(q_ptr, stride_qn, o_m, o_m < N, first, M, D, D_1, D_2, CAUSAL, HAS_MASK)
            state = attend(queries, part_1, part_2, scale, COLS_2, RAGGED, 0, D_1, D_2, MASKED, PRECISION, ACC)
            finish(o_ptr, lse_ptr, H * D, state, o_m, o_m < N, 0, D, D_1, D_2)
    for tile in tl.range(part, whole, PARTS, disable_licm=True):
        o_m = tile * ROWS + tl.arange(0, ROWS)
        m_m = tl.full([ROWS], True, tl.int1) if EVEN else o_m < N
        queries = load_queries(q_ptr, stride_qn, o_m, m_m, first, M, D, D_1, D_2, CAUSAL, HAS_MASK)
        state = attend(queries, part_1, part_2, scale, COLS_2, RAGGED, 1, D_1, D_2, MASKED, PRECISION, ACC)
        finish(o_ptr, lse_ptr, H * D, state, o_m, m_m, 1, D, D_1, D_2)


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
    COLS_1: tl.constexpr,
    COLS_2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """ROWS queries along the keys, by tiles of COLS. Programs of one head are neighbours and share its keys in L2.

    The last keys, which fill no whole tile, come first, COLS_1 + COLS_2 of them: they begin the running softmax. Behind
    the loop they would make the compiler wait for each product in it.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, ROWS)
    start = pid % blocks * ROWS
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += (b * N * H + h) * D
    lse_ptr += (b * H + h) * N
    if HAS_MASK:
        pad_ptr += b * stride_pb
    MASKED: tl.constexpr = CAUSAL or HAS_MASK
    first = first_kept(pad_ptr, stride_pm, M, HAS_MASK, BLOCK_P)
    o_m = start + tl.arange(0, ROWS).to(tl.int64)
    queries = load_queries(q_ptr, stride_qn, o_m, o_m < N, first, M, D, D_1, D_2, CAUSAL, HAS_MASK)
    whole = M // COLS
    if COLS_1:
        part_1, part_2 = load_parts(
            k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm, whole * COLS, M, COLS_1, COLS_2, True, D, D_1, D_2,
            CAUSAL, HAS_MASK,
        )  # fmt: skip
        state = attend(queries, part_1, part_2, scale, COLS_2, True, 1, D_1, D_2, MASKED, PRECISION, ACC)
    else:
        acc_1 = tl.zeros([ROWS, D_1], ACC)
        acc_2 = tl.zeros([ROWS, D_2 if D_2 else 1], ACC)
        state = acc_1, acc_2, tl.full([ROWS], HIDDEN, ACC), tl.zeros([ROWS], ACC)
    last = whole
    if CAUSAL:
        last = tl.minimum(whole, tl.cdiv(start + ROWS, COLS))
        if HAS_MASK:
            last = tl.where(first > start, whole, last)
    for tile in tl.range(0, last, disable_licm=True):
        keys = load_keys(
            k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn, stride_pm, tile * COLS, M, COLS, False, D, D_1, D_2, CAUSAL,
            HAS_MASK,
        )  # fmt: skip
        state = step(queries, keys, state, scale, D_2, MASKED, PRECISION, ACC)
    finish(o_ptr, lse_ptr, H * D, state, o_m, o_m < N, 1, D, D_1, D_2)


def two_parts(keys: int) -> tuple[int, int]:
    """(COLS_1, COLS_2): the largest power of two in `keys`, and one that covers the rest (0: none). At least 16."""
    return split_head(keys) if keys else (0, 0)


def _constants(n: int, m: int, d: int, launch: configs.Launch, causal: bool, masked: bool, dtype: torch.dtype) -> dict:
    """What both kernels take, and what the one has that the row of the table is for."""
    rows = launch.tile["ROWS"]
    d_1, d_2 = split_head(d)
    constants = {
        "ROWS": rows,
        "BLOCK_P": triton.next_power_of_2(m) if masked else 1,
        "D": d,
        "D_1": d_1,
        "D_2": d_2,
        "CAUSAL": causal,
        "HAS_MASK": masked,
        "PRECISION": dot_precision(dtype),
        "ACC": accumulator(dtype),
    }
    if "COLS" in launch.tile:
        cols_1, cols_2 = two_parts(m % launch.tile["COLS"])
        return constants | {"COLS": launch.tile["COLS"], "COLS_1": cols_1, "COLS_2": cols_2}
    cols_1, cols_2 = two_parts(m)
    few = 0 < n % rows <= 16
    return constants | {
        "EVEN": few or n % rows == 0,
        "FEW": few,
        "COLS_1": cols_1,
        "COLS_2": cols_2,
        "RAGGED": cols_1 + cols_2 != m,
    }


def _launch(arch: str, itemsize: int, n: int, m: int, d: int) -> configs.Launch:
    """The row of the kernel that holds a head's keys on chip, where they fit; else of the one that passes over them."""
    heads = configs.ATTENTION_FWD_HEAD
    head = configs.lookup(heads, f"{arch} large" if d > 64 and f"{arch} large" in heads else arch)
    if itemsize == 2 and max(n, m) <= head.tile["KEYS"] and sum(two_parts(m)) * d <= head.tile["KEYS"] * 80:
        return head
    return configs.lookup(configs.ATTENTION_FWD, "wide" if itemsize > 2 else "large" if d > 80 else arch)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x with D innermost, and tokens so near that a tile's offsets fit into 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < MOST_STRIDE else x.contiguous()


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padded: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """O (B, N, H, D), contiguous, and lse (B, H, N) in base 2. padded: (B, M) bool."""
    b, n, h, d = q.shape
    m = k.shape[1]
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = readable(q), readable(k), readable(v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, n), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if o.numel() == 0:
        return o, lse
    launch = _launch(arch(q.device), q.element_size(), n, m, d)
    constants = _constants(n, m, d, launch, causal, padded is not None, q.dtype)
    tiles = triton.cdiv(n, constants["ROWS"])
    if "COLS" in constants:
        kernel, grid, parts = _attention_fwd_kernel, b * h * tiles, ()
    else:
        # More programs a head, each of which loads the keys, where one a head would leave the GPU idle.
        each = min(max(1, tiles - constants["FEW"]), triton.cdiv(programs(q.device, 2), b * h))
        kernel, grid, parts = _attention_fwd_head_kernel, b * h * each, (each,)
    with on_device(q):
        kernel[(grid,)](
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
            *parts,
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
        launch = _launch(arch, 2, n, n, d)
        constants = _constants(n, n, d, launch, text, text, torch.bfloat16)
        signature = {f"{name}_ptr": "*bf16:16" for name in "qkvo"}
        signature |= {"lse_ptr": "*fp32:16", "scale": "fp32", "N": "i32", "M": "i32"}
        signature |= {f"stride_{name}{axis}": "i32:16" for name in "qkv" for axis in "bnh"}
        signature |= {"H": "i32:16" if h % 16 == 0 else "i32"}
        if text:
            signature |= {"pad_ptr": "*u8:16", "stride_pb": "i32"}
            constants["stride_pm"] = 1
        else:
            signature |= {"stride_pb": "i32:16", "stride_pm": "i32:16"}
            constants["pad_ptr"] = None
        tiles = triton.cdiv(n, constants["ROWS"])
        if "COLS" in constants:
            kernel, programs_each, shares = _attention_fwd_kernel, tiles, ()
            ends = [n if not text else min(n, (tile + 1) * constants["ROWS"]) for tile in range(tiles)]
            whole = n // constants["COLS"]
            trips = statistics.fmean(min(whole, triton.cdiv(end, constants["COLS"])) for end in ends)
        else:
            kernel, programs_each, shares = _attention_fwd_head_kernel, 1, (1,) * constants["FEW"]
            trips = tiles - constants["FEW"]
            signature["PARTS"] = "i32"
        cases.append(
            AotCase(
                f"attention fwd {what} x{b}",
                kernel,
                signature,
                constants,
                launch.num_warps,
                launch.num_stages,
                flops=(2 if text else 4) * b * h * n * n * d,
                bytes=b * n * h * (4 * d * 2 + 4),
                programs=b * h * programs_each,
                trips=(trips,),
                shares=shares,
            )
        )
    return cases
