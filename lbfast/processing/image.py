"""Image and thermal files -> (3, size, size). Thermal pictures are 8-bit files read as images."""

from __future__ import annotations

import struct
from typing import Any

import torch
from PIL import Image

from lbfast.processing.media import MediaError, check_file, describe, is_path, named
from lbfast.processing.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def image_transform(vision_config: Any, antialias: bool = True) -> Compose:
    """Picture in memory -> (3, size, size) float32, normalised; size is `vision_config.image_size`."""
    size = image_size(vision_config)
    return Compose([ToTensor(), Resize(size, antialias), CenterCrop(size), Normalize()])


def image_size(vision_config: Any) -> int:
    """Side of the square input in pixels (224 where the config does not say)."""
    return int(getattr(vision_config, "image_size", 224))


def open_image(path: Any, expected: str = "an image") -> Image.Image:
    """Opens and decodes a picture, in the mode the file has. EXIF orientation is left alone, as upstream leaves it.

    Raises:
        FileNotFoundError: no such file.
        MediaError: empty, truncated, or not a picture.
    """
    name = check_file(path, expected)
    try:
        picture = Image.open(name)
    except _READ_ERRORS as error:
        raise MediaError(name, expected, describe(name)) from error
    try:
        picture.load()
    except _READ_ERRORS as error:
        raise MediaError(name, expected, f"{describe(name)} that cannot be decoded ({error})") from error
    return picture


def load_and_transform_image(image: Any, transform: Any) -> torch.Tensor:
    """A path, or a picture in memory, through `transform`."""
    if not is_path(image):
        return transform(image)
    picture = open_image(image)
    if picture.mode.startswith(("I", "F")):
        raise MediaError(str(image), "an 8-bit image", f"{describe(image)} of mode {picture.mode} (is it a depth map?)")
    with named(image):
        return transform(picture)
