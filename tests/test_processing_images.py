"""Images, thermal pictures and depth maps: against upstream's numbers, torch's own resize, and odd inputs."""

import functools
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from lbfast import native, testing
from lbfast.processing import depth, image, memory, transforms
from lbfast.processing.media import MediaError
from lbfast.processing.processor import LanguageBindDepthProcessor, LanguageBindImageProcessor
from lbfast.processing.resize import resized_crop

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
GOLDEN = Path(__file__).parent / "data" / "preprocessing.safetensors"
CONFIG = SimpleNamespace(vision_config=SimpleNamespace(image_size=224, max_depth=10))
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the sample assets are not here")

FILES = {
    "image": ("image.jpg", image.image_transform, image.load_and_transform_image),
    "thermal": ("thermal.jpg", image.image_transform, image.load_and_transform_image),
    "depth": ("depth.png", depth.depth_transform, depth.load_and_transform_depth),
}


def picture(height=37, width=53, channels=3, seed=0):
    """Smooth colours with an edge: uint8 (height, width, channels)."""
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    wave = 127 + 90 * np.sin(0.2 * x + c + seed) * np.cos(0.13 * y - c) + 30 * (x > width / 2)
    return wave.clip(0, 255).astype(np.uint8)


def oracle(rgb, size=224, antialias=True, dtype=torch.float64):
    """Steps of upstream one by one with torch's own resize. rgb: uint8 (H, W, 3)."""
    x = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).to(dtype) / 255
    h, w = x.shape[1:]
    new = (int(size * h / w), size) if w <= h else (size, int(size * w / h))
    if new != (h, w):
        x = torch.nn.functional.interpolate(x[None], new, mode="bicubic", antialias=antialias)[0]
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)
    x = x[:, top : top + size, left : left + size]
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (transforms.MEAN, transforms.STD))
    return (x - mean) / std


@needs_assets
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("modality", FILES)
def test_matches_upstream(modality, antialias):
    file, make, load = FILES[modality]
    pixels = load(ASSETS / file, make(CONFIG.vision_config, antialias))
    golden, key = load_file(GOLDEN), modality if antialias else f"{modality}.no_antialias"
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
    means = torch.nn.functional.avg_pool2d(pixels, 8)
    for actual, name in ((means, "mean8"), (pixels[:, 96:128, 96:128], "crop")):
        error = (actual - golden[f"{key}.{name}"]).abs()
        assert error.max() < 1e-4 and error.mean() < 1e-5, f"{key}.{name}: {error.max():.2e}, {error.mean():.2e}"


def laid_out(rgb, how):
    """uint8 (H, W, 3) as (3, H, W), in memory as decoders leave it, or not."""
    x = torch.from_numpy(rgb)
    padded = torch.cat([x, torch.full_like(x[..., :1], 77)], dim=-1)  # Pillow's own: 4 bytes a pixel
    return {
        "colours beside": lambda: x.permute(2, 0, 1),
        "planes": lambda: x.permute(2, 0, 1).contiguous(),
        "four bytes": lambda: padded[..., :3].permute(2, 0, 1),
        "columns first": lambda: x.permute(2, 1, 0).contiguous().mT,
        "grey": lambda: x[..., :1].permute(2, 0, 1).expand(3, -1, -1),
    }[how]()


@pytest.fixture(params=["native", "torch"])
def form(request, monkeypatch):
    """Each of the two forms of a resize."""
    if request.param == "native" and native.why_not():
        pytest.skip("no native kernels here")
    if request.param == "torch":
        monkeypatch.setattr(native, "why_not", lambda: ["not here"])


