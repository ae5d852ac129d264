"""Bytes at URLs, by ranges: from a bounded cache on the disk, and asked for again while a store fails.

fsspec knows the protocols: s3://, gs://, https://, hf:// and more, each with its package. A store that answers nothing,
breaks off, or says that it is busy is asked again, more and more rarely, for `patience()` seconds; who waits is told.
What it says for good (no such file, no access) is believed at once.

The cache, in the folder LBFAST_DATA_CACHE, has a file for each range: LBFAST_DATA_CACHE_GIB together, 20 where nobody
says, the longest unused first to go. 0: none.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import logging
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lbfast import native
from lbfast.processing.media import is_url, reason, url_system

log = logging.getLogger(__name__)

PATIENCE, CACHE, CACHE_GIB = "LBFAST_DATA_PATIENCE", "LBFAST_DATA_CACHE", "LBFAST_DATA_CACHE_GIB"
_PIECE = 16 << 20  # bytes that are asked for at once of a whole object
_SLOWEST = 1 << 20  # bytes a second that an answer takes at most, after
_ANSWER = 60.0  # seconds, which none may be without
_PAUSE = 0.5  # seconds before a store is asked for the second time, about
_QUIET = 3.0  # seconds without an answer of which nothing is said
_SHORT, _LONG = 1 << 16, 8 << 20  # bytes that are read ahead where headers are far apart, and close
_BUSY, _GONE = (408, 425, 429), (404, 410)  # of HTTP's 4xx: those that pass, and those of no file
_DIGEST = 16
_QUERY = re.compile(r"[?#]|::")

_Result = TypeVar("_Result")


class StoreError(OSError):
    """A store has failed for longer than one waits for it, or cannot do what is needed; the message says how."""


_SURE = (StoreError, PermissionError, IsADirectoryError, NotImplementedError, ImportError)
"""What is not tried again."""


def patience() -> float:
    """Seconds that a store may fail: LBFAST_DATA_PATIENCE, or 120. Raises ValueError where that is no such number."""
    return _number(PATIENCE, 120.0)


def _number(name: str, default: float) -> float:
    given = os.environ.get(name)
    try:
        value = float(given) if given else default
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise ValueError(f"environment variable {name}: expected a number of at least 0, got {given!r}")
    return value


@dataclass(frozen=True)
class Object:
    """What lies at a URL.

    Attributes:
        size: bytes. version: changes with the content, as far as the store tells; "" where it tells nothing.
    """

    url: str
    size: int
    version: str

    def __fspath__(self) -> str:
        return self.url

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` on, or all there are. Raises OSError; StoreError where the store has failed."""
        size = self.size - offset if size is None else size
        key = f"{offset} {size}"
        data = self.cached(key)
        if data is None:
            pieces = [
                self._ask(begin, min(_PIECE, offset + size - begin)) for begin in range(offset, offset + size, _PIECE)
            ]
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self.keep(key, data)
        return data

    def ranges(self) -> io.BufferedIOBase:
        """To be read as a file is, here and there: what is near is read ahead, more of it the nearer."""
        return _Ranges(self)

    def cached(self, key: str) -> bytes | None:
        """What was kept of this version under a key of the caller's."""
        cache = _cache()
        return None if cache is None or not self.version else cache.get(f"{self.url} {self.version} {key}")

    def keep(self, key: str, data: bytes) -> None:
        """Puts it into the cache, where there is one and the store tells versions apart."""
        cache = _cache()
        if cache is not None and self.version:
            cache.put(f"{self.url} {self.version} {key}", data)

    def _ask(self, offset: int, size: int) -> bytes:
        def attempt() -> bytes:
            system, path = url_system(self.url)
            until = _timeout(system, size)
            data = bytes(system.cat_file(path, start=offset, end=offset + size, **until))
            if len(data) > size:
                raise StoreError(f"{self.url}: the store gives whole files only, not parts of one")
            if len(data) < size:
                raise OSError(f"{len(data)} of {size} bytes came")
            return data

        return _insisting(self.url, attempt) if size else b""


def look(url: str) -> Object:
    """What there is to know of a URL's object. Raises as `Object.read`; FileNotFoundError where nothing is there."""

    def attempt() -> Object:
        system, path = url_system(url)
        about = system.info(path, **_timeout(system))
        if about.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", url)
        size = about.get("size")
        if size is None:
            raise StoreError(f"{url}: the store does not say how long it is")
        marks = ("ETag", "etag", "Content-MD5", "md5Hash", "commit_hash", "lfs", "LastModified", "Last-Modified")
        said = [str(about[mark]) for mark in (*marks, "mtime", "updated", "created") if about.get(mark)]
        return Object(url, int(size), " ".join(said))

    return _insisting(url, attempt)


def listing(url: str) -> list[str]:
    """URLs of the files of a folder, sorted, hidden ones left out. Raises as `look`."""

    def attempt() -> list[str]:
        system, path = url_system(url)
        entries = system.ls(path, detail=True, **_timeout(system))
        found = [about for about in entries if about.get("type") != "directory"]
        names = sorted(str(about["name"]) for about in found)
        return [system.unstrip_protocol(name) for name in names if not PurePosixPath(name).name.startswith(".")]

    return _insisting(url, attempt)


