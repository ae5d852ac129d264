"""Linear layers without gradients, their weights as the machine's products want them."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.torch_version import TorchVersion

from lbfast import tokenwise
from lbfast.float8 import Float8, to_float8
from lbfast.model.plain import ours
from lbfast.ops.mlp import activate_, activate_float8


@ours
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
        self.training = False

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return self._linear(self._rows(x), self.bias).view(*x.shape[:-1], self.out_features)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The same without the bias."""
        return self._linear(self._rows(x), None).view(*x.shape[:-1], self.out_features)

    def activated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """The same as `forward`, then "gelu" or "quick_gelu"."""
        return activate_(self(x), activation)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """total (..., out_features), contiguous, + what `forward` gives: in two terms, for a norm that adds them.

        The product is summed into total, which may be overwritten; what is left to be added is the bias (out_features,)
        here, nothing (None) where the product takes it, or all of it where it can't be summed.
        """
        rows = total.view(-1, self.out_features)
        return rows.addmm_(self._rows(x), self.weight.T).view(total.shape), self.bias

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.in_features).to(self.dtype)

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (M, in_features) -> (M, out_features)."""
        return F.linear(x, self.weight, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = torch.empty(0, dtype=self.dtype, device=self.bias.device)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise RuntimeError(
                f"model: expected to stay {probe.dtype} on {probe.device}, as it was optimized for inference, got "
                f"{moved.dtype} on {moved.device}; move it first"
            )
        return self

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                "train: expected a model with its parameters, got one that was optimized for inference; load it again"
            )
        return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "pickle, deepcopy: expected a model with its parameters, got one that was optimized for inference: its "
            "weights are laid out for this process. Copy it before optimize_for_inference, or load and optimize it "
            "where it is used, as lbfast.Embedder does: a function for other processes takes that, not the model"
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}"


@functools.cache
def _onednn_has_bfloat16() -> bool:
    """Tried: under a limit (ONEDNN_MAX_CPU_ISA) it says so of the machine, and has none."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        x = torch.ones(16, 16, dtype=torch.bfloat16)
        weight = torch.ops.mkldnn._reorder_linear_weight(x)
        return bool((torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "") == 16).all())
    except Exception:
        return False


