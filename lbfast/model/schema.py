"""What the fields of a config.json may be: checked before anything is built of them.

A configuration is untrusted. Fields that are known must fit their rule; of those that transformers gives a meaning of
its own (attention from elsewhere, remote code, quantization, labels), what has none here is dropped; strangers stay as
data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lbfast.messages import shown
from lbfast.model.hub import CheckpointError

ACTIVATIONS = ("gelu", "quick_gelu")


class Rule(NamedTuple):
    """What a field may be, in words and as a test."""

    expected: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def whole(low: int, high: int) -> Rule:
    """An integer in [low, high]."""
    return Rule(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    """A finite number in [low, high]."""
    return Rule(f"a number from {low:g} to {high:g}", lambda value: _is_number(value) and low <= value <= high)


def _or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or null", lambda value: value is None or rule.fits(value))


_FLAG = Rule("true or false", lambda value: type(value) is bool)
_SHARE = Rule("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1)
_WORD = Rule("a text of at most 200 letters", lambda value: isinstance(value, str) and len(value) <= 200)
_POSITIVE = Rule("a number above 0", lambda value: _is_number(value) and value > 0)
_PIXELS = whole(1, 1 << 15)
_BINS = Rule("a whole number from 0 to 32768", lambda value: _is_number(value) and value in range((1 << 15) + 1))
_TOKEN = _or_null(whole(0, (1 << 31) - 1))

_EVERYWHERE = {  # fields of transformers that mean something here
    "architectures": _or_null(
        Rule("a list of names", lambda value: isinstance(value, list) and all(map(_WORD.fits, value)))
    ),
    "dtype": _or_null(
        Rule("a floating dtype's name", lambda value: value in ("float16", "bfloat16", "float32", "float64"))
    ),
    "model_type": _WORD,
    "output_attentions": _or_null(_FLAG),
    "output_hidden_states": _or_null(_FLAG),
    "return_dict": _or_null(_FLAG),
    "transformers_version": _or_null(_WORD),
}
_EVERYWHERE["torch_dtype"] = _EVERYWHERE["dtype"]

_TOWER = {
    **_EVERYWHERE,
    "add_time_attn": _FLAG,
    "attention_dropout": Rule("0, as published", lambda value: _is_number(value) and value == 0),
    "hidden_act": Rule(
        f"one of {', '.join(ACTIVATIONS)}", lambda value: isinstance(value, str) and value in ACTIVATIONS
    ),
    "hidden_size": whole(1, 1 << 16),
    "initializer_factor": number(0, 1e6),
    "initializer_range": number(0, 1e6),
    "intermediate_size": whole(1, 1 << 18),
    "layer_norm_eps": _POSITIVE,
    "num_attention_heads": whole(1, 1 << 12),
    "num_hidden_layers": whole(1, 512),
    "projection_dim": whole(1, 1 << 16),
}

TEXT = {
    **_TOWER,
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "max_position_embeddings": whole(1, 1 << 16),
    "pad_token_id": _TOKEN,
    "vocab_size": whole(1, 1 << 24),
}

VISION = {
    **_TOWER,
    "audio_mean": number(-1e6, 1e6),
    "audio_sample_rate": whole(1, 1 << 20),
    "audio_std": _POSITIVE,
    "clip_type": _WORD,
    "force_patch_dropout": _SHARE,
    "image_size": Rule(
        f"{_PIXELS.expected}, or two of them",
        lambda value: (
            _PIXELS.fits(value) or (isinstance(value, list) and len(value) == 2 and all(map(_PIXELS.fits, value)))
        ),
    ),
    "lora_alpha": number(0, 1e6),
    "lora_dropout": _SHARE,
    "lora_r": whole(0, 1 << 16),
    "max_depth": number(0, 1e6),
    "num_channels": whole(1, 64),
    "num_frames": whole(1, 1 << 12),
    "num_mel_bins": _BINS,
    "patch_size": whole(1, 1 << 10),
    "target_length": _BINS,
    "tube_size": whole(1, 1 << 10),
    "video_decode_backend": _WORD,
}

WHOLE = {
    **_EVERYWHERE,
    "initializer_factor": number(0, 1e6),
    "logit_scale_init_value": number(-100, 100),
    "projection_dim": whole(1, 1 << 16),
}

_TOWERS = {"text_config": TEXT, "vision_config": VISION, "text_config_dict": TEXT, "vision_config_dict": VISION}


def checked(fields: Any, rules: Mapping[str, Rule], inside: str = "") -> dict[str, Any]:
    """The fields of a configuration that are used, each as its rule says.

    Args:
        fields: as JSON gave them.
        rules: TEXT, VISION, or WHOLE, whose towers are checked too.
        inside: what comes before the names of fields in messages, as "vision_config.".

    Raises CheckpointError naming the first field that does not fit.
    """
    if not isinstance(fields, dict):
        raise CheckpointError(f"{inside or 'configuration'}: expected an object of JSON, got {shown(fields)}")
    found = {}
    for name, value in fields.items():
        if rules is WHOLE and name in _TOWERS:
            if value is not None:
                found[name] = checked(value, _TOWERS[name], f"{name}.")
        elif name in rules:
            if not rules[name].fits(value):
                raise CheckpointError(f"{inside}{name}: expected {rules[name].expected}, got {shown(value)}")
            found[name] = value
        elif name.isidentifier() and not name.startswith("_") and name not in _owned():
            found[name] = value
    return found


def check_together(tower: PretrainedConfig) -> None:
    """What the fields of one tower, defaults included, say of each other. Raises CheckpointError naming one of them."""
    inside, fields = f"{tower.base_config_key}.", vars(tower)

    def refuse(name: str, expected: str) -> None:
        raise CheckpointError(f"{inside}{name}: expected {expected}, got {fields[name]}")

    if fields["hidden_size"] % fields["num_attention_heads"]:
        refuse("num_attention_heads", f"a divisor of hidden_size {fields['hidden_size']}")
    tube = fields.get("tube_size", 1) if fields.get("clip_type") == "vl_new" and fields["add_time_attn"] else 1
    if tube > 1 and fields["num_frames"] % tube:
        refuse("tube_size", f"a divisor of num_frames {fields['num_frames']}")


def check_weights(config: Any, keys: Collection[str], where: str) -> None:
    """Raises CheckpointError where a model of this configuration has no patches, or layers without weights.

    Args:
        config: of a modality.
        keys: canonical names of the weights.
        where: the checkpoint, for messages.
    """
    vision = config.vision_config
    sides = ("num_mel_bins", "target_length") if config.modality.mel_grid and vision.num_mel_bins else ("image_size",)
    for name in sides:
        if (pixels := getattr(vision, name)) < vision.patch_size:
            raise CheckpointError(
                f"{where}: vision_config.patch_size: expected at most {name} {pixels:g}, got {vision.patch_size}"
            )
    for tower, module in ((vision, "vision_model"), (config.text_config, "text_model")):
        prefix = f"{module}.encoder.layers."
        there = {key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)}
        if tower.num_hidden_layers > len(there):
            raise CheckpointError(
                f"{where}: {tower.base_config_key}.num_hidden_layers: expected at most the {len(there)} that there are "
                f"weights of, got {tower.num_hidden_layers}"
            )


@functools.cache
def _owned() -> frozenset[str]:
    """Names that have a meaning already: attributes, methods and fields of transformers' configurations and of ours."""
    own = PretrainedConfig()
    return frozenset({*dir(own), *own.to_dict(), *_FOREIGN, "from_text_vision_configs", "modality", "rules"})


_FOREIGN = (  # by keywords
    "attn_implementation",
    "auto_map",
    "configuration_files",
    "experts_implementation",
    "name_or_path",
    "per_layer_config",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
