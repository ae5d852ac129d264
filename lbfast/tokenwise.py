"""What an encoder does to each token by itself, between two attentions, on a CPU: native, frozen, in one pass.

    total += attended @ out.T + b
    total += act(norm(total) @ fc1.T + b1) @ fc2.T + b2
    total += constant of the token's frame
    result = norm(total) @ reader.T + b

Weights are laid out in panels of 32 outputs, in steps of 64 bytes of inputs: int8 with a scale for each output, or
bfloat16, or float32. Inputs of int8 products become 8 bits as they are made, with a scale and an offset for each token
(inside the MLP for each CHUNK of it). Kernels: AMX, AVX-512 (VNNI, bfloat16), AVX2 (AVX-VNNI).

AMX multiplies float32 as three numbers of bfloat16 each, in six products, with the error of float32's own sums: see
csrc/cpu/panels.h. Weights take 6 bytes each then; outputs and tokens have a power of two as their scale, so that
numbers of any size keep their digits (inside the MLP they have none: above 3.3e38 they are infinite there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lbfast import dispatch

COLUMNS, STEP, CHUNK = 32, 64, 1024
"""Outputs of a panel, bytes of a step, the MLP's inner features that share a scale of 8 bits."""

BLOCK = 4 * COLUMNS
"""Outputs that are laid out at a time: copies of so many stay in the cache."""

Product = list[torch.Tensor]
"""Panels (panels, steps, 2, 16, 16, 4 bytes) and bias; of int8 also scales, and scale * sum of each chunk of inputs.

float32 for AMX: panels (panels, steps, 3, 2, 16, 16, 2) of bfloat16, bias and scales."""

torch.library.define(
    "lbfast::tokenwise",
    "(Tensor(a!) total, Tensor? attended, Tensor[] out, Tensor[] mlp, Tensor? constant, int per_frame, "
    'Tensor[] reader, Tensor(b!)? result, str activation, float eps, str kernel="") -> ()',
)
torch.library.define(
    "lbfast::tokenwise_linear",
    '(Tensor x, Tensor[] product, str activation, Tensor(a!) result, str kernel="") -> ()',
)
torch.library.define(
    "lbfast::tokenwise_embed",
    "(Tensor patches, Tensor[] product, Tensor positions, Tensor[] norm, Tensor(a!) total, float eps, "
    'str kernel="") -> ()',
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


def in_thirds(dtype: torch.dtype, kernel: str = "") -> bool:
    """Whether weights of a dtype are laid out as three bfloat16 each, for a kernel; "": the best."""
    return dtype == torch.float32 and (kernel or next(iter(kernels(dtype)), "")) == "amx"


def panel_bytes(outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """What the panels of a weight (outputs, inputs) take."""
    thirds = in_thirds(dtype)
    size = 2 if thirds else dtype.itemsize
    return padded(outputs) * -(-inputs * size // STEP) * STEP * (3 if thirds else 1)


def panels(weight: torch.Tensor, room: Room | None = None, scales: torch.Tensor | None = None) -> torch.Tensor:
    """weight (N, K), int8, bfloat16 or float32, in panels; the last panel and step filled up with 0.

    With `scales` (N,), powers of two: the thirds of weight / scales.
    """
    count, width = weight.shape
    dtype, thirds = (weight.dtype, 1) if scales is None else (torch.bfloat16, 3)
    word = 4 // dtype.itemsize
    steps = -(-width * dtype.itemsize // STEP)
    shape = (padded(count) // COLUMNS, steps, thirds, 2, 16, 16, word)
    laid = torch.empty(shape, dtype=dtype) if room is None else room.take(shape, dtype)
    for first in range(0, count, BLOCK):
        rows = weight[first : first + BLOCK]
        rows = rows[None] if scales is None else to_thirds(rows / scales[first : first + BLOCK, None])
        whole = F.pad(rows, (0, steps * 16 * word - width, 0, padded(rows.shape[1]) - rows.shape[1])).contiguous()
        words = whole.view(torch.int32).view(thirds, -1, 2, 16, steps, 16).permute(1, 4, 0, 2, 5, 3)
        laid[first // COLUMNS :][: len(words)].flatten(-2).view(torch.int32).copy_(words)
    return laid if scales is not None else laid.squeeze(2)


def product(
    weight: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
    chunk: int | None = None,
    room: Room | None = None,
    kernel: str = "",
) -> Product:
    """A linear layer's weight (N, K) and bias (N,), floating point, for products of int8, bfloat16 or float32.

    `chunk`: inputs that share a scale; None: all; CHUNK for the second of an MLP. `room`: where the panels go.
    `kernel`: what they are laid out for; "" the best.
    """

    def filled_up(values: torch.Tensor) -> torch.Tensor:
        return F.pad(values.float(), (0, padded(len(weight)) - len(weight)))

    ends = filled_up(bias)
    if dtype == torch.int8:
        values, scales = to_int8(weight)
        chunks = values.split(chunk or values.shape[1], dim=1)
        shifts = torch.stack([filled_up(scales * torch.sum(part, 1, dtype=torch.int32)) for part in chunks])
        return [panels(values, room), ends, filled_up(scales), shifts]
    if in_thirds(dtype, kernel):
        scales = powers_of_two(weight)
        return [panels(weight.float(), room, scales), ends, filled_up(scales)]
    return [panels(weight.to(dtype), room), ends]


def weight_of(layer: Product, outputs: int, inputs: int) -> torch.Tensor:
    """The weight (outputs, inputs) that a product's panels stand for; of int8 and thirds in float32."""
    laid = layer[0] if layer[0].ndim == 7 else layer[0].unsqueeze(2)
    rows, *rest = laid.permute(2, 0, 3, 5, 1, 4, 6).reshape(laid.shape[2], padded(outputs), -1)[:, :outputs, :inputs]
    for part in rest:
        rows = rows.float() + part
    return rows * layer[2][:outputs, None] if len(layer) > 2 else rows


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) as int8 -127..127 and scales (N,) float32, whose products it stands for."""
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return (wide / scales[:, None]).round().to(torch.int8), scales


def powers_of_two(weight: torch.Tensor) -> torch.Tensor:
    """Scales (N,) float32 of weight (N, K), whose largest numbers they leave between 1 and 2; 2^-60 to 2^60."""
    exponents = torch.frexp(weight.float().abs().amax(1)).exponent - 1
    return torch.ldexp(torch.ones(len(weight)), exponents.clamp(-60, 60))


def to_thirds(x: torch.Tensor) -> torch.Tensor:
    """x (N, K) float32, below 3.3e38, as three bfloat16 each, (3, N, K), whose sum it is."""
    thirds = torch.empty(3, *x.shape, dtype=torch.bfloat16)
    rest = x.clone()
    for third in thirds:
        third.copy_(rest)
        rest -= third
    return thirds


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


def embed(
    patches: torch.Tensor,
    layer: Product,
    positions: torch.Tensor,
    norm: Sequence[torch.Tensor],
    eps: float = 1e-5,
    kernel: str = "",
) -> torch.Tensor:
    """norm(patches @ weight.T + bias + positions): patches (M, K), float32 or bfloat16, rows dense -> (M, D) float32.

    positions (N, D) float32, of rows in turn; norm: weight and bias (D,) float32. K and D are multiples of 16. Raises
    as `run`.
    """
    total = torch.empty(len(patches), positions.shape[-1])
    torch.ops.lbfast.tokenwise_embed(patches, layer, positions, list(norm), total, eps, kernel)
    return total
