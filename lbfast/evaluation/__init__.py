"""How good embeddings are: zero-shot classification and retrieval, from tensors or from files.

from lbfast.evaluation import Encoder, retrieve_files

encoder = Encoder.open("LanguageBind/LanguageBind_Video_FT")
print(retrieve_files(encoder, "msrvtt.csv").rankings)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Encoder": "encoder",
    "Ranking": "ranking",
    "Report": "report",
    "class_embeddings": "zero_shot",
    "classify": "zero_shot",
    "classify_files": "zero_shot",
    "pair_files": "retrieval",
    "ranks": "ranking",
    "retrieve": "retrieval",
    "retrieve_files": "retrieval",
    "templates_for": "prompts",
}

if TYPE_CHECKING:
    from lbfast.evaluation.encoder import Encoder as Encoder
    from lbfast.evaluation.prompts import templates_for as templates_for
    from lbfast.evaluation.ranking import Ranking as Ranking, ranks as ranks
    from lbfast.evaluation.report import Report as Report
    from lbfast.evaluation.retrieval import (
        pair_files as pair_files,
        retrieve as retrieve,
        retrieve_files as retrieve_files,
    )
    from lbfast.evaluation.zero_shot import (
        class_embeddings as class_embeddings,
        classify as classify,
        classify_files as classify_files,
    )

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lbfast.evaluation' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lbfast.evaluation.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
