"""Checkpoints of a training run: whole or absent, whenever the power goes.

checkpoints/step-00000200/trained.safetensors   the parameters that are trained
                          state.pt              optimiser, scaler, generators, position (plain values and tensors)
                          manifest.json         sizes and hashes of both
            set-aside-1/                        what lay after a checkpoint that a run went back to
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lbfast import files
from lbfast.messages import named, shown
from lbfast.model.checkpoint import CheckpointError
from lbfast.model.pickles import check_pickle

WEIGHTS, STATE, MANIFEST = "trained.safetensors", "state.pt", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_LEFT = re.compile(r"\.step-\d{8,}\.\d+(\.old)?")


class CheckpointWriteError(files.WriteError):
    """A checkpoint that could not be written: a full disk, say. What was there before is still there."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
    whole: set[Path] | None = None,
    best: Path | None = None,
) -> Path:
    """Writes folder/step-N and then removes older ones, but for the newest `keep` that are whole, this one included.

    The files are written elsewhere, flushed to the disk and renamed, so that a checkpoint by its name is complete.

    Args:
        whole: checkpoints that are known to be, to be spared the reading; this one is added.
        best: one that stays whatever comes after it.

    Raises CheckpointWriteError; then nothing has changed but that the step's own checkpoint is absent.
    """
    from safetensors.torch import save_file

    final = path_of(folder, step)
    staged = folder / f".{final.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        staged.mkdir()
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, staged / WEIGHTS)
        torch.save(dict(state), staged / STATE)
        manifest = {name: _facts(staged / name) for name in (WEIGHTS, STATE)}
        (staged / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1) + "\n")
        for name in (WEIGHTS, STATE, MANIFEST):
            files.flush(staged / name)
        files.flush(staged)
        set_aside([path for path in existing(folder) if step_of(path) >= step])  # of another line of history
        os.rename(staged, final)
        files.flush(folder)
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        shutil.rmtree(staged, ignore_errors=True)
        raise CheckpointWriteError(_why_not_written(folder, final, error)) from error
    whole = set() if whole is None else whole
    whole.add(final)
    _remove_old(folder, keep, whole, best)
    return final


def _remove_old(folder: Path, keep: int, whole: set[Path], best: Path | None) -> None:
    """Removes what is older than the newest `keep` that are whole and not the best. Damaged ones between stay."""
    for path in reversed(existing(folder)):
        if keep <= 0 and path != best:
            _remove(path)
            whole.discard(path)
        elif keep > 0 and (path in whole or not problem(path)):
            whole.add(path)
            keep -= 1


def set_aside(paths: Sequence[Path], *others: Path) -> Path | None:
    """Moves checkpoints into a new folder beside them, where no run takes them up or removes them, and copies others.

    Returns the folder; None where there are no checkpoints.
    """
    if not paths:
        return None
    number = 1
    while (aside := paths[0].parent / f"set-aside-{number}").exists():
        number += 1
    aside.mkdir()
    for other in others:
        if other.is_file():
            shutil.copy2(other, aside)
            files.flush(aside / other.name)
    for path in paths:
        os.rename(path, aside / path.name)
    files.flush(aside)
    files.flush(aside.parent)
    return aside


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def existing(folder: Path) -> list[Path]:
    """Checkpoints by their names, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is complete, its hashes right; None where there is none."""
    for path in reversed(existing(folder)):
        if not problem(path):
            return path
    return None


def problem(path: Path) -> str:
    """Why a checkpoint cannot be used; empty if it can."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())["files"]
        for name in (WEIGHTS, STATE):
            found, wanted = _facts(path / name), manifest[name]
            if found["bytes"] != wanted["bytes"]:
                return f"{name}: expected {wanted['bytes']} bytes, got {found['bytes']}"
            if found != wanted:
                return f"{name}: its contents have changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"it is incomplete ({named(error)})"
    return ""


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint. Raises CheckpointError where it is not complete, or foreign."""
    from safetensors.torch import load_file

    wrong = problem(path)
    if wrong:
        raise CheckpointError(f"{path}: not a complete checkpoint of a training run: {wrong}")
    with foreign(path):
        check_pickle(path / STATE)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        step, name = state["step"], _NAME.fullmatch(path.name)
        if type(step) is not int or step < 1 or (name and step != int(name[1])):
            raise ValueError(f"step: expected a whole number, that of the name, got {shown(step)}")
        return load_file(path / WEIGHTS), state


@contextlib.contextmanager
def foreign(path: Path) -> Iterator[None]:
    """Whatever goes wrong in reading a checkpoint is a CheckpointError: its files are right, but no run's."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {named(error)}"
        raise CheckpointError(f"{path}: expected what a training run wrote, got something else ({said})") from error


def sweep(folder: Path) -> None:
    """Removes what killed runs left half written or half removed."""
    for path in folder.glob(".step-*"):
        if _LEFT.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def generators() -> dict[str, Any]:
    """The state of every random generator of this process, as plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": (version, list(words), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
    }


def restore_generators(state: Mapping[str, Any]) -> None:
    """Sets the generators to what `generators` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.split("-")[1])


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 22):
            digest.update(part)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _remove(path: Path) -> None:
    """Removes a directory; it loses its name first, so that half of it is never taken for a checkpoint."""
    gone = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _why_not_written(folder: Path, final: Path, error: Exception) -> str:
    last = newest(folder)
    kept = f"the last complete checkpoint is {last}" if last else "there is no earlier checkpoint"
    return f"{final}: cannot write the checkpoint: {files.reason(folder, error)}; {kept}"
