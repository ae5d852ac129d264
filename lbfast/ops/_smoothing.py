"""What label smoothing adds to InfoNCE: bilinear in the embeddings, it needs no logits.

A row's smoothed target differs by eps (1/n_i - delta) on its positive and negatives A_i, n_i of them, so

    added = eps s/2B sum_i x_i . t_i,   t_i = 2 y_i - sum_{j in A_i} (1/n_i + 1/n_j) y_j

and sums over A_i are sums over all rows less those over the row's group (which shares n) plus the row itself.
Of eps t, the gradients of info_nce have 2 eps y_i in what a positive's logit has less (`target`), before dS is rounded:
at a large eps it all but cancels; they begin with the rest, -eps (2 y - t).
"""

from __future__ import annotations

import torch

from lbfast import distributed
from lbfast.ops._pairs import accumulation


def smoothing_partners(y: torch.Tensor, mean: torch.Tensor, smoothing: float) -> torch.Tensor:
    """eps t (b, D) for the local rows y (b, D)."""
    return torch.sub(y.to(mean.dtype), mean, alpha=0.5).mul_(2 * smoothing)


def smoothing_start(y: torch.Tensor, mean: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-eps (2 y - t) (b, D) for the local rows y (b, D)."""
    return torch.mul(mean.expand(y.shape), -smoothing).contiguous()


def smoothing_means(y: torch.Tensor, shards: distributed.Shards, labels: torch.Tensor | None) -> torch.Tensor:
    """2 y - t for the local rows y (b, D): (b, D), or (1, D) where all rows have one."""
    y = y.to(accumulation(y.dtype))
    if labels is None:
        return (2 / shards.total) * shards.sum(y.sum(0, keepdim=True))
    local = labels[shards.span(shards.rank)].long()
    n = (shards.total + 1 - torch.bincount(labels, minlength=1)[local]).to(y.dtype)[:, None]
    groups, slot = torch.unique(local, return_inverse=True)
    sums = y.new_zeros(len(groups), y.shape[1])
    for owner, y_owner in shards.ring(y):  # sum over the row's group, wherever its members are
        theirs = labels[shards.span(owner)].long()
        where = torch.searchsorted(groups, theirs).clamp_(max=max(0, len(groups) - 1))
        if len(groups):
            same = (groups[where] == theirs).to(y.dtype)
            sums.index_add_(0, where, y_owner * same[:, None])
    same = sums[slot]
    return (shards.sum(y.sum(0)) - same + y) / n + (shards.sum((y / n).sum(0)) - same / n + y / n)
