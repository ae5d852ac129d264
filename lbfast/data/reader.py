"""Samples of manifests and shards, found and read: pixel values as a processor gives them, and a caption."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lbfast.data.decode import Undecodable, plain_fields
from lbfast.data.manifest import SUFFIXES, Manifest, caption_columns
from lbfast.data.sample import DEFAULT_VIEWS, Sample, Source, as_file, candidates
from lbfast.data.shards import Shard, expand_braces
from lbfast.data.shared import as_array
from lbfast.data.store import StoreError, listing, suffix_of
from lbfast.data.suffixes import suffixes_of
from lbfast.processing.media import is_url


@dataclass(frozen=True)
class Draw:
    """A sample to read, and the seed of its draws."""

    path: str
    sample: Sample
    seed: int


@dataclass(frozen=True)
class Read:
    """What a sample gave: pixel values as `stacked` takes them, and a caption ("" where none was wanted)."""

    key: str
    pixels: np.ndarray
    caption: str


class Reader:
    """Reads samples with a copy of a processor: what the workers do.

    Args:
        processor: of the modality; its `pixel_values` is called.
        views: captions to draw from, with weights; None: see `DEFAULT_VIEWS`.
        training: draw flips and segments, from each sample's seed.
        raw: uint8 pixels.
        captions: False reads none.
        dtype: of pixels that are not raw.
    """

    def __init__(
        self,
        processor: Any,
        views: Mapping[str, float] | None = None,
        *,
        training: bool = False,
        raw: bool = False,
        captions: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        self._dtype = torch.uint8 if raw else dtype
        self._processor = copy.copy(processor)
        self._processor.tokenizer = None
        self._processor.config = SimpleNamespace(
            vision_config=SimpleNamespace(**plain_fields(processor.config.vision_config))
        )
        self._processor.transform = copy.deepcopy(processor.transform)
        self._views, self._training, self._raw, self._captions = views, training, raw, captions

    def decode(self, task: Draw) -> Read | Undecodable:
        """The sample's pixel values and caption. Whatever goes wrong in reading it is its reason."""
        try:
            caption = self._caption(task) if self._captions else ""
            generator = torch.Generator().manual_seed(task.seed) if self._training else None
            self._processor.train(self._training, generator)
            with as_file(task.sample.media) as file:
                pixels = self._processor.pixel_values([file], raw=self._raw)[0]
            return Read(task.path, as_array(pixels.to(self._dtype)), caption)
        except StoreError as error:
            return Undecodable(str(error), lasting=True)
        except OSError as error:
            return Undecodable(f"{error.filename or task.path}: {error.strerror or error}")
        except ValueError as error:
            return Undecodable(str(error))
        except Exception as error:  # a codec's own, out of memory, or a fault of ours
            return Undecodable(f"{task.path}: {type(error).__name__}: {error}")

    def _caption(self, task: Draw) -> str:
        found = candidates(task.sample.captions(), self._views)
        if not found:
            raise ValueError(f"{task.path}: no caption: expected text in {', '.join(self._views or DEFAULT_VIEWS)}")
        texts, weights = zip(*found)
        ends = np.cumsum(weights)
        at = np.random.default_rng(task.seed).random() * ends[-1]
        return texts[min(int(np.searchsorted(ends, at, side="right")), len(texts) - 1)]


def open_sources(
    given: Any,
    modality: str,
    *,
    captions: Mapping[str, float] | None = None,
    media: str | None = None,
    need_captions: bool = True,
    split: str = "first",
) -> list[Source]:
    """Opens manifests and shards; see `Batches` for what is given. With need_captions False none are looked for.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that is a manifest or a shard.
    """
    if isinstance(given, str | os.PathLike) or not isinstance(given, list | tuple):
        given = [given]
    columns = caption_columns(captions) if need_captions else ()
    suffixes = suffixes_of(modality) if media is None else (media,)
    opened: list[Source] = []
    for item in given:
        if not isinstance(item, str | os.PathLike):
            opened.append(item)
            continue
        for file in find_files(item):
            if suffix_of(os.fspath(file)) not in SUFFIXES:
                opened.append(Shard(file, suffixes, need_captions, split))
            else:
                opened.append(Manifest(file, media or "path", columns))
    if not opened:
        raise ValueError("data: expected at least one manifest or shard, got none")
    return opened


def find_files(given: str | os.PathLike[str]) -> list[str]:
    """The manifests or shards that a path stands for: itself, those its braces name, or those a folder holds.

    A URL that ends in a slash is a folder's.
    """
    name = os.fspath(given)
    if is_url(name) and name.endswith("/"):
        files = listing(name)
    elif not os.path.isdir(name):
        return [name] if os.path.exists(name) else expand_braces(name)
    else:
        files = sorted(str(file) for file in Path(name).iterdir() if file.is_file() and not file.name.startswith("."))
    shards = [file for file in files if suffix_of(file) == ".tar"]
    found = shards or [file for file in files if suffix_of(file) in SUFFIXES]
    if not found:
        raise ValueError(f"{name}: expected a folder with shards (.tar) or manifests ({', '.join(SUFFIXES)}), got none")
    return found


def check_views(views: Mapping[str, float] | None) -> None:
    """Raises ValueError where weights are not numbers of at least 0, or none is above."""
    if views is None:
        return
    if not isinstance(views, Mapping):
        raise TypeError(f"captions: expected views with weights, as {{'caption': 1}}, got {views!r}")
    good = all(isinstance(w, int | float) and 0 <= w < float("inf") for w in views.values())
    if not good or not any(views.values()):
        raise ValueError(f"captions: expected views with weights of at least 0, one above, got {dict(views)!r}")
