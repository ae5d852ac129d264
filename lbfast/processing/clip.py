"""Clips in memory, as decoders and users hold them -> (3, T, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lbfast.processing.image import open_image
from lbfast.processing.layout import axes, resolve
from lbfast.processing.media import MediaError, Reading, is_path, is_readable
from lbfast.processing.transforms import to_rgb

LAYOUTS = ("THWC", "TCHW", "CTHW")


def evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` numbers from 0 to count - 1."""
    return np.linspace(0, count - 1, wanted, dtype=int)


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
        wanted = _wanted(len(frames), num_frames)
        frames, num_frames = frames.get_frames_at(indices=wanted), None
    elif hasattr(frames, "get_batch") and hasattr(frames, "__len__"):  # decord's VideoReader
        wanted = _wanted(len(frames), num_frames)
        frames, num_frames = frames.get_batch(wanted), None
    if hasattr(frames, "pts_seconds") and hasattr(frames, "data"):  # torchcodec's FrameBatch
        frames, layouts = frames.data, ("THWC", "TCHW")
    elif hasattr(frames, "asnumpy"):  # decord's NDArray
        frames, layouts = frames.asnumpy(), ("THWC",)
    if isinstance(frames, list | tuple):
        if not frames:
            raise MediaError("frames", "a list of pictures", "an empty list")
        chosen = [frames[i] for i in _wanted(len(frames), num_frames)]
        return _stacked(chosen, layout, reading)
    if not isinstance(frames, np.ndarray | torch.Tensor):
        raise TypeError(f"images: expected a path, an array, tensor or list of frames, got {type(frames).__name__}")
    found = resolve("frames", frames.shape, layouts, (3,), layout)
    clip = torch.as_tensor(frames).permute(axes(found, "CTHW"))
    return clip[:, _wanted(clip.shape[1], num_frames)]


def _wanted(count: int, num_frames: int | None) -> list[int]:
    return list(range(count)) if num_frames is None else evenly(count, num_frames).tolist()


def _stacked(pictures: list[Any], layout: str | None, reading: Reading | None) -> torch.Tensor:
    if layout in LAYOUTS:  # of the clip: pictures have no T
        layout = layout.replace("T", "")
    made: dict[int, torch.Tensor] = {}  # frames that are repeated are read once
    for i, picture in enumerate(pictures):
        if id(picture) not in made:
            item = open_image(picture, reading=reading) if is_readable(picture) else picture
            made[id(picture)] = to_rgb(item, layout, picture if is_path(picture) else f"frames[{i}]")
    frames = [made[id(picture)] for picture in pictures]
    sizes = sorted({tuple(frame.shape[1:]) for frame in frames})
    if len(sizes) > 1:
        raise MediaError("frames", "pictures of one size", f"sizes {', '.join(f'{h} x {w}' for h, w in sizes)}")
    if len({frame.dtype for frame in frames}) > 1:
        raise MediaError("frames", "pictures of one dtype", f"{sorted({str(frame.dtype) for frame in frames})}")
    return torch.stack(frames, dim=1)
