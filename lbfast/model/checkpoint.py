"""Finding, reading, checking and writing checkpoints, in every key style that LanguageBind's have had.

Files are untrusted: pickles are read with weights_only, and every tensor must be one that the model has, of its shape,
and finite. Keys on disk come in three styles, which `canonical_keys` folds into the names of our modules:

    vision_model.encoder.layers.0.self_attn.q_proj.weight                                        plain
    vision_model.encoder.base_model.model.layers.0.self_attn.q_proj.weight                       LoRA, peft of 2023
    vision_model.encoder.base_model.model.layers.0.self_attn.q_proj.base_layer.weight            LoRA, peft since
    vision_model.encoder.base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight        the adapter, both
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lbfast.messages import listing, named, shown
from lbfast.model.config import LanguageBindConfig
from lbfast.model.hub import (
    WEIGHTS,
    CheckpointError as CheckpointError,
    NotCachedError as NotCachedError,
    fetch_file as fetch_file,
    find_files as find_files,
    full_name as full_name,
    shard_names,
)
from lbfast.model.lora import lora_modules
from lbfast.model.pickles import check_pickle, is_zip

_ENCODER = "vision_model.encoder."
_WRAPPED = f"{_ENCODER}base_model.model."
_ADAPTER = re.compile(r"\.lora_([AB])\.(\w+)\.weight$")


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_config(
    config_class: type[LanguageBindConfig], name_or_path: str | os.PathLike[str], **hub: Any
) -> LanguageBindConfig:
    """Reads config.json of a directory or hub repository, for the modality of `config_class`.

    Raises what `config_class.from_pretrained` raises: FileNotFoundError, OSError, CheckpointError.
    """
    return cast(LanguageBindConfig, config_class.from_pretrained(name_or_path, **hub))


def parse_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """None for "auto"."""
    if name is None:
        return torch.float32
    if name == "auto":
        return None
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"torch_dtype: expected a floating torch.dtype, its name or 'auto', got {name!r}")
    return found


def read_state_dict(files: list[Path]) -> dict[str, torch.Tensor]:
    """Reads weight files into one mapping; tensors are mapped from disk where the format allows it.

    Raises CheckpointError for a file that is no state dict, is truncated, needs code to load, or repeats a key.
    """
    state: dict[str, torch.Tensor] = {}
    for file in files:
        part = _read_file(file)
        repeated = state.keys() & part.keys()
        if repeated:
            raise CheckpointError(f"{file}: repeats keys of another shard: {listing(repeated)}")
        state |= part
    return state


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(file)
        else:
            check_pickle(file)
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip(file))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: expected a state dict of tensors; it holds other objects and was not run"
        ) from error
    except Exception as error:  # truncated or foreign files fail in many ways inside the readers
        raise CheckpointError(
            f"{file}: expected a state dict of tensors, cannot read it: {named(error, 300)}"
        ) from error
    return check_tensors(loaded, file)


def check_tensors(loaded: object, where: str | Path) -> dict[str, torch.Tensor]:
    """A mapping of names to plain tensors, as it is. Raises CheckpointError for anything else."""
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise CheckpointError(f"{where}: expected a state dict (names to tensors), got {_describe(loaded)}")
    if not loaded:
        raise CheckpointError(f"{where}: expected a state dict, got an empty one")
    odd = {name: why for name, value in loaded.items() if (why := _why_no_weight(value))}
    if odd:
        few = ", ".join(f"{named(name)} ({odd[name]})" for name in sorted(odd)[:4])
        raise CheckpointError(f"{where}: expected plain tensors, each with numbers of its own, got {few}")
    return dict(loaded)


def _why_no_weight(value: torch.Tensor) -> str:
    """Why a tensor is not numbers in memory, one after the other; an empty string where it is."""
    if value.is_nested or value.layout is not torch.strided:
        return "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    if value.is_quantized or value.is_meta:
        return "quantized" if value.is_quantized else "on meta"
    there = value.untyped_storage().nbytes()
    needed = value.numel() * value.element_size()
    return f"{needed} bytes of {there} that are there" if needed > there else ""


def _describe(loaded: object) -> str:
    if isinstance(loaded, Mapping):
        odd = next((k for k, v in loaded.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)), None)
        return f"a mapping whose {shown(odd)} is a {type(loaded[odd]).__name__}"
    return f"a {type(loaded).__name__}"


def canonical_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the keys of any style to the names of our modules and drops position_ids, which are only 0, 1, 2...

    Raises CheckpointError where two keys fall together (two adapters, say).
    """
    result: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key.endswith("embeddings.position_ids"):
            continue
        name = key.replace(".base_model.model.", ".").replace(".base_layer.", ".")
        name = _ADAPTER.sub(r".lora_\1.weight", name)
        if name in result:
            raise CheckpointError(f"two keys of the checkpoint mean {name}: expected one adapter, {key} is another")
        result[name] = value
    return result


