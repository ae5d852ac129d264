"""Decodes files ahead of the model: in worker processes, results in order, memory bounded, dead workers replaced."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from lbfast.data.crew import WITHOUT, Crew, Work, Worker, context
from lbfast.data.shared import Lease, Pool, as_array
from lbfast.data.store import StoreError
from lbfast.processing.media import Reading, named
from lbfast.processing.processor import Processor, transform_dict
from lbfast.processing.segments import Cuts
from lbfast.processing.threads import one_thread

_MOST = 64  # workers, where nobody says how many


def default_workers(files: int, device: torch.device) -> int:
    """How many processes to decode with, where nobody says. One file is decoded in this one, which starts sooner.

    Each computes with one thread. Beside a GPU all cores but one decode; a CPU's cores also run the model, which takes
    longer over a file than its decoder: half of them decode.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    some = cores - 1 if device.type == "cuda" else cores // 2
    return min(max(some, 1), _MOST, files) if files > 1 else 0


@runtime_checkable
class Lazy(Protocol):
    """A place that an encoded file is in, a tar or a table."""

    def opened(self) -> contextlib.AbstractContextManager[Any]:
        """The file, as a processor takes it. MediaError, OSError: it is not there."""
        ...


@dataclass(frozen=True)
class Task:
    """A file to decode as a modality.

    Attributes:
        path: its name; of data in memory what messages call it, "" for what a reader calls it.
        data: what is in memory instead, as a processor takes an item; or `Lazy`, which is opened where it is decoded.
        start_sec, end_sec: the part that is wanted; None: from its beginning, to its end.
        cuts: which parts of it are wanted, each by itself; None: the whole.
    """

    modality: str
    path: str
    data: Any = None
    start_sec: float | None = None
    end_sec: float | None = None
    cuts: Cuts | None = None


@dataclass(frozen=True)
class Undecodable:
    """What came of a file that could not be decoded. `lasting`: nor can others be, for their store has failed."""

    reason: str
    lasting: bool = False


@dataclass(frozen=True)
class Part:
    """A part of a recording; see `lbfast.processing.segments.Segment`.

    Attributes:
        expected: how many parts its file has, as far as that is known.
        last: whether it is the last.
    """

    number: int
    start: float
    end: float
    expected: int
    last: bool
    pixels: np.ndarray


Decoded = np.ndarray | Undecodable


def plain_fields(vision_config: Any) -> dict[str, Any]:
    """The fields of a vision config that processors read, without its class: workers need not import transformers."""
    plain = (bool, int, float, str, list, tuple, type(None))
    return {name: value for name, value in vars(vision_config).items() if isinstance(value, plain)}


