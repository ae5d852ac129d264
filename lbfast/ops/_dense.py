"""The losses by PyTorch's own operators, with all logits at once: for transforms of torch.func and for tracing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lbfast.ops._pairs import accumulation


def dense_info_nce(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor | None,
    label_smoothing: float,
    direction: str,
) -> torch.Tensor:
    """`ops.info_nce` of one process, of checked arguments."""
    acc = accumulation(image_embeds.dtype)
    logits = scale.to(acc) * image_embeds.to(acc) @ text_embeds.to(acc).T  # (B, N), N >= B
    b, n = logits.shape
    positive = torch.eye(b, n, dtype=torch.bool, device=logits.device)
    allowed = torch.ones_like(positive) if ids is None else (ids[:b, None] != ids) | positive
    losses = []
    for name, z, kept in (("image", logits, allowed), ("text", logits.T[:b], allowed.T[:b])):
        if direction in (name, "both"):
            log_p = z.masked_fill(~kept, torch.finfo(acc).min).log_softmax(1)
            smooth = log_p.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)
            losses.append(((label_smoothing - 1) * log_p.diagonal() - label_smoothing * smooth).mean())
    return torch.stack(losses).mean()


def dense_sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    ids: torch.Tensor | None,
) -> torch.Tensor:
    """`ops.sigmoid_loss` of one process, of checked arguments."""
    acc = accumulation(image_embeds.dtype)
    logits = scale.to(acc) * image_embeds.to(acc) @ text_embeds.to(acc).T + bias.to(acc)  # (B, N), N >= B
    b, n = logits.shape
    positive = torch.eye(b, n, dtype=torch.bool, device=logits.device)
    losses = -F.logsigmoid(torch.where(positive, logits, -logits))
    if ids is not None:
        losses = losses.masked_fill((ids[:b, None] == ids) & ~positive, 0.0)
    return losses.sum() / b
