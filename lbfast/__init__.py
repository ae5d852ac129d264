"""LanguageBind, faster: change `languagebind` to `lbfast` in the import and the same checkpoints run.

Public names are imported at first use, so that `import lbfast` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lbfast import paths as _paths

__version__ = "0.1.0"

_MODALITIES = ("Image", "Video", "Audio", "Depth", "Thermal")
_MODEL = "lbfast.model.languagebind"
_CONFIG = "lbfast.model.config"
_PROCESSOR = "lbfast.processing.processor"

_WHERE = {
    "LanguageBind": _MODEL,
    "to_device": _MODEL,
    "model_dict": _MODEL,
    "config_dict": _CONFIG,
    "published_config": _CONFIG,
    "transform_dict": _PROCESSOR,
    "Embedder": "lbfast.embedding.embedder",
    "accelerate": "lbfast.model.accelerate",
    "calibrate": "lbfast.model.calibration",
    "fuse": "lbfast.model.fusion",
    "install_as_languagebind": "lbfast.languagebind",
    "register": "lbfast.auto",
    "search": "lbfast.searching.find",
    "optimize_for_inference": "lbfast.model.inference",
    "CheckpointError": "lbfast.model.checkpoint",
    "MediaError": "lbfast.processing",
    "InfoNCELoss": "lbfast.losses",
    "LanguageBindLoss": "lbfast.losses",
    "SigLipLoss": "lbfast.losses",
    "use_impl": "lbfast.dispatch",
    **{f"LanguageBind{name}": _MODEL for name in _MODALITIES},
    **{f"LanguageBind{name}Config": _CONFIG for name in _MODALITIES},
    **{f"LanguageBind{name}Processor": _PROCESSOR for name in _MODALITIES},
    **{f"LanguageBind{name}Tokenizer": "lbfast.processing.text" for name in _MODALITIES},
}

_ROOMS = ("data", "embedding", "evaluation", "languagebind", "mini", "ops", "processing", "training")

if TYPE_CHECKING:
    from lbfast import (
        data as data,
        embedding as embedding,
        evaluation as evaluation,
        languagebind as languagebind,
        mini as mini,
        ops as ops,
        processing as processing,
        training as training,
    )
    from lbfast.auto import register as register
    from lbfast.dispatch import use_impl as use_impl
    from lbfast.embedding.embedder import Embedder as Embedder
    from lbfast.languagebind import install_as_languagebind as install_as_languagebind
    from lbfast.losses import (
        InfoNCELoss as InfoNCELoss,
        LanguageBindLoss as LanguageBindLoss,
        SigLipLoss as SigLipLoss,
    )
    from lbfast.model.accelerate import accelerate as accelerate
    from lbfast.model.calibration import calibrate as calibrate
    from lbfast.model.checkpoint import CheckpointError as CheckpointError
    from lbfast.model.config import (
        LanguageBindAudioConfig as LanguageBindAudioConfig,
        LanguageBindDepthConfig as LanguageBindDepthConfig,
        LanguageBindImageConfig as LanguageBindImageConfig,
        LanguageBindThermalConfig as LanguageBindThermalConfig,
        LanguageBindVideoConfig as LanguageBindVideoConfig,
        config_dict as config_dict,
        published_config as published_config,
    )
    from lbfast.model.fusion import fuse as fuse
    from lbfast.model.inference import optimize_for_inference as optimize_for_inference
    from lbfast.model.languagebind import (
        LanguageBind as LanguageBind,
        LanguageBindAudio as LanguageBindAudio,
        LanguageBindDepth as LanguageBindDepth,
        LanguageBindImage as LanguageBindImage,
        LanguageBindThermal as LanguageBindThermal,
        LanguageBindVideo as LanguageBindVideo,
        model_dict as model_dict,
        to_device as to_device,
    )
    from lbfast.processing import MediaError as MediaError
    from lbfast.processing.processor import (
        LanguageBindAudioProcessor as LanguageBindAudioProcessor,
        LanguageBindDepthProcessor as LanguageBindDepthProcessor,
        LanguageBindImageProcessor as LanguageBindImageProcessor,
        LanguageBindThermalProcessor as LanguageBindThermalProcessor,
        LanguageBindVideoProcessor as LanguageBindVideoProcessor,
        transform_dict as transform_dict,
    )
    from lbfast.processing.text import (
        LanguageBindAudioTokenizer as LanguageBindAudioTokenizer,
        LanguageBindDepthTokenizer as LanguageBindDepthTokenizer,
        LanguageBindImageTokenizer as LanguageBindImageTokenizer,
        LanguageBindThermalTokenizer as LanguageBindThermalTokenizer,
        LanguageBindVideoTokenizer as LanguageBindVideoTokenizer,
    )
    from lbfast.searching.find import search as search

__all__ = [*_WHERE, "__version__"]

_paths.install()


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"lbfast.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'lbfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})
