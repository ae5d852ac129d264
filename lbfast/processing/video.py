"""Video files -> (3, frames, size, size). Only the frames that are wanted, and those they refer to, are decoded.

How many frames there are and when each is shown is found by the index of an MP4 file, elsewhere by one pass over the
packets, without decoding: the container's own count is missing or wrong too often. Then each wanted frame is decoded
from the key frame before it. Frames are those that decord gives, to the bit: index linspace(0, n - 1, num_frames), RGB
by swscale, turned as the file's rotation says.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from lbfast.processing.clip import evenly, to_cthw
from lbfast.processing.container import only, opened, packets
from lbfast.processing.image import image_size
from lbfast.processing.index import Disagrees, Index
from lbfast.processing.media import MediaError, MediaWarning, Reading, Source, is_readable, named
from lbfast.processing.threads import decoding_threads
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


class Missing(Exception):
    """A wanted frame did not come out of the decoder, or a packet or a key frame is not what the file says."""


@dataclass
class Counted:
    """What decoding all of a video showed: times of the frames, numbers of corrupt ones, packets that gave nothing."""

    pts: list[Any] = field(default_factory=list)
    corrupt: list[int] = field(default_factory=list)
    undecodable: int = 0


class VideoFile:
    """An open video. `look` lists its packets; `at_times` and `by_counting` decode the frames that `choose` picks.

    `choose(times)` gets the time of every frame in seconds after the first, and returns the indices of the wanted ones.

    Attributes:
        damage: what was found broken and yet could be read; "" where nothing was.
    """

    def __init__(self, source: Source):
        self.source = source
        self.limit = source.reading.limits.frame_pixels
        self.damage = ""
        self.threads = decoding_threads()
        self.size: tuple[int, int] | None = None  # of the pictures
        self._opened = contextlib.ExitStack()
        self._open()
        self.index: Index | None = None  # None: all packets were read
        self._forget()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.close()

    def _open(self) -> None:
        import av

        self._opened.close()
        bound = {"max_pixels": str(self.limit)}  # for the decoders that look for the size, too
        with contextlib.ExitStack() as opening:
            container = opening.enter_context(opened(self.source, "moving pictures", bound))
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise self.source.error("without moving pictures")
            best = container.streams.best("video")
            stream: Any = best if best in streams else streams[0]
            codec = stream.codec_context
            if codec is None:
                raise self.source.error("in a codec that FFmpeg cannot decode here")
            if codec.width * codec.height > self.limit:
                got = f"of {codec.width} x {codec.height} pixels, more than {self.limit:,} (limits.frame_pixels)"
                raise self.source.error(got)
            only(container, stream)
            codec.options = bound
            codec.thread_type = "AUTO"
            codec.thread_count = self.threads
            self._opened = opening.pop_all()
        self.container, self.stream = container, stream

    def _forget(self) -> None:
        self.pts: list[int | None] = []  # of each packet, in the file's order; None: not said, or not to be shown
        self.keys: list[int] = []  # where decoding can begin
        self.shown = 0  # packets that show a frame
        self.delays: set[int] = set()  # from decoding to showing
        self.kept: list[Any] | None = []

    def look(self) -> None:
        """Lists the packets, by the file's index or by `scan`."""
        self.source.check_complete()
        try:
            self.index = Index.of(self.source, self.container, self.stream)
        except Disagrees:
            self._open()
        if self.index is None:
            self._scan()
        else:
            self.pts, self.keys, self.shown = [*self.index.pts], self.index.keys, len(self.index.pts)

    def doubt(self) -> bool:
        """After Missing: whether it is worth another try, now that all packets were read. False: they had been."""
        if self.index is None:
            self.threads = 1  # what comes of broken packets may depend on how they are shared
            return False
        self.index = None
        self._open()
        self._forget()
        self._scan()
        return True

    def _scan(self) -> None:
        """Reads every packet. Raises MediaError where the file ends too early.

        A packet is marked as corrupt where the file ends in the middle of it; in transport streams also where the
        counter of their small packets jumps, as it does where segments are joined: that says little, and is passed on.
        """
        joined = self.container.format.name.startswith("mpegts")
        size = 0
        for packet in packets(self.source, self.container, self.stream):
            if packet.size == 0:
                continue  # PyAV's own, at the end
            if packet.is_corrupt and not joined:
                raise self.source.error("that is truncated or has broken packets")
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
            raise self.source.error("without frames")

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

    def order(self) -> tuple[array.array[int], array.array[float]]:
        """The packets' times as they are shown, on the stream's clock and in seconds after the first."""
        order = array.array("q", sorted(p for p in self.pts if p is not None))
        base: Fraction = self.stream.time_base
        return order, array.array("d", ((p - order[0]) * base.numerator / base.denominator for p in order))

    @property
    def rate(self) -> Fraction:
        """Frames a second, as far as the container knows."""
        return self.stream.guessed_rate or Fraction(25)

    def at_times(self, choose: Callable[[Sequence[float]], list[int]]) -> np.ndarray:
        """The frames that `choose` picks, by `at`. Raises Missing."""
        order, times = self.order()
        wanted = [order[i] for i in choose(times)]
        clip = _Clip(wanted, self.source)
        for pts, frame in self.at(sorted(set(wanted))):
            clip.put(pts, self.picture(frame))
        return clip.frames

    def at(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The frames of some times, rising, as they are decoded: those that are shown first, first.

        Decodes from the key frame before each wanted frame; unwanted frames that nothing refers to are skipped.

        Raises:
            Missing: the decoder did not give a wanted frame, or calls one that it gave corrupt; the index is wrong, or
                what the file calls a key frame is none.
        """
        missing = set(wanted)
        position = {p: i for i, p in enumerate(self.pts) if p in missing}
        runs: list[list[int]] = []  # first and last packet; leading pictures of a key frame may make neighbours overlap
        for pts in wanted:
            begin = self._key_before(pts, position[pts])
            if runs and begin <= runs[-1][1] + 1:
                runs[-1][1] = max(runs[-1][1], position[pts])
            else:
                runs.append([begin, position[pts]])
        for frame in self._decode(runs, missing.copy()):
            if frame is None or frame.is_corrupt:
                raise Missing
            if frame.pts in missing:
                missing.remove(frame.pts)
                yield frame.pts, frame
        if missing:
            raise Missing

    def _key_before(self, pts: int, index: int) -> int:
        """The last packet up to number `index` where decoding what is shown at `pts` can begin."""
        for place in range(bisect.bisect_right(self.keys, index) - 1, -1, -1):
            if self._pts(self.keys[place]) <= pts:
                return self.keys[place]
        return 0

    def by_counting(self, choose: Callable[[Sequence[float]], list[int]]) -> np.ndarray:
        """Decodes from first packet to last, and again where there turn out to be more or fewer frames than packets.

        In the place of a frame that the decoder calls corrupt comes the last good one before it, else the first after.
        """
        times = [float(i / self.rate) for i in range(self.shown)]
        for _ in range(2):
            wanted = choose(times)
            clip, seen = _Clip(wanted, self.source), Counted()
            for number, frame in self.counted(seen, clip.missing):
                clip.put(number, self.picture(frame))
            times = self.times_of(seen)
            if choose(times) == wanted:
                self.judge(seen, [i for i in seen.corrupt if i in wanted])
                return clip.frames
        raise self.source.error("that decodes differently each time")

    def times_of(self, seen: Counted) -> list[float]:
        """The times of all frames, in seconds after the first. MediaError where there is none."""
        if not seen.pts:
            bound = f"{self.limit:,} pixels (limits.frame_pixels)"
            raise self.source.error(f"without a frame of at most {bound} that can be decoded")
        if None in seen.pts or seen.pts != sorted(seen.pts):
            return [float(i / self.rate) for i in range(len(seen.pts))]
        return [float((pts - seen.pts[0]) * self.stream.time_base) for pts in seen.pts]

    def counted(self, seen: Counted, wanted: Collection[int]) -> Iterator[tuple[int, Any]]:
        """The frames of some numbers, by decoding all of them; `seen` gets what is met on the way.

        In the place of a corrupt one comes the last good one before it, else the first after.
        """
        self._open()  # a decoder that has seen other frames may hold them back longer
        orphans: list[int] = []  # corrupt, and nothing good came before
        good = None
        for frame in self._decode([[0, len(self.pts) - 1]]):
            if frame is None:
                seen.undecodable += 1
                continue
            number = len(seen.pts)
            seen.pts.append(frame.pts)
            if frame.is_corrupt:
                seen.corrupt.append(number)
            else:
                good = frame
            orphans.append(number)
            if good is not None:
                yield from ((i, good) for i in orphans if i in wanted)
                orphans = []

    def judge(self, seen: Counted, replaced: list[int]) -> None:
        """Says what is damaged; raises MediaError where that is most of it, or `strict` was asked for."""
        frames, corrupt, said = len(seen.pts), len(seen.corrupt), []
        if corrupt:
            said.append(f"{corrupt} of {frames} frames are broken")
        if seen.undecodable:
            said.append(f"{seen.undecodable} of {len(self.pts)} packets cannot be decoded")
        damage = " and ".join(said)
        if 2 * (corrupt + seen.undecodable) > frames + seen.undecodable or (damage and self.source.reading.strict):
            raise self.source.error(f"of which {damage}")
        if replaced:
            damage += f"; in the place of {', '.join(map(str, replaced))} their neighbours are used"
        self.damage = damage

    def _pts(self, index: int) -> float:
        pts = self.pts[index]
        return float("inf") if pts is None else pts

    def _packets(self, runs: list[list[int]]) -> Iterator[tuple[int, Any]]:
        """Those in `runs`, with their numbers; where there is no index, others too. Raises Missing."""
        if self.index is not None:
            for begin, end in runs:
                try:
                    yield from enumerate(self.index.packets(begin, end), begin)
                except Disagrees:
                    raise Missing from None
        elif self.kept is not None:
            yield from enumerate(self.kept)
        else:
            self._open()
            yield from enumerate(packet for packet in self.container.demux(self.stream) if packet.size)

    def _decode(self, runs: list[list[int]], wanted: set[int] | None = None) -> Iterator[Any]:
        """Frames of the packets in `runs`, each decoded from a fresh state to its last frame; None: undecodable."""
        todo, codec = iter(runs), None
        begin, end = next(todo)
        for i, packet in self._packets(runs):
            if i < begin:
                continue
            if codec is None:
                codec = self.stream.codec_context
                codec.open(strict=False)
            if wanted is not None:
                codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            last = i == end
            for frame in [*self._tried(codec, packet), *(self._tried(codec, None) if last else [])]:
                if wanted is not None and frame is not None and self._is_no_key(frame, begin):
                    raise Missing
                yield frame
            if not last:
                continue
            codec.flush_buffers()
            begin, end = next(todo, (0, -1))
            if end < 0:
                codec.skip_frame = "DEFAULT"
                return

    def _is_no_key(self, frame: Any, begin: int) -> bool:
        """Whether it is that of packet `begin`, with which decoding began, and needs others: the file's table lies."""
        return frame.pts == self.pts[begin] and not frame.key_frame and begin in self.keys

    def _tried(self, codec: Any, packet: Any) -> list[Any]:
        import av

        try:
            return codec.decode(packet)
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            return [None]

    def picture(self, frame: Any) -> np.ndarray:
        """(H, W, 3) uint8, turned and mirrored as the file says; of the stream's size, where single frames differ."""
        if self.size is None:
            codec = self.stream.codec_context
            self.size = codec.width, codec.height
        pixels = frame.to_ndarray(format="rgb24", width=self.size[0], height=self.size[1])
        return _shown(pixels, _display_matrix(frame))


class _Clip:
    """The wanted frames, by what tells them (times or numbers), in one array that is made when the first one comes.

    Attributes:
        missing: the wanted ones that have not come yet. frames: (T, H, W, 3) uint8.
    """

    def __init__(self, wanted: Sequence[int], source: Source):
        self._places: dict[int, list[int]] = {}
        for place, key in enumerate(wanted):
            self._places.setdefault(key, []).append(place)
        self.missing, self._count, self._source = set(wanted), len(wanted), source
        self.frames = np.empty((0, 0, 0, 3), np.uint8)

    def put(self, key: int, picture: np.ndarray) -> None:
        """Takes a frame. Raises MediaError where all of them would be more than may be held."""
        if not len(self.frames):
            size, limit = self._count * picture.size, self._source.reading.limits.clip_bytes
            if size > limit:
                got = f"of which {self._count} frames of {picture.shape[1]} x {picture.shape[0]} are {size:,} bytes"
                raise self._source.error(f"{got}, expected at most {limit:,} (limits.clip_bytes)")
            self.frames = np.empty((self._count, *picture.shape), np.uint8)
        for place in self._places[key]:
            self.frames[place] = picture
        self.missing.discard(key)


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the frame's display matrix: a pixel at (x, y), y downwards, is shown at (ax + cy, bx + dy)."""
    from av.sidedata.sidedata import Type

    data = next((s for s in frame.side_data if s.type == Type.DISPLAYMATRIX), None)
    if data is None:
        return 1, 0, 0, 1
    matrix = np.frombuffer(data, dtype=np.int32)
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])


