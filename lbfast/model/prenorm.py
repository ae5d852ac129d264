"""Layer norm and the products that read it, for training: the norm's output is computed again in the backward.

A pre-norm layer would keep it beside the sum that it is the norm of, once for the projections and once for the MLP;
computing it again is one pass over memory. Compositions of the library ops, which torch.compile traces through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lbfast import dispatch
from lbfast.products import linear, product

Norm = tuple[torch.Tensor, torch.Tensor, float]
"""weight (D,), bias (D,), eps of `ops.layer_norm`."""


def norm_linears(
    x: torch.Tensor,
    norm: Norm,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    residual: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """total = x + residual; y = layer_norm(total); y @ weight.T + bias for each of `layers`.

    x (..., D), residual broadcastable to it, weights (N, D) and biases (N,) -> products (..., N), and total. Kept for
    the backward: total and the norm's statistics.
    """
    parameters = [_autocast(x, p) for layer in layers for p in layer]
    outs = _NormLinears.apply(x, residual, *norm, *parameters)
    return list(outs[: len(layers)]), x if residual is None else outs[-1]


def norm_mlp(
    x: torch.Tensor,
    norm: Norm,
    fc1: tuple[torch.Tensor, torch.Tensor],
    fc2: tuple[torch.Tensor, torch.Tensor],
    activation: str,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = x + residual; `ops.mlp` of layer_norm(total), and total. Kept: total and the norm's statistics."""
    parameters = [_autocast(x, p) for p in (*fc1, *fc2)]
    outs = _NormMLP.apply(x, residual, *norm, *parameters, activation)
    return outs[0], x if residual is None else outs[1]


def _autocast(x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to(dispatch.autocast_dtype(x.device) or parameter.dtype)


def _norm_fwd(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, norm: Norm, kept: tuple[Any, ...]) -> Any:
    """Returns (y, total), and keeps what the backward needs; total is x without a residual."""
    if residual is None:
        total = x
        y, mean, rstd = torch.ops.lbfast.layer_norm(x, *norm, None)
    else:
        y, total, mean, rstd = torch.ops.lbfast.add_layer_norm(x, residual, *norm, None)
    ctx.save_for_backward(total, *norm[:2], mean, rstd, *kept)
    ctx.eps = norm[2]
    ctx.like = (x.dtype, None if residual is None else (residual.shape, residual.dtype))
    ctx.set_materialize_grads(False)
    return y, total


def _norm_bwd(
    ctx: Any, saved: Any, dy: torch.Tensor, dtotal: torch.Tensor | None, wanted: tuple[bool, ...]
) -> list[Any]:
    """Gradients of x, residual, and the norm's weight and bias."""
    total, weight, bias, mean, rstd, *_ = saved
    need_x, need_residual, *parameters = wanted
    mask = [need_x or need_residual, *parameters]
    dy = dy.to(total.dtype).reshape(total.shape)
    grads = torch.ops.lbfast.layer_norm_bwd(dy, dtotal, total, weight, bias, mean, rstd, mask, None)
    dx, dresidual = None, None
    x_dtype, residual = ctx.like
    if need_x:
        dx = grads[0].to(x_dtype)
    if need_residual and residual is not None:
        dresidual = (grads[0] if residual[0] == total.shape else grads[0].sum_to_size(residual[0])).to(residual[1])
    return [dx, dresidual, *(grad if want else None for grad, want in zip(grads[1:], parameters))]


def _recomputed(saved: Any, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """The norm's output again, as rows (M, D)."""
    total, weight, bias, *_ = saved
    y = torch.ops.lbfast.layer_norm(total, weight, bias, eps, None)[0]
    return y.to(dtype).reshape(-1, total.shape[-1])


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, eps: float, *parameters: Any) -> Any:
        weights, biases = parameters[::2], parameters[1::2]
        with torch.autocast(x.device.type, enabled=False):
            y, total = _norm_fwd(ctx, x, residual, (weight, bias, eps), weights)
            y = y.to(weights[0].dtype)
            rows = y.reshape(-1, y.shape[-1])
            outs = [linear(rows, w, b).view(*y.shape[:-1], len(w)) for w, b in zip(weights, biases)]
        return (*outs, total) if residual is not None else tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing computes them again at every unpacking
        weights = saved[5:]
        wanted = ctx.needs_input_grad
        dtotal = grads[-1] if ctx.like[1] is not None else None
        douts = [None if d is None else d.reshape(-1, d.shape[-1]) for d in grads[: len(weights)]]
        y = _recomputed(saved, ctx.eps, weights[0].dtype) if any(wanted[5::2]) else None
        dy: Any = None
        products: list[Any] = []
        for dout, weight, need_weight, need_bias in zip(douts, weights, wanted[5::2], wanted[6::2]):
            if dout is None:
                products += [None, None]
                continue
            products.append(product(dout.T, y) if need_weight and y is not None else None)
            products.append(dout.sum(0) if need_bias else None)
            if any(wanted[:4]):
                dy = product(dout, weight) if dy is None else linear(dout, weight.T, plus=dy)
        before = _passed_on(ctx, dtotal) if dy is None else _norm_bwd(ctx, saved, dy, dtotal, wanted[:4])
        return (*before, None, *products)


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, eps: float, *rest: Any) -> Any:
        *parameters, activation = rest
        w1, b1, w2, b2 = parameters
        ctx.activation = activation
        with torch.autocast(x.device.type, enabled=False):
            y, total = _norm_fwd(ctx, x, residual, (weight, bias, eps), (w1, b1, w2))
            out = torch.ops.lbfast.mlp(y.to(w1.dtype), w1, b1, w2, b2, activation, False, None)[0]
        return (out, total) if residual is not None else (out,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Any, dtotal: Any = None) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing computes them again at every unpacking
        w1, b1, w2 = saved[5:]
        wanted = ctx.needs_input_grad
        if dout is None:
            return (*_passed_on(ctx, dtotal), *[None] * 6)
        y = _recomputed(saved, ctx.eps, w1.dtype)
        mask = [any(wanted[:4]), *wanted[5:9]]
        dout = dout.reshape(-1, dout.shape[-1])
        dy, *products = torch.ops.lbfast.mlp_bwd(dout, y, None, w1, b1, w2, ctx.activation, mask, None)
        grads = _norm_bwd(ctx, saved, dy, dtotal, wanted[:4]) if mask[0] else [None] * 4
        return (*grads, None, *(p if want else None for p, want in zip(products, mask[1:])), None)


def _passed_on(ctx: Any, dtotal: torch.Tensor | None) -> list[Any]:
    """Gradients of x, residual and the norm where only the sum was used."""
    if dtotal is None:
        return [None] * 4
    x_dtype, residual = ctx.like
    need_x, need_residual = ctx.needs_input_grad[:2]
    dresidual = dtotal.sum_to_size(residual[0]).to(residual[1]) if need_residual and residual is not None else None
    return [dtotal.to(x_dtype) if need_x else None, dresidual, None, None]
