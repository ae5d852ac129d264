"""Parts of recordings: what a file cut there gives, decoded once, in memory that does not follow the length."""

import math
import tracemalloc
import warnings
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lbfast.processing import video
from lbfast.processing.audio import read_audio
from lbfast.processing.media import MediaError, MediaWarning
from lbfast.processing.processor import (
    LanguageBindAudioProcessor,
    LanguageBindImageProcessor,
    LanguageBindVideoProcessor,
)
from lbfast.processing.segments import Cuts
from tests.test_media_bounds import encoded, wav
from tests.test_processing_video import KINDS, make_video, overwritten

pytest.importorskip("av")

AUDIO = LanguageBindAudioProcessor(SimpleNamespace(vision_config=SimpleNamespace(num_mel_bins=28, target_length=70)))
VIDEO = LanguageBindVideoProcessor(SimpleNamespace(vision_config=SimpleNamespace(image_size=28, num_frames=4)))


@pytest.mark.parametrize(
    "segment,hop,seconds,ends",
    [
        ("10s", None, "5", [5]),
        ("10s", None, "10.99", [10]),  # less than a tenth more
        ("10s", None, "11", [10, 11]),
        ("10s", None, "30", [10, 20, 30]),
        ("10s", "5s", "20.4", [10, 15, 20]),
        ("10s", "5s", "20.5", [10, 15, 20, "20.5"]),
        (2, 5, "10.1", [2, 7]),  # with gaps
        (2, 5, "10.2", [2, 7, "10.2"]),
        ("1500ms", None, "0.01", ["0.01"]),  # too short, but the only one
    ],
)
def test_where_parts_end(segment, hop, seconds, ends):
    cuts, length = Cuts.of(segment, hop), Fraction(seconds)
    found = [min(length, cuts.span(number)[1]) for number in range(cuts.count(length))]
    assert found == [Fraction(end) for end in ends]


@pytest.mark.parametrize("wrong", ["0.4", "2 hours", "1d", "-3s", "nan", "inf", "", "1/2", True, "1e999999", "10ss"])
def test_lengths_that_are_none(wrong):
    with pytest.raises(ValueError, match=r"^segment: expected 0\.5 to 3600 seconds, as 10s, 2min or 500ms, got "):
        Cuts.of(wrong)
    with pytest.raises(ValueError, match=r"^hop: expected 0\.1 to 3600 seconds"):
        Cuts.of(10, "0.05")


@pytest.mark.parametrize("hop", [None, "0.7s", "3.1s"])
def test_a_part_of_a_sound_is_a_file_of_its_samples(hop):
    samples = (np.random.default_rng(0).standard_normal(11025 * 7 + 13) * 5000).astype("<i2")
    whole, cuts = wav(samples, 11025), Cuts.of("1.9s", hop)
    found = list(AUDIO.segments(whole, cuts))
    assert len(found) == cuts.count(Fraction(len(samples), 11025))
    for part in found:
        begin, end = (math.ceil(Fraction(str(at)) * 11025 - Fraction(1, 100)) for at in (part.start, part.end))
        alone = AUDIO(wav(samples[begin:end], 11025))["pixel_values"][0]
        assert torch.equal(part.pixels, alone)
    assert found[-1].end == float(Fraction(len(samples), 11025)) or hop == "3.1s"
    later = list(AUDIO.segments(whole, Cuts(cuts.length, cuts.hop, first=1)))
    assert [p.number for p in later] == [p.number for p in found[1:]]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(later, found[1:]))


@pytest.mark.parametrize("suffix,codec", [("flac", "flac"), ("mp3", "libmp3lame"), ("m4a", "aac"), ("opus", "libopus")])
def test_parts_of_every_codec_are_those_of_the_whole(tmp_path, suffix, codec):
    path = encoded(tmp_path / f"a.{suffix}", codec, 3.5, 48000)
    whole, rate = read_audio(path)
    for part in AUDIO.segments(path, Cuts.of(1)):
        begin, end = round(part.start * rate), round(part.end * rate)
        assert torch.equal(part.pixels, AUDIO.transform((whole[0, begin:end], rate)))
    assert end == whole.shape[1]


def test_seconds_of_a_sound(tmp_path):
    path = encoded(tmp_path / "a.mp3", "libmp3lame", 130, 16000)
    whole, rate = read_audio(path)
    for start, end in ((0.1, 1.7), (100.0, 103.0), (128.5, None), (0.0, 500.0)):
        clip = AUDIO(path, clip_start_sec=start, clip_end_sec=end)["pixel_values"][0]
        samples = whole[0, round(start * rate) : None if end is None else round(end * rate)]
        assert torch.equal(clip, AUDIO.transform((samples, rate))), (start, end)
    with pytest.raises(MediaError, match=r"a\.mp3: expected a sound from 500 s to the end, got one of 130\.\d+ s"):
        AUDIO(path, clip_start_sec=500)
    with pytest.raises(ValueError, match="expected a file, got a waveform in memory"):
        AUDIO((whole, rate), clip_start_sec=1)


def test_a_short_file_has_the_one_part_that_it_is(tmp_path):
    path = encoded(tmp_path / "a.flac", "flac", 3.5)
    (part,) = AUDIO.segments(path, Cuts.of(10))
    assert torch.equal(part.pixels, AUDIO(path)["pixel_values"][0]) and (part.start, part.end) == (0.0, 3.5)
    path = make_video(tmp_path / "a.mp4")
    (part,) = VIDEO.segments(path, Cuts.of(10))
    assert torch.equal(part.pixels, VIDEO(path)["pixel_values"][0]) and (part.start, part.end) == (0.0, 1.666667)


