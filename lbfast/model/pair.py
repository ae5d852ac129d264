"""The two towers of a modality, as they embed: what every LanguageBind model is, without what makes it transformers'.

transformers' PreTrainedModel takes two seconds to import, and nothing that only embeds needs it.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from lbfast.model import checkpoint
from lbfast.model.config import LanguageBindConfig
from lbfast.model.frozen import Freezable
from lbfast.model.hub import unexpected
from lbfast.model.loading import Loading, loading_info
from lbfast.model.lora import add_lora, merge_lora
from lbfast.model.schema import check_weights
from lbfast.model.towers import TextTransformer, VisionTransformer, pooled

Self = TypeVar("Self", bound="Pair")

_NAMED_ADAPTER = re.compile(r"\.(lora_[AB])\.\w+\.weight$")


class Pair(Freezable):
    """A vision tower and a text tower, their projections into one space, and the temperature between them."""

    config_class: type[LanguageBindConfig] = LanguageBindConfig
    config: LanguageBindConfig

    def _build(self, config: LanguageBindConfig) -> None:
        text, vision = config.text_config, config.vision_config
        self.text_model = TextTransformer(text)
        self.vision_model = VisionTransformer(vision, config.modality)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def _adapt(self, config: LanguageBindConfig) -> None:
        vision = config.vision_config
        if vision.lora_r:
            add_lora(
                self.vision_model.encoder, vision.lora_r, vision.lora_alpha, vision.lora_dropout, vision.add_time_attn
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        encoders = [key for key in state_dict if key.startswith(f"{prefix}layers.")]
        if encoders:  # peft's adapters of the vision encoder, put on the whole model; of several names it has the last
            names = {_NAMED_ADAPTER.sub(r".\1.weight", name): name for name, _ in self.named_parameters()}
            for key in encoders:
                name = f"vision_model.encoder.{key.removeprefix(prefix)}"
                state_dict[prefix + names.get(name, name)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *others)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[Self],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: LanguageBindConfig | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        return_dict: bool | None = None,
        merge_lora: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device_map: Any = None,
        **others: Any,
    ) -> Self:
        """Loads a checkpoint strictly, in eval mode.

        Args:
            pretrained_model_name_or_path: directory, name on the hub, or "lbfast-mini/...", with config.json and
                model.safetensors or pytorch_model.bin, sharded or not. None: `config` and `state_dict` are all of it.
            config: instead of the checkpoint's config.json.
            state_dict: instead of the checkpoint's weights, in any of their key styles; copied.
            cache_dir, token, revision, local_files_only, force_download: of the download.
            torch_dtype: torch.float32 (default), a floating dtype or its name, or "auto" for the checkpoint's own.
                `dtype` is the same under its newer name.
            return_dict: False makes forward return tuples by default.
            merge_lora: add LoRA adapters into the weights. False keeps them apart and trainable, the encoder frozen.
            device_map: one device, or {"": device}; None: the CPU.
            others: of Hugging Face's from_pretrained: subfolder, variant, use_safetensors, output_attentions,
                output_hidden_states, output_loading_info=True for (model, what was not as expected: nothing);
                attn_implementation, low_cpu_mem_usage, trust_remote_code and the like change nothing here.

        Raises:
            FileNotFoundError: no config.json or no weights there.
            OSError: a hub name that is neither cached nor reachable.
            CheckpointError: the weights do not fit, are not finite, or are no state dict.
            ValueError: a keyword asks for what is not done here, such as several devices.
        """
        wanted = checkpoint.parse_dtype(torch_dtype if torch_dtype is not None else dtype)
        others |= {"cache_dir": cache_dir, "token": token, "revision": revision}
        others |= {"local_files_only": local_files_only, "force_download": force_download}
        loading = Loading.of(others, device_map)
        unexpected(f"{cls.__name__}.from_pretrained", others)
        name, where = pretrained_model_name_or_path, "state_dict"
        if name is not None:
            where = checkpoint.full_name(name)
        elif config is None or state_dict is None:
            raise ValueError("pretrained_model_name_or_path: expected one, or config and state_dict, got None")
        if config is None:
            config = checkpoint.load_config(cls.config_class, where, **loading.hub)
        else:
            config = copy.deepcopy(config)
        config.name_or_path = os.fspath(name or "")
        for field, value in {**loading.flags, "return_dict": return_dict}.items():
            if value is not None:
                setattr(config, field, value)
        if state_dict is None:
            state = checkpoint.read_state_dict(checkpoint.find_files(where, **loading.weights))
        else:
            state = checkpoint.check_tensors(state_dict, "state_dict")
        state = checkpoint.canonical_keys(state)
        check_weights(config, state, where)
        rank = checkpoint.lora_rank(state)
        config.vision_config.lora_r = rank
        with torch.device("meta"):
            model = cls(config)
        checkpoint.check_state(model, state, where)
        if wanted is None:
            wanted = state["visual_projection.weight"].dtype
        checkpoint.assign(model, state, wanted, where)
        if rank and merge_lora:
            model.merge_lora()
            checkpoint.check_fits(model.state_dict(), None, where)
        nn.Module.to(model, loading.device).eval()
        return (model, loading_info()) if loading.with_info else model  # type: ignore[return-value]

    def merge_lora(self: Self) -> Self:
        """Adds the adapters into the weights, which become trainable again. In place; does nothing without adapters."""
        if merge_lora(self):
            self.config.vision_config.lora_r = 0
            self.vision_model.encoder.requires_grad_(True)
        return self

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """pixel_values, as of the vision tower -> (B, E), not normalised.

        With return_dict, as transformers 5 has it: the tower's output, that in the place of its pooler_output.
        """
        if return_dict:
            vision = self.vision_model(pixel_values, output_attentions, output_hidden_states, True)
            vision.pooler_output = self.visual_projection(vision.pooler_output)
            return vision
        return self.visual_projection(pooled(self.vision_model, pixel_values=pixel_values))

    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """input_ids and masks, as of the text tower -> (B, E), not normalised. With return_dict as above."""
        if return_dict:
            text = self.text_model(
                input_ids, attention_mask, position_ids, output_attentions, output_hidden_states, True
            )
            text.pooler_output = self.text_projection(text.pooler_output)
            return text
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.text_projection(pooled(self.text_model, **inputs))


class TwoTowers(Pair):
    """The pair alone, as `from_pretrained` loads it. Its class says nothing of the modality: its configuration does."""

    def __init__(self, config: LanguageBindConfig):
        super().__init__()
        self.config = config
        self._build(config)
        self._adapt(config)
