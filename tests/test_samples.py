"""The sample files: there, readable, repeatable, and different from one another."""

import time

import pytest
import torch

pytest.importorskip("av")

from lbfast.processing import audio, depth, image, video
from lbfast.samples import CAPTIONS, make_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("samples"))


def test_two_files_and_two_captions_a_modality(samples):
    assert set(samples) == set(CAPTIONS) == {"image", "video", "audio", "depth", "thermal"}
    for name, files in samples.items():
        assert len(files) == len(set(files)) == len(CAPTIONS[name]) == 2
        assert all(file.is_file() and file.parent.name == name for file in files)
    captions = [caption for pair in CAPTIONS.values() for caption in pair]
    assert len(set(captions)) == 10 and sum(f.stat().st_size for files in samples.values() for f in files) < 2e6


def test_the_same_bytes_again_and_fast(samples, tmp_path):
    begin = time.perf_counter()
    again = make_samples(tmp_path)
    assert time.perf_counter() - begin < 20
    for name, files in samples.items():
        assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again[name]]


def test_contents(samples):
    for file in samples["video"]:
        frames = video.read_frames(file, 72)
        assert frames.shape == (72, 240, 320, 3)
        moved = (frames[1:].float() - frames[:-1].float()).abs().amax((1, 2, 3))
        assert (moved > 20).all() and len(frames.unique(dim=0)) == 72
    for file in samples["audio"]:
        waveform, rate = audio.read_audio(file)
        assert rate == 16000 and waveform.shape == (1, 64000) and 0.3 < waveform.abs().max() < 1
    for file in samples["depth"]:
        assert image.open_image(file).mode.startswith("I;16")
        metres = depth.DepthNorm(10)(image.open_image(file))
        assert metres.shape == (3, 240, 320) and 0.05 < metres.min() < metres.max() < 0.45
    for name in ("image", "thermal"):
        for file in samples[name]:
            assert image.open_image(file).size == (320, 240)


def test_files_of_a_modality_differ(samples):
    for name in ("image", "thermal"):
        first, second = (image.image_transform(None)(image.open_image(file)) for file in samples[name])
        assert torch.nn.functional.mse_loss(first, second) > 0.1
