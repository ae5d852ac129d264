"""What the index of an MP4 or QuickTime file says of its packets, so that only those that are wanted are read.

FFmpeg knows the place, size and time of decoding of each, and whether decoding can begin there. When each is shown is
in the file's tables stts and ctts (ISO/IEC 14496-12, 8.6.1), which are read here. Where the two do not tell the same
times, as where an edit list hides frames, there is no index; and each packet that is read must be the one announced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from lbfast.processing.media import Source

_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg")  # whose packets FFmpeg gives as they are in the file
_LARGEST = 64 << 20  # bytes of tables that are looked at
_BOXES = 1000  # that are looked at side by side


class Disagrees(Exception):
    """A packet is not what the index says."""


class Index:
    """The packets of a stream, in the file's order.

    Attributes:
        pts: when each is shown, on the stream's clock.
        keys: numbers of those where decoding can begin.
    """

    def __init__(self, container: Any, stream: Any, rows: np.ndarray, pts: list[int]):
        self._container, self._stream, self._rows = container, stream, rows
        self.pts = pts
        self.keys: list[int] = np.flatnonzero(rows["key"]).tolist()

    @classmethod
    def of(cls, source: Source, container: Any, stream: Any) -> Index | None:
        """None: there is no index, or none that says when each packet is shown.

        Raises Disagrees where the first packet is another than announced; `container` then reads from somewhere else.
        """
        if not container.format.name.startswith("mov") or stream.codec_context.codec.canonical_name not in _CODECS:
            return None
        entries = ((e.timestamp, e.pos, e.size, e.is_keyframe, e.is_discard) for e in stream.index_entries)
        kinds = [(name, np.int64) for name in ("dts", "pos", "size")] + [(name, np.bool_) for name in ("key", "hidden")]
        rows = np.fromiter(entries, kinds, len(stream.index_entries))
        if not len(rows) or rows["hidden"].any() or (rows["size"] <= 0).any():
            return None
        steps = np.diff(rows["dts"])
        if (steps <= 0).any() or (rows["pos"] < 0).any() or (rows["pos"] + rows["size"] > source.size).any():
            return None  # the last: broken off
        tables = _tables(source.file, stream.id, len(rows))
        if tables is None or not np.array_equal(tables[0][:-1], steps):
            return None
        shown = rows["dts"] + tables[1]
        if not rows["key"].any() or len(np.unique(shown)) < len(shown):
            return None
        first = next(container.demux(stream))
        if first.pts is None:
            raise Disagrees
        shown += first.pts - shown[0]  # FFmpeg shows all frames later, so that none is shown before it is decoded
        return cls(container, stream, rows, shown.tolist())

    def packets(self, first: int, last: int) -> Iterator[Any]:
        """Packets number `first` to `last`. Raises Disagrees."""
        import av

        try:
            self._container.seek(int(self._rows["dts"][first]), stream=self._stream)
            packets = self._container.demux(self._stream)
            for number in range(first, last + 1):
                packet = next(packets, None)
                while number == first and packet is not None and self._precedes(packet, first):
                    packet = next(packets, None)
                if packet is None or self._said(packet) != (self.pts[number], *self._rows[number].tolist()):
                    raise Disagrees
                yield packet
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            raise Disagrees from error

    def _precedes(self, packet: Any, number: int) -> bool:
        """FFmpeg may begin with an earlier packet."""
        return packet.dts is not None and packet.dts < self._rows["dts"][number]

    @staticmethod
    def _said(packet: Any) -> tuple[Any, ...]:
        hidden = packet.is_discard or packet.is_corrupt
        return packet.pts, packet.dts, packet.pos, packet.size, packet.is_keyframe, hidden


def _tables(file: IO[bytes], track: int, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of each of a track's samples, (count,) int64: how long until the next is decoded; how much later it is shown.

    None where the file has no such table, or one of another length, or says that more is in fragments.
    """
    before = file.tell()
    try:
        movie = _movie(file)
    finally:
        file.seek(before)
    if movie is None or _inside(movie, b"mvex") is not None:
        return None
    tracks = (data for kind, data in _boxes(movie) if kind == b"trak")
    found = next((data for data in tracks if _track(_inside(data, b"tkhd")) == track), None)
    samples = found and _inside(found, b"mdia", b"minf", b"stbl")
    if not samples:
        return None
    steps, shown = _runs(_inside(samples, b"stts"), count), _inside(samples, b"ctts")
    later = np.zeros(count, np.int64) if shown is None else _runs(shown, count)
    return None if steps is None or later is None else (steps, later)


def mirrored(file: IO[bytes], track: int) -> bool:
    """Whether an MP4 or QuickTime file says that a track is shown mirrored: by the matrix in its tkhd."""
    before = file.tell()
    try:
        movie = _movie(file)
    finally:
        file.seek(before)
    heads = (_inside(data, b"tkhd") for kind, data in _boxes(movie or memoryview(b"")) if kind == b"trak")
    head = next((head for head in heads if _track(head) == track), None)
    at = 52 if head and head[0] == 1 else 40
    if head is None or len(head) < at + 20:
        return False
    a, b, _, c, d = np.frombuffer(head, ">i4", 5, at).tolist()
    return a * d - b * c < 0


def _movie(file: IO[bytes]) -> memoryview | None:
    """What is in the box moov."""
    at = 0
    for _ in range(_BOXES):
        file.seek(at)
        head = file.read(16)
        size, head_size = _size(head)
        if size < head_size:
            return None
        if head[4:8] == b"moov":
            if size > _LARGEST:
                return None
            file.seek(at + head_size)
            data = file.read(size - head_size)
            return memoryview(data) if len(data) == size - head_size else None
        at += size
    return None


def _size(head: bytes | memoryview) -> tuple[int, int]:
    """Bytes of a box, and of its head; (0, 8) where there is none, or one that goes on to the end."""
    if len(head) < 8:
        return 0, 8
    size = int.from_bytes(head[:4], "big")
    if size != 1:
        return size, 8
    return (int.from_bytes(head[8:16], "big"), 16) if len(head) >= 16 else (0, 16)


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes in a box, up to one that is broken: kinds and contents."""
    for _ in range(_BOXES):
        size, head_size = _size(data)
        if not head_size <= size <= len(data):
            return
        yield bytes(data[4:8]), data[head_size:size]
        data = data[size:]


def _inside(data: memoryview, *kinds: bytes) -> memoryview | None:
    """The first box of a kind; of several kinds: the one in the first one in the one before."""
    for wanted in kinds:
        found = next((inside for kind, inside in _boxes(data) if kind == wanted), None)
        if found is None:
            return None
        data = found
    return data


def _track(head: memoryview | None) -> int | None:
    """The track's number, in its tkhd: after two times of 4 bytes, of 8 in version 1."""
    if not head or len(head) < 24:
        return None
    at = 20 if head[0] == 1 else 12
    return int.from_bytes(head[at : at + 4], "big")


def _runs(table: memoryview | None, count: int) -> np.ndarray | None:
    """(count,) int64 of a table of (how many, value) pairs; None where it is of another length."""
    if table is None or len(table) < 8:
        return None
    pairs = int.from_bytes(table[4:8], "big")
    if len(table) < 8 + 8 * pairs:
        return None
    many = np.frombuffer(table, ">u4", 2 * pairs, 8)[::2].astype(np.int64)
    values = np.frombuffer(table, ">i4", 2 * pairs, 8)[1::2].astype(np.int64)
    return np.repeat(values, many) if int(many.sum()) == count else None
