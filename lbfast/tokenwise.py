"""What an encoder does to each token by itself, between two attentions, on a CPU: native, frozen, in one pass.

    total += attended @ out.T + b
    total += act(norm(total) @ fc1.T + b1) @ fc2.T + b2
    total += constant of the token's frame
    result = norm(total) @ reader.T + b

Weights are laid out in panels of 32 outputs, in steps of 64 bytes of inputs: int8 with a scale for each output, or
bfloat16, or float32. Inputs of int8 products become 8 bits as they are made, with a scale and an offset for each token
(inside the MLP for each CHUNK of it). Kernels: AMX, AVX-512 (VNNI, bfloat16), AVX2 (AVX-VNNI).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lbfast import dispatch

COLUMNS, STEP, CHUNK = 32, 64, 1024
"""Outputs of a panel, bytes of a step, the MLP's inner features at a time."""

Product = list[torch.Tensor]
"""Panels (panels, steps, 2, 16, 16, 4 bytes) and bias; of int8 also scales, and scale * sum of each chunk of inputs."""

torch.library.define(
    "lbfast::tokenwise",
    "(Tensor(a!) total, Tensor? attended, Tensor[] out, Tensor[] mlp, Tensor? constant, int per_frame, "
    'Tensor[] reader, Tensor(b!)? result, str activation, float eps, str kernel="") -> ()',
)
torch.library.define(
    "lbfast::tokenwise_linear",
    '(Tensor x, Tensor[] product, str activation, Tensor(a!) result, str kernel="") -> ()',
)
torch.library.define("lbfast::tokenwise_kernels", "(ScalarType dtype) -> str[]")
torch.library.define("lbfast::large_pages", "(int bytes) -> Tensor")


def why_not(width: int, inner: int, dtype: torch.dtype) -> list[str]:
    """Reasons why spans of this width and inner width of the MLP can't run here with weights of a dtype."""
    reasons = dispatch.why_not_native()
    if not reasons and not kernels(dtype):
        needs = {torch.int8: "AMX, AVX512-VNNI or AVX-VNNI", torch.bfloat16: "AMX or AVX512-bf16"}
        reasons = [f"this CPU has no {needs.get(dtype, 'vector')} instructions"]
    if width % 16 or inner % 32:
        reasons.append(f"expected hidden_size a multiple of 16 and intermediate_size of 32, got {width} and {inner}")
    return reasons


def kernels(dtype: torch.dtype) -> list[str]:
    """The native kernels of int8, bfloat16 or float32 weights that run on this CPU, best first; none where none do."""
    if dispatch.why_not_native():
        return []
    return list(torch.ops.lbfast.tokenwise_kernels(dtype))


def padded(features: int) -> int:
    """A number of outputs as panels have it."""
    return -(-features // COLUMNS) * COLUMNS


class Room:
    """A buffer on large pages that panels are laid into one after another: a page of 4 KiB each would cost twice."""

    def __init__(self, size: int):
        self.buffer = torch.ops.lbfast.large_pages(size)
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self.used + size > len(self.buffer):
            raise ValueError(f"expected at most {len(self.buffer) - self.used} bytes more, got {size}")
        taken = self.buffer[self.used : self.used + size].view(dtype).view(shape)
        self.used += size
        return taken


def panel_bytes(outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """What the panels of a weight (outputs, inputs) take."""
    return padded(outputs) * -(-inputs * dtype.itemsize // STEP) * STEP


def panels(weight: torch.Tensor, room: Room | None = None) -> torch.Tensor:
    """weight (N, K), int8, bfloat16 or float32, in panels; the last panel and step filled up with 0."""
    count, width = weight.shape
    word = 4 // weight.element_size()
    steps = -(-width * weight.element_size() // STEP)
    whole = weight.new_zeros(padded(count), steps * 16 * word)
    whole[:count, :width] = weight
    laid = whole.view(-1, 2, 16, steps, 16, word).permute(0, 3, 1, 4, 2, 5)  # panel, step, half, word, output, number
    if room is None:
        return laid.contiguous()
    return room.take(tuple(laid.shape), laid.dtype).copy_(laid)


def product(
    weight: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
    chunk: int | None = None,
    room: Room | None = None,
) -> Product:
    """A linear layer's weight (N, K) and bias (N,), floating point, for products of int8, bfloat16 or float32.

    `chunk`: inputs that share a scale; None: all; CHUNK for the second of an MLP. `room`: where the panels go.
    """
    ends = weight.new_zeros(padded(len(weight)), dtype=torch.float32)
    ends[: len(bias)] = bias
    if dtype != torch.int8:
        return [panels(weight.to(dtype), room), ends]
    values, scales = to_int8(weight)
    factors = torch.zeros_like(ends)
    factors[: len(scales)] = scales
    chunks = values.split(chunk or values.shape[1], dim=1)
    shifts = torch.zeros(len(chunks), len(ends))
    for row, part in zip(shifts, chunks):
        row[: len(part)] = scales * torch.sum(part, 1, dtype=torch.int32)
    return [panels(values, room), ends, factors, shifts]


def weight_of(layer: Product, outputs: int, inputs: int) -> torch.Tensor:
    """The weight (outputs, inputs) that a product's panels stand for; of int8 in float32."""
    rows = layer[0].permute(0, 2, 4, 1, 3, 5).reshape(padded(outputs), -1)[:outputs, :inputs]
    return rows * layer[2][:outputs, None] if len(layer) == 4 else rows


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) as int8 -127..127 and scales (N,) float32, whose products it stands for."""
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return (wide / scales[:, None]).round().to(torch.int8), scales


def run(
    total: torch.Tensor,
    *,
    attended: torch.Tensor | None = None,
    out: Product | None = None,
    mlp: Sequence[torch.Tensor] = (),
    constant: torch.Tensor | None = None,
    per_frame: int = 1,
    reader: Sequence[torch.Tensor] = (),
    result: torch.Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-5,
    kernel: str = "",
) -> None:
    """Runs a span over tokens; parts that are not given are left out.

    Args:
        total: (tokens, D) float32, contiguous; the running sum, changed in place. D is a multiple of 16, the MLP's
            inner width of 32.
        attended, out: (tokens, D) float32 or bfloat16, what the attention before hands over; its product.
        mlp: weight and bias (D,) float32 of its norm, then the products fc1 and fc2.
        constant: (T, D) float32, added to the tokens of frame t, `per_frame` of them adjacent, frames in turn.
        reader, result: weight and bias (D,) of a norm and the product that reads it; (tokens, N) of attended's dtype,
            overwritten.
        activation: "gelu" or "quick_gelu".
        kernel: one of `kernels` of the weights' dtype; "" the best.

    Raises RuntimeError where a shape, a dtype or the CPU does not fit.
    """
    torch.ops.lbfast.tokenwise(
        total, attended, out or [], list(mlp), constant, per_frame, list(reader), result, activation, eps, kernel
    )


def linear(x: torch.Tensor, layer: Product, outputs: int, activation: str = "none", kernel: str = "") -> torch.Tensor:
    """act(x @ weight.T + bias) by itself: x (M, K), float32 or bfloat16, rows dense -> (M, outputs), of x's dtype.

    activation: "none", "gelu" or "quick_gelu". Raises as `run`.
    """
    if len(layer) == 4:  # the second of an MLP, whose inputs are of one scale here
        layer = [*layer[:3], layer[3].sum(0, keepdim=True)]
    result = x.new_empty(len(x), outputs)
    torch.ops.lbfast.tokenwise_linear(x, layer, activation, result, kernel)
    return result
