"""lbfast under upstream's name, for code that nobody edits: `import languagebind` gives this package.

    python -m lbfast.languagebind script.py args...     runs a script so
    lbfast.install_as_languagebind()                    before the first import of languagebind, in a program of yours

Nothing of others is patched: a folder of ours, with a package `languagebind` that stands in, comes first in sys.path.
Its names are upstream's; its submodules (`languagebind.video.processing_video`...) are those of `lbfast.paths`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbfast import paths

if TYPE_CHECKING:
    from lbfast import (
        LanguageBind as LanguageBind,
        LanguageBindAudio as LanguageBindAudio,
        LanguageBindAudioConfig as LanguageBindAudioConfig,
        LanguageBindAudioProcessor as LanguageBindAudioProcessor,
        LanguageBindAudioTokenizer as LanguageBindAudioTokenizer,
        LanguageBindDepth as LanguageBindDepth,
        LanguageBindDepthConfig as LanguageBindDepthConfig,
        LanguageBindDepthProcessor as LanguageBindDepthProcessor,
        LanguageBindDepthTokenizer as LanguageBindDepthTokenizer,
        LanguageBindImage as LanguageBindImage,
        LanguageBindImageConfig as LanguageBindImageConfig,
        LanguageBindImageProcessor as LanguageBindImageProcessor,
        LanguageBindImageTokenizer as LanguageBindImageTokenizer,
        LanguageBindThermal as LanguageBindThermal,
        LanguageBindThermalConfig as LanguageBindThermalConfig,
        LanguageBindThermalProcessor as LanguageBindThermalProcessor,
        LanguageBindThermalTokenizer as LanguageBindThermalTokenizer,
        LanguageBindVideo as LanguageBindVideo,
        LanguageBindVideoConfig as LanguageBindVideoConfig,
        LanguageBindVideoProcessor as LanguageBindVideoProcessor,
        LanguageBindVideoTokenizer as LanguageBindVideoTokenizer,
        config_dict as config_dict,
        model_dict as model_dict,
        to_device as to_device,
        transform_dict as transform_dict,
    )

FOLDER = Path(__file__).parent / "shim"
"""On sys.path, it holds the package `languagebind`."""

_NAMES = ("LanguageBind", "config_dict", "model_dict", "to_device", "transform_dict")
_KINDS = ("", "Config", "Processor", "Tokenizer")
_OWN = [f"LanguageBind{modality.capitalize()}{kind}" for modality in paths.MODALITIES for kind in _KINDS]
__all__ = ["LanguageBind", "config_dict", "install_as_languagebind", "model_dict", "to_device", "transform_dict"]
__all__ += _OWN


def names() -> dict[str, str]:
    """Upstream's names, and where they are."""
    return {name: f"lbfast:{name}" for name in (*_NAMES, *_OWN)}


def install_as_languagebind() -> None:
    """From here on `import languagebind`, and its submodules, give lbfast's; in processes that are spawned too.

    Raises RuntimeError where another package of that name has been imported already.
    """
    there = sys.modules.get(paths.STAND_IN)
    if there is not None:
        if paths.is_ours(paths.STAND_IN):
            return
        raise RuntimeError(
            f"languagebind: expected to be called before it is imported, got {getattr(there, '__file__', there)}"
        )
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    importlib.invalidate_caches()


def __getattr__(name: str) -> Any:
    if name not in _NAMES and name not in _OWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("lbfast"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
