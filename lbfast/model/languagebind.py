"""LanguageBind: one modality with its text tower, and all of them bound to one language space."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lbfast import ops
from lbfast.model import checkpoint, config as configs, saving
from lbfast.model.config import LanguageBindConfig
from lbfast.model.frozen import Freezable
from lbfast.model.initial import initialise
from lbfast.model.pair import Pair
from lbfast.model.towers import (
    output_flags,
    pooled,
    tower_in,
)


@dataclass
class LanguageBindOutput(ModelOutput):
    """What a LanguageBind model returns; fields and order are those of Hugging Face's CLIPOutput.

    Attributes:
        loss: scalar, with return_loss.
        logits_per_image: (images, texts), cosines times exp(logit_scale).
        logits_per_text: (texts, images).
        text_embeds, image_embeds: (B, E), of unit length.
        text_model_output, vision_model_output: of the towers.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: Any = None
    vision_model_output: Any = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, the towers' outputs as tuples too."""
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in (self[k] for k in self.keys()))


class LanguageBindModel(Pair, PreTrainedModel):  # type: ignore[misc]
    """Base of LanguageBind{Image,Video,Audio,Depth,Thermal}: they differ only in their configuration.

    Args:
        config: with `vision_config.lora_r > 0` the encoder gets trainable adapters and is frozen otherwise.
    """

    base_model_prefix = "languagebind"
    supports_gradient_checkpointing = True
    # any of transformers' names for attention may be set; which one runs is lbfast's to choose
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True

    def __init__(self, config: LanguageBindConfig):
        super().__init__(config)
        self._build(config)
        self.post_init()
        self._adapt(config)

    def _set_gradient_checkpointing(self, *args: Any, every_n_layers: int = 1, **kwargs: Any) -> None:
        if every_n_layers != 1:  # of transformers 5: for encoders that leave checkpointing to their layers
            raise ValueError(f"every_n_layers: expected 1: every layer is checkpointed or none, got {every_n_layers}")
        super()._set_gradient_checkpointing(*args, **kwargs)

    @torch.no_grad()
    def init_weights(self) -> None:
        """CLIP's initialisation; parts before what they are parts of, which know more of what they are for."""
        if self.logit_scale.device.type != "meta":
            self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Of one module, scaled by initializer_factor."""
        initialise(module, self.config.initializer_factor)
        if isinstance(module, LanguageBindModel):
            for projection in (module.text_projection, module.visual_projection):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5 * module.config.initializer_factor)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        token: str | bool | None = None,
        *,
        key_style: str = "plain",
        **hub: Any,
    ) -> None:
        """Writes config.json and the weights; `from_pretrained` gives the same model back.

        Weights that were there are replaced when the new ones are on the disk; other files stay.

        Args:
            save_directory: made if it does not exist.
            is_main_process: False writes nothing: another process does.
            state_dict: instead of the model's own, as gathered from several processes: of its keys.
            save_function: accepted, and not needed: the files are written here.
            push_to_hub: upload the directory, to `repo_id=` or to its name; `commit_message`, `private`, `revision`,
                `create_pr` and `token` are then those of huggingface_hub.
            max_shard_size: bytes, or "5GB".
            safe_serialization: model.safetensors; False: pytorch_model.bin.
            variant: only None.
            key_style: "plain", our module names; or "upstream", what upstream's save_pretrained writes. They differ
                only where adapters are kept apart.

        Raises ValueError where an argument asks for what is not done, or state_dict has other keys.
        """
        if key_style not in ("plain", "upstream"):
            raise ValueError(f"key_style: expected 'plain' or 'upstream', got {key_style!r}")
        saving.check_plain(variant, save_function, safe_serialization)
        if not is_main_process:
            return
        own = checkpoint.upstream_keys(self) if key_style == "upstream" else self.state_dict()
        state, folder = saving.chosen_state(own, state_dict), Path(save_directory)
        saving.write(folder, state, self.config, type(self).__name__, safe_serialization, max_shard_size)
        if push_to_hub:
            saving.upload(folder, token=token, **hub)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: None = None,
    ) -> LanguageBindOutput | tuple[Any, ...]:
        """Embeds pixels and captions and compares them; the arguments are those of the two towers.

        With return_loss, the symmetric InfoNCE loss of as many pixels as captions. inputs_embeds: only None, which peft
        hands over.
        """
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds: expected None: captions are token ids, got embeddings")
        output_attentions, output_hidden_states, return_dict = output_flags(
            self.config, output_attentions, output_hidden_states, return_dict
        )
        outputs = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        vision = self.vision_model(pixel_values=pixel_values, **outputs)
        text = self.text_model(input_ids, attention_mask, position_ids, **outputs)
        image_embeds = normalised(self.visual_projection(vision[1]))
        text_embeds = normalised(self.text_projection(text[1]))
        scale = self.logit_scale.exp()
        logits_per_text = text_embeds @ image_embeds.T * scale
        loss = None
        if return_loss:
            if len(image_embeds) != len(text_embeds):
                raise ValueError(
                    f"return_loss: expected as many captions as pixels, got {len(text_embeds)} and {len(image_embeds)}"
                )
            loss = ops.info_nce(image_embeds, text_embeds, scale)
        if not return_dict:
            result = (logits_per_text.T, logits_per_text, text_embeds, image_embeds, text, vision)
            return result if loss is None else (loss, *result)
        return LanguageBindOutput(
            loss=loss,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


class LanguageBindImage(LanguageBindModel):
    config_class = configs.LanguageBindImageConfig


class LanguageBindVideo(LanguageBindModel):
    config_class = configs.LanguageBindVideoConfig


class LanguageBindAudio(LanguageBindModel):
    config_class = configs.LanguageBindAudioConfig


class LanguageBindDepth(LanguageBindModel):
    config_class = configs.LanguageBindDepthConfig


class LanguageBindThermal(LanguageBindModel):
    config_class = configs.LanguageBindThermalConfig


model_dict: dict[str, type[LanguageBindModel]] = {
    model.config_class.modality.name: model
    for model in (LanguageBindImage, LanguageBindVideo, LanguageBindAudio, LanguageBindDepth, LanguageBindThermal)
}


class ModalityScales(nn.Module):
    """Log-temperatures by modality, as buffers: they move and are saved with the model. Read like a dict."""

    def __init__(self, scales: Mapping[str, torch.Tensor]):
        super().__init__()
        for name, scale in scales.items():
            self.register_buffer(name, scale.detach())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):  # upstream's, which are in no state dict
            state_dict |= {f"{prefix}{name}": scale for name, scale in self._buffers.items()}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> Any:
        return self._buffers.keys()

    def values(self) -> Any:
        return self._buffers.values()

    def items(self) -> Any:
        return self._buffers.items()


class LanguageBind(Freezable):
    """Encoders of any of the five modalities and the text tower they are bound to.

    Args:
        clip_type: modality -> checkpoint: a name of the hub's LanguageBind organisation ("LanguageBind_Video_FT"), a
            full repository id, or a local directory. Modalities alone, as upstream had it first, are those of
            LanguageBind_Video and the like.
        use_temp: multiply embeddings of every modality but language by its exp(logit_scale).
        cache_dir: of downloads.
        memory_budget_mib: without gradients, what the layers' activations may take, in MiB: larger batches are embedded
            piece by piece. None: always at once.
        token, revision, torch_dtype, merge_lora, local_files_only: as of `from_pretrained`.

    Raises ValueError for an unknown modality and where the modalities' embeddings have different sizes.
    """

    memory_budget_mib: float | None = 2048

    def __init__(
        self,
        clip_type: Mapping[str, str | os.PathLike[str]] | Sequence[str],
        use_temp: bool = True,
        cache_dir: str | os.PathLike[str] | None = "./cache_dir",
        memory_budget_mib: float | None = 2048,
        **loading: Any,
    ):
        if isinstance(clip_type, (list, tuple)) and clip_type and all(isinstance(name, str) for name in clip_type):
            clip_type = {name: f"LanguageBind_{name.capitalize()}" for name in clip_type}
        if not isinstance(clip_type, Mapping) or not clip_type:
            raise ValueError(f"clip_type: expected a mapping of modality to checkpoint, got {clip_type!r}")
        unknown = clip_type.keys() - model_dict.keys()
        if unknown:
            raise ValueError(
                f"clip_type: expected modalities of {', '.join(model_dict)}, got {', '.join(sorted(unknown))}"
            )
        models = {
            name: model_dict[name].from_pretrained(checkpoint.full_name(where), cache_dir=cache_dir, **loading)
            for name, where in clip_type.items()
        }
        self._bind(models, use_temp, memory_budget_mib)

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, LanguageBindModel],
        use_temp: bool = True,
        memory_budget_mib: float | None = 2048,
    ) -> LanguageBind:
        """Binds models that are already there: {modality: model}. They share their parameters with the result."""
        self = cls.__new__(cls)
        self._bind(models, use_temp, memory_budget_mib)
        return self

    def _bind(self, models: Mapping[str, LanguageBindModel], use_temp: bool, memory_budget_mib: float | None) -> None:
        nn.Module.__init__(self)
        if memory_budget_mib is not None and not memory_budget_mib > 0:
            raise ValueError(f"memory_budget_mib: expected a positive number of MiB or None, got {memory_budget_mib}")
        sizes = {name: model.config.projection_dim for name, model in models.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "clip_type: expected checkpoints whose embeddings have one size, for one language space; got "
                + ", ".join(f"{name}: {size}" for name, size in sizes.items())
            )
        last = list(models.values())[-1]
        self.use_temp = use_temp
        self.memory_budget_mib = memory_budget_mib
        self.modality_encoder = nn.ModuleDict({name: model.vision_model for name, model in models.items()})
        self.modality_encoder["language"] = last.text_model
        self.modality_proj = nn.ModuleDict({name: model.visual_projection for name, model in models.items()})
        self.modality_proj["language"] = last.text_projection
        self.modality_scale = ModalityScales({name: model.logit_scale for name, model in models.items()})
        self.modality_config = {name: model.config for name, model in models.items()}

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters."""
        return next(self.parameters()).dtype

    def save_pretrained(self, save_directory: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Writes each modality, with the text tower, into a directory of its name, as `clip_type` takes it."""
        text, projection = self.modality_encoder["language"], self.modality_proj["language"]
        for name, config in self.modality_config.items():
            parts = {
                "vision_model": self.modality_encoder[name],
                "text_model": text,
                "visual_projection": self.modality_proj[name],
                "text_projection": projection,
            }
            state = {
                f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()
            }
            state["logit_scale"] = self.modality_scale[name]
            folder = Path(save_directory) / name
            saving.write(folder, state, config, model_dict[name].__name__, max_shard_size=max_shard_size)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "5GB", **hub: Any) -> str:
        """Uploads what `save_pretrained` writes. `hub`: token, private, commit_message, revision, create_pr.

        Returns the commit's address.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size)
            return saving.upload(Path(folder), repo_id, **hub)

    def forward(self, inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Embeds inputs by modality.

        Args:
            inputs: e.g. {"video": {"pixel_values": ...}, "language": {"input_ids": ..., "attention_mask": ...}}.

        Returns:
            {modality: (B, E)}: unit vectors, times exp(logit_scale) for modalities but language with use_temp.
        """
        unknown = inputs.keys() - self.modality_encoder.keys()
        if unknown or not inputs:
            raise ValueError(
                f"inputs: expected modalities of {', '.join(self.modality_encoder.keys())}, got "
                f"{', '.join(sorted(unknown)) or 'none'}"
            )
        outputs = {}
        for name, value in inputs.items():
            encoder = cast(Any, self.modality_encoder[name])
            parts = [pooled(encoder, **part) for part in self._micro_batches(encoder, value)]
            embeds = normalised(self.modality_proj[name](torch.cat(parts)))
            if self.use_temp and name != "language":
                embeds = embeds * self.modality_scale[name].exp()
            outputs[name] = embeds
        return outputs

    def _micro_batches(self, encoder: Any, value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Pieces of a modality's inputs whose activations fit the budget; all of it where gradients are recorded."""
        first: Any = next(iter(value.values()), None)
        batched = isinstance(first, torch.Tensor) and first.ndim in (2, 4, 5) and len(first) > 1
        tower = tower_in(encoder)
        if self.memory_budget_mib is None or torch.is_grad_enabled() or not batched or tower is None:
            yield dict(value)
            return
        step = max(1, int(self.memory_budget_mib * 2**20 // tower.activation_bytes(first[:1])))
        if first.ndim == 4 and tower.config.add_time_attn:  # frames of clips, not clips
            step = max(step // tower.config.num_frames, 1) * tower.config.num_frames
        for start in range(0, len(first), step):
            yield {
                key: item[start : start + step] if isinstance(item, torch.Tensor) and len(item) > 1 else item
                for key, item in value.items()
            }


def normalised(x: torch.Tensor) -> torch.Tensor:
    """x / ||x|| over the last dimension."""
    return x / x.norm(p=2, dim=-1, keepdim=True)


def to_device(x: Mapping[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Moves every tensor of a processor's output to a device."""
    return {key: value.to(device) for key, value in x.items()}
