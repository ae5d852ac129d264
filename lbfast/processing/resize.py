"""Resize followed by a centre crop, computed only where pixels stay.

out = V @ image @ H^T, where row i of V (and of H) holds the few weights of output pixel i. A window of output pixels
reads a band of input pixels, so both products are taken in blocks of rows: small dense matrices, and the pixels that
the crop throws away are neither converted nor computed. Equal to torch.nn.functional.interpolate followed by a crop, up
to float32 rounding. Weights: Keys' cubic convolution (IEEE TASSP 1981), a = -1/2 stretched over the shrunk pixels when
antialiased (as Pillow does), a = -3/4 on four neighbours when not; the triangle for "bilinear".
"""

from __future__ import annotations

import functools

import numpy as np
import torch

_BLOCK = 32  # output rows a product


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _taps(size: int, out: int, first: int, count: int, kind: str, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
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
def _bands(
    size: int, out: int, first: int, count: int, kind: str, antialias: bool
) -> tuple[int, int, list[tuple[int, int, torch.Tensor]]]:
    """The input range that the window reads, and blocks (low, high, weights [rows, high - low]) relative to it."""
    index, weight = _taps(size, out, first, count, kind, antialias)
    start, stop = int(index.min()), int(index.max()) + 1
    blocks = []
    for row in range(0, count, _BLOCK):
        i, w = index[row : row + _BLOCK], weight[row : row + _BLOCK]
        low, high = int(i.min()), int(i.max()) + 1
        dense = np.zeros((len(i), high - low))
        np.add.at(dense, (np.arange(len(i))[:, None], i - low), w)
        blocks.append((low - start, high - start, torch.from_numpy(dense.astype(np.float32))))
    return start, stop, blocks


def resized_crop(
    image: torch.Tensor, resized: tuple[int, int], crop: tuple[int, int, int, int], kind: str, antialias: bool
) -> torch.Tensor:
    """Resizes to `resized` and returns the window `crop` of it.

    Args:
        image: (..., H, W), any real dtype, any strides.
        resized: height and width after the resize.
        crop: top, left, height and width of the window, inside `resized`.
        kind: "bilinear" or "bicubic".
        antialias: widen the filter when shrinking.

    Returns:
        (..., height, width), float32, contiguous; on the scale of `image`.
    """
    (h, w), (top, left, height, width) = image.shape[-2:], crop
    row0, row1, row_blocks = _bands(h, resized[0], top, height, kind, antialias)
    col0, col1, col_blocks = _bands(w, resized[1], left, width, kind, antialias)
    # A picture decoded as (..., H, W, C) and seen as (C, ..., H, W) keeps its layout until it is small.
    interleaved = image.dim() > 2 and image.stride(0) == 1 and image.stride(-1) == image.shape[0]
    x = image.detach().movedim(0, -1) if interleaved else image.detach().unsqueeze(-1)  # [..., H, W, C]
    x = x[..., row0:row1, col0:col1, :]
    h, w, c = x.shape[-3:]
    x = x.reshape(-1, h, w, c)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        bands = (
            weight @ x[:, low:high].float().reshape(len(x), high - low, w * c) for low, high, weight in row_blocks
        )  # a band of rows at a time: a large picture is never in floats as a whole
        x = torch.cat(list(bands), dim=1)  # [N, height, w * C]
        x = x.reshape(-1, height, w, c).movedim(-1, 0).contiguous()  # [C, N, height, w]
        x = torch.cat([x[..., low:high] @ weight.T for low, high, weight in col_blocks], dim=-1)
    return x.reshape(*image.shape[:-2], height, width)
