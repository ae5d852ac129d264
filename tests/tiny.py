"""Tiny random checkpoints and files, for tests of what people run."""

from __future__ import annotations

import csv
import io
import tarfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lbfast.model.config import LanguageBindConfig, config_dict
from lbfast.model.languagebind import LanguageBindModel, model_dict
from lbfast.training.batches import Batches
from tests.workers import Noise

SIZE = 16
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_OWN: dict[str, dict[str, Any]] = {
    "video": {"add_time_attn": True, "num_frames": 2},
    "audio": {"num_mel_bins": 112, "target_length": 112},
}


def config(modality: str, size: int = SIZE, **vision: Any) -> LanguageBindConfig:
    """Two layers of width 32 on 4 x 4 patches."""
    fields = {**_TOWER, "image_size": 64, "patch_size": 16, "lora_r": 0, **_OWN.get(modality, {}), **vision}
    return config_dict[modality](text_config=_TOWER, vision_config=fields, projection_dim=size)


def model(modality: str, size: int = SIZE, seed: int = 0) -> LanguageBindModel:
    torch.manual_seed(seed)
    return model_dict[modality](config(modality, size)).eval()


def checkpoint(folder: Path, modality: str, size: int = SIZE, seed: int = 0) -> Path:
    """Writes a model to folder/<modality> and returns that."""
    where = folder / modality
    model(modality, size, seed).save_pretrained(where)
    return where


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pictures(folder: Path, count: int) -> Path:
    """The folder, with so many: 0.jpg, 1.jpg..."""
    for i in range(count):
        picture(folder / f"{i}.jpg", seed=i)
    return folder


def depth_map(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 9000, (80, 96)).astype(np.uint16)).save(path)
    return path


def sound(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).integers(-3000, 3000, 8000, dtype=np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    return path


def clip(path: Path, seed: int = 0) -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(generator.integers(0, 255, (80, 96, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def table(file: Path, header: list[str], rows: list[list]) -> Path:
    """Writes a csv."""
    with open(file, "w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([header, *rows])
    return file


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """All of it, in the safe way where this Python has it: not before 3.10.12 and 3.11.4."""
    archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def shard(file: Path, content: dict[str, bytes], **options) -> Path:
    """Writes a tar of these members."""
    with tarfile.open(file, "w", **options) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


class Tokenizer:
    """A token for each letter."""

    def __call__(self, texts, max_length, padding, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        rows = [[ord(letter) for letter in text[:max_length]] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def noise(data, **options) -> Batches:
    """Five samples a step of what `Noise` sees."""
    return Batches(data, Noise(), Tokenizer(), **{"batch_size": 5, "context_length": 8, **options})
