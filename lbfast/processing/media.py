"""What every reader of media shares: errors, limits, and what is opened: a file, bytes, a file object, a URL."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

PathLike = str | os.PathLike[str]

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (4, b"ftypavif", "an AVIF image"),
    (4, b"ftypheic", "a HEIC image"),
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
    (0, b"%!PS", "a PostScript document"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript document"),
)
_HEAD = 512  # bytes that are looked at to tell what a file holds
_REASON = 300  # characters of a library's own message that are shown
_DECODER = re.compile(r"ffmpeg|torchcodec-(cuda(:\d+)?|cpu)")  # the last for tests
_URL = re.compile(r"[a-z][a-z0-9+.-]*(::.*)?://", re.IGNORECASE)


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


class MediaWarning(UserWarning):
    """A file is damaged, and was read nevertheless: the message says what was put in the place of what is broken."""


@dataclass(frozen=True)
class Limits:
    """What may be held in memory for one item; a file that asks for more is refused before it is decoded.

    Attributes:
        image_pixels: of a picture.
        frame_pixels: of a video's frame; a decoder keeps up to some twenty of them.
        clip_bytes: of the frames that are taken from a video, 3 bytes a pixel.
        stream_bytes: of a file object that cannot seek, or a URL that is such; it is copied to a temporary file.
    """

    image_pixels: int = 120_000_000
    frame_pixels: int = 40_000_000
    clip_bytes: int = 1 << 30
    stream_bytes: int = 4 << 30


@dataclass(frozen=True)
class Reading:
    """How media are read.

    Attributes:
        strict: refuse a damaged file of which most can be decoded.
        allow_urls: open URLs, by fsspec.
        limits: see Limits.
        decoder: of videos: "ffmpeg", on the CPU; "torchcodec-cuda" or "torchcodec-cuda:N", on a GPU (see `nvdec`).

    Raises ValueError: no such decoder.
    """

    strict: bool = False
    allow_urls: bool = False
    limits: Limits = Limits()
    decoder: str = "ffmpeg"

    def __post_init__(self) -> None:
        if _DECODER.fullmatch(self.decoder) is None:
            raise ValueError(f"decoder: expected ffmpeg, torchcodec-cuda or torchcodec-cuda:N, got {self.decoder!r}")


def is_path(item: Any) -> bool:
    """True for what names a file: a string or an os.PathLike."""
    return isinstance(item, str | os.PathLike)


def is_readable(item: Any) -> bool:
    """True for what holds an encoded file: a path or URL, bytes, or a file object."""
    return is_path(item) or isinstance(item, bytes | bytearray | memoryview) or hasattr(item, "read")


def is_url(name: str) -> bool:
    """True for what names no file here, and has the form of a URL, as fsspec takes it."""
    return _URL.match(name) is not None and not os.path.exists(name)


def url_stamp(url: str) -> str:
    """What changes with the file at a URL, as far as its file system tells: of HTTP, nothing but the URL.

    Raises OSError where it cannot be reached. ImportError: fsspec, or a package of the protocol, is not installed.
    """
    try:
        system, path = url_system(url)
        return str(system.ukey(path))
    except ImportError:
        raise
    except Exception as error:
        raise OSError(f"a URL that cannot be opened ({reason(error)})") from error


def url_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and what the file is called there. ImportError: as `url_stamp`."""
    system, path = _fsspec().core.url_to_fs(url)
    return system, path


def _fsspec() -> Any:
    try:
        import fsspec.core
    except ImportError as error:
        raise ImportError("URLs need fsspec: pip install 'lbfast[url]'") from error
    return fsspec


def name_of(item: Any) -> str:
    """What messages call an item for which `is_readable` holds: the path or URL, or a description."""
    if is_path(item):
        return os.fspath(item)
    if isinstance(item, bytes | bytearray | memoryview):
        return f"bytes ({len(item)} of them)"
    name = getattr(item, "name", None)
    return name if isinstance(name, str) else f"file object ({type(item).__name__})"


def check_file(path: PathLike, expected: str) -> str:
    """Returns the path as a string, where it names a regular file that is not empty.

    Raises:
        FileNotFoundError: there is nothing of that name.
        MediaError: a folder, a pipe or device (which could block for ever), or an empty file.
    """
    name = os.fspath(path)
    try:
        found = os.stat(name)
    except (OSError, ValueError) as error:  # the latter: a name with a zero byte
        raise FileNotFoundError(errno.ENOENT, f"no such file, expected {expected}", name) from error
    if not stat.S_ISREG(found.st_mode):
        folder = stat.S_ISDIR(found.st_mode)
        raise MediaError(name, expected, "a folder" if folder else "something that is not a regular file")
    if found.st_size == 0:
        raise MediaError(name, expected, "an empty file (0 bytes)")
    return name


