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
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbfast.model.config import LanguageBindConfig
from lbfast.model.lora import lora_modules

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_MINI = Path(__file__).parents[1] / "mini" / "weights"
_ENCODER = "vision_model.encoder."
_WRAPPED = f"{_ENCODER}base_model.model."
_ADAPTER = re.compile(r"\.lora_([AB])\.(\w+)\.weight$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or the keys."""


class NotCachedError(OSError):
    """A file of the hub that is not in the cache, while the hub cannot be reached."""


def find_files(
    name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> list[Path]:
    """The weight files of a local directory or of a repository on the hub: one, or the shards of an index.

    Raises:
        FileNotFoundError: a local directory, or a repository, without weights.
        OSError: a hub name that is neither cached nor reachable.
        CheckpointError: a broken index, or one that names a missing shard.
    """
    path = Path(name_or_path)
    if path.is_dir():
        found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: expected one of {', '.join(WEIGHTS)} in this directory, found none")
        shards = [found.parent / name for name in _shard_names(found)] if found.suffix == ".json" else [found]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CheckpointError(f"{found}: names files that are not there: {', '.join(missing)}")
        return shards

    def fetch(name: str) -> Path:
        return fetch_file(
            str(name_or_path),
            name,
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    from huggingface_hub.errors import EntryNotFoundError

    absent: NotCachedError | None = None
    for name in WEIGHTS:
        try:
            found = fetch(name)
        except EntryNotFoundError:
            continue
        except NotCachedError as error:  # offline: the repository may be cached with another of the files
            absent = absent or error
            continue
        return [fetch(shard) for shard in _shard_names(found)] if found.suffix == ".json" else [found]
    if absent is not None:
        raise absent
    raise FileNotFoundError(f"{name_or_path}: expected one of {', '.join(WEIGHTS)} in this repository, found none")


def fetch_file(
    repo_id: str,
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """A file of a hub repository, from the cache or the network.

    Raises:
        huggingface_hub.errors.EntryNotFoundError: the repository has no such file.
        NotCachedError: the hub cannot be reached and the file is not cached. OSError: the name is no repository.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(
                repo_id,
                name,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )
    except LocalEntryNotFoundError as error:
        raise NotCachedError(
            f"{repo_id}: not a local directory, and {name} of the hub repository of that name is neither in the cache "
            f"({cache_dir or 'default'}) nor can it be fetched (offline?)"
        ) from error
    except EntryNotFoundError:
        raise
    except (HfHubHTTPError, HFValidationError) as error:
        raise OSError(f"{repo_id}: not a local directory, and the hub answered: {error}") from error


def load_config(
    config_class: type[LanguageBindConfig], name_or_path: str | os.PathLike[str], **hub: Any
) -> LanguageBindConfig:
    """Reads config.json of a directory or hub repository, for the modality of `config_class`.

    Raises FileNotFoundError, OSError, or ValueError for JSON that is broken or of another modality.
    """
    path = Path(name_or_path)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{path}: expected a config.json in this directory, found none")
    else:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            file = fetch_file(str(name_or_path), "config.json", **hub)
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{name_or_path}: expected a config.json in this repository, found none") from error
    try:
        fields = json.loads(file.read_text())
        written = fields.get("model_type", config_class.model_type)
        config = config_class.from_dict(fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected a {config_class.model_type} configuration, cannot read it: {error}"
        ) from error
    if written not in (config_class.model_type, "clip"):
        raise ValueError(f"{file}: expected model_type {config_class.model_type}, got {written}")
    return config


def full_name(where: str | os.PathLike[str]) -> str:
    """A local path or full repository id as it is; a bare name becomes one of the hub's LanguageBind organisation.

    "lbfast-mini/video" and the like are the small models that come with the package. ValueError for others of them.
    """
    name = os.fspath(where)
    if Path(name).is_dir():
        return name
    owner, _, modality = name.partition("/")
    if owner == "lbfast-mini":
        if not (_MINI / modality / "config.json").is_file():
            known = ", ".join(sorted(f"lbfast-mini/{path.parent.name}" for path in _MINI.glob("*/config.json")))
            raise ValueError(f"{name}: expected one of {known}")
        return str(_MINI / modality)
    return name if "/" in name or os.sep in name else f"LanguageBind/{name}"


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


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: expected an index of shards with a weight_map, got something else") from error
    bad = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if bad or not names:
        raise CheckpointError(f"{index}: expected plain file names in weight_map, got {bad or 'none'}")
    return names


def read_state_dict(files: list[Path]) -> dict[str, torch.Tensor]:
    """Reads weight files into one mapping; tensors are mapped from disk where the format allows it.

    Raises CheckpointError for a file that is no state dict, is truncated, needs code to load, or repeats a key.
    """
    state: dict[str, torch.Tensor] = {}
    for file in files:
        part = _read_file(file)
        repeated = state.keys() & part.keys()
        if repeated:
            raise CheckpointError(f"{file}: repeats keys of another shard: {_listing(repeated)}")
        state |= part
    return state


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: expected a state dict of tensors; it holds other objects and was not run"
        ) from error
    except Exception as error:  # truncated or foreign files fail in many ways inside the readers
        raise CheckpointError(f"{file}: expected a state dict of tensors, cannot read it: {error}") from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise CheckpointError(f"{file}: expected a state dict (names to tensors), got {_describe(loaded)}")
    if not loaded:
        raise CheckpointError(f"{file}: expected a state dict, got an empty one")
    return dict(loaded)


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def _describe(loaded: object) -> str:
    if isinstance(loaded, Mapping):
        odd = next((k for k, v in loaded.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)), None)
        return f"a mapping whose {odd!r} is a {type(loaded[odd]).__name__}"
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
        problems.append(f"missing: {_listing(missing)}")
    if unexpected := state.keys() - wanted.keys():
        problems.append(f"unexpected: {_listing(unexpected)}")
    shared = wanted.keys() & state.keys()
    misshapen = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in sorted(shared)
        if state[key].shape != wanted[key].shape
    ]
    if misshapen:
        problems.append(f"misshapen: {_listing(misshapen)}")
    foreign = [f"{key} ({state[key].dtype})" for key in shared if not state[key].is_floating_point()]
    if foreign:
        problems.append(f"not floating point: {_listing(foreign)}")
    elif broken := [key for key in shared if not torch.isfinite(state[key]).all()]:
        problems.append(f"not finite: {_listing(broken)}")
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit the model; " + "; ".join(problems))


def assign(model: nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Makes the tensors of a checked mapping the parameters of a model built on the meta device."""
    owned = {key: value.to(dtype=dtype or value.dtype, copy=True).contiguous() for key, value in state.items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(owned, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])


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
            found |= {name for name in _shard_names(folder / index) if name.endswith((".safetensors", ".bin"))}
    return found


def _listing(names: object, most: int = 8) -> str:
    items = sorted(names)  # type: ignore[call-overload]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
