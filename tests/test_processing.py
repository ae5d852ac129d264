"""The processors: what they take and give, whatever the modality."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

import lbfast
from lbfast import processing
from lbfast.mini.files import write_world
from lbfast.processing.media import MediaError
from lbfast.processing.processor import transform_dict
from tests import tiny

VISION = {
    "image_size": 56,
    "num_frames": 4,
    "max_depth": 10,
    "num_mel_bins": 28,
    "target_length": 70,
    "audio_mean": -4.2677393,
    "audio_std": 4.5689974,
    "video_decode_backend": "decord",
}
SHAPES = {
    "image": (3, 56, 56),
    "thermal": (3, 56, 56),
    "depth": (3, 56, 56),
    "video": (3, 4, 56, 56),
    "audio": (3, 28, 70),
}
CONFIG = SimpleNamespace(vision_config=SimpleNamespace(**VISION))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    pytest.importorskip("av")
    """Two files of each modality, and a caption of each."""
    manifest = write_world(tmp_path_factory.mktemp("samples"), 2)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    return {name: [(manifest.parent / row[name], row[f"{name}_caption"]) for row in rows] for name in SHAPES}


@pytest.fixture(scope="module")
def tokenizer():
    return processing.default_tokenizer()


@pytest.mark.parametrize("modality", SHAPES)
def test_files_and_captions(samples, tokenizer, modality):
    processor = transform_dict[modality](CONFIG, tokenizer)
    files, captions = (list(column) for column in zip(*samples[modality]))
    both = processor(files, text=captions, return_tensors="pt")
    assert set(both) == {"input_ids", "attention_mask", "pixel_values"}
    assert both["pixel_values"].shape == (2, *SHAPES[modality]) and both["pixel_values"].dtype == torch.float32
    assert torch.isfinite(both["pixel_values"]).all() and both["pixel_values"].std() > 0.1
    assert both["input_ids"].shape == both["attention_mask"].shape == (2, 77)
    pixels = processor(images=[str(file) for file in files])
    assert isinstance(pixels, BatchFeature) and torch.equal(pixels["pixel_values"], both["pixel_values"])
    assert torch.equal(processor(files[1])["pixel_values"], both["pixel_values"][1:])
    text = processor(text=captions, return_tensors="pt")
    assert set(text) == {"input_ids", "attention_mask"} and torch.equal(text["input_ids"], both["input_ids"])
    moved = lbfast.to_device(both, "cpu")
    assert {name: tuple(value.shape) for name, value in moved.items()} == {k: tuple(v.shape) for k, v in both.items()}
    one = processor.image_processor(files[0], processor.transform, **({"num_frames": 4} if modality == "video" else {}))
    assert torch.equal(one, both["pixel_values"][0])


@pytest.mark.parametrize("modality", SHAPES)
def test_processors_can_be_sent_to_workers(samples, modality):
    processor = transform_dict[modality](CONFIG)
    again = pickle.loads(pickle.dumps(processor))
    assert type(again) is transform_dict[modality] and repr(again) == repr(processor)
    item = samples[modality][0][0]
    assert torch.equal(again(item)["pixel_values"], processor(item)["pixel_values"])


def test_names_are_upstreams():
    for modality, cls in lbfast.transform_dict.items():
        name = f"LanguageBind{modality.capitalize()}"
        assert cls.__name__ == f"{name}Processor" and getattr(lbfast, cls.__name__) is cls
        assert getattr(processing, f"{name}Tokenizer").__name__ == f"{name}Tokenizer"
    assert processing.MediaError is MediaError and issubclass(MediaError, ValueError)
    assert {"MediaError", "default_tokenizer"} <= set(dir(processing))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = processing.nothing


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(MediaError("a.png", "an image", "text")))
    assert str(error) == "a.png: expected an image, got text" and error.source == "a.png"


def test_captions(tokenizer):
    processor = transform_dict["image"](CONFIG, tokenizer)
    one = processor(text="a dog", return_tensors="pt")
    assert one["input_ids"].shape == (1, 77)
    assert processor(text=["a dog", "a dog"], context_length=9)["attention_mask"] == [[1] * 4 + [0] * 5] * 2
    assert processor.batch_decode(one["input_ids"]) == ["a dog"] and processor.decode(one["input_ids"][0]) == "a dog"
    assert "<|endoftext|>" in processor.decode(one["input_ids"][0], skip_special_tokens=False)
    long = "a " * 76
    assert processor(text=long, return_tensors="pt")["input_ids"].shape == (1, 77)
    with pytest.raises(ValueError, match="text: expected at most 77 tokens with truncation=False, got 78"):
        processor(text=long, truncation=False)
    with pytest.raises(ValueError, match="text: expected at most 5 tokens with truncation=False, got 6"):
        processor(text=["a", "a b c d"], truncation=False, context_length=5)
    fits = processor(text="a " * 75, truncation=False, return_tensors="pt")
    assert torch.equal(fits["input_ids"], processor(text="a " * 75, return_tensors="pt")["input_ids"])


def test_wrong_calls(tokenizer):
    processor = transform_dict["image"](CONFIG, tokenizer)
    with pytest.raises(ValueError, match="text, images: expected at least one of them, got neither"):
        processor()
    for empty in ([], np.zeros((0, 5, 6, 3), np.uint8)):
        with pytest.raises(ValueError, match="images: expected at least one item, got an empty list"):
            processor(empty)
    with pytest.raises(ValueError, match="text: expected at least one caption, got an empty list"):
        processor(text=[])
    with pytest.raises(ValueError, match="tokenizer: expected one for text"):
        transform_dict["image"](CONFIG)(text="a dog")
    with pytest.raises(ValueError, match="clip_start_sec: expected for video, audio only, got image"):
        processor(np.zeros((5, 6, 3), np.uint8), clip_start_sec=1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        transform_dict["image"](CONFIG, tokenizer, no_such=1)


def test_batches_in_memory():
    processor = transform_dict["image"](CONFIG)
    array = np.random.default_rng(0).integers(0, 255, (3, 40, 50, 3), dtype=np.uint8)
    expected = torch.cat([processor(picture)["pixel_values"] for picture in array])
    assert torch.equal(processor(array)["pixel_values"], expected)
    assert torch.equal(processor(tuple(array))["pixel_values"], expected)
    assert torch.equal(processor([Image.fromarray(a) for a in array])["pixel_values"], expected)
    assert torch.equal(processor(torch.from_numpy(array).permute(0, 3, 1, 2))["pixel_values"], expected)


def test_antialias_and_raw_and_eval():
    array = np.random.default_rng(0).integers(0, 255, (200, 260, 3), dtype=np.uint8)
    smooth, sharp = (transform_dict["image"](CONFIG, antialias=a)(array)["pixel_values"] for a in (True, False))
    assert sharp.std() > 1.5 * smooth.std()
    depth = transform_dict["depth"](CONFIG)(array[..., 0].astype(np.uint16) * 40, raw=True)["pixel_values"]
    assert depth.dtype == torch.uint8 and depth.float().std() > 1
    assert transform_dict["image"](CONFIG, training=True).eval().training is False


def test_from_pretrained(tmp_path, samples):
    pytest.importorskip("lbfast.model.config")
    from lbfast.processing.text import write_clip_vocabulary

    for modality, cls in transform_dict.items():
        folder = tmp_path / modality
        folder.mkdir()
        config = lbfast.config_dict[modality](vision_config=VISION)
        config.save_pretrained(folder)
        write_clip_vocabulary(folder)
        processor = cls.from_pretrained(folder, cache_dir=tmp_path / "cache", revision="main", antialias=False)
        assert type(processor.config) is type(config)
        assert type(processor.tokenizer).__name__ == f"LanguageBind{modality.capitalize()}Tokenizer"
        made = cls(config, processor.tokenizer, antialias=False)
        both = processor(samples[modality][0][0], text="a dog", return_tensors="pt")
        assert torch.equal(both["pixel_values"], made(samples[modality][0][0])["pixel_values"])
        assert torch.equal(made.preprocess(samples[modality][0][0], "pt")["pixel_values"], both["pixel_values"])
    with pytest.raises((OSError, ValueError)):
        transform_dict["image"].from_pretrained(tmp_path / "nothing")


def test_importing_and_decoding_cost_nothing(tmp_path):
    """What a worker does with a picture, too."""
    picture = tiny.picture(tmp_path / "a.png")
    code = (
        "import sys, lbfast.processing.processor, lbfast.mini.files\n"
        "from lbfast.data.decode import Processors, Task\n"
        f"pixels = Processors({{'image': {{'image_size': 64}}}}).decode(Task('image', {str(picture)!r}))\n"
        "heavy = {'av', 'kaldi_native_fbank', 'transformers', 'triton', 'torchvision', 'torchaudio', 'cv2', 'decord'}\n"
        "print(pixels.shape, sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=root)
    assert done.stdout.strip() == "(3, 64, 64) []", done.stdout + done.stderr
