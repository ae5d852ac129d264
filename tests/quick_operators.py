"""Operators of Triton's interpreter by a short way: what they compute is numpy's, as on Triton's own, bit by bit.

Triton's way of `x + y` asks both for their types, casts, splats and broadcasts them, and makes a tensor of what comes
of it. Where both are tensors of one ordinary type, or one is a number, numpy does all of that in one call. Whatever is
not so goes Triton's own way: bfloat16, unsigned integers, truths in arithmetic.

Loads and stores of many numbers are numpy's, too: Triton's take twenty times as long for each.
tests/quick_interpreter.py installs all this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_FLOATS = {tl.float16.name: np.float16, tl.float32.name: np.float32, tl.float64.name: np.float64}
_INTEGERS = {tl.int32.name: np.int32, tl.int64.name: np.int64}
_LEAST, _MOST = -(2**31), 2**31 - 1
_MANY = 512
"""Numbers of a block, from which numpy's loads and stores are the quicker ones."""


class _Memory:
    """What is at an address, for numpy."""


@functools.cache
def _constant(kind: str, value: float) -> Any:
    return (_FLOATS.get(kind) or _INTEGERS[kind])(value if value else 0)  # as Triton's: -0.0 is 0


@functools.cache
def _members(kind: tl.dtype, name: str, shape: tuple[int, ...] | None) -> dict[str, Any]:
    """A tensor's, but for its handle; shape None: of a single number."""
    like = vars(tl.tensor(None, kind if shape is None else tl.block_type(kind, list(shape)))).copy()
    del like["handle"]
    return like


def _tensor(data: np.ndarray, dtype: Any, members: dict[str, Any]) -> Any:
    handle, tensor = TensorHandle.__new__(TensorHandle), tl.tensor.__new__(tl.tensor)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    tensor.__dict__.update(members)
    tensor.handle = handle
    return tensor


def _shape(x: Any, y: Any, data: np.ndarray) -> tuple[int, ...] | None:
    return data.shape if x.type.__class__ is tl.block_type or y.type.__class__ is tl.block_type else None


def _alike(x: Any, y: Any) -> bool:
    """Whether numpy broadcasts the two as Triton does: it refuses what Triton refuses, but for another rank."""
    first, second = x.handle.data, y.handle.data
    if first.shape == second.shape or not (x.type.__class__ is y.type.__class__ is tl.block_type):
        return True
    return first.ndim == second.ndim and all(
        a == b or a == 1 or b == 1 for a, b in zip(first.shape, second.shape, strict=True)
    )


_KINDS: dict[str, tl.dtype] = {kind.name: kind for kind in (tl.float16, tl.float32, tl.float64, tl.int32, tl.int64)}
_ORDINARY, _WIDE = {*_FLOATS, *_INTEGERS}, {tl.float32.name, tl.float64.name}


def _fits(number: Any, kind: str) -> bool:
    """Whether it becomes one of that ordinary type beside a tensor of it."""
    return (kind in _FLOATS and type(number) in (int, float)) or (type(number) is int and _LEAST <= number <= _MOST)


def _arithmetic(function: Any, every: bool, swapped: bool, slow: Any) -> Any:
    """x + y and its like. every: not of float32 and float64 alone."""

    def operation(x: Any, y: Any, _semantic: Any = None) -> Any:
        mine = x.dtype.name
        y = y.value if type(y) is tl.constexpr else y
        kinds = _ORDINARY if every else _WIDE
        if type(y) is tl.tensor:
            other = y.dtype.name
            if mine == other:
                kind = mine
            elif mine in _INTEGERS and other in _INTEGERS:
                kind = tl.int64.name
            else:
                return slow(x, y)
            if kind not in kinds or not _alike(x, y):
                return slow(x, y)
            first, second = (y.handle, x.handle) if swapped else (x.handle, y.handle)
            data = function(first.data, second.data)
            members = _members(_KINDS[kind], kind, _shape(x, y, data))
            return _tensor(data, first.dtype.scalar if mine == other else tl.int64, members)
        if mine not in kinds or not _fits(y, mine):
            return slow(x, y)
        constant = _constant(mine, y)
        first, second = (constant, x.handle.data) if swapped else (x.handle.data, constant)
        dtype = _KINDS[mine] if swapped else x.handle.dtype.scalar
        return _tensor(function(first, second), dtype, _members_of(x))

    return operation


def _members_of(x: Any) -> dict[str, Any]:
    """Its handle among them, in whose place another comes."""
    return x.__dict__


