"""The application: POST /embed, GET /health, GET /metrics, and /docs, the page that describes them."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

import lbfast
from lbfast.data.suffixes import LANGUAGE, MODALITY_NAMES
from lbfast.embedding.columns import Row
from lbfast.embedding.embedder import Embedder
from lbfast.embeds import usable
from lbfast.serving.batching import Batcher, Full, Unusable
from lbfast.serving.decoding import Decoders
from lbfast.serving.limits import Limits
from lbfast.serving.metrics import Metrics
from lbfast.serving.requests import FILE_FIELDS, JSON, MULTIPART, TEXT_FIELDS, Body, EmbedRequest, Refused, read_rows

NPY = "application/x-npy"
_GONE = 499  # as nginx counts a client that has left
_logger = logging.getLogger("lbfast.serving")


class Service:
    """An embedder as requests meet it.

    Args:
        embedder: of one device.
        limits: what is taken on.
        wait: seconds that an item waits at most for others to join its batch.
        workers: processes that decode files.
    """

    def __init__(self, embedder: Embedder, limits: Limits, wait: float, workers: int):
        self.embedder, self.limits, self.workers = embedder, limits, workers
        self.batcher = Batcher(
            self._run,
            size=embedder.batch_size,
            wait=wait,
            room=limits.waiting,
            on_batch=lambda *batch: self.metrics.batch(*batch),
        )
        self.metrics = Metrics(lambda: self.batcher.taken)
        self._decoders: Decoders | None = None
        self._held = [0]

    @asynccontextmanager
    async def running(self, _: Any = None) -> AsyncIterator[None]:
        """Within it requests are answered; at its end nobody waits any more."""
        self._decoders = Decoders(self.embedder.processors(), self.workers, self.limits.decode_seconds)
        self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.stop()
            self._decoders.close()

    def _run(self, kind: str, values: Sequence[Any]) -> list[np.ndarray | str]:
        """A batch, in the thread of the model."""
        rows = self.embedder.embed_values(kind, values).cpu()
        fine = usable(rows).tolist()
        return [row.numpy() if good else self.embedder.not_finite() for row, good in zip(rows, fine)]

    async def answer(self, request: Request) -> Response:
        """Embeddings, or why there are none."""
        start, body = time.monotonic(), Body(request, self.limits, self._held)
        try:
            response = await self._embeddings(request, body)
        except Refused as refused:
            response = _refusal(refused)
            if refused.status in (413, 503):
                await body.drain()
            if refused.status in (408, 413, 503):
                response.headers["connection"] = "close"
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        except Exception as error:
            _logger.exception("a request failed")
            response = _refusal(Refused(500, f"{type(error).__name__}: {error}"))
        finally:
            body.release()
        self.metrics.requests.labels(str(response.status_code)).inc()
        self.metrics.seconds.observe(time.monotonic() - start)
        return response

    async def _embeddings(self, request: Request, body: Body) -> Response:
        rows = await read_rows(request, body, self.limits, self.embedder.checkpoints)
        try:
            self.batcher.take(len(rows))
        except Full:
            seconds = max(1, math.ceil(self.batcher.seconds_of_work))
            raise Refused(503, f"{self.batcher.taken} items are waiting already", retry=seconds) from None
        try:
            work = asyncio.ensure_future(self._all(rows))
            gone = asyncio.ensure_future(_gone(request))
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            for task in (gone, work):
                if not task.done():
                    task.cancel()
            await asyncio.wait({work, gone})
            if work.cancelled():
                raise ClientDisconnect
            return self._response(request, rows, work.result())
        finally:
            self.batcher.done(len(rows))

    async def _all(self, rows: Sequence[Row]) -> np.ndarray:
        """(n, E) float32. Refused: names the item that cannot be embedded; the others are let go of."""
        tasks = [asyncio.ensure_future(self._one(row)) for row in rows]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for number, task in enumerate(tasks):
                if task.done() and isinstance(error := task.exception(), Unusable):
                    raise Refused(422, f"items[{number}]: {error}", number)
            return np.stack([await task for task in tasks])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, row: Row) -> np.ndarray:
        assert self._decoders is not None and row.modality is not None
        value = row.text if row.task is None else await self._decoders.decode(row.task)
        return await self.batcher.embed(row.modality, value)

    def _response(self, request: Request, rows: Sequence[Row], embeddings: np.ndarray) -> Response:
        if NPY in request.headers.get("accept", ""):
            file = io.BytesIO()
            np.save(file, embeddings)
            return Response(file.getvalue(), media_type=NPY)
        modalities = [row.modality or "" for row in rows]
        models = [self.embedder.checkpoint_of(name).name for name in modalities]
        answer = {"embeddings": embeddings.tolist(), "modalities": modalities, "models": models}
        return Response(json.dumps(answer), media_type=JSON)

    def health(self) -> Response:
        """200 while requests are answered, else 503."""
        alive = self.batcher.alive
        fields = {
            "status": "ok" if alive else "stopped",
            "models": {name: each.name for name, each in self.embedder.checkpoints.items()},
            "device": str(self.embedder.device),
            "dtype": str(self.embedder.dtype).removeprefix("torch."),
            "size": self.embedder.size,
            "waiting": self.batcher.taken,
        }
        return JSONResponse(fields, 200 if alive else 503)


async def _gone(request: Request) -> None:
    """Until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(refused: Refused) -> Response:
    content: dict[str, Any] = {"error": refused.message}
    if refused.item is not None:
        content["item"] = refused.item
    headers = {} if refused.retry is None else {"retry-after": str(math.ceil(refused.retry))}
    return JSONResponse(content, refused.status, headers)


