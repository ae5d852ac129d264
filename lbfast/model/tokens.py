"""What a tower's encoder takes: tokens of pixels and of captions, with upstream's attribute names."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lbfast import ops
from lbfast.model.config import Modality
from lbfast.model.layers import LayerNorm, drawn, embedding
from lbfast.model.plain import ours, plain

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_position_embedding(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Fits a position table (1 + s * s, D), class token first, to another grid: (1 + rows * columns, D).

    Bicubic with antialiasing, as upstream does for audio.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side + 1 != table.shape[0]:
        raise ValueError(f"table: expected 1 + a square number of rows, got {table.shape[0]}")
    patches = table[1:].float().T.reshape(1, -1, side, side)
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], patches[0].flatten(1).T.to(table.dtype)])


@functools.cache
@torch.inference_mode(False)  # training, later in the process, keeps them for its backward
def pixel_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """PIXEL_MEAN and PIXEL_STD there: a CUDA graph could not copy them."""
    mean, std = (torch.tensor(values, device=device) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean, std


@ours
class VisionEmbeddings(nn.Module):
    """Patches (or tubes of frames), class token and positions, through `ops.patch_embed`."""

    def __init__(self, config: Any, modality: Modality):
        super().__init__()
        self.config = config
        self.embed_dim, self.patch_size = config.hidden_size, config.patch_size
        height = width = self.image_size = config.image_size
        if modality.mel_grid and config.num_mel_bins and config.target_length:
            height, width = int(config.num_mel_bins), int(config.target_length)
        self.pixel_shape = (config.num_channels, height, width)
        self.grid = (height // self.patch_size, width // self.patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_positions = self.num_patches + 1
        tubes = getattr(config, "clip_type", "vl") == "vl_new" and config.add_time_attn
        self.tube_size = int(getattr(config, "tube_size", 1)) if tubes else 1
        patch = (self.patch_size, self.patch_size)
        # where the convolutions are plain, they only hold the weight under its checkpoint key
        self.patch_embedding: nn.Conv2d | nn.Conv3d
        if tubes:
            if config.num_frames % self.tube_size:
                raise ValueError(
                    f"tube_size: expected a divisor of num_frames {config.num_frames}, got {self.tube_size}"
                )
            tube = (self.tube_size, *patch)
            self.patch_embedding = nn.Conv3d(config.num_channels, self.embed_dim, tube, stride=tube, bias=False)
            class_shape: tuple[int, ...] = (config.num_frames // self.tube_size, self.embed_dim)
        else:
            self.patch_embedding = nn.Conv2d(config.num_channels, self.embed_dim, patch, stride=patch, bias=False)
            class_shape = (self.embed_dim,)
        self.class_embedding = nn.Parameter(drawn(*class_shape))
        self.position_embedding = embedding(self.num_positions, self.embed_dim)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        state_dict.pop(f"{prefix}position_ids", None)  # 0, 1, 2...: transformers saved them once
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(
        self, pixel_values: torch.Tensor, kept: torch.Tensor | None = None, pre_norm: LayerNorm | None = None
    ) -> torch.Tensor:
        """pixel_values (B, C, H, W) or (B, C, T, H, W), float or uint8; kept (B, K) -> (B * T', 1 + K, D), normed."""
        if not plain(self.patch_embedding, self.position_embedding):
            tokens = self._called(pixel_values, kept)
            return tokens if pre_norm is None else pre_norm(tokens)
        mean: Any = None
        std: Any = None
        if pixel_values.dtype == torch.uint8:
            tracing = torch.compiler.is_compiling()
            mean, std = (PIXEL_MEAN, PIXEL_STD) if tracing else pixel_statistics(pixel_values.device)
        return ops.patch_embed(
            pixel_values,
            self.patch_embedding.weight,
            class_embedding=self.class_embedding,
            position_embedding=self.position_embedding.weight,
            kept=kept,
            mean=mean,
            std=std,
            pre_norm=None if pre_norm is None else pre_norm.parts,
        )

    def _called(self, pixels: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """The tokens before the norm, by the modules' own calls."""
        dtype = self.class_embedding.dtype
        if pixels.dtype == torch.uint8:
            mean, std = (torch.tensor(values, device=pixels.device) for values in (PIXEL_MEAN, PIXEL_STD))
            shape = (-1, *[1] * (pixels.ndim - 2))
            pixels = (pixels / 255 - mean.view(shape)) / std.view(shape)
        clips = pixels.to(dtype) if pixels.ndim == 5 else pixels.to(dtype).unsqueeze(2)
        if self.tube_size > 1 or isinstance(self.patch_embedding, nn.Conv3d):
            patches = self.patch_embedding(clips).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T', N, D)
        else:
            patches = self.patch_embedding(clips.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
            patches = patches.unflatten(0, (clips.shape[0], -1))
        first = self.class_embedding.to(patches.dtype).view(-1, 1, self.embed_dim)  # (1 or T', 1, D)
        tokens = torch.cat([first.expand(*patches.shape[:2], 1, -1), patches], dim=2)
        tokens = tokens + self.position_embedding(torch.arange(self.num_positions, device=pixels.device)[None])
        if kept is not None:
            rows = F.pad(1 + kept, (1, 0))[:, None, :, None]  # the class token, and the patches kept
            tokens = tokens.gather(2, rows.expand(-1, tokens.shape[1], -1, tokens.shape[-1]))
        return tokens.flatten(0, 1)


@ours
class PatchDropout(nn.Module):
    """Chooses the patches that training keeps (arXiv 2212.00794); the dropped ones are never embedded."""

    def __init__(self, prob: float):
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"force_patch_dropout: expected a probability in [0, 1), got {prob}")
        self.prob = prob
        self.noise: torch.Tensor | None = None
        """(clips, patches), drawn by training that must choose the same patches again; None: drawn here."""

    def forward(self, clips: int, patches: int, device: torch.device) -> torch.Tensor | None:
        """Indices (clips, kept) in rising order, the same for all frames of a clip; None when all are kept."""
        if not self.training or self.prob == 0:
            return None
        count = max(1, int(patches * (1 - self.prob)))
        noise = torch.rand(clips, patches, device=device) if self.noise is None else self.noise
        return noise.topk(count, dim=-1).indices.sort(dim=-1).values

    def extra_repr(self) -> str:
        return f"prob={self.prob}"


@ours
class TextEmbeddings(nn.Module):
    """Token and position embeddings."""

    def __init__(self, config: Any):
        super().__init__()
        self.token_embedding = embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        state_dict.pop(f"{prefix}position_ids", None)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids (B, N), position_ids (B, N) or (1, N) -> (B, N, D)."""
        tokens = self.token_embedding(input_ids)
        if position_ids is None and plain(self.position_embedding):
            return tokens + self.position_embedding.weight[: input_ids.shape[1]]
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return tokens + self.position_embedding(position_ids)
