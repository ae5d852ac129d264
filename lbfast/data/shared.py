"""Arrays that workers leave where their parent sees them: memory without a name, of which nothing is left behind.

A batch has a buffer, and each of its items a row there. A buffer is a file without a name or a folder (memfd_create):
the kernel takes it back when the last process that holds it has ended, however that was. The parent passes its
descriptor to the workers that are to write to it, and maps it. Workers write to the file, and so hear of memory that is
not there as an error; what they cannot write comes by the pipe, as everything does where there are no such files. A
buffer is used again when nobody in the parent sees an array of it any more.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import mmap
import os
import pickle
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Place:
    """Where a worker is to write: `size` bytes from `offset` on of a buffer.

    Attributes:
        comes: the buffer's descriptor follows; False where the worker has it.
        gone: buffers of which the worker can close its descriptors.
    """

    buffer: int
    offset: int
    size: int
    comes: bool
    gone: tuple[int, ...]


class _Buffer:
    """Memory of `size` bytes that other processes can write to. OSError where it cannot be had."""

    def __init__(self, number: int, size: int, device: torch.device):
        self.number, self.size = number, size
        self.file = os.memfd_create("lbfast")
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, size)
        self.memory = mmap.mmap(self.file, size)
        if device.type == "cuda":
            self._pin(device)

    def _pin(self, device: torch.device) -> None:
        """A GPU copies from pinned memory on its own. Where the driver pins no more, the memory serves as it is."""
        runtime, address = torch.cuda.cudart(), np.frombuffer(self.memory, np.uint8).ctypes.data
        with torch.cuda.device(device):
            if int(runtime.cudaHostRegister(address, self.size, 0)) == 0:
                weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


class _Shelf:
    """Buffers that nobody sees any more, put here by whichever thread drops the last array; closed, it keeps none."""

    def __init__(self) -> None:
        self.buffers: collections.deque[_Buffer] = collections.deque()
        self.closed = False

    def put(self, buffer: _Buffer) -> None:
        if not self.closed:
            self.buffers.append(buffer)


class Lease:
    """A buffer for as long as an array of it is in use: `row(i)` are its bytes i * size to (i + 1) * size."""

    def __init__(self, buffer: _Buffer, size: int, shelf: _Shelf):
        self.buffer, self._size = buffer, size
        self._whole: np.ndarray = np.frombuffer(buffer.memory, np.uint8)
        weakref.finalize(self._whole, shelf.put, buffer).atexit = False

    def row(self, number: int) -> np.ndarray:
        return self._whole[number * self._size : (number + 1) * self._size]

    def place(self, number: int, has: set[int], alive: set[int]) -> Place:
        """A row, for a worker that has the buffers `has`."""
        here = self.buffer.number
        return Place(here, number * self._size, self._size, here not in has, tuple(has - alive - {here}))


class Pool:
    """Buffers, made when there is none to be used again; pinned where `device` is a GPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._free: list[_Buffer] = []
        self._shelf = _Shelf()
        self.alive: set[int] = set()

    def lease(self, rows: int, size: int) -> Lease | None:
        """A buffer for so many rows of `size` bytes; None where there are no such files, or no memory for one."""
        with self._lock:
            while self._shelf.buffers:
                self._free.append(self._shelf.buffers.popleft())
            buffer = next((b for b in self._free if rows * size <= b.size <= 4 * rows * size), None)
            if buffer is not None:
                self._free.remove(buffer)
            else:  # those of another modality's rows, or of fewer rows, are not needed any more
                self.alive -= {b.number for b in self._free}
                self._free = []
                try:
                    buffer = _Buffer(next(self._numbers), rows * size, self._device)
                except (AttributeError, OSError):
                    return None
                self.alive.add(buffer.number)
            return Lease(buffer, size, self._shelf)

    def close(self) -> None:
        """Gives back what is not in use now, and what is when it no longer is."""
        with self._lock:
            self._shelf.closed = True
            self._shelf.buffers.clear()
            self._free = []


