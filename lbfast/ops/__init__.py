"""The operations LanguageBind is made of; each module holds one op's contract and its torch implementation.

The names here are the functions; `importlib.import_module("lbfast.ops.attention")` gives the module of that name.
"""

from __future__ import annotations

from lbfast.ops.attention import attention
from lbfast.ops.temporal_attention import temporal_attention

__all__ = ["attention", "temporal_attention"]
