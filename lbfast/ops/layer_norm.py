"""Layer normalisation over the last axis, with a residual added on the way in."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from lbfast import dispatch
from lbfast.float8 import Float8, to_float8

_PIECE = 1 << 16
"""Numbers of 16 bits whose gradients are summed at a time, in float32: they stay in cache."""


@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = ..., *, impl: str | None = ...
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    keep_total: Literal[True] = ...,
    impl: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = ...,
    *,
    residual: torch.Tensor | None,
    keep_total: Literal[False],
    impl: str | None = ...,
) -> torch.Tensor: ...


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    keep_total: bool = True,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation; with a residual, of the sum, and the sum comes too: both in one pass over memory.

        total = x + residual
        y = (total - total.mean(-1)) / sqrt(total.var(-1, unbiased=False) + eps) * weight + bias

    A temporal embedding (1, T, 1, D) is a residual of x (B, T, N, D): that is the entry of a video layer.
    Kept for the backward: total (x, where there is no residual), and mean and 1/std of each row in float32.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64, any strides.
        weight, bias: (D,), floating point; read in float32 whatever their dtype.
        eps: added to the variance.
        residual: broadcastable to x's shape, floating point.
        keep_total: False where nobody needs the sum: it is neither rounded nor written, and y comes alone.
        impl: "triton" or "torch"; None chooses.

    Returns:
        y, of x's shape and dtype; with a residual (y, total), both of the two dtypes' promotion; without its total y
        alone, of x's dtype.

    Raises:
        TypeError: x, weight, bias or residual is not floating point. ValueError: shapes don't fit.
        RuntimeError: `impl` cannot take these inputs; the message has every reason.

    Source: Ba et al., arXiv 1607.06450.
    """
    _check(x, weight, bias, residual)
    if residual is not None and not keep_total:
        return _without_total(x, weight, bias, eps, residual, impl)
    if not torch.compiler.is_compiling() or dispatch.aten_only():  # a compiled graph chooses when it runs
        impl = dispatch.choose("layer_norm", impl, IMPLEMENTATIONS, x, weight, bias, residual)
        if impl == "torch" and not _sums_in_pieces(x, weight, bias, residual):
            # whose own autograd keeps the same, and costs less than ours around it
            total = x if residual is None else x.contiguous() + residual
            y = _torch_fwd(total, weight, bias, eps)[0]
            return y if residual is None else (y, total)
    if residual is None:
        return torch.ops.lbfast.layer_norm(x, weight, bias, eps, impl)[0]
    y, total, _, _ = torch.ops.lbfast.add_layer_norm(x, residual, weight, bias, eps, impl)
    return y, total


def _without_total(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor, impl: str | None
) -> torch.Tensor:
    tensors = (x, weight, bias, residual)
    traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    if not traced and dispatch.choose("layer_norm", impl, IMPLEMENTATIONS, *tensors) == "triton":
        from lbfast.kernels import layer_norm as kernel

        return kernel.layer_norm_infer(x, residual, weight, bias, eps, keep_total=False, float8=False)[0]
    return layer_norm(x, weight, bias, eps, residual=residual, impl=impl)[0].to(x.dtype)  # whose backward needs the sum


