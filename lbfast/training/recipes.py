"""Recipes: every choice of a training run that changes its result. By name those of the paper, or from a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lbfast import files
from lbfast.model.config import MODALITIES

MEMORY_FIELDS = ("micro_batch", "memory_budget_mib", "checkpointing", "offload")
"""Fields that change memory and speed, not what is computed: they may change when a run is resumed."""


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value`, as the type that a field has; 1e-4, which YAML reads as a string, becomes the number it is."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in options if option is not type(None))
        origin = typing.get_origin(hint)
    if origin is tuple:  # of whole numbers
        if not isinstance(value, list | tuple) or not value or any(type(item) is not int for item in value):
            raise ValueError(f"{name}: expected a list of whole numbers, got {value!r}")
        return tuple(value)
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: expected a mapping, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    raise ValueError(f"{name}: expected {_KINDS[hint]}, got {value!r}")


@dataclass(frozen=True)
class Recipe:
    """How one modality is bound to language.

    Attributes:
        modality: image, video, audio, depth or thermal.
        vision: fields of the checkpoint's vision config to change, such as {"add_time_attn": True, "num_frames": 8}.
        lora_r: rank of the adapters; 0 trains the whole vision tower.
        lora_alpha, lora_dropout: of the adapters.
        train_text: train the text tower too; False keeps language as it is.
        lock_image: the patch embedding and the norm after it stay as they are.
        temperature: initial; None keeps the checkpoint's. learn_temperature: train it; log-scale stays in [0, ln 100].
        patch_dropout: share of the patches that training drops.
        batch_size: rows of a step over all processes. epochs: passes over the data.
        lr: of adapters. coef_lr: every other parameter has lr * coef_lr. warmup: steps to reach it, then a cosine to 0.
        weight_decay, beta1, beta2, eps: of AdamW; biases, norms and the temperature do not decay.
        clip_norm: largest norm of the gradient; None: any.
        loss: "infonce", or SigLIP's "sigmoid", whose bias, -10 at first, is trained and serves training alone.
        dims: of nested embeddings, numbers of a row: InfoNCE is the mean of those of the renormalised first d numbers,
            for each d; None: of whole rows.
        label_smoothing: of InfoNCE. mask_repeats: pairs whose captions are equal are not negatives of each other.
        precision: of the towers' arithmetic: float32, bfloat16 or float16 (with a gradient scaler); auto: float32 on a
            CPU, bfloat16 on a GPU. Weights stay float32.
        captions: the data's captions by name with their weights, where samples have several; None: the data's own.
        context_length: tokens of a caption, at most.
        seed: of weights that are drawn, of dropout, and of the data's order.
        ema: decay of moving averages of the trained weights, which are evaluated and exported besides; None: none.
        layer_decay: each layer of a tower learns at this times the rate of the one after it; the projections at lr.
        micro_batch: rows of each process that are back-propagated at once; None: as many as fit the budget.
        memory_budget_mib: for the activations of a micro-batch; None: 2048 on a CPU, 60 % of what is free on a GPU.
        checkpointing: recompute activations in the backward: "none", "attention" or whole "layers".
        offload: keep activations in the CPU's memory until the backward.
    """

    modality: str
    vision: Mapping[str, Any] = field(default_factory=dict)
    lora_r: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    train_text: bool = False
    lock_image: bool = True
    temperature: float | None = 0.07
    learn_temperature: bool = True
    patch_dropout: float = 0.0
    batch_size: int = 1024
    epochs: int = 1
    lr: float = 1e-4
    coef_lr: float = 1.0
    warmup: int = 2000
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip_norm: float | None = None
    loss: Literal["infonce", "sigmoid"] = "infonce"
    dims: tuple[int, ...] | None = None
    label_smoothing: float = 0.0
    mask_repeats: bool = False
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    captions: Mapping[str, float] | None = None
    context_length: int = 77
    seed: int = 0
    ema: float | None = None
    layer_decay: float = 1.0
    micro_batch: int | None = None
    memory_budget_mib: float | None = None
    checkpointing: Literal["none", "attention", "layers"] = "none"
    offload: bool = False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _typed(item.name, getattr(self, item.name), hints[item.name]))
        if self.modality not in MODALITIES:
            raise ValueError(f"modality: expected one of {', '.join(MODALITIES)}, got {self.modality!r}")
        for name, (least, below) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (least <= value < below):
                limit = f" and below {below:g}" if below < _ANY else ""
                raise ValueError(f"{name}: expected a number of at least {least:g}{limit}, got {value}")
        if self.loss != "infonce" and self.label_smoothing:
            raise ValueError(f"label_smoothing: expected 0 with loss {self.loss!r}, got {self.label_smoothing}")
        if self.loss != "infonce" and self.dims is not None:
            raise ValueError(f"dims: expected none with loss {self.loss!r}, got {list(self.dims)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as of a YAML file."""
        dims = None if self.dims is None else list(self.dims)
        return {**dataclasses.asdict(self), "vision": dict(self.vision), "dims": dims}

    def replace(self, **changes: Any) -> Recipe:
        """The same with some fields changed. Raises ValueError for an unknown field."""
        return from_dict({**self.to_dict(), **changes}, "recipe")


