"""Training under a memory limit: an exact large-batch step, the trainer around it, recipes, checkpoints, data.

from lbfast.training import initial_model, recipe, train

plan = recipe("depth")
train(plan, initial_model("LanguageBind/LanguageBind_Image", plan), batches, "runs/depth")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Evaluation": "lbfast.training.watch",
    "LargeBatchStep": "lbfast.training.step",
    "Recipe": "lbfast.training.recipes",
    "Summary": "lbfast.training.run",
    "TextCache": "lbfast.training.captions",
    "Towers": "lbfast.training.step",
    "export": "lbfast.training.exporter",
    "initial_model": "lbfast.training.start",
    "Plan": "lbfast.training.plan",
    "plan": "lbfast.training.plan",
    "prepare": "lbfast.training.parameters",
    "recipe": "lbfast.training.recipes",
    "train": "lbfast.training.trainer",
}

if TYPE_CHECKING:
    from lbfast.training.captions import TextCache as TextCache
    from lbfast.training.exporter import export as export
    from lbfast.training.parameters import prepare as prepare
    from lbfast.training.plan import Plan as Plan, plan as plan
    from lbfast.training.recipes import Recipe as Recipe, recipe as recipe
    from lbfast.training.run import Summary as Summary
    from lbfast.training.start import initial_model as initial_model
    from lbfast.training.step import LargeBatchStep as LargeBatchStep, Towers as Towers
    from lbfast.training.trainer import train as train
    from lbfast.training.watch import Evaluation as Evaluation

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lbfast.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
