"""The eager baseline: LanguageBind as upstream computes it, step by step, for tests and benches.

Every copy and every B x H x N x N tensor that upstream makes is made here too: convolutions for patches, explicit
softmax attention, rearranged frames, a dense B x B loss. Parameters have the names of our models', so that
`like(model)` is the same function of the same weights.

Source: arXiv 2310.01852; CLIP, arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class LoraLinear(nn.Linear):
    """x W^T + b + (alpha / r) B A x."""

    def __init__(self, width_in: int, width_out: int, r: int, alpha: float):
        super().__init__(width_in, width_out)
        self.lora_A, self.lora_B = nn.Linear(width_in, r, bias=False), nn.Linear(r, width_out, bias=False)
        self.scaling = alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x)) * self.scaling


class Attention(nn.Module):
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(self, config: Any, adapted: bool):
        super().__init__()
        self.width, self.heads = config.hidden_size, config.num_attention_heads
        self.head_dim = self.width // self.heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear = LoraLinear(self.width, self.width, config.lora_r, config.lora_alpha) if adapted else None
            setattr(self, name, linear or nn.Linear(self.width, self.width))

    def split(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, D] -> [B * H, N, D / H]
        b, n, _ = x.shape
        x = x.view(b, n, self.heads, self.head_dim).transpose(1, 2).contiguous()
        return x.view(b * self.heads, n, self.head_dim)

    def forward(
        self, x: torch.Tensor, causal: torch.Tensor | None = None, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b, n, _ = x.shape
        q = self.split(self.q_proj(x) * self.head_dim**-0.5)
        k, v = self.split(self.k_proj(x)), self.split(self.v_proj(x))
        scores = torch.bmm(q, k.transpose(1, 2))  # [B * H, N, N]
        for mask in (causal, padding):
            if mask is not None:
                scores = (scores.view(b, self.heads, n, n) + mask).view(b * self.heads, n, n)
        weights = scores.softmax(dim=-1)
        y = torch.bmm(weights, v).view(b, self.heads, n, self.head_dim).transpose(1, 2).reshape(b, n, self.width)
        return self.out_proj(y), weights.view(b, self.heads, n, n)


class MLP(nn.Module):
    def __init__(self, config: Any, adapted: bool = False):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        if adapted:
            self.fc1: nn.Linear = LoraLinear(width, inner, config.lora_r, config.lora_alpha)
            self.fc2: nn.Linear = LoraLinear(inner, width, config.lora_r, config.lora_alpha)
        else:
            self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: Any, temporal_mlp: bool = False):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        lora = bool(getattr(config, "lora_r", 0))
        self.frames = config.num_frames if config.add_time_attn else 0
        self.self_attn = Attention(config, lora and not config.add_time_attn)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.temporal_mlp = None
        if config.add_time_attn:
            self.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, width))
            self.temporal_attn = Attention(config, lora)
            self.temporal_layer_norm1 = nn.LayerNorm(width, eps=eps)
            if temporal_mlp:
                self.temporal_mlp = MLP(config, lora)
                self.temporal_layer_norm2 = nn.LayerNorm(width, eps=eps)

    def by_position(self, x: torch.Tensor, t: int) -> torch.Tensor:  # [(b t), n, d] -> [(b n), t, d]
        bt, n, d = x.shape
        return x.view(bt // t, t, n, d).permute(0, 2, 1, 3).reshape(bt // t * n, t, d)

    def by_frame(self, x: torch.Tensor, n: int) -> torch.Tensor:  # [(b n), t, d] -> [(b t), n, d]
        bn, t, d = x.shape
        return x.view(bn // n, n, t, d).permute(0, 2, 1, 3).reshape(bn // n * t, n, d)

    def forward(
        self,
        x: torch.Tensor,
        frames: int = 1,
        causal: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = x.shape[1]
        if self.frames:
            if frames != 1:
                x = self.by_frame(self.by_position(x, frames) + self.temporal_embedding[:, :frames], n)
            h, _ = self.temporal_attn(self.temporal_layer_norm1(self.by_position(x, frames)))
            x = x + self.by_frame(h, n)
            if self.temporal_mlp is not None:
                x = x + self.by_frame(self.temporal_mlp(self.temporal_layer_norm2(self.by_position(x, frames))), n)
        h, weights = self.self_attn(self.layer_norm1(x), causal, padding)
        x = x + h
        return x + self.mlp(self.layer_norm2(x)), weights


class Encoder(nn.Module):
    def __init__(self, config: Any, temporal_mlp: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, temporal_mlp) for _ in range(config.num_hidden_layers))

    def forward(self, x: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, **arguments)
            states.append(x)
            attentions.append(weights)
        return x, states, attentions


class VisionEmbeddings(nn.Module):
    def __init__(self, config: Any, mel_grid: bool):
        super().__init__()
        patch, width = config.patch_size, config.hidden_size
        mel_grid = mel_grid and bool(config.num_mel_bins)
        size = (config.num_mel_bins, config.target_length) if mel_grid else (config.image_size, config.image_size)
        positions = int(size[0] // patch) * int(size[1] // patch) + 1
        self.frames = config.num_frames
        self.tubes = config.add_time_attn and getattr(config, "clip_type", "vl") == "vl_new"
        if self.tubes:
            kernel = (getattr(config, "tube_size", 1), patch, patch)
            self.patch_embedding: nn.Module = nn.Conv3d(config.num_channels, width, kernel, stride=kernel, bias=False)
            self.class_embedding = nn.Parameter(torch.zeros(config.num_frames // kernel[0], width))
        else:
            self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
            self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # [(b t), c, h, w] -> [(b t'), 1 + n, d]
        if not self.tubes:
            patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
            return tokens + self.position_embedding.weight
        clips = pixels.view(-1, self.frames, *pixels.shape[1:]).transpose(1, 2).contiguous()  # [b, c, t, h, w]
        patches = self.patch_embedding(clips).flatten(3).permute(0, 2, 3, 1)  # [b, t', n, d]
        classes = self.class_embedding[None, :, None].repeat(len(clips), 1, 1, 1)
        return (torch.cat([classes, patches], dim=2) + self.position_embedding.weight).flatten(0, 1)


class VisionTransformer(nn.Module):
    def __init__(self, config: Any, temporal_mlp: bool, mel_grid: bool):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config, mel_grid)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, temporal_mlp)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """4-, 5- or 7-D pixels -> last_hidden_state, pooler_output, hidden_states, attentions."""
        x = pixel_values
        if x.ndim == 7:
            clips, frames = x.shape[0] * x.shape[1] * x.shape[3], x.shape[2]
            x = x.reshape(clips * frames, *x.shape[4:])
        elif x.ndim == 5:
            clips, frames = x.shape[0], x.shape[2]
            x = x.transpose(1, 2).reshape(clips * frames, x.shape[1], *x.shape[3:])
        else:
            clips, frames = x.shape[0], 1
        x = self.pre_layrnorm(self.embeddings(x))
        inner = self.config.num_frames if self.config.add_time_attn else 1
        x, states, attentions = self.encoder(x, frames=inner)
        pooled = self.post_layernorm(x[:, 0]).reshape(clips, frames, -1).mean(1)
        return {"last_hidden_state": x, "pooler_output": pooled, "hidden_states": states, "attentions": attentions}


class TextEmbeddings(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class TextTransformer(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """(B, N) ids, (B, N) mask with 1 for tokens -> last_hidden_state, pooler_output, hidden_states, attentions."""
        n = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(n, device=input_ids.device)[None]
        x = self.embeddings(input_ids, position_ids)
        lowest = torch.finfo(x.dtype).min
        causal = torch.full((n, n), lowest, dtype=x.dtype, device=x.device).triu(1)[None, None]
        padding = None
        if attention_mask is not None:
            padding = (attention_mask == 0)[:, None, None].to(x.dtype) * lowest
        x, states, attentions = self.encoder(x, causal=causal, padding=padding)
        x = self.final_layer_norm(x)
        pooled = x[torch.arange(len(x), device=x.device), input_ids.argmax(dim=-1)]
        return {"last_hidden_state": x, "pooler_output": pooled, "hidden_states": states, "attentions": attentions}


class LanguageBind(nn.Module):
    """One modality and its text tower.

    Args:
        config: as of our models, read field by field.
        temporal_mlp, mel_grid: of the modality.
    """

    def __init__(self, config: Any, temporal_mlp: bool = True, mel_grid: bool = False):
        super().__init__()
        vision, text = config.vision_config, config.text_config
        self.text_model = TextTransformer(text)
        self.vision_model = VisionTransformer(vision, vision.add_time_attn and temporal_mlp, mel_grid)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.visual_projection(self.vision_model(pixel_values)["pooler_output"])

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.text_projection(self.text_model(input_ids, attention_mask)["pooler_output"])

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """-> image_embeds, text_embeds, logits_per_image, logits_per_text, loss, and the towers' outputs."""
        vision, text = self.vision_model(pixel_values), self.text_model(input_ids, attention_mask)
        image_embeds = self.visual_projection(vision["pooler_output"])
        text_embeds = self.text_projection(text["pooler_output"])
        image_embeds = image_embeds / image_embeds.norm(p=2, dim=-1, keepdim=True)
        text_embeds = text_embeds / text_embeds.norm(p=2, dim=-1, keepdim=True)
        logits_per_text = text_embeds @ image_embeds.t() * self.logit_scale.exp()
        result = {"image_embeds": image_embeds, "text_embeds": text_embeds, "logits_per_text": logits_per_text}
        if len(image_embeds) == len(text_embeds):
            labels = torch.arange(len(logits_per_text), device=logits_per_text.device)
            rows, columns = F.cross_entropy(logits_per_text, labels), F.cross_entropy(logits_per_text.t(), labels)
            result["loss"] = (rows + columns) / 2
        result["logits_per_image"] = logits_per_text.t()
        return {**result, "vision_model_output": vision, "text_model_output": text}


def like(model: Any) -> LanguageBind:
    """The baseline with a copy of the weights of one of our models, adapters apart where they are; in eval mode."""
    modality = model.config.modality
    reference = LanguageBind(model.config, modality.temporal_mlp, modality.mel_grid)
    reference.load_state_dict(model.state_dict(), strict=True)
    parameter = next(model.parameters())
    return reference.to(device=parameter.device, dtype=parameter.dtype).eval()
