"""Files and captions -> a Parquet file of embeddings: what `lbfast embed` runs. Names are imported at first use."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "BadFileError": "pipeline",
    "Failure": "items",
    "Summary": "pipeline",
    "embed_files": "pipeline",
    "find_items": "items",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lbfast.embedding' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lbfast.embedding.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
