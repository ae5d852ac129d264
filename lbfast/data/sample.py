"""A sample of training or evaluation data: where its media and its captions are. Sources are sequences of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, BinaryIO, Protocol

from lbfast.data.store import Object, local_copy
from lbfast.processing.media import MediaError, named

DEFAULT_VIEWS = ("txt", "caption", "text")
"""Where no views are asked for, the first of these that a sample has is its caption."""


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar: `size` bytes from `offset` on."""

    tar: str | Object
    name: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return f"{os.fspath(self.tar)}/{self.name}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Its bytes as a file, of which no more is in memory than is read where the tar is a file."""
        if isinstance(self.tar, Object):
            yield io.BytesIO(self.read())
            return
        with open(self.tar, "rb") as file:
            yield io.BufferedReader(_Window(file, self))  # type: ignore[type-var]

    def read(self) -> bytes:
        """Its bytes. MediaError where the tar has become shorter than it was."""
        if isinstance(self.tar, Object):
            return self.tar.read(self.offset, self.size)
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise MediaError(os.fspath(self), f"{self.size} bytes", f"{len(data)} (has the tar changed?)")
        return data


class _Window(io.RawIOBase):
    """The bytes of a member, from 0, of an open tar."""

    def __init__(self, file: BinaryIO, member: Member):
        self._file, self._member, self._at = file, member, 0
        self.name = os.fspath(member)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._member.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, into: Any) -> int:
        view = memoryview(into)[: max(0, self._member.size - self._at)]
        self._file.seek(self._member.offset + self._at)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        if len(view) and not count:
            raise MediaError(self.name, f"{self._member.size} bytes", f"{self._at} (has the tar changed?)")
        self._at += count
        return int(count)


@dataclass(frozen=True)
class Remote:
    """A file at a URL."""

    url: str

    def __fspath__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Sample:
    """One item and what may be said of it.

    Attributes:
        path: what it is called in messages, and its key: the file as the manifest has it, or tar/basename.
        media: a file, one at a URL, or a member of a tar.
        texts: captions by view (a manifest's columns).
        members: of a tar, whose text (txt) or fields (json) are captions.
    """

    path: str
    media: str | Remote | Member
    texts: Mapping[str, str] = field(default_factory=dict)
    members: tuple[Member, ...] = ()

    def captions(self) -> dict[str, str]:
        """Captions by view, stripped, those without a word left out. ValueError where a member cannot be read."""
        found = dict(self.texts)
        for member in self.members:
            found |= _read_texts(member)
        return {name: text.strip() for name, text in found.items() if text.strip()}


class Source(Protocol):
    """A sequence of samples; `skipped` says what could not be one, and why."""

    @property
    def skipped(self) -> Mapping[str, str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def _read_texts(member: Member) -> dict[str, str]:
    """The text of a member under its suffix, or the fields of a json object that are text."""
    suffix = PurePath(member.name).suffix[1:].lower()
    try:
        text = member.read().decode("utf-8-sig")
        if suffix != "json":
            return {suffix: text}
        fields = json.loads(text)
    except ValueError as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(os.fspath(member), "JSON" if suffix == "json" else "UTF-8 text", str(error)) from error
    if not isinstance(fields, dict):
        raise MediaError(os.fspath(member), "a JSON object", type(fields).__name__)
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def candidates(captions: Mapping[str, str], views: Mapping[str, float] | None) -> list[tuple[str, float]]:
    """(caption, weight) of the views that a sample has; without views, the first of `DEFAULT_VIEWS`."""
    if views is None:
        return [(captions[name], 1.0) for name in DEFAULT_VIEWS if name in captions][:1]
    return [(captions[name], weight) for name, weight in views.items() if name in captions and weight > 0]


@contextlib.contextmanager
def as_file(media: str | Remote | Member) -> Iterator[str]:
    """The name of a file that holds the media; what is none by itself is copied to a temporary one."""
    if isinstance(media, str):
        yield media
        return
    if isinstance(media, Remote):
        with local_copy(media.url) as copy, named(media):
            yield str(copy)
        return
    data = media.read()
    with tempfile.NamedTemporaryFile(prefix="lbfast-", suffix=PurePath(media.name).suffix) as file:
        file.write(data)
        file.flush()
        with named(media):
            yield file.name
