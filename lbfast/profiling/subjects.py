"""What is profiled: a checkpoint, or an architecture with random weights, and a call of it on random inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from lbfast.model.config import MODALITIES, published_config
from lbfast.model.inference import best_dtype, optimize_for_inference
from lbfast.model.languagebind import LanguageBindModel, model_dict

ARCHS = {"L/14": "large", "H/14": "huge"}
MODES = ("inference", "train")
LANGUAGE = "language"


def random_model(arch: str, modality: str, layers: int | None = None, lora: int = 0) -> LanguageBindModel:
    """A published architecture with random weights, of so many layers in both towers (default: all)."""
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {', '.join(ARCHS)}, got {arch!r}")
    name = "image" if modality == LANGUAGE else modality
    if name not in MODALITIES:
        raise ValueError(f"modality: expected one of {', '.join((*MODALITIES, LANGUAGE))}, got {modality!r}")
    config = published_config(name, ARCHS[arch], lora_r=lora)
    for tower in (config.text_config, config.vision_config):
        tower.num_hidden_layers = layers or tower.num_hidden_layers
    return model_dict[name](config).eval()


def inputs(model: LanguageBindModel, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random pixels (float32) and captions of 5 to 20 tokens, padded, a batch of each."""
    vision, text = model.config.vision_config, model.config.text_config
    generator = torch.Generator().manual_seed(0)
    shape = model.vision_model.embeddings.pixel_shape
    frames = (vision.num_frames,) if vision.add_time_attn else ()
    pixels = torch.randn(batch, shape[0], *frames, *shape[1:], generator=generator)
    longest = text.max_position_embeddings
    lengths = torch.randint(min(5, longest), min(21, longest + 1), (batch, 1), generator=generator)
    columns = torch.arange(longest)
    ids = torch.randint(0, text.vocab_size - 1, (batch, longest), generator=generator)
    ids = ids.masked_fill(columns >= lengths - 1, text.vocab_size - 1)
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": (columns < lengths).long()}
    return {key: value.to(device) for key, value in given.items()}


def subject(
    model: LanguageBindModel, modality: str, mode: str, batch: int, device: torch.device, dtype: torch.dtype | None
) -> tuple[Callable[[], Any], torch.dtype]:
    """A call to profile, and the dtype of its products.

    "inference": embeddings of one modality (or of "language"), by a model readied with `optimize_for_inference`, in
    `dtype` (default: the device's best); without CUDA graphs, which have no operators to show. "train": loss and
    gradients of both towers, float32 weights under autocast to `dtype` (default: bfloat16 on a GPU, else float32),
    without the optimizer's step.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    given = inputs(model, batch, device)
    cast(torch.nn.Module, model).to(device)
    if mode == "inference":
        dtype = dtype or best_dtype(device)
        ready = optimize_for_inference(model, dtype=dtype, cuda_graphs=False)
        if modality == LANGUAGE:
            ids, mask = given["input_ids"], given["attention_mask"]
            return torch.inference_mode()(lambda: ready.get_text_features(ids, mask)), dtype
        pixels = given["pixel_values"]
        return torch.inference_mode()(lambda: ready.get_image_features(pixels)), dtype
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**given, return_loss=True).loss
        loss.backward()

    return step, dtype
