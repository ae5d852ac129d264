"""CLIP's initialisation, module by module."""

from __future__ import annotations

import torch
from torch import nn

from lbfast.model.layers import MLP, Attention, EncoderLayer
from lbfast.model.tokens import TextEmbeddings, VisionEmbeddings, resize_position_embedding


def initialise(module: nn.Module, factor: float) -> None:
    """Draws the parameters of one module, its children's before: it knows more of what they are for."""
    if isinstance(module, TextEmbeddings):
        nn.init.normal_(module.token_embedding.weight, std=0.02 * factor)
        nn.init.normal_(module.position_embedding.weight, std=0.02 * factor)
    elif isinstance(module, VisionEmbeddings):
        spread = module.config.initializer_range * factor
        nn.init.normal_(module.class_embedding, std=module.embed_dim**-0.5 * factor)
        nn.init.normal_(module.patch_embedding.weight, std=spread)
        rows, columns = module.grid
        table = torch.empty((module.image_size // module.patch_size) ** 2 + 1, module.embed_dim).normal_(std=spread)
        if module.position_embedding.weight.shape != table.shape or rows != columns:
            table = resize_position_embedding(table, module.grid)
        module.position_embedding.weight.copy_(table)
    elif isinstance(module, Attention):
        width, depth = module.config.hidden_size, module.config.num_hidden_layers
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            nn.init.normal_(projection.weight, std=width**-0.5 * (2 * depth) ** -0.5 * factor)
        nn.init.normal_(module.out_proj.weight, std=width**-0.5 * factor)
    elif isinstance(module, MLP):
        width, depth = module.config.hidden_size, module.config.num_hidden_layers
        nn.init.normal_(module.fc1.weight, std=(2 * width) ** -0.5 * factor)
        nn.init.normal_(module.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5 * factor)
    elif isinstance(module, EncoderLayer) and module.add_time_attn:
        nn.init.normal_(module.temporal_embedding, std=module.temporal_embedding.shape[-1] ** -0.5)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
