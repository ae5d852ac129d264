"""Videos that are read by their index: the same frames and reports as when all of the file is read, of few bytes."""

from __future__ import annotations

import io
import random
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from lbfast.processing import segments, video
from lbfast.processing.audio import audio_transform, load_and_transform_audio
from lbfast.processing.index import Index
from lbfast.processing.media import MediaError, MediaWarning, Reading
from tests.test_processing_video import KINDS, X264, every_frame, make_video, overwritten

av = pytest.importorskip("av")

X265 = "keyint=10:min-keyint=10:open-gop=1:bframes=3:log-level=none:pools=none:frame-threads=1"
MADE = {  # name: codec, its options, others; whether there is an index
    "closed.mp4": (*KINDS["closed.mp4"], True),
    "open.mp4": ("libx264", {"x264-params": X264 + ":open-gop=1"}, {}, True),
    "open-hevc.mp4": ("libx265", {"x265-params": X265}, {}, True),
    "uneven.mp4": ("libx264", {"x264-params": X264}, KINDS["uneven.mkv"][2], True),
    "superframes.mp4": (*KINDS["superframes.webm"], True),
    "motion.mov": (*KINDS["motion.avi"], True),
    "fragments.mp4": (*KINDS["fragments.mp4"], False),
    "counts.mkv": (*KINDS["closed.mp4"], False),
    "stream.ts": (*KINDS["stream.ts"], False),
    "reordered.avi": (*KINDS["reordered.avi"], False),
}


class Counted(io.BytesIO):
    """Bytes that count how many of them are read."""

    count = 0

    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.fixture
def found(monkeypatch):
    """Gets for each video that is looked at whether it has an index."""
    seen, of = [], Index.of.__func__

    def spied(cls, *given):
        index = of(cls, *given)
        seen.append(index is not None)
        return index

    monkeypatch.setattr(Index, "of", classmethod(spied))
    return seen


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    codec, options, others = KINDS["closed.mp4"]
    return make_video(tmp_path_factory.mktemp("clip") / "closed.mp4", codec, options, **others)


def shown(item, count, **reading):
    """What comes of it: the frames and what is reported, or the error."""
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always", MediaWarning)
        try:
            frames = video.read_frames(item, count, reading=Reading(**reading))
        except MediaError as error:
            return str(error)
    return frames.numpy().tobytes(), [str(w.message) for w in reported]


@pytest.mark.parametrize("name", MADE)
def test_frames_are_those_of_a_full_decode(tmp_path, found, name):
    codec, options, others, indexed = MADE[name]
    path = make_video(tmp_path / name, codec, options, **others)
    frames = every_frame(path)
    for wanted in (1, 3, 8, None):
        actual = video.read_frames(path, wanted).numpy()
        index = np.linspace(0, 39, wanted or 40, dtype=int)
        assert [i for i, got in zip(index, actual) if not np.array_equal(got, frames[i])] == []
    assert found == [indexed] * 4


@pytest.mark.parametrize("begin, milliseconds", [(3, 1000), (12, 500), (2, 9999)])
def test_edit_lists_that_hide_frames(tmp_path, clip, found, begin, milliseconds):
    """FFmpeg's own index has these frames, or not, and marks some; the tables have all."""
    data = bytearray(clip.read_bytes())
    at = data.index(b"elst") + 12
    before = data[at : at + 8]
    data[at : at + 8] = milliseconds.to_bytes(4, "big") + (512 * begin).to_bytes(4, "big")
    assert data[at : at + 8] != before
    (tmp_path / "edited.mp4").write_bytes(data)
    frames = every_frame(tmp_path / "edited.mp4")
    actual = video.read_frames(bytes(data), 8).numpy()
    wanted = np.linspace(0, len(frames) - 1, 8, dtype=int)
    assert [i for i, got in zip(wanted, actual) if not np.array_equal(got, frames[i])] == []
    assert found == [len(frames) == 40]


def test_tables_that_lie_change_nothing(clip, found, monkeypatch):
    whole, draw = clip.read_bytes(), random.Random(3)
    at, cases = whole.index(b"moov"), []
    for _ in range(30):
        data = bytearray(whole)
        data[draw.randrange(at, len(data))] = draw.randrange(256)
        cases.append(bytes(data))
    cases += [whole[:size] for size in (at, at + 200, len(whole) - 1)]
    by_index = [shown(data, 5) for data in cases]
    assert 10 < sum(found) < len(cases)
    monkeypatch.setattr(Index, "of", classmethod(lambda *given: None))
    assert by_index == [shown(data, 5) for data in cases]


@pytest.mark.parametrize("indexed", [True, False])
def test_key_frames_that_are_none(tmp_path, found, monkeypatch, indexed):
    """A table (stss) that names others: of MPEG-4 part 2 FFmpeg believes it, and decodes on from nothing."""
    data = bytearray(make_video(tmp_path / "a.mp4", "mpeg4", {"g": "10"}).read_bytes())
    at = data.index(b"stss") + 12
    assert data[at : at + 16] == b"".join(n.to_bytes(4, "big") for n in (1, 11, 21, 31))
    data[at : at + 16] = b"".join(n.to_bytes(4, "big") for n in (1, 14, 24, 34))
    (tmp_path / "b.mp4").write_bytes(data)
    frames = every_frame(tmp_path / "a.mp4")
    if not indexed:
        monkeypatch.setattr(Index, "of", classmethod(lambda *given: None))
    actual = video.read_frames(tmp_path / "b.mp4", 8).numpy()
    wanted = np.linspace(0, 39, 8, dtype=int)
    assert [i for i, got in zip(wanted, actual) if not np.array_equal(got, frames[i])] == []
    transform = video.video_transform(type("", (), {"image_size": 28}))
    cuts = segments.Cuts.of("0.5s")
    parts = [
        [part.pixels for part in segments.video_segments(tmp_path / name, transform, cuts)]
        for name in ("a.mp4", "b.mp4")
    ]
    assert len(parts[0]) == len(parts[1]) == 4 and all(map(torch.equal, *parts))
    assert found == [True] * 3 * indexed