_ANY = float("inf")
_TINY = 1e-12
_RANGES: dict[str, tuple[float, float]] = {
    "lora_r": (0, _ANY),
    "lora_alpha": (0, _ANY),
    "lora_dropout": (0, 1),
    "temperature": (_TINY, _ANY),
    "patch_dropout": (0, 1),
    "batch_size": (1, _ANY),
    "epochs": (1, _ANY),
    "lr": (0, _ANY),
    "coef_lr": (0, _ANY),
    "warmup": (0, _ANY),
    "weight_decay": (0, _ANY),
    "beta1": (0, 1),
    "beta2": (0, 1),
    "eps": (_TINY, _ANY),
    "clip_norm": (_TINY, _ANY),
    "label_smoothing": (0, 1),
    "context_length": (3, _ANY),
    "seed": (0, _ANY),
    "ema": (0, 1),
    "layer_decay": (_TINY, 1.0001),
    "micro_batch": (1, _ANY),
    "memory_budget_mib": (_TINY, _ANY),
}

_SMALL = {"lora_r": 2, "patch_dropout": 0.5, "coef_lr": 1e-3, "epochs": 1, "warmup": 200}
_CLIP = {"add_time_attn": True, "num_frames": 8}

RECIPES: dict[str, Recipe] = {
    "image": Recipe("image", lora_r=16, patch_dropout=0.1, lr=1e-4, epochs=16, warmup=200),
    "video-lora": Recipe("video", _CLIP, lora_r=16, patch_dropout=0.3, lr=1e-4, epochs=16, batch_size=640),
    "video-full": Recipe(
        "video", {**_CLIP, "clip_type": "vl_new", "tube_size": 1}, patch_dropout=0.3, lr=1e-4, epochs=6
    ),
    "audio": Recipe(
        "audio",
        {"num_mel_bins": 112, "target_length": 1036, "audio_mean": -4.2677393, "audio_std": 4.5689974},
        lora_r=16,
        patch_dropout=0.1,
        lr=1e-3,
        epochs=16,
    ),
    "depth": Recipe("depth", lr=5e-4, **_SMALL),  # type: ignore[arg-type]
    "thermal": Recipe("thermal", lr=1e-4, **_SMALL),  # type: ignore[arg-type]
}
"""The paper's, by name, but for that of images, which it has none of: as video's, shorter. lr of the audio recipe and
coef_lr as in the paper's training scripts."""


def recipe(name_or_file: str | os.PathLike[str], **changes: Any) -> Recipe:
    """A recipe by name, or one from a YAML file; `changes` replace fields.

    A file may name another recipe as its `base` and give only the fields that differ.

    Raises:
        ValueError: an unknown name, field or value, or a file that is no YAML mapping. FileNotFoundError: no such file.
    """
    name = os.fspath(name_or_file)
    if name in RECIPES:
        return RECIPES[name].replace(**changes)
    if not name.endswith((".yaml", ".yml", ".json")):
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)} or a .yaml file, got {name!r}")
    return from_dict({**_read(Path(name)), **changes}, name)


def from_dict(fields: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain values; `where` names them in errors."""
    fields = dict(fields)
    base = fields.pop("base", None)
    if base is not None:
        if base not in RECIPES:
            raise ValueError(f"{where}: base: expected one of {', '.join(RECIPES)}, got {base!r}")
        fields = {**RECIPES[base].to_dict(), **fields}
    known = [item.name for item in dataclasses.fields(Recipe)]
    for key in fields:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
            raise ValueError(f"{where}: unknown field {key!r}{hint}")
    if "modality" not in fields:
        raise ValueError(f"{where}: expected a modality ({', '.join(MODALITIES)}), got none")
    try:
        return Recipe(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def write(plan: Recipe, path: Path) -> None:
    """Writes a recipe that `recipe` reads."""
    import yaml

    files.write(path, yaml.safe_dump(plan.to_dict(), sort_keys=False))


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a YAML file, cannot read it: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a YAML mapping of fields to values, got {type(fields).__name__}")
    return fields