def _plus(swapped: bool, slow: Any) -> Any:
    """As other sums, and addresses' with offsets."""
    numbers = _arithmetic(np.add, True, swapped, slow)

    def operation(x: Any, y: Any, _semantic: Any = None) -> Any:
        if type(y) is not tl.tensor or x.dtype.__class__ is not tl.pointer_type or y.dtype.name not in _INTEGERS:
            return numbers(x, y)
        if not _alike(x, y) or x.dtype.element_ty.__class__ is not tl.dtype:
            return slow(x, y)
        size = max(1, x.dtype.element_ty.primitive_bitwidth // 8)
        offset = y.handle.data.astype(np.uint64)
        if size > 1:
            offset *= np.uint64(size)
        data = x.handle.data + offset
        if data.shape == x.handle.data.shape and x.type.__class__ is tl.block_type:
            members = _members_of(x)
        else:
            shape = _shape(x, y, data)
            members = vars(tl.tensor(None, x.dtype if shape is None else tl.block_type(x.dtype, list(shape))))
        return _tensor(data, x.handle.dtype, members)

    return operation


def _comparison(function: Any, slow: Any) -> Any:
    def operation(x: Any, y: Any, _semantic: Any = None) -> Any:
        kind = x.dtype.name
        y = y.value if type(y) is tl.constexpr else y
        if type(y) is tl.tensor:
            if kind != y.dtype.name or kind not in _ORDINARY or not _alike(x, y):
                return slow(x, y)
            data, single = function(x.handle.data, y.handle.data), _shape(x, y, x.handle.data) is None
        else:  # Triton makes a tensor of the number before it looks for a type of both
            whole = type(y) is int and _LEAST <= y <= _MOST
            if not (whole and kind in _INTEGERS) and not (kind == tl.float32.name and (whole or _of_float32(y))):
                return slow(x, y)
            data, single = function(x.handle.data, _constant(kind, y)), x.type.__class__ is not tl.block_type
        members = _members(tl.int1, tl.int1.name, None if single else data.shape)
        return _tensor(data, x.handle.dtype.scalar, members)

    return operation


def _of_float32(y: Any) -> bool:
    return type(y) is float and (y == 0 or 2**-126 <= abs(y) <= (2 - 2**-23) * 2**127)


def _of_truths(function: Any, slow: Any) -> Any:
    """x & y and x | y."""

    def operation(x: Any, y: Any, _semantic: Any = None) -> Any:
        if type(y) is not tl.tensor or not x.dtype.name == y.dtype.name == tl.int1.name or not _alike(x, y):
            return slow(x, y)
        if x.handle.data.dtype != bool or y.handle.data.dtype != bool:
            return slow(x, y)
        data = function(x.handle.data, y.handle.data)
        return _tensor(data, x.handle.dtype.scalar, _members(tl.int1, tl.int1.name, _shape(x, y, data)))

    return operation


def _item(slow: Any) -> Any:
    """x[:, None] and its like."""
    everything = slice(None)

    def operation(x: Any, slices: Any, _semantic: Any = None) -> Any:
        if type(slices) is not tuple or x.type.__class__ is not tl.block_type:
            return slow(x, slices)
        for part in slices:
            if part is not None and part != everything:
                return slow(x, slices)
        handle = x.handle
        data = handle.data[slices]
        kind = x.dtype
        if kind.__class__ is tl.dtype:
            members = _members(kind, kind.name, data.shape)
        else:
            members = vars(tl.tensor(None, tl.block_type(kind, list(data.shape))))
        return _tensor(data, handle.dtype.scalar, members)

    return operation


OPERATORS: dict[str, Callable[[Any], Any]] = {
    "__add__": functools.partial(_plus, False),
    "__radd__": functools.partial(_plus, True),
    "__sub__": functools.partial(_arithmetic, np.subtract, True, False),
    "__rsub__": functools.partial(_arithmetic, np.subtract, True, True),
    "__mul__": functools.partial(_arithmetic, np.multiply, True, False),
    "__rmul__": functools.partial(_arithmetic, np.multiply, True, True),
    "__truediv__": functools.partial(_arithmetic, np.divide, False, False),
    "__rtruediv__": functools.partial(_arithmetic, np.divide, False, True),
    "__lt__": functools.partial(_comparison, np.less),
    "__le__": functools.partial(_comparison, np.less_equal),
    "__gt__": functools.partial(_comparison, np.greater),
    "__ge__": functools.partial(_comparison, np.greater_equal),
    "__eq__": functools.partial(_comparison, np.equal),
    "__ne__": functools.partial(_comparison, np.not_equal),
    "__and__": functools.partial(_of_truths, np.bitwise_and),
    "__or__": functools.partial(_of_truths, np.bitwise_or),
    "__getitem__": _item,
}
"""Of a tensor's operator: Triton's way -> the short one, which takes it where it must."""


_CASTS = {
    (tl.int32.name, tl.int64.name),
    (tl.int64.name, tl.int32.name),
    (tl.int32.name, tl.float32.name),
    (tl.float16.name, tl.float32.name),
    (tl.float32.name, tl.float16.name),
}


def cast(x: Any, kind: tl.dtype) -> Any:
    """x as another ordinary type; None: Triton's way must be taken."""
    if (x.dtype.name, kind.name) not in _CASTS:
        return None
    data = x.handle.data
    shape = data.shape if x.type.__class__ is tl.block_type else None
    numbers = data.astype(_FLOATS.get(kind.name) or _INTEGERS[kind.name])
    return _tensor(numbers, _KINDS[kind.name], _members(_KINDS[kind.name], kind.name, shape))


def where(condition: Any, x: Any, y: Any) -> Any:
    """Of x and y of one ordinary type, or a number each; None: Triton's way must be taken."""
    like = x if type(x) is tl.tensor else y
    if type(like) is not tl.tensor or condition.dtype.name != tl.int1.name or condition.handle.data.dtype != bool:
        return None
    kind = like.dtype.name
    if kind not in _ORDINARY:
        return None
    shape, given = None, []
    for one in (condition, x, y):
        if type(one) is tl.tensor:
            if one is not condition and one.dtype.name != kind:
                return None
            if one.type.__class__ is tl.block_type:
                if shape is not None and shape != one.handle.data.shape:
                    return None
                shape = one.handle.data.shape
            given.append(one.handle.data)
        elif _fits(one, kind):
            given.append(_constant(kind, one))
        else:
            return None
    return _tensor(np.where(*given), _KINDS[kind], _members(_KINDS[kind], kind, shape))


def _located(addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Memory as integers of `size` bytes, and where in it the addresses are; None where some lie between two."""
    first = int(np.minimum.reduce(addresses, None))
    offsets = (addresses - np.uint64(first)).view(np.int64)
    if size > 1:
        if int(np.bitwise_or.reduce(offsets, None)) & (size - 1):
            return None
        offsets >>= size.bit_length() - 1
    memory: Any = _Memory()
    count = int(np.maximum.reduce(offsets, None)) + 1
    memory.__array_interface__ = {"shape": (count,), "typestr": f"<u{size}", "data": (first, False), "version": 3}
    return np.asarray(memory), offsets


def _loads(original: Any) -> tuple[Any, Any]:
    def masked(self: InterpreterBuilder, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        addresses, wanted = pointers.data, mask.data
        if addresses.size < _MANY or wanted.dtype != bool or addresses.shape != wanted.shape:
            return original(self, pointers, mask, other, *rest)
        if wanted.all():
            return whole(self, pointers, *rest)
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        some = addresses[wanted]
        found = _located(some, dtype.itemsize) if some.size else ()
        if found is None or (other is not None and other.data.shape != addresses.shape):
            return original(self, pointers, mask, other, *rest)
        data = np.zeros(addresses.shape, dtype) if other is None else np.array(other.data, dtype, order="C")
        if found:
            memory, offsets = found
            data[wanted] = memory[offsets].view(dtype)
        return TensorHandle(data, kind)

    def whole(self: InterpreterBuilder, pointers: Any, *rest: Any) -> Any:
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        addresses = pointers.data
        found = _located(addresses, dtype.itemsize) if addresses.size >= _MANY else None
        if found is None:
            mask = TensorHandle(np.ones(addresses.shape, dtype=bool), tl.int1)
            return original(self, pointers, mask, None, *rest)
        memory, offsets = found
        return TensorHandle(memory[np.ascontiguousarray(offsets)].view(dtype), kind)  # sums follow the order in memory

    return masked, whole


def _store(original: Any) -> Any:
    def masked(self: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses, values, wanted = pointers.data, value.data, mask.data
        if addresses.size < _MANY or wanted.dtype != bool or not addresses.shape == values.shape == wanted.shape:
            return original(self, pointers, value, mask, *rest)
        if not wanted.all():
            addresses, values = addresses[wanted], values[wanted]
            if not addresses.size:
                return None
        found = _located(addresses, values.itemsize)
        if found is None:
            return original(self, pointers, value, mask, *rest)
        memory, offsets = found
        memory[offsets] = np.ascontiguousarray(values).view(memory.dtype)
        return None

    return masked


def install() -> None:
    load, whole = _loads(InterpreterBuilder.create_masked_load)
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_load = load, whole
    InterpreterBuilder.create_masked_store = _store(InterpreterBuilder.create_masked_store)
