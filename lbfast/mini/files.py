"""The small world as files that any reader takes: pictures, clips, sounds, depth maps, and a manifest with captions."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lbfast.data import tether
from lbfast.files import claimed, write
from lbfast.mini import world
from lbfast.mini.world import CAPTIONS, SEES, Scene

MANIFEST = "manifest.jsonl"
_FPS, _CHUNK = 4, 64


def write_world(
    out: str | os.PathLike[str],
    count: int,
    split: str = "test",
    seed: int = 0,
    senses: Sequence[str] = tuple(SEES),
    processes: int = 1,
) -> Path:
    """Writes scenes as files OUT/<sense>/<number>.<suffix> with OUT/manifest.jsonl, and returns the manifest.

    Its rows have, for each sense written, a column of its name with the file's path, and for each view of
    `world.CAPTIONS` a column <view>_caption. The same arguments give the same pixels, samples and captions.

    Args:
        count, split, seed: as of `world.scenes`.
        senses: which files to write.
        processes: that write; with several, run this under `if __name__ == "__main__":`.

    Raises:
        ValueError: an unknown sense or split, or no scenes. FileExistsError: there are files or folders of these names
        that this has not made. ImportError: video needs PyAV.
    """
    unknown = [sense for sense in senses if sense not in WRITERS]
    if unknown or not senses:
        raise ValueError(f"senses: expected some of {', '.join(WRITERS)}, got {', '.join(unknown) or 'none'}")
    folder, made = Path(out), world.scenes(split, count, seed)
    tasks = [(folder, sense, made[i : i + _CHUNK], i) for sense in senses for i in range(0, count, _CHUNK)]
    manifest = folder / MANIFEST
    with claimed(folder, "world", (MANIFEST, *WRITERS)):
        for sense in senses:
            (folder / sense).mkdir(exist_ok=True)
        if processes == 1:
            for task in tasks:
                _write_some(task)
        else:
            with tether.deaf():  # a Ctrl-C reaches them too
                pool = multiprocessing.get_context("spawn").Pool(processes, _begin)
            with pool:
                pool.map(_write_some, tasks, chunksize=1)
        os.sync()  # what the manifest names is on the disk before it is
        lines = []
        for number, scene in enumerate(made):
            row = {sense: f"{sense}/{_name(number, sense)}" for sense in senses}
            row |= {f"{view}_caption": world.caption(scene, view) for view in CAPTIONS}
            lines.append(json.dumps(row) + "\n")
        write(manifest, "".join(lines))
    return manifest


def _name(number: int, sense: str) -> str:
    return f"{number:06}{WRITERS[sense][0]}"


def _begin() -> None:
    """The parent ends these processes, by SIGTERM, or by ending itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    tether.die_with_parent()


def _write_some(task: tuple[Path, str, list[Scene], int]) -> None:
    folder, sense, made, first = task
    for number, scene in enumerate(made, first):
        WRITERS[sense][1](folder / sense / _name(number, sense), scene)


def _write_image(path: Path, scene: Scene) -> None:
    Image.fromarray(world.picture(scene)).save(path, quality=92, subsampling=0)


def _write_thermal(path: Path, scene: Scene) -> None:
    Image.fromarray(world.thermal_picture(scene)).save(path, quality=92, subsampling=0)


def _write_depth(path: Path, scene: Scene) -> None:
    Image.fromarray(world.depth_map(scene)).save(path, compress_level=1)


def _write_audio(path: Path, scene: Scene) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(world.RATE)
        file.writeframes((world.sound(scene) * 32767).round().astype("<i2").tobytes())


def _write_video(path: Path, scene: Scene) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=_FPS)
        stream.width, stream.height, stream.pix_fmt = world.PIXELS, world.PIXELS, "yuv420p"
        stream.bit_rate = 400_000
        stream.codec_context.thread_count = 1
        for i, pixels in enumerate(world.clip(scene)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, _FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


WRITERS: dict[str, tuple[str, Callable[[Path, Scene], None]]] = {
    "image": (".jpg", _write_image),
    "video": (".mp4", _write_video),
    "audio": (".wav", _write_audio),
    "depth": (".png", _write_depth),
    "thermal": (".jpg", _write_thermal),
}
"""Suffix, and how a scene is written, of each sense."""