def cropped(height, width):
    """Size after the resize, and where its middle begins."""
    short = min(height, width)
    size = (224 * height // short, 224 * width // short)
    return size, (size[0] - 224) // 2, (size[1] - 224) // 2


@functools.lru_cache(maxsize=24)
def resized_and_cropped(height, width, kind, antialias, how, dtype):
    """By plain torch; the same for both forms, in float64 however the picture lies in memory."""
    size, top, left = cropped(height, width)
    x = laid_out(picture(height, width), how)
    resized = torch.nn.functional.interpolate(x[None].to(dtype), size, mode=kind, antialias=antialias)[0]
    return resized[:, top : top + 224, left : left + 224].clone()


@pytest.mark.parametrize("form", ["native", "torch"], indirect=True)  # one after the other: plain torch's is the same
@pytest.mark.parametrize("how", ["colours beside", "planes", "four bytes", "columns first", "grey"])
@pytest.mark.parametrize("kind,antialias", [("bicubic", True), ("bicubic", False), ("bilinear", False)])
@pytest.mark.parametrize("height,width", [(453, 256), (300, 224), (224, 224), (17, 33), (1, 9), (100, 701), (540, 960)])
def test_resized_crop_is_a_resize_then_a_crop(height, width, kind, antialias, how, form):
    size, top, left = cropped(height, width)
    x = laid_out(picture(height, width), how)
    actual = resized_crop(x, size, (top, left, 224, 224), kind, antialias)
    exact = resized_and_cropped(height, width, kind, antialias, "grey" if how == "grey" else "planes", torch.float64)
    plain = resized_and_cropped(height, width, kind, antialias, how, torch.float32)
    testing.assert_within_budget(actual, exact, plain, f"{height}x{width} {kind}")


@pytest.mark.parametrize("how", ["colours beside", "grey"])
def test_resized_crop_scales_and_rounds(how, form):
    x, scale, offset = laid_out(picture(90, 130), how), (0.5, 2.0, 3.0), (1.0, -140.0, 7.0)
    arguments = x, (60, 86), (5, 9, 41, 33), "bicubic", True
    plain = resized_crop(*arguments)
    a, b = (torch.tensor(values).view(3, 1, 1) for values in (scale, offset))
    torch.testing.assert_close(resized_crop(*arguments, scale, offset), plain * a + b, rtol=1e-6, atol=1e-4)
    levels = resized_crop(*arguments, scale, offset, torch.uint8)
    exact = (plain * a + b).clamp(0, 255)
    assert levels.dtype == torch.uint8 and (exact == 255).any() and (exact == 0).any()
    assert (levels - exact).abs().max() <= 0.5 + 1e-4


def test_a_picture_in_memory_is_not_copied():
    picture_of = {"RGB": picture(41, 53), "L": picture(41, 53)[..., 0]}
    for mode, array in picture_of.items():
        made = Image.fromarray(array)
        pixels = memory.pixels_of(made)
        assert made.mode == mode and np.array_equal(pixels.squeeze(-1), array)
        if hasattr(made, "__arrow_c_array__"):
            assert pixels.data_ptr() == memory.pixels_of(made).data_ptr()
            del made
            assert np.array_equal(pixels.squeeze(-1), array)  # it keeps the picture's memory alive


def test_large_pictures_lie_in_one_block(tmp_path):
    Image.new("RGB", (2600, 2000), (10, 200, 30)).save(tmp_path / "large.png")  # 20 MB: more than Pillow's block
    before = Image.core.get_use_block_allocator() if hasattr(Image.core, "get_use_block_allocator") else None
    made = image.open_image(tmp_path / "large.png")
    assert memory.pixels_of(made)[-1, -1].tolist() == [10, 200, 30]
    if before is not None:
        assert memory.pixels_of(made).data_ptr() == memory.pixels_of(made).data_ptr()
        assert Image.core.get_use_block_allocator() == before


def test_resized_crop_takes_any_leading_dimensions(form):
    clip = torch.from_numpy(np.stack([picture(seed=i) for i in range(4)])).permute(3, 0, 1, 2)  # [C, T, H, W]
    whole = resized_crop(clip, (32, 46), (3, 5, 20, 30), "bilinear", False)
    assert whole.shape == (3, 4, 20, 30) and whole.is_contiguous()
    for t in range(4):
        one = resized_crop(clip[:, t].contiguous(), (32, 46), (3, 5, 20, 30), "bilinear", False)
        torch.testing.assert_close(whole[:, t], one, rtol=0, atol=1e-4)
    assert resized_crop(clip[:, :0], (32, 46), (3, 5, 20, 30), "bilinear", False).shape == (3, 0, 20, 30)


def test_resize_keeps_float32_under_autocast():
    transform = image.image_transform(CONFIG.vision_config)
    expected = transform(picture())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(picture()), expected)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"]),
    short=st.integers(1, 40),
    long=st.integers(1, 400),
    tall=st.booleans(),
    antialias=st.booleans(),
)
def test_any_size_and_mode(mode, short, long, tall, antialias):
    height, width = (long, short) if tall else (short, long)
    made = Image.fromarray(picture(height, width, 3)).convert(mode)
    pixels = image.image_transform(SimpleNamespace(image_size=32), antialias)(made)
    rgb = np.array(made.convert("RGB"))
    exact, plain = oracle(rgb, 32, antialias), oracle(rgb, 32, antialias, torch.float32)
    testing.assert_within_budget(pixels, exact, plain, f"{mode} {height}x{width}")