def suffix_of(name: str) -> str:
    """ ".tar" of "s3://bucket/a.tar" and of "A.TAR"; what follows a URL's path is none of it."""
    return PurePosixPath(_QUERY.split(name)[0] if is_url(name) else name).suffix.lower()


def beside(url: str, relative: str) -> str:
    """The URL of a path that a file at `url` names. ValueError where it leads out of that one's folder."""
    parts = PurePosixPath(relative).parts
    if is_url(relative) or not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(f"expected a path below {url.rpartition('/')[0]}/, got {relative}")
    return f"{url.rpartition('/')[0]}/{'/'.join(parts)}"


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """A temporary file with the content of a URL. Raises as `look`."""
    found = look(url)
    with tempfile.NamedTemporaryFile(prefix="lbfast-", suffix=suffix_of(url)) as file:
        for begin in range(0, found.size, _PIECE):
            file.write(found.read(begin, min(_PIECE, found.size - begin)))
        file.flush()
        yield Path(file.name)


def _timeout(system: Any, size: int = 0) -> dict[str, float]:
    """What a call is told of how long it may take, where the file system listens to it."""
    return {"timeout": _ANSWER + size / _SLOWEST} if getattr(system, "async_impl", False) else {}


def _insisting(url: str, attempt: Callable[[], _Result]) -> _Result:
    """What `attempt` returns, once it does."""
    begun, pause = time.monotonic(), _PAUSE
    for tries in itertools.count(1):
        try:
            return attempt()
        except Exception as met:
            error: BaseException = met
            while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
                error = error.__cause__  # fsspec says so of whatever happens to a question about a file
            status = getattr(error, "status", None)
            if isinstance(error, FileNotFoundError) or status in _GONE:
                raise FileNotFoundError(errno.ENOENT, "no such file in the store", url) from error
            if isinstance(error, _SURE):
                raise
            if isinstance(status, int) and 400 <= status < 500 and status not in _BUSY:
                raise PermissionError(errno.EACCES, f"the store refuses it (HTTP {status})", url) from error
            why, waited = reason(error), time.monotonic() - begun
            if waited >= patience():
                often = f"the store has failed {tries} times in {waited:.0f} s"
                raise StoreError(f"{url}: {often} ({PATIENCE} says how long to wait): {why}") from error
        if waited > _QUIET:
            log.warning("waiting for %s, since %.0f s: %s", url, waited, why)
        time.sleep(min(pause * random.uniform(0.5, 1), max(patience() - waited, 0.01)))
        pause = min(2 * pause, 10.0)
    raise AssertionError


class _Ranges(io.BufferedIOBase):
    """An object as a file that is read and sought in."""

    def __init__(self, of: Object):
        self._of, self._at = of, 0
        self._begin, self._data, self._ahead = 0, b"", _SHORT

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._of.size)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        size = max(self._of.size - self._at, 0) if size is None or size < 0 else size
        size = min(size, max(self._of.size - self._at, 0))
        if not self._begin <= self._at <= self._at + size <= self._begin + len(self._data):
            follows = self._at <= self._begin + len(self._data) + self._ahead and self._at >= self._begin
            self._ahead = min(2 * self._ahead, _LONG) if follows else _SHORT
            self._begin = self._at
            self._data = self._of._ask(self._at, min(max(size, self._ahead), self._of.size - self._at))
        start = self._at - self._begin
        self._at += size
        return self._data[start : start + size]


def _cache() -> Cache | None:
    limit = int(_number(CACHE_GIB, 20.0) * 2**30)
    folder = os.environ.get(CACHE) or native.cache_folder() / "data"
    return _opened(Path(folder), limit) if limit else None


@functools.cache
def _opened(folder: Path, limit: int) -> Cache:
    return Cache(folder, limit)


class Cache:
    """Bytes by key, in files: at most `limit` bytes together, but for what is being written.

    Any number of processes share a folder. What is not as it was written is not there; a full disk keeps nothing.
    """

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._room = 0  # bytes that may be written before one looks again how many there are

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            kept = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        digest, data = kept[:_DIGEST], kept[_DIGEST:]
        return data if digest == _digest(data) else None

    def put(self, key: str, data: bytes) -> None:
        path, size = self._path(key), len(data) + _DIGEST
        if size > self._limit // 4:  # for which much else would go
            return
        with contextlib.suppress(OSError):
            if size > self._room:
                self._make_room(size)
            self._room -= size
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".lbfast-", delete=False) as file:
                try:
                    file.write(_digest(data) + data)
                    file.flush()
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise

    def _make_room(self, size: int) -> None:
        """Removes what was not used for longest, an eighth more than needs be."""
        found = []
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        used, least = sum(size for _, size, _ in found), self._limit - self._limit // 8 - size
        for _, length, path in sorted(found):
            if used <= least:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                used -= length
        self._room = max(self._limit // 8, size)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        return self._folder / name[:2] / name


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