def layer_norm_float8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    keep_total: bool = True,
    impl: str | None = None,
) -> tuple[Float8, torch.Tensor]:
    """The same rounded to rows of float8, for a product; the norm is not rounded before. No autograd.

    Args: as `layer_norm`'s.

    Returns:
        (values e4m3, of x's shape, scales float32 (..., 1)), and total: x itself where there is no sum or none to keep.

    Raises:
        As `layer_norm`.
    """
    _check(x, weight, bias, residual)
    compiling = torch.compiler.is_compiling()
    if not compiling and dispatch.choose("layer_norm", impl, IMPLEMENTATIONS, x, weight, bias, residual) == "triton":
        from lbfast.kernels import layer_norm as kernel

        values, scales, total = kernel.layer_norm_infer(
            x, residual, weight, bias, eps, keep_total=keep_total, float8=True
        )
        return (values, scales), x if total is None else total
    wide = _accumulator(x.dtype)
    given = x if keep_total else x.to(wide)
    total = given if residual is None else given + residual
    y = torch.nn.functional.layer_norm(total.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return to_float8(y), total if keep_total else x


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"layer_norm: {name}: expected a floating dtype, got {tensor.dtype}")
    if x.dim() == 0:
        raise ValueError("layer_norm: x: expected (..., D), got a scalar")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: {name}: expected ({x.shape[-1]},) as x {tuple(x.shape)} has, got {tuple(tensor.shape)}"
            )
    if residual is None:
        return
    fits = residual.dim() <= x.dim() and all(
        mine in (1, theirs) for mine, theirs in zip(reversed(residual.shape), reversed(x.shape))
    )
    if not fits:
        raise ValueError(
            f"layer_norm: residual: expected a shape that broadcasts to x {tuple(x.shape)}, got {tuple(residual.shape)}"
        )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sums_in_pieces(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether the backward has sums that ATen makes in 16 bits."""
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return trained and x.device.type == "cpu" and dtype != _accumulator(dtype)


def _torch_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ATen's layer norm. On the CPU it takes wider weights than x, and then keeps its statistics as wide."""
    dtype = _accumulator(x.dtype) if x.device.type == "cpu" else x.dtype
    return torch.native_layer_norm(x, x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)


def _torch_bwd(
    dy: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    mask: list[bool],
) -> list[torch.Tensor | None]:
    """Gradients of total, weight and bias. ATen sums the latter two in 16 bits on a CPU: there they are summed here."""
    dtype = _accumulator(total.dtype) if total.device.type == "cpu" else total.dtype
    weight, dy = weight.to(dtype), dy.to(total.dtype)
    here = dtype != total.dtype
    theirs = [mask[0], *(False if here else want for want in mask[1:])]
    grads: list[torch.Tensor | None] = [None] * 3
    if any(theirs):
        rows = (dy, total, total.shape[-1:], mean, rstd)
        grads = list(torch.ops.aten.native_layer_norm_backward(*rows, weight, weight, theirs))
    if here and (mask[1] or mask[2]):
        grads[1:] = _sums_over_rows(dy, total, mean, rstd)
    return grads


def _sums_over_rows(
    dy: torch.Tensor, total: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (D,) of weight and bias in float32: sums over a few rows in float32, and of those in float64."""
    d = total.shape[-1]
    dweight, dbias = (torch.zeros(d, dtype=torch.float64) for _ in range(2))
    step = max(1, _PIECE // max(1, d))
    pieces = (t.reshape(t.shape[:-1].numel(), t.shape[-1]).split(step) for t in (dy, total, mean, rstd))
    for dy_p, total_p, mean_p, rstd_p in zip(*pieces):
        dy_p = dy_p.float()
        dbias += dy_p.sum(0)
        dweight += total_p.float().sub_(mean_p).mul_(rstd_p).mul_(dy_p).sum(0)
    return dweight.float(), dbias.float()


# The library ops: what torch.compile and torch.export see. Statistics are (..., 1), as ATen's.

_SIGNATURES = {
    "layer_norm": "(Tensor x, Tensor weight, Tensor bias, float eps, str? impl) -> (Tensor, Tensor, Tensor)",
    "add_layer_norm": "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, str? impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "layer_norm_bwd": "(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "bool[] mask, str? impl) -> (Tensor, Tensor, Tensor)",
}
for _name, _signature in _SIGNATURES.items():
    torch.library.define(f"lbfast::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("lbfast::layer_norm", "CompositeExplicitAutograd")
def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if dispatch.choose("layer_norm", impl, IMPLEMENTATIONS, x, weight, bias, None) == "triton":
        from lbfast.kernels import layer_norm as kernel

        y, _, mean, rstd = kernel.layer_norm_fwd(x, None, weight, bias, eps)
        return y, mean, rstd
    return _torch_fwd(x, weight, bias, eps)


@torch.library.register_fake("lbfast::layer_norm")
def _layer_norm_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, impl: str | None) -> Any:
    statistics = x.new_empty((*x.shape[:-1], 1), dtype=_accumulator(x.dtype))
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@torch.library.impl("lbfast::add_layer_norm", "CompositeExplicitAutograd")
def _add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if dispatch.choose("layer_norm", impl, IMPLEMENTATIONS, x, weight, bias, residual) == "triton":
        from lbfast.kernels import layer_norm as kernel

        return kernel.layer_norm_fwd(x, residual, weight, bias, eps)
    total = x.contiguous() + residual
    y, mean, rstd = _torch_fwd(total, weight, bias, eps)
    return y, total, mean, rstd


@torch.library.register_fake("lbfast::add_layer_norm")
def _add_layer_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, impl: str | None
) -> Any:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    statistics = x.new_empty((*x.shape[:-1], 1), dtype=_accumulator(total.dtype))
    return total, torch.empty_like(total), statistics, torch.empty_like(statistics)


@torch.library.impl("lbfast::layer_norm_bwd", "CompositeExplicitAutograd")
def _layer_norm_bwd(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    mask: list[bool],
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of total, weight and bias; those that `mask` leaves out are empty. dtotal is added to the first."""
    if dispatch.choose("layer_norm", impl, IMPLEMENTATIONS, dy, total, weight, bias) == "triton":
        from lbfast.kernels import layer_norm as kernel

        dx, dweight, dbias = kernel.layer_norm_bwd(dy, dtotal, total, weight, mean, rstd, mask)
    else:
        dx, dweight, dbias = _torch_bwd(dy, total, weight, mean, rstd, mask)
        if dx is not None and dtotal is not None:
            dx = dx.add_(dtotal)
    return (
        total.new_empty(0) if dx is None else dx,
        total.new_empty(0) if dweight is None else dweight.to(weight.dtype),
        total.new_empty(0) if dbias is None else dbias.to(bias.dtype),
    )


@torch.library.register_fake("lbfast::layer_norm_bwd")
def _layer_norm_bwd_fake(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    mask: list[bool],
    impl: str | None,
) -> Any:
    shapes = (total.shape, weight.shape, bias.shape)
    dtypes = (total.dtype, weight.dtype, bias.dtype)
    return tuple(
        total.new_empty(shape, dtype=dtype) if wanted else total.new_empty(0)
        for shape, dtype, wanted in zip(shapes, dtypes, mask)
    )


def _backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None, wanted: list[bool]) -> list[Any]:
    """Gradients of (total, weight, bias), None where not wanted."""
    total, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None:  # only the sum was used
        dy = torch.zeros_like(total)
    grads = torch.ops.lbfast.layer_norm_bwd(dy.contiguous(), dtotal, total, weight, bias, mean, rstd, wanted, ctx.impl)
    return [grad if want else None for grad, want in zip(grads, wanted)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _, impl = inputs
    _, mean, rstd = output
    ctx.impl = impl
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _layer_norm_backward(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 5
    return (*_backward(ctx, dy, None, list(ctx.needs_input_grad[:3])), None, None)


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, bias, _, impl = inputs
    _, total, mean, rstd = output
    ctx.impl = impl
    ctx.shapes = (x.shape, x.dtype), (residual.shape, residual.dtype)
    ctx.save_for_backward(total, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_layer_norm_backward(
    ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    if dy is None and dtotal is None:
        return (None,) * 6
    total: Any
    if dy is None:
        total, dweight, dbias = dtotal, None, None
    else:
        wanted = [needs_x or needs_residual, needs_weight, needs_bias]
        total, dweight, dbias = _backward(ctx, dy, dtotal, wanted)
    (x_shape, x_dtype), (residual_shape, residual_dtype) = ctx.shapes
    dx = total.to(x_dtype) if needs_x else None
    dresidual = None
    if needs_residual:
        dresidual = (total if residual_shape == x_shape else total.sum_to_size(residual_shape)).to(residual_dtype)
    return dx, dresidual, dweight, dbias, None, None


torch.library.register_autograd("lbfast::layer_norm", _layer_norm_backward, setup_context=_setup)
torch.library.register_autograd("lbfast::add_layer_norm", _add_layer_norm_backward, setup_context=_add_setup)


def _why_not_triton(x: torch.Tensor, *others: torch.Tensor | None) -> list[str]:
    reasons = dispatch.why_not_triton(x, *(t for t in others if t is not None))
    if not reasons:
        from lbfast.kernels import layer_norm as kernel

        reasons = kernel.why_not(x)
    return reasons


def _why_not_torch(*_: object) -> list[str]:
    return []


IMPLEMENTATIONS: dict[str, dispatch.Reasons] = {"triton": _why_not_triton, "torch": _why_not_torch}