def test_a_strip_does_not_cost_what_its_resize_would():
    strip = np.repeat(picture(1, 30000), 2, axis=0)  # resized whole: 3 x 224 x 3,360,000 floats, 9 GB
    pixels = image.image_transform(CONFIG.vision_config)(strip)
    middle = strip[:, 14999:15001].mean() / 255
    assert pixels.shape == (3, 224, 224)
    assert abs((pixels * torch.tensor(transforms.STD)[:, None, None] + 0.45).mean() - middle) < 0.1


def test_what_is_in_memory_gives_what_the_file_gives(tmp_path):
    array = picture()
    Image.fromarray(array).save(tmp_path / "a.png")
    processor = LanguageBindImageProcessor(CONFIG)
    expected = processor(tmp_path / "a.png")["pixel_values"]
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    floats = tensor.float() / 255
    for item in (Image.open(tmp_path / "a.png"), array, tensor, tensor.contiguous(), np.ascontiguousarray(tensor)):
        assert torch.equal(processor(item)["pixel_values"], expected) or torch.allclose(
            processor(item)["pixel_values"], expected, atol=2e-6, rtol=0
        )
    torch.testing.assert_close(processor(floats)["pixel_values"], expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(processor(floats.numpy())["pixel_values"], expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(processor(floats.double())["pixel_values"], expected, rtol=0, atol=5e-6)
    grey = processor(array[..., 0])["pixel_values"]
    assert torch.equal(grey, processor(array[..., :1])["pixel_values"])
    torch.testing.assert_close(grey, processor(np.repeat(array[..., :1], 3, -1))["pixel_values"], rtol=0, atol=5e-6)
    alpha = np.concatenate([array, array[..., :1]], axis=-1)
    torch.testing.assert_close(processor(alpha)["pixel_values"], expected, rtol=0, atol=5e-6)


def test_inputs_are_not_changed_and_calls_repeat():
    processor = LanguageBindImageProcessor(CONFIG)
    array, floats = picture(), torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    for item in (array, floats):
        before = np.asarray(item).copy()
        assert torch.equal(processor(item)["pixel_values"], processor(item)["pixel_values"])
        assert np.array_equal(before, np.asarray(item))


def test_steps_can_be_filtered_and_composed_again():
    transform = image.image_transform(CONFIG.vision_config)
    names = [type(step).__name__ for step in transform.transforms]
    assert names == ["ToTensor", "Resize", "CenterCrop", "Normalize"]
    assert "Resize(size=224, antialias=True)" in repr(transform)
    x = array = Image.fromarray(picture())
    for step in transform.transforms:
        x = step(x)
    torch.testing.assert_close(transform(array), x, rtol=0, atol=5e-6)
    bare = transforms.Compose([s for s in transform.transforms if not isinstance(s, transforms.Normalize)])
    mean, std = torch.tensor(transforms.MEAN).view(3, 1, 1), torch.tensor(transforms.STD).view(3, 1, 1)
    torch.testing.assert_close((bare(array) - mean) / std, x, rtol=0, atol=5e-6)
    early = transforms.Compose([transforms.ToTensor(), transforms.Normalize(), *transform.transforms[1:3]])
    torch.testing.assert_close(early(array), x, rtol=0, atol=5e-6)
    flipped = transforms.Compose([lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT), *transform.transforms])
    torch.testing.assert_close(flipped(array).flip(-1), x, rtol=0, atol=5e-6)
    transform.transforms.pop()
    torch.testing.assert_close(transform(array), bare(array))


def test_raw_is_within_half_a_level():
    processor = LanguageBindImageProcessor(CONFIG)
    raw, expected = processor(picture(), raw=True)["pixel_values"], processor(picture())["pixel_values"]
    assert raw.dtype == torch.uint8 and raw.shape == expected.shape
    mean, std = torch.tensor(transforms.MEAN).view(3, 1, 1), torch.tensor(transforms.STD).view(3, 1, 1)
    exact = ((expected * std + mean) * 255).clamp(0, 255)
    assert (raw - exact).abs().max() <= 0.5 + 1e-3


def test_thermal_is_image_and_size_follows_the_config():
    from lbfast.processing.processor import ROWS

    assert ROWS["thermal"] is ROWS["image"]
    small = LanguageBindImageProcessor(SimpleNamespace(vision_config=SimpleNamespace(image_size=28)))
    assert small(picture())["pixel_values"].shape == (1, 3, 28, 28)
    assert LanguageBindImageProcessor(SimpleNamespace(vision_config=SimpleNamespace()))(picture())[
        "pixel_values"
    ].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((6, 5, 7), np.uint8),
        np.zeros((6, 5, 2), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((2, 3, 4, 5, 3), np.uint8),
        np.zeros((4, 5, 3), np.int64),
        np.zeros((4, 5, 3), np.uint16),
        np.full((4, 5, 3), 200.0),
        np.full((4, 5, 3), np.nan),
        torch.full((3, 4, 5), -2.0),
        Image.new("I;16", (5, 4)),
        Image.new("F", (5, 4)),
        Image.new("RGB", (0, 4)),
    ],
    ids=lambda bad: f"{getattr(bad, 'shape', None) or bad.size}-{getattr(bad, 'dtype', None) or bad.mode}",
)
def test_wrong_pictures_in_memory(bad):
    with pytest.raises(MediaError, match=r"expected .*, got "):
        LanguageBindImageProcessor(CONFIG)(bad)