class Processors:
    """Processors by modality, made at first use from the fields of their vision configs; `reading` is theirs.

    `dtype` is of what they give, as `stacked` takes it: the model's, so that nothing is converted where it runs.
    """

    def __init__(
        self,
        vision: Mapping[str, Mapping[str, Any]],
        reading: Reading | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self._vision, self._reading, self._dtype = vision, reading, dtype
        self._made: dict[str, Processor] = {}

    def decode(self, task: Task) -> Any:
        """`Decoded` pixel values of a file; with `cuts` its `Part`s one by one, and `Undecodable` where it breaks off.

        Whatever goes wrong in reading it is its reason: the run goes on.
        """
        if task.cuts is not None:
            return self._parts(task, task.cuts)
        try:
            part: dict[str, Any] = {"clip_start_sec": task.start_sec, "clip_end_sec": task.end_sec}
            with _opened(task) as item:
                return as_array(self._processor(task).pixel_values([item], **part)[0].to(self._dtype))
        except Exception as error:
            return _why(task, error)

    def _parts(self, task: Task, cuts: Cuts) -> Iterator[Part | Undecodable]:
        """The parts of a recording; after those before a broken place, why there are no more."""
        held: Part | None = None  # until it is known whether it is the last
        try:
            with _opened(task) as item:
                for each in self._processor(task).segments(item, cuts):
                    if held is not None:
                        yield held
                    pixels = as_array(each.pixels.to(self._dtype))
                    held = Part(each.number, each.start, each.end, each.expected, False, pixels)
            if held is not None:
                yield replace(held, last=True)
        except Exception as error:
            if held is not None:
                yield held
            yield _why(task, error)

    def _processor(self, task: Task) -> Processor:
        if task.modality not in self._made:
            config = SimpleNamespace(vision_config=SimpleNamespace(**self._vision[task.modality]))
            self._made[task.modality] = transform_dict[task.modality](config, reading=self._reading)
        return self._made[task.modality]


@contextlib.contextmanager
def _opened(task: Task) -> Iterator[Any]:
    """What the processor takes; errors in the block name the task's path where that is not what was opened."""
    if task.data is None:
        yield task.path
        return
    lazily = task.data.opened() if isinstance(task.data, Lazy) else contextlib.nullcontext(task.data)
    with lazily as item, named(task.path) if task.path else contextlib.nullcontext():
        yield item


def _why(task: Task, error: Exception) -> Undecodable:
    if isinstance(error, ValueError | OSError):
        return Undecodable(str(error), lasting=isinstance(error, StoreError))
    where = f"{task.path}: " if task.path else ""
    return Undecodable(f"{where}{type(error).__name__}: {error}")  # a codec's own, no memory, a fault of ours


class Decoder:
    """Iterates over the decoded tasks, in order. Use as a context manager.

    Args:
        work: what decodes them, in workers a copy of it (it is pickled).
        tasks: what to decode, each with a `path` to name it by; taken when its turn comes.
        workers: processes; 0 decodes in this one, when asked for the next.
        ahead: how many files may be decoded, or being decoded, before they are asked for.
        batches: how many results are wanted together, one batch after the other: the arrays of one follow each other in
            memory that the workers wrote to (see `shared`), but for the first few of a kind. None: one at a time.
        device: where they go: for a GPU that memory is pinned.

    Raises, while iterating:
        RuntimeError: workers cannot start.
    """

    def __init__(
        self,
        work: Work,
        tasks: Sequence[Any],
        workers: int,
        ahead: int,
        batches: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ):
        self._work, self._tasks = work, tasks
        self._ends = list(itertools.accumulate([1] * len(tasks) if batches is None else batches))
        assert (self._ends or [0])[-1] == len(tasks)
        self._pool = Pool(torch.device(device))
        self._leases: dict[int, Lease | None] = {}  # of the batches that are being decoded
        self._sizes: dict[Any, int] = {}  # bytes of a result's array, by kind of task
        self._workers = min(workers, len(tasks))
        self._room = threading.Semaphore(max(ahead, self._workers))
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._results: dict[int, Any] = {}
        self._fault: str | None = None
        self._crew: Crew | None = None

    def __enter__(self) -> Decoder:
        if self._workers:
            self._crew = Crew(self._work, advice=WITHOUT)
            self._crew.serve(self._workers, self._serve)
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the workers, in the middle of a file if need be."""
        if self._crew is not None:
            self._crew.close()
            self._room.release(self._workers)
            self._crew.join()
        self._leases.clear()
        self._pool.close()

    def __iter__(self) -> Iterator[Any]:
        if not self._workers:
            for task in self._tasks:
                with one_thread():
                    result = self._work.decode(task)
                yield result
            return
        ends = {end: batch for batch, end in enumerate(self._ends)}
        for number in range(len(self._tasks)):
            with self._changed:
                self._changed.wait_for(lambda n=number: n in self._results or self._fault)  # type: ignore[misc]
                if number not in self._results:
                    raise RuntimeError(self._fault)
                result = self._results.pop(number)
                if number + 1 in ends:  # the batch is decoded; who sees a row of its buffer keeps it
                    self._leases.pop(ends[number + 1], None)
            self._room.release()
            yield result

    def _serve(self) -> None:
        """A thread for each worker: hands it one task at a time and takes the result, or starts another worker."""
        crew = self._crew
        worker: Worker | None = None
        assert crew is not None
        try:
            while True:
                self._room.acquire()
                number = next(self._numbers)
                if crew.closing or number >= len(self._tasks):
                    return
                task = self._tasks[number]
                kind = getattr(task, "modality", None)
                lease, row = self._place(number, kind)
                for _ in range(2):  # a dead worker may not be the file's fault; two are
                    worker = worker or crew.start()
                    try:
                        worker.hand.give(task, lease, row, self._pool.alive)
                        result, size = worker.hand.take(lease, row)
                        if size:
                            self._sizes.setdefault(kind, size)
                        break
                    except (EOFError, OSError):
                        if crew.closing:
                            return
                        result = Undecodable(f"{task.path}: {worker.ended()} while decoding it")
                        worker = None
                lease = None  # while this thread waits, it keeps no buffer
                with self._changed:
                    self._results[number] = result
                    self._changed.notify_all()
                del result
        except Exception as error:  # whoever waits for a result must hear of it
            with self._changed:
                self._fault = str(error) or type(error).__name__
                self._changed.notify_all()
        finally:
            if worker is not None:
                worker.ended()

    def _place(self, number: int, kind: Any) -> tuple[Lease | None, int]:
        """The memory of a task's batch, and the row there; None where it is not known how long a row is."""
        size = self._sizes.get(kind)
        if size is None:
            return None, 0
        batch = bisect.bisect_right(self._ends, number)
        begin = self._ends[batch - 1] if batch else 0
        with self._changed:
            if batch not in self._leases:
                self._leases[batch] = self._pool.lease(self._ends[batch] - begin, size)
            return self._leases[batch], number - begin


class Helper:
    """A worker process for tasks that come one by one, each with a time it may take. For one thread at a time.

    The process is started at the first task, and again where it has died or been ended.

    Args:
        work: what decodes them, a copy of it there (it is pickled).
        context: of `helpers_context`.
    """

    def __init__(self, work: Work, context: Any):
        self._crew = Crew(work, context)
        self._worker: Worker | None = None

    def decode(self, task: Any, seconds: float) -> Any:
        """The result of a task; `Undecodable` too where it took longer, or its process died. RuntimeError: no process
        can be started."""
        self._worker = self._worker or self._crew.start()
        hand = self._worker.hand
        try:
            hand.give(task, None, 0, set())
            if not hand.connection.poll(seconds):
                self.close()
                return Undecodable(f"{task.path or task.modality}: decoding it took more than {seconds:g} s")
            return hand.take(None, 0)[0]
        except (EOFError, OSError):
            how, self._worker = self._worker.ended(), None
            return Undecodable(f"{task.path or task.modality}: {how} while decoding it")

    def close(self) -> None:
        """Ends the process, in the middle of a file if need be."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def helpers_context() -> Any:
    """How `Helper` starts processes; to be called by the main thread."""
    return context()
