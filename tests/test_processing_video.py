"""Videos: the frames that a full decode gives, to the bit, from every kind of container; damage; frames in memory."""

import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lbfast.processing import transforms, video
from lbfast.processing.media import MediaError, MediaWarning, Reading
from lbfast.processing.processor import LanguageBindVideoProcessor

av = pytest.importorskip("av")

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
GOLDEN = Path(__file__).parent / "data" / "preprocessing.safetensors"
VISION = SimpleNamespace(image_size=224, num_frames=8, video_decode_backend="decord")
CONFIG = SimpleNamespace(vision_config=VISION)
SMALL = SimpleNamespace(vision_config=SimpleNamespace(image_size=28))
X264 = "keyint=10:min-keyint=10:scenecut=0:bframes=3:b-pyramid=normal:threads=1"

KINDS = {  # name: codec, its options, others
    "closed.mp4": ("libx264", {"x264-params": X264}, {}),
    "open.mkv": ("libx264", {"x264-params": X264 + ":open-gop=1"}, {}),
    "refresh.mp4": ("libx264", {"x264-params": "keyint=15:intra-refresh=1:bframes=0:threads=1"}, {}),
    "fragments.mp4": ("libx264", {"x264-params": X264}, {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "uneven.mkv": ("libx264", {"x264-params": X264}, {"pts": lambda i: 40 * i + 3 * (i % 7)}),
    "wide444.mp4": ("libx264", {"x264-params": X264}, {"size": (66, 50), "pix_fmt": "yuv444p"}),
    "stream.ts": ("libx264", {"x264-params": X264}, {}),
    "raw.h264": ("libx264", {"x264-params": X264}, {}),
    "reordered.avi": ("libx264", {"x264-params": X264}, {}),
    "divx.avi": ("mpeg4", {"bf": "2", "g": "10"}, {}),
    "plain.mp4": ("mpeg4", {"bf": "2", "g": "10"}, {}),
    "program.mpg": ("mpeg2video", {"bf": "2", "g": "10"}, {}),
    "motion.avi": ("mjpeg", {}, {"pix_fmt": "yuvj420p"}),
    "hidden.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "12", "b": "100k", "g": "20"}, {}),
    "superframes.webm": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "12", "b": "100k", "cpu-used": "8"}, {}),
}


def make_video(path, codec="mpeg4", options=None, count=40, size=(64, 48), pix_fmt="yuv420p", pts=None, container=None):
    """A video of blocks that scroll, and a corner that brightens with each frame, at 24 frames a second."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (-(-size[1] // 8), -(-size[0] // 8), 3), dtype=np.uint8)
    try:
        av.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"PyAV has no encoder {codec}")
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=24, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if pts:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            pixels = np.kron(np.roll(blocks, i, 1), np.ones((8, 8, 1), np.uint8))[: size[1], : size[0]].copy()
            pixels[:12, :12] = 6 * i
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts(i), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def every_frame(path):
    """What a plain decode from first to last gives."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1  # threads that share a frame do not conceal what is broken
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    codec, options, others = KINDS["closed.mp4"]
    return make_video(tmp_path_factory.mktemp("clip") / "closed.mp4", codec, options, **others)


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the sample assets are not here")
def test_matches_upstream():
    pixels = LanguageBindVideoProcessor(CONFIG)(ASSETS / "video.mp4")["pixel_values"]
    assert pixels.shape == (1, 3, 8, 224, 224) and pixels.dtype == torch.float32
    golden = load_file(GOLDEN)
    for actual, name in (
        (torch.nn.functional.avg_pool2d(pixels[0], 8), "mean8"),
        (pixels[0, ..., 96:128, 96:128], "crop"),
    ):
        error = (actual - golden[f"video.decord.{name}"]).abs().max()
        assert error < 1e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_a_full_decode(tmp_path, name):
    codec, options, others = KINDS[name]
    path = make_video(tmp_path / name, codec, options, **others)
    frames = every_frame(path)
    assert len(frames) == 40
    for wanted in (1, 2, 8, 17, 60):
        actual = video.read_frames(path, wanted).numpy()
        index = np.linspace(0, 39, wanted, dtype=int)
        wrong = [i for i, got in zip(index, actual) if not np.array_equal(got, frames[i])]
        assert actual.shape[0] == wanted and not wrong, f"{wanted} frames: {wrong} differ"


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_short_videos_repeat_frames(tmp_path, count):
    path = make_video(tmp_path / "short.mp4", count=count)
    frames, actual = every_frame(path), video.read_frames(path, 8).numpy()
    assert all(np.array_equal(a, frames[i]) for a, i in zip(actual, np.linspace(0, count - 1, 8, dtype=int)))


