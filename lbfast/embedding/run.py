"""The part of a run that needs the models: batches of what is not finished, decoded ahead, kept as they are done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lbfast.data.decode import Decoder, Processors, Task, Undecodable
from lbfast.data.streams import Batch, Streams
from lbfast.data.suffixes import LANGUAGE
from lbfast.embedding.embedder import Embedder
from lbfast.embedding.fused import Group, fused_rows
from lbfast.embedding.items import Failure, Item, mean_of, piece_of
from lbfast.embedding.journal import Journal
from lbfast.embeds import usable
from lbfast.processing.segments import Cuts

Progress = Callable[[str, int, int], None]
"""progress(modality, done, total) after each batch; rows done in an earlier run count as done.

Of recordings in parts the total is reckoned from the lengths of those met so far.
"""

_FUSED_AT_ONCE = 4096


@dataclass
class _Reckoning:
    """How many rows there will be of `files` recordings; `ends`: of those that are finished."""

    files: int
    ends: list[int]
    done: int = 0
    _open: dict[int, tuple[int, int]] = field(default_factory=dict)  # rows so far, and how many are expected

    def __post_init__(self) -> None:
        self.done = sum(self.ends)

    def met(self, file: int, rows: int, expected: int) -> None:
        so_far = self._open.get(file, (0, 0))[0] + rows
        self._open[file], self.done = (so_far, max(so_far, expected)), self.done + rows

    def ended(self, file: int) -> None:
        self.ends.append(self._open.pop(file, (0, 0))[0])

    def now(self) -> tuple[int, int]:
        """Rows that are done, and all."""
        met = len(self.ends) + len(self._open)
        rows = sum(self.ends) + sum(expected for _, expected in self._open.values())
        return self.done, max(self.done, rows * self.files // met if met else 0)


@dataclass
class Run:
    """The part of a run that needs the models.

    Attributes:
        cuts: of the items that are cut.
        failed: called with what cannot be embedded.
    """

    embedder: Embedder
    journal: Journal
    workers: int
    failed: Callable[[Failure], None]
    progress: Progress
    cuts: Cuts | None = None

    def embed(self, items: Sequence[Item]) -> None:
        """Embeds what the journal does not have yet. One model is loaded at a time, and only if it has work."""
        whole = [item for item in items if not item.cut]
        left = [item for item in whole if item not in self.journal]
        tasks = [Task(item.modality, item.path, item.data) for item in left if item.modality != LANGUAGE]
        work, ahead = self.embedder.processors(), 2 * self.embedder.batch_size + self.workers
        names = list(dict.fromkeys(item.modality for item in items))
        batches = {name: list(self._batches(item for item in whole if item.modality == name)) for name in names}
        sizes = [len(batch) for name in names if name != LANGUAGE for batch in batches[name]]
        with Decoder(work, tasks, self.workers, ahead, sizes, self.embedder.device) as decoder, Late() as late:
            decoded = iter(decoder)
            for name in names:
                if any(item.cut for item in items if item.modality == name):
                    self._embed_parts(name, [item for item in items if item.modality == name], work, late)
                    continue
                total = sum(item.modality == name for item in items)
                done = total - sum(map(len, batches[name]))
                self.progress(name, done, total)
                if not batches[name]:
                    continue
                late.do()  # before the next model is loaded
                self.embedder.open(name, alone=True)
                for batch in batches[name]:
                    good, values = self._values(name, batch, decoded)
                    done += len(batch)
                    self._embed_batch(name, good, values, (done, total), late)
        self.embedder.close()

    def _embed_parts(self, name: str, items: Sequence[Item], work: Processors, late: Late) -> None:
        """Embeds the parts of recordings of one modality: in batches of a file's own, whichever file is ready."""
        assert self.cuts is not None
        for item in items:
            for number in sorted(
                set(range(max(self.journal.numbers(item), default=0))) - {*self.journal.numbers(item)}
            ):
                begin = float(self.cuts.span(number)[0])
                self.failed(Failure(item.path, f"{begin:g} s: {self.embedder.not_finite()}, in an earlier run"))
        left = [item for item in items if item not in self.journal]
        reckoning = _Reckoning(len(items), [self.journal.count(item) for item in items if item in self.journal])
        reckoning.done += sum(self.journal.count(item) for item in left)
        self.progress(name, *reckoning.now())
        if not left:
            return
        late.do()
        self.embedder.open(name, alone=True)
        begun = ((item, max(self.journal.numbers(item), default=-1) + 1) for item in left)
        tasks = [Task(name, item.path, item.data, cuts=replace(self.cuts, first=first)) for item, first in begun]
        with Streams(work, tasks, min(self.workers, len(tasks)), self.embedder.batch_size) as streams:
            for ready in streams:
                item = left[ready.file]
                if isinstance(ready, Batch):
                    parts = ready.parts
                    pieces = [piece_of(item, part.number, part.start, part.end, part.last) for part in parts]
                    reckoning.met(ready.file, len(parts), parts[-1].expected)
                    self._embed_batch(name, pieces, [part.pixels for part in parts], reckoning.now(), late)
                elif ready.why is not None:
                    reckoning.ended(ready.file)
                    self.failed(Failure(item.path, ready.why.reason))
                else:
                    reckoning.ended(ready.file)
        late.do()
        self.progress(name, *reckoning.now())

    def _embed_batch(
        self, name: str, items: Sequence[Item], values: list[Any], so_far: tuple[int, int], late: Late
    ) -> None:
        embeds = self.embedder.embed_values(name, values) if items else torch.empty(0, self.embedder.size)
        late.put(self._keeping(items, embeds, values, (name, *so_far)))
        if not embeds.is_cuda:  # then it is computed
            late.do()

    def _batches(self, items: Iterator[Item]) -> Iterator[list[Item]]:
        """Batches of the items of one modality, without what is finished: the same batches whatever that is.

        What a row is to the last bit depends on what is embedded with it.
        """
        while batch := list(itertools.islice(items, self.embedder.batch_size)):
            if left := [item for item in batch if item not in self.journal]:
                yield left

    def means(self, items: Sequence[Item]) -> None:
        """Makes a row of each file of which all parts are finished: their mean, of unit length."""
        todo = [item for item in items if item.cut and item in self.journal and mean_of(item) not in self.journal]
        for name in dict.fromkeys(item.modality for item in todo):
            some = [item for item in todo if item.modality == name]
            for start in range(0, len(some), _FUSED_AT_ONCE):
                self._keep_made(some[start : start + _FUSED_AT_ONCE], name)

    def _keep_made(self, items: list[Item], name: str) -> None:
        rows = torch.from_numpy(self.journal.embeddings(items))
        finite = usable(rows)
        for item, good in zip(items, finite.tolist()):
            if not good:
                self.failed(Failure(item.path, "the embeddings of its parts point in opposite directions"))
        kept = [mean_of(item) for item, good in zip(items, finite.tolist()) if good]
        if kept:
            self.journal.append(kept, rows[finite].numpy(), self.embedder.checkpoint_of(name).name)

    def fuse(self, groups: Sequence[Group]) -> None:
        """Makes one row of the rows of each group whose parts are all finished."""
        todo = [group for group in groups if group.item not in self.journal]
        todo = [group for group in todo if all(part in self.journal for part in group.parts)]
        for start in range(0, len(todo), _FUSED_AT_ONCE):
            some = todo[start : start + _FUSED_AT_ONCE]
            modalities = range(len(some[0].parts))
            rows = [self.journal.embeddings([group.parts[i] for group in some]) for i in modalities]
            model = "+".join(self.embedder.checkpoint_of(part.modality).name for part in some[0].parts)
            good = []
            for group, row in fused_rows(some, rows):
                if row is None:
                    self.failed(Failure(group.item.id, "the embeddings of its files point in opposite directions"))
                else:
                    good.append((group.item, row))
            if good:
                self.journal.append([item for item, _ in good], np.stack([row for _, row in good]), model)

    def _values(
        self, modality: str, batch: list[Item], decoded: Iterator[np.ndarray | Undecodable]
    ) -> tuple[list[Item], list[Any]]:
        """The items that have pixel values, or are captions, and these."""
        if modality == LANGUAGE:
            return batch, [item.text for item in batch]
        good: list[Item] = []
        pixels: list[np.ndarray] = []
        for item in batch:
            result = next(decoded)
            if isinstance(result, Undecodable):
                self.failed(Failure(item.path, result.reason))
            else:
                good.append(item)
                pixels.append(result)
        return good, pixels

    def _keeping(
        self, items: Sequence[Item], embeds: torch.Tensor, values: list[Any], so_far: tuple[str, int, int]
    ) -> Callable[[], None]:
        """What is left to do of a batch when `embeds`, which a GPU may still compute from `values`, are there."""
        rows = embeds.to("cpu", non_blocking=True)
        there = torch.cuda.current_stream(embeds.device).record_event() if embeds.is_cuda else None

        def keep() -> None:
            if there is not None:
                there.synchronize()
            values.clear()  # until now they were in use
            self._keep(items, rows, so_far[0])
            self.progress(*so_far)

        return keep

    def _keep(self, items: Sequence[Item], rows: torch.Tensor, modality: str) -> None:
        """Writes the rows that are finite."""
        finite = usable(rows)
        for item, good in zip(items, finite.tolist()):
            if not good:
                self.failed(Failure(item.path, self.embedder.not_finite()))
        kept = [item for item, good in zip(items, finite.tolist()) if good]
        if kept:
            self.journal.append(kept, rows[finite].numpy(), self.embedder.checkpoint_of(modality).name)


class Late:
    """The end of a batch, done when the next one is with the device, which computes meanwhile.

    Used as a context manager: what was put is done, however the block ends.
    """

    def __init__(self) -> None:
        self._put: Callable[[], None] | None = None

    def __enter__(self) -> Late:
        return self

    def __exit__(self, *error: object) -> None:
        self.do()

    def put(self, end: Callable[[], None]) -> None:
        """Takes this one's, and does the one before."""
        before, self._put = self._put, end
        if before is not None:
            before()

    def do(self) -> None:
        """What was put, now."""
        end, self._put = self._put, None
        if end is not None:
            end()
