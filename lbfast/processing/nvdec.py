"""Clips decoded on a GPU (NVDEC) by torchcodec: the frames that this library picks, converted to RGB there.

`Reading(decoder="torchcodec-cuda")`. Which frames there are and when each is shown is found by `VideoFile`, as on the
CPU, and told to torchcodec. It is believed where it gives frames of those times, and where its conversion is close to
swscale's: of each kind of pixels the first clip's first frame is decoded on the CPU too. Of everything else, and of
files that only decoding can count, frames come from the CPU, and a warning says why.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lbfast.processing.index import mirrored
from lbfast.processing.media import Source, reason
from lbfast.processing.video import Missing, VideoFile

_CLOSE = 1e-2  # of the range from 0 to 1, on average over a frame
_LATE = 1e-4  # seconds that a frame's time may be off

_trusted: dict[tuple[Any, ...], float] = {}  # kind of pixels -> how far the first frame was from the CPU's


class Elsewhere(Exception):
    """The clip is to be decoded on the CPU; the message says why."""


def frames(source: Source, choose: Callable[[Sequence[float]], list[int]]) -> torch.Tensor:
    """The frames that `choose` picks, (T, H, W, 3) uint8 on the device that `source.reading.decoder` names.

    Raises:
        Elsewhere: it is to be decoded on the CPU.
        ImportError: torchcodec, or what it needs, is not here. RuntimeError: no such GPU.
        MediaError: what `choose` raises, more bytes than limits.clip_bytes, not a video.
    """
    device, decoders = (
        torch.device(source.reading.decoder.removeprefix("torchcodec-")),
        available(source.reading.decoder),
    )
    with source.decoding(), VideoFile(source) as video:
        video.look()
        try:
            return _frames(video, source, choose, decoders, device)
        except Elsewhere as error:
            why = error
    raise why


def _frames(
    video: VideoFile,
    source: Source,
    choose: Callable[[Sequence[float]], list[int]],
    decoders: Any,
    device: torch.device,
) -> torch.Tensor:
    if not video.timed:
        raise Elsewhere("its packets do not say when its frames are shown")
    if mirrored(source.file, video.stream.id):
        raise Elsewhere("it is shown mirrored")
    order, times = video.order()
    wanted = choose(times)
    codec = video.stream.codec_context
    size, limit = len(wanted) * codec.width * codec.height * 3, source.reading.limits.clip_bytes
    if size > limit:
        got = f"of which {len(wanted)} frames of {codec.width} x {codec.height} are {size:,} bytes"
        raise source.error(f"{got}, expected at most {limit:,} (limits.clip_bytes)")
    numbers = sorted(set(wanted))
    kind = (codec.name, codec.pix_fmt, str(codec.colorspace), str(codec.color_range), str(device))
    first = None if kind in _trusted else _on_the_cpu(video, order[numbers[0]])
    source.file.seek(0)
    try:
        decoder = decoders.VideoDecoder(
            source.file if source.path is None else f"file:{source.path}",
            stream_index=video.stream.index,
            dimension_order="NHWC",
            num_ffmpeg_threads=video.threads,
            device=str(device),
            custom_frame_mappings=_mappings(video, order),
        )
        batch = decoder.get_frames_at(numbers)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Elsewhere(f"torchcodec cannot decode it ({reason(error)})") from error
    late = max(abs(float(at) - float(order[i] * video.stream.time_base)) for at, i in zip(batch.pts_seconds, numbers))
    if late > _LATE:
        raise Elsewhere(f"torchcodec gives frames that are {late:.3f} s off")
    if first is not None:
        _trusted[kind] = _apart(batch.data[0], first)
    if _trusted[kind] > _CLOSE:
        raise Elsewhere(f"torchcodec's pixels of {codec.name}, {codec.pix_fmt} are {_trusted[kind]:.3f} off")
    place = {number: i for i, number in enumerate(numbers)}
    return batch.data if numbers == wanted else batch.data[[place[number] for number in wanted]]


def available(decoder: str) -> Any:
    """torchcodec.decoders. ImportError: it, or what it needs, is not here. RuntimeError: a machine without CUDA."""
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: without FFmpeg's libraries
        raise ImportError(
            f"decoder: {decoder} needs torchcodec of this torch and its CUDA, and FFmpeg's shared libraries "
            f"(pip install 'lbfast[torchcodec]'): {reason(error)}"
        ) from error
    if "cuda" in decoder and not torch.cuda.is_available():
        raise RuntimeError(f"decoder: expected a machine with CUDA for {decoder}, got one without")
    return decoders


def _mappings(video: VideoFile, order: Sequence[int]) -> str:
    """The frames as they are shown, as torchcodec takes them, so that it need not read all of the file."""
    keys = {video.pts[i] for i in video.keys}
    steps = [b - a for a, b in itertools.pairwise(order)]
    steps.append(steps[-1] if steps else 1)
    return json.dumps(
        {"frames": [{"pts": a, "duration": b, "key_frame": int(a in keys)} for a, b in zip(order, steps)]}
    )


def _on_the_cpu(video: VideoFile, pts: int) -> torch.Tensor:
    """(H, W, 3) uint8 of one frame."""
    try:
        frame = next(frame for _, frame in video.at([pts]))
    except Missing as error:
        raise Elsewhere("it is damaged") from error
    return torch.from_numpy(video.picture(frame).copy())


def _apart(frame: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two frames are apart on average, of the range from 0 to 1; infinite where they are of two sizes."""
    if frame.shape != expected.shape:
        return float("inf")
    return float((frame.cpu().float() - expected.float()).abs().mean() / 255)