def test_every_frame_where_no_number_is_asked(clip):
    frames = np.stack(every_frame(clip))
    assert np.array_equal(video.read_frames(clip, None), frames)
    transform = video.video_transform(SMALL.vision_config)
    for item in (clip, frames, list(frames)):
        assert video.load_and_transform_video(item, transform, num_frames=None).shape == (3, 40, 28, 28)


def test_a_large_file_is_read_twice_with_the_same_result(clip, monkeypatch):
    expected = video.read_frames(clip, 8)
    monkeypatch.setattr(video, "_KEEP_BYTES", 100)
    assert torch.equal(video.read_frames(clip, 8), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_frames(clip, threads):
    expected, before = video.read_frames(clip, 8), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(video.read_frames(clip, 8), expected)
    finally:
        torch.set_num_threads(before)


def test_only_what_is_needed_is_decoded(tmp_path):
    path = make_video(tmp_path / "motion.avi", "mjpeg", pix_fmt="yuvj420p")
    frames, data = every_frame(path), bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][20]
    data[packet.pos + 30 : packet.pos + packet.size] = bytes(packet.size - 30)
    path.write_bytes(data)
    first, last = video.read_frames(path, 2).numpy()
    assert np.array_equal(first, frames[0]) and np.array_equal(last, frames[39])
    with pytest.warns(MediaWarning, match=r"motion\.avi: 1 of 40 packets cannot be decoded$"):
        shown = video.read_frames(path, 39).numpy()
    assert all(np.array_equal(a, b) for a, b in zip(shown, frames[:20] + frames[21:]))
    with pytest.raises(MediaError, match=r"motion\.avi: expected a video, got an AVI file of which 1 of 40 packets"):
        video.read_frames(path, 40, reading=Reading(strict=True))


def test_the_count_in_the_container_is_not_believed(tmp_path):
    path = make_video(tmp_path / "divx.avi", *KINDS["divx.avi"][:2])
    expected, data = video.read_frames(path, 8), bytearray(path.read_bytes())
    for tag, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):  # total frames; length of the stream
        at = data.index(tag) + offset
        assert int.from_bytes(data[at : at + 4], "little") == 40
        data[at : at + 4] = (7).to_bytes(4, "little")
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 7
    assert torch.equal(video.read_frames(path, 8), expected)


@pytest.mark.parametrize("name", ["closed.mp4", "raw.h264"])
def test_seconds_of_a_clip(tmp_path, name):
    path = make_video(tmp_path / name, *KINDS[name][:2])
    frames = every_frame(path)
    for start, end, inside in ((0.0, None, range(40)), (0.5, 1.0, range(12, 24)), (1.0, None, range(24, 40))):
        actual = video.read_frames(path, 5, start, end).numpy()
        index = [inside[i] for i in np.linspace(0, len(inside) - 1, 5, dtype=int)]
        assert all(np.array_equal(a, frames[i]) for a, i in zip(actual, index)), (start, end)
    with pytest.raises(MediaError, match=r"frames from 9 s to the end, got 40 frames, the last at 1\.6"):
        video.read_frames(path, 5, 9.0)
    processor = LanguageBindVideoProcessor(CONFIG)
    by_processor = processor(path, clip_start_sec=0.5, clip_end_sec=1.0)["pixel_values"][0]
    by_hand = video.read_frames(path, 8, 0.5, 1.0).permute(3, 0, 1, 2)
    assert torch.equal(by_processor, processor.transform(by_hand))


ONE = 1 << 16


