"""Media are not trusted: what they announce is bounded, memory does not follow length, decoders' faults are ours."""

from __future__ import annotations

import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features

from lbfast.processing import audio, image, sound, video
from lbfast.processing.media import Limits, MediaError, MediaWarning, Reading, Source
from lbfast.processing.processor import (
    LanguageBindAudioProcessor,
    LanguageBindImageProcessor,
    LanguageBindVideoProcessor,
)

av = pytest.importorskip("av")

CONFIG = SimpleNamespace(vision_config=SimpleNamespace(image_size=28, num_frames=4, num_mel_bins=23, target_length=40))


def wav(samples: np.ndarray, rate: int = 16000, riff: int | None = None, data: int | None = None) -> bytes:
    """A WAV file of int16 or float32 samples, with sizes in its header that may be others than its own."""
    body, width = samples.tobytes(), samples.itemsize
    kind = 3 if samples.dtype.kind == "f" else 1
    form = struct.pack("<IHHIIHH", 16, kind, 1, rate, rate * width & 0xFFFFFFFF, width, 8 * width)
    sizes = [struct.pack("<I", len(body) + 36 if riff is None else riff), struct.pack("<I", data or len(body))]
    return b"RIFF" + sizes[0] + b"WAVEfmt " + form + b"data" + sizes[1] + body


@pytest.mark.parametrize(
    "riff,data",
    [
        (0x7FFFF024, 0x7FFFF000),  # SoX
        (0x80000024, 0x80000000),  # arecord
        (0x7FFFFFFF, 0x7FFFFFDB),
        (0xFFFFFFF7, 0xFFFFFFD3),
        (0xFFFFFFFF, 0xFFFFFFFF),  # FFmpeg
    ],
)
def test_wav_headers_of_streams_hold_all_samples(riff, data):
    samples = np.random.default_rng(0).integers(-9999, 9999, 20000).astype("<i2")
    waveform, rate = audio.read_audio(wav(samples, riff=riff, data=data))
    assert rate == 16000 and np.array_equal(waveform[0].numpy() * 32768, samples)
    processor = LanguageBindAudioProcessor(CONFIG)
    expected = processor(wav(samples))["pixel_values"]
    assert torch.equal(processor(wav(samples, riff=riff, data=data))["pixel_values"], expected)
    with pytest.raises(MediaError, match="truncated: 40044 of 2097116 bytes"):
        audio.read_audio(wav(samples, riff=0x1FFFDC, data=0x1FFFB8))


@pytest.mark.parametrize("rate", [1, 3999, 768_001, 10_000_019, 2_147_483_629])
def test_rates_of_no_recording_are_refused_by_name(rate):
    samples = np.zeros(8000, "<i2")
    for item in (wav(samples, rate), (samples, rate)):
        with pytest.raises(MediaError, match=rf"expected a sample rate from 4000 to 768000 Hz, got {rate} Hz"):
            LanguageBindAudioProcessor(CONFIG)(item)


@pytest.mark.parametrize("rate", [4000, 44101, 767_999, 768_000])
def test_any_other_rate_is_resampled_in_little_time_and_memory(rate):
    samples = (3000 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)).astype("<i2")
    processor = LanguageBindAudioProcessor(CONFIG)
    expected = processor(((0.0915527 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)), 16000))["pixel_values"]
    actual = processor(wav(samples, rate))["pixel_values"]
    loud = expected > expected.max() - 0.5  # the tone itself; the rest is what rounding leaves
    assert loud.any() and (actual - expected)[loud].abs().max() < 2e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, 20000.0])
def test_samples_that_are_no_sound_are_refused(bad):
    samples = np.zeros(8000, "<f4")
    samples[4000] = bad
    with pytest.raises(
        MediaError, match=r"bytes .*: expected (finite samples, got NaN|samples in \[-1, 1\], got values)"
    ):
        LanguageBindAudioProcessor(CONFIG)(wav(samples))