@pytest.mark.parametrize("bad", [3, None, {"a": 1}])
def test_wrong_types(bad):
    with pytest.raises(TypeError, match=r"images: expected a (path, PIL image, array or tensor|dictionary with bytes)"):
        LanguageBindImageProcessor(CONFIG)([bad])
    with pytest.raises(TypeError, match=r"images\[1\]: expected a "):
        LanguageBindImageProcessor(CONFIG)([picture(), bad])


def broken_files(folder):
    """name -> (path, what the message says of it)."""
    good = folder / "good.png"
    Image.fromarray(picture(200, 300)).save(good)
    Image.fromarray(picture(200, 300)).save(folder / "good.jpg")
    Image.fromarray(np.full((20, 30), 1500, np.uint16)).save(folder / "depth.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(good.read_bytes()[:300])
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:-500])
    (folder / "text.jpg").write_text("not a picture\n" * 9)
    (folder / "noise.jpg").write_bytes(np.random.default_rng(0).bytes(999))
    (folder / "clip.jpg").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(99))
    (folder / "folder.jpg").mkdir()
    return {
        "empty.png": "an empty file",
        "cut.png": "a PNG image that cannot be decoded",
        "cut.jpg": "a JPEG image that cannot be decoded",
        "text.jpg": "got text",
        "noise.jpg": "unrecognised data",
        "clip.jpg": "an MP4",
        "folder.jpg": "a folder",
    }


