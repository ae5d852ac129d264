"""Items that several modalities show, found by their stems: one embedding of each, by `lbfast.fuse`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np
import torch

from lbfast.embedding.items import Failure, Item, split_modality
from lbfast.embedding.places import Cell
from lbfast.model.fusion import fuse


@dataclass(frozen=True)
class Group:
    """Files of one stem, one a modality, and the row that is made of theirs."""

    parts: tuple[Item, ...]
    item: Item


@dataclass
class Groups:
    """What was found.

    Attributes:
        whole: a file of each modality.
        failures: stems that two files of one modality have.
        ignored: how many lack one, by reason.
    """

    whole: list[Group] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)


def modalities_of(given: str | Sequence[str], available: Collection[str]) -> tuple[str, ...]:
    """The modalities of "video+audio", or of a list. ValueError for less than two, or one without a model."""
    names = tuple(given.split("+") if isinstance(given, str) else given)
    if len(names) < 2 or len(set(names)) < len(names) or not set(names) <= set(available):
        raise ValueError(
            f"fuse: expected two or more of {', '.join(available)}, as video+audio, got {'+'.join(map(str, names))}"
        )
    return names


def find_groups(items: Iterable[Item], inputs: Sequence[str | os.PathLike[str]], modalities: Sequence[str]) -> Groups:
    """Groups files by stem: the path below the folder that was given, or the name, without its last suffix.

    "video:clips/x/a.mp4" and "audio:sounds/x/a.wav" of the inputs clips/ and sounds/ are both "x/a". The row of a group
    has the id "video+audio:x/a", the path of the first modality's file, and a stamp that changes with either.
    """
    folders = folders_of(inputs)
    by_stem: dict[str, dict[str, list[Item]]] = {}
    for item in items:
        if item.modality in modalities:
            by_stem.setdefault(stem_of(item, folders), {}).setdefault(item.modality, []).append(item)
    found, name = Groups(), "+".join(modalities)
    for stem, files in by_stem.items():
        twice = next((each for each in modalities if len(files.get(each, ())) > 1), None)
        absent = [each for each in modalities if each not in files]
        if twice is not None and not absent:
            paths = " and ".join(item.path for item in files[twice][:2])
            found.failures.append(Failure(f"{name}:{stem}", f"expected one {twice} file of that stem, got {paths}"))
        elif absent:
            reason = f"not fused: no {' and no '.join(absent)} of the same stem"
            found.ignored[reason] = found.ignored.get(reason, 0) + 1
        else:
            parts = tuple(files[each][0] for each in modalities)
            stamp = hashlib.sha256("\0".join(f"{part.id}\0{part.stamp}" for part in parts).encode()).hexdigest()[:16]
            found.whole.append(Group(parts, Item(f"{name}:{stem}", name, parts[0].path, stamp)))
    return found


def folders_of(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The inputs as folders, ending with a slash, the longest first."""
    return sorted((os.path.join(split_modality(os.fspath(given))[1], "") for given in inputs), key=len, reverse=True)


def stem_of(item: Item, folders: Sequence[str]) -> str:
    """What groups have in common: the path below one of the folders, or the name, without its last suffix.

    Of a file in a table that is the path beside it; one without a path shares its row's with nothing.
    """
    path = item.path
    if isinstance(item.data, Cell):
        return path if item.data.name is None else str(PurePath(item.data.name).with_suffix(""))
    folder = next((folder for folder in folders if path.startswith(folder)), os.path.join(os.path.dirname(path), ""))
    return str(PurePath(path[len(folder) :]).with_suffix(""))


def fused_rows(groups: Sequence[Group], rows: Sequence[np.ndarray]) -> Iterator[tuple[Group, np.ndarray | None]]:
    """Each group with its embedding, (E,) float32 of unit length; None where the parts' sum points nowhere.

    Args:
        rows: for each part, (groups, E), of unit length.
    """
    for number, group in enumerate(groups):
        parts = {part.modality: torch.from_numpy(row[number].copy()) for part, row in zip(group.parts, rows)}
        try:
            yield group, fuse(parts).numpy()
        except ValueError:
            yield group, None
