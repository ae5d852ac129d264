"""Videos by torchcodec: the frames that the CPU's decoder gives, or those, and a warning that says why.

A stand-in that decodes by our own reader takes torchcodec's place where it is not installed, or has no FFmpeg.
"""

from __future__ import annotations

import json
import sys
import warnings
from fractions import Fraction
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from lbfast.embedding import embed_files
from lbfast.processing import nvdec, segments, video
from lbfast.processing.media import Limits, MediaError, Reading
from lbfast.processing.processor import LanguageBindVideoProcessor
from lbfast.processing.resize import resized_crop
from tests.test_processing_video import KINDS, SMALL, every_frame, make_video

av = pytest.importorskip("av")
ON_CPU = Reading(decoder="torchcodec-cpu")
UNTIMED = ("raw.h264", "reordered.avi")
LEFT = (*UNTIMED, "hidden.webm", "refresh.mp4", "stream.ts", "divx.avi", "program.mpg")
"""What torchcodec cannot be told of, gives other frames of, or does not decode."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(nvdec, "_trusted", {})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")

    def make(name):
        codec, options, others = KINDS[name]
        path = folder / name
        return path if path.exists() else make_video(path, codec, options, **others)

    return make


class StandIn:
    """torchcodec's VideoDecoder, as far as it is used: what it was asked for, and frames that are `off` by so much."""

    off, late, asked = 0, 0.0, []

    def __init__(self, source, **options):
        self.asked.append((source, options))
        with av.open(source) as file:
            self._frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        self._times = [row["pts"] for row in json.loads(options["custom_frame_mappings"])["frames"]]

    def get_frames_at(self, indices):
        frames = np.stack([self._frames[i] for i in indices]).astype(int) + self.off
        seconds = [float(self._times[i] * Fraction(1, 12288)) + self.late for i in indices]
        return SimpleNamespace(data=torch.from_numpy(frames.clip(0, 255).astype(np.uint8)), pts_seconds=seconds)


@pytest.fixture
def stand_in(monkeypatch):
    module, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = module.VideoDecoder = type("VideoDecoder", (StandIn,), {"asked": []})
    module.decoders = decoders
    monkeypatch.setitem(sys.modules, "torchcodec", module)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    return decoders.VideoDecoder


