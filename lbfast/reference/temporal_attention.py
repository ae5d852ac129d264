"""Oracle of ops.temporal_attention: upstream's way around it, rearrange '(b t) n d -> (b n) t d' and back."""

from __future__ import annotations

import torch

from lbfast.reference.attention import attention


def temporal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Attention over the T frames of each (b, n, h): q, k, v (B, T, N, H, D) -> (B, T, N, H, D) in float64."""
    b, t, n, h, d = q.shape
    sequences = [x.transpose(1, 2).reshape(b * n, t, h, d) for x in (q, k, v)]
    return attention(*sequences, scale=scale).reshape(b, n, t, h, d).transpose(1, 2)
