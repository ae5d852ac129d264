"""Rows of float8 e4m3, each with a scale of its own."""

from __future__ import annotations

import torch

Float8 = tuple[torch.Tensor, torch.Tensor]
"""Values e4m3 (..., K) and scales float32 (..., 1), whose product they stand for."""

LARGEST = 448.0
"""Of e4m3: what the largest number of a row becomes."""


def to_float8(x: torch.Tensor) -> Float8:
    """x (..., K) rounded, by PyTorch."""
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scales).to(torch.float8_e4m3fn), scales
