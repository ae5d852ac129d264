"""Batches of training data from manifests and shards: the same in every run, on any number of ranks and workers."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lbfast.data.decode import Decoder, Undecodable
from lbfast.data.manifest import Manifest
from lbfast.data.reader import Draw, Read, Reader, check_views, open_sources
from lbfast.data.sample import Sample, Source
from lbfast.data.shards import Shard
from lbfast.data.shared import stacked
from lbfast.data.store import StoreError

_TOLD = 20  # rows that sources leave out, each with a message of its own
_ENOUGH = 1000  # samples that are bad without one that is good: something else is wrong than the samples


@dataclass
class Batch:
    """This rank's rows of one global step, without the samples that could not be read: fewer rows than asked, or none.

    Attributes:
        pixel_values: (b, ...) float32, or uint8 with `raw`, as the processor gives them.
        input_ids: (b, L) int64.
        attention_mask: (b, L) int64.
        groups: (b,) int64, equal where captions are equal, on every rank: `ids` of `info_nce`.
        keys: what each sample is called: its path in the manifest, or TAR/KEY.
        captions: the text that was drawn for each.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    groups: torch.Tensor
    keys: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.keys)


class Batches:
    """Training data of one modality, in batches that depend on (seed, epoch, step) alone.

    The order of an epoch is a permutation drawn from (seed, epoch). Step s is its rows [s B, (s + 1) B), of which rank
    r of W takes the r-th of W contiguous parts. The caption, where a sample has several, and the processor's training
    draws (flips, segments of long sounds) come from (seed, epoch, sample): neither the number of workers nor that of
    ranks changes them, and (epoch, step) is all there is to resume from.

    Samples that cannot be read are left out, put down in `skipped` and passed to `on_skip`.

    Args:
        sources: manifests (.parquet, .jsonl, .csv, .tsv), shards (.tar; braces as in "shard-{000..127}.tar"), folders
            of either, URLs of these (see `lbfast.data.store`), or sequences of `Sample`; one or a list.
        processor: of the modality; it is copied, and the copy set to `training`.
        tokenizer: for the captions.
        batch_size: rows of a global step, those of all ranks.
        rank, world_size: which part of each step.
        workers: processes that decode ahead; 0: none. With workers, run this under `if __name__ == "__main__":`.
        seed: of order and draws.
        shuffle: False keeps the order of the sources.
        training: draw flips and segments, and drop the last step where it is not full. False: neither.
        captions: views (columns of a manifest, fields of a shard's json, or "txt") with their weights; a sample
            without some of them draws among those it has. None: "caption"; in shards the txt, or the json's caption or
            text.
        media: the manifest's column of paths ("path"), or the suffix of a shard's member where samples have several
            ("depth.png").
        split: at which dot of a member's name its sample's key ends, "first" or "last"; see `Shard`.
        raw: uint8 pixels, a quarter of the memory; see `Processor`. Not for audio.
        context_length: tokens a caption, padded or cut.
        prefetch: samples decoded before they are asked for, with workers; None: those of one step.
        on_skip: called with (key, reason) for each sample when it is first skipped; of what the sources leave out, for
            the first 20, and once more for the others together.

    Attributes:
        steps_per_epoch: the same on every rank.
        skipped: key -> reason.

    Raises:
        FileNotFoundError, ValueError: a source is not there, cannot be read or is empty; batch_size is larger than the
        data; no sample that was tried could be read (while iterating). StoreError: a store of URLs has failed.
    """

    def __init__(
        self,
        sources: str | os.PathLike[str] | Source | Sequence[str | os.PathLike[str] | Source],
        processor: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        training: bool = True,
        captions: Mapping[str, float] | None = None,
        media: str | None = None,
        split: str = "first",
        raw: bool = False,
        context_length: int = 77,
        prefetch: int | None = None,
        on_skip: Callable[[str, str], None] | None = None,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("workers", workers, 0),
            ("seed", seed, 0),
            ("context_length", context_length, 1),
            ("prefetch", 1 if prefetch is None else prefetch, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, got {rank}")
        if raw and processor.modality == "audio":
            raise ValueError("raw: expected a modality with pixels, got audio")
        check_views(captions)
        self.skipped: dict[str, str] = {}
        self._on_skip = on_skip
        self._sources = open_sources(sources, processor.modality, captions=captions, media=media, split=split)
        self._skip_sources()
        self._ends = list(itertools.accumulate(map(len, self._sources)))
        if not len(self):
            raise ValueError(f"data: expected samples, got none{_first(self.skipped)}")
        if training and len(self) < batch_size:
            raise ValueError(
                f"batch_size: expected at most {len(self)}, the samples there are, got {batch_size}; "
                f"`--set batch_size={len(self)}` makes one step of them all"
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.steps_per_epoch = len(self) // batch_size if training else -(-len(self) // batch_size)
        self._seed, self._shuffle, self._workers, self._prefetch = seed, shuffle, workers, prefetch
        self._reader = Reader(processor, captions, training=training, raw=raw)
        self._tokenizer, self._context_length = tokenizer, context_length
        self._shape = item_shape(processor)
        self._dtype = torch.uint8 if raw else torch.float32
        self._tried, self._good = 0, 0

    def __len__(self) -> int:
        """Samples of all sources, on all ranks; those that turn out to be bad included."""
        return self._ends[-1]

    def sample(self, index: int) -> Sample:
        """The sample of that number, counted through the sources."""
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number][index - (self._ends[number - 1] if number else 0)]

    def fingerprint(self) -> str:
        """Changes with the paths and captions of the samples, and their order; of shards, with where members lie."""
        key = hashlib.sha256()
        for source in self._sources:
            if isinstance(source, Manifest | Shard):
                key.update(source.fingerprint().encode())
            else:
                for index in range(len(source)):
                    sample = source[index]
                    key.update(f"{sample.path}\0{sorted(sample.texts.items())}\0".encode(errors="surrogateescape"))
        return key.hexdigest()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from step `start` on; what comes before is neither read nor decoded."""
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"start: expected a step from 0 to {self.steps_per_epoch}, got {start}")
        return self._iterate(epoch, start)

    def reading_seconds(self, samples: int = 8) -> float:
        """Seconds that reading a sample and its caption takes one process, from the median of a few."""
        order = np.random.default_rng(self._seed).permutation(len(self))[:samples]
        tasks, times = _Tasks(self.sample, order, self._seed, 0), []
        for number in range(len(tasks)):
            begun = time.perf_counter()
            result = self._reader.decode(tasks[number])
            if isinstance(result, Read):
                self._tokenize([result.caption])
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def _iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        bounds = [self._bounds(step) for step in range(start, self.steps_per_epoch)]
        order = np.arange(len(self))
        if self._shuffle:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self))
        mine = np.concatenate([order[:0], *(order[first:last] for first, last in bounds)])
        tasks = _Tasks(self.sample, mine, self._seed, epoch)
        ahead = max((last - first for first, last in bounds), default=0) if self._prefetch is None else self._prefetch
        sizes = [last - first for first, last in bounds]
        with Decoder(self._reader, tasks, self._workers, ahead, sizes) as decoder:
            results = enumerate(decoder)
            for size in sizes:
                yield self._batch(itertools.islice(results, size), tasks)

    def _bounds(self, step: int) -> tuple[int, int]:
        """This rank's part of the rows of a step."""
        first = step * self.batch_size
        count = min(self.batch_size, len(self) - first)
        return first + count * self.rank // self.world_size, first + count * (self.rank + 1) // self.world_size

    def _batch(self, results: Iterator[tuple[int, Any]], tasks: _Tasks) -> Batch:
        rows: list[np.ndarray] = []
        keys: list[str] = []
        captions: list[str] = []
        for number, result in results:
            self._tried += 1
            if isinstance(result, Undecodable) and result.lasting:
                raise StoreError(result.reason)
            if isinstance(result, Read):
                if not rows or result.pixels.shape == rows[0].shape:
                    rows.append(result.pixels)
                    keys.append(result.key)
                    captions.append(result.caption)
                    continue
                shapes = f"expected pixel values of shape {rows[0].shape}, got {result.pixels.shape}"
                result = Undecodable(f"{result.key}: {shapes}")
            self._skip(tasks[number].path, result.reason)
            if not self._good and not keys and self._tried >= min(_ENOUGH, self.steps_per_epoch * self.batch_size):
                raise ValueError(f"data: none of {self._tried} samples could be read; the last: {result.reason}")
        self._good += len(keys)
        pixels = stacked(rows, self._dtype) if rows else torch.empty((0, *self._shape), dtype=self._dtype)
        self._shape = tuple(pixels.shape[1:])
        input_ids, attention_mask = self._tokenize(captions)
        groups = torch.tensor([_number(caption) for caption in captions], dtype=torch.int64)
        return Batch(pixels, input_ids, attention_mask, groups, keys, captions)

    def _tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if not captions:
            return (torch.empty(0, self._context_length, dtype=torch.int64),) * 2
        tokens = self._tokenizer(
            captions, max_length=self._context_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def _skip_sources(self) -> None:
        """Puts down what the sources leave out; a manifest of millions may do so with thousands, so few are told."""
        for source in self._sources:
            for key, reason in source.skipped.items():
                if len(self.skipped) < _TOLD:
                    self._skip(key, reason)
                else:
                    self.skipped[key] = reason
        others = len(self.skipped) - _TOLD
        if others > 0 and self._on_skip is not None:
            self._on_skip(f"{others} more", f"the last: {list(self.skipped.values())[-1]}")

    def _skip(self, key: str, reason: str) -> None:
        if key not in self.skipped:
            self.skipped[key] = reason
            if self._on_skip is not None:
                self._on_skip(key, reason)


class _Tasks(Sequence[Draw]):
    """The samples of an epoch in order, made when asked for."""

    def __init__(self, sample: Callable[[int], Sample], order: np.ndarray, seed: int, epoch: int):
        self._sample, self._order, self._seed, self._epoch = sample, order, seed, epoch

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: Any) -> Any:
        index = int(self._order[number])
        seed = np.random.SeedSequence((self._seed, self._epoch, index)).generate_state(1, np.uint64)
        sample = self._sample(index)
        return Draw(sample.path, sample, int(seed[0]))


def item_shape(processor: Any) -> tuple[int, ...]:
    """Shape of one item's pixel values, as the processor's config says it."""
    vision, modality = processor.config.vision_config, processor.modality
    size = int(getattr(vision, "image_size", 224))
    if modality == "audio":
        return 3, int(processor.transform.num_mel_bins), int(processor.transform.target_length)
    return (3, int(getattr(vision, "num_frames", 8)), size, size) if modality == "video" else (3, size, size)


def _number(caption: str) -> int:
    """63 bits of a caption's hash: the same on every rank."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1


def _first(skipped: Mapping[str, str]) -> str:
    """ "; 3 are unusable, the first: a.csv, row 1: no caption"."""
    if not skipped:
        return ""
    key, reason = next(iter(skipped.items()))
    return f"; {len(skipped)} skipped, the first: {key}: {reason}"