@ours
class PackedLinear(FrozenLinear):
    """On the CPU, with the weight in the layout of oneDNN's products; the GELU is their end, in float32."""

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether oneDNN has products of this dtype here."""
        if not torch.backends.mkldnn.is_available():
            return False
        return dtype == torch.float32 or (dtype == torch.bfloat16 and _onednn_has_bfloat16())

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias

    def activated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        if activation != "gelu":
            return super().activated(x, activation)
        return self._linear(self._rows(x), self.bias, activation).view(*x.shape[:-1], self.out_features)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = self._rows(x)
        if len(rows):
            terms = (rows, total.view(-1, self.out_features), self.weight, self.bias)
            total = torch.ops.mkldnn._linear_pointwise(*terms, "add").view(total.shape)
        return total, None

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None, end: str = "none") -> torch.Tensor:
        if not len(x):
            return x.new_empty(0, self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, end, [], "none" if end == "gelu" else "")


@ours
class PanelLinear(FrozenLinear):
    """On the CPU, in panels of our own, as `tokenwise` has them: of int8, or of the layers' dtype.

    Args:
        layers: nn.Linear, of one input.
        weights: int8, bfloat16 or float32.
        chunk: inputs that share a scale: see `tokenwise.product`.
        room: where the panels go.
    """

    def __init__(
        self,
        *layers: nn.Linear,
        weights: torch.dtype,
        chunk: int | None = None,
        room: tokenwise.Room | None = None,
    ):
        self._laid = (weights, chunk, room)
        super().__init__(*layers)
        del self._laid

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.register_buffer("bias", bias)
        self.parts = tokenwise.product(weight, bias, *self._laid)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = self._rows(x).to(total.dtype)
        return total + self._linear(rows, self.bias.to(total.dtype)).view(total.shape), None

    def activated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        if _wants_gradients(x):
            return super().activated(x, activation)
        rows = tokenwise.linear(self._rows(x), self.parts, self.out_features, activation)
        return rows.view(*x.shape[:-1], self.out_features)

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if _wants_gradients(x):  # of its input: slowly
            return F.linear(x, tokenwise.weight_of(self.parts, self.out_features, self.in_features).to(x.dtype), bias)
        parts = self.parts if bias is not None else [self.parts[0], torch.zeros_like(self.parts[1]), *self.parts[2:]]
        return tokenwise.linear(x, parts, self.out_features)


@ours
class Float8Linear(FrozenLinear):
    """Inputs and weight in float8 e4m3, each row with its scale; sums in float32, results in bfloat16.

    Inputs may come as `ops.layer_norm_float8` or `activated` leave them: (values, scales).
    """

    scales: torch.Tensor

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        values, scales = to_float8(weight)
        self.register_buffer("weight", values)
        self.register_buffer("scales", scales.T)
        self.register_buffer("bias", bias.bfloat16())  # as the product takes it

    def forward(self, x: torch.Tensor | Float8) -> torch.Tensor:
        return self._product(x, self.bias)

    def product(self, x: torch.Tensor | Float8) -> torch.Tensor:
        return self._product(x, None)

    def activated(self, x: torch.Tensor | Float8, activation: str) -> Float8:  # type: ignore[override]
        """As the next Float8Linear takes it."""
        return activate_float8(self(x), activation)

    def add_to(self, total: torch.Tensor, x: torch.Tensor | Float8) -> tuple[torch.Tensor, torch.Tensor | None]:
        return total, self(x)

    def _product(self, x: torch.Tensor | Float8, bias: torch.Tensor | None) -> torch.Tensor:
        values, scales = activate_float8(x, "none") if isinstance(x, torch.Tensor) else x
        shape = (*values.shape[:-1], self.out_features)
        values, scales = values.reshape(-1, self.in_features), scales.reshape(-1, 1)
        if values.is_cuda:
            y = torch._scaled_mm(
                values, self.weight.T, scales, self.scales, bias, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        else:  # emulated: PyTorch 2.11's takes no scale a row there
            y = F.linear(values.float(), self.weight.float()) * scales * self.scales
            y = (y if bias is None else y + bias).bfloat16()
        return y.to(self.dtype).view(shape)


class Freezable(nn.Module):
    """A model whose Linears may become frozen: what these refuse is refused before any part has changed."""

    def train(self, mode: bool = True) -> Any:
        for module in self._frozen() if mode else ():
            module.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for module in self._frozen():
            module._apply(fn)
        return super()._apply(fn, recurse)

    def _frozen(self) -> list[FrozenLinear]:
        return [module for module in self.modules() if isinstance(module, FrozenLinear)]


def check_float8(device: torch.device) -> None:
    """Raises RuntimeError where a device has no float8 products with a scale a row, or wrong ones."""
    if device.type != "cuda":
        return  # emulated
    if torch.version.hip:
        raise RuntimeError("precision: fp8 needs an NVIDIA GPU; AMD's float8 products are another format's")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise RuntimeError(f"precision: fp8 needs a GPU of compute capability 8.9 or later, got {device}")
    if capability == (8, 9) and torch.__version__ < TorchVersion("2.12"):
        raise RuntimeError(
            f"precision: fp8 on a GPU of compute capability 8.9 needs PyTorch 2.12 or later, got {torch.__version__}, "
            "whose product ignores the current stream (pytorch issue 177651)"
        )


def _wants_gradients(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def check_int8(device: torch.device, pack: bool) -> None:
    """Raises where int8 products are not for a device; `tokenwise.why_not` says what a CPU lacks."""
    if device.type != "cpu":
        raise RuntimeError(f"precision: int8 is for CPUs, got a model on {device}; fp8 is for GPUs")
    if not pack:
        raise ValueError("pack_weights: expected True with precision int8, whose weights are laid out, got False")


def _no_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError("state_dict: the weights were laid out for inference; save before optimize_for_inference")
