"""Oracle of ops.patch_embed: every patch convolved, then dropped, in the dtype of the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    *,
    class_embedding: torch.Tensor,
    position_embedding: torch.Tensor,
    kept: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
    pre_norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """pixels (B, C, [T,] H, W), weight (D, C, [tube,] P, P) -> tokens (B*T', 1 + K, D)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if pixels.dtype == torch.uint8 and mean is not None and std is not None:
        mean, std = (v.to(wide).view(-1, *[1] * (pixels.dim() - 2)) for v in (mean, std))
        pixels = (pixels.to(wide) / 255 - mean) / std
    if pixels.dim() == 4:
        pixels = pixels.unsqueeze(2)
    if weight.dim() == 4:
        weight = weight.unsqueeze(2)
    patches = F.conv3d(pixels.to(weight.dtype), weight, stride=weight.shape[2:])  # (B, D, T', Gh, Gw)
    b, d, t = patches.shape[:3]
    patches = patches.flatten(3).permute(0, 2, 3, 1)  # (B, T', Gh*Gw, D)
    cls = class_embedding.expand(t, d).view(1, t, 1, d).expand(b, t, 1, d)
    tokens = torch.cat([cls, patches], dim=2) + position_embedding
    if kept is not None:
        rows = torch.cat([kept.new_zeros(len(kept), 1), 1 + kept], dim=1)  # (B, 1 + K)
        tokens = torch.stack([clip[:, row] for clip, row in zip(tokens, rows)])
    tokens = tokens.flatten(0, 1)
    if pre_norm is None:
        return tokens
    norm_weight, norm_bias, eps = pre_norm
    return F.layer_norm(tokens, (d,), norm_weight.to(tokens.dtype), norm_bias.to(tokens.dtype), eps)
