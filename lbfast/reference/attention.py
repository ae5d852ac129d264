"""Oracle of ops.attention: the whole score matrix, masks added to it as CLIP adds them, in float64."""

from __future__ import annotations

import torch

MASKED = torch.finfo(torch.float32).min


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T + causal mask + padding mask) v for q (B, N, H, D) and k, v (B, M, H, D), in float64.

    Both masks add MASKED, so that a query none of whose keys is left averages over the keys masked once.
    """
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores + later * MASKED
    if key_padding_mask is not None:
        padded = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask < 0
        scores = scores + padded[:, None, None, :] * MASKED
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
