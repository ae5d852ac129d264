"""Triton's interpreter made quicker, its results unchanged bit by bit.

Most of its time goes into what is found out anew at every operation of every program: types, shapes, patches of the
language, and the overflow of integers, which it looks for number by number and mentions to nobody. Here a type, a shape
and a pair of operands' types are looked at once, and the rest takes shorter ways, the commonest operators those of
tests/quick_operators.py. Whatever is not of the ordinary kind goes Triton's own way, errors included.
tests/interpreter.py installs it.

The objects are shared with Triton's compiler, which tests run beside the interpreter: what only holds where numbers are
numpy's is put on the interpreter's own semantic and builder.
"""

from __future__ import annotations

import builtins
import functools
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from tests import quick_operators

_BITS = {tl.int1.name: 8} | {
    kind.name: kind.primitive_bitwidth
    for kind in vars(tl).values()
    if isinstance(kind, tl.dtype) and hasattr(kind, "primitive_bitwidth") and kind.primitive_bitwidth >= 8
}
"""How many bits a number of numpy's may have in a tensor of that type. Pointers are not among them."""


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


def _patch_attr(obj: object, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A function of the language, called with the interpreter's semantic."""
    function = getattr(member, "__wrapped__", member)  # what wraps it looks for the semantic, and does no more

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    quick = quick_operators.OPERATORS.get(name) if obj is tl.tensor else None
    scope.set_attr(obj, name, quick(call) if quick else call)


_Its: Any = type(interpreter.interpreter_semantic) if hasattr(interpreter, "_LangPatchScope") else object


class _Semantic(_Its):
    """What an operation does with its operands' types, known after the first pair of its kind."""

    _results: dict[Any, tl.dtype | None] = {}  # noqa: RUF012  (of operands' types: the type of both; None: each its own)

    def to_tensor(self, x: Any, check_type: bool = True) -> Any:
        return x if type(x) is tl.tensor else super().to_tensor(x, check_type)

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *flags: bool, **named: bool) -> tuple[Any, Any]:
        if named or not (type(lhs) is type(rhs) is tl.tensor):
            return super().binary_op_type_checking_impl(lhs, rhs, *flags, **named)
        key = lhs.dtype.name, rhs.dtype.name, *flags
        if key not in self._results:
            typed = super().binary_op_type_checking_impl(lhs, rhs, *flags)
            same = typed[0].dtype == typed[1].dtype and not typed[0].dtype.is_ptr()
            self._results[key] = typed[0].dtype if same else None
            return typed
        result = self._results[key]
        if result is not None:
            lhs, rhs = self.cast(lhs, result), self.cast(rhs, result)
        return self.broadcast_impl_value(lhs, rhs)

    def binary_op_sanitize_overflow_impl(self, *operands: Any) -> None:
        """What it finds is only said to who debugs."""
        if self.builder.options.debug:
            super().binary_op_sanitize_overflow_impl(*operands)

    def cast(self, input: Any, dst_ty: Any, *rounding: Any) -> Any:
        if input.dtype is dst_ty:
            return input
        quick = None if rounding else quick_operators.cast(input, dst_ty.scalar)
        return super().cast(input, dst_ty, *rounding) if quick is None else quick

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        quick = quick_operators.where(condition, x, y)
        return super().where(condition, x, y) if quick is None else quick

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if not (type(lhs.type) is type(rhs.type) is tl.block_type):
            return super().broadcast_impl_value(lhs, rhs)
        left, right = lhs.type.shape.values, rhs.type.shape.values
        if left == right:
            return lhs, rhs
        both = [max(a, b) for a, b in zip(left, right)]
        if len(left) != len(right) or any(size not in (1, most) for size, most in zip(left + right, both + both)):
            return super().broadcast_impl_value(lhs, rhs)
        return self._broadcast(lhs, both), self._broadcast(rhs, both)

    def _broadcast(self, x: Any, shape: list[int]) -> Any:
        if x.type.shape.values == shape:
            return x
        handle = TensorHandle(np.broadcast_to(x.handle.data, shape), x.handle.dtype.scalar)
        return self.tensor(handle, tl.block_type(x.dtype, shape))

    def expand_dims(self, input: Any, axis: int) -> Any:
        if type(input.type) is not tl.block_type:
            return super().expand_dims(input, axis)
        shape = input.type.shape.values.copy()
        shape.insert(axis, 1)
        handle = TensorHandle(input.handle.data.reshape(shape), input.handle.dtype.scalar)
        return self.tensor(handle, tl.block_type(input.dtype, shape))


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
        self.handle, self.type = handle, type
        if type.__class__ is tl.block_type:
            self.dtype = type.element_ty
            self.shape, self.numel = constants(builtins.tuple(type.shape.values))
        else:
            self.dtype = type.scalar
            self.shape, self.numel = constants(())

    return construct


