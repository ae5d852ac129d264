"""Stores on the loopback, for tests: a server of files that answers ranges, and fails as it is told."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class Store:
    """A folder at `url`. `fault`: "busy" or "cut" (a third of the answers), "whole", "deaf" (to ranges, for good)."""

    def __init__(self, folder: Path):
        self.fault, self.until = "", 0.0
        self.asked: list[tuple[str, str]] = []
        self._count = itertools.count()
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                asked = self.headers.get("Range", "")
                store.asked.append((self.path, asked))
                if store.fault == "deaf":
                    time.sleep(30)
                fails = next(store._count) % 3 == 0
                if time.monotonic() < store.until:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if store.fault == "busy" and fails:
                    return self._say(503)
                file = folder / self.path.lstrip("/")
                if file.is_dir():
                    names = "".join(f'<a href="{each.name}">x</a>' for each in file.iterdir())
                    return self._say(200, names.encode(), body)
                if not file.is_file():
                    return self._say(404 if "secret" not in self.path else 403)
                data, span = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
                if span is None or store.fault == "whole":
                    return self._say(200, data, body)
                part = data[int(span[1]) : int(span[2]) + 1]
                self._say(206, part, body, keep=len(part) // 2 if store.fault == "cut" and fails else len(part))

            def _say(self, status: int, data: bytes = b"", body: bool = True, keep: int | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
                self.end_headers()
                if body:
                    self.wfile.write(data[:keep])
                if keep is not None and keep < len(data):
                    self.close_connection = True

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def down(self, seconds: float) -> None:
        """From now on, for so long, nobody gets an answer."""
        self.until = time.monotonic() + seconds

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Store]:
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()
