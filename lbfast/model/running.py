"""An encoder's layers in inference: products add to the running sum itself, and norms add what these leave out.

    y = norm(total + constant)
    total += activation(y @ w1.T + b1) @ w2.T;  constant += b2

A sum in the product costs no pass over memory, where its bias would cost one: biases, and the temporal embedding, are
constants that the norms after them read beside the sum. Now and then a norm writes them into it: the sum is never far
from what it stands for, and is rounded about as often as by the layers one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from lbfast import ops
from lbfast.float8 import Float8
from lbfast.model.frozen import Float8Linear, FrozenLinear
from lbfast.model.layers import (
    MLP,
    Attention,
    Encoder,
    EncoderLayer,
    LayerNorm,
    TemporalAttention,
)
from lbfast.model.packing import Packing, Padded, pooled_tokens
from lbfast.ops.layer_norm import layer_norm_float8

SETTLING = 4
"""Layers whose constants may be outside of the sum: small beside it, whatever they are over a whole tower."""


@dataclass
class Step:
    """A norm, and the attention or MLP that reads it and whose product adds to the sum.

    Attributes:
        constant: what the norm adds to the sum, (D,) or (1, T, 1, D); float32 or wider, settled of its dtype.
        settles: whether the norm writes the constant into the sum.
    """

    norm: LayerNorm
    reader: Attention | MLP
    constant: torch.Tensor | None = None
    settles: bool = False

    @property
    def product(self) -> FrozenLinear:
        return cast(FrozenLinear, self.reader.fc2 if isinstance(self.reader, MLP) else self.reader.out_proj)

    def normed(self, total: torch.Tensor, rest: torch.Tensor | None) -> tuple[torch.Tensor | Float8, torch.Tensor]:
        """total, and rest of its shape which is yet to be added -> the norm of all of it, and the sum from here on."""
        settles, added = self.settles or rest is not None, self.constant
        if rest is not None:
            added = rest if added is None else rest.add_(added)
        reader = self.reader.fc1 if isinstance(self.reader, MLP) else self.reader.qkv
        if isinstance(reader, Float8Linear):
            return layer_norm_float8(total, *self.norm.parts, residual=added, keep_total=settles)
        if added is None:
            return self.norm(total), total
        if settles:
            return self.norm.add(total, added)
        return ops.layer_norm(total, *self.norm.parts, residual=added, keep_total=False), total

    def read(self, y: torch.Tensor | Float8, packing: Packing | Padded | None, pooled: bool) -> torch.Tensor | Float8:
        """What the reader hands to its product: of y (..., D), or `pooled`, of its pooled tokens."""
        if isinstance(self.reader, MLP):
            fc1 = cast(FrozenLinear, self.reader.fc1)
            return fc1.activated(cast(torch.Tensor, y), self.reader.config.hidden_act)
        if isinstance(self.reader, TemporalAttention):
            return self.reader.mix(y)
        y = _frames_apart(y) if isinstance(y, torch.Tensor) else (_frames_apart(y[0]), _frames_apart(y[1]))
        return self.reader.mix_pooled(cast(torch.Tensor, y), packing) if pooled else self.reader.mix(y, packing)


class Running:
    """The steps of an encoder whose Linears are frozen.

    Args:
        encoder: of frozen products.
        frames: T, where its layers attend over frames.
        layers: those to run, the last of them the encoder's; None: all.
    """

    def __init__(self, encoder: Encoder, frames: int = 1, layers: Sequence[EncoderLayer] | None = None):
        self.frames = frames if encoder.config.add_time_attn else 0
        self.steps: list[Step] = []
        constant: torch.Tensor | None = None
        whole = False  # whether the product before leaves a whole tensor to be added, and so written
        for depth, layer in enumerate(layers or cast(list[EncoderLayer], list(encoder.layers))):
            for index, step in enumerate(steps_of(layer)):
                wide = torch.promote_types(step.norm.weight.dtype, torch.float32)
                if isinstance(step.reader, TemporalAttention) and frames > 1:
                    embedding = layer.temporal_embedding[:, :frames, None].to(wide)
                    constant = embedding if constant is None else constant + embedding
                leaves = type(step.product) is FrozenLinear  # a bias; others' constant is the temporal embedding alone
                step.settles = whole or (index == 0 and (depth % SETTLING == 0 or not leaves))
                step.constant = constant
                if constant is not None and step.settles:
                    step.constant, constant = constant.to(step.norm.weight.dtype), None
                if leaves:
                    bias = step.product.bias.to(wide)
                    constant = bias if constant is None else constant + bias
                whole = isinstance(step.product, Float8Linear)
                self.steps.append(step)
        self.constant = constant
        self.pooling = len(self.steps) - 2  # the last attention over tokens: only the pooled ones go on

    def pooled(self, x: torch.Tensor, packing: Packing | Padded | None = None) -> torch.Tensor:
        """As `Encoder.pooled` without gradients; x is overwritten."""
        total = x.contiguous()
        if self.frames:
            total = total.unflatten(0, (-1, self.frames))
        rest: torch.Tensor | None = None
        for index, step in enumerate(self.steps):
            y, total = step.normed(total, rest)
            a = step.read(y, packing, index == self.pooling)
            if index == self.pooling:
                pooled = pooled_tokens(_frames_apart(total), packing).contiguous()
                total = pooled.view(*total.shape[:-2], *pooled.shape[-2:]) if self.frames else pooled
            total, rest = step.product.add_to(total, cast(torch.Tensor, a))
            if rest is not None:  # a bias is in the constants
                rest = None if rest is step.product.bias else rest.view(total.shape)
        if self.constant is not None:
            total = total + self.constant.to(total.dtype)
        return (total if rest is None else total + rest).flatten(0, -3)[:, 0]


def _frames_apart(x: torch.Tensor) -> torch.Tensor:
    """(B, T, N, D) -> (B * T, N, D); anything else as it is."""
    return x.flatten(0, 1) if x.dim() == 4 else x


def steps_of(layer: EncoderLayer) -> Iterator[Step]:
    """A layer's norms and their readers, in order."""
    if layer.add_time_attn:
        yield Step(layer.temporal_layer_norm1, layer.temporal_attn)
        if layer.temporal_mlp is not None and layer.temporal_layer_norm2 is not None:
            yield Step(layer.temporal_layer_norm2, layer.temporal_mlp)
    yield Step(layer.layer_norm1, layer.self_attn)
    yield Step(layer.layer_norm2, layer.mlp)
