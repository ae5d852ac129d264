"""Transformer layers shared by every tower: attention over tokens, attention over frames, MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lbfast import dispatch, ops
from lbfast.float8 import Float8
from lbfast.model.frozen import FrozenLinear
from lbfast.model.packing import Packing, Padded, pooled_tokens
from lbfast.model.plain import are_linear, ours, plain, product, products
from lbfast.model.prenorm import norm_linears, norm_mlp

if TYPE_CHECKING:
    from lbfast.model.running import Running
    from lbfast.model.spans import Spans


def drawn(*shape: int) -> torch.Tensor:
    """As torch.randn; nothing is drawn on "meta", for which torch would import its compiler: a second's work."""
    values = torch.empty(shape)
    return values if values.is_meta else values.normal_()


def embedding(rows: int, size: int) -> nn.Embedding:
    """As nn.Embedding, drawn likewise."""
    return nn.Embedding.from_pretrained(drawn(rows, size), freeze=False)


@ours
class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, through `ops.layer_norm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.weight, self.bias, self.eps

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (normalised sum, sum) of x and a residual that broadcasts against it, in one pass."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


class Sum(NamedTuple):
    """A tower's sum over its layers in two terms, for the next norm to join: a pass over memory less.

    Attributes:
        total: (..., D).
        rest: what is to be added to it, of its shape; or None.
    """

    total: torch.Tensor
    rest: torch.Tensor | None = None

    def joined(self) -> torch.Tensor:
        return self.total if self.rest is None else self.total + self.rest


class PreNorm:
    """The norm of x + residual, for one reader; `total`, the sum, is there after it was read.

    A reader in training gets it unread, for products that compute the norm again in the backward instead of keeping it.
    """

    def __init__(self, norm: LayerNorm, x: torch.Tensor, residual: torch.Tensor | None = None):
        self.norm, self.x, self.residual = norm, x, residual
        self.total = x

    def output(self) -> torch.Tensor:
        """The norm itself."""
        if self.residual is None:
            return self.norm(self.x)
        if plain(self.norm):
            y, self.total = self.norm.add(self.x, self.residual)
            return y
        self.total = self.x + self.residual
        return self.norm(self.total)

    def read_by(self, reader: nn.Module) -> torch.Tensor | PreNorm:
        """What to call a module with that reads it: in training, where it and its products are plain, itself."""
        if torch.is_grad_enabled() and isinstance(reader, (Attention, MLP)) and plain(self.norm, reader):
            products = reader.products
            if products and are_linear(*products):
                return self
        return self.output()

    def linears(self, *layers: nn.Linear) -> list[torch.Tensor]:
        """What each of the layers makes of it."""
        pairs = [(layer.weight, layer.bias) for layer in layers]
        outs, self.total = norm_linears(self.x, self.norm.parts, pairs, self.residual)
        return outs

    def mlp(self, fc1: nn.Linear, fc2: nn.Linear, activation: str) -> torch.Tensor:
        """`ops.mlp` of it."""
        pairs = ((fc1.weight, fc1.bias), (fc2.weight, fc2.bias))
        out, self.total = norm_mlp(self.x, self.norm.parts, *pairs, activation, self.residual)
        return out


@ours
class Attention(nn.Module):
    """Multi-head self-attention with CLIP's four projections."""

    def __init__(self, config: Any):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ValueError(f"num_attention_heads: expected a divisor of hidden_size {width}, got {heads}")
        if config.attention_dropout:
            raise ValueError(f"attention_dropout: expected 0.0, as published, got {config.attention_dropout}")
        self.config = config
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.scale = (width // heads) ** -0.5
        self.qkv: FrozenLinear | None = None  # in place of q_proj, k_proj and v_proj, by optimize_for_inference;
        self.kv: FrozenLinear | None = None  # of the last layer, where only the pooled tokens ask, of the latter two

    @property
    def products(self) -> tuple[nn.Linear, ...]:
        """What reads the input in training; none, once optimized for inference."""
        frozen = self.qkv is not None or self.kv is not None
        return () if frozen else (self.q_proj, self.k_proj, self.v_proj)

    def project(self, x: torch.Tensor | PreNorm | Float8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (..., D) -> q, k, v, each a view (..., H, D / H)."""
        if self.qkv is not None:
            return self.split(self.qkv(x))
        if self.kv is not None:
            return (*self.split(self.q_proj(x)), *self.split(self.kv(x)))
        layers = self.products
        outs = x.linears(*layers) if isinstance(x, PreNorm) else products(layers, cast(torch.Tensor, x))
        q, k, v = (out.unflatten(-1, (self.heads, -1)) for out in outs)
        return q, k, v

    def split(self, projected: torch.Tensor) -> Any:
        """(..., 3 * D) -> q, k, v, each a view (..., H, D / H); or fewer of them of fewer D."""
        return projected.unflatten(-1, (-1, self.heads, self.config.hidden_size // self.heads)).unbind(-3)

    def forward(
        self,
        x: torch.Tensor | PreNorm,
        causal: bool = False,
        key_padding_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (B, N, D), or a norm to be read -> (B, N, D), and with output_attentions the probabilities (B, H, N, N)."""
        q, k, v = self.project(x)
        y = ops.attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask, scale=self.scale)
        weights = attention_weights(q * self.scale, k, causal, key_padding_mask) if output_attentions else None
        return product(self.out_proj, y.flatten(-2)), weights

    def packed(self, x: torch.Tensor | PreNorm, packing: Packing | Padded) -> torch.Tensor:
        """Causal attention within each caption: x (tokens, D) -> (tokens, D)."""
        return product(self.out_proj, self.mix(x, packing))

    def pooled(self, x: torch.Tensor, packing: Packing | Padded | None = None) -> torch.Tensor:
        """What `forward` or `packed` gives for the pooled tokens alone: x (B, N, D) or (tokens, D) -> (B, 1, D)."""
        return product(self.out_proj, self.mix_pooled(x, packing))

    def mix(self, x: torch.Tensor | PreNorm | Float8, packing: Packing | Padded | None = None) -> torch.Tensor:
        """What `packed` projects, or without packing `forward`: of the same shape."""
        if self.qkv is not None and not isinstance(x, PreNorm):
            return self.attend(self.qkv(x), packing)
        q, k, v = self.project(x)
        if packing is None:
            return ops.attention(q, k, v, scale=self.scale).flatten(-2)
        q, k, v = (packing.pad(item) for item in (q, k, v))
        return packing.pack(ops.attention(q, k, v, causal=True, scale=self.scale).flatten(-2))

    def attend(self, qkv: torch.Tensor, packing: Packing | Padded | None = None) -> torch.Tensor:
        """The same of the projections (..., 3 * D), as `qkv` makes them: (..., D)."""
        if packing is None:
            return self.over(*self.split(qkv))
        q, k, v = self.split(packing.pad(qkv))
        return packing.pack(ops.attention(q, k, v, causal=True, scale=self.scale).flatten(-2))

    def over(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The same of its views, as `split` makes them."""
        return ops.attention(q, k, v, scale=self.scale).flatten(-2)

    def mix_pooled(self, x: torch.Tensor, packing: Packing | Padded | None = None) -> torch.Tensor:
        """What `pooled` projects, (B, 1, D)."""
        q = product(self.q_proj, pooled_tokens(x, packing))
        if self.kv is not None:
            k, v = self.split(self.kv(x))
        else:
            k, v = (out.unflatten(-1, (self.heads, -1)) for out in products((self.k_proj, self.v_proj), x))
        return self.attend_pooled(q, k, v, packing)

    def attend_pooled(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing | Padded | None = None
    ) -> torch.Tensor:
        """The same of the pooled tokens' queries (B, 1, D), and keys and values as `split` makes them."""
        (q,) = self.split(q)
        padding = None
        if packing is not None:
            k, v, padding = packing.pad(k), packing.pad(v), packing.padding
        return ops.attention(q, k, v, key_padding_mask=padding, scale=self.scale).flatten(-2)


@ours
class TemporalAttention(Attention):
    """The same over the T frames of each token position."""

    def forward(self, x: torch.Tensor | PreNorm) -> torch.Tensor:  # type: ignore[override]
        """x (B, T, N, D), or a norm to be read -> (B, T, N, D)."""
        return product(self.out_proj, self.mix(x))

    def mix(self, x: torch.Tensor | PreNorm | Float8, packing: Any = None) -> torch.Tensor:
        """What `forward` projects."""
        return ops.temporal_attention(*self.project(x)).flatten(-2)

    def attend(self, qkv: torch.Tensor, packing: Any = None) -> torch.Tensor:
        """The same of the projections (B, T, N, 3 * D): (B, T, N, D)."""
        return self.over(*self.split(qkv))

    def over(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.temporal_attention(q, k, v).flatten(-2)


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, causal: bool, key_padding_mask: torch.Tensor | None
) -> torch.Tensor:
    """Softmax probabilities (B, H, N, M) for scaled q (B, N, H, D), k (B, M, H, D); only for callers who ask."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    lowest = torch.finfo(scores.dtype).min
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores + torch.zeros_like(scores[:1, :1]).masked_fill(future, lowest)
    if key_padding_mask is not None:
        scores = scores + torch.zeros_like(scores[:, :1, :1]).masked_fill(key_padding_mask[:, None, None], lowest)
    return scores.softmax(-1)


@ours
class MLP(nn.Module):
    """fc2(activation(fc1(x))) with exact-erf GELU or quick-GELU."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        if config.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act: expected one of {', '.join(_ACTIVATIONS)}, got {config.hidden_act!r}")

    @property
    def products(self) -> tuple[nn.Linear, ...]:
        return self.fc1, self.fc2

    def forward(self, x: torch.Tensor | PreNorm) -> torch.Tensor:
        """x (..., D), or a norm to be read -> (..., D)."""
        fc1, fc2, activation = self.fc1, self.fc2, self.config.hidden_act
        if isinstance(x, PreNorm):
            return x.mlp(fc1, fc2, activation)
        if are_linear(fc1, fc2):
            return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=activation)
        if isinstance(fc1, FrozenLinear) and isinstance(fc2, FrozenLinear) and plain(fc1, fc2):
            return fc2(fc1.activated(x, activation))
        return fc2(_ACTIVATIONS[activation](fc1(x)))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": nn.functional.gelu,
    "quick_gelu": _quick_gelu,
}


@ours
class EncoderLayer(nn.Module):
    """CLIP's pre-norm layer; with `add_time_attn` attention over the frames of each position comes before it.

    Args:
        config: vision or text config.
        temporal_mlp: with `add_time_attn`, also temporal_layer_norm2 and temporal_mlp.
    """

    def __init__(self, config: Any, temporal_mlp: bool = False):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = Attention(config)
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.mlp = MLP(config)
        self.layer_norm2 = LayerNorm(width, eps=eps)
        self.add_time_attn = config.add_time_attn
        self.temporal_layer_norm2 = self.temporal_mlp = None
        if self.add_time_attn:
            self.temporal_embedding = nn.Parameter(drawn(1, config.num_frames, width) * width**-0.5)
            self.temporal_attn = TemporalAttention(config)
            self.temporal_layer_norm1 = LayerNorm(width, eps=eps)
            if temporal_mlp:
                self.temporal_mlp = MLP(config)
                self.temporal_layer_norm2 = LayerNorm(width, eps=eps)

    def forward(
        self,
        x: torch.Tensor | Sum,
        frames: int = 1,
        causal: bool = False,
        key_padding_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, torch.Tensor | None]:
        """x (B * T, N, D), the T frames of a clip adjacent -> the same, and the tokens' attention if asked.

        Of a tensor a tensor, of a Sum a Sum: with gradient checkpointing, which keeps what comes between layers, the
        former.
        """
        h = self._before_attention(x, frames)
        read = h.read_by(self.self_attn)
        a, weights = _and_weights(self.self_attn(read, causal, key_padding_mask, output_attentions))
        return self._after_attention(a, h.total, x), weights

    def packed(self, x: torch.Tensor | Sum, packing: Packing | Padded) -> Any:
        """The same, causal, for captions laid end to end: x (tokens, D) -> (tokens, D)."""
        h = self._before_attention(x, frames=1)
        a = self.self_attn.packed(h.read_by(self.self_attn), packing)
        return self._after_attention(a, h.total, x)

    def pooled(self, x: torch.Tensor | Sum, frames: int = 1, packing: Packing | Padded | None = None) -> Any:
        """The same for the pooled tokens alone: x (B * T, N, D) or (tokens, D) -> (B * T, 1, D) or (B, 1, D)."""
        h = self._before_attention(x, frames)
        a = self.self_attn.pooled(h.output(), packing)
        return self._after_attention(a, pooled_tokens(h.total, packing), x)

    def _before_attention(self, x: torch.Tensor | Sum, frames: int) -> PreNorm:
        """The input of self_attn; its total is what the output is added to."""
        if not self.add_time_attn:
            return PreNorm(self.layer_norm1, *(x if isinstance(x, Sum) else Sum(x)))
        x = x.joined() if isinstance(x, Sum) else x  # the norm's residual is the temporal embedding
        a, x = self._across_frames(x.unflatten(0, (-1, frames)))
        return PreNorm(self.layer_norm1, a.flatten(0, 1), x.flatten(0, 1))

    def _after_attention(self, a: torch.Tensor, x: torch.Tensor, like: torch.Tensor | Sum) -> torch.Tensor | Sum:
        h = PreNorm(self.layer_norm2, a, x)
        y = self.mlp(h.read_by(self.mlp))
        after = Sum(h.total, y)
        return after if isinstance(like, Sum) else after.joined()

    def _across_frames(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, N, D) -> what attention over frames adds, and what it is to be added to."""
        frames = x.shape[1]
        h = PreNorm(self.temporal_layer_norm1, x, self.temporal_embedding[:, :frames, None] if frames > 1 else None)
        a, _ = _and_weights(self.temporal_attn(h.read_by(self.temporal_attn)))
        if self.temporal_mlp is None or self.temporal_layer_norm2 is None:
            return a, h.total
        h = PreNorm(self.temporal_layer_norm2, a, h.total)
        y = self.temporal_mlp(h.read_by(self.temporal_mlp))
        return y, h.total


def _and_weights(out: Any) -> tuple[Any, torch.Tensor | None]:
    """(tensor, attention weights or None) of what an attention or a layer returned, wherever that comes from."""
    return (*out, None)[:2] if isinstance(out, tuple) else (out, None)


@ours
class Encoder(nn.Module):
    """The layers of a tower, with gradient checkpointing of whole layers in training."""

    def __init__(self, config: Any, temporal_mlp: bool = False):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config, temporal_mlp) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False  # set by PreTrainedModel.gradient_checkpointing_enable
        self.running: Running | Spans | None = None  # by optimize_for_inference

    def forward(
        self,
        x: torch.Tensor,
        frames: int = 1,
        causal: bool = False,
        key_padding_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """x (B * T, N, D) -> last hidden state, the states before each layer and after the last, the attentions."""
        states: list[torch.Tensor] = []
        attentions: list[Any] = []
        whole = output_hidden_states or self._checkpoints()
        between = Sum(x)
        for layer in self.layers:
            given = between.joined() if whole or not plain(layer) else between
            if output_hidden_states:
                states.append(cast(torch.Tensor, given))
            out = self._run(layer, given, frames, causal, key_padding_mask, output_attentions)
            after, weights = _and_weights(out)
            between = after if isinstance(after, Sum) else Sum(after)
            attentions.append(weights)
        x = between.joined()
        states.append(x)
        return x, tuple(states) if output_hidden_states else None, tuple(attentions) if output_attentions else None

    def pooled(self, x: torch.Tensor, frames: int = 1, packing: Packing | Padded | None = None) -> torch.Tensor:
        """The last state of the pooled tokens alone: the last layer computes no other. For plain layers only.

        x (B * T, N, D) -> (B * T, D), of the first tokens; or captions, packed (tokens, D) or padded (B, N, D) ->
        (B, D), of their ends. Where the encoder is optimized, x is overwritten.
        """
        if self.running is not None and self.runs(x):
            return self.running.pooled(x, packing)
        *layers, last = cast(list[EncoderLayer], list(self.layers))
        between: Any = x if self._checkpoints() else Sum(x)
        for layer in layers:
            if packing is None:
                between, _ = self._run(layer, between, frames)
            else:
                between = self._run(layer.packed, between, packing)
        out = self._run(last.pooled, between, frames, packing)
        return (out.joined() if isinstance(out, Sum) else out)[:, 0]

    def runs(self, x: torch.Tensor) -> bool:
        """Whether `pooled` of x, or of tokens made of it, goes the way that optimize_for_inference laid."""
        traced = x.requires_grad or torch.compiler.is_compiling() or dispatch.autocast_dtype(x.device) is not None
        return self.running is not None and not traced

    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and self.training

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a layer, checkpointed in training where that is on."""
        if not self._checkpoints():
            return function(*arguments)
        run = partial(checkpoint, use_reentrant=False)
        if arguments[0].requires_grad:  # re-entrant checkpoints, which may be asked for, lose gradients without it
            run = getattr(self, "_gradient_checkpointing_func", run)
        return run(function, *arguments)