def given(path, count, reading=ON_CPU, **options):
    """The frames, and why they come from the CPU's decoder."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        frames = video.read_frames(path, count, reading=reading, **options)
    return frames, [str(w.message) for w in said]


def test_frames_are_those_of_the_cpu(made, stand_in):
    path = made("closed.mp4")
    expected = every_frame(path)
    for source in (str(path), path.read_bytes()):
        for count in (1, 8, 50):
            frames, said = given(source, count)
            assert [np.array_equal(got, expected[i]) for got, i in zip(frames, np.linspace(0, 39, count, dtype=int))]
            assert torch.equal(frames, video.read_frames(source, count)) and said == []
    part, _ = given(str(path), 3, clip_start_sec=0.5, clip_end_sec=1.0)
    assert torch.equal(part, video.read_frames(path, 3, 0.5, 1.0))
    source, options = stand_in.asked[0]
    assert source == f"file:{path}" and options["device"] == "cpu" and options["stream_index"] == 0
    rows = json.loads(options["custom_frame_mappings"])["frames"]
    assert [row["pts"] for row in rows] == [512 * i for i in range(40)]
    assert [i for i, row in enumerate(rows) if row["key_frame"]] == [0, 10, 20, 30]


@pytest.mark.parametrize(
    "off, late, why", [(9, 0, "pixels of h264, yuv420p are 0.0"), (0, 0.1, "that are 0.100 s off")]
)
def test_what_it_gives_is_looked_at(made, stand_in, off, late, why):
    path = made("closed.mp4")
    stand_in.off, stand_in.late = off, late
    for _ in range(2):
        frames, said = given(path, 8)
        assert torch.equal(frames, video.read_frames(path, 8)) and len(said) == 1 and why in said[0]
    stand_in.off = 0 if off else 9  # pixels are looked at once for each kind
    stand_in.late = 0.0
    frames, said = given(path, 8)
    assert bool(said) == bool(off or stand_in.off)


@pytest.mark.parametrize("name", UNTIMED)
def test_what_only_decoding_can_tell_is_left_to_the_cpu(made, stand_in, name):
    path = made(name)
    frames, said = given(path, 8)
    assert torch.equal(frames, video.read_frames(path, 8)) and len(said) == 1 and "packets do not say" in said[0]


def test_mirrored(made, stand_in):
    data = bytearray(made("closed.mp4").read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 4] = (-65536).to_bytes(4, "big", signed=True)
    frames, said = given(bytes(data), 2)
    assert torch.equal(frames, video.read_frames(bytes(data), 2)) and "mirrored" in said[0]


def test_errors(made, stand_in, monkeypatch, tmp_path):
    path = made("closed.mp4")
    with pytest.raises(MediaError, match=r"more than|at most 1,000 \(limits.clip_bytes\)"):
        given(path, 8, Reading(decoder="torchcodec-cpu", limits=Limits(clip_bytes=1000)))
    with pytest.raises(ValueError, match="decoder: expected ffmpeg, torchcodec-cuda or torchcodec-cuda:N, got 'nvdec'"):
        Reading(decoder="nvdec")
    with pytest.raises(ValueError, match="decoder: expected ffmpeg for parts"):
        next(segments.video_segments(path, None, segments.Cuts.of(1), reading=ON_CPU))
    with pytest.raises(ValueError, match="decoder: expected ffmpeg with segment"):
        embed_files([path], ["lbfast-mini/video"], tmp_path / "a.parquet", segment=1, decoder="torchcodec-cuda")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected a machine with CUDA for torchcodec-cuda:1, got one without"):
            given(path, 8, Reading(decoder="torchcodec-cuda:1"))
        with pytest.raises(RuntimeError, match="expected a machine with CUDA for torchcodec-cuda, got one without"):
            embed_files([path], ["lbfast-mini/video"], tmp_path / "a.parquet", decoder="torchcodec-cuda")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.delitem(sys.modules, "torchcodec.decoders")
    with pytest.raises(ImportError, match=r"pip install 'lbfast\[torchcodec\]'"):
        given(path, 8)


def test_the_processor_gives_pixels_on_the_cpu(made, stand_in):
    path = made("closed.mp4")
    ours = LanguageBindVideoProcessor(SMALL, reading=ON_CPU)([str(path)])["pixel_values"]
    assert (
        torch.equal(ours, LanguageBindVideoProcessor(SMALL)([str(path)])["pixel_values"]) and len(stand_in.asked) == 1
    )


def test_a_resize_computes_where_the_frames_are():
    x = torch.empty(3, 2, 48, 64, dtype=torch.uint8, device="meta")
    made = resized_crop(x, (28, 37), (0, 4, 28, 28), "bilinear", False, (1.0, 2.0, 3.0), (0.0, 0.0, 0.0))
    assert made.device.type == "meta" and made.shape == (3, 2, 28, 28)


def torchcodec():
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchcodec: {str(error)[:80]}")


@pytest.mark.parametrize("name", KINDS)
def test_torchcodec_itself(made, name):
    torchcodec()
    path = made(name)
    frames, said = given(path, 8)
    assert torch.equal(frames, video.read_frames(path, 8))
    assert bool(said) == (name in LEFT)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["closed.mp4", "open.mkv", "superframes.webm"])
def test_on_a_gpu(made, name):
    torchcodec()
    path = made(name)
    ours, said = given(path, 8, Reading(decoder="torchcodec-cuda"))
    assert said == [] and ours.is_cuda
    assert (ours.cpu().float() - video.read_frames(path, 8).float()).abs().mean() <= 255e-2
    pixels = LanguageBindVideoProcessor(SMALL, reading=Reading(decoder="torchcodec-cuda"))([str(path)])["pixel_values"]
    assert not pixels.is_cuda
