"""A process that listens: one embedder of one device, until it is told to stop; what it has taken it finishes."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lbfast.embedding.embedder import Embedder
from lbfast.serving.app import make_app
from lbfast.serving.limits import Limits
from lbfast.signals import Stopped


def serve(
    embedder: Embedder,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    wait: float = 0.005,
    workers: int = 1,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serves until SIGTERM or SIGINT; then it takes nothing new, answers what it has, and returns.

    Args:
        embedder: of one device; its models are opened first.
        host, port: where to listen; 0 is a port that is free.
        limits, wait, workers: see `lbfast.serving.app.Service`.
        on_ready: called with the address, "http://127.0.0.1:8000", when it listens.

    Raises OSError where the address cannot be had, and what opening the models raises.
    """
    limits = limits or Limits()
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # of a broken form its client hears
    app = make_app(embedder, limits=limits, wait=wait, workers=workers)
    with _listening(host, port) as listener:
        for modality in embedder.checkpoints:
            embedder.open(modality)
        embedder.encode(["ready"])
        config = uvicorn.Config(
            app,
            http=_protocol(limits.head_seconds, limits.body_seconds),
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=30,
        )
        name, at = listener.getsockname()[:2]
        with contextlib.suppress(Stopped, KeyboardInterrupt):  # the signal again, when all is done
            _Server(config, lambda: on_ready(f"http://{f'[{name}]' if ':' in name else name}:{at}")).run([listener])


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"host, port: {error.strerror}", f"{host}:{port}") from None
    return listener


class _Server(uvicorn.Server):
    """Says when it listens, and takes a terminal that is closed for SIGTERM."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]):
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda number, frame: self.handle_exit(signal.SIGTERM, frame))
        self._on_ready()


def _protocol(head_seconds: float, send_seconds: float) -> type[H11Protocol]:
    """HTTP for clients that may be slow or leave: headers, what follows a refusal, and the reading of an answer have
    their time, and half a request is answered with 4xx."""

    class Impatient(H11Protocol):
        _late: Any = None
        _unread: Any = None

        def connection_made(self, transport: Any) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def eof_received(self) -> None:
            if self.conn.their_state is h11.SEND_BODY or (self.conn.their_state is h11.IDLE and self._begun()):
                self._refuse("400 Bad Request", "the request ended before it was complete")

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unwatch()
            self.resume_writing()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._unread is None:
                self._unread = self.loop.call_later(send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _begun(self) -> bool:
            """Whether part of a request's headers has come."""
            return bool(self.conn.trailing_data[0])

        def _watch(self) -> None:
            """Gives the headers of the next request their time, from the connection or their first byte on."""
            waits = self.conn.their_state is h11.IDLE and (self.cycle is None or self._begun())
            answered = self.cycle is not None and self.cycle.response_complete
            if waits or (answered and self.conn.their_state is h11.SEND_BODY):  # a body that nobody reads
                if self._late is None:
                    said = f"headers: expected all of them within {head_seconds:g} s"
                    self._late = self.loop.call_later(head_seconds, self._refuse, "408 Request Timeout", said)
            else:
                self._unwatch()

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _refuse(self, status: str, why: str) -> None:
            answered = self.conn.their_state is h11.SEND_BODY and self.cycle.response_started
            if not answered and not self.transport.is_closing():
                body = f'{{"error": "{why}"}}'
                self.transport.write(
                    f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
                    f"connection: close\r\n\r\n{body}".encode()
                )
            self.transport.close()

    return Impatient
