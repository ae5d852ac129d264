"""The backward of attention, from q, k, v, O and lse.

    P = exp2(S - lse);  delta = rowsum(dO O);  dS = P (dO V^T - delta)
    dV = P^T dO;  dQ = scale dS K;  dK = scale dS^T Q

Two forms; a table says which sizes take the first.
- Whole: one program a head and five products; attention_whole_bwd.py.
- Split, for the others: a launch over tiles of queries gives dQ, another over tiles of keys dK and dV. Each computes P
  again: seven products. Tiles of rows and of columns are whole, and so without masks, but for the last, of 16, 32, ...:
  no sequence is padded to 128. The first launch leaves -lse and delta where the second reads them as vectors;
  attention_split_bwd.py.
Each sum has its order: the result is the same every time. Source: Dao, arXiv 2307.08691.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import triton
from lbfast.kernels.attention import LOG2_E, SHAPES, readable
from lbfast.kernels.attention_split_bwd import _attention_bwd_dkdv_kernel, _attention_bwd_dq_kernel
from lbfast.kernels.attention_whole_bwd import _attention_bwd_whole_kernel
from lbfast.kernels.primitives import (
    AotCase,
    accumulator,
    arch,
    dot_precision,
    on_device,
    split_head,
)

from lbfast.kernels import configs


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
    if itemsize > 2 and name != "interpreter":
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
    rows, cols = launch.tile["ROWS"], launch.tile["COLS"]
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
                    spilt=whole.spilt,
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
                    spilt=launch.spilt,
                )
            )
    return cases
