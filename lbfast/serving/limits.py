"""What a server takes on, and no more."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lbfast.processing.media import is_url

REMOTE = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")
"""Schemes of URLs that can be allowed: of other machines, never of files of this one."""


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        items: of a request.
        body_bytes: of a request.
        waiting: items that are taken and not answered yet; more are refused with 503.
        held_bytes: of all the requests that are being read or answered; more are refused with 503.
        text_characters: of a text. The model reads its first 77 tokens.
        body_seconds: for the body of a request to arrive, and while it is answered for the client to read on.
        head_seconds: for its headers.
        decode_seconds: for one file.
        connections: at a time.
        allow_urls: open URLs of `REMOTE`. allow_paths: the folder below which files of this machine are opened; None:
            none are.
    """

    items: int = 64
    body_bytes: int = 64 << 20
    waiting: int = 256
    held_bytes: int = 512 << 20
    text_characters: int = 10_000
    body_seconds: float = 30
    head_seconds: float = 10
    decode_seconds: float = 30
    connections: int = 256
    allow_urls: bool = False
    allow_paths: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("allow"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**40:
                raise ValueError(f"{field.name}: expected more than 0, got {value!r}")
        if self.items > self.waiting:
            raise ValueError(f"items: expected at most waiting, {self.waiting}, got {self.items}")

    def refusal(self, path: str) -> str:
        """Why a file of a request's naming is not opened; "" where it is."""
        if is_url(path):
            scheme = path.partition(":")[0].lower()
            if not self.allow_urls:
                return "URLs are not opened here (the server's --allow-urls)"
            return "" if scheme in REMOTE and "::" not in path else f"expected a URL of {', '.join(REMOTE)}"
        if self.allow_paths is None:
            return "files of this machine are not opened here (the server's --allow-paths)"
        return ""
