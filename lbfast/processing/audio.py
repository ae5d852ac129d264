"""Audio files -> log-mel pictures (3, num_mel_bins, target_length), as Kaldi computes them.

Of a long sound only three segments of channel 0 are used, and only they are kept and resampled. Upstream takes the mean
of the whole waveform away first; Kaldi takes each frame's own mean away, so that this changes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from lbfast.processing.media import MediaError, Reading, Source, is_readable, named
from lbfast.processing.mel import FRAME_MS, SHIFT_MS, fbank
from lbfast.processing.sound import Sound, SoundFile, SoundInMemory, Span

_WAVEFORM = "an audio file"
_SPAN = 1024  # about how many input samples the outputs of one product span, in `resample`
_OUTPUTS = 64  # at least so many outputs a block


def read_audio(path: Any, reading: Reading | None = None) -> tuple[torch.Tensor, int]:
    """Decodes the first audio stream of a file (the sound of a video too), all of it.

    Args:
        path: a path, bytes or a file object.
        reading: strict, allow_urls.

    Returns:
        (channels, samples) float32 in [-1, 1], and the sample rate in Hz.

    Raises:
        FileNotFoundError: no such file.
        MediaError: empty, broken, truncated, without sound, or of a sample rate outside 4 to 768 kHz.
    """
    with Source(path, _WAVEFORM, reading) as source:
        sound = SoundFile(source)
        return sound.whole(), sound.rate


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # whoever calls first
def _phases(old: int, new: int, first: int, count: int) -> tuple[int, torch.Tensor]:
    """Weights (taps, count) of `count` outputs of each block, from `first` on, and the input sample they begin at."""
    cutoff = min(old, new) * 0.99
    width = math.ceil(6 * old / cutoff)
    start = first * old // new - width
    taps = (first + count - 1) * old // new + width + 2 - start
    t = (np.arange(start, start + taps)[:, None] / old - np.arange(first, first + count) / new) * cutoff
    window = np.where(np.abs(t) < 6, np.cos(np.pi * t / 12) ** 2, 0.0)
    return start, torch.from_numpy((np.sinc(t) * window * cutoff / old).astype(np.float32))


def _blocks(old_rate: int, new_rate: int) -> Span:
    """Inputs and outputs of a block: outputs of all blocks have the same weights."""
    divisor = math.gcd(old_rate, new_rate)
    old, new = old_rate // divisor, new_rate // divisor
    times = max(1, _OUTPUTS // new)
    return old * times, new * times


def _margin(old: int, new: int) -> int:
    """Inputs that a block's outputs read beyond it, on either side."""
    return math.ceil(6 * old / (min(old, new) * 0.99)) + 2


