"""The steps that turn decoded pixels into a model's input, and `Compose`, which runs a list of them.

Each step is a small callable on tensors (C, ..., H, W), so that `processor.transform.transforms` can be filtered and
composed again. Means and deviations are CLIP's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from lbfast.processing.layout import axes, resolve
from lbfast.processing.media import MediaError
from lbfast.processing.memory import pixels_of, shared
from lbfast.processing.resize import resized_crop

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_CHANNELS = (1, 3, 4)
_LAYOUTS = ("HW", "HWC", "CHW")


class Step:
    """A callable whose repr shows the attributes it was made with."""

    def __call__(self, x: Any) -> torch.Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = (f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(shown)})"


class Affine(Step):
    """A step x -> a x + b for each channel. It commutes with resizing, whose weights sum to one."""

    def pixels(self, x: Any) -> torch.Tensor:
        """The input as a tensor, not yet scaled."""
        return x

    def coefficients(self, dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """a and b, for each channel or one for all; `dtype` is that of the pixels before anything was computed."""
        raise NotImplementedError

    def __call__(self, x: Any) -> torch.Tensor:
        x = self.pixels(x)
        shape, coefficients = (-1, *(1,) * (x.dim() - 1)), self.coefficients(x.dtype)
        a, b = (torch.tensor(values, device=x.device).view(shape) for values in coefficients)
        return x.float() * a + b


class ToTensor(Affine):
    """A picture in memory -> float32 (3, H, W) in [0, 1].

    Takes a PIL image of any mode with 8 bits or fewer a channel (converted to RGB, transparency dropped); uint8 arrays
    or tensors 0..255; float ones already in [0, 1]. Shapes: (H, W) grey, (H, W, C) or (C, H, W) with C of 1, 3 or 4.

    Args:
        layout: "HW", "HWC" or "CHW"; None takes the one that fits the shape.

    Raises:
        MediaError: 16-bit or float pictures, other shapes or dtypes, shapes that can be read in two ways, floats that
            are clearly not in [0, 1].
    """

    def __init__(self, layout: str | None = None):
        if layout is not None:  # the repr shows what was asked for
            self.layout = layout

    def pixels(self, x: Any) -> torch.Tensor:
        t = to_rgb(x, getattr(self, "layout", None))
        return t if t.dtype == torch.uint8 else _unit_floats(t, "picture in memory")

    def coefficients(self, dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (1 / 255 if dtype == torch.uint8 else 1.0,), (0.0,)


class _Decoded(ToTensor):
    """ToTensor of what is (3, H, W) uint8 already."""

    def pixels(self, x: Any) -> torch.Tensor:
        return x


class ToFloat(Affine):
    """Pixels 0..255 of any dtype, or floats in [0, 1] -> float32 in [0, 1].

    Floats are in [0, 1] where none is above 1, and 0..255 where one is above 2 or all are whole numbers.

    Raises:
        MediaError: integers outside 0..255, floats that are neither (normalised ones, NaN) or could be both.
    """

    def pixels(self, x: Any) -> torch.Tensor:
        return x if x.dtype == torch.uint8 else _levels(x)

    def coefficients(self, dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (1 / 255,), (0.0,)


class Normalize(Affine):
    """(x - mean) / std for each channel of (C, ..., H, W)."""

    def __init__(self, mean: Iterable[float] = MEAN, std: Iterable[float] = STD):
        self.mean, self.std = tuple(mean), tuple(std)

    def coefficients(self, dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(1 / std for std in self.std), tuple(-mean / std for mean, std in zip(self.mean, self.std))


class NormalizeVideo(Normalize):
    """Normalize, under the name it has in the video list."""


class Resize(Step):
    """Short side to `size`, bicubic; the long side is rounded down. torchvision 0.14.1 did not antialias tensors."""

    kind = "bicubic"

    def __init__(self, size: int, antialias: bool = True):
        self.size, self.antialias = size, antialias

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        if width <= height:
            return int(self.size * height / width), self.size
        return self.size, int(self.size * width / height)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        size = self.output_size(*x.shape[-2:])
        return resized_crop(x, size, (0, 0, *size), self.kind, self.antialias)


class ShortSideScale(Resize):
    """Short side to `size`, bilinear and not antialiased."""

    kind = "bilinear"

    def __init__(self, size: int, antialias: bool = False):
        super().__init__(size, antialias)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        if width < height:
            return math.floor(height / width * self.size), self.size
        return self.size, math.floor(width / height * self.size)


class CenterCrop(Step):
    """The middle `size` x `size` pixels."""

    def __init__(self, size: int):
        self.size = size

    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop. Raises ValueError where the picture is smaller."""
        if min(height, width) < self.size:
            raise ValueError(f"CenterCrop: expected at least {self.size} x {self.size} pixels, got {height} x {width}")
        return round((height - self.size) / 2), round((width - self.size) / 2), self.size, self.size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        top, left, height, width = self.window(*x.shape[-2:])
        return x[..., top : top + height, left : left + width]