@pytest.mark.parametrize("hop", [None, "0.25s"])
@pytest.mark.parametrize("name", ["closed.mp4", "open.mkv", "uneven.mkv", "reordered.avi", "hidden.webm"])
def test_a_part_of_a_video_is_the_processors_clip(tmp_path, name, hop):
    path = make_video(tmp_path / name, *KINDS[name][:2], **KINDS[name][2])
    found = list(VIDEO.segments(path, Cuts.of("0.5s", hop)))
    assert [part.start for part in found] == [i * (0.25 if hop else 0.5) for i in range(6 if hop else 4)]
    for part in found:
        clip = VIDEO(path, clip_start_sec=part.start, clip_end_sec=part.start + 0.5)["pixel_values"][0]
        assert torch.equal(part.pixels, clip), part.start
    cuts = Cuts.of("0.5s", hop)
    later = list(VIDEO.segments(path, Cuts(cuts.length, cuts.hop, first=2)))
    assert [part.number for part in later] == [part.number for part in found[2:]]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(later, found[2:]))


def test_frames_are_decoded_and_transformed_once(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", *KINDS["closed.mp4"][:2])
    seen, decoded = [], []
    monkeypatch.setattr(
        video.VideoFile,
        "picture",
        lambda self, frame, old=video.VideoFile.picture: seen.append(frame.pts) or old(self, frame),
    )
    monkeypatch.setattr(
        video.VideoFile,
        "_tried",
        lambda self, codec, packet, old=video.VideoFile._tried: decoded.append(packet) or old(self, codec, packet),
    )
    assert len(list(VIDEO.segments(path, Cuts.of("0.5s", "0.1s")))) == 13
    assert seen == sorted(set(seen))
    packets = [packet.pts for packet in decoded if packet is not None]
    assert len(packets) == len(set(packets)) >= 39  # nothing refers to the last


def test_a_part_in_which_no_frame_begins_has_the_one_that_is_shown(tmp_path):
    path = make_video(tmp_path / "slides.mkv", *KINDS["closed.mp4"][:2], count=3, pts=lambda i: 2000 * i)
    found = list(VIDEO.segments(path, Cuts.of("0.5s")))
    assert [part.start for part in found][-1] == 5.5  # the last frame is shown as long as the others
    for a, b in ((0, 3), (4, 7), (8, 11)):
        assert torch.equal(found[a].pixels, found[b].pixels)
    assert not torch.equal(found[3].pixels, found[4].pixels)


def test_damaged_frames_are_replaced_as_the_processor_does(tmp_path):
    damaged = overwritten(make_video(tmp_path / "a.mp4", "mpeg4", {"bf": "0", "g": "1"}), 30, slice(60, 90))
    with pytest.warns(MediaWarning, match=r"1 of 40 frames are broken; in the place of 30 their neighbours"):
        found = list(VIDEO.segments(damaged, Cuts.of("0.5s", "0.1s")))
    assert [part.number for part in found] == list(range(13))
    for part in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MediaWarning)
            clip = VIDEO(
                damaged, clip_start_sec=part.start, clip_end_sec=float(Cuts.of("0.5s", "0.1s").span(part.number)[1])
            )
        assert torch.equal(part.pixels, clip["pixel_values"][0]), part.number
    with pytest.raises(MediaError, match="of which 1 of 40 frames are broken"):
        list(VIDEO.segments(damaged, Cuts.of("0.5s", "0.1s"), strict=True))


def test_what_comes_before_the_end_of_a_broken_file_is_given(tmp_path):
    path = encoded(tmp_path / "a.flac", "flac", 3)
    path.write_bytes(path.read_bytes()[:-9000])
    parts = AUDIO.segments(path, Cuts.of("0.5s"))
    assert next(parts).end == 0.5
    with pytest.raises(MediaError, match=r"a\.flac: expected an audio file, got a FLAC file that is truncated"):
        list(parts)
    with pytest.raises(MediaError, match="expected an audio file, got text"):
        list(AUDIO.segments(b"no sound at all", Cuts.of(1)))
    with pytest.raises(FileNotFoundError):
        list(VIDEO.segments(tmp_path / "nothing.mp4", Cuts.of(1)))


def test_only_recordings_have_parts():
    image = LanguageBindImageProcessor(SimpleNamespace(vision_config=SimpleNamespace(image_size=28)))
    with pytest.raises(ValueError, match=r"^segments: expected a processor of video or audio .*, got image"):
        image.segments("a.png", Cuts.of(1))
    drawing = LanguageBindVideoProcessor(VIDEO.config, training=True)
    with pytest.raises(ValueError, match="got video while training"):
        drawing.segments("a.mp4", Cuts.of(1))


def test_memory_does_not_follow_the_length():
    """What a window needs is kept and no more, whether windows touch, overlap or leave gaps."""

    def peak(seconds, hop):
        file = wav(np.zeros(16000 * seconds, "<i2"))
        tracemalloc.start()
        for _ in AUDIO.segments(file, Cuts.of(2, hop)):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    for hop in (2, 1, 4):
        assert peak(60, hop) < peak(10, hop) + 200_000, hop  # 50 s are 1,600,000 bytes
