"""The library's matrix product with a weight, for the bodies of ops: it has no autograd of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, plus: torch.Tensor | None = None
) -> torch.Tensor:
    """x (M, K) @ weight (N, K).T + bias (N,) + plus (M, N), contiguous; plus may be overwritten.

    float32 on a CPU goes to oneDNN, which F.linear leaves for MKL: on other makers' CPUs than Intel's that is half as
    fast (AMD EPYC, 2 threads, 2056 x 1024 x 4096: 55 ms against 103 ms).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and torch.backends.mkldnn.is_available():
        x, weight = x.contiguous(), weight.contiguous()
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, plus, weight, bias, "add")
    if plus is None:
        return F.linear(x, weight, bias)
    return plus.addmm_(x, weight.T) if bias is None else plus.add_(bias).addmm_(x, weight.T)
