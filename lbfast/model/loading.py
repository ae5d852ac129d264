"""Hugging Face's keywords of a model's `from_pretrained`: what each means here, or why it cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from lbfast.model.hub import check_only, hub_options

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

_FLAGS = ("output_attentions", "output_hidden_states")
_ONLY: dict[str, tuple[Any, str]] = {
    "adapter_kwargs": (None, "peft.PeftModel.from_pretrained(model, ...) loads adapters"),
    "ignore_mismatched_sizes": (False, "weights load strictly"),
    "key_mapping": (None, "keys are those of LanguageBind's checkpoints"),
    "max_memory": (None, "a model is on one device"),
    "offload_buffers": (False, "a model is on one device"),
    "offload_folder": (None, "a model is on one device"),
    "offload_state_dict": (False, "a model is on one device"),
    "quantization_config": (None, "lbfast.optimize_for_inference(model, precision='fp8') is what there is"),
    "load_in_4bit": (False, "lbfast.optimize_for_inference(model, precision='fp8') is what there is"),
    "load_in_8bit": (False, "lbfast.optimize_for_inference(model, precision='fp8') is what there is"),
    "tp_plan": (None, "a model is on one device"),
    "tp_size": (None, "a model is on one device"),
    "use_kernels": (False, "lbfast has its own"),
}


@dataclass(frozen=True)
class Loading:
    """Where a model's files come from, and what is done with the model.

    Attributes:
        hub: keywords of `hub.fetch_file`.
        weights: those of `hub.find_files`.
        device: of the parameters.
        flags: fields of the configuration.
        with_info: return what Hugging Face calls loading info too.
    """

    hub: Mapping[str, Any]
    weights: Mapping[str, Any]
    device: torch.device
    flags: Mapping[str, Any] = field(default_factory=dict)
    with_info: bool = False

    @classmethod
    def of(cls, given: dict[str, Any], device_map: Any) -> Loading:
        """Takes from keywords those that are known; the others remain. Raises ValueError as `hub_options` does."""
        hub = hub_options(given)
        if given.get("adapter_kwargs") is not None and set(given["adapter_kwargs"]) <= {"revision", "token"}:
            given.pop("adapter_kwargs")  # AutoModel's own, without an adapter
        check_only(given, _ONLY)
        attention = given.pop("attn_implementation", None)
        if attention is not None and attention not in ATTENTIONS:
            raise ValueError(
                f"attn_implementation: expected one of {', '.join(ATTENTIONS)}, none of which changes anything here, "
                f"got {attention!r}; lbfast.use_impl chooses"
            )
        weights = {name: given.pop(name, None) for name in ("use_safetensors", "variant")}
        flags = {name: given.pop(name) for name in _FLAGS if name in given}
        return cls(
            hub, {**hub, **weights}, one_device(device_map), flags, bool(given.pop("output_loading_info", False))
        )


def one_device(device_map: Any) -> torch.device:
    """The device of a device_map. Raises ValueError where there are several, or one is to be chosen."""
    devices = list(dict.fromkeys(device_map.values())) if isinstance(device_map, Mapping) else [device_map]
    if devices == [None]:
        return torch.device("cpu")
    try:
        (device,) = devices
        found = torch.device(device)
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(
            f"device_map: expected one device, as 'cuda:0' or {{'': 'cuda:0'}}, got {device_map!r}; "
            "move the model with .to(device)"
        ) from None
    if found.type == "meta":
        raise ValueError("device_map: expected a device with memory, got 'meta'")
    return found


def loading_info() -> dict[str, Collection[str]]:
    """What Hugging Face reports beside a model: nothing, for weights load strictly or raise."""
    kind = set if int(transformers.__version__.partition(".")[0]) >= 5 else list
    return {**{f"{name}_keys": kind() for name in ("missing", "unexpected", "mismatched")}, "error_msgs": []}