def _shown(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """(H, W, 3) as a display matrix says, to the nearest quarter turn; mirrored where it mirrors."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def read_frames(
    path: Any,
    num_frames: int | None = 8,
    clip_start_sec: float = 0.0,
    clip_end_sec: float | None = None,
    reading: Reading | None = None,
) -> torch.Tensor:
    """Decodes `num_frames` frames, evenly spaced from first to last: linspace(0, n - 1, num_frames), cut to integers.

    A frame that the decoder calls corrupt is replaced by its neighbour, and the file is reported by one MediaWarning.

    Args:
        path: video file, bytes, or a file object.
        num_frames: at least 1; more than the video has repeats frames. None: every frame.
        clip_start_sec, clip_end_sec: only frames shown in [start, end) seconds after the first (None: to the end).
        reading: strict refuses damaged files; limits.frame_pixels and limits.clip_bytes; allow_urls.

    Returns:
        (num_frames, H, W, 3) uint8 RGB; on the GPU where reading.decoder decodes there.

    Raises:
        FileNotFoundError: no such file. ImportError, RuntimeError: what reading.decoder needs is not here.
        MediaError: empty, broken, truncated, too large, without moving pictures, or without a frame in the clip.
    """
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")

    with Source(path, _VIDEO, reading) as source:

        def choose(times: Sequence[float]) -> list[int]:
            last = float("inf") if clip_end_sec is None else clip_end_sec
            inside = [i for i, time in enumerate(times) if clip_start_sec <= time < last]
            if not inside:
                end = "the end" if clip_end_sec is None else f"{clip_end_sec:g} s"
                asked = f"a video with frames from {clip_start_sec:g} s to {end}"
                raise MediaError(source.name, asked, f"{len(times)} frames, the last at {times[-1]:.2f} s")
            return [inside[i] for i in evenly(len(inside), num_frames)]

        if source.reading.decoder != "ffmpeg":
            from lbfast.processing import nvdec

            try:
                return nvdec.frames(source, choose)
            except nvdec.Elsewhere as why:
                warnings.warn(f"{source.name}: decoded on the CPU: {why}", UserWarning, stacklevel=2)
        with source.decoding(), VideoFile(source) as video:
            video.look()
            frames = None
            while frames is None:
                try:
                    frames = video.at_times(choose) if video.timed else video.by_counting(choose)
                except Missing:
                    if not video.doubt():
                        frames = video.by_counting(choose)
        if video.damage:
            warnings.warn(f"{source.name}: {video.damage}", MediaWarning, stacklevel=2)
        return torch.from_numpy(frames)


def check_backend(name: str) -> None:
    """Raises ValueError for a video_decode_backend that no config carries."""
    if name not in _BACKENDS:
        raise ValueError(f"video_decode_backend: expected one of {', '.join(_BACKENDS)}, got {name!r}")


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
    num_frames: int | None = 8,
    layout: str | None = None,
    reading: Reading | None = None,
) -> torch.Tensor:
    """A file, or frames in memory (see `to_cthw`), through `transform`; `num_frames` of them, evenly spaced; None: all.

    `clip_start_sec` and `clip_end_sec` choose seconds of a file; frames in memory have no clock and raise ValueError.
    """
    check_backend(video_decode_backend)
    if is_readable(video):
        frames = read_frames(video, num_frames, clip_start_sec, clip_end_sec, reading).permute(3, 0, 1, 2)
        with named(video):
            return transform(frames).cpu()
    if clip_start_sec or clip_end_sec is not None:
        raise ValueError("clip_start_sec, clip_end_sec: expected a file, got frames in memory")
    return transform(to_cthw(video, layout, num_frames, reading))
