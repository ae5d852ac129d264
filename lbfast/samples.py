"""Small files of every modality, with captions, drawn and computed here: for the demo and for tests.

The same bytes come out each time, apart from what a library's version changes in its encoders.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT, _FPS, _FRAMES, _RATE = 320, 240, 24, 72, 16000

CAPTIONS: dict[str, tuple[str, str]] = {
    "image": ("A red sun over the sea at dusk.", "A green hill under a blue sky."),
    "video": ("A yellow ball bounces on the floor.", "A blue square moves from left to right."),
    "audio": ("A siren rises and falls.", "A bell is struck four times."),
    "depth": ("A room with a box on the floor.", "A ball in front of a wall."),
    "thermal": ("A warm person standing in a cold field.", "A hot cup on a cold table."),
}
"""What each modality's two files show, in the order of their names."""

_NAMES: dict[str, tuple[str, str]] = {
    "image": ("dusk.jpg", "hill.png"),
    "video": ("ball.mp4", "square.mp4"),
    "audio": ("siren.wav", "bell.wav"),
    "depth": ("box.png", "sphere.png"),
    "thermal": ("person.jpg", "cup.jpg"),
}


def make_samples(folder: str | Path) -> dict[str, list[Path]]:
    """Writes two files of each modality to folder/<modality>/ and returns their paths, in the order of `CAPTIONS`.

    About 400 KB: JPEG and PNG pictures, MP4 videos of 3 s, 16 kHz WAV sounds, 16-bit PNG depth maps in millimetres.
    """
    paths = {name: [Path(folder, name, file) for file in files] for name, files in _NAMES.items()}
    for files in paths.values():
        files[0].parent.mkdir(parents=True, exist_ok=True)
    for path, picture in zip(paths["image"], (_dusk(), _hill())):
        Image.fromarray(_to_bytes(picture)).save(path, quality=90)
    for path, frames in zip(paths["video"], (_ball(), _square())):
        _write_video(path, frames)
    for path, sound in zip(paths["audio"], (_siren(), _bell())):
        _write_wav(path, sound)
    for path, metres in zip(paths["depth"], (_box(), _sphere())):
        Image.fromarray((metres * 1000).round().astype(np.uint16)).save(path)
    for path, heat in zip(paths["thermal"], (_person(), _cup())):
        Image.fromarray(_to_bytes(_heat_colours(heat))).save(path, quality=90)
    return paths


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel: x from -4/3 to 4/3, y from -1 (top) to 1."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    return (x + 0.5 - _WIDTH / 2) / (_HEIGHT / 2), (y + 0.5 - _HEIGHT / 2) / (_HEIGHT / 2)


def _over(below: np.ndarray, colour: Any, cover: np.ndarray) -> np.ndarray:
    """Paints `colour` (one, or a picture) over `below`, where `cover` (H, W) is 1."""
    return below + cover[..., None] * (np.asarray(colour, float) - below)


def _edge(distance: np.ndarray, softness: float = 0.01) -> np.ndarray:
    """1 inside (distance < 0), 0 outside, smooth between."""
    return np.clip(0.5 - distance / (2 * softness), 0, 1)


def _gradient(t: np.ndarray, first: Any, last: Any) -> np.ndarray:
    """From colour `first` at t = 0 to `last` at t = 1."""
    t = np.clip(t, 0, 1)[..., None]
    return (1 - t) * np.asarray(first, float) + t * np.asarray(last, float)


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


def _dusk() -> np.ndarray:
    x, y = _grid()
    sky = _gradient((y + 1) / 1.3, (0.25, 0.16, 0.42), (1.0, 0.58, 0.25))
    sky = _over(sky, (0.95, 0.22, 0.12), _edge(np.hypot(x - 0.2, y - 0.1) - 0.32))
    waves = 0.06 * np.sin(60 * y + 6 * np.sin(5 * x))
    sea = _gradient((y - 0.3) / 0.7, (0.75, 0.35, 0.25), (0.08, 0.10, 0.28)) + waves[..., None]
    glitter = np.exp(-(((x - 0.2) / 0.25) ** 2)) * (np.sin(90 * y) > 0) * 0.6
    return _over(sky, _over(sea, (1.0, 0.6, 0.35), glitter), _edge(0.3 - y))


def _hill() -> np.ndarray:
    x, y = _grid()
    sky = _gradient((y + 1) / 1.4, (0.25, 0.52, 0.92), (0.78, 0.90, 1.0))
    for cx, cy in ((-0.8, -0.6), (-0.6, -0.66), (-0.45, -0.58), (0.7, -0.45), (0.9, -0.5)):
        sky = _over(sky, (1.0, 1.0, 1.0), 0.85 * _edge(np.hypot((x - cx) / 1.5, y - cy) - 0.13, 0.05))
    grass = _gradient((y + 0.1) / 1.1, (0.42, 0.72, 0.25), (0.12, 0.38, 0.12))
    hill = _over(sky, grass, _edge(0.25 - 0.45 * np.cos(1.3 * (x - 0.2)) - y))
    hill = _over(hill, (0.36, 0.22, 0.12), _edge(np.maximum(np.abs(x - 0.3) - 0.035, np.abs(y + 0.15) - 0.2)))
    return _over(hill, (0.10, 0.42, 0.14), _edge(np.hypot(x - 0.3, y + 0.42) - 0.2))


