"""The operations LanguageBind is made of; each module holds one op's contract and its torch implementation.

The names here are the functions; `importlib.import_module("lbfast.ops.attention")` gives the module of that name.
"""

from __future__ import annotations

from lbfast.ops.attention import attention
from lbfast.ops.info_nce import info_nce
from lbfast.ops.layer_norm import layer_norm
from lbfast.ops.mlp import mlp
from lbfast.ops.patch_embed import patch_embed
from lbfast.ops.sigmoid_loss import sigmoid_loss
from lbfast.ops.temporal_attention import temporal_attention

__all__ = ["attention", "info_nce", "layer_norm", "mlp", "patch_embed", "sigmoid_loss", "temporal_attention"]