def test_a_sound_that_changes_on_the_way_is_refused(monkeypatch):
    frame = SimpleNamespace(is_corrupt=False, size=8, samples=4, sample_rate=16000, format=SimpleNamespace(name="s16"))
    frames = [frame, SimpleNamespace(**{**vars(frame), "sample_rate": 8000})]
    for one in frames:
        one.layout = SimpleNamespace(nb_channels=1)
    codec = SimpleNamespace(name="pcm_s16le", sample_rate=16000, decode=lambda packet: [packet])
    stream = SimpleNamespace(codec_context=codec, duration=None, index=0)
    streams = type("Streams", (list,), {"audio": [stream]})([stream])
    container = SimpleNamespace(streams=streams, duration=None, demux=lambda stream: frames)

    class Opened:
        def __enter__(self):
            return container

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(sound, "opened", lambda *a, **k: Opened())
    with pytest.raises(MediaError, match="whose channels or rate change on the way"):
        list(sound.SoundFile(Source(wav(np.zeros(100, "<i2")), "an audio file")).frames())


def encoded(path: Path, codec: str, seconds: float, rate: int = 16000) -> Path:
    """Noise that swells, so that every second is another."""
    try:
        av.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"PyAV has no encoder {codec}")
    rng = np.random.default_rng(0)
    samples = (rng.standard_normal(int(seconds * rate)) * np.linspace(100, 9000, int(seconds * rate))).astype(np.int16)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        context = stream.codec_context
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(
            format=context.format, layout="mono", rate=rate, frame_size=context.frame_size or 1024
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return path


CODECS = [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("m4a", "aac"), ("opus", "libopus")]


@pytest.mark.parametrize("suffix,codec", CODECS)
def test_parts_are_those_of_the_whole(tmp_path, monkeypatch, suffix, codec):
    """Whatever the file announces, and however little is kept, the segments are those of the sound as a whole."""
    rate = 48000 if codec == "libopus" else 22050
    path = encoded(tmp_path / f"a.{suffix}", codec, 9, rate)
    processor = LanguageBindAudioProcessor(CONFIG)
    waveform, found = audio.read_audio(path)
    assert found == rate
    expected = processor((waveform, rate))["pixel_values"]
    assert torch.equal(processor(path)["pixel_values"], expected)
    monkeypatch.setattr(sound, "_HEAD_SECONDS", 0)
    assert torch.equal(processor(path)["pixel_values"], expected)
    for wrong in (0.3, 3.0, 0.0):
        monkeypatch.setattr(
            sound.SoundFile, "announced_by", lambda self, seconds, wrong=wrong: int(wrong * seconds * rate)
        )
        assert torch.equal(processor(path)["pixel_values"], expected)
    processor.train(generator=torch.Generator().manual_seed(5))
    drawn = processor(path)["pixel_values"]
    assert not torch.equal(drawn, expected)
    processor.train(generator=torch.Generator().manual_seed(5))
    assert torch.equal(processor((waveform, rate))["pixel_values"], drawn)


@pytest.mark.parametrize(
    "name, codec", [("a.mp3", "libmp3lame"), ("a.flac", "flac"), ("a.m4a", "aac"), ("a.mka", "libmp3lame")]
)
def test_what_lies_between_the_parts_is_not_decoded(tmp_path, name, codec, monkeypatch):
    path = encoded(tmp_path / name, codec, 100)
    samples, processor = [], LanguageBindAudioProcessor(CONFIG)
    decode = sound.SoundFile._near

    def spied(*given):
        samples.append(decode(*given))
        return samples[-1]

    monkeypatch.setattr(sound.SoundFile, "_near", spied)
    near = processor(path)["pixel_values"]
    strict = processor(path, strict=True)["pixel_values"]  # decodes it all, as all of it is to be sound
    assert len(samples) == 1 and bool(samples[0]) == (name != "a.mka")  # whose times are whole milliseconds
    assert torch.equal(near, strict)
    processor.train(generator=torch.Generator().manual_seed(3))
    drawn = processor(path)["pixel_values"]
    processor.train(generator=torch.Generator().manual_seed(3))
    assert torch.equal(processor(path, strict=True)["pixel_values"], drawn) and not torch.equal(drawn, near)


def test_broken_packets_between_and_in_the_parts(tmp_path):
    """What is in a part is decoded from first to last, and reported; what is between is not seen."""
    path = encoded(tmp_path / "a.mp3", "libmp3lame", 100)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(audio=0) if p.size]
    whole, processor = path.read_bytes(), LanguageBindAudioProcessor(CONFIG)
    expected = processor(path)["pixel_values"]
    for at, seen in ((0.33, False), (0.5, True)):
        data = bytearray(whole)
        position, size = packets[int(at * len(packets))]
        data[position + 4 : position + size] = b"\xff" * (size - 4)
        path.write_bytes(data)
        if seen:
            with pytest.warns(MediaWarning, match=r"a\.mp3: \d+ of \d+ packets are broken"):
                processor(path)
        else:
            assert torch.equal(processor(path)["pixel_values"], expected)


