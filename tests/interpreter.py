"""bfloat16 for Triton's interpreter, which alone rounds it wrongly and multiplies its bits as integers.

`install()` puts it right; tests/conftest.py does that wherever kernels are interpreted. Then

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

And it makes the interpreter quicker, results unchanged: most of its time goes into types, shapes and patches of the
language that are made anew at every operation, and into the overflow of integers that it looks for number by number.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import operator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle


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
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


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
        if not any(isinstance(x, TensorHandle) and _is_bfloat16(x) for x in operands):
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


def _patched_once(launch: Any) -> Any:
    """Triton's interpreter patches its language at every call of a device function: here once a launch.

    What it patches follows from which of its modules a file has, and from what is patched already, which it passes
    over: it is looked for once each.
    """
    patch, patches = interpreter._patch_lang, {}

    @functools.cache
    def seen_by(function: Any) -> tuple[bool, ...]:
        return tuple(any(value is lang for value in function.__globals__.values()) for lang in (tl, tl.core))

    def launch_patched(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        scope = interpreter._LangPatchScope()  # the launch restores it
        patched: tuple[Any, ...] = ()

        def patch_lang(function: Any) -> Any:
            nonlocal patched
            seen = seen_by(function)
            if seen in patched:
                return scope
            patched += (seen,)
            if patched in patches:
                for obj, name, value in patches[patched]:
                    scope.set_attr(obj, name, value)
            else:
                changes = patch(function)._changes
                scope._changes += changes
                patches[patched] = [(obj, name, vars(obj)[name]) for obj, name, _ in changes]
            return scope

        interpreter._patch_lang = patch_lang
        try:
            launch(self, *args, **kwargs)
        finally:
            interpreter._patch_lang = patch

    return launch_patched


def _sanitize_overflow(original: Any) -> Any:
    """Looks at all numbers only where the operands' ranges leave room for one that is too large."""

    def sanitize(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        kind, function = lhs.type.scalar, getattr(operator, operation.__name__, None)
        if kind.is_int() and 8 <= kind.int_bitwidth < 64 and function and lhs.handle.data.size:
            ends = [(int(x.handle.data.min()), int(x.handle.data.max())) for x in (lhs, rhs)]
            extremes = [function(a, b) for a, b in itertools.product(*ends)]
            if kind.get_int_min_value() <= min(extremes) and max(extremes) <= kind.get_int_max_value():
                return
        original(self, lhs, rhs, operation)

    return sanitize


def _numpy_dtype(original: Any) -> Any:
    """By the scalar type's name, once each."""
    known: dict[str, Any] = {}

    def dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in known:
            known[name] = original(type)
        return known[name]

    return dtype


def _tensor_with_known_shapes(original: Any) -> Any:
    """The constructor; a shape's constants are made once."""

    @functools.cache
    def constants(shape: tuple[int, ...]) -> tuple[Any, Any]:
        like = tl.tensor.__new__(tl.tensor)
        original(like, None, tl.block_type(tl.int32, list(shape)) if shape else tl.int32)
        return like.shape, like.numel

    def construct(self: Any, handle: Any, type: Any) -> None:
        shape = builtins.tuple(type.shape) if type.is_block() else ()
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(shape)

    return construct


def _known_block(original: Any) -> Any:
    """The constructor of block types; a shape is looked at once."""
    known: dict[Any, dict[str, Any]] = {}

    def construct(self: Any, element_ty: Any, shape: Any) -> None:
        if not all(type(size) is int for size in shape):
            return original(self, element_ty, shape)
        key = element_ty.name, builtins.tuple(shape)
        if key not in known:
            original(self, element_ty, shape)
            known[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        self.element_ty = element_ty
        self.__dict__.update(known[key])

    return construct


def _refuse(self: InterpreterBuilder, *_: Any) -> None:
    raise NotImplementedError("an atomic sum of bfloat16 in the interpreter")


def install() -> None:
    """For all kernels from here on; once is enough."""
    if hasattr(InterpreterBuilder, "get_bf16"):
        return
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf"):
        _in_float32(name)
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _cast(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    ReduceOps.sum = _sum(ReduceOps.sum)
    if hasattr(interpreter, "_LangPatchScope"):  # older ones restore nothing, and have no class of semantics
        GridExecutor.__call__ = _patched_once(GridExecutor.__call__)
        semantic = type(interpreter.interpreter_semantic)
        semantic.binary_op_sanitize_overflow_impl = _sanitize_overflow(semantic.binary_op_sanitize_overflow_impl)
        tl.block_type.__init__ = _known_block(tl.block_type.__init__)
        tl.tensor.__init__ = _tensor_with_known_shapes(tl.tensor.__init__)
        interpreter._get_np_dtype = _numpy_dtype(interpreter._get_np_dtype)
    atomic = InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: InterpreterBuilder, kind: Any, pointer: Any, value: TensorHandle, *rest: Any) -> Any:
        return (_refuse if _is_bfloat16(value) else atomic)(self, kind, pointer, value, *rest)

    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value])), tl.bfloat16)
