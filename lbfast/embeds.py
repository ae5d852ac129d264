"""What a loaded model makes of pixel values and captions: rows of unit length, and which of them can be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lbfast.data.shared import stacked

if TYPE_CHECKING:
    from lbfast.model.pair import Pair


def media_features(
    model: Pair,
    pixels: Sequence[np.ndarray],
    dtype: torch.dtype,
    device: torch.device,
    weights: torch.dtype | None = None,
) -> torch.Tensor:
    """(n, E) on the device, not normalised, of n arrays of one modality and dtype, as `stacked` takes them.

    On a GPU it may not be computed when this returns: keep `pixels` until it is. They become `weights`, if given.
    """
    with torch.inference_mode():
        return model.get_image_features(pixel_values=stacked(pixels, dtype, device).to(weights or dtype))


def text_features(model: Pair, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """(n, E) on the model's device, not normalised. Longer texts than the model takes are cut, as in training.

    Padded to the longest only: what follows the end of a text changes nothing.
    """
    longest = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(texts), max_length=longest, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])


def unit(features: torch.Tensor, dim: int | None) -> torch.Tensor:
    """(n, E) of any precision -> (n, dim or E) float32 of unit length: the first `dim` numbers, None all."""
    return torch.nn.functional.normalize(features.float()[:, :dim], dim=-1)


def usable(rows: torch.Tensor) -> torch.Tensor:
    """(n,) bool: which rows of `unit` are finite and point somewhere."""
    return torch.isfinite(rows).all(-1) & (rows.norm(dim=-1) > 0.5)
