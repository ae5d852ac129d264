"""Resize followed by a centre crop, scaled and shifted, computed only where pixels stay.

out = scale (V @ image @ H^T) + offset, where row i of V (and of H) holds the few weights of output pixel i. A window of
output pixels reads a band of input pixels: those that the crop throws away are neither converted nor computed, and what
is converted is a band at a time. uint8 pixels on a CPU go through csrc/cpu/resize.cpp; everything else, and uint8 where
there is no compiler, through small dense products of blocks. Both equal torch.nn.functional.interpolate and a crop, up
to float32 rounding. Weights: Keys' cubic convolution (IEEE TASSP 1981), a = -1/2 stretched over the shrunk pixels when
antialiased (as Pillow does), a = -3/4 on four neighbours when not; the triangle for "bilinear".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from lbfast import native

_BAND = 128  # input rows, or columns, that a product of the torch form takes at least
_BLOCK = 32  # and outputs that it gives at most

_Window = tuple[int, int, int, int, str, bool]
"""Of one axis: size, size after the resize, first output, outputs, kind, antialias."""


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _weights(size: int, out: int, first: int, count: int, kind: str, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Input indices and weights (count, taps) of `count` output pixels from `first` on, resizing `size` to `out`."""
    scale = size / out
    centre = (np.arange(first, first + count) + 0.5) * scale
    radius = {"bilinear": 1.0, "bicubic": 2.0}[kind]
    stretch = max(scale, 1.0) if antialias else 1.0
    if antialias:
        low = np.maximum((centre - radius * stretch + 0.5).astype(np.int64), 0)
        high = np.minimum((centre + radius * stretch + 0.5).astype(np.int64), size)
    else:
        low = np.floor(centre - 0.5).astype(np.int64) - (int(radius) - 1)
        high = low + 2 * int(radius)
    index = low[:, None] + np.arange(int((high - low).max()))
    distance = (index + 0.5 - centre[:, None]) / stretch
    if kind == "bilinear":
        weight = np.maximum(1.0 - np.abs(distance), 0.0)
    else:
        weight = _cubic(distance, -0.5 if antialias else -0.75)
    weight = np.where(index < high[:, None], weight, 0.0)
    if antialias:
        weight /= weight.sum(1, keepdims=True)
    return np.clip(index, 0, size - 1), weight  # without antialiasing the border pixel stands for those beyond it


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # whoever calls first
def _taps(size: int, out: int, first: int, count: int, kind: str, antialias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each output pixel the first input, (count,) int64, and the weights of those from it on, (count, taps)."""
    index, weight = _weights(size, out, first, count, kind, antialias)
    low = index.min(1)
    taps = int((index.max(1) - low).max()) + 1
    low = np.minimum(low, size - taps)
    dense = np.zeros((count, taps))
    np.add.at(dense, (np.arange(count)[:, None], index - low[:, None]), weight)
    return torch.from_numpy(low), torch.from_numpy(dense.astype(np.float32))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bands(
    size: int, out: int, first: int, count: int, kind: str, antialias: bool
) -> list[tuple[int, int, torch.Tensor]]:
    """Blocks (low, high, weights [outputs, high - low]) of the same, dense; a block spans about as much as its taps."""
    low, weight = _taps(size, out, first, count, kind, antialias)
    taps = weight.shape[1]
    block = max(1, min(_BLOCK, int(max(taps, _BAND) * out / size)))
    blocks = []
    for row in range(0, count, block):
        begin, some = low[row : row + block], weight[row : row + block]
        start, stop = int(begin.min()), int(begin.max()) + taps
        dense = torch.zeros(len(some), stop - start)
        dense.scatter_(1, (begin - start)[:, None] + torch.arange(taps), some)
        blocks.append((start, stop, dense))
    return blocks


def resized_crop(
    image: torch.Tensor,
    resized: tuple[int, int],
    crop: tuple[int, int, int, int],
    kind: str,
    antialias: bool,
    scale: Sequence[float] = (1.0,),
    offset: Sequence[float] = (0.0,),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Resizes to `resized` and returns `scale` times the window `crop` of it, plus `offset`.

    Args:
        image: (..., H, W), any real dtype, any strides.
        resized: height and width after the resize.
        crop: top, left, height and width of the window, inside `resized`.
        kind: "bilinear" or "bicubic".
        antialias: widen the filter when shrinking.
        scale, offset: a number for each of image.shape[0], or one for all.
        dtype: of the result, float32 or uint8: rounded to the nearest of 0..255.

    Returns:
        (..., height, width), contiguous.
    """
    top, left, height, width = crop
    rows = image.shape[-2], resized[0], top, height, kind, antialias
    cols = image.shape[-1], resized[1], left, width, kind, antialias
    image = image.detach()
    if image.dtype == torch.uint8 and image.device.type == "cpu" and image.dim() > 2 and not native.why_not():
        return _native(image, rows, cols, scale, offset, dtype)
    once = image.dim() > 2 and image.stride(0) == 0  # one plane seen as several
    out = _dense(image[:1] if once else image, rows, cols)
    shape = (-1, *(1,) * (image.dim() - 1))
    a, b = (torch.tensor(values, device=image.device).view(shape) for values in (scale, offset))
    out = (out.expand(len(image), *out.shape[1:]) * a).add_(b) if once else out.mul_(a).add_(b)
    return out if dtype == torch.float32 else out.round_().clamp_(0, 255).to(dtype)


def _native(
    image: torch.Tensor,
    rows: _Window,
    cols: _Window,
    scale: Sequence[float],
    offset: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    channels = image.shape[0]
    x = image.reshape(channels, -1, *image.shape[-2:]) if image.dim() != 4 else image
    if x.stride(-1) != 1 and not (x.stride(0) == 1 and x.stride(-1) >= channels):
        x = x.contiguous()
    a, b = ([*values] * (channels // len(values)) for values in (scale, offset))
    out = torch.empty(channels, x.shape[1], rows[3], cols[3], dtype=dtype)
    torch.ops.lbfast.resized_crop_native(x, *_taps(*rows), *_taps(*cols), a, b, out)
    return out.view(*image.shape[:-2], rows[3], cols[3])


def _dense(image: torch.Tensor, rows: _Window, cols: _Window) -> torch.Tensor:
    """The resize itself, as matrix products of blocks."""
    row_blocks, col_blocks = _bands(*rows), _bands(*cols)
    col0, col1 = col_blocks[0][0], max(high for _, high, _ in col_blocks)
    height, width = rows[3], cols[3]
    # A picture decoded as (..., H, W, C) and seen as (C, ..., H, W) keeps its layout until it is small.
    interleaved = image.dim() > 2 and image.stride(0) == 1 and image.stride(-1) == image.shape[0]
    x = image.movedim(0, -1) if interleaved else image.unsqueeze(-1)  # [..., H, W, C]
    x = x[..., col0:col1, :]
    h, w, c = x.shape[-3:]
    x = x.reshape(-1, h, w, c)
    with torch.no_grad(), torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
        y = torch.empty(len(x), height, w * c, device=x.device)
        first = 0
        for low, high, weight in row_blocks:  # a large picture is never in floats as a whole
            band = x[:, low:high].reshape(len(x), high - low, w * c).float()
            torch.matmul(weight.to(x.device), band, out=y[:, first : first + len(weight)])
            first += len(weight)
        y = y.reshape(-1, height, w, c).movedim(-1, 0).contiguous()  # [C, N, height, w]
        parts = [y[..., low - col0 : high - col0] @ weight.T.to(x.device) for low, high, weight in col_blocks]
        out = torch.cat(parts, dim=-1)
    return out.reshape(*image.shape[:-2], height, width)
