"""LanguageBind, faster: change `languagebind` to `lbfast` in the import and the same checkpoints run.

Public names are imported at first use, so that `import lbfast` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "use_impl": "lbfast.dispatch",
}

if TYPE_CHECKING:
    from lbfast.dispatch import use_impl as use_impl

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lbfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