_FORM = {
    "type": "object",
    "properties": {
        **{
            name: {"type": "array", "items": {"type": "string", "format": "binary"}}
            for name in (FILE_FIELDS[0], *MODALITY_NAMES)
        },
        TEXT_FIELDS[0]: {"type": "array", "items": {"type": "string"}},
    },
}
_ANSWER = {
    "type": "object",
    "properties": {
        "embeddings": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        "modalities": {"type": "array", "items": {"enum": [*MODALITY_NAMES, LANGUAGE]}},
        "models": {"type": "array", "items": {"type": "string"}},
    },
}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}, "item": {"type": "integer"}},
    "required": ["error"],
}
_REFUSALS = {
    400: "The body is no JSON, or no form",
    403: "Paths and URLs are not opened here",
    408: "The body took too long to arrive",
    413: "Too large, or too many items",
    415: "Neither JSON nor a form, or compressed",
    422: "An item cannot be embedded: `item` is its number",
    503: "Too much is waiting; try again after Retry-After seconds",
}


def _request_schema() -> dict[str, Any]:
    """Of `EmbedRequest`, its items in their place: OpenAPI has no definitions there."""
    schema = EmbedRequest.model_json_schema()
    (name, item), *_ = schema.pop("$defs").items()
    return json.loads(json.dumps(schema).replace(f'{{"$ref": "#/$defs/{name}"}}', json.dumps(item)))


def make_app(embedder: Embedder, *, limits: Limits | None = None, wait: float = 0.005, workers: int = 1) -> FastAPI:
    """The ASGI application. See `Service` for the arguments."""
    service = Service(embedder, limits or Limits(), wait, workers)
    app = FastAPI(
        title="lbfast",
        version=lbfast.__version__,
        description="Embeddings of texts, images, video, audio, depth and thermal pictures in one space.",
        lifespan=service.running,
    )
    app.state.service = service

    @app.post(
        "/embed",
        summary="Embeds texts and files",
        description=f"Rows of unit length, in the order of the items; with `Accept: {NPY}` in NumPy's format.",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    JSON: {"schema": _request_schema()},
                    MULTIPART: {"schema": _FORM},
                },
            }
        },
        responses={
            200: {"content": {JSON: {"schema": _ANSWER}, NPY: {"schema": {"type": "string", "format": "binary"}}}},
            **{code: {"description": why, "content": {JSON: {"schema": _ERROR}}} for code, why in _REFUSALS.items()},
        },
    )
    async def embed(request: Request) -> Response:
        return await service.answer(request)

    @app.get("/health", summary="Whether requests are answered, and by which models")
    async def health() -> Response:
        return service.health()

    @app.get("/metrics", summary="Counts for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.shown(), media_type="text/plain; version=0.0.4")

    return app