def upstream_keys(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model in the key style that upstream's own save_pretrained has on a current peft."""
    adapted = {name for name, _ in lora_modules(model)}
    if not adapted:
        return dict(model.state_dict())
    result = {}
    for key, value in model.state_dict().items():
        parent, _, leaf = key.rpartition(".")
        if parent in adapted:
            key = f"{parent}.base_layer.{leaf}"
        elif parent.rpartition(".")[0] in adapted:
            key = f"{parent}.default.{leaf}"
        result[_WRAPPED + key.removeprefix(_ENCODER) if key.startswith(_ENCODER) else key] = value
    return result


def lora_rank(state: Mapping[str, torch.Tensor]) -> int:
    """The rank of the adapters in a mapping with canonical keys; 0 where there are none."""
    ranks = {value.shape[0] for key, value in state.items() if key.endswith(".lora_A.weight") and value.ndim == 2}
    if len(ranks) > 1:
        raise CheckpointError(f"expected LoRA adapters of one rank, got ranks {sorted(ranks)}")
    return ranks.pop() if ranks else 0


def check_state(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises CheckpointError naming every missing, unexpected or misshapen key and every tensor that is not finite."""
    wanted = model.state_dict()
    problems = []
    if missing := wanted.keys() - state.keys():
        problems.append(f"missing: {listing(missing)}")
    if unexpected := state.keys() - wanted.keys():
        problems.append(f"unexpected: {listing(unexpected)}")
    shared = wanted.keys() & state.keys()
    misshapen = {key for key in shared if state[key].shape != wanted[key].shape}
    if misshapen:
        each = [f"{key} {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}" for key in misshapen]
        problems.append(f"misshapen: {listing(each)}")
    foreign = {key for key in shared if state[key].dtype not in _FLOATS}
    if foreign:
        each = [f"{key} ({state[key].dtype})" for key in foreign]
        problems.append(f"not floating point of 16 to 64 bits: {listing(each)}")
    if broken := [key for key in shared - misshapen - foreign if not torch.isfinite(state[key]).all()]:
        problems.append(f"not finite: {listing(broken)}")
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit the model; " + "; ".join(problems))


def assign(
    model: nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None, where: str = "the checkpoint"
) -> None:
    """Makes the tensors of a checked mapping the parameters of a model built on the meta device.

    Raises CheckpointError where `dtype` cannot hold their values.
    """
    if dtype is not None:
        check_fits(state, dtype, where)
    owned = {key: value.to(dtype=dtype or value.dtype, copy=True).contiguous() for key, value in state.items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(owned, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])


def check_fits(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, where: str) -> None:
    """Raises CheckpointError naming the tensors with values that are not finite in `dtype` (None: their own)."""
    lost = []
    for key, value in tensors.items():
        wanted = dtype or value.dtype
        narrower = torch.finfo(wanted).max < torch.finfo(value.dtype).max
        if (narrower or dtype is None) and not torch.isfinite(value.detach().to(wanted)).all():
            lost.append(key)
    if lost:
        name = str(dtype or tensors[lost[0]].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where}: the weights do not fit into {name}, not finite: {listing(lost)}; "
            "bfloat16 and float32 reach further"
        )


def save_state_dict(
    state: Mapping[str, torch.Tensor], folder: Path, safe_serialization: bool, max_shard_size: int | str
) -> None:
    """Writes weights into an empty folder, in shards where they are larger than max_shard_size."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        {key: value.detach().contiguous() for key, value in state.items()},
        folder,
        filename_pattern="model{suffix}.safetensors" if safe_serialization else "pytorch_model{suffix}.bin",
        max_shard_size=max_shard_size,
        safe_serialization=safe_serialization,
        metadata={"format": "pt"} if safe_serialization else None,
    )


def weight_names(folder: Path) -> set[str]:
    """The names of the files in a folder that are weights of a model, or an index of its shards."""
    found = {name for name in WEIGHTS if os.path.lexists(folder / name)}
    for index in sorted(name for name in found if name.endswith(".index.json")):
        with contextlib.suppress(CheckpointError, OSError):
            found |= {name for name in shard_names(folder / index) if name.endswith((".safetensors", ".bin"))}
    return found