class Source:
    """An encoded file to read from its beginning. Use as a context manager; a caller's file object stays open.

    Attributes:
        name: the path or URL, or a description of what is in memory: what errors and warnings begin with.
        expected: what it should hold, for errors.
        path: of a local file; None for everything else.
        file: the open file, at its beginning; it can seek.
        size: bytes.
        what: a guess of what it holds, from its first bytes: "a PNG image", "text", "unrecognised data".
    """

    def __init__(self, item: Any, expected: str, reading: Reading | None = None):
        self.name, self.expected = name_of(item), expected
        self.path: str | None = None
        self.reading = reading or Reading()
        with contextlib.ExitStack() as closing:  # closes what was opened where something below fails
            self._closing = closing
            self.file = self._open(item)
            with self._readable():
                self.size = self.file.seek(0, os.SEEK_END)
                self.file.seek(0)
                self.head = self.file.read(_HEAD)
                self.file.seek(0)
            if self.size == 0:
                raise MediaError(self.name, expected, "an empty file (0 bytes)")
            self._closing = closing.pop_all()
        self.what = _guess(self.head)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def error(self, got: str) -> MediaError:
        """MediaError that begins with what the file holds: "PATH: expected an image, got a JPEG image " + got."""
        return MediaError(self.name, self.expected, f"{self.what} {got}")

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside the block, whatever a decoder raises becomes a MediaError with its reason."""
        try:
            yield
        except MediaError:
            raise
        except Exception as error:
            raise self.error(f"that cannot be decoded ({reason(error)})") from error

    def check_complete(self) -> None:
        """Raises MediaError where a RIFF (WAV, AVI), AIFF or Matroska header promises more bytes than there are.

        Their demuxers end a truncated file without a word. Sizes that say "unknown" promise nothing: those of live
        recordings, and what SoX, arecord and FFmpeg write into a WAV header when they cannot go back to it.
        """
        promised = 0
        if self.head[:4] in (b"RIFF", b"FORM"):
            promised = int.from_bytes(self.head[4:8], "little" if self.head[:4] == b"RIFF" else "big")
            if any(low <= promised <= high for low, high in _UNKNOWN_SIZES):
                promised = 0
        elif self.head[:4] == b"\x1aE\xdf\xa3":
            begin, length = _ebml_size(self.head, 4)
            begin += length
            if self.head[begin : begin + 4] == b"\x18\x53\x80\x67":
                begin, length = _ebml_size(self.head, begin + 4)
                promised = begin + length if length >= 0 else 0
        if promised > self.size:  # some writers count the header's own 8 bytes: a file may hold 8 more than promised
            raise self.error(f"that is truncated: {self.size} of {promised} bytes")

    def _open(self, item: Any) -> IO[bytes]:
        if isinstance(item, bytes | bytearray | memoryview):
            return io.BytesIO(item)
        if not is_path(item):
            return self._seekable(item)
        if is_url(self.name):
            return self._open_url()
        self.path = check_file(self.name, self.expected)
        return self._closing.enter_context(open(self.path, "rb"))

    def _open_url(self) -> IO[bytes]:
        if not self.reading.allow_urls:
            raise MediaError(self.name, f"{self.expected} in a local file", "a URL (allow_urls=True opens it)")
        fsspec = _fsspec()
        try:
            opened = self._closing.enter_context(fsspec.open(self.name, "rb"))
        except ImportError:  # of the protocol's own package, which the message names
            raise
        except Exception as error:
            raise MediaError(self.name, self.expected, f"a URL that cannot be opened ({reason(error)})") from error
        return self._seekable(opened)

    def _seekable(self, item: Any) -> IO[bytes]:
        """The file object itself, at its beginning; a copy of one that cannot seek."""
        with self._readable():
            if item.seekable() if hasattr(item, "seekable") else hasattr(item, "seek"):
                item.seek(0)
                self._check_binary(item.read(0))
                return item
            copy: IO[bytes] = tempfile.TemporaryFile(prefix="lbfast-")  # noqa: SIM115 (the stack closes it)
            self._closing.enter_context(copy)
            limit = self.reading.limits.stream_bytes
            while chunk := item.read(1 << 20):
                self._check_binary(chunk)
                if copy.tell() + len(chunk) > limit:
                    raise MediaError(self.name, f"at most {limit} bytes (limits.stream_bytes)", "a stream of more")
                copy.write(chunk)
            copy.seek(0)
            return copy

    def _check_binary(self, data: Any) -> None:
        if not isinstance(data, bytes):
            raise MediaError(self.name, f"{self.expected} opened in binary mode", "a file object that reads text")

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """What goes wrong in reading, as an error that names the file."""
        try:
            yield
        except MediaError:
            raise
        except Exception as error:
            raise MediaError(self.name, self.expected, f"a file that cannot be read ({reason(error)})") from error


_UNKNOWN_SIZES = ((0x7FFFF000, 0x80000100), (0xFFFFFF00, 0xFFFFFFFF))  # RIFF's, with up to a header added or taken off


def _guess(head: bytes) -> str:
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head and not any(byte < 9 or 13 < byte < 32 or byte == 127 for byte in head):
        return "text"
    return "unrecognised data"


def reason(error: BaseException) -> str:
    """A library's message in one printable line of bounded length, with the kind of error where that says more."""
    kind = "" if isinstance(error, OSError | ValueError | SyntaxError) else type(error).__name__
    text = "".join(c if c.isprintable() else " " for c in str(error)[: 4 * _REASON])
    text = " ".join(text.split())
    text = text if len(text) <= _REASON else text[:_REASON] + "..."
    return ": ".join(part for part in (kind, text) if part) or type(error).__name__


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """The variable-length size at `at`, as (where it ends, size); -1: unknown, or not there."""
    if at >= len(data) or data[at] == 0:
        return at, -1
    width = 9 - data[at].bit_length()
    bits = 7 * width
    value = int.from_bytes(data[at : at + width], "big") & ((1 << bits) - 1)
    return at + width, -1 if value == (1 << bits) - 1 else value


@contextlib.contextmanager
def named(item: Any) -> Iterator[None]:
    """Inside the block, an error about data in memory names the file that the data came from."""
    try:
        yield
    except MediaError as error:
        raise MediaError(name_of(item), error.expected, error.got) from error
