"""Image and thermal files -> (3, size, size). Thermal pictures are 8-bit files read as images."""

from __future__ import annotations

import functools
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from lbfast.processing import jpeg
from lbfast.processing.media import MediaError, Reading, Source, is_readable, named
from lbfast.processing.memory import one_block
from lbfast.processing.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

_FORMATS = (  # whose readers decode what they are given themselves: not EPS, which starts Ghostscript
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "ICO", "TGA", "HEIF", "JXL"
)  # fmt: skip


def image_transform(vision_config: Any, antialias: bool = True) -> Compose:
    """Picture in memory -> (3, size, size) float32, normalised; size is `vision_config.image_size`."""
    size = image_size(vision_config)
    return Compose([ToTensor(), Resize(size, antialias), CenterCrop(size), Normalize()])


def image_size(vision_config: Any) -> int:
    """Side of the square input in pixels (224 where the config does not say)."""
    return int(getattr(vision_config, "image_size", 224))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow, with its plugins, reads."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_image(path: Any, expected: str = "an image", reading: Reading | None = None) -> Image.Image:
    """Opens and decodes a picture, in the mode the file has. EXIF orientation is left alone, as upstream leaves it.

    Args:
        path: a path, bytes or a file object.
        expected: for errors.
        reading: limits.image_pixels, allow_urls.

    Raises:
        FileNotFoundError: no such file.
        MediaError: empty, truncated, too large, or not a picture.
    """
    with Source(path, expected, reading) as source:
        return decoded(source)


def decoded(source: Source) -> Image.Image:
    """The picture in a source that is open; see `open_image`."""
    picture = opened(source)
    with source.decoding(), one_block():
        picture.load()
    return picture


def opened(source: Source) -> Image.Image:
    """The same, not decoded yet."""
    limit = source.reading.limits.image_pixels
    with source.decoding():
        try:
            picture = Image.open(source.file, formats=_formats())
        except UnidentifiedImageError as error:
            raise MediaError(source.name, source.expected, source.what) from error
        width, height = picture.size
        if width * height > limit:
            raise source.error(f"of {width} x {height} pixels, more than {limit:,} (limits.image_pixels)")
        return picture


def load_and_transform_image(
    image: Any, transform: Any, layout: str | None = None, reading: Reading | None = None
) -> torch.Tensor:
    """A path, bytes, a file object, or a picture in memory (its axes `layout`), through `transform`."""
    if not is_readable(image):
        return (transform if layout is None else transform.laid_out(layout))(image)
    with Source(image, "an image", reading) as source:
        picture = opened(source)
        if picture.mode.startswith(("I", "F")):
            got = f"{source.what} of mode {picture.mode} (is it a depth map?)"
            raise MediaError(source.name, "an 8-bit image", got)
        pixels = jpeg.pixels(picture, source) if _takes_arrays(transform) else None
        if pixels is None:
            with source.decoding(), one_block():
                picture.load()
        with named(source.name):
            return transform(picture) if pixels is None else transform.of_decoded(pixels)


def _takes_arrays(transform: Any) -> bool:
    """Whether a transform begins with our own step: somebody else's may want Pillow's pictures."""
    return isinstance(transform, Compose) and bool(transform.transforms) and type(transform.transforms[0]) is ToTensor
