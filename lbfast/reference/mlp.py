"""Oracle of ops.mlp: two matrix products and the activation's formula, in the dtype it is given."""

from __future__ import annotations

import math

import torch


def mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    *,
    activation: str = "gelu",
) -> torch.Tensor:
    """act(x @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias, act(h) = h Phi(h) or h sigmoid(1.702 h)."""
    h = x @ fc1_weight.T + fc1_bias
    gate = 0.5 * (1 + torch.erf(h / math.sqrt(2))) if activation == "gelu" else torch.sigmoid(1.702 * h)
    return (h * gate) @ fc2_weight.T + fc2_bias
