"""The two-layer perceptron of a transformer layer, keeping little for its backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lbfast import dispatch
from lbfast.float8 import Float8, to_float8
from lbfast.products import linear, product

ACTIVATIONS = ("gelu", "quick_gelu")
_QUICK = 1.702


def mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    *,
    activation: str = "gelu",
    recompute: bool = True,
    impl: str | None = None,
) -> torch.Tensor:
    """Two linear layers with an activation between.

        h = x @ fc1_weight.T + fc1_bias
        out = act(h) @ fc2_weight.T + fc2_bias        act(h) = h * Phi(h), or h * sigmoid(1.702 h)

    Kept for the backward: x; h and act(h) are computed again, h for one more matrix product in a training step's six:
    h is four times as large as anything else that a layer keeps. Without `recompute`, x and h. Where no input requires
    a gradient, act(h) overwrites h.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64; inside autocast, cast to its dtype, as the weights are.
        fc1_weight, fc1_bias: (F, D), (F,), of x's dtype.
        fc2_weight, fc2_bias: (E, F), (E,), of x's dtype.
        activation: "gelu" (by erf) or "quick_gelu".
        recompute: compute h again in the backward instead of keeping it.
        impl: "triton" or "torch": what runs the activation, and its backward with fc1_bias's gradient. The matrix
            products are the library's. None chooses.

    Returns:
        (..., E), of x's dtype.

    Raises:
        TypeError: dtypes differ or are not floating point. ValueError: shapes don't fit, or an unknown activation.
        RuntimeError: `impl` cannot take these inputs; the message has every reason.

    Source: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    dtype = dispatch.autocast_dtype(x.device)
    if dtype is not None:
        tensors = tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)  # type: ignore[assignment]
    _check(*tensors, activation)
    if dispatch.aten_only() and impl in (None, "torch"):
        return F.linear(_activate(F.linear(tensors[0], *tensors[1:3]), activation), *tensors[3:])
    if not torch.compiler.is_compiling():  # a compiled graph chooses when it runs
        impl = dispatch.choose("mlp", impl, IMPLEMENTATIONS, *tensors)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return torch.ops.lbfast.mlp(*tensors, activation, training and not recompute, impl)[0]


def _check(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    activation: str,
) -> None:
    _check_activation(activation)
    if x.dim() == 0 or fc1_weight.dim() != 2 or fc1_weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"mlp: fc1_weight: expected (F, D) with D of x {tuple(x.shape)}, got {tuple(fc1_weight.shape)}"
        )
    if fc2_weight.dim() != 2 or fc2_weight.shape[1] != fc1_weight.shape[0]:
        raise ValueError(
            f"mlp: fc2_weight: expected (E, F) with F of fc1_weight {tuple(fc1_weight.shape)}, "
            f"got {tuple(fc2_weight.shape)}"
        )
    for name, bias, rows in (("fc1_bias", fc1_bias, fc1_weight), ("fc2_bias", fc2_bias, fc2_weight)):
        if bias.shape != rows.shape[:1]:
            raise ValueError(f"mlp: {name}: expected ({rows.shape[0]},), got {tuple(bias.shape)}")
    dtypes = {t.dtype for t in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)}
    if len(dtypes) != 1 or not x.is_floating_point():
        raise TypeError(f"mlp: expected x, weights and biases of one floating dtype, got {sorted(map(str, dtypes))}")


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def activate_(h: torch.Tensor, activation: str, impl: str | None = None) -> torch.Tensor:
    """act(h) over h, contiguous, in one pass; with gradients, and in a compiled graph, which fuses it, out of place.

    Raises ValueError for an unknown activation, RuntimeError where `impl` cannot take h.
    """
    _check_activation(activation)
    if torch.compiler.is_compiling() or h.requires_grad:
        return _activate(h, activation)
    if dispatch.choose("mlp", impl, IMPLEMENTATIONS, h) == "triton":
        from lbfast.kernels import mlp as kernel

        return kernel.activation_fwd(h, activation, in_place=True)
    return _activate(h, activation, out=h)


def activate_float8(h: torch.Tensor, activation: str, impl: str | None = None) -> Float8:
    """act(h), or h itself for "none", rounded to rows of float8 for a product, in one pass: h (..., F). No autograd.

    Raises as `activate_`.
    """
    if activation != "none":
        _check_activation(activation)
    if not torch.compiler.is_compiling() and dispatch.choose("mlp", impl, IMPLEMENTATIONS, h) == "triton":
        from lbfast.kernels import mlp as kernel

        return kernel.activation_float8(h, activation)
    return to_float8(h if activation == "none" else _activate(h.float(), activation))