def places_beyond_the_end(data: bytes, track: int) -> bytes:
    """With a table stco of which the last place is twice as far as the file is long."""
    changed, at = bytearray(data), -1
    for _ in range(track + 1):
        at = data.index(b"stco", at + 1)
    last = at + 8 + 4 * int.from_bytes(data[at + 8 : at + 12], "big")
    changed[last : last + 4] = (2 * len(data)).to_bytes(4, "big")
    return bytes(changed)


@pytest.mark.skipif(not hasattr(av.stream, "Discard"), reason="PyAV before 18 reads all streams of a file")
@pytest.mark.parametrize("indexed", [True, False])
def test_tables_of_another_stream_that_lie(tmp_path, clip, monkeypatch, indexed):
    """FFmpeg would end the file at a sound's place beyond its end, a sound at that of a frame, without a word."""
    with av.open(str(tmp_path / "both.mp4"), "w") as out, av.open(str(clip)) as given:
        stream = out.add_stream_from_template(given.streams.video[0])
        sound = out.add_stream("aac", rate=16000, layout="mono")
        noise = np.random.default_rng(0).normal(0, 3000, (1, 26000)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        packets = [p for p in given.demux(video=0) if p.size]
        sounds = [*sound.encode(frame), *sound.encode(None)]
        for packet in packets:
            packet.stream = stream
        for packet in sorted(packets + sounds, key=lambda p: p.dts * p.time_base):
            out.mux(packet)
    data = (tmp_path / "both.mp4").read_bytes()
    transform = audio_transform(type("", (), {"num_mel_bins": 16, "target_length": 20}))
    frames, heard = video.read_frames(data, 8), load_and_transform_audio(data, transform)
    if not indexed:
        monkeypatch.setattr(Index, "of", classmethod(lambda *given: None))
    assert torch.equal(video.read_frames(places_beyond_the_end(data, 1), 8), frames)
    assert torch.equal(load_and_transform_audio(places_beyond_the_end(data, 0), transform), heard)
    for read, track in ((lambda x: video.read_frames(x, 8), 0), (lambda x: load_and_transform_audio(x, transform), 1)):
        with pytest.raises(MediaError, match="that is truncated or has broken packets"):
            read(places_beyond_the_end(data, track))


def test_a_packet_that_is_not_as_announced(clip, found, monkeypatch):
    """All packets are read then, and the frames, of a video and of its parts, are the same."""
    transform = video.video_transform(type("", (), {"image_size": 28}))
    cuts = segments.Cuts.of("0.5s")
    frames = video.read_frames(clip, 8)
    parts = [part.pixels for part in segments.video_segments(clip, transform, cuts)]
    assert len(parts) == 4
    said, packets = Index._said, []

    def other(packet):
        packets.append(packet.pts)
        pts, *rest = said(packet)
        return (pts, *rest) if len(packets) < 15 else (pts + 1, *rest)

    monkeypatch.setattr(Index, "_said", staticmethod(other))
    assert torch.equal(video.read_frames(clip, 8), frames) and len(packets) == 15
    packets.clear()
    again = [part.pixels for part in segments.video_segments(clip, transform, cuts)]
    assert len(packets) == 15 and len(again) == 4 and all(map(torch.equal, again, parts))
    assert found == [True] * 4


def test_damage_is_reported_as_without_an_index(clip, found, monkeypatch):
    damaged = overwritten(clip, 10, slice(60, 90))
    given = [(damaged, count, {"strict": strict}) for count in (2, 8, 40) for strict in (False, True)]
    by_index = [shown(path, count, **reading) for path, count, reading in given]
    assert found == [True] * 6 and ["broken" in str(got) for got in by_index] == [False] * 2 + [True] * 4
    monkeypatch.setattr(Index, "of", classmethod(lambda *given: None))
    assert by_index == [shown(path, count, **reading) for path, count, reading in given]


@pytest.mark.parametrize("last", [False, True], ids=["faststart", "moov at the end"])
def test_few_bytes_are_read(tmp_path, last):
    noise = np.random.default_rng(0)
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w", options={} if last else {"movflags": "faststart"}) as out:
        stream = out.add_stream("mpeg4", rate=24, options={"g": "12", "q": "2"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 24)
        for i in range(360):
            frame = av.VideoFrame.from_ndarray(noise.integers(0, 255, (120, 160, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    file = Counted(path.read_bytes())
    size = len(file.getvalue())
    frames = video.read_frames(file, 4).numpy()
    assert file.count < size / 5, f"{file.count} of {size} bytes"  # 4 of 30 groups of frames
    every = every_frame(path)
    assert all(np.array_equal(got, every[i]) for got, i in zip(frames, np.linspace(0, 359, 4, dtype=int)))
