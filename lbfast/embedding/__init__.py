"""Files and captions -> a Parquet file of embeddings: what `lbfast embed` runs. Names are imported at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "BadFileError": "embedder",
    "Embedder": "embedder",
    "Failure": "items",
    "Summary": "pipeline",
    "embed_files": "pipeline",
    "find_items": "items",
}

if TYPE_CHECKING:
    from lbfast.embedding.embedder import BadFileError as BadFileError, Embedder as Embedder
    from lbfast.embedding.items import Failure as Failure, find_items as find_items
    from lbfast.embedding.pipeline import Summary as Summary, embed_files as embed_files

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lbfast.embedding' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lbfast.embedding.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
