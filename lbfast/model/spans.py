"""An encoder's layers in inference on a CPU: attention, and spans of what each token goes through between two of it.

A span is one native pass over the tokens, by products of int8, bfloat16 or float32: see `lbfast.tokenwise`. The running
sum is float32. The last layer is in the model's own dtype; from its keys and values on, only pooled tokens go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F

from lbfast import tokenwise
from lbfast.model.frozen import PanelLinear
from lbfast.model.layers import (
    MLP,
    Attention,
    Encoder,
    EncoderLayer,
    LayerNorm,
    TemporalAttention,
)
from lbfast.model.packing import Packing, Padded, pooled_tokens
from lbfast.model.running import Running, steps_of

Layout = tuple[torch.dtype, int]
"""A dtype, and how many dimensions panels have of it: float32 in thirds has one more than bfloat16."""


@dataclass
class Span:
    """What lies between two attentions, as `tokenwise.run` takes it; products of another dtype are another span's.

    Attributes:
        out: the product of the attention before; None where there is none.
        mlp, reader: a norm's weight and bias, and the products that read it.
        constant: (T, D) float32, the temporal embedding, before the reader.
        attention: what comes after, fed by the reader; None where another span comes, and at the end.
        columns: what the reader makes of a token.
    """

    out: tokenwise.Product | None = None
    mlp: list[torch.Tensor] = field(default_factory=list)
    constant: torch.Tensor | None = None
    reader: list[torch.Tensor] = field(default_factory=list)
    attention: Attention | None = None
    columns: int = 0

    @property
    def layout(self) -> Layout | None:
        """Of the weights; None where there are none."""
        product = self.out or self.mlp[2:] or self.reader[2:]
        return _layout(product) if product else None


class Spans:
    """The spans of an encoder whose Linears are PanelLinear.

    Args:
        encoder: of two layers or more.
        frames: T, where its layers attend over frames.
    """

    def __init__(self, encoder: Encoder, frames: int = 1):
        layers = cast(list[EncoderLayer], list(encoder.layers))
        self.config, self.frames, self.last = encoder.config, frames, layers[-1]
        self.dtype = self.last.layer_norm1.weight.dtype
        # what the last layer is without panels
        self.running = (
            None if isinstance(self.last.self_attn.kv, PanelLinear) else Running(encoder, frames, layers[-1:])
        )
        self.spans = list(_spans(layers if self.running is None else layers[:-1], frames, self.last))

    def pooled(self, x: torch.Tensor, packing: Packing | Padded | None = None) -> torch.Tensor:
        """As `Encoder.pooled` without gradients, of the encoder's dtype; x, of it or float32, is overwritten."""
        width = x.shape[-1]
        total = x.reshape(-1, width).float().contiguous()
        room = x.new_empty(3 * total.numel(), dtype=self.dtype)
        projected = room.view(*x.shape[:-1], 3 * width)
        views = {}
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
                result=_rows(room, len(total), span.columns) if span.reader else None,
                activation=self.config.hidden_act,
                eps=self.config.layer_norm_eps,
            )
            attended = None  # before there is another
            if span.attention is None or span.attention is self.last.self_attn:
                continue
            kind = type(span.attention)
            if packing is not None:
                attended = span.attention.attend(projected, packing).reshape(-1, width)
                continue
            if kind not in views:
                of = projected.unflatten(0, (-1, self.frames)) if kind is TemporalAttention else projected
                views[kind] = span.attention.split(of)
            attended = span.attention.over(*views[kind]).reshape(-1, width)
        total = total.view(x.shape)
        if self.running is not None:
            return self.running.pooled(total.to(self.dtype), packing)
        kv = room[: 2 * total.numel()].view(*x.shape[:-1], -1)
        return self._last(pooled_tokens(total, packing), kv, packing).to(self.dtype)[:, 0]

    def _last(self, x: torch.Tensor, kv: torch.Tensor, packing: Packing | Padded | None) -> torch.Tensor:
        """The last layer of the pooled tokens x (B, 1, D) float32, of all tokens' keys and values (..., 2 * D)."""
        attention, mlp = self.last.self_attn, self.last.mlp
        query, up, down = (cast(PanelLinear, layer) for layer in (attention.q_proj, mlp.fc1, mlp.fc2))
        q = query(self._norm(self.last.layer_norm1, x))
        k, v = attention.split(kv)
        a = attention.attend_pooled(q, k, v, packing)
        x, _ = cast(PanelLinear, attention.out_proj).add_to(x, a)
        inner = up.activated(self._norm(self.last.layer_norm2, x), self.config.hidden_act)
        return down.add_to(x, inner)[0]

    def _norm(self, norm: LayerNorm, x: torch.Tensor) -> torch.Tensor:
        weight, bias = _floats(norm)
        return F.layer_norm(x, weight.shape, weight, bias, self.config.layer_norm_eps)


def _spans(layers: Sequence[EncoderLayer], frames: int, last: EncoderLayer) -> Iterator[Span]:
    """Of layers up to the keys and values of the last, if it is among them."""
    span = Span()
    for layer in layers:
        for step in steps_of(layer):
            if isinstance(step.reader, MLP):
                span.mlp = [*_floats(step.norm), *_parts(step.reader.fc1), *_parts(step.reader.fc2)]
                continue
            projection = cast(PanelLinear, step.reader.kv if step.reader is last.self_attn else step.reader.qkv)
            if span.layout not in (None, _layout(projection.parts)):
                yield span
                span = Span()
            if isinstance(step.reader, TemporalAttention) and frames > 1:
                span.constant = layer.temporal_embedding[0, :frames].float().contiguous()
            span.reader, span.attention = [*_floats(step.norm), *projection.parts], step.reader
            span.columns = projection.out_features
            yield span
            if step.reader is last.self_attn:
                return
            span = Span(out=_parts(step.reader.out_proj))
    yield span


def _rows(room: torch.Tensor, count: int, columns: int) -> torch.Tensor:
    """(count, columns) at the beginning of a room."""
    return room[: count * columns].view(count, columns)


def _layout(product: Sequence[torch.Tensor]) -> Layout:
    return product[0].dtype, product[0].ndim


def _floats(norm: LayerNorm) -> list[torch.Tensor]:
    return [norm.weight.float(), norm.bias.float()]


def _parts(layer: object) -> tokenwise.Product:
    return cast(PanelLinear, layer).parts
