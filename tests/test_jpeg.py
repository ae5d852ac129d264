"""simplejpeg in Pillow's place: the same to the bit, the same errors, and only where nobody else sees the picture."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lbfast.processing import jpeg
from lbfast.processing.image import image_transform, load_and_transform_image
from lbfast.processing.media import MediaError
from lbfast.processing.transforms import Compose, ToTensor

pytest.importorskip("simplejpeg")
TRANSFORM = image_transform(SimpleNamespace(image_size=32))


def encoded(size, mode="RGB", seed=0, **options) -> bytes:
    draw = np.random.default_rng(seed)
    smooth = np.add.outer(np.linspace(0, 200, size[1]), np.linspace(0, 55, size[0]))[..., None]
    pixels = (smooth + draw.normal(0, 25, (size[1], size[0], 3))).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def outcome(data: bytes, monkeypatch, pillow: bool):
    """What is made of a file, or the error."""
    with monkeypatch.context() as patch:
        if pillow:
            patch.setattr(jpeg, "_agrees", lambda: False)
        try:
            return load_and_transform_image(data, TRANSFORM)
        except MediaError as error:
            return str(error)


def assert_same(data: bytes, monkeypatch) -> None:
    ours, pillows = (outcome(data, monkeypatch, pillow) for pillow in (False, True))
    assert type(ours) is type(pillows)
    assert torch.equal(ours, pillows) if isinstance(ours, torch.Tensor) else ours == pillows


def taken(data: bytes) -> bool:
    """Whether it is not left to Pillow."""
    from lbfast.processing.image import opened
    from lbfast.processing.media import Source

    with Source(data, "an image") as source:
        return jpeg.pixels(opened(source), source) is not None


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (16, 16), (97, 64), (241, 303)])
def test_equals_pillow(size, monkeypatch):
    assert jpeg._agrees()
    for seed, (mode, sampling, progressive, quality, restarts) in enumerate(
        [
            (m, s, p, q, r)
            for m in ("RGB", "L")
            for s in (0, 1, 2)
            for p in (0, 1)
            for q, r in ((30, 0), (95, 2), (97, 0))
        ]
    ):
        options = {"subsampling": sampling, "progressive": bool(progressive), "quality": quality}
        data = encoded(size, mode, seed, restart_marker_blocks=restarts, **options)
        assert taken(data)
        assert_same(data, monkeypatch)


@pytest.mark.parametrize(
    "data",
    [
        encoded((50, 40), "CMYK"),
        encoded((50, 40), keep_rgb=True),
        encoded((50, 40))[:-200],
    ],
    ids=["four inks", "no luminance", "cut off"],
)
def test_what_is_left_to_pillow(data, monkeypatch):
    assert not taken(data)
    assert_same(data, monkeypatch)


def test_damage_is_seen_as_pillow_sees_it(monkeypatch):
    draw, whole = random.Random(5), encoded((61, 47), quality=80)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            data[draw.randrange(2, len(data))] = draw.randrange(256)
        assert_same(bytes(data[: draw.choice((len(data), draw.randrange(20, len(data))))]), monkeypatch)


def test_other_peoples_steps_are_given_pillows_picture():
    seen = []
    steps = [lambda picture: seen.append(type(picture)) or picture, *TRANSFORM.transforms]
    load_and_transform_image(encoded((40, 40)), Compose(steps))
    load_and_transform_image(encoded((40, 40)), lambda picture: seen.append(type(picture)))

    class Mine(ToTensor):
        def __call__(self, x):
            seen.append(type(x))
            return super().__call__(x)

    load_and_transform_image(encoded((40, 40)), Compose([Mine()]))
    assert all(issubclass(kind, Image.Image) for kind in seen) and len(seen) == 3


def test_pictures_of_three_rows(monkeypatch):
    """Whose shape alone does not tell which axis has the colours."""
    assert_same(encoded((3, 3)), monkeypatch)
