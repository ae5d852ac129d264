"""Sounds that are decoded once and kept in parts: files of any length, and waveforms in memory, behind one face."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch

from lbfast.processing.container import only, opened, packets
from lbfast.processing.media import MediaError, MediaWarning, Source
from lbfast.processing.windows import FORGETFUL, Unsure, Windows, form_of

_RATES = (4_000, 768_000)  # Hz
_LOUD = 100.0  # samples are in [-1, 1], some a little beyond; integers given as floats are far beyond
_HEAD_SECONDS, _MARGIN_SECONDS = 30, 1  # kept in any case; kept around each part, as lengths are announced wrongly
_DAMAGED = 10  # at most one packet in so many may be undecodable
_FLAC_SECONDS = 0.01  # its header says how many samples there are; one that has fewer is truncated
_LONG_SECONDS = 60  # longer files are not decoded between the parts, where that changes nothing
_WAV_BYTES = 1 << 16  # of a packet: FFmpeg's 4096 are a call of the decoder each
_DTYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}

_SUMMED = ("ac3", "eac3")  # each packet has a checksum, which FFmpeg looks at when told to

Span = tuple[int, int]
"""[begin, end) in samples."""


class Sound(Protocol):
    """Channel 0 of a sound.

    Attributes:
        name: for errors. rate: Hz, known when `parts` asks for its plan.
    """

    name: str
    rate: int

    def parts(self, plan: Callable[[int], list[Span]]) -> tuple[int, list[torch.Tensor]]:
        """How many samples there are, and those of the spans that `plan` chooses when told how many: float32."""
        ...


class SoundInMemory:
    """`(waveform, sample_rate)`; see AudioTransform for what it may be."""

    name = "waveform"

    def __init__(self, audio: Any):
        if not (isinstance(audio, tuple | list) and len(audio) == 2 and np.ndim(audio[1]) == 0):
            raise TypeError(f"audio: expected a path or (waveform, sample_rate), got {type(audio).__name__}")
        self._waveform = torch.as_tensor(audio[0]).detach()
        try:
            self.rate = int(audio[1])
        except (TypeError, ValueError, OverflowError):
            self.rate = 0
        if self.rate != audio[1]:
            raise MediaError(self.name, "a sample rate in whole Hz", f"{audio[1]!r}")
        check_rate(self.name, self.rate)
        shape = tuple(self._waveform.shape)
        if self._waveform.dim() == 1:
            self._waveform = self._waveform.unsqueeze(0)
        if self._waveform.dim() != 2 or self._waveform.numel() == 0:
            raise MediaError(self.name, "shape (samples,) or (channels, samples)", f"shape {shape}")
        if not self._waveform.is_floating_point() and self._waveform.dtype not in (torch.int16, torch.int32):
            raise MediaError(self.name, "floats in [-1, 1], int16 or int32", f"dtype {self._waveform.dtype}")

    def parts(self, plan: Callable[[int], list[Span]]) -> tuple[int, list[torch.Tensor]]:
        """See Sound."""
        samples = self._waveform.shape[1]
        return samples, [_checked(self.name, floats(self._waveform[0, a:b])) for a, b in plan(samples)]


class SoundFile:
    """The first audio stream of a file (the sound of a video too). What is not kept is dropped as it is decoded.

    Of long files what is not kept is not decoded either, where that gives the same samples (see `windows`).

    Packets that cannot be decoded are passed over, as FFmpeg does, and reported once, unless they are more than a
    tenth or `strict` was asked for: then MediaError, which is raised too where a file is broken off, has no sound,
    changes its channels or rate on the way, or has a rate outside 4 to 768 kHz.
    """

    def __init__(self, source: Source):
        self.source, self.name, self.rate = source, source.name, 0
        source.check_complete()
        self._seconds, self.announced = 0.0, 0  # and samples, before the file was decoded; 0: not said
        self._damage = ""

    def parts(self, plan: Callable[[int], list[Span]]) -> tuple[int, list[torch.Tensor]]:
        """See Sound. Decodes once more where the announced length was so wrong that other parts were kept."""
        spans: list[Span] | None = None
        near = True
        for _ in range(4):
            with self._opened() as (container, stream):
                near = near and self._skippable(stream)
                likely = self._likely(plan, _MARGIN_SECONDS if near else _HEAD_SECONDS)
                kept = [_Part(*span) for span in (likely if spans is None else spans)]
                samples = (self._near if near else self._all)(container, stream, kept)
            wanted = plan(samples)
            if samples and (found := _cut(kept, wanted, samples)) is not None:
                self.report()
                return samples, [_checked(self.name, x) for x in found]
            near, spans = False, None if near else wanted
        raise self.source.error("that decodes differently each time")

    def _skippable(self, stream: Any) -> bool:
        """Whether it is worth while, and allowed, to decode only what is kept."""
        codec = stream.codec_context
        long = self.announced > _LONG_SECONDS * self.rate
        return long and codec.name in FORGETFUL and not self.source.reading.strict

    def _near(self, container: Any, stream: Any, kept: list[_Part]) -> int:
        """Decodes what is kept; how many samples there are, or 0 where all is to be decoded to know."""
        windows = Windows(stream.codec_context, stream.time_base * self.rate, kept, self.rate)
        try:
            samples = windows.read(packets(self.source, container, stream))
        except Unsure:
            return 0
        truncated = container.format.name == "flac" and samples < self.announced - _FLAC_SECONDS * self.rate
        return 0 if truncated else samples

    def _all(self, container: Any, stream: Any, kept: list[_Part]) -> int:
        """The same, decoding from first to last."""
        samples = 0
        for frame in self._frames(container, stream):
            for part in kept:
                part.take(frame, samples)
            samples += frame.samples
        return samples

    def windows(
        self, first: int, span: Callable[[int], tuple[Fraction, Fraction]], count: Callable[[Fraction], int]
    ) -> Iterator[tuple[int, Fraction, Fraction, torch.Tensor]]:
        """Windows of channel 0 in order, each when its end is reached: (number, begin, end, float32 samples).

        Begin and end are in seconds. No more is kept than the next one needs.

        Args:
            first: number of the first one that is wanted.
            span: begin and end of a window by its number, in seconds, both rising.
            count: how many windows a sound of so many seconds has: all that end within it, and perhaps the next, which
                ends with the sound.
        """

        def edges(number: int) -> Span:
            begin, end = span(number)
            return math.ceil(begin * self.rate), math.ceil(end * self.rate)

        samples, number, kept = 0, first, None
        for frame in self.frames():
            kept = _Tail(edges(first)[0]) if kept is None else kept
            kept.take(frame, samples)
            samples += frame.samples
            while edges(number)[1] <= samples:
                yield number, *span(number), self._floats(kept, *edges(number))
                number += 1
                kept.forget(edges(number)[0])
        length = Fraction(samples, self.rate)
        if kept is not None and number < count(length):
            yield number, span(number)[0], length, self._floats(kept, edges(number)[0], samples)

    def _floats(self, kept: _Tail, begin: int, end: int) -> torch.Tensor:
        return _checked(self.name, floats(torch.from_numpy(kept.cut(begin, end))))

    def whole(self) -> torch.Tensor:
        """(channels, samples) float32."""
        waveform = floats(torch.from_numpy(np.concatenate([_channels(frame) for frame in self.frames()], axis=1)))
        self.report()
        return waveform

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its first audio stream; sets the rate and what length is announced."""
        more = {}
        if self.source.what == "a WAV file":  # its header says it all; by default 5 s are searched for other codecs
            more = {"probesize": "4096", "max_size": str(_WAV_BYTES)}
        with opened(self.source, "sound", more=more) as container:
            if not container.streams.audio:
                raise self.source.error("without sound")
            stream = container.streams.audio[0]
            codec = stream.codec_context
            if codec is None:
                raise self.source.error("in a codec that FFmpeg cannot decode here")
            only(container, stream)
            self.rate = codec.sample_rate
            check_rate(self.name, self.rate)
            self._seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
            self._seconds = self._seconds or (container.duration or 0) / 1e6
            self.announced = self.announced_by(self._seconds)
            yield container, stream

    def frames(self) -> Iterator[Any]:
        """What the decoder gives, from first to last: frames of one rate, form and number of channels."""
        with self._opened() as (container, stream):
            yield from self._frames(container, stream)

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        import av

        codec = stream.codec_context
        if codec.name in _SUMMED:
            codec.options = {"err_detect": "crccheck+explode"}
        summed = _FlacSum.of(codec)
        count = bad = samples = 0
        why = ""
        kind: tuple[int, str, int] | None = None
        for packet in packets(self.source, container, stream):
            count += 1
            try:
                frames = codec.decode(packet)
            except av.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                frames, bad, why = [], bad + 1, why or str(error.strerror)
            for frame in frames:
                bad, why = bad + frame.is_corrupt, "marked so by the decoder" if frame.is_corrupt else why
                form = form_of(frame)
                if form != (kind or form):
                    raise self.source.error("whose channels or rate change on the way")
                kind, samples = form, samples + frame.samples
                if summed is not None:
                    summed.take(frame)
                yield frame
        if samples == 0:
            raise self.source.error(f"that cannot be decoded ({why})" if why else "without samples")
        if container.format.name == "flac" and samples < (self._seconds - _FLAC_SECONDS) * self.rate:
            raise self.source.error(f"that is truncated: {samples / self.rate:.2f} s of {self._seconds:.2f} s")
        self._damage = f"{bad} of {count} packets are broken ({why}); they are passed over" if bad else ""
        if summed is not None and summed.differs():
            self._damage = "its samples are not those of the checksum (MD5) in its header"
        if bad * _DAMAGED > count or (self._damage and self.source.reading.strict):
            raise self.source.error(f"of which {self._damage}")

    def announced_by(self, seconds: float) -> int:
        """Samples of the length that the container tells; 0: it does not."""
        return max(0, int(seconds * self.rate))

    def _likely(self, plan: Callable[[int], list[Span]], head: int) -> list[Span]:
        """The first seconds, and what is wanted if the file is about as long as it announces; none overlap."""
        margin = _MARGIN_SECONDS * self.rate
        spans = [(max(0, a - margin), b + margin) for a, b in plan(self.announced)] if self.announced else []
        merged = [(0, head * self.rate)]
        for begin, end in sorted(spans):
            if end - begin > 4 * _HEAD_SECONDS * self.rate:
                continue  # a plan for a length that is wrong
            if begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((begin, end))
        return merged

    def report(self) -> None:
        """Warns once of what was passed over in a file that was read to its end."""
        if self._damage:
            warnings.warn(f"{self.name}: {self._damage}", MediaWarning, stacklevel=2)


