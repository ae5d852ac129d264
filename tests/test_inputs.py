"""What comes in: bytes, file objects, URLs, values of other libraries, arrays of any order; and what is refused."""

from __future__ import annotations

import http.server
import io
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from lbfast.data.suffixes import suffixes_of
from lbfast.processing.clip import to_cthw
from lbfast.processing.media import Limits, MediaError, Reading, Source
from lbfast.processing.processor import (
    LanguageBindAudioProcessor,
    LanguageBindDepthProcessor,
    LanguageBindImageProcessor,
    LanguageBindVideoProcessor,
    transform_dict,
)
from lbfast.processing.transforms import ToFloat
from tests import tiny

VISION = SimpleNamespace(image_size=28, num_frames=4, num_mel_bins=23, target_length=40, max_depth=10)
CONFIG = SimpleNamespace(vision_config=VISION)
MODALITIES = ("image", "thermal", "depth", "video", "audio")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of each modality."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("files")
    return {
        "image": tiny.picture(folder / "a.png"),
        "thermal": tiny.picture(folder / "a.jpg"),
        "depth": tiny.depth_map(folder / "b.png"),
        "video": tiny.clip(folder / "a.mp4"),
        "audio": tiny.sound(folder / "a.wav"),
    }


class Drip(io.RawIOBase):
    """A stream that cannot seek and gives a few bytes at a time."""

    def __init__(self, data: bytes):
        self._data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 1000) if size >= 0 else -1)

    def seekable(self) -> bool:
        return False


@pytest.mark.parametrize("modality", MODALITIES)
def test_what_holds_a_file_gives_what_the_file_gives(files, modality):
    processor, data = transform_dict[modality](CONFIG), files[modality].read_bytes()
    expected = processor(files[modality])["pixel_values"]
    with open(files[modality], "rb") as opened:
        opened.seek(7)
        named = io.BytesIO(data)
        items = [data, bytearray(data), memoryview(data), io.BytesIO(data), opened, named, Drip(data)]
        items += [{"bytes": data, "path": None}, {"bytes": None, "path": str(files[modality])}]
        for item in items:
            assert torch.equal(
                processor([item, item] if not isinstance(item, Drip) else item)["pixel_values"][:1], expected
            )
        assert not opened.closed and not named.closed  # they are the caller's


@pytest.mark.parametrize("modality", MODALITIES)
def test_errors_of_what_has_no_path(files, modality):
    processor = transform_dict[modality](CONFIG)
    with pytest.raises(MediaError, match=r"bytes \(6 of them\): expected .*, got text"):
        processor(b"hello\n")
    with pytest.raises(MediaError, match=r"images\[1\]: file object \(BytesIO\): expected .*, got an empty file"):
        processor([files[modality].read_bytes(), io.BytesIO()])
    with pytest.raises(MediaError, match="opened in binary mode, got a file object that reads text"):
        processor(io.StringIO("text"))
    small = Reading(limits=Limits(stream_bytes=1000))
    with pytest.raises(MediaError, match=r"expected at most 1000 bytes \(limits.stream_bytes\)"):
        transform_dict[modality](CONFIG, reading=small)(Drip(bytes(5000)))