def _resample_blocks(x: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """(rows, margin + blocks * old + margin) -> (rows, blocks * new). Some outputs of each block at a time."""
    margin = _margin(old, new)
    blocks = (x.shape[1] - 2 * margin) // old
    group = min(max(16, _SPAN * new // old), 256)
    out = torch.empty(x.shape[0], blocks, new)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for first in range(0, new, group):
            start, weight = _phases(old, new, first, min(group, new - first))
            begin, taps = margin + start, len(weight)
            windows = x[:, begin : begin + (blocks - 1) * old + taps].unfold(1, taps, old)  # [rows, blocks, taps]
            out[:, :, first : first + weight.shape[1]] = windows @ weight
    return out.reshape(x.shape[0], -1)


def resample(waveform: torch.Tensor, old_rate: int, new_rate: int) -> torch.Tensor:
    """Band-limited resampling: a sinc cut off at 0.99 of the lower Nyquist rate, Hann-windowed to six zero crossings.

    With y(t) = sum_k x_k h(t - k / old_rate), output sample n is y(n / new_rate): the default of
    torchaudio.functional.resample (J. O. Smith, Digital Audio Resampling). Outputs are taken some phases at a time, so
    that rates without a common divisor cost no more than others.

    Args:
        waveform: (channels, samples) float32.
        old_rate, new_rate: Hz.

    Returns:
        (channels, ceil(samples * new_rate / old_rate)) float32.
    """
    if old_rate == new_rate:
        return waveform
    samples = waveform.shape[1]
    length = _resampled_length(samples, old_rate, new_rate)
    low, high = _reach(0, length, old_rate, new_rate)
    padded = torch.nn.functional.pad(waveform.detach(), (-low, high - samples))
    return _resample_blocks(padded, *_blocks(old_rate, new_rate))[:, :length]


def _resampled_length(samples: int, old_rate: int, new_rate: int) -> int:
    return -(-samples * new_rate // old_rate)


def _reach(first: int, count: int, old_rate: int, new_rate: int) -> Span:
    """The input samples that outputs [first, first + count) are computed from; some may lie outside the sound."""
    if old_rate == new_rate:
        return first, first + count
    old, new = _blocks(old_rate, new_rate)
    return first // new * old - _margin(old, new), -(-(first + count) // new) * old + _margin(old, new)


def _resample_parts(
    parts: list[torch.Tensor], samples: int, first: list[int], count: int, old_rate: int, new_rate: int
) -> torch.Tensor:
    """Outputs [f, f + count) for each f of `first`, from the parts of a sound that they reach: (len(first), count)."""
    if old_rate == new_rate:
        return torch.stack(parts)
    (old, new), rows = _blocks(old_rate, new_rate), []
    for part, f in zip(parts, first):
        low, high = _reach(f, count, old_rate, new_rate)
        rows.append(torch.nn.functional.pad(part, (max(0, -low), max(0, high - samples))))
    width = max(map(len, rows))  # a block more where a segment begins late in its first one
    x = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    out = _resample_blocks(x, old, new)
    return torch.stack([row[f % new :][:count] for row, f in zip(out, first)])


class AudioTransform:
    """`(waveform, sample_rate)` -> float32 (3, num_mel_bins, target_length), normalised.

    waveform: (samples,) or (channels, samples), tensor or array; floats in [-1, 1], int16 or int32. It is not changed.
    A sound longer than `target_length` frames gives three segments, one from each third of the possible starts: the
    middle one, or one drawn while training. A shorter one is repeated, and the three are equal.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        num_mel_bins: int = 112,
        target_length: int = 1036,
        audio_mean: float = -4.2677393,
        audio_std: float = 4.5689974,
    ):
        self.sample_rate, self.num_mel_bins, self.target_length = sample_rate, num_mel_bins, target_length
        self.audio_mean, self.audio_std = audio_mean, audio_std
        self.training = False
        self._generator: torch.Generator | None = None

    def train(self, mode: bool = True, generator: torch.Generator | None = None) -> AudioTransform:
        """Turns the draw of segments on or off; `generator` seeds it (None: torch's own)."""
        self.training, self._generator = mode, generator
        return self

    def __call__(self, audio: Any) -> torch.Tensor:
        return self.of_sound(SoundInMemory(audio))

    def of_sound(self, sound: Sound) -> torch.Tensor:
        """The same of a sound of which only the parts that are used are taken."""
        at = torch.rand(3, generator=self._generator).tolist() if self.training else [0.5] * 3
        samples, parts = sound.parts(lambda samples: self._spans(samples, sound.rate, at))
        first = self._first(samples, sound.rate, at)
        if not first:
            return self.waveform2melspec(resample(parts[0][None], sound.rate, self.sample_rate))
        rows = _resample_parts(parts, samples, first, self._length, sound.rate, self.sample_rate)
        return self._normalised(fbank(rows, self.sample_rate, self.num_mel_bins))

    def get_mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """(channels, samples) at `sample_rate` -> (frames, num_mel_bins) of channel 0, less the mean of all."""
        mel = fbank((waveform - waveform.mean())[0], self.sample_rate, self.num_mel_bins)
        if len(mel) == 0:
            got = f"{waveform.shape[1]} samples at {self.sample_rate} Hz (is the shape (channels, samples)?)"
            raise MediaError("waveform", f"at least {FRAME_MS} ms of sound", got)
        return mel

    def waveform2melspec(self, waveform: torch.Tensor) -> torch.Tensor:
        """(channels, samples) at `sample_rate` -> (3, num_mel_bins, target_length), normalised."""
        mel, length = self.get_mel(waveform), self.target_length
        if len(mel) <= length:
            repeated = mel if len(mel) == length else mel.repeat(-(-length // len(mel)), 1)[:length]
            return self._normalised(repeated[None]).repeat(3, 1, 1)
        starts = _from_thirds(len(mel) - length + 1, [0.5] * 3)
        return self._normalised(torch.stack([mel[i : i + length] for i in starts]))

    def _normalised(self, mels: torch.Tensor) -> torch.Tensor:
        """(n, target_length, num_mel_bins) -> (n, num_mel_bins, target_length)."""
        return mels.mT.contiguous().sub_(self.audio_mean).div_(self.audio_std * 2)

    @property
    def _frame(self) -> tuple[int, int]:
        """Samples of a frame, and from one to the next."""
        return self.sample_rate * FRAME_MS // 1000, self.sample_rate * SHIFT_MS // 1000

    @property
    def _length(self) -> int:
        """Samples of a segment."""
        length, shift = self._frame
        return (self.target_length - 1) * shift + length

    def _first(self, samples: int, rate: int, at: Sequence[float]) -> list[int]:
        """The segments' first samples, resampled, of a sound of `samples`; [] where it is not longer than a segment."""
        length, shift = self._frame
        frames = 1 + (_resampled_length(samples, rate, self.sample_rate) - length) // shift
        count = frames - self.target_length + 1
        return [start * shift for start in _from_thirds(count, at)] if count > 1 else []

    def _spans(self, samples: int, rate: int, at: Sequence[float]) -> list[Span]:
        """What the segments are resampled from, in samples of the sound; all of a short one."""
        spans = [_reach(first, self._length, rate, self.sample_rate) for first in self._first(samples, rate, at)]
        return [(max(0, a), min(b, samples)) for a, b in spans] or [(0, samples)]

    def __repr__(self) -> str:
        shown = (f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"AudioTransform({', '.join(shown)})"


def _from_thirds(count: int, at: Sequence[float]) -> list[int]:
    """One number from each third of range(count), `at` in [0, 1) of it; an empty third gives 0."""
    third, more = divmod(count, 3)
    sizes = [third + (i < more) for i in range(3)]
    return [sum(sizes[:i]) + int(at[i] * size) if size else 0 for i, size in enumerate(sizes)]


def audio_transform(vision_config: Any, antialias: bool = True) -> AudioTransform:
    """The transform of `vision_config`. `antialias` does not concern audio."""
    names = ("num_mel_bins", "target_length", "audio_mean", "audio_std")
    given = {name: getattr(vision_config, name) for name in names if hasattr(vision_config, name)}
    given |= {name: int(given[name]) for name in ("num_mel_bins", "target_length") if name in given}
    return AudioTransform(int(getattr(vision_config, "audio_sample_rate", 16000)), **given)


def load_and_transform_audio(
    audio: Any,
    transform: Any,
    reading: Reading | None = None,
    clip_start_sec: float = 0.0,
    clip_end_sec: float | None = None,
) -> torch.Tensor:
    """A path, bytes, a file object, or `(waveform, sample_rate)`, through `transform`.

    `clip_start_sec` and `clip_end_sec` choose seconds of a file: what a file of these samples alone would give. Sounds
    in memory raise ValueError.
    """
    clipped = bool(clip_start_sec) or clip_end_sec is not None
    if not is_readable(audio):
        if clipped:
            raise ValueError("clip_start_sec, clip_end_sec: expected a file, got a waveform in memory")
        return transform(audio)
    if clipped:
        with Source(audio, _WAVEFORM, reading) as source, named(source.name):
            return transform(_clip(SoundFile(source), clip_start_sec, clip_end_sec))
    if not isinstance(transform, AudioTransform):  # a caller's own
        return transform(read_audio(audio, reading))
    with Source(audio, _WAVEFORM, reading) as source, named(source.name):
        return transform.of_sound(SoundFile(source))


def _clip(sound: SoundFile, start: float, end: float | None) -> tuple[torch.Tensor, int]:
    """The samples of channel 0 from ceil(start rate) to ceil(end rate), and the rate."""

    def sample(seconds: float) -> int:
        return math.ceil(Fraction(str(float(seconds))) * sound.rate)  # 0.1 is a tenth here

    def plan(samples: int) -> list[Span]:
        first, last = sample(start), samples if end in (None, math.inf) else min(samples, sample(end))
        return [(first, last)] if 0 <= first < last else []

    samples, parts = sound.parts(plan)
    if not parts:
        asked = f"a sound from {start:g} s to {'the end' if end is None else f'{end:g} s'}"
        raise MediaError(sound.name, asked, f"one of {samples / sound.rate:.2f} s")
    return parts[0], sound.rate
