"""What every reader of files shares: the error, the checks before opening, and a guess of what a file holds."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

PathLike = str | os.PathLike[str]

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"II*\x00", "a TIFF image"),
    (0, b"MM\x00*", "a TIFF image"),
    (8, b"WAVE", "a WAV file"),
    (8, b"AVI ", "an AVI file"),
    (4, b"ftyp", "an MP4 or QuickTime file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (0, b"OggS", "an Ogg file"),
    (0, b"fLaC", "a FLAC file"),
    (0, b"ID3", "an MP3 file"),
    (0, b"\xff\xfb", "an MP3 file"),
    (0, b"FORM", "an AIFF file"),
    (0, b"FLV", "a Flash video"),
    (0, b"\x00\x00\x01\xba", "an MPEG file"),
    (0, b"\x47\x40", "an MPEG transport stream"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"%PDF", "a PDF document"),
)


class MediaError(ValueError):
    """A file, or data in memory, is not what the processor needs: the message names it, what was expected, what came.

    Attributes:
        source: the path, or a short description of data in memory.
        expected, got: what should be there, and what is. None in an error that a DataLoader raises for its worker: it
            makes one of the whole message, traceback included, which is then `source`.
    """

    def __init__(self, source: str, expected: str | None = None, got: str | None = None):
        super().__init__(source, expected, got)
        self.source, self.expected, self.got = source, expected, got

    def __str__(self) -> str:
        if self.expected is None:
            return self.source
        return f"{self.source}: expected {self.expected}, got {self.got}"


def is_path(item: Any) -> bool:
    """True for what names a file: a string or an os.PathLike."""
    return isinstance(item, str | os.PathLike)


def check_file(path: PathLike, expected: str) -> str:
    """Returns the path as a string, where it names a regular file that is not empty.

    Raises:
        FileNotFoundError: there is nothing of that name.
        MediaError: a folder, a pipe or device (which could block for ever), or an empty file.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(errno.ENOENT, f"no such file, expected {expected}", name)
    if not os.path.isfile(name):
        raise MediaError(name, expected, "a folder" if os.path.isdir(name) else "something that is not a regular file")
    if os.path.getsize(name) == 0:
        raise MediaError(name, expected, "an empty file (0 bytes)")
    return name


def describe(path: PathLike) -> str:
    """A guess of what the file holds, from its first bytes: "a PNG image", "text", "unrecognised data"."""
    with open(path, "rb") as file:
        head = file.read(512)
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head and not any(byte < 9 or 13 < byte < 32 or byte == 127 for byte in head):
        return "text"
    return "unrecognised data"


def check_complete(path: PathLike, expected: str) -> None:
    """Raises MediaError where a RIFF (WAV, AVI), AIFF or Matroska header promises more bytes than the file has.

    Their demuxers end a truncated file without a word. Sizes that say "unknown" (live recordings) promise nothing.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(64)
    promised = 0
    if head[:4] in (b"RIFF", b"FORM"):
        promised = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
        promised = 0 if promised == 0xFFFFFFFF else promised
    elif head[:4] == b"\x1aE\xdf\xa3":
        begin, length = _ebml_size(head, 4)
        begin += length
        if head[begin : begin + 4] == b"\x18\x53\x80\x67":
            begin, length = _ebml_size(head, begin + 4)
            promised = begin + length if length >= 0 else 0
    if promised > size:  # some writers count the header's own 8 bytes, so a RIFF file may hold 8 more than promised
        raise MediaError(os.fspath(path), expected, f"{describe(path)} that is truncated: {size} of {promised} bytes")


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """The variable-length size at `at`, as (where it ends, size); -1: unknown, or not there."""
    if at >= len(data) or data[at] == 0:
        return at, -1
    width = 9 - data[at].bit_length()
    bits = 7 * width
    value = int.from_bytes(data[at : at + width], "big") & ((1 << bits) - 1)
    return at + width, -1 if value == (1 << bits) - 1 else value


@contextlib.contextmanager
def named(path: PathLike) -> Iterator[None]:
    """Inside the block, an error about data in memory names the file that the data came from."""
    try:
        yield
    except MediaError as error:
        raise MediaError(os.fspath(path), error.expected, error.got) from error