PEAKS = """
import sys
from types import SimpleNamespace
import torch
from lbfast.processing.processor import LanguageBindAudioProcessor
torch.set_num_threads(1)
vision = SimpleNamespace(num_mel_bins=112, target_length=1036)
processor = LanguageBindAudioProcessor(SimpleNamespace(vision_config=vision))
for path in sys.argv[1:]:
    processor(path)
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_memory_does_not_follow_the_length(tmp_path):
    """1 and 40 minutes: 3.8 and 154 MB as float32. docs/files.md has hours."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    second = np.random.default_rng(0).integers(-3000, 3000, 16000).astype("<i2")
    paths = [tmp_path / "short.wav", tmp_path / "long.wav"]
    for path, minutes in zip(paths, (1, 40)):
        path.write_bytes(wav(np.tile(second, 60 * minutes)))
    run = subprocess.run([sys.executable, "-c", PEAKS, *map(str, paths)], check=True, capture_output=True, text=True)
    short, long = (int(peak) / 1024 for peak in run.stdout.split())
    assert long - short < 30, f"{short} and {long} MiB"


def test_broken_packets_of_a_sound_are_passed_over_and_reported(tmp_path):
    path = encoded(tmp_path / "a.mp3", "libmp3lame", 6)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(audio=0) if p.size]
    data = bytearray(path.read_bytes())
    position, size = packets[len(packets) // 2]
    data[position + 4 : position + size] = b"\xff" * (size - 4)
    path.write_bytes(data)
    processor = LanguageBindAudioProcessor(CONFIG)
    with pytest.warns(
        MediaWarning, match=r"a\.mp3: \d+ of \d+ packets are broken \(.+\); they are passed over"
    ) as seen:
        processor(path)
    assert len(seen) == 1
    with pytest.raises(MediaError, match=r"a\.mp3: expected an audio file, got an? .*of which \d+ of \d+ packets"):
        processor(path, strict=True)


@pytest.mark.parametrize(
    ("name", "codec", "says"),
    [
        ("a.flac", "flac", "its samples are not those of the checksum"),
        ("a.ac3", "ac3", r"1 of \d+ packets are broken"),
    ],
)
def test_checksums_of_sounds_are_looked_at(name, codec, says, tmp_path):
    """One byte of one packet, which the decoder plays as other samples."""
    path = encoded(tmp_path / name, codec, 3, 48000 if codec == "ac3" else 16000)
    processor, data = LanguageBindAudioProcessor(CONFIG), bytearray(path.read_bytes())
    processor(path, strict=True)
    data[len(data) // 2 + 100] ^= 0x10
    path.write_bytes(data)
    with pytest.warns(MediaWarning, match=says) as seen:
        processor(path)
    assert len(seen) == 1
    with pytest.raises(MediaError, match=says):
        processor(path, strict=True)


@pytest.mark.parametrize("kind", ["s16", "s32"])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
def test_sums_of_flac_are_of_all_channels_and_widths(kind, layout, tmp_path):
    """s32: 24 bits, and noise, so that each bit counts."""
    path, dtype = tmp_path / "a.flac", np.dtype(f"i{int(kind[1:]) // 8}")
    limits = np.iinfo(dtype)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("flac", rate=16000, layout=layout)
        stream.codec_context.format = kind
        channels = stream.codec_context.layout.nb_channels
        samples = np.random.default_rng(0).integers(limits.min, limits.max, (1, 4608 * channels), dtype)
        frame = av.AudioFrame.from_ndarray(samples, format=kind, layout=layout)
        frame.sample_rate, frame.pts = 16000, 0
        out.mux([*stream.encode(frame), *stream.encode(None)])
    whole = sound.SoundFile(Source(str(path), "a sound", Reading(strict=True))).whole()
    assert whole.shape == (channels, 4608)


# Pixels.


def qtrle(path: Path, width: int, height: int) -> Path:
    """A few kB that announce, and decode to, frames of this size."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("qtrle", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for i in range(2):
            frame = av.VideoFrame(width, height, "rgb24")
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def test_frames_are_bounded_by_pixels_and_bytes(tmp_path):
    path = qtrle(tmp_path / "a.mov", 640, 480)
    for limits, said in (
        (Limits(frame_pixels=640 * 480 - 1), r"307,199 pixels \(limits\.frame_pixels\)|more than 307,199"),
        (
            Limits(clip_bytes=8 * 640 * 480 * 3 - 1),
            r"8 frames of 640 x 480 are 7,372,800 bytes, expected at most 7,372,799",
        ),
    ):
        with pytest.raises(MediaError, match=said):
            video.read_frames(path, 8, reading=Reading(limits=limits))
    enough = Reading(limits=Limits(frame_pixels=640 * 480, clip_bytes=8 * 640 * 480 * 3))
    assert video.read_frames(path, 8, reading=enough).shape == (8, 480, 640, 3)
    assert LanguageBindVideoProcessor(CONFIG, reading=enough)(path)["pixel_values"].shape == (1, 3, 4, 28, 28)
    data = bytearray(path.read_bytes())  # a header that announces 30000 x 30000
    for tag, offset in ((b"tkhd", 4 + 76),):
        at = data.index(tag) + offset
        data[at : at + 8] = struct.pack(">II", 30000 << 16, 30000 << 16)
    at = data.index(b"rle ", data.index(b"stsd") + 8) + 28
    data[at : at + 4] = struct.pack(">HH", 30000, 30000)
    with pytest.raises(MediaError, match=r"limits\.frame_pixels"):
        video.read_frames(bytes(data), 8)


def test_pictures_are_bounded_by_pixels(tmp_path):
    Image.new("L", (3000, 2000)).save(tmp_path / "a.png")
    small = Reading(limits=Limits(image_pixels=5_999_999))
    with pytest.raises(MediaError, match=r"3000 x 2000 pixels, more than 5,999,999 \(limits\.image_pixels\)"):
        LanguageBindImageProcessor(CONFIG, reading=small)(tmp_path / "a.png")
    assert image.open_image(tmp_path / "a.png").size == (3000, 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("1", (13_000, 12_000)).save(tmp_path / "b.png")  # 20 kB, 156 million pixels
        with pytest.raises(MediaError, match="13000 x 12000 pixels, more than 120,000,000"):
            image.open_image(tmp_path / "b.png")


def test_damaged_avif_is_a_media_error(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    path, rng = tmp_path / "a.avif", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    failed = 0
    for _ in range(40):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data) // 2, len(data)))] ^= 255
        path.write_bytes(damaged)
        try:
            image.open_image(path)
        except MediaError as error:
            assert "an AVIF image that cannot be decoded (" in str(error)
            failed += 1
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="an AVIF image"):
        image.open_image(path)
    assert failed


def test_whatever_a_decoder_raises_is_a_media_error(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for error in (
        RuntimeError("odd\x1b[2J"),
        MemoryError(),
        ZeroDivisionError("x" * 9999),
        OSError("short"),
        KeyError(3),
    ):

        def load(self, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "load", load)
        with pytest.raises(
            MediaError, match=r"a\.png: expected an image, got a PNG image that cannot be decoded \("
        ) as caught:
            image.open_image(tmp_path / "a.png")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600