def _known_block(original: Any) -> Any:
    """The constructor of block types; a shape is looked at once."""
    known: dict[Any, dict[str, Any]] = {}

    def construct(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if type(shape) is tl.tuple else shape
        for size in sizes:
            if type(size) is not int:
                return original(self, element_ty, shape)
        key = element_ty.name, *sizes
        if key not in known:
            original(self, element_ty, shape)
            known[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        self.element_ty = element_ty
        self.__dict__.update(known[key])

    return construct


def _same_in_the_interpreter(original: Any) -> Any:
    """to_ir of types that are their own there."""

    def to_ir(self: Any, builder: Any) -> Any:
        return self if type(builder) is InterpreterBuilder else original(self, builder)

    return to_ir


def _equal_by_name(original: Any) -> Any:
    """== of scalar types; what is no type goes Triton's way."""

    def equal(self: Any, other: Any) -> Any:
        return self is other or (self.name == other.name if type(other) is tl.dtype else original(self, other))

    return equal


def _handle(self: TensorHandle, data: np.ndarray, dtype: Any, attr: dict | None = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if 8 * data.itemsize > _BITS.get(dtype.name, math.inf):
        self.__post_init__()


def _binary_op(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
    output, dtype = op(lhs.data, rhs.data), lhs.dtype.scalar
    if 8 * output.itemsize > _BITS.get(dtype.name, math.inf):
        output = output.astype(interpreter._get_np_dtype(dtype))
    return TensorHandle(output, dtype)


def _unwrapped(original: Any) -> Any:
    plain = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, bool, float, type(None)}

    def unwrap(value: Any) -> Any:
        kind = type(value)
        return value if kind in plain else value.value if kind is tl.constexpr else original(value)

    return unwrap


def _item(original: Any) -> Any:
    """[] of the language's tuples."""

    def item(self: Any, index: Any) -> Any:
        return self.values[index] if type(index) is int else original(self, index)

    return item


def _splat(original: Any) -> Any:
    def create_splat(self: InterpreterBuilder, kind: Any, scalar: TensorHandle) -> TensorHandle:
        if type(scalar.dtype) is tl.block_type or scalar.data.size != 1:
            return original(self, kind, scalar)
        dtype = interpreter._get_np_dtype(scalar.dtype)
        return TensorHandle(np.full(kind.shape.values, scalar.data, dtype), scalar.dtype.scalar)

    return create_splat


def install() -> None:
    """For all kernels from here on; older Tritons restore nothing, and have no class of semantics: they stay slow."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    GridExecutor.__call__ = _patched_once(GridExecutor.__call__)
    interpreter._patch_attr = _patch_attr
    interpreter.interpreter_semantic.__class__ = _Semantic
    interpreter._get_np_dtype = _numpy_dtype(interpreter._get_np_dtype)
    TensorHandle.__init__ = _handle
    InterpreterBuilder.binary_op = _binary_op
    quick_operators.install()
    InterpreterBuilder.create_splat = _splat(InterpreterBuilder.create_splat)
    tl.core._unwrap_if_constexpr = _unwrapped(tl.core._unwrap_if_constexpr)
    tl.tuple.__getitem__ = _item(tl.tuple.__getitem__)
    tl.tensor.__init__ = _tensor_with_known_shapes(tl.tensor.__init__)
    tl.block_type.__init__ = _known_block(tl.block_type.__init__)
    for kind in (tl.block_type, tl.pointer_type):
        kind.to_ir = _same_in_the_interpreter(kind.to_ir)
    tl.dtype.__eq__ = _equal_by_name(tl.dtype.__eq__)
