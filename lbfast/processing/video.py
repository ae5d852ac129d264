"""Video files -> (3, frames, size, size). Only the frames that are wanted, and those they refer to, are decoded.

One pass over the packets, without decoding, finds how many frames there are and when each is shown: the container's own
count is missing or wrong too often. Then each wanted frame is decoded from the key frame before it. Frames are those
that decord gives, to the bit: index linspace(0, n - 1, num_frames), RGB by swscale, turned as the file's rotation says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image

from lbfast.processing.image import image_size
from lbfast.processing.media import MediaError, check_complete, check_file, describe, is_path, named
from lbfast.processing.transforms import (
    CenterCropVideo,
    Compose,
    NormalizeVideo,
    RandomHorizontalFlipVideo,
    ShortSideScale,
    ToFloat,
)

_VIDEO = "a video"
_KEEP_BYTES = 64 << 20  # packets up to this much are kept from the first pass; a larger file is read twice
_HIDDEN_FRAMES = ("vp8",)  # codecs with packets that show nothing: only decoding can count


_BACKENDS = ("decord", "opencv", "pytorchvideo")  # names that configs carry; one decoder serves them all


class _Missing(Exception):
    """A wanted frame did not come out of the decoder."""


class _File:
    """An open video. `scan` lists its packets; `at_times` and `by_counting` decode the frames that `choose` picks.

    `choose(times)` gets the time of every frame in seconds after the first, and returns the indices of the wanted ones.
    """

    def __init__(self, name: str):
        self.name = name
        self.container, self.stream = self._open()
        self.pts: list[int | None] = []  # of each packet, in the file's order; None: not said, or not to be shown
        self.keys: list[int] = []  # where decoding can begin
        self.shown = 0  # packets that show a frame
        self.delays: set[int] = set()  # from decoding to showing
        self.kept: list[Any] | None = []

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: Any) -> None:
        self.container.close()

    def _open(self) -> tuple[Any, Any]:
        import av

        container = av.open(f"file:{self.name}", container_options={"protocol_whitelist": "file"})
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams or container.format.name in ("image2", "tty") or container.format.name.endswith("_pipe"):
            container.close()
            raise MediaError(self.name, _VIDEO, f"{describe(self.name)} without moving pictures")
        best = container.streams.best("video")
        stream: Any = best if best in streams else streams[0]
        if stream.codec_context is None:
            container.close()
            raise MediaError(self.name, _VIDEO, f"{describe(self.name)} in a codec that FFmpeg cannot decode here")
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = torch.get_num_threads()
        return container, stream

    def broken(self, why: str) -> MediaError:
        return MediaError(self.name, _VIDEO, f"{describe(self.name)} {why}")

    def scan(self) -> None:
        """Reads every packet. Raises MediaError where the file ends too early or has broken packets."""
        check_complete(self.name, _VIDEO)
        size = 0
        for packet in self.container.demux(self.stream):
            if packet.size == 0:
                continue  # PyAV's own, at the end
            if packet.is_corrupt:
                raise self.broken("that is truncated or has broken packets")
            if packet.is_keyframe:
                self.keys.append(len(self.pts))
            self.pts.append(None if packet.is_discard else packet.pts)
            self.shown += not packet.is_discard
            if packet.pts is not None and packet.dts is not None:
                self.delays.add(packet.pts - packet.dts)
            size += packet.size
            if self.kept is not None:
                self.kept.append(packet)
                if size > _KEEP_BYTES:
                    self.kept = None
        if self.shown == 0:
            raise self.broken("without frames")

    @property
    def timed(self) -> bool:
        """Whether the packets alone say how many frames there are, and when each is shown.

        Not so where times are missing or repeated; where a codec that reorders frames is in a container that knows only
        the order of decoding (AVI); for codecs with packets that show nothing.
        """
        pts, codec = [p for p in self.pts if p is not None], self.stream.codec_context
        once = len(set(pts)) == len(pts) == self.shown
        guessed = "avi" in self.container.format.name and codec.has_b_frames and len(self.delays) == 1
        return once and not guessed and bool(self.keys) and codec.name not in _HIDDEN_FRAMES

    def at_times(self, choose: Callable[[Sequence[float]], list[int]]) -> list[np.ndarray]:
        """Decodes from the key frame before each wanted frame; unwanted frames that nothing refers to are skipped.

        Raises:
            _Missing: the decoder did not give a wanted frame.
        """
        position = {p: i for i, p in enumerate(self.pts) if p is not None}
        order = sorted(position)
        base: Fraction = self.stream.time_base
        times = [(p - order[0]) * base.numerator / base.denominator for p in order]
        wanted = [order[i] for i in choose(times)]
        runs: list[list[int]] = []  # first and last packet; leading pictures of a key frame may make neighbours overlap
        for pts in sorted(set(wanted)):
            begin = max((k for k in self.keys if k <= position[pts] and self._pts(k) <= pts), default=0)
            if runs and begin <= runs[-1][1] + 1:
                runs[-1][1] = max(runs[-1][1], position[pts])
            else:
                runs.append([begin, position[pts]])
        frames = {}
        for frame in self._decode(runs, set(wanted)):
            if frame.pts in wanted and frame.pts not in frames:
                frames[frame.pts] = self._picture(frame)
        if set(wanted) - set(frames):
            raise _Missing
        return [frames[pts] for pts in wanted]

    def by_counting(self, choose: Callable[[Sequence[float]], list[int]]) -> list[np.ndarray]:
        """Decodes from first packet to last, and again where there turn out to be more or fewer frames than packets."""
        rate = self.stream.guessed_rate or Fraction(25)
        times = [float(i / rate) for i in range(self.shown)]
        for _ in range(2):
            wanted, frames, seen = choose(times), {}, []
            for i, frame in enumerate(self._decode([[0, len(self.pts) - 1]])):
                if i in wanted:
                    frames[i] = self._picture(frame)
                seen.append(frame.pts)
            if not seen:
                raise self.broken("without a frame that can be decoded")
            if None in seen or seen != sorted(seen):
                times = [float(i / rate) for i in range(len(seen))]
            else:
                times = [float((pts - seen[0]) * self.stream.time_base) for pts in seen]
            if choose(times) == wanted:
                return [frames[i] for i in wanted]
        raise self.broken("that decodes differently each time")

    def _pts(self, index: int) -> float:
        pts = self.pts[index]
        return float("inf") if pts is None else pts

    def _packets(self) -> Iterator[Any]:
        if self.kept is not None:
            yield from self.kept
            return
        self.container.close()
        self.container, self.stream = self._open()
        yield from (packet for packet in self.container.demux(self.stream) if packet.size)

    def _decode(self, runs: list[list[int]], wanted: set[int] | None = None) -> Iterator[Any]:
        """Frames of the packets in `runs`, each decoded from a fresh state to its last frame."""
        todo, codec = iter(runs), None
        begin, end = next(todo)
        for i, packet in enumerate(self._packets()):
            if i < begin:
                continue
            if codec is None:
                codec = self.stream.codec_context
                codec.open(strict=False)
            if wanted is not None:
                codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from self._sound(codec.decode(packet))
            if i < end:
                continue
            yield from self._sound(codec.decode(None))
            codec.flush_buffers()
            begin, end = next(todo, (0, -1))
            if end < 0:
                codec.skip_frame = "DEFAULT"
                return

    def _sound(self, frames: Iterable[Any]) -> Iterator[Any]:
        for frame in frames:
            if frame.is_corrupt:
                raise self.broken("with frames that cannot be decoded")
            yield frame

    def _picture(self, frame: Any) -> np.ndarray:
        """(H, W, 3) uint8, turned as the file says; the size is that of the stream, where single frames differ."""
        codec = self.stream.codec_context
        pixels = frame.to_ndarray(format="rgb24", width=codec.width, height=codec.height)
        return np.rot90(pixels, round(frame.rotation / 90))


def read_frames(
    path: Any, num_frames: int = 8, clip_start_sec: float = 0.0, clip_end_sec: float | None = None
) -> torch.Tensor:
    """Decodes `num_frames` frames, evenly spaced from first to last: linspace(0, n - 1, num_frames), cut to integers.

    Args:
        path: video file.
        num_frames: at least 1; more than the video has repeats frames.
        clip_start_sec, clip_end_sec: only frames shown in [start, end) seconds after the first (None: to the end).

    Returns:
        (num_frames, H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: no such file.
        MediaError: empty, broken, truncated, without moving pictures, or without a frame in the clip.
    """
    import av

    name = check_file(path, _VIDEO)
    if num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")

    def choose(times: Sequence[float]) -> list[int]:
        last = float("inf") if clip_end_sec is None else clip_end_sec
        inside = [i for i, time in enumerate(times) if clip_start_sec <= time < last]
        if not inside:
            end = "the end" if clip_end_sec is None else f"{clip_end_sec:g} s"
            asked = f"a video with frames from {clip_start_sec:g} s to {end}"
            raise MediaError(name, asked, f"{len(times)} frames, the last at {times[-1]:.2f} s")
        return [inside[i] for i in _evenly(len(inside), num_frames)]

    try:
        with _File(name) as video:
            video.scan()
            frames = None
            if video.timed:
                with contextlib.suppress(_Missing):
                    frames = video.at_times(choose)
            if frames is None:
                frames = video.by_counting(choose)
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise MediaError(name, _VIDEO, f"{describe(name)} that cannot be decoded ({error})") from error
    return torch.from_numpy(np.stack(frames))


def _evenly(count: int, wanted: int) -> np.ndarray:
    return np.linspace(0, count - 1, wanted, dtype=int)


def to_cthw(frames: Any) -> torch.Tensor:
    """Frames in memory as (3, T, H, W): an array (T, H, W, 3), a tensor (3, T, H, W), or a list of pictures (H, W, 3).

    Where both readings fit, an array is (T, H, W, 3) and a tensor (3, T, H, W). Raises MediaError for anything else.
    """
    expected = "(T, H, W, 3) or (3, T, H, W)"
    if isinstance(frames, list | tuple):
        if not frames:
            raise MediaError("frames", "a list of pictures", "an empty list")
        if len({np.shape(frame) for frame in frames}) > 1:
            raise MediaError("frames", "pictures of one size", f"sizes {sorted({np.shape(f) for f in frames})}")
        frames = np.stack([np.asarray(f.convert("RGB") if isinstance(f, Image.Image) else f) for f in frames])
    if not isinstance(frames, np.ndarray | torch.Tensor):
        raise TypeError(f"images: expected a path, an array, tensor or list of frames, got {type(frames).__name__}")
    shape = tuple(frames.shape)
    if len(shape) != 4 or 0 in shape or 3 not in (shape[0], shape[-1]):
        raise MediaError("frames", expected, f"shape {shape}")
    array_first = isinstance(frames, np.ndarray)
    frames = torch.as_tensor(frames)
    return frames.permute(3, 0, 1, 2) if shape[-1] == 3 and (array_first or shape[0] != 3) else frames


def video_transform(vision_config: Any, antialias: bool = False) -> Compose:
    """Clip in memory, 0..255 -> (3, T, size, size) float32, normalised. Bilinear, not antialiased, as upstream."""
    size = image_size(vision_config)
    steps = [ToFloat(), NormalizeVideo(), ShortSideScale(size), CenterCropVideo(size), RandomHorizontalFlipVideo()]
    return Compose(steps)


def load_and_transform_video(
    video: Any,
    transform: Any,
    video_decode_backend: str = "decord",
    clip_start_sec: float = 0.0,
    clip_end_sec: float | None = None,
    num_frames: int = 8,
) -> torch.Tensor:
    """A path, or frames in memory (0..255), through `transform`; `num_frames` of them, evenly spaced.

    `clip_start_sec` and `clip_end_sec` choose seconds of a file; frames in memory have no clock and raise ValueError.
    """
    if video_decode_backend not in _BACKENDS:
        raise ValueError(f"video_decode_backend: expected one of {', '.join(_BACKENDS)}, got {video_decode_backend!r}")
    if is_path(video):
        frames = read_frames(video, num_frames, clip_start_sec, clip_end_sec).permute(3, 0, 1, 2)
        with named(video):
            return transform(frames)
    if clip_start_sec or clip_end_sec is not None:
        raise ValueError("clip_start_sec, clip_end_sec: expected a file, got frames in memory")
    frames = to_cthw(video)
    return transform(frames[:, _evenly(frames.shape[1], num_frames)])