def _activate(h: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """act(h), into `out` (which may be h) where given."""
    if activation == "gelu":
        return torch.ops.aten.gelu.out(h, out=out) if out is not None else F.gelu(h)
    gate = torch.sigmoid(_QUICK * h)
    return torch.mul(h, gate, out=gate if out is None else out)


def _activate_bwd(da: torch.Tensor, h: torch.Tensor, activation: str) -> torch.Tensor:
    """da * act'(h)."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da, h)
    return torch.ops.aten.silu_backward(da, _QUICK * h)  # h sigmoid(1.702 h) = silu(1.702 h) / 1.702


# The library ops: what torch.compile and torch.export see.

torch.library.define(
    "lbfast::mlp",
    "(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, str activation, bool keep_h, "
    "str? impl) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "lbfast::mlp_bwd",
    "(Tensor dout, Tensor x, Tensor? h, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, str activation, "
    "bool[] mask, str? impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("lbfast::mlp", "CompositeExplicitAutograd")
def _mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    activation: str,
    keep_h: bool,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out and h (M, F) for the M rows of x; h is empty unless `keep_h`."""
    chosen = dispatch.choose("mlp", impl, IMPLEMENTATIONS, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    h = linear(x.reshape(-1, x.shape[-1]), fc1_weight, fc1_bias)
    if chosen == "triton":
        from lbfast.kernels import mlp as kernel

        a = kernel.activation_fwd(h, activation, in_place=not keep_h)
    else:
        a = _activate(h, activation, out=None if keep_h else h)
    out = linear(a, fc2_weight, fc2_bias).view(*x.shape[:-1], len(fc2_weight))
    return out, h if keep_h else x.new_empty(0)


@torch.library.register_fake("lbfast::mlp")
def _mlp_fake(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    activation: str,
    keep_h: bool,
    impl: str | None,
) -> Any:
    out = x.new_empty((*x.shape[:-1], fc2_weight.shape[0]))
    return out, x.new_empty((x.shape[:-1].numel(), fc1_weight.shape[0])) if keep_h else x.new_empty(0)


@torch.library.impl("lbfast::mlp_bwd", "CompositeExplicitAutograd")
def _mlp_bwd(
    dout: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    activation: str,
    mask: list[bool],
    impl: str | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x and the four parameters; those that `mask` leaves out are empty."""
    need_x, need_w1, need_b1, need_w2, need_b2 = mask
    none = [x.new_empty(0) for _ in mask]
    dx, dw1, db1, dw2, db2 = none
    dout2 = dout.reshape(-1, dout.shape[-1])
    if need_b2:
        db2 = dout2.sum(0)
    if need_x or need_w1 or need_b1 or need_w2:
        x2 = x.reshape(-1, x.shape[-1])
        h2 = linear(x2, fc1_weight, fc1_bias) if h is None else h
        da = product(dout2, fc2_weight) if need_x or need_w1 or need_b1 else None
        chosen = dispatch.choose("mlp", impl, IMPLEMENTATIONS, dout, x, fc1_weight, fc2_weight)
        if chosen == "triton" and da is not None:
            from lbfast.kernels import mlp as kernel

            dh, a, db1 = kernel.activation_bwd(da, h2, activation, need_a=need_w2, need_bias=need_b1)
        else:
            a = _activate(h2, activation) if need_w2 else None
            dh = _activate_bwd(da, h2, activation) if da is not None else None
            if need_b1 and dh is not None:
                db1 = dh.sum(0)
        if need_w2:
            dw2 = product(dout2.T, a)
        if need_w1:
            dw1 = product(dh.T, x2)
        if need_x:
            dx = product(dh, fc1_weight).reshape(x.shape)
    return dx, dw1, db1, dw2, db2


@torch.library.register_fake("lbfast::mlp_bwd")
def _mlp_bwd_fake(
    dout: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    activation: str,
    mask: list[bool],
    impl: str | None,
) -> Any:
    shapes = (x.shape, fc1_weight.shape, fc1_bias.shape, fc2_weight.shape, fc2_weight.shape[:1])
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, mask))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, fc1_weight, fc1_bias, fc2_weight, _, ctx.activation, keep_h, ctx.impl = inputs
    _, h = output
    ctx.save_for_backward(x, h if keep_h else None, fc1_weight, fc1_bias, fc2_weight)
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:5])
    x, h, fc1_weight, fc1_bias, fc2_weight = ctx.saved_tensors
    grads = torch.ops.lbfast.mlp_bwd(dout, x, h, fc1_weight, fc1_bias, fc2_weight, ctx.activation, wanted, ctx.impl)
    return (*(grad if want else None for grad, want in zip(grads, wanted)), None, None, None)


torch.library.register_autograd("lbfast::mlp", _backward, setup_context=_setup)


def _why_not_torch(*_: object) -> list[str]:
    return []


IMPLEMENTATIONS: dict[str, dispatch.Reasons] = {"triton": dispatch.why_not_triton, "torch": _why_not_torch}
