"""Linear layers without gradients, their weights as the machine's products want them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_LARGEST = 448.0


class FrozenLinear(nn.Module):
    """Linear layers of one input as one product, without gradients; the rows of their weights follow each other."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self.dtype = layers[0].weight.dtype
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = torch.cat([cast(torch.Tensor, layer.bias).detach() for layer in layers])
        self._hold(weight, bias)
        self.register_state_dict_pre_hook(_no_state)

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return self.activated(x, "none")

    def activated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """The same, then "gelu", "quick_gelu" or "none"."""
        y = self._product(x.reshape(-1, self.in_features).to(self.dtype), activation == "gelu")
        if activation == "quick_gelu":
            y = y * torch.sigmoid(1.702 * y)
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        """x (M, in_features) -> (M, out_features)."""
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = torch.empty(0, dtype=self.dtype, device=self.bias.device)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise RuntimeError(
                f"model: expected to stay {probe.dtype} on {probe.device}, as it was optimized for inference, got "
                f"{moved.dtype} on {moved.device}; move it first"
            )
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}"


class PackedLinear(FrozenLinear):
    """On the CPU, with the weight in the layout of oneDNN's products; the GELU is their end, in float32."""

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether oneDNN has products of this dtype here."""
        if not torch.backends.mkldnn.is_available():
            return False
        return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias

    def _product(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        attribute, algorithm = ("gelu", "none") if gelu else ("none", "")
        if not len(x):
            return x.new_empty(0, self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attribute, [], algorithm)


class Float8Linear(FrozenLinear):
    """Inputs and weight in float8 e4m3, each row with its scale; sums in float32, results in bfloat16."""

    scales: torch.Tensor

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        values, scales = _to_float8(weight)
        self.register_buffer("weight", values)
        self.register_buffer("scales", scales.T)
        self.register_buffer("bias", bias)

    def _product(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        values, scales = _to_float8(x)
        if x.is_cuda:
            y = torch._scaled_mm(values, self.weight.T, scale_a=scales, scale_b=self.scales, out_dtype=torch.bfloat16)
        else:  # emulated: PyTorch 2.11's takes no scale a row there
            y = (F.linear(values.float(), self.weight.float()) * scales * self.scales).bfloat16()
        y = y.to(self.dtype) + self.bias
        return F.gelu(y) if gelu else y


def _to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) -> e4m3 (M, K) and float32 (M, 1), whose product is x, rounded; the largest of a row takes 448."""
    scales = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / _FLOAT8_LARGEST
    return (x.float() / scales).to(_FLOAT8), scales


def _no_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError("state_dict: the weights were laid out for inference; save before optimize_for_inference")
