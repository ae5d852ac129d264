"""The library's matrix products, for ops and models, and a linear layer made of them.

float32 on a CPU goes to oneDNN, which PyTorch leaves for MKL: on other makers' CPUs than Intel's that is half as fast
(AMD EPYC, one thread, 514 x 1024 x 4096: 24 ms against 49 ms).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_AVAILABLE = torch.backends.mkldnn.is_available()
_WORTH_COPIES = 1 << 23
"""Multiply-adds from which on transposing an operand costs little beside the product."""


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, plus: torch.Tensor | None = None
) -> torch.Tensor:
    """x (M, K) @ weight (N, K).T + bias (N,) + plus (M, N), contiguous; plus may be overwritten. No autograd."""
    if _onednn(x, weight, bias, plus):
        x, weight = x.contiguous(), weight.contiguous()
        bias = (
            None if bias is None else bias.contiguous()
        )  # oneDNN reads N numbers from its address, whatever its stride
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, plus, weight, bias, "add")
    x, weight = _gapless(x), _gapless(weight)
    if plus is None:
        return F.linear(x, weight, bias)
    return plus.addmm_(x, weight.T) if bias is None else plus.add_(bias).addmm_(x, weight.T)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K) @ b (K, N). No autograd."""
    if _onednn(a, b) and len(a) * b.numel() >= _WORTH_COPIES:
        return linear(a, b.T)
    return _gapless(a) @ _gapless(b)


def trained_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """F.linear of these products, with autograd."""
    if not _onednn(x, weight, bias):
        return F.linear(_gapless(x), _gapless(weight), bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _rows_linear(x, weight, bias)


def _rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`linear` of x (..., K)."""
    return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _gapless(x: torch.Tensor) -> torch.Tensor:
    """x (..., K) with nothing between its rows: on a CPU, of 16 bits, products read some, and NaN times 0 is NaN.

    PyTorch 2.13 with AMX, where K is no multiple of 32.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16) or torch.compiler.is_compiling():
        return x
    turned = x.dim() == 2 and x.T.is_contiguous()
    return x if turned or x.is_contiguous() else x.contiguous()


def _onednn(*operands: torch.Tensor | None) -> bool:
    """Whether to ask oneDNN for it. A compiled graph's products are the compiler's to choose."""
    if torch.compiler.is_compiling() or not _AVAILABLE:
        return False
    for t in operands:  # noqa: SIM110 (asked at every product: quicker than a generator)
        if t is not None and not (t.is_cpu and t.dtype == torch.float32 and t.numel()):
            return False
    return True


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _rows_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        shape, dout = dout.shape[:-1], dout.reshape(-1, dout.shape[-1])
        return (
            product(dout, weight).view(*shape, weight.shape[1]) if need_x else None,
            product(dout.T, x.reshape(-1, x.shape[-1])) if need_weight else None,
            dout.sum(0) if need_bias else None,
        )
