"""Parts of a long sound, without decoding what is between them: a decoder is begun a second before each part.

Only of codecs whose decoders then give what they give in a full pass, to the bit, and only where the times of packets
and frames tell to the sample where each is. Everything else is Unsure, and decoded from first to last.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, Protocol

FORGETFUL = ("aac", "mp3", "mp3float", "flac", "vorbis")
"""Codecs whose decoders need no more than a second before what they give. Where AAC says "noise", it is drawn anew."""


class Unsure(Exception):
    """A full pass might give other samples, or something to report."""


class Part(Protocol):
    """What is kept: samples `begin` to `end`; `take` gets each frame with the number of its first sample."""

    begin: int
    end: int

    def take(self, frame: Any, at: int) -> None: ...


def form_of(frame: Any) -> tuple[int, str, int]:
    """Rate, sample format and channels of a decoded frame."""
    return frame.sample_rate, frame.format.name, frame.layout.nb_channels


class Windows:
    """Decodes a stream's packets near the parts, and its last second, which says how long it is.

    Args:
        codec: the stream's decoder.
        unit: samples that a tick of its clock takes.
        parts: of which none overlap; the first begins at 0.
        rate: Hz.
    """

    def __init__(self, codec: Any, unit: Fraction, parts: Sequence[Part], rate: int):
        self._codec, self._unit, self._parts, self._rate = codec, unit, parts, rate
        self._second = int(rate / unit)  # in ticks
        spans = [(part.begin - rate, part.end + rate // 4) for part in parts]
        self._spans = [(int(begin / unit), int(end / unit)) for begin, end in spans]
        self._origin: int | None = None  # time of the first frame
        self._next: int | None = None  # sample that the next frame begins with
        self._sure = 0  # frames from this sample on are as in a full pass
        self._form: tuple[int, str, int] | None = None

    def read(self, packets: Iterable[Any]) -> int:
        """Fills the parts and returns how many samples the sound has. Raises Unsure."""
        left: collections.deque[Any] = collections.deque()  # packets of the last second that were not decoded
        first, due, todo = None, None, sorted(self._spans)
        for packet in packets:
            if packet.size == 0:
                continue  # PyAV's own, at the end
            if packet.pts is None or not packet.duration or packet.is_corrupt or due not in (None, packet.pts):
                raise Unsure
            first, due = packet.pts if first is None else first, packet.pts + packet.duration
            at = packet.pts - first
            while todo and at >= todo[0][1]:
                todo.pop(0)
            if todo and at >= todo[0][0]:
                if left:
                    self._begin(at)
                    left.clear()
                self._decode(packet)
                continue
            left.append(packet)
            while due - left[0].pts - left[0].duration > self._second:
                left.popleft()
        if left and first is not None:
            self._begin(left[0].pts - first)
            for packet in left:
                self._decode(packet)
        self._decode(None)
        if self._next is None or self._next <= self._sure:
            raise Unsure
        return self._next

    def _begin(self, at: int) -> None:
        """Forgets what was before tick `at`; half a second on the decoder gives what it would have without a gap."""
        self._codec.flush_buffers()
        self._next, self._sure = None, int(at * self._unit) + self._rate // 2

    def _decode(self, packet: Any) -> None:
        import av

        try:
            frames = self._codec.decode(packet)
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            if self._next is None or self._next >= self._sure:
                raise Unsure from error
            return
        for frame in frames:
            if frame.pts is None:
                raise Unsure
            self._origin = frame.pts if self._origin is None else self._origin
            at, rest = divmod((frame.pts - self._origin) * self._unit.numerator, self._unit.denominator)
            if at >= self._sure:
                self._form = self._form or form_of(frame)
                if rest or frame.is_corrupt or self._next not in (None, at) or form_of(frame) != self._form:
                    raise Unsure
                for part in self._parts:
                    part.take(frame, at)
            self._next = at + frame.samples
