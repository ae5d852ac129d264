"""Files as they are in the world, made on the spot: the same bytes for the same encoders."""

from __future__ import annotations

import itertools
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RATE = 16_000


def picture(height: int, width: int, seed: int = 0, shift: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: smooth colours, edges and some grain, as a photograph has; `shift` moves it."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(shift, width + shift, dtype=np.float32)[None]
    planes = []
    for _ in range(3):
        waves = rng.uniform(0.5, 12, (6, 2)) * 2 * np.pi / max(height, width)
        phases = rng.uniform(0, 6, 6)
        plane = sum(np.sin(a * y + b * x + c) for (a, b), c in zip(waves.astype(np.float32), phases))
        planes.append(plane + 2 * ((np.floor(y / 47) + np.floor(x / 61)) % 3 == 0))
    pixels = np.stack(planes, -1) * 22 + 120 + rng.normal(0, 5, (height, width, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(path: Path, height: int, width: int, grey: bool = False) -> Path:
    image = Image.fromarray(picture(height, width))
    (image.convert("L") if grey else image).save(path, "JPEG", quality=90)
    return path


def depth_map(path: Path, height: int, width: int) -> Path:
    Image.fromarray(picture(height, width)[..., 0].astype(np.uint16) * 30 + 200).save(path, "PNG")
    return path


def sound(seconds: float) -> np.ndarray:
    """(samples,) int16 at RATE: tones that glide, and noise."""
    t = np.arange(int(seconds * RATE)) / RATE
    tones = sum(np.sin(2 * np.pi * f * t + 3 * np.sin(t * k)) for k, f in enumerate((220, 440, 1330, 3100)))
    return (3000 * tones + np.random.default_rng(0).normal(0, 400, len(t))).astype(np.int16)


def wav(path: Path, seconds: float) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound(seconds).tobytes())
    return path


def encoded(path: Path, seconds: float, codec: str) -> Path:
    """A sound of one channel by FFmpeg's encoder `codec`."""
    import av

    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound(seconds)[None], format="s16", layout="mono")
        frame.rate = RATE
        _mux(file, stream, [frame])
    return path


def clip(path: Path, height: int, width: int, seconds: int, gop: int = 250, rate: int = 30) -> Path:
    """H.264 with B-frames: a picture that moves by some pixels a frame."""
    import av

    wide = picture(height, width + 512)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "g": str(gop), "crf": "23"}
        at = (abs(3 * i % 1024 - 512) for i in range(seconds * rate))
        _mux(file, stream, (av.VideoFrame.from_ndarray(np.ascontiguousarray(wide[:, x : x + width])) for x in at))
    return path


def long_clip(path: Path, height: int, width: int, seconds: int, again: int, rate: int = 30) -> Path:
    """`clip` with grain that changes, so that it is as large as recordings are, `again` times in a row."""
    import av

    once = path.with_name(f"once-{path.name}")
    wide, grain = picture(height, width + 512), np.random.default_rng(0).normal(0, 3, (height + 64, width, 1))
    with av.open(str(once), "w") as file:
        stream: Any = file.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "g": "250", "b": "5M"}
        moved = ((abs(3 * i % 1024 - 512), 7 * i % 64) for i in range(seconds * rate))
        shown = ((wide[:, x : x + width] + grain[y : y + height]).clip(0, 255).astype(np.uint8) for x, y in moved)
        _mux(file, stream, (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame)) for frame in shown))
    with av.open(str(once)) as read, av.open(str(path), "w") as file:
        copied = file.add_stream_from_template(read.streams.video[0])
        ticks = int(seconds / read.streams.video[0].time_base)
        packets = [packet for packet in read.demux(video=0) if packet.size]
        times = [(packet.pts, packet.dts) for packet in packets]
        for number in range(again):
            for packet, (pts, dts) in zip(packets, times):
                packet.stream = copied
                packet.pts, packet.dts = pts + number * ticks, dts + number * ticks
                file.mux(packet)
    once.unlink()
    return path


def _mux(file: Any, stream: Any, frames: Iterable[Any]) -> None:
    for frame in itertools.chain(frames, [None]):
        file.mux(stream.encode(frame))
