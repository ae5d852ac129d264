"""Log-mel energies as Kaldi computes them, by batched Fourier transforms.

A frame less its mean, pre-emphasised, under a Hann window, padded to a power of two; the power of its spectrum through
triangles that are even on the mel scale (1127 log(1 + f / 700), from 20 Hz to half the rate); the logarithm, of at
least float32's epsilon. Kaldi's options: dither 0, no energy, HTK order (kaldi-asr.org/doc/feat.html).
"""

from __future__ import annotations

import functools

import numpy as np
import torch

FRAME_MS, SHIFT_MS = 25, 10
_PREEMPHASIS = 0.97
_LOWEST = 20.0  # Hz
_FRAMES = 256  # at a time: half a megabyte, which stays in the cache


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # whoever calls first
def _filters(rate: int, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The window (length,), and the triangles (2 lines of the spectrum, bins): each line twice."""
    length = rate * FRAME_MS // 1000
    size = 1 << (length - 1).bit_length()
    corners = np.linspace(_mel(_LOWEST), _mel(rate / 2), bins + 2)[:, None]
    at = _mel(np.arange(size // 2) * rate / size)
    rise = (at - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - at) / (corners[2:] - corners[1:-1])
    triangles = np.zeros((size // 2 + 1, bins), np.float32)  # Kaldi leaves half the rate itself out
    triangles[:-1] = np.maximum(np.minimum(rise, fall), 0).T
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))
    return torch.from_numpy(window.astype(np.float32)), torch.from_numpy(triangles.repeat(2, axis=0))


def _mel(hertz: np.ndarray | float) -> np.ndarray | float:
    return 1127.0 * np.log(1 + np.asarray(hertz) / 700.0)


def fbank(waveform: torch.Tensor, rate: int, num_mel_bins: int) -> torch.Tensor:
    """Kaldi's log-mel energies: 25 ms Hann frames each 10 ms, pre-emphasis 0.97, no dither, no energy, HTK order.

    Args:
        waveform: (..., samples) float32.
        rate: Hz.

    Returns:
        (..., frames, num_mel_bins) float32; of less than 25 ms no frames.
    """
    length, shift = rate * FRAME_MS // 1000, rate * SHIFT_MS // 1000
    if waveform.shape[-1] < length:
        return torch.empty(*waveform.shape[:-1], 0, num_mel_bins)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        frames = waveform.detach().unfold(-1, length, shift)  # [..., frames, length]
        some = frames.split(_FRAMES, dim=-2)
        return torch.cat([_energies(part, *_filters(rate, num_mel_bins)) for part in some], dim=-2)


def _energies(frames: torch.Tensor, window: torch.Tensor, triangles: torch.Tensor) -> torch.Tensor:
    """(..., frames, length) -> (..., frames, bins)."""
    x = frames - frames.mean(-1, keepdim=True)
    padded = x.new_zeros(*x.shape[:-1], len(triangles) - 2)
    emphasised = padded[..., : x.shape[-1]]
    torch.sub(x[..., 1:], x[..., :-1], alpha=_PREEMPHASIS, out=emphasised[..., 1:])
    torch.mul(x[..., 0], 1 - _PREEMPHASIS, out=emphasised[..., 0])
    emphasised.mul_(window)
    lines = torch.view_as_real(torch.fft.rfft(padded)).square_()  # [..., lines, 2]: re^2 and im^2, which add up below
    return (lines.flatten(-2) @ triangles).clamp_(min=torch.finfo(torch.float32).eps).log_()
