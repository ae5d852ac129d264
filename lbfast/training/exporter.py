"""Trained models for others: directories as upstream writes them, merged ones, and peft's adapters."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Literal

from torch import nn

from lbfast import files as lbfast_files
from lbfast.messages import listing
from lbfast.model import checkpoint
from lbfast.model.languagebind import LanguageBindModel
from lbfast.model.lora import lora_modules
from lbfast.processing.vocabulary import FILES
from lbfast.training.checkpoints import foreign, load, newest
from lbfast.training.engine import full
from lbfast.training.parameters import BIAS, trained
from lbfast.training.recipes import from_dict
from lbfast.training.start import ADAPTER_FILES, ADAPTER_ROOT, OTHERS, initial_model, tokenizer_of

Style = Literal["upstream", "plain", "merged", "peft"]
STYLES = ("upstream", "plain", "merged", "peft")

CHECKPOINTS, MODEL, ADAPTER, MODEL_EMA = "checkpoints", "model", "adapter", "model-ema"
"""In a run's directory: its checkpoints, and once it is complete its model, peft's adapters, and the averaged model."""

START = "start.json"
"""In a run's directory: the recipe, and what its model was made from."""

EXPORT = "export"
"""What the folder of an exported model is marked as; see `lbfast.files`."""


def export(
    model: LanguageBindModel,
    folder: str | os.PathLike[str],
    style: Style = "upstream",
    *,
    files: Sequence[Path] = (),
    write: bool = True,
) -> None:
    """Writes a model into a directory, which is whole or as it was before.

    Args:
        model: as trained.
        folder: new, empty, or an earlier export: then the model's files in it are replaced, and others stay.
        style: "upstream": what upstream's own save writes, adapters apart; "plain": the same under our names; "merged":
            adapters added into the weights; "peft": adapters alone, as peft's PeftModel of the vision encoder saves
            them, with the other trained parameters beside them in trained.safetensors.
        files: copied beside the weights, but for "peft".
        write: False on every process but one, where parameters are sharded: all must call.

    Raises:
        ValueError: an unknown style, or "peft" for a model without adapters. FileExistsError: the folder has something
        that no export has made. BlockingIOError: another is writing there. OSError: the disk.
    """
    if style not in STYLES:
        raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style!r}")
    if style == "peft":
        _export_adapter(model, Path(folder), write)
        return
    if style == "merged":
        model = copy.deepcopy(model).merge_lora()
    state = checkpoint.upstream_keys(model) if style == "upstream" else model.state_dict()
    state = {name: full(value).cpu() if write else full(value) for name, value in state.items() if name != BIAS}
    if not write:
        return
    with _made(Path(folder), "config.json") as staged:
        checkpoint.save_state_dict(state, staged, True, "5GB")
        config = copy.deepcopy(model.config)
        config.architectures = [_class_name(model)]
        config.save_pretrained(staged)
        for file in files:
            shutil.copy(file, staged)


@contextlib.contextmanager
def _made(folder: Path, last: str) -> Iterator[Path]:
    """A folder to fill, whose files then replace those of an earlier export."""
    with lbfast_files.claimed(folder, EXPORT):
        stale = {*checkpoint.weight_names(folder), "config.json", *ADAPTER_FILES, *FILES}
        with lbfast_files.filling(folder, last, stale) as staged:
            yield staged


def check_place(out: Path, run: Path) -> None:
    """Raises FileExistsError where the model of a run must not be exported: into the run, or over something else."""
    place, own = out.resolve(), run_folder(run).resolve()
    if place in (own, *own.parents):
        said = "out: expected a folder for the model alone, got the run or one that it is in"
        raise FileExistsError(errno.EEXIST, said, str(out))
    lbfast_files.check_claim(out, EXPORT, None)


def run_folder(run: Path) -> Path:
    """The directory of a training run, from itself or one of its checkpoints. FileNotFoundError where there is none."""
    inside = [folder.parent for folder in run.absolute().parents[:2] if folder.name == CHECKPOINTS]
    for folder in (run, *inside):
        if (folder / START).is_file():
            return folder
    raise FileNotFoundError(f"{run}: expected the directory of a training run, with {START}, or its checkpoint")


def rebuilt(run: Path, averages: bool = False) -> tuple[LanguageBindModel, Path, list[Path]]:
    """The model of a training run, from its directory or one of its checkpoints; the checkpoint; a tokenizer's files.

    With `averages` its weights are the moving averages; ValueError where the run had none.

    Raises FileNotFoundError where there is no run or no complete checkpoint, and what `initial_model` raises.
    """
    folder = run_folder(run)
    start = folder / START
    found = run if run != folder else newest(folder / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"{folder / CHECKPOINTS}: expected a complete checkpoint there, found none")
    tensors, state = load(found)
    if averages:
        if state.get("averages") is None:
            raise ValueError(f"ema: expected a run with averages (--set ema=0.9998), got one without: {found}")
        with foreign(found):
            tensors = {name: state["averages"][name] for name in tensors}
    with foreign(start):
        fields = dict(json.loads(start.read_text()))
        recipe, where = from_dict(dict(fields.pop("recipe")), str(start)), str(fields.pop("where"))
        hub, text = {key: fields[key] for key in ("cache_dir", "revision")}, fields["text"]
        if any(not isinstance(value, (str, bool, NoneType)) for value in fields.values()):
            raise ValueError(f"expected texts, true or false of {listing(fields)}")
    model = initial_model(where, recipe, **fields)
    own = model.state_dict()
    checkpoint.check_state(model, {**own, **tensors}, str(found))
    model.load_state_dict({**own, **tensors}, strict=True)
    return model, found, tokenizer_of(text or where, recipe.modality, **hub)[1]


def _class_name(model: nn.Module) -> str:
    return next(c.__name__ for c in type(model).__mro__ if c.__module__ == LanguageBindModel.__module__)


def _export_adapter(model: LanguageBindModel, folder: Path, write: bool) -> None:
    from safetensors.torch import save_file

    encoder = model.vision_model.encoder
    adapters, targets = {}, set()
    for name, module in lora_modules(encoder):
        targets.add(name.split(".", 2)[2])  # layers.N.<...>
        for part in ("lora_A", "lora_B"):
            weight = full(getattr(module, part).weight)
            adapters[f"{ADAPTER_ROOT}{name}.{part}.weight"] = weight.cpu().contiguous()
    if not adapters:
        raise ValueError("style: expected a model with adapters for 'peft', got one without")
    others = {
        name: full(parameter).cpu().contiguous()
        for name, parameter in trained(model).items()
        if ".lora_" not in name and name != BIAS
    }
    if not write:
        return
    fields = model.config.vision_config
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": fields.lora_r,
        "lora_alpha": fields.lora_alpha,
        "lora_dropout": fields.lora_dropout,
        # of a vision encoder, or of all of its model, whose text tower has layers of the same names
        "target_modules": rf"(vision_model\.encoder\.)?layers\.\d+\.({'|'.join(map(re.escape, sorted(targets)))})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    with _made(folder, "adapter_config.json") as staged:
        (staged / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(adapters, staged / "adapter_model.safetensors", metadata={"format": "pt"})
        save_file(others, staged / OTHERS, metadata={"format": "pt"})
