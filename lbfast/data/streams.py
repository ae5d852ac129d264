"""Recordings in parts: several files at a time, each in one worker from its first part to its last, memory bounded."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lbfast.data.crew import DONE, WITHOUT, Crew, Work, Worker
from lbfast.data.decode import Part, Task, Undecodable
from lbfast.processing.threads import one_thread

_AHEAD = 2  # batches that are ready before they are asked for
_WAKE_SECONDS = 0.2  # how often a thread that cannot go on looks whether it is to end


@dataclass(frozen=True)
class Batch:
    """Parts of one file that follow each other: those whose numbers, divided by the size of a batch, are equal."""

    file: int
    parts: list[Part]


@dataclass(frozen=True)
class End:
    """What comes after the last batch of a file: why there are no more, or None where it has no more."""

    file: int
    why: Undecodable | None


class Streams:
    """Iterates over the parts of files, in batches: those of a file in order, files as they are ready.

    Use as a context manager. Up to `workers` + 2 batches are in memory at a time.

    Args:
        work: what decodes, in workers a copy of it (it is pickled): `decode(task)` iterates over `Part`s, and perhaps
            one `Undecodable` at the end.
        tasks: the files, with `cuts`; taken when their turn comes. `Batch.file` counts them.
        workers: processes; 0 decodes in this one, when asked for the next.
        batch: parts.

    Raises, while iterating:
        RuntimeError: workers cannot start.
    """

    def __init__(self, work: Work, tasks: Iterable[Task], workers: int, batch: int):
        self._work, self._tasks, self._workers, self._batch = work, enumerate(tasks), workers, batch
        self._ready: queue.Queue[Batch | End | Exception | None] = queue.Queue(_AHEAD)
        self._lock = threading.Lock()
        self._crew: Crew | None = None

    def __enter__(self) -> Streams:
        if self._workers:
            crew = self._crew = Crew(self._work, advice=WITHOUT)
            crew.serve(self._workers, lambda: self._serve(crew))
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the workers, in the middle of a file if need be."""
        if self._crew is not None:
            self._crew.close()
            self._crew.join()

    def __iter__(self) -> Iterator[Batch | End]:
        if not self._workers:
            for file, task in self._tasks:
                yield from self._batches(file, _alone(self._work.decode(task)))
            return
        left = self._workers
        while left:
            ready = self._ready.get()
            if isinstance(ready, Exception):
                raise RuntimeError(str(ready) or type(ready).__name__) from ready
            if ready is None:
                left -= 1
            else:
                yield ready

    def _batches(self, file: int, parts: Iterator[Part | Undecodable]) -> Iterator[Batch | End]:
        held: list[Part] = []
        why: Undecodable | None = None
        for part in parts:
            if isinstance(part, Undecodable):
                why = part
                continue
            held.append(part)
            if (part.number + 1) % self._batch == 0:
                yield Batch(file, held)
                held = []
        if held:
            yield Batch(file, held)
        yield End(file, why)

    def _serve(self, crew: Crew) -> None:
        """A thread for each worker: takes one file after the other."""
        worker: list[Worker] = []  # one, or none
        try:
            while not crew.closing:
                with self._lock:
                    file, task = next(self._tasks, (0, None))
                if task is None:
                    break
                for each in self._batches(file, self._parts(crew, worker, task)):
                    self._put(crew, each)
            self._put(crew, None)
        except Exception as error:  # whoever waits for a batch must hear of it
            self._put(crew, error)
        finally:
            for idle in worker:
                idle.ended()

    def _put(self, crew: Crew, what: Batch | End | Exception | None) -> None:
        while not crew.closing:
            try:
                self._ready.put(what, timeout=_WAKE_SECONDS)
                return
            except queue.Full:
                continue

    def _parts(self, crew: Crew, worker: list[Worker], task: Task) -> Iterator[Part | Undecodable]:
        """What a worker sends. One that dies may not be the file's fault; two that die at the same part are."""
        assert task.cuts is not None
        begun, first, died = task.cuts.first, task.cuts.first, False
        while True:
            if not worker:
                worker.append(crew.start())
            try:
                worker[0].hand.give(replace(task, cuts=replace(task.cuts, first=first)), None, 0, set())
                for _ in itertools.count():
                    each = worker[0].hand.take(None, 0)[0]
                    if each == DONE:
                        return
                    yield each
                    first = each.number + 1 if isinstance(each, Part) else first
            except (EOFError, OSError):
                if crew.closing:
                    return
                how = worker.pop().ended()
                if died and first == begun:
                    yield Undecodable(f"{task.path}: {how} while decoding it")
                    return
                died, begun = True, first


def _alone(parts: Iterator[Part | Undecodable]) -> Iterator[Part | Undecodable]:
    """The same in this process, with one thread while the next is decoded."""
    while True:
        with one_thread():
            part = next(parts, None)
        if part is None:
            return
        yield part
