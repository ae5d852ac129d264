"""What the kernels share: jit helpers, the description of a compilation ahead of time, the name of an architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

FLOAT8_ARCHS = ("sm_89", "sm_90", "sm_100", "sm_120")
"""Those whose instructions round to e4m3."""


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One kernel at one of LanguageBind's shapes, to be compiled without a GPU. `kernels/X.py: aot_cases(arch)`.

    name: what to print, shape included. kernel: the jit function. signature: argument -> Triton's type ("*bf16", "i32",
    "fp32"), with ":16" behind it where the address or the number is a multiple of 16, as the launcher would find it;
    constants: the other arguments (constexpr, and None for tensors left out) -> value.
    flops, bytes: what one launch at this shape must do and move, for the floor.
    spilt: bytes that a thread may spill.
    programs: the launch's grid, 0 where `bench.resources` is not to count instructions. To count with, in the source's
    order, each function at each of its calls, without what constants decide: trips, how often a loop's body runs when
    the loop is reached, and shares, how many of the programs that reach an `if` take its first arm; means where
    programs differ.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    flops: float
    bytes: float
    programs: int = 0
    trips: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    spilt: int = 0


MULTIPROCESSORS = {"sm_80": 108, "sm_86": 72, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
"""Of the GPUs that bench/resources.py names, for the grids of cases."""


@functools.cache
def _arch(device_index: int) -> str:
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...: the key of the tables in configs.py; "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    return _arch(torch.cuda.current_device() if device.index is None else device.index)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes tensor's GPU the current one, where Triton launches; nothing to do for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def programs(device: torch.device, per_sm: int) -> int:
    """How many programs fill the GPU `per_sm` times over; a small number for the interpreter."""
    if device.type != "cuda":
        return 3
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Sums are float32, float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 as torch's own matmuls are set to do it; the other types know one way."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


# NVIDIA's approximations, within 2 units in the last place; numbers under 2^-126 become 0. Elsewhere Triton's own.


def approximate(tensor: torch.Tensor) -> bool:
    """APPROX of the functions below, for kernels whose results are rounded to 16 bits."""
    return tensor.element_size() <= 2 and arch(tensor.device).startswith("sm_")


@triton.jit
def exp2(x, APPROX: tl.constexpr):
    """2^x, without the repair of tiny results that tl.exp2 carries."""
    return libdevice.exp2(x) if APPROX else tl.exp2(x)


@triton.jit
def divide(a, b, APPROX: tl.constexpr):
    """a / b, without the repair of b outside [2^-126, 2^126]; beyond, 0."""
    return libdevice.fast_dividef(a, b) if APPROX else a / b


# Head dims in two parts, powers of two: 80 is 64 + 16 rather than a padded 128.


def split_head(d: int) -> tuple[int, int]:
    """(D_1, D_2): the largest power of two in d, and one that covers the rest (0: nothing is left). At least 16."""
    d_1 = max(16, 1 << (d.bit_length() - 1))
    rest = d - d_1
    return d_1, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


@triton.jit
def load_rows(ptr, o_row, m_row, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr):
    """Rows of D at offsets o_row, 0 where not m_row: [ROWS, D_1] and [ROWS, D_2] (the first again where D_2 is 0)."""
    o_1 = tl.arange(0, D_1)
    m_1 = m_row[:, None] if D_1 <= D else m_row[:, None] & (o_1 < D)[None, :]
    part_1 = tl.load(ptr + o_1[None, :] + o_row[:, None], mask=m_1, other=0.0)
    part_2 = part_1
    if D_2:
        o_2 = D_1 + tl.arange(0, D_2)
        m_2 = m_row[:, None] if D_1 + D_2 <= D else m_row[:, None] & (o_2 < D)[None, :]
        part_2 = tl.load(ptr + o_2[None, :] + o_row[:, None], mask=m_2, other=0.0)
    return part_1, part_2


@triton.jit
def store_rows(ptr, o_row, m_row, part_1, part_2, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr):
    """Writes what load_rows would read, rounded to the pointer's type."""
    o_1 = tl.arange(0, D_1)
    m_1 = m_row[:, None] if D_1 <= D else m_row[:, None] & (o_1 < D)[None, :]
    tl.store(ptr + o_1[None, :] + o_row[:, None], part_1.to(ptr.dtype.element_ty), mask=m_1)
    if D_2:
        o_2 = D_1 + tl.arange(0, D_2)
        m_2 = m_row[:, None] if D_1 + D_2 <= D else m_row[:, None] & (o_2 < D)[None, :]
        tl.store(ptr + o_2[None, :] + o_row[:, None], part_2.to(ptr.dtype.element_ty), mask=m_2)


# Products of tiles in two parts of D. A side of one row, such as a class token's key, is multiplied out, not padded.


@triton.jit
def dot_nt(a_1, a_2, b_1, b_2, D_2: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a b^T: a [ROWS, D_1] and [ROWS, D_2], b [COLS, D_1] and [COLS, D_2] -> [ROWS, COLS] in ACC."""
    if b_1.shape[0] == 1:
        out = tl.sum(a_1.to(ACC) * b_1.to(ACC), 1)
        if D_2:
            out += tl.sum(a_2.to(ACC) * b_2.to(ACC), 1)
        out = out[:, None]
    elif a_1.shape[0] == 1:
        out = tl.sum(a_1.to(ACC) * b_1.to(ACC), 1)
        if D_2:
            out += tl.sum(a_2.to(ACC) * b_2.to(ACC), 1)
        out = out[None, :]
    else:
        out = tl.dot(a_1, tl.trans(b_1), input_precision=PRECISION, out_dtype=ACC)
        if D_2:
            out = tl.dot(a_2, tl.trans(b_2), out, input_precision=PRECISION, out_dtype=ACC)
    return out


@triton.jit
def dot_nn(p, v_1, v_2, acc_1, acc_2, D_2: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + p v: p [ROWS, COLS], v [COLS, D_1] and [COLS, D_2] -> acc [ROWS, D_1] and [ROWS, D_2] in ACC."""
    if v_1.shape[0] == 1:
        acc_1 += p * v_1.to(ACC)
        if D_2:
            acc_2 += p * v_2.to(ACC)
    else:
        p = p.to(v_1.dtype)
        acc_1 = tl.dot(p, v_1, acc_1, input_precision=PRECISION, out_dtype=ACC)
        if D_2:
            acc_2 = tl.dot(p, v_2, acc_2, input_precision=PRECISION, out_dtype=ACC)
    return acc_1, acc_2


@triton.jit
def dot_tn(v_1, v_2, p, acc_1, acc_2, D_2: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + v^T p: v [ROWS, D_1] and [ROWS, D_2], p [ROWS, COLS] -> acc [D_1, COLS] and [D_2, COLS] in ACC."""
    if v_1.shape[0] == 1:
        acc_1 += tl.trans(v_1.to(ACC)) * p
        if D_2:
            acc_2 += tl.trans(v_2.to(ACC)) * p
    else:
        p = p.to(v_1.dtype)
        acc_1 = tl.dot(tl.trans(v_1), p, acc_1, input_precision=PRECISION, out_dtype=ACC)
        if D_2:
            acc_2 = tl.dot(tl.trans(v_2), p, acc_2, input_precision=PRECISION, out_dtype=ACC)
    return acc_1, acc_2
