"""Tokens of pixels in inference on a CPU: patches, one native product with positions and the norm after it."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from lbfast import tokenwise
from lbfast.model.layers import LayerNorm
from lbfast.model.tokens import VisionEmbeddings, pixel_statistics
from lbfast.ops.patch_embed import fold

MULTIPLE = 16
"""Numbers of a patch that panels of any dtype take: rows are filled up."""


class FrozenTokens:
    """What a vision tower's encoder is given, float32 as its running sum is; products in the weight's dtype.

    Args:
        embeddings: plain, of float32 or bfloat16.
        norm: plain, the one before the encoder.
    """

    def __init__(self, embeddings: VisionEmbeddings, norm: LayerNorm):
        self.weight = cast(nn.Parameter, embeddings.patch_embedding.weight)
        self.positions = embeddings.position_embedding.weight.float()
        self.first = embeddings.class_embedding.float().view(-1, self.positions.shape[1])  # (1 or T', D)
        self.norm = [norm.weight.float(), norm.bias.float()]
        self.eps = norm.eps
        self.tube, self.patch = embeddings.tube_size, embeddings.patch_size
        self._laid: dict[bool, tuple[tokenwise.Product, torch.Tensor]] = {}

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, H, W) or (B, C, T, H, W), float or uint8 -> (B * T', N, D), normed."""
        product, positions = self._parts(pixels.dtype == torch.uint8)
        if pixels.dtype not in (torch.uint8, torch.float32, torch.bfloat16):
            pixels = pixels.to(self.weight.dtype)
        clips = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
        rows = torch.ops.lbfast.patch_rows(clips, None, self.tube, self.patch, self.weight.dtype, MULTIPLE)
        return tokenwise.embed(rows.flatten(0, 1), product, positions, self.norm, self.eps).view(*rows.shape[:2], -1)

    def _parts(self, raw: bool) -> tuple[tokenwise.Product, torch.Tensor]:
        """Panels for float pixels or raw ones, and what is added to the tokens of a frame, or of T' of them."""
        if raw not in self._laid:
            mean, std = pixel_statistics(self.weight.device) if raw else (None, None)
            weight, bias = fold(self.weight, mean, std)
            patches = self.positions[1:] if bias is None else self.positions[1:] + bias
            first = (self.first + self.positions[0])[:, None]
            positions = torch.cat([first, patches.expand(len(first), -1, -1)], dim=1).flatten(0, 1).contiguous()
            weight = F.pad(weight, (0, -weight.shape[1] % MULTIPLE))
            self._laid[raw] = tokenwise.product(weight, torch.zeros(len(weight)), weight.dtype), positions
        return self._laid[raw]
