"""Takes a live upstream model and returns ours on the same parameters."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from lbfast.model import checkpoint
from lbfast.model.config import MODALITIES, LanguageBindTextConfig, LanguageBindVisionConfig, Modality
from lbfast.model.languagebind import LanguageBind, LanguageBindModel, ModalityScales, model_dict
from lbfast.model.lora import add_lora
from lbfast.model.towers import TextTransformer, VisionTransformer


def accelerate(model: nn.Module) -> Any:
    """Ours in place of an upstream model, sharing its parameters: training either one trains both, nothing is copied.

    Args:
        model: upstream's LanguageBind, LanguageBind{Image,Video,Audio,Depth,Thermal}, or the vision_model of one.
            Adapters of peft stay apart, shared too. One of our own models is returned as it is.

    Returns:
        LanguageBind, LanguageBind{Image,...} or the vision tower, on the same device, in the same mode.

    Raises:
        TypeError: another kind of module. ValueError: parameters that do not fit.
    """
    if isinstance(model, (LanguageBind, LanguageBindModel, VisionTransformer)):
        return model
    if hasattr(model, "modality_encoder") and hasattr(model, "modality_config"):
        return _accelerate_all(model)
    config = getattr(model, "config", None)
    if hasattr(model, "vision_model") and hasattr(model, "text_model") and hasattr(config, "vision_config"):
        return _accelerate_model(model)
    if hasattr(model, "pre_layrnorm") and hasattr(model, "post_layernorm") and hasattr(config, "patch_size"):
        return _accelerate_vision(model)
    raise TypeError(
        "model: expected upstream's LanguageBind, one of its modality models or its vision_model, got "
        f"{type(model).__module__}.{type(model).__qualname__}"
    )


def _accelerate_model(model: Any) -> LanguageBindModel:
    name = str(model.config.model_type).removeprefix("LanguageBind").lower()
    if name not in model_dict:
        raise TypeError(f"model: expected one of {', '.join(model_dict)}, got model_type {model.config.model_type}")
    cls = model_dict[name]
    config = cls.config_class.from_dict(model.config.to_dict())
    config.vision_config.lora_r = _rank(model)
    with torch.device("meta"):
        ours = cls(config)
    return _share(ours, model)


def _accelerate_vision(model: Any) -> VisionTransformer:
    config = LanguageBindVisionConfig(**_fields(model.config))
    config.lora_r = _rank(model)
    with torch.device("meta"):
        ours = VisionTransformer(config, _modality(model))
        if config.lora_r:
            add_lora(ours.encoder, config.lora_r, config.lora_alpha, config.lora_dropout, config.add_time_attn)
    return _share(ours, model)


def _accelerate_all(model: Any) -> LanguageBind:
    text = model.modality_encoder["language"]
    with torch.device("meta"):
        ours_text = TextTransformer(LanguageBindTextConfig(**_fields(text.config)))
    encoders: dict[str, nn.Module] = {
        name: _share(ours_text, text) if name == "language" else _accelerate_vision(encoder)
        for name, encoder in model.modality_encoder.items()
    }
    ours = LanguageBind.__new__(LanguageBind)
    nn.Module.__init__(ours)
    ours.use_temp = model.use_temp
    ours.modality_encoder = nn.ModuleDict(encoders)
    ours.modality_proj = model.modality_proj
    ours.modality_scale = ModalityScales(dict(model.modality_scale))
    ours.modality_config = {
        name: model_dict[name].config_class.from_dict(config.to_dict())
        for name, config in model.modality_config.items()
    }
    return ours.train(model.training)


def _fields(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}


def _modality(vision_model: Any) -> Modality:
    """A modality with the structure of a live vision tower."""
    if getattr(vision_model.config, "num_mel_bins", 0) and getattr(vision_model.config, "target_length", 0):
        return MODALITIES["audio"]
    temporal_mlp = any(".temporal_mlp." in name for name, _ in vision_model.named_parameters())
    return MODALITIES["video" if vision_model.config.add_time_attn and not temporal_mlp else "image"]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Live parameters under the names of our modules."""
    return checkpoint.canonical_keys(dict(model.named_parameters()))


def _rank(model: nn.Module) -> int:
    return checkpoint.lora_rank(_state(model))


M = TypeVar("M", bound=nn.Module)


def _share(ours: M, theirs: nn.Module) -> M:
    """Puts their Parameter objects in the places of ours."""
    state = _state(theirs)
    checkpoint.check_state(ours, state, "model")
    for name, _ in list(ours.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(parent), leaf, state[name])
    return ours.train(theirs.training)