class Hand:
    """The parent's end of a worker: hands it tasks, and takes their results."""

    def __init__(self, connection: Connection, pid: int):
        self.connection, self._pid = connection, pid
        self._has: set[int] = set()

    def give(self, task: Any, lease: Lease | None, row: int, alive: set[int]) -> None:
        """Sends a task, and where its array is to be written: a row of a lease."""
        place = None if lease is None else lease.place(row, self._has, alive)
        self.connection.send((task, place))
        if lease is not None and place is not None:
            if place.comes:
                reduction.send_handle(self.connection, lease.buffer.file, self._pid)
            self._has = self._has - set(place.gone) | {place.buffer}

    def take(self, lease: Lease | None, row: int) -> tuple[Any, int]:
        """A result, its array in the row if the worker put it there; and the bytes of its one array, 0 without."""
        message, arrays = self.connection.recv()
        if arrays is None and lease is not None:
            array = lease.row(row)
            return pickle.loads(message, buffers=[array]), array.nbytes
        return pickle.loads(message, buffers=map(bytearray, arrays)), len(arrays[0]) if len(arrays) == 1 else 0


class Desk:
    """The worker's end."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._files: dict[int, int] = {}  # descriptors, by number of the buffer
        self._place: Place | None = None

    def task(self) -> Any:
        """The next one."""
        task, self._place = self._connection.recv()
        if self._place is not None:
            for number in self._place.gone:
                os.close(self._files.pop(number))
            if self._place.comes:
                self._files[self._place.buffer] = reduction.recv_handle(self._connection)
        return task

    def answer(self, result: Any) -> None:
        """Sends its result: the array by way of its place, where it has one and is as large."""
        arrays: list[pickle.PickleBuffer] = []
        message = pickle.dumps(result, protocol=5, buffer_callback=arrays.append)
        raw, there = [array.raw() for array in arrays], False
        place = self._place
        if place is not None and [each.nbytes for each in raw] == [place.size]:
            with contextlib.suppress(OSError):  # no memory for it
                _write(self._files[place.buffer], raw[0], place.offset)
                there = True
        self._connection.send((message, None if there else [bytes(each) for each in raw]))


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def as_array(values: torch.Tensor) -> np.ndarray:
    """What is sent of a tensor: bfloat16, of which NumPy has none, as the same bits in int16."""
    values = values.contiguous()
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def stacked(arrays: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """(n, ...) of n arrays of one shape, as `as_array` gave them, on a device.

    Where they follow each other in one memory it is that, on a CPU, and one copy of it to a GPU. Each gap, of a file
    that failed, makes a piece more. The copy from pinned memory may not be done when this returns: keep the arrays
    until something that was computed from the result is there.
    """
    pieces = [torch.from_numpy(piece).view(dtype).to(device, non_blocking=True) for piece in _pieces(arrays)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _pieces(arrays: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Those that follow each other in one memory, as one array of one dimension more."""
    begin = 0
    for end in range(1, len(arrays) + 1):
        if end == len(arrays) or not _follows(arrays[end - 1], arrays[end]):
            first = arrays[begin]
            yield np.lib.stride_tricks.as_strided(
                first, (end - begin, *first.shape), (first.nbytes, *first.strides)
            )  # which keeps the owner of all of them
            begin = end


def _follows(one: np.ndarray, other: np.ndarray) -> bool:
    owner = _owner(one)
    return owner is not None and owner is _owner(other) and one.ctypes.data + one.nbytes == other.ctypes.data


def _owner(array: Any) -> mmap.mmap | None:
    """The mapped memory that an array is part of."""
    while isinstance(array, np.ndarray | memoryview):
        array = array.base if isinstance(array, np.ndarray) else array.obj
    return array if isinstance(array, mmap.mmap) else None
