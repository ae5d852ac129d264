"""Files and captions -> tensors. Public names are imported at first use: `import lbfast.processing` costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    **dict.fromkeys(("MediaError", "MediaWarning", "Reading", "Limits"), "media"),
    "Processor": "processor",
    "transform_dict": "processor",
    **{f"LanguageBind{name}Processor": "processor" for name in ("Image", "Video", "Audio", "Depth", "Thermal")},
    **{f"LanguageBind{name}Tokenizer": "text" for name in ("Image", "Video", "Audio", "Depth", "Thermal")},
    "default_tokenizer": "text",
    "Compose": "transforms",
}

if TYPE_CHECKING:
    from lbfast.processing.media import (
        Limits as Limits,
        MediaError as MediaError,
        MediaWarning as MediaWarning,
        Reading as Reading,
    )
    from lbfast.processing.processor import (
        LanguageBindAudioProcessor as LanguageBindAudioProcessor,
        LanguageBindDepthProcessor as LanguageBindDepthProcessor,
        LanguageBindImageProcessor as LanguageBindImageProcessor,
        LanguageBindThermalProcessor as LanguageBindThermalProcessor,
        LanguageBindVideoProcessor as LanguageBindVideoProcessor,
        Processor as Processor,
        transform_dict as transform_dict,
    )
    from lbfast.processing.text import (
        LanguageBindAudioTokenizer as LanguageBindAudioTokenizer,
        LanguageBindDepthTokenizer as LanguageBindDepthTokenizer,
        LanguageBindImageTokenizer as LanguageBindImageTokenizer,
        LanguageBindThermalTokenizer as LanguageBindThermalTokenizer,
        LanguageBindVideoTokenizer as LanguageBindVideoTokenizer,
        default_tokenizer as default_tokenizer,
    )
    from lbfast.processing.transforms import Compose as Compose

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lbfast.processing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lbfast.processing.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
