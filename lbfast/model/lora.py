"""Low-rank adapters: linear layers with them, where upstream puts them, and merging them into the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lbfast import dispatch
from lbfast.model.plain import ours, plain
from lbfast.products import linear, product


@ours
class LoraLinear(nn.Linear):
    """y = x W^T + b + (alpha / r) B A dropout(x), with W and b frozen until asked otherwise.

    Args:
        in_features, out_features, bias: as of nn.Linear.
        r: rank, >= 1.
        alpha: numerator of the factor of the adapter.
        dropout: probability applied to the adapter's input in training.

    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, alpha: float, dropout: float = 0.0, bias: bool = True
    ):
        super().__init__(in_features, out_features, bias=bias)
        if r < 1:
            raise ValueError(f"r: expected a rank of at least 1, got {r}")
        self.scaling = alpha / r
        self.dropout = dropout
        self.lora_A = nn.Linear(in_features, r, bias=False)
        self.lora_B = nn.Linear(r, out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        parameters = [self.weight, self.bias, self.lora_A.weight, self.lora_B.weight]
        # a compiler fuses the parts, and cannot trace a seed
        if torch.compiler.is_compiling() or not plain(self.lora_A, self.lora_B):
            h = self.lora_A(F.dropout(x, dropout, self.training))
            return F.linear(x, self.weight, self.bias) + self.lora_B(h) * self.scaling
        dtype = dispatch.autocast_dtype(x.device)
        if dtype is not None and x.dtype != torch.float64:
            x, parameters = x.to(dtype), [None if t is None else t.to(dtype) for t in parameters]
        return _LoraLinear.apply(x, *parameters, self.scaling, dropout)

    def merged_weight(self) -> torch.Tensor:
        """W + (alpha / r) B A, summed in at least float32, in W's dtype."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
        return (self.weight.to(wide) + self.scaling * delta).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.lora_A.out_features}, scaling={self.scaling:g}"


class _LoraLinear(torch.autograd.Function):
    """Keeps x, which other readers share, and A dropout(x); what dropout left of x is drawn again from its seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.seed = int(torch.randint(2**62, ())) if dropout else 0
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            mask = _mask(rows, ctx.dropout, ctx.seed)
            h = linear(rows if mask is None else rows * mask, a)
            out = linear(h, b * scaling, plus=linear(rows, weight, bias))
        ctx.save_for_backward(x, weight, a, b, h)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        x, weight, a, b, h = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dout, rows = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
        mask = _mask(rows, ctx.dropout, ctx.seed) if need_x or need_a else None
        dh = product(dout, b * ctx.scaling)
        dx = None
        if need_x:
            dx = product(dout, weight)
            dx = linear(dh, a.T, plus=dx) if mask is None else dx.addcmul_(product(dh, a), mask)
            dx = dx.view(x.shape)
        return (
            dx,
            product(dout.T, rows) if need_weight else None,
            dout.sum(0) if need_bias else None,
            product(dh.T, rows if mask is None else rows * mask) if need_a else None,
            product(dout.T, h).mul_(ctx.scaling) if need_b else None,
            None,
            None,
        )


def _mask(rows: torch.Tensor, dropout: float, seed: int) -> torch.Tensor | None:
    """What dropout multiplies rows by: 0, or 1 / (1 - dropout)."""
    if not dropout:
        return None
    generator = torch.Generator(rows.device).manual_seed(seed)
    return torch.empty_like(rows).bernoulli_(1 - dropout, generator=generator).mul_(1 / (1 - dropout))


_SPATIAL = ("q_proj", "k_proj", "v_proj", "out_proj")
_TEMPORAL = (*(f"temporal_attn.{name}" for name in _SPATIAL), "temporal_mlp.fc1", "temporal_mlp.fc2")


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def add_lora(encoder: nn.Module, r: int, alpha: float, dropout: float, add_time_attn: bool) -> None:
    """Puts adapters where upstream does and freezes all else in `encoder`.

    With temporal attention only that (and the temporal MLP) is adapted, otherwise every attention projection.
    """
    encoder.requires_grad_(False)
    targets = _TEMPORAL if add_time_attn else _SPATIAL
    for name, module in list(encoder.named_modules()):
        if type(module) is nn.Linear and name.endswith(targets):
            with torch.device(module.weight.device):
                adapted = LoraLinear(
                    module.in_features, module.out_features, r, alpha, dropout, bias=module.bias is not None
                )
            adapted.weight, adapted.bias = module.weight, module.bias
            _replace(encoder, name, adapted.to(module.weight.dtype).train(module.training))


def lora_modules(root: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers of `root`, with their names."""
    for name, module in root.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def merge_lora(root: nn.Module) -> int:
    """Adds every adapter of `root` into its weight, in place, and leaves plain linear layers. Returns how many."""
    adapted = list(lora_modules(root))
    for name, module in adapted:
        with torch.no_grad(), torch.device("meta"):
            merged = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        merged.weight = nn.Parameter(module.merged_weight().detach())
        if module.bias is not None:
            merged.bias = nn.Parameter(module.bias.detach())
        _replace(root, name, merged.train(module.training))
    return len(adapted)
