"""An encoder's layers in inference on a CPU: attention, and spans of what each token goes through between two of it.

A span is one native pass over the tokens, by products of int8, bfloat16 or float32: see `lbfast.tokenwise`. The running
sum is float32. The last layer, whose pooled tokens alone go on, runs as `Running` does it, in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch

from lbfast import tokenwise
from lbfast.model.frozen import PanelLinear
from lbfast.model.layers import MLP, Attention, Encoder, EncoderLayer, LayerNorm, Packing, Padded, TemporalAttention
from lbfast.model.running import Running, steps_of


@dataclass
class Span:
    """What lies between two attentions, as `tokenwise.run` takes it.

    Attributes:
        out: the product of the attention before; None where there is none.
        mlp, reader: a norm's weight and bias, and the products that read it.
        constant: (T, D) float32, the temporal embedding, before the reader.
        attention: what comes after, fed by the reader; None at the end.
    """

    out: tokenwise.Product | None = None
    mlp: list[torch.Tensor] = field(default_factory=list)
    constant: torch.Tensor | None = None
    reader: list[torch.Tensor] = field(default_factory=list)
    attention: Attention | None = None


class Spans:
    """The spans of an encoder whose Linears are PanelLinear.

    Args:
        encoder: of two layers or more.
        frames: T, where its layers attend over frames.
    """

    def __init__(self, encoder: Encoder, frames: int = 1):
        *layers, last = cast(list[EncoderLayer], list(encoder.layers))
        self.config, self.frames = encoder.config, frames
        self.spans = list(_spans(layers, frames))
        self.last = Running(encoder, frames, [last])
        self.wide = isinstance(last.mlp.fc1, PanelLinear)  # whose sum may be float32, whatever its inputs are

    def pooled(self, x: torch.Tensor, packing: Packing | Padded | None = None) -> torch.Tensor:
        """As `Encoder.pooled` without gradients; x is overwritten."""
        width = x.shape[-1]
        total = x.reshape(-1, width).float().contiguous()
        result = x.new_empty(len(total), 3 * width)
        attended: torch.Tensor | None = None
        for span in self.spans:
            tokenwise.run(
                total,
                attended=attended,
                out=span.out,
                mlp=span.mlp,
                constant=span.constant,
                per_frame=x.shape[-2],
                reader=span.reader,
                result=result if span.reader else None,
                activation=self.config.hidden_act,
                eps=self.config.layer_norm_eps,
            )
            if span.attention is not None:
                qkv = result.view(*x.shape[:-1], -1)
                if isinstance(span.attention, TemporalAttention):
                    qkv = qkv.unflatten(0, (-1, self.frames))
                attended = span.attention.attend(qkv, packing).reshape(-1, width)
        total = total.view(x.shape) if self.wide else total.view(x.shape).to(x.dtype)
        return self.last.pooled(total, packing).to(x.dtype)


def _spans(layers: list[EncoderLayer], frames: int) -> Iterator[Span]:
    span = Span()
    for layer in layers:
        for step in steps_of(layer):
            norm = _floats(step.norm)
            if isinstance(step.reader, MLP):
                span.mlp = [*norm, *_parts(step.reader.fc1), *_parts(step.reader.fc2)]
                continue
            if isinstance(step.reader, TemporalAttention) and frames > 1:
                span.constant = layer.temporal_embedding[0, :frames].float().contiguous()
            span.reader, span.attention = [*norm, *_parts(step.reader.qkv)], step.reader
            yield span
            span = Span(out=_parts(step.reader.out_proj))
    yield span


def _floats(norm: LayerNorm) -> list[torch.Tensor]:
    return [norm.weight.float(), norm.bias.float()]


def _parts(layer: object) -> tokenwise.Product:
    return cast(PanelLinear, layer).parts
