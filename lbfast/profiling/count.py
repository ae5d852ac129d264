"""FLOP and bytes of every operator that a call runs, by the operator's name as the profiler writes it.

FLOP are those of matrix products, convolutions and attention; a sum or an activation counts none. Bytes are those of
the tensors that an operator is given and gives back, each once: what a cache saves is not seen. Ops of ours count as
one, with all they do inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TOUCH_NOTHING = {
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


@dataclass
class Work:
    """calls, and the FLOP and bytes of all of them."""

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0


class Counter(TorchDispatchMode):
    """Counts inside a `with` block; `work` maps names ("aten::addmm", "lbfast::mlp") to what they did."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        name = func._schema.name
        if not getattr(func, "is_view", False) and name not in _TOUCH_NOTHING:
            done = self.work.setdefault(name, Work())
            done.calls += 1
            done.flops += _flops(func, args, kwargs, out)
            done.bytes += sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, out)))
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    from torch.utils.flop_counter import flop_registry

    name = func._schema.name
    if name in _FORMULAS:
        return float(_FORMULAS[name](*args, **kwargs, out=out))
    if func._overloadpacket in flop_registry:
        return float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
    return 0.0


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _linear(x: torch.Tensor, *rest: Any, out: torch.Tensor) -> float:
    return 2 * x.numel() * out.shape[-1]


def _mlp(x: torch.Tensor, fc1: torch.Tensor, _b1: Any, fc2: torch.Tensor, *rest: Any, out: Any) -> float:
    return 2 * _rows(x) * (fc1.numel() + fc2.numel())


def _mlp_bwd(
    dout: torch.Tensor, x: torch.Tensor, h: Any, fc1: torch.Tensor, _b1: Any, fc2: torch.Tensor, _act: Any,
    mask: list[bool], *rest: Any, out: Any,
) -> float:  # fmt: skip
    first = mask[0] + mask[1] + (h is None)
    second = mask[3] + any(mask[:3])
    return 2 * _rows(x) * (first * fc1.numel() + second * fc2.numel())


def _patches(pixels: Any, weight: torch.Tensor, *rest: Any, out: torch.Tensor) -> float:
    return 2 * out.shape[0] * (out.shape[1] - 1) * weight.numel()


def _patches_bwd(
    dtokens: torch.Tensor, pixels: Any, weight: torch.Tensor, kept: Any, mean: Any, std: Any, shape: Any,
    mask: list[bool], *rest: Any, out: Any,
) -> float:  # fmt: skip
    return 2 * sum(mask[:2]) * dtokens.shape[0] * (dtokens.shape[1] - 1) * weight.numel()


def _attention(factor: float) -> Callable[..., float]:
    """q (B, N, H, D), k (B, M, H, D), the first tensors of each; causal: half of it."""

    def count(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, out: Any) -> float:
        causal = any(item is True for item in rest)
        return factor * 4 * q.numel() * k.shape[1] / (2 if causal else 1)

    return count


def _heads_first(q: torch.Tensor, k: torch.Tensor, *rest: Any, out: Any, **more: Any) -> float:
    causal = more.get("is_causal", any(item is True for item in rest))
    return 4 * q.numel() * k.shape[-2] / (2 if causal else 1)


def _heads_first_bwd(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any, out: Any, **more: Any) -> float:
    return 2.5 * _heads_first(q, k, *rest, out=out, **more)


def _panels(rows: torch.Tensor, *rest: Any, out: Any) -> float:
    """Weights of `lbfast.tokenwise` that each row is multiplied by: in 6 dimensions, or 7 where three are one."""
    weights = sum(t.numel() // (3 if t.dim() == 7 else 1) for t in _tensors(rest) if t.dim() >= 6)
    return 2 * len(rows) * weights


def _after_grad(count: Callable[..., float]) -> Callable[..., float]:
    return lambda grad, *args, out: count(*args, out=out)


_FORMULAS: dict[str, Callable[..., float]] = {
    "mkldnn::_linear_pointwise": _linear,
    "aten::addmm_": lambda total, a, b, *rest, out, **more: 2 * a.numel() * b.shape[1],
    "aten::_scaled_dot_product_flash_attention_for_cpu": _heads_first,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _heads_first_bwd,
    "lbfast::mlp": _mlp,
    "lbfast::mlp_bwd": _mlp_bwd,
    "lbfast::tokenwise": _panels,
    "lbfast::tokenwise_embed": _panels,
    "lbfast::tokenwise_linear": _panels,
    "lbfast::patch_embed": _patches,
    "lbfast::patch_embed_bwd": _patches_bwd,
    "lbfast::attention_triton": _attention(1),
    "lbfast::attention_triton_bwd": _after_grad(_attention(2.5)),
    "lbfast::attention_native": _attention(1),
    "lbfast::attention_native_bwd": _after_grad(_attention(2.5)),
    "lbfast::temporal_attention_triton": _attention(1),
    "lbfast::temporal_attention_triton_bwd": _after_grad(_attention(2.5)),
    "lbfast::temporal_attention_native": _attention(1),
    "lbfast::temporal_attention_native_bwd": _after_grad(_attention(2.5)),
    "lbfast::info_nce_stats": lambda x, y, *rest, out: 2 * x.numel() * y.shape[0],
    "lbfast::sigmoid_loss_pass": lambda x, y, *rest, out: (
        2 * (1 + sum(part is not None for part in rest[-2:])) * x.numel() * y.shape[0]
    ),
    "lbfast::info_nce_grads": lambda x, y, *rest, out: (6 if rest[6] is None else 4) * x.numel() * y.shape[0],
}
"""Name -> the FLOP of a call. Attention's backward counts two and a half forwards."""
