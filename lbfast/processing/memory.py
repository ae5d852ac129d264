"""Pixels in memory as tensors without a copy: arrays, and Pillow's pictures where it exports them (11.2 and later)."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image


class _ArrowArray(ctypes.Structure):
    """Of the Arrow C data interface (arrow.apache.org/docs/format/CDataInterface.html)."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def shared(array: np.ndarray) -> torch.Tensor:
    """The array's memory. Not to be written to: it may be read-only, of which torch would warn, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """(H, W, 1) or (H, W, 3) uint8 of a picture of mode L or RGB. Not to be written to: it may be the picture's own."""
    found = _exported(picture) if hasattr(picture, "__arrow_c_array__") else None
    found = shared(np.asarray(picture)) if found is None else found
    return found.view(picture.height, picture.width, -1)[..., : len(picture.getbands())]


def _exported(picture: Image.Image) -> torch.Tensor | None:
    """The bytes of a picture, 4 for a pixel of colours; None where its rows do not follow each other in memory."""
    try:
        capsule: Any = picture.__arrow_c_array__()[1]
    except ValueError:
        return None
    array = ctypes.cast(_pointer_of(capsule, b"arrow_array"), ctypes.POINTER(_ArrowArray)).contents
    width = 1
    if array.n_children:  # a list of four for each pixel
        width, array = 4, array.children[0].contents
    count = picture.height * picture.width * width
    if array.length != count or array.offset or array.n_buffers != 2:
        return None
    held = (ctypes.c_uint8 * count).from_address(array.buffers[1])
    held.owner = capsule  # type: ignore[attr-defined]  # releases the memory when the last tensor is gone
    return torch.frombuffer(held, dtype=torch.uint8)


@contextlib.contextmanager
def one_block() -> Iterator[None]:
    """Pictures that are made inside the block lie in memory as a whole, large ones too, so that they need no copy."""
    core: Any = Image.core
    if not hasattr(core, "set_use_block_allocator"):
        yield
        return
    before = core.get_use_block_allocator()
    core.set_use_block_allocator(1)
    try:
        yield
    finally:
        core.set_use_block_allocator(before)
