"""What a request asks for: read from its body, JSON or multipart, within the limits; or why it is refused."""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import os
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from lbfast.data.suffixes import LANGUAGE, MODALITY_NAMES
from lbfast.embedding.columns import CONTENT, Columns, Row, column, rows_of
from lbfast.messages import plain
from lbfast.processing.media import is_url
from lbfast.serving.limits import Limits

JSON, MULTIPART = "application/json", "multipart/form-data"
FILE_FIELDS, TEXT_FIELDS, PATH_FIELDS = ("file", "files"), ("text", "texts", LANGUAGE), ("path", "paths")
_KINDS = ("str", "EmbedItem")  # as pydantic calls what an item may be
_DRAINED = 4  # bodies' worth of what is read and thrown away, so that a client is there to hear why
_OFF_THE_LOOP = 1 << 16  # bytes of JSON from which on another thread reads it


class Refused(Exception):
    """A request that is not answered with embeddings.

    Attributes:
        status: of HTTP. item: the number of the item that is at fault.
        retry: seconds after which another try may help.
    """

    def __init__(self, status: int, message: str, item: int | None = None, retry: float | None = None):
        super().__init__(message)
        self.status, self.message, self.item, self.retry = status, plain(message), item, retry


class EmbedItem(BaseModel):
    """A text, or a file as base64, path or URL: one of the three."""

    model_config = ConfigDict(extra="forbid")
    text: str | None = None
    base64: str | None = Field(None, description="The bytes of an encoded file: a JPEG, an MP4, a WAV...")
    path: str | None = Field(
        None, description="A file of the server's machine, or a URL; refused unless allowed there."
    )
    name: str | None = Field(None, description="What to call it; its suffix may say the modality.")
    modality: Literal["image", "video", "audio", "depth", "thermal", "language"] | None = None
    start_sec: float | None = Field(None, ge=0, description="Of a video: the part that is wanted.")
    end_sec: float | None = Field(None, ge=0)


class EmbedRequest(BaseModel):
    """Either texts, or items of any kind. A string among the items is a text."""

    model_config = ConfigDict(extra="forbid")
    texts: list[str] | None = None
    items: list[str | EmbedItem] | None = None


class Body:
    """The body of a request as it arrives: counted, timed, and given back when it is done with.

    Args:
        held: bytes of all requests, [0]; shared.
    """

    def __init__(self, request: Request, limits: Limits, held: list[int]):
        self._receive: Callable[[], Awaitable[Any]] = request.receive
        self._limits, self._held, self._size = limits, held, 0
        self._end = time.monotonic() + limits.body_seconds
        self._last = False
        self._waits = request.headers.get("expect", "").lower() == "100-continue"
        length = request.headers.get("content-length", "")
        self.length = int(length) if length.isdigit() else 0

    def check_length(self) -> None:
        """Refuses what announces itself as too large."""
        if self.length > self._limits.body_bytes:
            self._too_large(f"{self.length:,} bytes")
        if self._held[0] + self.length > self._limits.held_bytes:
            self._full()

    async def receive(self) -> Any:
        """A message of ASGI."""
        try:
            message = await asyncio.wait_for(self._receive(), self._end - time.monotonic())
        except asyncio.TimeoutError:
            raise Refused(408, f"body: expected all of it within {self._limits.body_seconds:g} s") from None
        self._last = not message.get("more_body", False)
        count = len(message.get("body", b""))
        self._size += count
        self._held[0] += count
        if self._size > self._limits.body_bytes:
            self._too_large("more")
        if self._held[0] > self._limits.held_bytes:
            self._full()
        return message

    def release(self) -> None:
        self._held[0] -= self._size
        self._size = 0

    async def drain(self) -> None:
        """Reads on for a while after a refusal: a client that is still sending would not hear it."""
        if self._waits or self.length > _DRAINED * self._limits.body_bytes:
            return
        left = _DRAINED * self._limits.body_bytes
        try:
            while not self._last and left > 0:
                message = await asyncio.wait_for(self._receive(), self._end - time.monotonic())
                self._last = not message.get("more_body", False)
                left -= len(message.get("body", b""))
        except asyncio.TimeoutError:
            return

    def _too_large(self, got: str) -> None:
        raise Refused(413, f"body: expected at most {self._limits.body_bytes:,} bytes, got {got}")

    def _full(self) -> None:
        raise Refused(503, "the bodies of other requests fill the memory there is for them", retry=1)