@pytest.mark.parametrize(
    "matrix,turned",
    [  # a, b, c, d of the file: a pixel at (x, y) is shown at (ax + cy, bx + dy), as phones write them
        ((0, ONE, -ONE, 0), lambda x: np.rot90(x, -1)),  # a quarter clockwise
        ((-ONE, 0, 0, -ONE), lambda x: np.rot90(x, 2)),
        ((0, -ONE, ONE, 0), lambda x: np.rot90(x, 1)),
        ((-ONE, 0, 0, ONE), lambda x: x[:, ::-1]),  # mirrored, as front cameras write
        ((ONE, 0, 0, -ONE), lambda x: x[::-1]),
        ((0, ONE, ONE, 0), lambda x: x.swapaxes(0, 1)),
        ((0, -ONE, -ONE, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
    ],
)
def test_the_display_matrix_turns_and_mirrors(tmp_path, matrix, turned):
    path = make_video(tmp_path / "plain.mp4")
    frames, data = every_frame(path), bytearray(path.read_bytes())
    a, b, c, d = matrix
    unit, asked = (
        b"".join(v.to_bytes(4, "big", signed=True) for v in m)
        for m in ((ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    )
    at = data.index(unit, data.index(b"tkhd"))
    data[at : at + len(unit)] = asked
    path.write_bytes(data)
    for actual, i in zip(video.read_frames(path, 3).numpy(), (0, 19, 39)):
        assert np.array_equal(actual, turned(frames[i]))


def test_broken_files(tmp_path, clip):
    whole = clip.read_bytes()
    moov = make_video(tmp_path / "first.mp4", container={"movflags": "faststart"}).read_bytes()
    Image.new("RGB", (32, 32)).save(tmp_path / "still.mp4", "JPEG")
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    cases = {
        "empty.mp4": (b"", "an empty file"),
        "text.mp4": (b"hello\n" * 99, "got text"),
        "text.txt": (b"hello\n" * 99, "got text"),
        "list.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "got text"),
        "noise.mp4": (np.random.default_rng(0).bytes(4000), "unrecognised data"),
        "half.mp4": (whole[: len(whole) // 2], "an MP4"),
        "headonly.mp4": (moov[: len(moov) // 20], "an MP4"),
        "cut.mp4": (moov[: int(0.97 * len(moov))], "truncated or has broken packets"),
    }
    for name, codec in (("cut.mkv", "open.mkv"), ("cut.avi", "divx.avi")):
        data = make_video(tmp_path / f"whole-{codec}", *KINDS[codec][:2]).read_bytes()
        cases[name] = (data[: int(0.97 * len(data))], "truncated: ")
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    cases |= {"still.mp4": (b"", "a JPEG image"), "still.png": (b"", "a PNG image")}
    processor = LanguageBindVideoProcessor(CONFIG)
    for name, (_, said) in cases.items():
        with pytest.raises(MediaError, match=said) as caught:
            processor(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: expected a video, got "), name
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        processor(tmp_path / "missing.mp4")
    with pytest.raises(MediaError, match="a folder"):
        processor(tmp_path)


def overwritten(path, packet, where):
    """A copy with bytes of a packet overwritten: `where` is a slice of it."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        found = [p for p in container.demux(video=0) if p.size][packet]
    for i in range(found.pos, found.pos + found.size)[where]:
        data[i] ^= 0x5A
    damaged = path.with_name(f"damaged-{path.name}")
    damaged.write_bytes(data)
    return damaged


def test_a_corrupt_frame_is_replaced_by_its_neighbour_and_reported_once(tmp_path):
    path = make_video(tmp_path / "a.mp4", "mpeg4", {"bf": "0", "g": "1"})  # every frame a key frame
    frames, damaged = every_frame(path), overwritten(path, 20, slice(60, 90))
    with av.open(str(damaged)) as container:
        assert [i for i, frame in enumerate(container.decode(video=0)) if frame.is_corrupt] == [20]
    with pytest.warns(MediaWarning) as reported:
        shown = video.read_frames(damaged, 40).numpy()
    assert [str(w.message) for w in reported] == [
        f"{damaged}: 1 of 40 frames are broken; in the place of 20 their neighbours are used"
    ]
    assert all(np.array_equal(a, b) for a, b in zip(shown, [*frames[:20], frames[19], *frames[21:]]))
    with pytest.raises(MediaError, match=r"damaged-a\.mp4: expected a video, got an MP4 .* of which 1 of 40 frames"):
        LanguageBindVideoProcessor(CONFIG, reading=Reading(strict=True))(overwritten(path, 0, slice(60, 90)))
    with pytest.warns(MediaWarning, match="in the place of 0 "):
        shown = video.read_frames(overwritten(path, 0, slice(60, 90)), 40).numpy()
    assert np.array_equal(shown[0], frames[1]) and np.array_equal(shown[1:], np.stack(frames[1:]))


def test_damage_that_other_frames_refer_to_is_reported(tmp_path, clip):
    """The frames are those that FFmpeg shows, but for the corrupt one."""
    damaged = overwritten(clip, 10, slice(60, 90))
    good, frames = every_frame(clip), every_frame(damaged)
    off = [i for i in range(40) if not np.array_equal(good[i], frames[i])]
    assert off == list(range(10, 20))  # those that refer to it are as wrong as FFmpeg shows them
    with pytest.warns(MediaWarning, match="1 of 40 frames are broken; in the place of 10 their neighbours are used"):
        shown = video.read_frames(damaged, 40).numpy()
    expected = [*frames[:10], frames[9], *frames[11:]]
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected))
    with pytest.warns(MediaWarning, match="1 of 40 frames are broken$"):  # decoded for others, not wanted itself
        assert np.array_equal(video.read_frames(damaged, 8)[3].numpy(), frames[16])
    with pytest.raises(MediaError, match=r"damaged-closed\.mp4"):
        video.read_frames(damaged, 8, reading=Reading(strict=True))


def test_a_file_that_is_broken_for_the_most_part_is_refused(tmp_path):
    path = make_video(tmp_path / "a.mp4", "mpeg4", {"bf": "0", "g": "1"}, count=5)
    for packet in range(3):
        path = overwritten(path, packet, slice(60, 90))
    with pytest.raises(MediaError, match="an MP4 or QuickTime file of which 3 of 5 frames are broken"):
        video.read_frames(path, 2)


def test_transport_streams_that_are_joined_or_lost_a_packet(tmp_path):
    """The counter of their small packets jumps; FFmpeg decodes every frame, and so does lbfast."""
    a, b = (make_video(tmp_path / f"{i}.ts", "libx264", {"x264-params": X264}, count=n) for i, n in ((0, 20), (1, 13)))
    joined, data = tmp_path / "joined.ts", a.read_bytes()
    joined.write_bytes(data + b.read_bytes())
    middle = len(data) // 188 // 2 * 188
    lost = tmp_path / "lost.ts"
    lost.write_bytes(data[:middle] + data[middle + 188 :])
    for path, count in ((joined, 33), (lost, 20)):
        frames = every_frame(path)
        assert len(frames) == count
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MediaWarning)
            shown = video.read_frames(path, 8).numpy()
        assert all(np.array_equal(x, frames[i]) for x, i in zip(shown, np.linspace(0, count - 1, 8, dtype=int)))


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    import os

    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="not a regular file"):
        video.read_frames(tmp_path / "pipe.mp4")


def test_frames_in_memory(clip):
    processor = LanguageBindVideoProcessor(SMALL)
    expected = processor(clip)["pixel_values"]
    frames = video.read_frames(clip, 8)  # [T, H, W, C]
    cthw = frames.permute(3, 0, 1, 2)
    pictures = [Image.fromarray(f) for f in frames.numpy()]
    items = [frames, frames.numpy(), cthw, cthw.contiguous(), cthw.float(), pictures, list(frames.numpy())]
    for item in items:
        torch.testing.assert_close(processor(item)["pixel_values"], expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(processor([item, item])["pixel_values"][1:], expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(processor(torch.stack([cthw, cthw]))["pixel_values"][:1], expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(processor.transform(cthw)[None], expected, rtol=0, atol=5e-6)
    longer = processor(np.stack(every_frame(clip)))["pixel_values"]
    torch.testing.assert_close(longer, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((8, 5, 6), np.uint8),
        np.zeros((8, 4, 5, 6)),
        np.zeros((0, 4, 5, 3)),
        [np.zeros((2, 2, 3)), np.zeros((2, 3, 3))],
    ],
    ids=["3-D", "no colours", "no frames", "two sizes"],
)
def test_wrong_frames_in_memory(bad):
    with pytest.raises(MediaError, match=r"frames(\[0\])?: expected .*, got "):
        LanguageBindVideoProcessor(CONFIG)([bad])


def test_wrong_arguments(clip):
    processor = LanguageBindVideoProcessor(CONFIG)
    with pytest.raises(ValueError, match="expected a file, got frames in memory"):
        processor(np.zeros((8, 4, 5, 3), np.uint8), clip_start_sec=1.0)
    with pytest.raises(ValueError, match="num_frames: expected at least 1, got 0"):
        video.read_frames(clip, 0)
    with pytest.raises(ValueError, match="video_decode_backend: expected one of decord, opencv, pytorchvideo, got 'x'"):
        processor.image_processor(clip, processor.transform, video_decode_backend="x")
    with pytest.raises(TypeError, match="expected a path, an array, tensor or list of frames, got int"):
        processor([3])


def test_the_list_of_steps_is_upstreams_and_gives_its_numbers():
    transform = video.video_transform(VISION)
    names = [type(step).__name__ for step in transform.transforms]
    assert names == ["ToFloat", "NormalizeVideo", "ShortSideScale", "CenterCropVideo", "RandomHorizontalFlipVideo"]
    for size in ((30, 40), (41, 29), (300, 231)):
        clip = torch.randint(0, 256, (3, 4, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        x = clip.double() / 255
        x = (x - torch.tensor(transforms.MEAN).view(3, 1, 1, 1)) / torch.tensor(transforms.STD).view(3, 1, 1, 1)
        h, w = size
        new = (int(np.floor(h / w * 224)), 224) if w < h else (224, int(np.floor(w / h * 224)))
        x = torch.nn.functional.interpolate(x, new, mode="bilinear", align_corners=False)
        top, left = round((new[0] - 224) / 2), round((new[1] - 224) / 2)
        x = x[..., top : top + 224, left : left + 224]
        torch.testing.assert_close(transform(clip).double(), x, rtol=0, atol=1e-5)
        one_by_one = clip
        for step in transform.transforms:
            one_by_one = step(one_by_one)
        torch.testing.assert_close(one_by_one.double(), x, rtol=0, atol=1e-5)


def test_raw_is_within_half_a_level(clip):
    processor = LanguageBindVideoProcessor(CONFIG)
    raw, expected = processor(clip, raw=True)["pixel_values"][0], processor(clip)["pixel_values"][0]
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (transforms.MEAN, transforms.STD))
    assert raw.dtype == torch.uint8
    assert (raw - (expected * std + mean) * 255).abs().max() <= 0.5 + 1e-3


def test_flips_only_in_training_and_by_the_generator():
    processor, clip = (
        LanguageBindVideoProcessor(SMALL),
        np.random.default_rng(0).integers(0, 255, (3, 9, 8, 3), np.uint8),
    )
    plain = processor(clip)["pixel_values"]
    assert all(torch.equal(processor(clip)["pixel_values"], plain) for _ in range(6))

    def draws(seed):
        processor.train(generator=torch.Generator().manual_seed(seed))
        return [torch.equal(processor(clip)["pixel_values"], plain) for _ in range(12)]

    first = draws(0)
    assert first == draws(0) and len(set(first)) == 2
    flipped = processor(clip)["pixel_values"]
    while torch.equal(flipped, plain):
        flipped = processor(clip)["pixel_values"]
    assert torch.equal(flipped.flip(-1), plain)
    assert processor.training and not processor.eval().training
    assert all(torch.equal(processor(clip)["pixel_values"], plain) for _ in range(6))
    assert LanguageBindVideoProcessor(SMALL, training=True).transform.transforms[-1].training