class _FlacSum:
    """The MD5 sum of all samples that a FLAC header (STREAMINFO) may hold, beside that of the samples decoded."""

    def __init__(self, header: bytes):
        self._bits = ((header[12] & 1) << 4 | header[13] >> 4) + 1
        self._left = int.from_bytes(header[13:18], "big") & ((1 << 36) - 1)
        self._wanted, self._sum = header[18:34], hashlib.md5(usedforsecurity=False)

    @classmethod
    def of(cls, codec: Any) -> _FlacSum | None:
        """None where there is no such sum: of other codecs, and where the encoder could not go back to its header."""
        header = codec.extradata if codec.name == "flac" else None
        return cls(header) if header and len(header) == 34 and any(header[18:]) else None

    def take(self, frame: Any) -> None:
        samples = _channels(frame).T
        values = np.ascontiguousarray(samples, "<i4") >> (8 * samples.itemsize - self._bits)
        self._sum.update(values.view(np.uint8).reshape(-1, 4)[:, : (self._bits + 7) // 8].tobytes())
        self._left -= frame.samples

    def differs(self) -> bool:
        """Whether all of the samples came, and are others. Of a part that was cut out it says nothing."""
        return self._left <= 0 and self._sum.digest() != self._wanted


class _Part:
    """Channel 0 from sample `begin` to `end`, collected while frames go by."""

    def __init__(self, begin: int, end: int):
        self.begin, self.end = begin, end
        self._chunks: list[np.ndarray] = []

    def take(self, frame: Any, at: int) -> None:
        """What a frame whose first sample is number `at` has of it."""
        a, b = max(self.begin - at, 0), min(self.end - at, frame.samples)
        if a < b:
            self._chunks.append(_first_channel(frame)[a:b].copy())

    def cut(self, begin: int, end: int) -> torch.Tensor:
        """float32 samples [begin, end), inside the part."""
        if not self._chunks:
            return torch.empty(0)
        if len(self._chunks) > 1:
            self._chunks = [np.concatenate(self._chunks)]
        return floats(torch.from_numpy(self._chunks[0][begin - self.begin : end - self.begin]))


class _Tail:
    """Channel 0 from sample `begin` on, as far as frames went by; what lies before is forgotten."""

    def __init__(self, begin: int):
        self._begin, self._chunks = begin, collections.deque[tuple[int, np.ndarray]]()

    def take(self, frame: Any, at: int) -> None:
        """A frame whose first sample is number `at`."""
        if at + frame.samples > self._begin:
            self._chunks.append((at, _first_channel(frame).copy()))

    def forget(self, begin: int) -> None:
        """What lies before sample `begin`."""
        self._begin = begin
        while self._chunks and self._chunks[0][0] + len(self._chunks[0][1]) <= begin:
            self._chunks.popleft()

    def cut(self, begin: int, end: int) -> np.ndarray:
        """Samples [begin, end), none of which is forgotten."""
        return np.concatenate([chunk[max(0, begin - at) : max(0, end - at)] for at, chunk in self._chunks])


def _cut(kept: list[_Part], spans: list[Span], samples: int) -> list[torch.Tensor] | None:
    """The spans from the parts that hold them; None where one is in none."""
    found = [next((p for p in kept if p.begin <= a and min(b, samples) <= p.end), None) for a, b in spans]
    cut = [part.cut(a, b) for part, (a, b) in zip(found, spans) if part is not None]
    return cut if len(cut) == len(spans) else None


def check_rate(name: str, rate: int) -> None:
    """Raises MediaError for a rate that is none of recordings: resampling it could take hours, or all memory."""
    low, high = _RATES
    if not low <= rate <= high:
        raise MediaError(name, f"a sample rate from {low} to {high} Hz", f"{rate} Hz")


def floats(samples: torch.Tensor) -> torch.Tensor:
    """Samples of any width as float32 in [-1, 1): integers over their range, unsigned bytes around 128."""
    if samples.is_floating_point():
        return samples.float()
    if samples.dtype == torch.uint8:
        return (samples.float() - 128) / 128
    scale = -float(torch.iinfo(samples.dtype).min)
    return (samples.double() / scale).float() if samples.element_size() > 2 else samples.float() / scale


def _channels(frame: Any) -> np.ndarray:
    """(channels, samples) of a decoded frame."""
    samples = frame.to_ndarray()
    return samples if frame.format.is_planar else samples.reshape(frame.samples, -1).T


def _first_channel(frame: Any) -> np.ndarray:
    """(samples,) of channel 0."""
    step = 1 if frame.format.is_planar else frame.layout.nb_channels
    dtype = _DTYPES[frame.format.name.removesuffix("p")]
    return np.frombuffer(frame.planes[0], dtype, frame.samples * step)[::step]


def _checked(name: str, samples: torch.Tensor) -> torch.Tensor:
    peak = samples.abs().max().item() if samples.numel() else 0.0
    if not np.isfinite(peak):  # the largest of anything and NaN is NaN
        raise MediaError(name, "finite samples", "NaN or infinite values")
    if peak > _LOUD:
        raise MediaError(name, "samples in [-1, 1]", f"values up to {peak:g}")
    return samples