class CenterCropVideo(CenterCrop):
    """CenterCrop, under the name it has in the video list."""


class RandomHorizontalFlipVideo(Step):
    """Mirrors the clip with probability p while training; otherwise leaves it (upstream flips at inference too)."""

    def __init__(self, p: float = 0.5, training: bool = False, generator: torch.Generator | None = None):
        self.p, self.training, self._generator = p, training, generator

    def train(self, mode: bool = True, generator: torch.Generator | None = None) -> RandomHorizontalFlipVideo:
        """Turns the draw on or off; `generator` seeds it (None: torch's own)."""
        self.training, self._generator = mode, generator
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.rand((), generator=self._generator).item() < self.p:
            return x.flip(-1)
        return x


class ToUint8(Step):
    """[0, 1] -> uint8 0..255, rounded to nearest and clamped: off by half a level, 0.5 / 255 / std when normalised."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 255).round().clamp(0, 255).to(torch.uint8)


class Compose:
    """Runs `transforms` one after the other.

    A resize followed by a crop is computed in one go, on the pixels that stay, and with it the affine steps before and
    after the pair: the same result up to float32 rounding, in a fraction of the time.
    """

    def __init__(self, transforms: Iterable[Callable[[Any], Any]]):
        self.transforms = list(transforms)

    def __call__(self, x: Any) -> torch.Tensor:
        steps: list[Any] = self.transforms
        for i, (resize, crop) in enumerate(itertools.pairwise(steps)):
            if isinstance(resize, Resize) and isinstance(crop, CenterCrop):
                return self._crop_first(x, i)
        for step in steps:
            x = step(x)
        return x

    def _crop_first(self, x: Any, i: int) -> torch.Tensor:
        steps: list[Any] = self.transforms
        if not all(isinstance(step, Affine) for step in steps[:i]):
            for step in steps[:i]:
                x = step(x)
            return Compose(steps[i:])(x)
        for step in steps[:i]:
            x = step.pixels(x)
        after = i + 2
        while after < len(steps) and isinstance(steps[after], Normalize):
            after += 1
        scale, offset = _joined([*steps[:i], *steps[i + 2 : after]], x.dtype, x.shape[0])
        size, levels = steps[i].output_size(*x.shape[-2:]), after < len(steps) and isinstance(steps[after], ToUint8)
        if levels:
            scale, offset, after = [255 * a for a in scale], [255 * b for b in offset], after + 1
        x = resized_crop(
            x,
            size,
            steps[i + 1].window(*size),
            steps[i].kind,
            steps[i].antialias,
            scale,
            offset,
            torch.uint8 if levels else torch.float32,
        )
        for step in steps[after:]:
            x = step(x)
        return x

    def train(self, mode: bool = True, generator: torch.Generator | None = None) -> Compose:
        """Turns the random steps on or off; `generator` seeds them (None: torch's own)."""
        for step in self.transforms:
            if isinstance(step, RandomHorizontalFlipVideo):
                step.train(mode, generator)
        return self

    def raw(self) -> Compose:
        """The same list without normalisation, ending in uint8: for a patch embedding that folds it into its weight."""
        return Compose([*(s for s in self.transforms if not isinstance(s, Normalize)), ToUint8()])

    def laid_out(self, layout: str) -> Compose:
        """The same list for pictures whose axes are `layout`. ValueError where no step takes a picture in memory."""
        if not any(isinstance(step, ToTensor) for step in self.transforms):
            raise ValueError("layout: expected a transform that begins with ToTensor, got one without it")
        return Compose([ToTensor(layout) if isinstance(step, ToTensor) else step for step in self.transforms])

    def of_decoded(self, x: torch.Tensor) -> torch.Tensor:
        """The same of a picture (3, H, W) uint8, by a list that begins with ToTensor, which has nothing to find out."""
        return Compose([_Decoded(), *self.transforms[1:]])(x)

    def __repr__(self) -> str:
        return "Compose(" + "".join(f"\n    {step!r}" for step in self.transforms) + "\n)"


def _joined(steps: Iterable[Affine], dtype: torch.dtype, channels: int) -> tuple[list[float], list[float]]:
    """a and b of the steps one after the other, for each channel."""
    scale, offset = [1.0] * channels, [0.0] * channels
    for step in steps:
        a, b = (values * (channels // len(values)) for values in step.coefficients(dtype))
        offset = [x * y + z for x, y, z in zip(offset, a, b, strict=True)]
        scale = [x * y for x, y in zip(scale, a, strict=True)]
    return scale, offset


def to_rgb(x: Any, layout: str | None = None, source: str | None = None) -> torch.Tensor:
    """A picture in memory as (3, H, W), its values as they are; see ToTensor for what it may be.

    `source` is what errors call it; None: what it is.
    """
    expected = "an 8-bit picture"
    if isinstance(x, Image.Image):
        if x.mode.startswith(("I", "F")):
            raise MediaError(
                source or "PIL image",
                expected,
                f"mode {x.mode} (more than 8 bits a channel; depth maps have their own processor)",
            )
        if 0 in x.size:
            raise MediaError(source or "PIL image", expected, f"no pixels ({x.size[0]} x {x.size[1]})")
        pixels = pixels_of(x if x.mode in ("RGB", "L") else x.convert("RGB")).permute(2, 0, 1)
        return pixels.expand(3, -1, -1)
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise TypeError(f"images: expected a path, PIL image, array or tensor, got {type(x).__name__}")
    kind = "tensor" if isinstance(x, torch.Tensor) else "array"
    found = resolve(source or kind, x.shape, _LAYOUTS, _CHANNELS, layout)
    t = shared(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
    t = t.unsqueeze(0) if found == "HW" else t.permute(axes(found, "CHW"))
    return t.expand(3, -1, -1) if t.shape[0] == 1 else t[:3]


def _unit_floats(t: torch.Tensor, source: str) -> torch.Tensor:
    if not t.is_floating_point():
        raise MediaError(source, "uint8 0..255 or floats in [0, 1]", f"dtype {t.dtype}")
    t = t.detach().float()
    low, high = t.min().item(), t.max().item()
    if not -1 <= low <= high <= 2:  # a bicubic resize overshoots a little; 0..255, normalised pixels or NaN do not pass
        raise MediaError(source, "floats in [0, 1]", f"values from {low:g} to {high:g}")
    return t


def _levels(t: torch.Tensor) -> torch.Tensor:
    """Frames of any dtype but uint8, as floats 0..255."""
    expected = "levels 0..255, or floats in [0, 1]"
    if t.dtype == torch.bool or t.is_complex():
        raise MediaError("frames", expected, f"dtype {t.dtype}")
    integers, t = not t.is_floating_point(), t.detach().float()
    low, high = t.min().item(), t.max().item()
    if not integers and -1 <= low <= high <= 1:
        return t * 255
    whole = integers or (high <= 2 and bool((t == t.round()).all()))
    if -0.5 * high <= low and high <= (255 if integers else 510) and (whole or high > 2):
        return t
    got = f"values from {low:g} to {high:g}"
    raise MediaError("frames", expected, got + (" (floats: both readings fit)" if 1 < high <= 2 and low >= -1 else ""))
