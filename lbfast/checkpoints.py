"""Checkpoints as applications open them: which modality each is of, what tells it from another, where it runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lbfast.data.suffixes import MODALITY_NAMES
from lbfast.messages import shown
from lbfast.processing.vocabulary import FILES as TOKENIZER_FILES

if TYPE_CHECKING:
    from lbfast.model.config import LanguageBindConfig
    from lbfast.model.pair import Pair, TwoTowers

Model = TypeVar("Model", bound="Pair")

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config has been read, not yet its weights.

    Attributes:
        name: as given.
        where: local directory or full repository id.
        hub: cache_dir, revision and token of downloads.
    """

    name: str
    modality: str
    where: str
    config: LanguageBindConfig
    hub: dict[str, Any]

    def load(
        self, dtype: torch.dtype, device: torch.device, batch_size: int, precision: str | None = None
    ) -> TwoTowers:
        """The model on `device`, optimized for batches of this size; precision as `optimize_for_inference` takes it.

        Raises what that and `from_pretrained` raise.
        """
        from lbfast.model.pair import TwoTowers

        model = TwoTowers.from_pretrained(self.where, config=self.config, torch_dtype=dtype, **self.hub)
        return ready(model, device, batch_size, precision)

    def tokenizer(self) -> Any:
        """The tokenizer beside the weights; CLIP's own where there is none and the model's vocabulary is CLIP's.

        Raises what its `from_pretrained` raises, and CheckpointError where it has tokens that the model has not.
        """
        from lbfast.model.checkpoint import CheckpointError
        from lbfast.processing.text import TOKENIZERS

        tokenizer = TOKENIZERS[self.modality].from_pretrained(self.where, **self.hub)
        known = self.config.text_config.vocab_size
        if len(tokenizer) > known:
            raise CheckpointError(
                f"{self.where}: expected a tokenizer of at most the {known} tokens of the model, got {len(tokenizer)}"
            )
        return tokenizer

    def tokenizer_fingerprint(self) -> str:
        """Changes with the files of `tokenizer`; empty where it is CLIP's own, or of the hub, with its weights."""
        key = hashlib.sha256()
        files = [file for name in TOKENIZER_FILES if (file := Path(self.where, name)).is_file()]
        for file in files:
            content = file.read_bytes()
            key.update(f"{file.name} {len(content)} ".encode() + content)
        return key.hexdigest()[:16] if files else ""

    def fingerprint(self) -> str:
        """Changes when the config changes, a weight file's name, size or time, or the commit of a hub's repository."""
        from lbfast.model import checkpoint

        key = hashlib.sha256(self.config.to_json_string().encode())
        for file in checkpoint.find_files(self.where, **self.hub):
            status = file.stat()
            commit = "" if Path(self.where).is_dir() else file.parent.name
            key.update(f"{commit} {file.name} {status.st_size} {status.st_mtime_ns}".encode())
        return key.hexdigest()[:16]


def open_checkpoints(given: Sequence[str | os.PathLike[str]], **hub: Any) -> dict[str, Checkpoint]:
    """Reads the configs of "DIR_OR_NAME" or "MODALITY=DIR_OR_NAME"; where no modality is named, the config says it.

    Args:
        given: local directories, full repository ids, or names of the hub's LanguageBind organisation.
        hub: cache_dir, revision, token.

    Raises:
        ValueError: no checkpoint, two of one modality, embeddings of different sizes, or a config of another model.
        TypeError: a set. FileNotFoundError: no config.json there. OSError: a hub name that is neither cached nor
        reachable.
    """
    if isinstance(given, Set):
        raise TypeError(f"model: expected a list, for the last one embeds texts, got {type(given).__name__}")
    found: dict[str, Checkpoint] = {}
    for name in [os.fspath(item) for item in given]:
        opened = _open(name, hub)
        if opened.modality in found:
            first = found[opened.modality].name
            raise ValueError(f"model: expected one a modality, got two for {opened.modality}: {first} and {name}")
        found[opened.modality] = opened
    if not found:
        raise ValueError("model: expected at least one checkpoint, got none")
    sizes = {checkpoint.name: checkpoint.config.projection_dim for checkpoint in found.values()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(f"model: expected checkpoints whose embeddings have one size, got {listed}")
    return found


def _open(name: str, hub: dict[str, Any]) -> Checkpoint:
    from lbfast.model.checkpoint import full_name, load_config
    from lbfast.model.config import config_dict

    head, equals, rest = name.partition("=")
    modality = head if equals and head in MODALITY_NAMES else None
    where = full_name(rest if modality else name)
    if modality is None:
        modality = _modality_of(where, hub)
    return Checkpoint(name, modality, where, load_config(config_dict[modality], where, **hub), hub)


def _modality_of(where: str, hub: dict[str, Any]) -> str:
    """The modality that config.json's model_type names."""
    from lbfast.model import hub as hub_files
    from lbfast.model.config import config_dict

    file = hub_files.find_file(where, "config.json", **hub)
    fields = hub_files.read_json(file)
    written = fields.get("model_type") if isinstance(fields, dict) else None
    by_type = {config.model_type: modality for modality, config in config_dict.items()}
    if not isinstance(written, str) or written not in by_type:
        raise hub_files.CheckpointError(
            f"{file}: expected a model_type of {', '.join(by_type)}, got {shown(written)}; "
            "where the weights are LanguageBind's all the same, say which: MODALITY=DIRECTORY"
        )
    return by_type[written]


def ready(model: Model, device: torch.device, batch_size: int, precision: str | None = None) -> Model:
    """A loaded model on `device`, optimized for batches of this size, in place."""
    from lbfast.model.inference import optimize_for_inference

    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size < batch_size]
    sizes.append(batch_size)
    return optimize_for_inference(model.to(device), dtype=None, precision=precision, batch_sizes=sizes)  # type: ignore[arg-type]


def check_device(name: str) -> torch.device | None:
    """What a device is called, which need not be here; None for "auto". Raises ValueError."""
    if name == "auto":
        return None
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "meta":
        raise ValueError(f"device: expected one that computes, got {name!r}")
    return device


def pick_device(name: str) -> torch.device:
    """The device of that name. ValueError: there is none."""
    device = check_device(name)
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one that is here, got {name!r}; torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs"
        )
    return device


def checked_dim(dim: int | None, width: int) -> int | None:
    """How many numbers of an embedding of `width` to keep; None: all. Raises ValueError."""
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= width):
        raise ValueError(f"dim: expected a whole number from 1 to {width}, the model's, got {dim!r}")
    return dim


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    check_dtype(name)
    if name == "auto":
        from lbfast.model.inference import best_dtype

        return best_dtype(device)
    return getattr(torch, name)
