"""Clips in memory, as decoders and users hold them -> (3, T, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lbfast.processing.image import open_image
from lbfast.processing.layout import axes, resolve
from lbfast.processing.media import MediaError, Reading, is_readable, name_of
from lbfast.processing.transforms import to_rgb

LAYOUTS = ("THWC", "TCHW", "CTHW")


def evenly(count: int, wanted: int | None) -> list[int]:
    """`wanted` numbers from 0 to count - 1; None: all of them."""
    return np.linspace(0, count - 1, count if wanted is None else wanted, dtype=int).tolist()


def to_cthw(
    frames: Any, layout: str | None = None, num_frames: int | None = None, reading: Reading | None = None
) -> torch.Tensor:
    """Frames in memory as (3, T, H, W), of the dtype they have.

    Args:
        frames: an array or tensor of colours (T, H, W, 3), (T, 3, H, W) or (3, T, H, W); a list of pictures (PIL
            images, files, arrays or tensors); a batch of frames of torchcodec or decord, or a reader of theirs.
        layout: "THWC", "TCHW" or "CTHW"; None: the one that fits the shape. Of pictures in a list: "HWC" or "CHW".
        num_frames: how many to take, evenly spaced; None: all.
        reading: of files.

    Raises:
        MediaError: a shape that none or two of these have, pictures of several sizes, an empty list.
        TypeError: something else.
    """
    layouts: Sequence[str] = LAYOUTS
    if hasattr(frames, "get_frames_at") and hasattr(frames, "__len__"):  # torchcodec's VideoDecoder
        wanted = evenly(len(frames), num_frames)
        frames, num_frames = frames.get_frames_at(indices=wanted), None
    elif hasattr(frames, "get_batch") and hasattr(frames, "__len__"):  # decord's VideoReader
        wanted = evenly(len(frames), num_frames)
        frames, num_frames = frames.get_batch(wanted), None
    if hasattr(frames, "pts_seconds") and hasattr(frames, "data"):  # torchcodec's FrameBatch
        frames, layouts = frames.data, ("THWC", "TCHW")
    elif hasattr(frames, "asnumpy"):  # decord's NDArray
        frames, layouts = frames.asnumpy(), ("THWC",)
    if isinstance(frames, list | tuple):
        if not frames:
            raise MediaError("frames", "a list of pictures", "an empty list")
        return _stacked(frames, evenly(len(frames), num_frames), layout, reading)
    if not isinstance(frames, np.ndarray | torch.Tensor):
        raise TypeError(f"images: expected a path, an array, tensor or list of frames, got {type(frames).__name__}")
    found = resolve("frames", frames.shape, layouts, (3,), layout)
    clip = torch.as_tensor(frames).permute(axes(found, "CTHW"))
    return clip[:, evenly(clip.shape[1], num_frames)]


def _stacked(pictures: Sequence[Any], wanted: list[int], layout: str | None, reading: Reading | None) -> torch.Tensor:
    if layout in LAYOUTS:  # of the clip: pictures have no T
        layout = layout.replace("T", "")
    made: dict[int, torch.Tensor] = {}  # frames that are repeated are read once
    for i in dict.fromkeys(wanted):
        picture = pictures[i]
        item = open_image(picture, reading=reading) if is_readable(picture) else picture
        made[i] = to_rgb(item, layout, name_of(picture) if is_readable(picture) else f"frames[{i}]")
    sizes = sorted({tuple(frame.shape[1:]) for frame in made.values()})
    if len(sizes) > 1:
        raise MediaError("frames", "pictures of one size", f"sizes {', '.join(f'{h} x {w}' for h, w in sizes)}")
    dtypes = sorted({str(frame.dtype) for frame in made.values()})
    if len(dtypes) > 1:
        raise MediaError("frames", "pictures of one dtype", ", ".join(dtypes))
    return torch.stack([made[i] for i in wanted], dim=1)
