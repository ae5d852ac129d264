"""Upstream's module paths: `lbfast.video.processing_video` and the like, and the same under `languagebind`.

There are no files behind them: a finder, the last that Python asks, makes such a module when it is imported, and each
name in it is imported at first use. It finds modules of ours only.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

MODALITIES = ("image", "video", "audio", "depth", "thermal")
STAND_IN = "languagebind"
"""The name of upstream's package."""

MARK = "__stands_in_for_languagebind__"
"""An attribute of our package of that name."""

_FUNCTIONS = "lbfast.languagebind.functions"
_KINDS = ("modeling", "configuration", "tokenization", "processing")
_TOWERS = {
    "CLIPAttention": "lbfast.model.layers:Attention",
    "CLIPEncoder": "lbfast.model.layers:Encoder",
    "CLIPEncoderLayer": "lbfast.model.layers:EncoderLayer",
    "CLIPMLP": "lbfast.model.layers:MLP",
    "CLIPOutput": "lbfast.model.languagebind:LanguageBindOutput",
    "CLIPPreTrainedModel": "lbfast.model.languagebind:LanguageBindModel",
    "CLIPTextEmbeddings": "lbfast.model.tokens:TextEmbeddings",
    "CLIPTextTransformer": "lbfast.model.towers:TextTransformer",
    "CLIPVisionEmbeddings": "lbfast.model.tokens:VisionEmbeddings",
    "CLIPVisionTransformer": "lbfast.model.towers:VisionTransformer",
    "PatchDropout": "lbfast.model.tokens:PatchDropout",
}
_CONFIGURATIONS = {
    "CLIPTextConfig": "lbfast.model.config:LanguageBindTextConfig",
    "CLIPVisionConfig": "lbfast.model.config:LanguageBindVisionConfig",
}
_PROCESSING = ("OPENAI_DATASET_MEAN", "OPENAI_DATASET_STD", "make_list_of_images")
_OWN = {
    "depth": ("DepthNorm", "opencv_loader"),
    "audio": (
        "AudioTransform",
        "DEFAULT_AUDIO_FRAME_SHIFT_MS",
        "float32_to_int16_torch",
        "int16_to_float32_torch",
        "torchaudio_loader",
    ),
}


def names_of(path: str) -> Mapping[str, str] | None:
    """What upstream's module of that path, below its package, holds: names -> "module:attribute"; None: no such module.

    "video" is an empty package; "video.processing_video" has the processor, its transform, and the loader.
    """
    modality, _, leaf = path.partition(".")
    kind = leaf.removesuffix(f"_{modality}")
    if modality not in MODALITIES or (leaf and (kind not in _KINDS or kind == leaf)):
        return None
    own = f"LanguageBind{modality.capitalize()}"
    if not leaf:
        return {}
    if kind == "modeling":
        return {**_TOWERS, own: f"lbfast:{own}", f"{own}Config": f"lbfast:{own}Config", **_CONFIGURATIONS}
    if kind == "configuration":
        return {f"{own}Config": f"lbfast:{own}Config", **_CONFIGURATIONS}
    if kind == "tokenization":
        return {f"{own}Tokenizer": f"lbfast:{own}Tokenizer"}
    functions = (*_PROCESSING, f"get_{modality}_transform", f"load_and_transform_{modality}", *_OWN.get(modality, ()))
    return {f"{own}Processor": f"lbfast:{own}Processor", **{name: f"{_FUNCTIONS}:{name}" for name in functions}}


def fill(module: ModuleType, names: Mapping[str, str]) -> None:
    """Gives a module names that are imported at first use."""

    def found(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        where, _, attribute = names[name].partition(":")
        value = getattr(importlib.import_module(where), attribute)
        setattr(module, name, value)
        return value

    own: Any = module
    own.__getattr__ = found
    own.__dir__ = lambda: sorted({*vars(module), *names})
    own.__all__ = sorted(names)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds upstream's modules below packages of ours."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        root, _, inside = fullname.partition(".")
        if not inside or not is_ours(root):
            return None
        inside = inside.removeprefix(f"{STAND_IN}.") if root == "lbfast" else inside
        names = names_of(inside)
        if names is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=not names)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        path = spec.name.partition(".")[2].removeprefix(f"{STAND_IN}.")
        module.__doc__ = f"Upstream's languagebind.{path}, of lbfast."
        fill(module, names_of(path) or {})


def is_ours(root: str) -> bool:
    """Whether the top-level package of that name, which has been imported, is lbfast or stands in with its modules."""
    if root not in ("lbfast", STAND_IN):
        return False
    module = sys.modules.get(root)
    return module is sys.modules.get("lbfast") or getattr(module, MARK, False) is True


def install() -> None:
    """Puts the finder behind those that there are, once."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.append(Finder())
