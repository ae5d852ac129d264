"""Messages in a file that only grows, each with a checksum: what is damaged is seen, and what follows it not trusted.

A frame is 4 bytes of mark, 8 of length, 16 of checksum, and the message. The checksum is of the length, the message and
the checksum before it: a frame that was left out, repeated or moved is as wrong as one whose bits have changed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

MARK = b"LBj1"
_HEAD = struct.Struct("<4sQ16s")
FIRST = bytes(16)
"""The checksum that stands before the first."""


@dataclass(frozen=True)
class Frame:
    """Where a message is: the offset of its frame, the bytes of the message, the checksum, and the one before."""

    offset: int
    size: int
    checksum: bytes
    before: bytes

    @property
    def end(self) -> int:
        return self.offset + _HEAD.size + self.size


def pack(message: bytes | memoryview, offset: int, before: bytes) -> tuple[bytes, Frame]:
    """The bytes of a frame that is to be at `offset`, after the checksum `before`."""
    checksum = _checksum(message, before)
    head = _HEAD.pack(MARK, len(message), checksum)
    return head + bytes(message), Frame(offset, len(message), checksum, before)


def read(file: int, frame: Frame) -> bytes | None:
    """The message of a frame, from a file descriptor; None where it is not what was written."""
    found = at(file, frame.offset, frame.before)
    return found[1] if found is not None and found[0] == frame else None


def at(file: int, offset: int, before: bytes) -> tuple[Frame, bytes] | None:
    """The frame at an offset and its message; None where there is none that is whole and right."""
    head = os.pread(file, _HEAD.size, offset)
    if len(head) < _HEAD.size:
        return None
    mark, size, checksum = _HEAD.unpack(head)
    if mark != MARK or size > os.fstat(file).st_size - offset - _HEAD.size:
        return None
    message = _pread(file, size, offset + _HEAD.size)
    if len(message) < size or _checksum(message, before) != checksum:
        return None
    return Frame(offset, size, checksum, before), message


def every(file: int) -> Iterator[tuple[Frame, bytes]]:
    """The frames of a file and their messages, up to its end or the first that is not right."""
    offset, before = 0, FIRST
    while (found := at(file, offset, before)) is not None:
        yield found
        offset, before = found[0].end, found[0].checksum


def _checksum(message: bytes | memoryview, before: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=16, key=before + len(message).to_bytes(8, "little")).digest()


def _pread(file: int, size: int, offset: int) -> bytes:
    parts = []
    while size and (part := os.pread(file, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