async def read_rows(request: Request, body: Body, limits: Limits, available: Collection[str]) -> list[Row]:
    """The rows that a request asks for, every one of them fit to be tried. Refused: it is not to be answered."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise Refused(415, f"content-encoding: expected a body as it is, or identity, got {encoding}")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON, MULTIPART):
        raise Refused(415, f"content-type: expected {JSON} or {MULTIPART}, got {kind or 'none'}")
    body.check_length()
    counted = Request(request.scope, body.receive)
    if kind == JSON:
        content = await counted.body()
        if len(content) > _OFF_THE_LOOP:
            wanted = await asyncio.to_thread(_of_json, content)
        else:
            wanted = _of_json(content)
    else:
        wanted = await _of_form(counted, limits)
    if not wanted:
        raise Refused(422, "items: expected at least one, got none")
    if len(wanted) > limits.items:
        raise Refused(413, f"items: expected at most {limits.items}, got {len(wanted)}")
    for number, values in enumerate(wanted):
        _check(number, values, limits)
    names = (*CONTENT, "modality", "start_sec", "end_sec")
    batch: Columns = {name: column([values.get(name) for values in wanted]) for name in names}
    rows = rows_of(batch, len(wanted), available)
    for number, row in enumerate(rows):
        if row.error is not None:
            raise Refused(422, f"items[{number}]: {row.error}", number)
    return rows


def _of_json(content: bytes) -> list[dict[str, Any]]:
    try:
        asked = EmbedRequest.model_validate_json(content.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise Refused(400, f"body: expected JSON, got {found[0]['msg']}") from None
        if not found[0]["loc"]:
            raise Refused(422, "body: expected an object with texts or items") from None
        inside = [each for each in found if each["loc"] and each["loc"][-1] not in _KINDS]  # of one of an item's kinds
        where, item = _place((inside or found)[0]["loc"])
        said = inside[0]["msg"] if inside else "expected a text, or an object with text, base64 or path"
        raise Refused(422, f"{where}: {said}", item) from None
    if (asked.texts is None) == (asked.items is None):
        raise Refused(422, "texts, items: expected one of them")
    if asked.texts is not None:
        return [{"text": text} for text in asked.texts]
    return [_of_item(number, item) for number, item in enumerate(asked.items or ())]


def _place(where: Sequence[int | str]) -> tuple[str, int | None]:
    """ "items[3].base64" and 3, of pydantic's location."""
    numbers = [part for part in where if isinstance(part, int)]
    names = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in where if part not in _KINDS]
    return "".join(names).lstrip(".") or "body", numbers[0] if numbers else None


def _of_item(number: int, item: str | EmbedItem) -> dict[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    given = [name for name in ("text", "base64", "path") if getattr(item, name) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise Refused(422, f"items[{number}]: expected one of text, base64, path, got {got}", number)
    values: dict[str, Any] = {"modality": item.modality, "start_sec": item.start_sec, "end_sec": item.end_sec}
    if item.base64 is not None:
        try:
            values["bytes"] = base64.b64decode(item.base64, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused(422, f"items[{number}].base64: expected base64, got {error}", number) from None
        return {**values, "path": item.name}
    return {**values, given[0]: getattr(item, given[0])}


async def _of_form(request: Request, limits: Limits) -> list[dict[str, Any]]:
    """Files by the name of their modality, or as `file`; texts as `text`, in the order of the form."""
    try:
        form = await _FormParser(request, limits).parse()
    except MultiPartException as error:
        raise Refused(400, f"body: expected a form, got: {error.message}") from None
    except ValueError as error:  # of the library below
        raise Refused(400, f"body: expected a form, got {error}") from None
    try:
        return [await _of_field(name, value) for name, value in form.multi_items()]
    finally:
        await form.close()


class _FormParser(MultiPartParser):
    """Of forms within the limits: as many parts as items, and a text as long as a body, which `_check` looks at."""

    def __init__(self, request: Request, limits: Limits):
        super().__init__(request.headers, request.stream(), max_files=limits.items, max_fields=limits.items)
        self.max_part_size = limits.body_bytes
        self._most, self._parts = limits.items, 0

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._most:
            raise Refused(413, f"items: expected at most {self._most}, got more")
        super().on_part_begin()


async def _of_field(name: str, value: UploadFile | str) -> dict[str, Any]:
    modality = name if name in MODALITY_NAMES else None
    if isinstance(value, UploadFile):
        if modality is None and name not in FILE_FIELDS:
            raise Refused(422, f"{name}: expected a field of a file named file, {', '.join(MODALITY_NAMES)}")
        return {"bytes": await value.read(), "path": value.filename or None, "modality": modality}
    if name in TEXT_FIELDS:
        return {"text": value}
    if name in PATH_FIELDS:
        return {"path": value}
    if modality is not None or name in FILE_FIELDS:
        raise Refused(422, f"{name}: expected a file, got a text (with curl: -F {name}=@FILE)")
    raise Refused(422, f"{name}: expected a field named file, text, path or {', '.join(MODALITY_NAMES)}")


def _check(number: int, values: dict[str, Any], limits: Limits) -> None:
    """Refuses what a row may not ask for; what is left of a path is one of this machine, below the folder."""
    text, path = values.get("text"), values.get("path")
    if isinstance(text, str) and len(text) > limits.text_characters:
        got = f"{limits.text_characters:,} characters, got {len(text):,}"
        raise Refused(413, f"items[{number}]: text: expected at most {got}", number)
    if path is None or "bytes" in values:
        return
    if why := limits.refusal(path):
        raise Refused(403, f"items[{number}]: path: {why}", number)
    if not is_url(path) and limits.allow_paths is not None:
        folder = os.path.realpath(limits.allow_paths)
        try:
            values["path"] = found = os.path.realpath(os.path.join(folder, path))
        except ValueError:
            raise Refused(422, f"items[{number}]: path: expected a name without a null character", number) from None
        if os.path.commonpath([folder, found]) != folder:
            raise Refused(403, f"items[{number}]: path: expected one below the folder of --allow-paths", number)
