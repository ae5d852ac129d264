"""The model that training starts from: a checkpoint of any modality, or of CLIP, made into one of the recipe's."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lbfast.messages import named, shown
from lbfast.model import checkpoint, hub, schema
from lbfast.model.config import LanguageBindConfig, config_dict
from lbfast.model.languagebind import LanguageBindModel, model_dict
from lbfast.model.lora import lora_modules
from lbfast.model.tokens import resize_position_embedding
from lbfast.training.parameters import prepare
from lbfast.training.recipes import Recipe

ENCODER = "vision_model.encoder."
ADAPTER_ROOT = "base_model.model."
"""What peft puts before the names of the module that it adapts: the encoder."""

OTHERS = "trained.safetensors"
"""Beside the adapters: the other parameters that were trained."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", OTHERS)

_TEXT = ("text_model.", "text_projection.")


def initial_model(
    where: str | os.PathLike[str],
    recipe: Recipe,
    *,
    random: bool = False,
    text: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> LanguageBindModel:
    """A model of the recipe's modality, in float32 on the CPU, prepared for training.

    What the checkpoint has not is made from what it has: temporal attention and its norm are copies of the spatial
    ones, temporal embeddings are drawn from N(0, 1 / sqrt(D)); a spectrogram's position table is interpolated; a patch
    embedding of tubes begins as that of single frames, spread over the tube. Adapters of the checkpoint are merged.

    Args:
        where: directory or hub name of a checkpoint of any modality, or of CLIP in Hugging Face's layout.
        random: only read the configuration (`where` may then be a config.json) and draw the weights.
        text: a checkpoint whose text tower and projection are taken instead.
        adapter: a directory with peft-style adapters to go on from.
        cache_dir, revision: of downloads.

    Raises ValueError, CheckpointError or OSError as `from_pretrained` does.
    """
    files: dict[str, Any] = {"cache_dir": cache_dir, "revision": revision}
    where = _resolved(where)
    fields = _read_config(where, files)
    source = None
    if not random:
        kind = next((m for m in model_dict.values() if m.config_class.model_type == fields["model_type"]), None)
        source = (kind or model_dict["image"]).from_pretrained(where, **files)
    config = _config_for(recipe, fields)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = model_dict[recipe.modality](config)
    if source is not None:
        _fill(model, source.state_dict(), str(where))
    if text is not None:
        _take_text(model, text, files)
    if recipe.temperature is not None:
        with torch.no_grad():
            model.logit_scale.copy_(torch.tensor(1 / recipe.temperature).log())
    prepare(model, recipe)
    if adapter is not None:
        load_adapter(model, Path(adapter))
    return model


def tokenizer_of(where: str | os.PathLike[str], modality: str, **hub: Any) -> tuple[Any, list[Path]]:
    """The tokenizer beside a checkpoint, with its files where they are in a directory; see its `from_pretrained`."""
    from lbfast.processing.text import TOKENIZERS, default_tokenizer, has_clips_vocabulary
    from lbfast.processing.vocabulary import FILES, is_whole

    path = Path(_resolved(where))
    folder = path.parent if path.is_file() else path
    files = {name: folder / name for name in FILES if (folder / name).is_file()}
    if path.is_file() and not is_whole(files) and has_clips_vocabulary(path):
        return default_tokenizer(TOKENIZERS[modality]), []
    return TOKENIZERS[modality].from_pretrained(folder if folder.is_dir() else where, **hub), [*files.values()]


def _resolved(where: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A file as it is; else a directory, that of lbfast-mini too, or a repository id."""
    return where if Path(where).is_file() else checkpoint.full_name(where)


def _read_config(where: str | os.PathLike[str], files: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, checked."""
    path = Path(where) if Path(where).is_file() else hub.find_file(where, "config.json", **files)
    found = hub.read_json(path)
    known = {config.model_type for config in config_dict.values()} | {"clip"}
    written = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(written, str) or written not in known:
        raise checkpoint.CheckpointError(
            f"{path}: expected the configuration of a LanguageBind or CLIP model: model_type is {shown(written)}"
        )
    try:
        fields = schema.checked(found, schema.WHOLE)
        missing = [name for name in ("text_config", "vision_config") if name not in fields]
        if missing:
            raise checkpoint.CheckpointError(f"{missing[0]}: expected the fields of a tower, got none")
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from None
    return fields


def _config_for(recipe: Recipe, fields: Mapping[str, Any]) -> LanguageBindConfig:
    """A configuration of the recipe's modality with the sizes of another's."""
    vision = {k: v for k, v in fields["vision_config"].items() if k != "model_type"}
    vision |= {"lora_r": 0, "force_patch_dropout": recipe.patch_dropout, **recipe.vision}
    text = {k: v for k, v in fields["text_config"].items() if k != "model_type"}
    own = {k: fields[k] for k in ("projection_dim", "logit_scale_init_value") if k in fields}
    return config_dict[recipe.modality](text_config=text, vision_config=vision, **own)


def _fill(model: LanguageBindModel, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Copies a checkpoint's tensors into a model that may have more, or other shapes where they can be fitted."""
    vision, ready = model.vision_model, {}
    for key, wanted in model.state_dict().items():
        spatial = key.replace(".temporal_attn.", ".self_attn.").replace(".temporal_layer_norm", ".layer_norm")
        spatial = spatial.replace(".temporal_mlp.", ".mlp.")
        if key in state:
            ready[key] = _fitted(key, state[key], wanted, vision.embeddings.grid)
        elif spatial in state:
            ready[key] = state[spatial]
        elif key.endswith(".temporal_embedding"):
            ready[key] = wanted  # drawn
        else:
            raise checkpoint.CheckpointError(f"{where}: the weights do not fit the model; missing: {key}")
    checkpoint.check_state(model, ready, where)
    model.load_state_dict(ready, strict=True)


def _fitted(key: str, value: torch.Tensor, wanted: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """`value` in the shape wanted, where there is a way."""
    if value.shape == wanted.shape:
        return value
    if key.endswith("embeddings.position_embedding.weight") and value.shape[1:] == wanted.shape[1:]:
        return resize_position_embedding(value, grid)
    if key.endswith("embeddings.class_embedding") and value.shape == wanted.shape[-1:]:
        return value.expand_as(wanted)
    if key.endswith("embeddings.patch_embedding.weight") and wanted.ndim == 5 and value.ndim == 4:
        return (value[:, :, None] / wanted.shape[2]).expand_as(wanted)
    return value  # check_state names it


def _take_text(model: LanguageBindModel, where: str | os.PathLike[str], files: Mapping[str, Any]) -> None:
    """Copies the text tower and its projection from another checkpoint."""
    name = checkpoint.full_name(where)
    state = checkpoint.canonical_keys(checkpoint.read_state_dict(checkpoint.find_files(name, **files)))
    own = model.state_dict()
    taken = {key: value for key, value in state.items() if key.startswith(_TEXT)}
    checkpoint.check_state(model, {**own, **taken}, str(where))
    missing = [key for key in own if key.startswith(_TEXT) and key not in taken]
    if missing:
        raise checkpoint.CheckpointError(f"{where}: expected a text tower, missing: {', '.join(missing[:8])}")
    model.load_state_dict({**own, **taken}, strict=True)


def load_adapter(model: LanguageBindModel, folder: Path) -> None:
    """Loads peft-style adapters into a model that has adapters in the same places, and the parameters beside them.

    Raises:
        FileNotFoundError: no adapter_config.json and adapter_model.safetensors or .bin there.
        CheckpointError: adapters for other layers, or of another rank.
    """
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    config_file = folder / "adapter_config.json"
    if not files or not config_file.is_file():
        raise FileNotFoundError(f"{folder}: expected adapter_config.json and adapter_model.safetensors there")
    try:
        config = hub.read_json(config_file)
        alpha, rank = float(config["lora_alpha"]), int(config["r"])
        if not (math.isfinite(alpha) and rank > 0):
            raise ValueError(f"lora_alpha {alpha}, r {rank}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise checkpoint.CheckpointError(
            f"{config_file}: expected a LoRA configuration of peft: {named(error)}"
        ) from None
    state = {
        ENCODER + key.removeprefix(ADAPTER_ROOT).removeprefix(ENCODER): value
        for key, value in checkpoint.read_state_dict(files[:1]).items()
    }
    if (folder / OTHERS).is_file():
        state |= checkpoint.read_state_dict([folder / OTHERS])
    wanted = {f"{name}.{part}.weight" for name, _ in lora_modules(model) for part in ("lora_A", "lora_B")}
    found = {key for key in state if ".lora_" in key}
    if wanted != found:
        odd = sorted(wanted ^ found)
        raise checkpoint.CheckpointError(
            f"{folder}: expected adapters for {len(wanted) // 2} layers, these differ: {odd[:4]}"
        )
    own = model.state_dict()
    checkpoint.check_state(model, {**own, **state}, str(folder))
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)
    for _, module in lora_modules(model):
        module.scaling = alpha / rank
    model.config.vision_config.lora_alpha = alpha
