"""InfoNCE, written densely: the whole (B, B) matrix of logits, both cross-entropies, in the inputs' own dtype."""

from __future__ import annotations

import torch


def info_nce(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    ids: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Symmetric InfoNCE of (B, D) and (B, D): scalar mean, differentiable.

    Rows that share an id are no negatives of each other. Label smoothing spreads its mass evenly over the row's own
    positive and its negatives, as torch's cross_entropy does over all classes.
    """
    logits = logit_scale.to(image_embeds.dtype) * image_embeds @ text_embeds.t()
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if ids is not None:
        allowed = (ids[:, None] != ids[None, :]) | torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    loss = logits.new_zeros(())
    for direction in (logits, logits.t()):
        log_p = direction.masked_fill(~allowed, float("-inf")).log_softmax(1)
        smooth = (log_p.masked_fill(~allowed, 0.0) / allowed.sum(1, keepdim=True)).sum(1)
        loss = loss - ((1 - label_smoothing) * log_p.diagonal() + label_smoothing * smooth).mean() / 2
    return loss
