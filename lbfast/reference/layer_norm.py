"""Oracle of ops.layer_norm: the formula, in the dtype it is given."""

from __future__ import annotations

import torch


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; of x + residual, with it: (y, sum)."""
    total = x if residual is None else x + residual
    mean = total.mean(-1, keepdim=True)
    variance = (total - mean).square().mean(-1, keepdim=True)
    y = (total - mean) / torch.sqrt(variance + eps) * weight + bias
    return y if residual is None else (y, total)