@pytest.mark.parametrize("processor", [LanguageBindImageProcessor, LanguageBindDepthProcessor])
def test_broken_files(tmp_path, processor):
    for name, said in broken_files(tmp_path).items():
        with pytest.raises(MediaError, match=said) as caught:
            processor(CONFIG)(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        processor(CONFIG)(str(tmp_path / "missing.png"))


def test_depth_and_image_files_are_not_taken_for_each_other(tmp_path):
    broken_files(tmp_path)
    with pytest.raises(MediaError, match=r"depth\.png: expected an 8-bit image, got a PNG image of mode I;16"):
        LanguageBindImageProcessor(CONFIG)(tmp_path / "depth.png")
    with pytest.raises(MediaError, match=r"good\.jpg: expected a 16-bit single-channel depth map"):
        LanguageBindDepthProcessor(CONFIG)(tmp_path / "good.jpg")
    Image.fromarray(picture()[..., 0]).save(tmp_path / "grey.png")
    with pytest.raises(MediaError, match=r"grey\.png: expected a 16-bit .* of mode L"):
        LanguageBindDepthProcessor(CONFIG)(tmp_path / "grey.png")


def test_depth_from_memory_and_files(tmp_path):
    millimetres = (picture()[..., 0].astype(np.uint16) * 60) + 5
    Image.fromarray(millimetres).save(tmp_path / "a.png")
    processor = LanguageBindDepthProcessor(CONFIG)
    expected = processor(tmp_path / "a.png")["pixel_values"]
    metres = (millimetres / 1000).clip(0.01, 10) / 10
    grey = LanguageBindImageProcessor(CONFIG)(torch.from_numpy(metres))["pixel_values"]
    torch.testing.assert_close(expected, grey, rtol=0, atol=5e-6)
    floats = millimetres.astype(np.float32)
    Image.fromarray(floats).save(tmp_path / "a.tiff")
    for item in (millimetres, floats, torch.from_numpy(floats), floats[None], Image.open(tmp_path / "a.png")):
        assert torch.equal(processor(item)["pixel_values"], expected)
    assert torch.equal(processor(tmp_path / "a.tiff")["pixel_values"], expected)
    assert torch.equal(processor([floats, floats])["pixel_values"], expected.repeat(2, 1, 1, 1))
    assert torch.equal(processor(np.stack([floats, floats]))["pixel_values"], expected.repeat(2, 1, 1, 1))


def test_depth_norm_by_hand():
    norm = depth.DepthNorm(max_depth=10)
    x = norm(np.array([[0, 5, 1000], [2500, 10000, 65535]], np.uint16))
    expected = torch.tensor([[0.001, 0.001, 0.1], [0.25, 1.0, 1.0]]).expand(3, 2, 3)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)
    relative = depth.DepthNorm(max_depth=0)(np.array([[1000, 4000]], np.int32))
    torch.testing.assert_close(relative[0], torch.tensor([[0.25, 1.0]]), rtol=1e-6, atol=0)
    assert repr(norm) == "DepthNorm(max_depth=10, min_depth=0.01)"


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 3, 4, 5)),
        np.zeros((0, 4)),
        np.full((4, 4), np.nan),
        np.full((4, 4), np.inf),
        Image.new("RGB", (4, 4)),
    ],
)
def test_wrong_depth_in_memory(bad):
    with pytest.raises(MediaError, match=r"expected .*, got "):
        LanguageBindDepthProcessor(CONFIG)([bad])


def test_a_broken_map_in_a_file_names_the_file(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(MediaError, match=r"nan\.tiff: expected finite depths"):
        LanguageBindDepthProcessor(CONFIG)(tmp_path / "nan.tiff")
