"""The vision tower of every modality and the text tower, with upstream's attribute names, inputs and outputs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lbfast import dispatch
from lbfast.model import checkpoint
from lbfast.model.config import Modality
from lbfast.model.frozen import Freezable
from lbfast.model.frozen_tokens import FrozenTokens
from lbfast.model.graphs import Graphs
from lbfast.model.layers import Encoder, LayerNorm
from lbfast.model.packing import Packing, Padded
from lbfast.model.plain import ours, plain, plain_parts
from lbfast.model.tokens import PatchDropout, TextEmbeddings, VisionEmbeddings


@ours
class VisionTransformer(Freezable):
    """Pixels of one modality -> hidden states and the pooled class token, averaged over frames."""

    def __init__(self, config: Any, modality: Modality):
        super().__init__()
        self.config = config
        self.modality = modality
        self.embeddings = embeddings = VisionEmbeddings(config, modality)
        self.pixel_shape, self.num_patches, self.tube_size = (
            embeddings.pixel_shape,
            embeddings.num_patches,
            embeddings.tube_size,
        )
        self.patch_dropout = PatchDropout(config.force_patch_dropout)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic: the checkpoints' name
        self.encoder = Encoder(config, temporal_mlp=config.add_time_attn and modality.temporal_mlp)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.frozen_tokens: FrozenTokens | None = None  # by optimize_for_inference, as the next
        self.graphs: Graphs | None = None
        self.parts: list[Any] | None = None  # those that it has seen
        self.calibrated = False  # by calibrate

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        wrapped = f"{prefix}encoder.base_model.model."  # as upstream's adapters are saved
        for key in [key for key in state_dict if key.startswith(wrapped)]:
            state_dict |= checkpoint.canonical_keys({key: state_dict.pop(key)})
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Embeds pixels.

        Args:
            pixel_values: (B, C, H, W), (B, C, T, H, W), or (b, pair, T, bs, C, H, W) taken as B = b * pair * bs clips
                of T frames; floats as the processor gives them, or raw uint8 0..255 (not for audio). A video model
                takes (B * T, C, H, W) too, T = num_frames, and then pools each frame alone.
            output_attentions: also return the attention of tokens of each layer, (B * T, heads, N, N).
            output_hidden_states: also return the layers' inputs and the last output, (B * T, N, D).
            return_dict: False for a tuple.

        Returns:
            last_hidden_state (B * T, N, D) and pooler_output (B, D), before the projection.

        Raises:
            ValueError: pixel_values has another rank, size, channel or frame count than the checkpoint, or is empty.
        """
        output_attentions, output_hidden_states, return_dict = output_flags(
            self.config, output_attentions, output_hidden_states, return_dict
        )
        pixels, clips = self._as_clips(pixel_values)
        hidden, frames = self._tokens(pixels)
        last, states, attentions = self.encoder(
            hidden, frames=frames, output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        pooled = self._pool(last[:, 0], clips)
        if not return_dict:
            return tuple(item for item in (last, pooled, states, attentions) if item is not None)
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=pooled, hidden_states=states, attentions=attentions
        )

    def pooled(self, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """pooler_output alone, (B, D): the same, for less work in the last layer."""
        pixels, clips = self._as_clips(pixel_values)
        one_row_each = clips > 0 or pixels.ndim == 4  # not frames of clips, pooled each alone
        if self.graphs is not None and one_row_each and not torch.is_grad_enabled():
            return self.graphs(pixels, self.post_layernorm.weight.device)
        return self.pooled_clips(pixels, clips)

    def pooled_clips(self, pixels: torch.Tensor, clips: int) -> torch.Tensor:
        """`pooled` of checked pixels, as `_as_clips` gives them."""
        if self.frozen_tokens is not None and self.encoder.runs(pixels):
            return self._pool(self.encoder.pooled(self.frozen_tokens(pixels), self.frames), clips)
        hidden, frames = self._tokens(pixels)
        return self._pool(self.encoder.pooled(hidden, frames), clips)

    def activation_bytes(self, pixel_values: torch.Tensor) -> int:
        """About what inference on these pixels, (B, C, H, W) or (B, C, T, H, W), holds at once."""
        frames = pixel_values.shape[0] * (pixel_values.shape[2] if pixel_values.ndim > 4 else 1)
        return _activation_bytes(self, frames * (1 + self.num_patches))

    @property
    def frames(self) -> int:
        """T' where the layers attend over frames, else 1."""
        return self.config.num_frames // self.tube_size if self.config.add_time_attn else 1

    def _tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Clips -> (B * T', 1 + kept, D), and `frames`."""
        kept = self.patch_dropout(pixels.shape[0], self.num_patches, pixels.device)
        given = (pixels,) if kept is None else (pixels, kept)
        if plain(self.embeddings, self.pre_layrnorm):
            return self.embeddings(*given, pre_norm=self.pre_layrnorm), self.frames
        return self.pre_layrnorm(self.embeddings(*given)), self.frames

    def _pool(self, first: torch.Tensor, clips: int) -> torch.Tensor:
        """Class tokens (B * T', D) -> their mean over the frames of each of so many clips; of none, each alone."""
        pooled = self.post_layernorm(first)
        return pooled.unflatten(0, (clips, -1)).mean(1) if clips else pooled

    def _as_clips(self, pixel_values: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        """Checks pixel_values; returns a view (B, C, H, W) or (B, C, T, H, W), and B where it came as clips, else 0."""
        channels, height, width = self.pixel_shape
        expected = f"a tensor (B, {channels}, {height}, {width}) or (B, {channels}, T, {height}, {width})"
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(f"pixel_values: expected {expected}, got {type(pixel_values).__name__}")
        shape = tuple(pixel_values.shape)
        if pixel_values.ndim not in (4, 5, 7):
            raise ValueError(f"pixel_values: expected {expected}, or with 7 dimensions, got shape {shape}")
        if not pixel_values.is_floating_point() and (pixel_values.dtype != torch.uint8 or self.modality.mel_grid):
            kinds = "floats" if self.modality.mel_grid else "floats or uint8"
            raise TypeError(f"pixel_values: expected {kinds}, got {pixel_values.dtype}")
        if (shape[1] if pixel_values.ndim < 7 else shape[4], *shape[-2:]) != (channels, height, width):
            raise ValueError(f"pixel_values: expected {expected}, got shape {shape}")
        if 0 in shape:
            raise ValueError(f"pixel_values: expected at least one item, got shape {shape}")
        needed = self.config.num_frames
        if pixel_values.ndim == 4:
            if not self.config.add_time_attn:
                return pixel_values, 0
            if shape[0] % needed:
                raise ValueError(
                    f"pixel_values: this checkpoint takes clips of {needed} frames: expected (B, {channels}, {needed}, "
                    f"{height}, {width}) or a multiple of {needed} frames in (B * {needed}, ...), got shape {shape}"
                )
            return pixel_values.unflatten(0, (-1, needed)).transpose(1, 2), 0
        frames = shape[2]
        if self.config.add_time_attn and frames != needed:
            raise ValueError(
                f"pixel_values: this checkpoint takes clips of {needed} frames, got {frames} in shape {shape}"
            )
        if pixel_values.ndim == 7:
            pixel_values = pixel_values.reshape(-1, frames, channels, height, width).transpose(1, 2)
        return pixel_values, pixel_values.shape[0]


CAPTION_LENGTHS = (16, 24, 32, 48, 64)
"""Columns that CUDA graphs of captions have, where these are no longer; else as many as there are positions."""

LAUNCHING = 7e10
"""FLOP that a GPU has time for while the launches of a packed layer are issued: a dozen, 10 us each, at 580 TFLOP/s."""


@ours
class TextTransformer(Freezable):
    """Token ids -> hidden states and the state at the first end-of-text token."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.graphs: Graphs | None = None  # by optimize_for_inference
        self.parts: list[Any] | None = None  # those that it has seen
        self.calibrated = False  # by calibrate

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Embeds captions.

        Args:
            input_ids: (B, N) token ids, N <= 77; the end-of-text token is the largest id.
            attention_mask: (B, N), 1 for tokens and 0 for padding; or additive, (B, N) or (B, 1, 1, N), 0 for tokens
                and -inf or finfo.min for padding.
            position_ids: (B, N) or (1, N); default 0..N-1.
            output_attentions, output_hidden_states, return_dict: as of the vision tower.

        Returns:
            last_hidden_state (B, N, D), layer-normalised, and pooler_output (B, D), before the projection.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        output_attentions, output_hidden_states, return_dict = output_flags(
            self.config, output_attentions, output_hidden_states, return_dict
        )
        input_ids = self._check(input_ids, position_ids)
        padding = None if attention_mask is None else padding_from(attention_mask, input_ids.shape)
        last, states, attentions = self.encoder(
            self.embeddings(input_ids, position_ids),
            causal=True,
            key_padding_mask=padding,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        last = self.final_layer_norm(last)
        pooled = last[torch.arange(last.shape[0], device=last.device), input_ids.argmax(dim=-1)]
        if not return_dict:
            return tuple(item for item in (last, pooled, states, attentions) if item is not None)
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=pooled, hidden_states=states, attentions=attentions
        )

    def pooled(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """pooler_output alone, (B, D): the same, for the tokens up to each end of text only.

        Attention is causal, so what comes after the pooled token never reaches it. Captions whose mask hides one of
        these tokens, and graphs that are being compiled or captured, take the full path. Captions in CPU memory are
        looked at there, so that nothing waits for the device.
        """
        ids = self._check(input_ids, position_ids)
        device = self.final_layer_norm.weight.device
        lengths = self._lengths(ids, attention_mask)
        if lengths is None:
            return self(*_on(device, ids, attention_mask, position_ids), return_dict=False)[1]
        columns = self._columns_to_replay(lengths) if position_ids is None else None
        if self.graphs is not None and columns is not None and not torch.is_grad_enabled():
            missing = max(columns - ids.shape[1], 0)
            return self.graphs(F.pad(ids, (0, missing)) if missing else ids[:, :columns], device)
        packing = Packing.of(lengths)
        longest = packing.slots.shape[1]
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)
        positions = packing.pack(position_ids.to(ids.device).expand_as(ids)[:, :longest])
        packed, positions = _on(device, packing.pack(ids[:, :longest]), positions)
        x = self.embeddings.token_embedding(packed) + self.embeddings.position_embedding(positions)
        return self.final_layer_norm(self.encoder.pooled(x, packing=packing.to(device)))

    def pooled_padded(self, ids: torch.Tensor) -> torch.Tensor:
        """`pooled` of checked ids (B, N) on the device, by launches that depend on their shape alone."""
        return self.final_layer_norm(self.encoder.pooled(self.embeddings(ids), packing=Padded.of(ids)))

    def activation_bytes(self, input_ids: torch.Tensor) -> int:
        """About what inference on these captions, (B, N), holds at once."""
        return _activation_bytes(self, input_ids.numel())

    def _lengths(self, ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Tokens up to the pooled one of each caption, (B,), where ids are; None where every token must be computed."""
        if dispatch.traced() or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        lengths = ids.argmax(dim=-1) + 1
        padding = None if attention_mask is None else padding_from(attention_mask.to(ids.device), ids.shape)
        if padding is not None:
            reached = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            if bool((padding & reached).any()):
                return None
        return lengths

    def _columns_to_replay(self, lengths: torch.Tensor) -> int | None:
        """How long captions of these lengths, padded, are to a graph of theirs; None where packing them is faster."""
        if self.graphs is None:
            return None
        longest, tokens = torch.stack([lengths.max(), lengths.sum()]).tolist()
        limit = self.config.max_position_embeddings
        columns = next((length for length in CAPTION_LENGTHS if longest <= length < limit), limit)
        width, inner = self.config.hidden_size, self.config.intermediate_size
        rows = self.graphs.padded_size(len(lengths))
        flops = (8 * width + 4 * inner) * width  # of a token in a layer
        return columns if rows and rows * columns * flops <= max(tokens * flops, LAUNCHING) else None

    def _check(self, input_ids: torch.Tensor | None, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Returns input_ids as (B, N)."""
        longest, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        if not isinstance(input_ids, torch.Tensor):
            raise TypeError(f"input_ids: expected a tensor (B, N) of token ids, got {type(input_ids).__name__}")
        if input_ids.is_floating_point() or input_ids.ndim < 1:
            raise TypeError(f"input_ids: expected integers (B, N), got {input_ids.dtype} {tuple(input_ids.shape)}")
        ids = input_ids.reshape(-1, input_ids.shape[-1])
        if 0 in ids.shape:
            raise ValueError(f"input_ids: expected at least one caption, got shape {tuple(input_ids.shape)}")
        if ids.shape[1] > longest:
            raise ValueError(
                f"input_ids: expected at most {longest} tokens a caption, got {ids.shape[1]}; the processor truncates"
            )
        if position_ids is not None and tuple(position_ids.shape) not in (tuple(ids.shape), (1, ids.shape[1])):
            raise ValueError(f"position_ids: expected shape {tuple(ids.shape)}, got {tuple(position_ids.shape)}")
        if ids.device.type == "cpu" and not dispatch.traced():
            low, high = ids.aminmax()
            if low < 0 or high >= vocabulary:
                raise ValueError(f"input_ids: expected ids from 0 to {vocabulary - 1}, got {int(low)} to {int(high)}")
        return ids


def _activation_bytes(tower: Any, tokens: int) -> int:
    """About what inference holds at once for so many tokens: the widest point of a layer, the MLP."""
    width = 6 * tower.config.hidden_size + 2 * tower.config.intermediate_size
    return tokens * width * next(tower.parameters()).element_size()


def tower_in(module: nn.Module) -> Any:
    """The tower that a module is, or wraps; None where there is none."""
    return next((m for m in module.modules() if isinstance(m, (VisionTransformer, TextTransformer))), None)


def pooled(tower: nn.Module, **inputs: Any) -> torch.Tensor:
    """A tower's pooler_output alone, (B, D): the same for less work where all of it is plain, else by its own call."""
    if not isinstance(tower, (VisionTransformer, TextTransformer)) or (found := plain_parts(tower)) is None:
        return tower(**inputs)[1]
    if tower.parts is not None and tower.parts != found and not dispatch.traced():
        tower.encoder.running = tower.graphs = tower.parts = None
        warnings.warn(
            f"{type(tower).__name__}: modules were replaced after optimize_for_inference: its layers run one by one "
            "from here on; replace them before it",
            stacklevel=2,
        )
    return tower.pooled(**inputs)


def padding_from(attention_mask: torch.Tensor, shape: torch.Size | tuple[int, int]) -> torch.Tensor | None:
    """Any form of a padding mask -> (B, N) bool, True where the key is padding; None where none is known to be.

    A float mask without a positive value is additive (0 for tokens, -inf or finfo.min for padding); every other is 1
    for tokens and 0 for padding.
    """
    mask = attention_mask
    if mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask: expected shape {tuple(shape)}, got {tuple(attention_mask.shape)}")
    padding = mask == 0
    if mask.is_floating_point():
        padding = torch.where((mask > 0).any(), padding, mask < 0)
    if mask.device.type == "cpu" and not dispatch.traced() and not padding.any():
        return None
    return padding


def _on(device: torch.device, *tensors: torch.Tensor | None) -> list[Any]:
    """There, without waiting for what the device computes."""
    return [None if t is None else t.to(device, non_blocking=device.type != "cpu") for t in tensors]


def output_flags(
    config: Any, output_attentions: bool | None, output_hidden_states: bool | None, return_dict: bool | None
) -> tuple[bool, bool, bool]:
    """Fills what the caller left open from the config."""

    def pick(value: bool | None, name: str, default: bool) -> bool:
        return bool(getattr(config, name, default) if value is None else value)

    return (
        pick(output_attentions, "output_attentions", False),
        pick(output_hidden_states, "output_hidden_states", False),
        pick(return_dict, "return_dict", True),
    )
