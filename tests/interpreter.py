"""bfloat16 for Triton's interpreter, which alone rounds it wrongly and multiplies its bits as integers.

`install()` puts it right; tests/fixtures.py does that wherever kernels are interpreted. Then

- casts from and to bfloat16 round to nearest, ties to even, and keep infinities, NaN and denormals; what is no float32
  passes through float32, as in Triton and torch;
- casts to float8 e4m3 round as torch's: Triton's own lose a carry, and what is subnormal;
- tl.dot multiplies exactly and sums in the accumulator's type;
- +, -, *, /, %, comparisons, maximum, minimum and clamp round once, as a GPU does. Triton has no exp2, sqrt and so on
  of bfloat16; maxima along an axis are float32;
- sums along an axis round after each addition, by halves: who wants float32's says so.

An op's tests take bfloat16 as another dtype of their matrix, without a condition: DTYPES = {"triton": (torch.float32,
torch.float16, torch.bfloat16), ...}, with the reference and plain torch given the same bfloat16 inputs; `testing.
assert_within_budget` has its rounding. tests/test_temporal_attention.py is an example.

Handles keep the bits as numpy's uint16, as Triton's own do: loads, stores, selection and movement are theirs.
tests/quick_interpreter.py, which is installed with it, makes the interpreter quicker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from tests import quick_interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16's bits (uint16) -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray, towards_zero: bool = False) -> np.ndarray:
    """float32 (or what numpy makes of others) -> bfloat16's bits (uint16)."""
    with np.errstate(over="ignore"):
        values = np.asarray(values).astype(np.float32)
    bits = values.view(np.uint32)
    up = np.uint32(0) if towards_zero else np.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = ((bits + up) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: TensorHandle) -> bool:
    """A comparison's handle has its operands' type, and bools in it."""
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _numbers(handle: TensorHandle) -> TensorHandle:
    """As float32 where it is bfloat16."""
    return TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _rounded(handle: TensorHandle) -> TensorHandle:
    """float32 as bfloat16; truths as they are."""
    return TensorHandle(narrow(handle.data), tl.bfloat16) if handle.data.dtype == np.float32 else handle


def _in_float32(name: str) -> None:
    """The builder's operation, on bfloat16 by way of float32."""
    original = getattr(InterpreterBuilder, name)

    def operation(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        for x in operands:
            if type(x) is TensorHandle and _is_bfloat16(x):
                break
        else:
            return original(self, *operands)
        return _rounded(original(self, *(_numbers(x) if isinstance(x, TensorHandle) else x for x in operands)))

    setattr(InterpreterBuilder, name, operation)


def _dot(original: Any) -> Any:
    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, _numbers(a), _numbers(b), *rest)

    return create_dot


def _cast(original: Any) -> Any:
    def cast(self: InterpreterBuilder, handle: TensorHandle, wanted: tl.dtype, *rounding: Any) -> TensorHandle:
        to = wanted.scalar
        if to == tl.float8e4nv and not _is_bfloat16(handle):
            rounded = torch.from_numpy(np.asarray(handle.data, np.float32)).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), to)
        if to == tl.bfloat16:
            if _is_bfloat16(handle):
                return handle
            return TensorHandle(narrow(handle.data, ir.ROUNDING_MODE.RTZ in rounding), to)
        if not _is_bfloat16(handle):
            return original(self, handle, wanted, *rounding)
        return _numbers(handle) if to == tl.float32 else original(self, _numbers(handle), wanted, *rounding)

    return cast


def _sum(original: Any) -> Any:
    def sum(self: ReduceOps, x: Any) -> Any:
        if not _is_bfloat16(x.handle):
            return original(self, x)
        data = x.handle.data.reshape(-1) if self.axis is None else np.moveaxis(x.handle.data, self.axis, 0)
        while len(data) > 1:
            half = len(data) // 2
            data = narrow(widen(data[:half]) + widen(data[half:]))
        axes = tuple(range(x.handle.data.ndim)) if self.axis is None else self.axis
        return self.to_tensor(np.expand_dims(data[0], axes) if self.keep_dims else data[0], x.dtype)

    return sum


def _refuse(self: InterpreterBuilder, *_: Any) -> None:
    raise NotImplementedError("an atomic sum of bfloat16 in the interpreter")


def install() -> None:
    """For all kernels from here on; once is enough."""
    if hasattr(InterpreterBuilder, "get_bf16"):
        return
    quick_interpreter.install()
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf"):
        _in_float32(name)
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _cast(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    ReduceOps.sum = _sum(ReduceOps.sum)
    atomic = InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: InterpreterBuilder, kind: Any, pointer: Any, value: TensorHandle, *rest: Any) -> Any:
        return (_refuse if _is_bfloat16(value) else atomic)(self, kind, pointer, value, *rest)

    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value])), tl.bfloat16)
