"""Files as disks and crashes leave them."""

from __future__ import annotations

import random

PAGE = 4096


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Some bytes of a file, damaged once to three times at random places; never the same bytes."""
    found = content
    while found == content:
        for _ in range(draw.randint(1, 3)):
            found = draw.choice(_WAYS)(found, draw) if found else content
    return found


def _flipped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def _zeroed(content: bytes, draw: random.Random) -> bytes:
    """A page; a few bytes."""
    size = draw.choice((PAGE, 512, 7))
    at = draw.randrange(len(content)) // size * size
    return content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]


def _torn(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _missing(content: bytes, draw: random.Random) -> bytes:
    start, end = _part(content, draw)
    return content[:start] + content[end:]


def _repeated(content: bytes, draw: random.Random) -> bytes:
    start, end = _part(content, draw)
    return content[:end] + content[start:]


def _moved(content: bytes, draw: random.Random) -> bytes:
    start, end = _part(content, draw)
    rest = content[:start] + content[end:]
    at = draw.randrange(len(rest) + 1)
    return rest[:at] + content[start:end] + rest[at:]


def _noise(content: bytes, draw: random.Random) -> bytes:
    start, end = _part(content, draw)
    return content[:start] + draw.randbytes(end - start) + content[end:]


def _longer(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice((bytes(PAGE), draw.randbytes(100), content[: draw.randrange(len(content))]))


def _part(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(content))
    return start, min(len(content), start + draw.choice((1, 28, 512, PAGE)))


_WAYS = (_flipped, _zeroed, _torn, _missing, _repeated, _moved, _noise, _longer)