def _ball() -> Iterator[np.ndarray]:
    x, y = _grid()
    room = _over(_gradient((y + 1) / 2, (0.75, 0.82, 0.9), (0.6, 0.7, 0.8)), (0.45, 0.32, 0.22), _edge(0.62 - y))
    for i in range(_FRAMES):
        t = i / _FPS
        height = 1.1 * abs(np.cos(np.pi * 1.1 * t)) * np.exp(-0.35 * t)
        cx, cy, radius = -0.9 + 0.6 * t, 0.45 - height, 0.18
        frame = _over(room, (0.25, 0.18, 0.12), 0.6 * _edge(np.hypot((x - cx) / 2, y - 0.68) - 0.08, 0.03))
        shade = np.hypot(x - cx + 0.06, y - cy + 0.06) / (1.5 * radius)
        yield _over(
            frame, _gradient(shade, (1.0, 0.93, 0.35), (0.85, 0.6, 0.05)), _edge(np.hypot(x - cx, y - cy) - radius)
        )


def _square() -> Iterator[np.ndarray]:
    x, y = _grid()
    paper = _gradient((x + 1.4) / 2.8, (0.97, 0.95, 0.9), (0.9, 0.88, 0.82))
    for i in range(_FRAMES):
        cx, turn = -1.0 + 2.0 * i / (_FRAMES - 1), np.pi * i / _FRAMES
        u = (x - cx) * np.cos(turn) + y * np.sin(turn)
        v = y * np.cos(turn) - (x - cx) * np.sin(turn)
        yield _over(paper, (0.1, 0.25, 0.85), _edge(np.maximum(np.abs(u), np.abs(v)) - 0.25))


def _write_video(path: Path, frames: Iterator[np.ndarray]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=_FPS, options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        stream.bit_rate = 800_000
        stream.codec_context.thread_count = 1
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(_to_bytes(pixels), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, _FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _siren() -> np.ndarray:
    t = np.arange(4 * _RATE) / _RATE
    pitch = 700 + 250 * np.sin(2 * np.pi * 0.5 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / _RATE
    return 0.5 * np.sin(phase) + 0.15 * np.sin(2 * phase)


def _bell() -> np.ndarray:
    t = np.arange(4 * _RATE) / _RATE
    since = t % 1.0
    partials = (
        (0.5, 0.3, 2.0),
        (1.0, 0.5, 3.0),
        (1.19, 0.25, 3.5),
        (1.5, 0.2, 4.0),
        (2.0, 0.3, 5.0),
        (2.76, 0.15, 7.0),
    )
    tones = (gain * np.exp(-fade * since) * np.sin(2 * np.pi * 440 * ratio * since) for ratio, gain, fade in partials)
    return 0.5 * sum(tones, np.zeros_like(t))


def _write_wav(path: Path, sound: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes((np.clip(sound, -1, 1) * 32767).round().astype("<i2").tobytes())


def _room() -> np.ndarray:
    """Metres to the walls, floor and ceiling of a room 4 m deep, seen from its open side."""
    x, y = _grid()
    return np.minimum(4.0, 1.2 / np.maximum(np.maximum(np.abs(x) / 1.2, np.abs(y)), 1e-3))


def _box() -> np.ndarray:
    x, y = _grid()
    front = (np.abs(x + 0.1) < 0.32) & (np.abs(y - 0.35) < 0.3)
    top = (np.abs(x + 0.1) < 0.32 - 0.4 * (0.05 - y)) & (y <= 0.05) & (y > -0.05)
    depth = np.where(top, 1.8 + 4 * (0.05 - y), _room())
    return np.where(front, 1.8, depth)


def _sphere() -> np.ndarray:
    x, y = _grid()
    inside = 0.45**2 - (x - 0.15) ** 2 - (y - 0.1) ** 2
    return np.where(inside > 0, 2.0 - np.sqrt(np.maximum(inside, 0)), 3.0 + 0.3 * x)


def _person() -> np.ndarray:
    x, y = _grid()
    body = np.maximum(_edge(np.hypot(x, y + 0.5) - 0.14, 0.03), _edge(np.hypot(x / 0.2, (y + 0.02) / 0.36) - 1, 0.1))
    for side in (-1, 1):
        body = np.maximum(body, _edge(np.hypot((x - side * 0.1) / 0.075, (y - 0.5) / 0.32) - 1, 0.2))
        body = np.maximum(
            body, 0.9 * _edge(np.hypot((x - side * 0.26 - side * 0.2 * y) / 0.06, (y - 0.05) / 0.3) - 1, 0.2)
        )
    return 0.18 + 0.05 * np.sin(3 * x) * np.cos(4 * y) + 0.08 * (y > 0.55) + body * (0.6 - 0.1 * y)


def _cup() -> np.ndarray:
    x, y = _grid()
    cup = _edge(np.maximum(np.abs(x) - 0.3 + 0.08 * y, np.abs(y - 0.1) - 0.38), 0.02)
    handle = _edge(np.abs(np.hypot(x - 0.33, y - 0.1) - 0.17) - 0.04, 0.02) * (x > 0.25)
    steam = (
        0.35
        * np.exp(-(((x - 0.08 * np.sin(9 * y)) / 0.12) ** 2))
        * np.clip(-(y + 0.28) / 0.1, 0, 1)
        * np.clip(1 + y, 0, 1)
    )
    table = 0.15 + 0.1 * (y > 0.48) * np.exp(-(x**2))
    return np.clip(table + 0.65 * cup + 0.35 * handle * (1 - cup) + steam, 0, 1)


def _heat_colours(heat: np.ndarray) -> np.ndarray:
    """0..1 -> black, violet, orange, yellow, white: the palette of thermal cameras."""
    stops = np.array([(0, 0, 0.1), (0.35, 0.05, 0.55), (0.85, 0.25, 0.3), (1.0, 0.7, 0.1), (1.0, 1.0, 0.9)])
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(np.clip(heat, 0, 1), at, stops[:, c]) for c in range(3)], axis=-1)
