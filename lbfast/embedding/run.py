"""The part of a run that needs the models: batches of what is not finished, decoded ahead, kept as they are done."""

from __future__ import annotations

import array
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lbfast.data.decode import Decoder, Processors, Task, Undecodable
from lbfast.data.store import StoreError
from lbfast.data.streams import Batch, Streams
from lbfast.data.suffixes import LANGUAGE
from lbfast.embedding.devices import Devices
from lbfast.embedding.embedder import Embedder
from lbfast.embedding.fused import Group, fused_rows
from lbfast.embedding.items import Failure, Item, mean_of, piece_of
from lbfast.embedding.journal import Journal
from lbfast.embedding.spool import Spool
from lbfast.embeds import usable
from lbfast.processing.segments import CUT, Cuts

Progress = Callable[[str, int, int], None]
"""progress(modality, done, total) after each batch; rows done in an earlier run count as done.

Of recordings in parts the total is reckoned from the lengths of those met so far.
"""

_FUSED_AT_ONCE = 4096


@dataclass
class _Reckoning:
    """How many rows there will be of `files` recordings; `rows` of `ends` that are finished, `done` of all."""

    files: int
    rows: int = 0
    ends: int = 0
    done: int = 0
    _open: dict[int, tuple[int, int]] = field(default_factory=dict)  # rows so far, and how many are expected

    def found(self, rows: int, whole: bool) -> None:
        """Of a file, in the journal."""
        self.done += rows
        if whole:
            self.rows, self.ends = self.rows + rows, self.ends + 1

    def met(self, file: int, rows: int, expected: int) -> None:
        so_far = self._open.get(file, (0, 0))[0] + rows
        self._open[file], self.done = (so_far, max(so_far, expected)), self.done + rows

    def ended(self, file: int) -> None:
        self.rows, self.ends = self.rows + self._open.pop(file, (0, 0))[0], self.ends + 1

    def now(self) -> tuple[int, int]:
        """Rows that are done, and all."""
        met = self.ends + len(self._open)
        rows = self.rows + sum(expected for _, expected in self._open.values())
        return self.done, max(self.done, rows * self.files // met if met else 0)


class _Joined(Sequence[Task]):
    """Tasks of several lists, one after the other."""

    def __init__(self, lists: Sequence[Sequence[Task]]):
        self._lists = lists

    def __len__(self) -> int:
        return sum(map(len, self._lists))

    def __getitem__(self, number: Any) -> Any:
        for each in self._lists:
            if number < len(each):
                return each[number]
            number -= len(each)
        raise IndexError(number)


@dataclass
class Run:
    """The part of a run that needs the models.

    Attributes:
        cuts: of the items that are cut.
        failed: called with what cannot be embedded.
        devices: what embeds in the place of `embedder`, which then is not opened.
    """

    embedder: Embedder
    journal: Journal
    workers: int
    failed: Callable[[Failure], None]
    progress: Progress
    cuts: Cuts | None = None
    devices: Devices | None = None

    def embed(self, items: Spool) -> None:
        """Embeds what the journal does not have yet. One model is loaded at a time, and only if it has work."""
        names = [name for name in items.names() if not self._cuts(name)]
        sizes = {name: array.array("I") for name in names}
        left = {name: items.todo(self._left(items.of(name), sizes[name])) for name in names}
        tasks = _Joined([left[name] for name in names if name != LANGUAGE])
        wanted = [size for name in names if name != LANGUAGE for size in sizes[name]]
        work, ahead = self.embedder.processors(), 2 * self.embedder.batch_size + self.workers
        where = self.embedder.device if self.devices is None else "cpu"
        with Decoder(work, tasks, self.workers, ahead, wanted, where) as decoder, Late() as late:
            decoded = iter(decoder)
            for name in items.names():
                if self._cuts(name):
                    self._embed_parts(name, items, work, late)
                    continue
                total = items.counts[name]
                done, first = total - len(left[name]), 0
                self.progress(name, done, total)
                if not sizes[name]:
                    continue
                self._open(name, late)
                for size in sizes[name]:
                    good, values = self._values(name, left[name].items(first, size), decoded)
                    first, done = first + size, done + size
                    self._embed_batch(name, good, values, (done, total), late)
                self._end(name, (done, total), late)
        self.embedder.close()

    def _cuts(self, name: str) -> bool:
        return self.cuts is not None and name in CUT

    def _left(self, items: Iterator[Item], sizes: array.array[int]) -> Iterator[Item]:
        """Items of one modality without what is finished; the sizes of their batches, the same whatever that is.

        What a row is to the last bit depends on what is embedded with it.
        """
        while batch := list(itertools.islice(items, self.embedder.batch_size)):
            if left := [item for item in batch if item not in self.journal]:
                sizes.append(len(left))
                yield from left

    def _embed_parts(self, name: str, items: Spool, work: Processors, late: Late) -> None:
        """Embeds the parts of recordings of one modality: in batches of a file's own, whichever file is ready."""
        assert self.cuts is not None
        cuts, reckoning = self.cuts, _Reckoning(items.counts[name])
        for item in items.of(name):
            done = self.journal.numbers(item)
            for number in sorted(set(range(max(done, default=0))).difference(done)):
                begin = float(cuts.span(number)[0])
                self.failed(Failure(item.path, f"{begin:g} s: {self.embedder.not_finite()}, in an earlier run"))
            reckoning.found(len(done), item in self.journal)
        left = items.todo(item for item in items.of(name) if item not in self.journal)
        self.progress(name, *reckoning.now())
        if not len(left):
            return
        self._open(name, late)
        tasks = (self._from(left.item(number), cuts) for number in range(len(left)))
        with Streams(work, tasks, min(self.workers, len(left)), self.embedder.batch_size) as streams:
            for ready in streams:
                item = left.item(ready.file)
                if isinstance(ready, Batch):
                    parts = ready.parts
                    pieces = [piece_of(item, part.number, part.start, part.end, part.last) for part in parts]
                    reckoning.met(ready.file, len(parts), parts[-1].expected)
                    self._embed_batch(name, pieces, [part.pixels for part in parts], reckoning.now(), late)
                else:
                    reckoning.ended(ready.file)
                    if ready.why is not None:
                        _check_store(ready.why)
                        self.failed(Failure(item.path, ready.why.reason))
        self._end(name, reckoning.now(), late)

    def _from(self, item: Item, cuts: Cuts) -> Task:
        """What is left of a recording."""
        first = max(self.journal.numbers(item), default=-1) + 1
        return Task(item.modality, item.path, item.data, cuts=replace(cuts, first=first))

    def _open(self, name: str, late: Late) -> None:
        late.do()  # before the next model is loaded
        if self.devices is None:
            self.embedder.open(name, alone=True)

    def _end(self, name: str, so_far: tuple[int, int], late: Late) -> None:
        """After the last batch of a modality."""
        late.do()
        if self.devices is not None:
            self.devices.drain()
        self.progress(name, *so_far)

    def _embed_batch(
        self, name: str, items: Sequence[Item], values: list[Any], so_far: tuple[int, int], late: Late
    ) -> None:
        if self.devices is not None:

            def keep(rows: torch.Tensor) -> None:
                self._keep(items, rows, name)
                self.progress(name, *so_far)

            if items:
                self.devices.submit(name, values, keep)
            return
        embeds = self.embedder.embed_values(name, values) if items else torch.empty(0, self.embedder.size)
        late.put(self._keeping(items, embeds, values, (name, *so_far)))
        if not embeds.is_cuda:  # then it is computed
            late.do()

    def means(self, items: Spool) -> None:
        """Makes a row of each file of which all parts are finished: their mean, of unit length."""
        for name in filter(self._cuts, items.names()):
            todo = (item for item in items.of(name) if item in self.journal and mean_of(item) not in self.journal)
            while some := list(itertools.islice(todo, _FUSED_AT_ONCE)):
                self._keep_made(some, name)

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
                _check_store(result)
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


def _check_store(result: Undecodable) -> None:
    """Raises StoreError where others would fail as this one: what is finished is kept, and the run can go on later."""
    if result.lasting:
        raise StoreError(result.reason)


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
