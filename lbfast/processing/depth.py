"""Depth maps in millimetres -> (3, size, size): 16-bit PNG files, or arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from lbfast.processing.image import decoded, image_size
from lbfast.processing.media import MediaError, Reading, Source, is_readable, named
from lbfast.processing.transforms import CenterCrop, Compose, Normalize, Resize, Step

_MILLIMETRES = "a 16-bit single-channel depth map in millimetres"
_METRES = 10  # floats that are all below this many millimetres would give an empty picture: they are metres


class DepthNorm(Step):
    """Millimetres (H, W) -> metres, clipped to [min_depth, max_depth], over max_depth: float32 (3, H, W) in [0, 1].

    max_depth 0 takes the map's own maximum. Raises MediaError for other shapes, no pixels, or values not finite.
    """

    def __init__(self, max_depth: float = 0, min_depth: float = 0.01):
        self.max_depth, self.min_depth = max_depth, min_depth

    def __call__(self, x: Any) -> torch.Tensor:
        depth = _millimetres(x) / 1000.0  # a copy, changed in place from here on
        depth.clamp_(min=self.min_depth)
        if self.max_depth:
            depth.clamp_(max=self.max_depth).div_(self.max_depth)
        else:
            depth.div_(depth.max())
        return depth.expand(3, -1, -1)


def _millimetres(x: Any) -> torch.Tensor:
    if isinstance(x, Image.Image):
        if x.mode != "F" and not x.mode.startswith("I"):
            raise MediaError("PIL image", _MILLIMETRES, f"mode {x.mode}")
        x = np.array(x)
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise TypeError(f"images: expected a path, PIL image, array or tensor of depths, got {type(x).__name__}")
    shape, fractions = tuple(x.shape), torch.as_tensor(x).is_floating_point()
    x = torch.from_numpy(x.astype(np.float32)) if isinstance(x, np.ndarray) else x.detach().float()
    if x.dim() == 3 and x.shape[0] == 1:
        x = x[0]
    if x.dim() != 2 or x.numel() == 0:
        raise MediaError("depth in memory", "shape (H, W)", f"shape {shape}")
    if fractions and not torch.isfinite(x).all():
        raise MediaError("depth in memory", "finite depths in millimetres", "NaN or infinite values")
    if fractions and 0 < (deepest := x.max().item()) <= _METRES:
        raise MediaError("depth in memory", "depths in millimetres", f"floats up to {deepest:g} (metres? times 1000)")
    return x


def depth_transform(vision_config: Any, antialias: bool = True) -> Compose:
    """(H, W) millimetres in memory -> (3, size, size) float32, normalised."""
    size = image_size(vision_config)
    max_depth = getattr(vision_config, "max_depth", 10)
    return Compose([DepthNorm(max_depth), Resize(size, antialias), CenterCrop(size), Normalize()])


def load_and_transform_depth(depth: Any, transform: Any, reading: Reading | None = None) -> torch.Tensor:
    """A file, or millimetres in memory, through `transform`. MediaError for 8-bit or colour files: no depth maps."""
    if not is_readable(depth):
        return transform(depth)
    with Source(depth, _MILLIMETRES, reading) as source:
        picture = decoded(source)
        if picture.mode != "F" and not picture.mode.startswith("I"):
            raise source.error(f"of mode {picture.mode} (8 bits a channel)")
        with named(source.name):
            return transform(np.array(picture))
