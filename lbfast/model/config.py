"""Configurations of LanguageBind models, and the table of modalities. Field names and defaults are upstream's."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from transformers import PretrainedConfig

from lbfast.model import hub, schema

C = TypeVar("C", bound="CheckedConfig")


@dataclass(frozen=True)
class Modality:
    """What tells one modality from the others.

    Attributes:
        name: key in `clip_type` and in the inputs of `LanguageBind`.
        vision_defaults: fields that only this modality's vision config has, with upstream's defaults.
        temporal_mlp: with `add_time_attn`, layers also have temporal_layer_norm2 and temporal_mlp; video has not.
        mel_grid: pixels are num_mel_bins x target_length; the position table is made for that grid.
    """

    name: str
    vision_defaults: dict[str, Any] = field(default_factory=dict)
    temporal_mlp: bool = True
    mel_grid: bool = False


MODALITIES: dict[str, Modality] = {
    m.name: m
    for m in (
        Modality("image"),
        Modality("video", temporal_mlp=False),
        Modality("audio", {"audio_sample_rate": 16000, "audio_mean": 0.5, "audio_std": 0.5}, mel_grid=True),
        Modality("depth", {"max_depth": 10}),
        Modality("thermal"),
    )
}


class CheckedConfig(PretrainedConfig):
    """A configuration whose fields, where they come from a file, are checked before anything is made of them."""

    base_config_key: ClassVar[str] = ""  # of a tower, in the whole's; transformers 4.46 has none
    rules: ClassVar[Mapping[str, schema.Rule]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        # transformers 5 would make a dataclass, with an __init__ of its own, of a subclass that has none
        cls.__init__ = cls.__init__  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[C], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> C | tuple[C, dict[str, Any]]:
        """Reads config.json of a directory or a repository of the hub; for one tower, its part of it.

        Args:
            pretrained_model_name_or_path: directory, name on the hub, or "lbfast-mini/...".
            kwargs: cache_dir, revision, token, local_files_only, force_download, subfolder; fields to replace;
                return_unused_kwargs=True for (configuration, the keywords that are none).

        Raises:
            FileNotFoundError, OSError: it is not there. CheckpointError: a field is not what it may be, or the
            configuration is of another model; the message names the file and the field.
        """
        options = hub.hub_options(kwargs)
        file = hub.find_file(hub.full_name(pretrained_model_name_or_path), "config.json", **options)
        fields = hub.read_json(file)
        try:
            if isinstance(fields, dict):
                fields = fields.get(cls.base_config_key, fields)
            written = fields.get("model_type", cls.model_type) if isinstance(fields, dict) else cls.model_type
            config = cls.from_dict(fields, **kwargs)
        except hub.CheckpointError as error:
            raise hub.CheckpointError(
                f"{file}: expected a {cls.model_type} configuration, cannot read it: {error}"
            ) from error
        if written not in (cls.model_type, "clip"):
            raise hub.CheckpointError(f"{file}: expected model_type {cls.model_type}, got {written}")
        return config

    @classmethod
    def from_dict(cls: type[C], config_dict: dict[str, Any], **kwargs: Any) -> C:
        """Fields as a file has them. Raises CheckpointError naming one that is not what it may be."""
        config = super().from_dict(schema.checked(config_dict, cls.rules), **kwargs)
        made = config[0] if isinstance(config, tuple) else config
        for tower in made._towers():
            schema.check_together(tower)
        return config

    def _towers(self) -> list[PretrainedConfig]:
        return [self]


class LanguageBindTextConfig(CheckedConfig):
    """Text tower. `vocab_size`, `max_position_embeddings` (77) and the widths are those of CLIP."""

    rules = schema.TEXT
    model_type = "clip_text_model"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        pad_token_id: int = 1,
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
        **kwargs: Any,
    ):
        kwargs.pop("add_time_attn", None)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.projection_dim = projection_dim
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.add_time_attn = False
        kwargs |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**kwargs)


class LanguageBindVisionConfig(CheckedConfig):
    """Vision tower of any modality. `image_size` in pixels; for audio the pixels are num_mel_bins x target_length.

    `clip_type="vl_new"` with `add_time_attn` embeds tubes of `tube_size` frames, with a class embedding for each.
    """

    rules = schema.VISION
    model_type = "clip_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        add_time_attn: bool = False,
        num_frames: int = 1,
        force_patch_dropout: float = 0.0,
        lora_r: int = 2,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        num_mel_bins: float = 0.0,
        target_length: float = 0.0,
        video_decode_backend: str = "decord",
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.projection_dim = projection_dim
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        # upstream's audio models overwrite it with [num_mel_bins, target_length]
        self.image_size = image_size if isinstance(image_size, int) else min(image_size)
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.add_time_attn = add_time_attn
        self.num_frames = num_frames
        self.force_patch_dropout = force_patch_dropout
        self.lora_r = lora_r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.num_mel_bins = num_mel_bins
        self.target_length = target_length
        self.video_decode_backend = video_decode_backend
        super().__init__(**kwargs)


class LanguageBindConfig(CheckedConfig):
    """One modality and its text tower; the base of LanguageBind{Image,Video,Audio,Depth,Thermal}Config.

    Args:
        text_config, vision_config: dicts, config objects, or None for the defaults.
        projection_dim: size of the shared embedding.
        logit_scale_init_value: log of the initial temperature factor.
    """

    rules = schema.WHOLE
    modality: ClassVar[Modality]
    sub_configs: ClassVar[dict[str, type]] = {
        "text_config": LanguageBindTextConfig,
        "vision_config": LanguageBindVisionConfig,
    }

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        **kwargs: Any,
    ):
        self.text_config = LanguageBindTextConfig(
            **{**_as_dict(text_config), **(kwargs.pop("text_config_dict", None) or {})}
        )
        self.vision_config = LanguageBindVisionConfig(
            **{
                **self.modality.vision_defaults,
                **_as_dict(vision_config),
                **(kwargs.pop("vision_config_dict", None) or {}),
            }
        )
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        self.initializer_factor = kwargs.pop("initializer_factor", 1.0)
        super().__init__(**kwargs)

    def _towers(self) -> list[PretrainedConfig]:
        return [self.text_config, self.vision_config]

    @classmethod
    def from_text_vision_configs(
        cls, text_config: PretrainedConfig, vision_config: PretrainedConfig, **kwargs: Any
    ) -> LanguageBindConfig:
        """Joins the configurations of two towers."""
        return cls(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **kwargs)


def _as_dict(config: dict[str, Any] | PretrainedConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    fields = copy.deepcopy(config) if isinstance(config, dict) else config.to_dict()
    for key in ("model_type", "transformers_version"):
        fields.pop(key, None)
    return fields


class LanguageBindImageConfig(LanguageBindConfig):
    model_type = "LanguageBindImage"
    modality = MODALITIES["image"]


class LanguageBindVideoConfig(LanguageBindConfig):
    model_type = "LanguageBindVideo"
    modality = MODALITIES["video"]


class LanguageBindAudioConfig(LanguageBindConfig):
    model_type = "LanguageBindAudio"
    modality = MODALITIES["audio"]


class LanguageBindDepthConfig(LanguageBindConfig):
    model_type = "LanguageBindDepth"
    modality = MODALITIES["depth"]


class LanguageBindThermalConfig(LanguageBindConfig):
    model_type = "LanguageBindThermal"
    modality = MODALITIES["thermal"]


config_dict: dict[str, type[LanguageBindConfig]] = {
    config.modality.name: config
    for config in (
        LanguageBindImageConfig,
        LanguageBindVideoConfig,
        LanguageBindAudioConfig,
        LanguageBindDepthConfig,
        LanguageBindThermalConfig,
    )
}

_TOWERS = {  # vision L/14 and H/14 of the published models, with their text towers
    "large": ((1024, 24, 16, 4096), (768, 12, 12, 3072), 768),
    "huge": ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 1024),
}


def published_config(modality: str, size: str = "large", **vision: Any) -> LanguageBindConfig:
    """The configuration of the published models: "large" is L/14, "huge" H/14. For random weights, tests and benches.

    Args:
        modality: "image", "video", "audio", "depth" or "thermal".
        size: "large" or "huge".
        vision: fields of the vision config that differ, e.g. clip_type="vl_new", lora_r=16.
    """
    if modality not in config_dict:
        raise ValueError(f"modality: expected one of {', '.join(config_dict)}, got {modality!r}")
    if size not in _TOWERS:
        raise ValueError(f"size: expected one of {', '.join(_TOWERS)}, got {size!r}")
    (vw, vl, vh, vm), (tw, tl, th, tm), out = _TOWERS[size]
    common = {"hidden_act": "gelu", "projection_dim": out}
    fields: dict[str, Any] = {"patch_size": 14, "lora_r": 0}
    if modality == "video":
        fields |= {"add_time_attn": True, "num_frames": 8}
    if modality == "audio":
        fields |= {"num_mel_bins": 112, "target_length": 1036, "audio_mean": -4.2677393, "audio_std": 4.5689974}
    return config_dict[modality](
        text_config={
            **common,
            "hidden_size": tw,
            "num_hidden_layers": tl,
            "num_attention_heads": th,
            "intermediate_size": tm,
        },
        vision_config={
            **common,
            "hidden_size": vw,
            "num_hidden_layers": vl,
            "num_attention_heads": vh,
            "intermediate_size": vm,
            **fields,
            **vision,
        },
        projection_dim=out,
    )