def test_urls_only_when_asked(files, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    processor, path = LanguageBindImageProcessor(CONFIG), files["image"]
    expected = processor(path)["pixel_values"]
    with fsspec.open("memory://folder/a.png", "wb") as file:
        file.write(path.read_bytes())
    for url in ("memory://folder/a.png", path.as_uri()):
        with pytest.raises(MediaError, match="expected an image in a local file, got a URL"):
            processor(url)
        assert torch.equal(processor(url, allow_urls=True)["pixel_values"], expected)
        asked = LanguageBindImageProcessor(CONFIG, reading=Reading(allow_urls=True))
        assert torch.equal(asked([url])["pixel_values"], expected)
    with pytest.raises(MediaError, match=r"memory://none\.png: expected an image, got a URL that cannot be opened"):
        processor("memory://none.png", allow_urls=True)


def test_no_connection_is_made_unless_asked():
    class Handler(http.server.BaseHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def do_GET(self):
            self.asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a.ts"
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n".encode()
        for modality in MODALITIES:
            for item in (url, playlist, io.BytesIO(playlist)):
                with pytest.raises(MediaError):
                    transform_dict[modality](CONFIG)(item)
        server.shutdown()
        assert Handler.asked == []


def test_content_opens_no_other_file(files, tmp_path):
    """ffconcat, playlists and the like, under any name; EPS, for which Pillow starts Ghostscript."""
    (tmp_path / "clip.mp4").write_bytes(files["video"].read_bytes())
    scripts = {
        "concat": "ffconcat version 1.0\nfile clip.mp4\n",
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet>'
        "<Representation><BaseURL>clip.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
    }
    for name, text in scripts.items():
        for suffix in ("mp4", "m3u8", "wav", "png"):
            path = tmp_path / f"{name}.{suffix}"
            path.write_text(text)
            for processor in (LanguageBindVideoProcessor, LanguageBindAudioProcessor):
                with pytest.raises(MediaError, match=rf"{name}\.{suffix}: expected .*, got text"):
                    processor(CONFIG)(path)
    postscript = tmp_path / "page.png"
    postscript.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    for processor in (LanguageBindImageProcessor, LanguageBindDepthProcessor):
        with pytest.raises(MediaError, match=r"page\.png: expected .*, got a PostScript document$"):
            processor(CONFIG)(postscript)


def test_pillows_own_reason_is_in_the_error(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(path)
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"a\.png: .* a PNG image that cannot be decoded \(.*[a-z]{4}.*\)"):
        LanguageBindImageProcessor(CONFIG)(path)


# Arrays in memory.


def grid(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


FRAMES = grid(5, 30, 40, 3)  # T, H, W, C


@pytest.mark.parametrize("as_array", [np.ascontiguousarray, torch.tensor])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_order_of_axes_is_told_or_asked_for(as_array, count):
    clip = FRAMES[:count]
    expected = torch.from_numpy(clip).permute(3, 0, 1, 2)
    orders = {"THWC": clip, "TCHW": clip.transpose(0, 3, 1, 2), "CTHW": clip.transpose(3, 0, 1, 2)}
    for layout, given in orders.items():
        assert torch.equal(to_cthw(as_array(given), layout), expected)
        if count == 3 and layout != "THWC":
            with pytest.raises(
                MediaError, match=r"\(T, C, H, W\) of 3 frames of 30 x 40 pixels and \(C, T, H, W\) of 3"
            ):
                to_cthw(as_array(given))
        else:
            assert torch.equal(to_cthw(as_array(given)), expected)
    with pytest.raises(ValueError, match="layout: expected one of THWC, TCHW, CTHW, got 'HWC'"):
        to_cthw(clip, "HWC")
    with pytest.raises(MediaError, match=r"expected \(C, T, H, W\) with C of 3, got shape \(5, 30, 40, 3\)"):
        to_cthw(FRAMES, "CTHW")
    processor = LanguageBindVideoProcessor(CONFIG)
    by_layout = processor(as_array(orders["TCHW"]), layout="TCHW")["pixel_values"]
    assert torch.equal(by_layout, processor(clip)["pixel_values"])


def test_pictures_whose_order_cannot_be_told():
    processor = LanguageBindImageProcessor(CONFIG)
    strip = grid(3, 40, 3)
    with pytest.raises(MediaError, match=r"\(H, W, C\) of 3 x 40 pixels and \(C, H, W\) of 40 x 3 pixels; layout="):
        processor(strip)
    picture = processor(Image.fromarray(strip))["pixel_values"]
    assert torch.equal(processor(strip, layout="HWC")["pixel_values"], picture)
    assert torch.equal(processor(torch.from_numpy(strip).permute(2, 0, 1), layout="CHW")["pixel_values"], picture)
    assert torch.equal(
        processor(grid(40, 50, 3)[None], layout="HWC")["pixel_values"], processor(grid(40, 50, 3))["pixel_values"]
    )
    with pytest.raises(ValueError, match="layout: expected for image, thermal, video only, got depth"):
        LanguageBindDepthProcessor(CONFIG)(np.ones((9, 9)), layout="HW")


def test_ranges_of_floats():
    processor = LanguageBindVideoProcessor(CONFIG)
    expected = processor(FRAMES)["pixel_values"]
    for clip in (FRAMES / 255, FRAMES.astype(np.float64), FRAMES.astype(np.int64), (FRAMES / 255).astype(np.float32)):
        torch.testing.assert_close(processor(clip)["pixel_values"], expected, rtol=0, atol=5e-6)
    clip = torch.from_numpy(FRAMES).permute(3, 0, 1, 2)
    torch.testing.assert_close(processor.transform(clip / 255), processor.transform(clip), rtol=0, atol=5e-6)
    dark = torch.full((3, 2, 30, 40), 2.0)
    assert torch.equal(ToFloat()(dark), dark / 255)  # whole numbers: levels
    for bad, said in (
        (dark * 0.7, "from 1.4 to 1.4 .*both readings fit"),
        (torch.linspace(-1.8, 2.1, 7200).view(3, 2, 30, 40), "from -1.8 to 2.1"),
        (torch.full((3, 2, 30, 40), torch.nan), "from nan to nan"),
        (torch.full((3, 2, 30, 40), 300), "from 300 to 300"),
        (torch.full((3, 2, 30, 40), -1), "from -1 to -1"),
        (torch.ones(3, 2, 30, 40, dtype=torch.bool), "dtype torch.bool"),
    ):
        with pytest.raises(MediaError, match=f"frames: expected levels 0..255, or floats in \\[0, 1\\], got .*{said}"):
            processor(bad)
    with pytest.raises(MediaError, match=r"floats up to 3\.5 \(metres\? times 1000\)"):
        LanguageBindDepthProcessor(CONFIG)(np.linspace(0.5, 3.5, 81).reshape(9, 9))
    assert torch.isfinite(LanguageBindDepthProcessor(CONFIG)(np.zeros((9, 9)))["pixel_values"]).all()
    with pytest.raises(MediaError, match=r"waveform: expected samples in \[-1, 1\], got values up to 20000"):
        LanguageBindAudioProcessor(CONFIG)((np.full(9999, 20000.0), 16000))


def test_lists_of_frames(tmp_path):
    processor, clip = LanguageBindVideoProcessor(CONFIG), FRAMES
    expected = processor(clip)["pixel_values"]
    names = []
    for i, frame in enumerate(clip):
        names.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(frame).save(names[-1])
    tensors = list(torch.from_numpy(clip))
    forms = [
        list(clip),
        tensors,
        [frame.permute(2, 0, 1) for frame in tensors],
        [Image.fromarray(frame) for frame in clip],
        names,
        [Path(name) for name in names],
        [Path(names[0]).read_bytes(), *map(Image.fromarray, clip[1:])],
        [frame / 255 for frame in clip],
    ]
    for form in forms:
        torch.testing.assert_close(processor([form])["pixel_values"], expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(processor([form, form])["pixel_values"][1:], expected, rtol=0, atol=5e-6)
    grey = [np.asarray(Image.fromarray(frame).convert("L")) for frame in clip]
    assert to_cthw(grey).shape == (3, 5, 30, 40)
    with pytest.raises(MediaError, match=r"frames: expected pictures of one size, got sizes 20 x 20, 30 x 40"):
        processor([[clip[0], grid(20, 20, 3)]])
    with pytest.raises(MediaError, match=r"images\[1\]: frames\[2\]: expected .* got shape \(5, 6, 7\)"):
        processor([list(clip), [clip[0], clip[1], grid(5, 6, 7)]])
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        processor([[names[0], str(tmp_path / "none.png")]])


class FrameBatch(SimpleNamespace):
    """As torchcodec's: data (N, C, H, W), pts_seconds, duration_seconds."""


class VideoDecoder:
    """As torchcodec's."""

    def __init__(self, frames, order="TCHW"):
        self._frames, self._order, self.asked = torch.from_numpy(frames), order, []

    def __len__(self):
        return len(self._frames)

    def get_frames_at(self, indices):
        self.asked += indices
        frames = self._frames[indices]
        data = frames if self._order == "THWC" else frames.permute(0, 3, 1, 2)
        return FrameBatch(data=data, pts_seconds=torch.zeros(len(data)), duration_seconds=torch.zeros(len(data)))


class VideoReader:
    """As decord's, whose arrays have asnumpy()."""

    def __init__(self, frames):
        self._frames = frames

    def __len__(self):
        return len(self._frames)

    def get_batch(self, indices):
        return SimpleNamespace(asnumpy=lambda: self._frames[indices])


def test_frames_of_torchcodec_and_decord():
    processor, clip = LanguageBindVideoProcessor(CONFIG), grid(9, 30, 40, 3)
    expected = processor(clip)["pixel_values"]
    decoder = VideoDecoder(clip)
    for item in (decoder, VideoDecoder(clip, "THWC"), VideoReader(clip)):
        assert torch.equal(processor(item)["pixel_values"], expected)
        assert torch.equal(processor([item, item])["pixel_values"][1:], expected)
    assert decoder.asked[:4] == [0, 2, 5, 8]  # the others are not decoded
    batch = VideoDecoder(clip[:3]).get_frames_at([0, 1, 2])  # its first axis is time: no second reading
    assert torch.equal(processor(batch)["pixel_values"], processor(clip[:3])["pixel_values"])
    assert torch.equal(processor(VideoReader(clip).get_batch([0, 2, 5, 8]))["pixel_values"], expected)


def test_values_of_datasets(files):
    processor = LanguageBindAudioProcessor(CONFIG)
    sound = (np.random.default_rng(0).standard_normal((1, 16000)) * 0.1).astype(np.float32)
    expected = processor((sound, 16000))["pixel_values"]
    samples = SimpleNamespace(data=torch.from_numpy(sound), sample_rate=16000, pts_seconds=0.0)
    decoder = SimpleNamespace(get_all_samples=lambda: samples)
    for item in ({"array": sound[0], "sampling_rate": 16000, "path": "a.wav"}, samples, decoder):
        assert torch.equal(processor(item)["pixel_values"], expected)
        assert torch.equal(processor([item, item])["pixel_values"][1:], expected)
    with pytest.raises(TypeError, match=r"images\[1\]: expected a dictionary with bytes, path, or array .* with x"):
        processor([decoder, {"x": 1}])


@pytest.mark.parametrize("modality", ["image", "audio", "video", "depth"])
def test_a_batch_names_its_bad_item(files, modality):
    good = files[modality].read_bytes()
    bad = {
        "image": np.zeros((5, 6, 7), np.uint8),
        "video": np.zeros((4, 5, 6, 7), np.uint8),
        "depth": np.full((4, 5), np.nan),
        "audio": (np.zeros(100, np.float32), 16000),
    }[modality]
    processor = transform_dict[modality](CONFIG)
    with pytest.raises(MediaError, match=r"^images\[2\]: .*: expected .*, got "):
        processor([good, good, bad])
    with pytest.raises(TypeError, match=r"images\[1\]: (audio: )?expected "):
        processor([good, object()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(processor([good, str(files[modality])])["pixel_values"]) == 2


def write_clip(path: Path) -> bool:
    """Whether FFmpeg has a muxer for the suffix, and an encoder that it takes."""
    import av

    for codec, pixels in (
        ("mpeg4", "yuv420p"),
        ("mpeg2video", "yuv420p"),
        ("mjpeg", "yuvj420p"),
        ("gif", "rgb8"),
        ("apng", "rgb24"),
    ):
        try:
            with av.open(str(path), "w") as out:
                stream = out.add_stream(codec, rate=25)
                stream.width, stream.height, stream.pix_fmt = 176, 144, pixels
                for i in range(4):
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(grid(144, 176, 3) + i, format="rgb24")))
                out.mux(stream.encode())
            return True
        except (av.FFmpegError, ValueError):
            continue
    return False


def write_picture(path: Path) -> bool:
    """Whether Pillow writes the suffix."""
    try:
        Image.fromarray(grid(48, 64, 3)).convert("L" if path.suffix == ".pgm" else "RGB").save(path)
    except (OSError, ValueError, KeyError):
        return False
    return True


@pytest.mark.parametrize("modality,write,least", [("image", write_picture, 12), ("video", write_clip, 15)])
def test_suffixes_stand_for_what_can_be_read(tmp_path, modality, write, least):
    if modality == "video":
        pytest.importorskip("av")
    written = [path for suffix in suffixes_of(modality) if write(path := tmp_path / f"a{suffix}")]
    processor = transform_dict[modality](CONFIG)
    for path in written:
        assert processor(path)["pixel_values"].isfinite().all(), path
    assert len(written) >= least


def test_a_source_closes_what_it_opened(files, monkeypatch):
    opened = []
    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    with Source(files["image"], "an image"):
        assert not opened[-1].closed
    assert opened[-1].closed
    with pytest.raises(MediaError), Source(files["image"], "an image") as source:
        raise source.error("for a reason")
    assert all(file.closed for file in opened)
