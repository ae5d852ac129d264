"""Audio files -> log-mel pictures (3, num_mel_bins, target_length), as Kaldi computes them."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from lbfast.processing.media import MediaError, check_complete, check_file, describe, is_path, named

_WAVEFORM = "an audio file"
_FRAME_MS, _SHIFT_MS = 25, 10
_GROUP = 256  # output phases a product, in `resample`


def read_audio(path: Any) -> tuple[torch.Tensor, int]:
    """Decodes the first audio stream of a file (the sound of a video too).

    Returns:
        (channels, samples) float32 in [-1, 1], and the sample rate in Hz.

    Raises:
        FileNotFoundError: no such file.
        MediaError: empty, broken, truncated, or without sound.
    """
    import av

    name = check_file(path, _WAVEFORM)
    check_complete(name, _WAVEFORM)
    try:
        options = {"protocol_whitelist": "file"}
        if describe(name) == "a WAV file":
            options["probesize"] = (
                "4096"  # the header says it all; by default 5 s of sound are searched for other codecs
            )
        with av.open(f"file:{name}", container_options=options) as container:
            if not container.streams.audio:
                raise MediaError(name, _WAVEFORM, f"{describe(name)} without sound")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise MediaError(name, _WAVEFORM, f"{describe(name)} in a codec that FFmpeg cannot decode here")
            rate = stream.codec_context.sample_rate
            declared = float(stream.duration * stream.time_base) if stream.duration else 0.0
            exact = container.format.name == "flac"  # its header says how many samples there are
            chunks = []
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise MediaError(name, _WAVEFORM, f"{describe(name)} with broken data")
                samples = frame.to_ndarray()
                chunks.append(samples if frame.format.is_planar else samples.reshape(frame.samples, -1).T)
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise MediaError(name, _WAVEFORM, f"{describe(name)} that cannot be decoded ({error})") from error
    if not any(chunk.size for chunk in chunks):
        raise MediaError(name, _WAVEFORM, f"{describe(name)} without samples")
    if len({(chunk.shape[0], chunk.dtype) for chunk in chunks}) > 1:
        raise MediaError(name, _WAVEFORM, f"{describe(name)} whose channels change on the way")
    waveform = _floats(torch.from_numpy(np.concatenate(chunks, axis=1)))
    found = waveform.shape[1] / rate
    if exact and found < declared - 0.01:
        raise MediaError(name, _WAVEFORM, f"{describe(name)} that is truncated: {found:.2f} s of {declared:.2f} s")
    return waveform, rate


def _floats(samples: torch.Tensor) -> torch.Tensor:
    """Samples of any width as float32 in [-1, 1): integers over their range, unsigned bytes around 128."""
    if samples.is_floating_point():
        return samples.float()
    if samples.dtype == torch.uint8:
        return (samples.float() - 128) / 128
    scale = -float(torch.iinfo(samples.dtype).min)
    return (samples.double() / scale).float() if samples.element_size() > 2 else samples.float() / scale


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
    divisor = math.gcd(old_rate, new_rate)
    old, new = old_rate // divisor, new_rate // divisor
    if old == new:
        return waveform
    channels, samples = waveform.shape
    length, blocks = -(-samples * new // old), -(-samples // old)
    margin = math.ceil(6 * old / (min(old, new) * 0.99)) + 2
    padded = torch.nn.functional.pad(waveform.detach(), (margin, margin + blocks * old - samples))
    out = torch.empty(channels, blocks, new)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for first in range(0, new, _GROUP):
            start, weight = _phases(old, new, first, min(_GROUP, new - first))
            begin, taps = margin + start, len(weight)
            windows = padded[:, begin : begin + (blocks - 1) * old + taps].unfold(
                1, taps, old
            )  # [channels, blocks, taps]
            out[:, :, first : first + weight.shape[1]] = windows @ weight
    return out.reshape(channels, -1)[:, :length]


def fbank(waveform: torch.Tensor, rate: int, num_mel_bins: int) -> torch.Tensor:
    """Kaldi's log-mel energies: 25 ms Hann frames each 10 ms, pre-emphasis 0.97, no dither, no energy, HTK order.

    Args:
        waveform: (samples,) float32.
        rate: Hz.

    Returns:
        (frames, num_mel_bins) float32.

    Raises:
        ImportError: kaldi-native-fbank is not installed.
    """
    try:
        import kaldi_native_fbank as knf
    except ImportError as error:
        raise ImportError("audio needs kaldi-native-fbank: pip install kaldi-native-fbank") from error
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.frame_length_ms = _FRAME_MS
    options.frame_opts.frame_shift_ms = _SHIFT_MS
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = num_mel_bins
    options.use_energy = False
    options.htk_compat = True
    extractor = knf.OnlineFbank(options)
    extractor.accept_waveform(rate, waveform.tolist())
    extractor.input_finished()
    frames = [extractor.get_frame(i) for i in range(extractor.num_frames_ready)]
    return torch.from_numpy(np.stack(frames)) if frames else torch.empty(0, num_mel_bins)


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

    def __call__(self, audio: tuple[Any, int]) -> torch.Tensor:
        waveform, rate = _check_audio(audio)
        return self.waveform2melspec(resample(waveform, rate, self.sample_rate))

    def get_mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """(channels, samples) at `sample_rate` -> (frames, num_mel_bins) of channel 0, less the mean of all."""
        mel = fbank((waveform - waveform.mean())[0], self.sample_rate, self.num_mel_bins)
        if len(mel) == 0:
            got = f"{waveform.shape[1]} samples at {self.sample_rate} Hz (is the shape (channels, samples)?)"
            raise MediaError("waveform", f"at least {_FRAME_MS} ms of sound", got)
        return mel

    def waveform2melspec(self, waveform: torch.Tensor) -> torch.Tensor:
        """(channels, samples) at `sample_rate` -> (3, num_mel_bins, target_length), normalised."""
        mel, length = self.get_mel(waveform), self.target_length
        if len(mel) > length:
            segments = [mel[start : start + length] for start in self._starts(len(mel) - length + 1)]
        else:
            segments = [mel.repeat(-(-length // len(mel)), 1)[:length]] * 3
        return (torch.stack(segments).transpose(1, 2) - self.audio_mean) / (self.audio_std * 2)

    def _starts(self, count: int) -> list[int]:
        """One start from each third of range(count); an empty third gives 0."""
        starts = []
        for third in np.array_split(np.arange(count), 3):
            at = len(third) // 2
            if self.training and len(third):
                at = int(torch.randint(len(third), (), generator=self._generator))
            starts.append(int(third[at]) if len(third) else 0)
        return starts

    def __repr__(self) -> str:
        shown = (f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"AudioTransform({', '.join(shown)})"


def _check_audio(audio: Any) -> tuple[torch.Tensor, int]:
    if not (isinstance(audio, tuple | list) and len(audio) == 2):
        raise TypeError(f"audio: expected a path or (waveform, sample_rate), got {type(audio).__name__}")
    waveform, rate = torch.as_tensor(audio[0]), int(audio[1])
    if rate != audio[1] or rate <= 0:
        raise MediaError("waveform", "a sample rate in whole Hz, above 0", f"{audio[1]!r}")
    shape = tuple(waveform.shape)
    if waveform.dim() == 1:
        waveform = waveform.unsqueeze(0)
    if waveform.dim() != 2 or waveform.numel() == 0:
        raise MediaError("waveform", "shape (samples,) or (channels, samples)", f"shape {shape}")
    if not waveform.is_floating_point() and waveform.dtype not in (torch.int16, torch.int32):
        raise MediaError("waveform", "floats in [-1, 1], int16 or int32", f"dtype {waveform.dtype}")
    waveform = _floats(waveform.detach())
    if not torch.isfinite(waveform).all():
        raise MediaError("waveform", "finite samples", "NaN or infinite values")
    return waveform, rate


def audio_transform(vision_config: Any, antialias: bool = True) -> AudioTransform:
    """The transform of `vision_config`. `antialias` does not concern audio."""
    names = ("num_mel_bins", "target_length", "audio_mean", "audio_std")
    given = {name: getattr(vision_config, name) for name in names if hasattr(vision_config, name)}
    given |= {name: int(given[name]) for name in ("num_mel_bins", "target_length") if name in given}
    return AudioTransform(int(getattr(vision_config, "audio_sample_rate", 16000)), **given)


def load_and_transform_audio(audio: Any, transform: Any) -> torch.Tensor:
    """A path, or `(waveform, sample_rate)`, through `transform`."""
    if not is_path(audio):
        return transform(audio)
    waveform = read_audio(audio)
    with named(audio):
        return transform(waveform)
