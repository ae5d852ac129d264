"""Recordings of any length in parts: decoded once, from first to last, each part as its end is reached.

A part of a sound is what the processor makes of a file that holds those samples of channel 0 and no others. A part of
a video is what the processor makes of the whole file with `clip_start_sec` and `clip_end_sec`: frames evenly spaced
among those whose time is in [start, end). Times count from the first sample, or the first frame.
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from lbfast.processing.audio import AudioTransform
from lbfast.processing.clip import evenly
from lbfast.processing.media import MediaWarning, Reading, Source
from lbfast.processing.sound import SoundFile
from lbfast.processing.video import Counted, Missing, VideoFile

CUT = ("video", "audio")
"""The modalities that have parts."""

_LEAST_SEGMENT, _LEAST_HOP, _MOST = Fraction(1, 2), Fraction(1, 10), Fraction(3600)  # seconds
_SHARE = 10  # a last part that has less than 1 / _SHARE of what a whole one adds is left out
_UNITS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "min": Fraction(60), "h": Fraction(3600)}


def seconds_of(given: str | float | Fraction, name: str, least: Fraction) -> Fraction:
    """ "10s", "1.5", "500ms", "2min" or a number of seconds, exactly. ValueError names the argument."""
    expected = f"{name}: expected {float(least):g} to {float(_MOST):g} seconds, as 10s, 2min or 500ms, got {given!r}"
    text = str(given).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip() or "s"
    try:
        if isinstance(given, bool) or unit not in _UNITS or "/" in number or len(number) > 20:
            raise ValueError
        seconds = Fraction(number) * _UNITS[unit]
    except ValueError:
        raise ValueError(expected) from None
    if not least <= seconds <= _MOST:
        raise ValueError(expected)
    return seconds


@dataclass(frozen=True)
class Cuts:
    """The parts of a recording: [k hop, k hop + length) seconds for k = 0, 1, ..., until one reaches its end.

    That one ends with the recording. It is left out where less than a tenth of what a whole one adds would be new in it
    (of min(length, hop)), unless it is the only one.

    Attributes:
        length, hop: seconds.
        first: number of the first part that is wanted.
    """

    length: Fraction
    hop: Fraction
    first: int = 0

    @classmethod
    def of(cls, segment: str | float, hop: str | float | None = None) -> Cuts:
        """From what a caller gives; hop None: parts that follow each other. ValueError."""
        length = seconds_of(segment, "segment", _LEAST_SEGMENT)
        return cls(length, length if hop is None else seconds_of(hop, "hop", _LEAST_HOP))

    def span(self, number: int) -> tuple[Fraction, Fraction]:
        """Beginning and end of a whole part."""
        return number * self.hop, number * self.hop + self.length

    def count(self, seconds: Fraction) -> int:
        """How many parts a recording has."""
        new = seconds - max(self.length, self.hop) - min(self.length, self.hop) / _SHARE
        return 1 if new < 0 else new // self.hop + 2


@dataclass(frozen=True)
class Segment:
    """A part.

    Attributes:
        number: from 0.
        start, end: seconds.
        expected: how many parts there are: of a video that is known, of a sound what its file announces.
        pixels: as the processor gives them.
    """

    number: int
    start: float
    end: float
    expected: int
    pixels: torch.Tensor


def sound_segments(
    item: Any, transform: AudioTransform, cuts: Cuts, reading: Reading | None = None
) -> Iterator[Segment]:
    """The parts of a sound from `cuts.first` on. Samples from ceil(start rate) to ceil(end rate) are in a part.

    A file that is broken off gives the parts before, then raises MediaError, as `SoundFile` does.
    """
    with Source(item, "an audio file", reading) as source:
        sound = SoundFile(source)
        for number, begin, end, samples in sound.windows(cuts.first, cuts.span, cuts.count):
            expected = max(number + 1, cuts.count(Fraction(sound.announced, sound.rate)))
            yield Segment(number, float(begin), float(end), expected, transform((samples, sound.rate)))
        sound.report()


def video_segments(
    item: Any,
    transform: Callable[[torch.Tensor], torch.Tensor],
    cuts: Cuts,
    num_frames: int = 8,
    reading: Reading | None = None,
) -> Iterator[Segment]:
    """The parts of a video from `cuts.first` on, `num_frames` frames each, (3, num_frames, size, size).

    A part in which no frame begins has the frame that is shown then. Frames are transformed one by one as they come,
    and shared by the parts that have them. Files whose packets do not say when each frame is shown are decoded twice.
    ValueError: a decoder that gives no parts.
    """
    if reading is not None and reading.decoder != "ffmpeg":
        raise ValueError(f"decoder: expected ffmpeg for parts of a recording, got {reading.decoder!r}")
    with Source(item, "a video", reading) as source, source.decoding(), VideoFile(source) as video:
        video.look()
        done, parts = cuts.first, None
        while video.timed:
            order, times = video.order()
            parts = _Parts(cuts, times, num_frames, video.rate)
            wanted = sorted({order[i] for k in range(done, parts.count) for i in parts.frames(k)})
            try:
                frames = ((bisect.bisect_left(order, pts), frame) for pts, frame in video.at(wanted))
                for segment in parts.filled(done, frames, lambda frame: _seen(video, transform, frame)):
                    yield segment
                    done = segment.number + 1
                done = parts.count
                break
            except Missing:
                if not video.doubt():
                    break
        if parts is None or done < parts.count:
            yield from _counted(video, transform, cuts, num_frames, done)
    if video.damage:
        warnings.warn(f"{source.name}: {video.damage}", MediaWarning, stacklevel=2)


def _counted(video: VideoFile, transform: Any, cuts: Cuts, num_frames: int, done: int) -> Iterator[Segment]:
    """The parts from `done` on by decoding all frames, once to know their times."""
    counted = Counted()
    for _ in video.counted(counted, set()):
        pass
    times = video.times_of(counted)
    parts = _Parts(cuts, times, num_frames, video.rate)
    wanted = {i for k in range(done, parts.count) for i in parts.frames(k)}
    video.judge(counted, sorted(wanted.intersection(counted.corrupt)))
    yield from parts.filled(done, video.counted(Counted(), wanted), lambda frame: _seen(video, transform, frame))


def _seen(video: VideoFile, transform: Any, frame: Any) -> torch.Tensor:
    """(3, 1, size, size) of a decoded frame."""
    return transform(torch.from_numpy(video.picture(frame)[None].copy()).permute(3, 0, 1, 2))


class _Parts:
    """Which frames the parts of a video have.

    Args:
        times: of its frames, in seconds after the first.
        rate: frames a second, for a video that has one frame.
    """

    def __init__(self, cuts: Cuts, times: Sequence[float], num_frames: int, rate: Fraction):
        self._cuts, self._times, self._num_frames = cuts, times, num_frames
        shown = times[-1] / (len(times) - 1) if len(times) > 1 else float(1 / rate)  # seconds of the last frame
        self._length = Fraction(round((times[-1] + shown) * 1_000_000), 1_000_000)
        self.count = cuts.count(self._length)

    def frames(self, number: int) -> list[int]:
        """Numbers of a part's frames, in order; with fewer than wanted some are repeated."""
        begin, end = (bisect.bisect_left(self._times, float(at)) for at in self._cuts.span(number))
        if begin == end:
            begin, end = max(0, begin - 1), max(1, begin)
        return [begin + i for i in evenly(end - begin, self._num_frames)]

    def filled(
        self, first: int, frames: Iterator[tuple[int, Any]], made: Callable[[Any], torch.Tensor]
    ) -> Iterator[Segment]:
        """The parts from `first` on, each when its last frame has come. Missing: one did not come."""
        have: dict[int, torch.Tensor] = {}
        for number in range(first, self.count):
            wanted = self.frames(number)
            have = {i: frame for i, frame in have.items() if i >= wanted[0]}
            while not all(i in have for i in wanted):
                i, frame = next(frames, (None, None))
                if i is None:
                    raise Missing
                have[i] = made(frame)
            begin, end = self._cuts.span(number)
            clip = torch.cat([have[i] for i in wanted], dim=1)
            yield Segment(number, float(begin), float(min(end, self._length)), self.count, clip)
