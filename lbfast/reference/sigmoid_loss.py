"""The sigmoid loss of pairs, written densely: the whole (B, N) matrix of logits, in the inputs' own dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of (B, D) and (N, D), N >= B: scalar, differentiable. Pairs that share an id and are no positives don't count."""
    dtype = image_embeds.dtype
    logits = logit_scale.to(dtype) * image_embeds @ text_embeds.t() + logit_bias.to(dtype)
    b, n = logits.shape
    positive = torch.eye(b, n, dtype=torch.bool, device=logits.device)
    losses = -F.logsigmoid(torch.where(positive, logits, -logits))
    if ids is not None:
        losses = losses.masked_fill((ids[:b, None] == ids[None, :]) & ~positive, 0.0)
    return losses.sum() / b
