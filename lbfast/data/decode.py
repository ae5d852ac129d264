"""Decodes files ahead of the model: in worker processes, results in order, memory bounded, dead workers replaced."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from lbfast.data import tether
from lbfast.data.shared import Desk, Hand, Lease, Pool, as_array
from lbfast.processing.media import Reading, named
from lbfast.processing.processor import Processor, transform_dict
from lbfast.processing.threads import one_thread

_MOST = 64  # workers, where nobody says how many
_STARTS = 2  # how often a worker may fail to start before the run stops


def default_workers(files: int, device: torch.device) -> int:
    """How many processes to decode with, where nobody says. One file is decoded in this one, which starts sooner.

    Each computes with one thread. Beside a GPU all cores but one decode; a CPU's cores also run the model, which takes
    longer over a file than its decoder: half of them decode.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    some = cores - 1 if device.type == "cuda" else cores // 2
    return min(max(some, 1), _MOST, files) if files > 1 else 0


@dataclass(frozen=True)
class Task:
    """A file to decode as a modality.

    Attributes:
        path: its name; of data in memory what messages call it, "" for what a reader calls it.
        data: what is in memory instead, as a processor takes an item.
        start_sec, end_sec: the part that is wanted; None: from its beginning, to its end.
    """

    modality: str
    path: str
    data: Any = None
    start_sec: float | None = None
    end_sec: float | None = None


@dataclass(frozen=True)
class Undecodable:
    """What came of a file that could not be decoded. `lasting`: nor can others be, for their store has failed."""

    reason: str
    lasting: bool = False


Decoded = np.ndarray | Undecodable


def plain_fields(vision_config: Any) -> dict[str, Any]:
    """The fields of a vision config that processors read, without its class: workers need not import transformers."""
    plain = (bool, int, float, str, list, tuple, type(None))
    return {name: value for name, value in vars(vision_config).items() if isinstance(value, plain)}


class Work(Protocol):
    """What a worker does: `decode` turns a task into its result, and whatever goes wrong into `Undecodable`."""

    def decode(self, task: Any, /) -> Any: ...


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

    def decode(self, task: Task) -> Decoded:
        """Pixel values of a file. Whatever goes wrong in reading it is its reason: the run goes on."""
        try:
            if task.modality not in self._made:
                config = SimpleNamespace(vision_config=SimpleNamespace(**self._vision[task.modality]))
                self._made[task.modality] = transform_dict[task.modality](config, reading=self._reading)
            part: dict[str, Any] = {"clip_start_sec": task.start_sec, "clip_end_sec": task.end_sec}
            with named(task.path) if task.data is not None and task.path else contextlib.nullcontext():
                item = task.path if task.data is None else task.data
                values = self._made[task.modality]([item], **part)["pixel_values"]
            return as_array(values[0].to(self._dtype))
        except (ValueError, OSError) as error:
            return Undecodable(str(error))
        except Exception as error:  # a codec's own, out of memory, or a fault of ours
            where = f"{task.path}: " if task.path else ""
            return Undecodable(f"{where}{type(error).__name__}: {error}")


def _work(connection: Connection, work: Work) -> None:
    """A worker process: says that it is ready, then answers tasks until its parent hangs up or is gone."""
    tether.ignore_signals()
    tether.die_with_parent()
    torch.set_num_threads(1)
    desk = Desk(connection)
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)
        while True:
            desk.answer(work.decode(desk.task()))


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
        self._closing = False
        self._context: Any = None
        self._running: set[multiprocessing.process.BaseProcess] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Decoder:
        self._context = _context() if self._workers else None
        for _ in range(self._workers):
            thread = threading.Thread(target=self._serve, name=tether.WORKER, daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the workers, in the middle of a file if need be."""
        self._closing = True
        for process in tuple(self._running):
            process.kill()
        for _ in self._threads:
            self._room.release()
        for thread in self._threads:
            thread.join()
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
        hand: Hand | None = None
        process: multiprocessing.process.BaseProcess | None = None
        try:
            while True:
                self._room.acquire()
                number = next(self._numbers)
                if self._closing or number >= len(self._tasks):
                    return
                task = self._tasks[number]
                kind = getattr(task, "modality", None)
                lease, row = self._place(number, kind)
                for _ in range(2):  # a dead worker may not be the file's fault; two are
                    if hand is None or process is None:
                        process, connection = self._start()
                        hand = Hand(connection, process.pid or 0)
                    try:
                        hand.give(task, lease, row, self._pool.alive)
                        result, size = hand.take(lease, row)
                        if size:
                            self._sizes.setdefault(kind, size)
                        break
                    except (EOFError, OSError):
                        if self._closing:
                            return
                        result = Undecodable(f"{task.path}: {self._ended(process)} while decoding it")
                        hand.connection.close()
                        process = hand = None
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
            if hand is not None:
                hand.connection.close()  # the worker reads the end of its input, and ends
            if process is not None:
                self._ended(process)

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

    def _start(self) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        """A worker that has said it is ready."""
        how = ""
        for _ in range(_STARTS):
            process, ours = _begun(self._context, self._work)
            self._running.add(process)
            try:
                ours.recv()
                return process, ours
            except (EOFError, OSError):
                how = self._ended(process)
                ours.close()
                if self._closing:
                    break
        raise RuntimeError(f"decoding: {how} before it was ready; workers=0 decodes without worker processes")

    def _ended(self, process: multiprocessing.process.BaseProcess) -> str:
        how = _ended(process)
        self._running.discard(process)
        return how


class Helper:
    """A worker process for tasks that come one by one, each with a time it may take. For one thread at a time.

    The process is started at the first task, and again where it has died or been ended.

    Args:
        work: what decodes them, a copy of it there (it is pickled).
        context: of `helpers_context`.
    """

    def __init__(self, work: Work, context: Any):
        self._work, self._context = work, context
        self._process: multiprocessing.process.BaseProcess | None = None
        self._hand: Hand | None = None

    def decode(self, task: Any, seconds: float) -> Any:
        """The result of a task; `Undecodable` too where it took longer, or its process died. RuntimeError: no process
        can be started."""
        try:
            hand = self._ready()
            hand.give(task, None, 0, set())
            if not hand.connection.poll(seconds):
                self.close()
                return Undecodable(f"{task.path or task.modality}: decoding it took more than {seconds:g} s")
            return hand.take(None, 0)[0]
        except (EOFError, OSError):
            how = "" if self._process is None else _ended(self._process)
            self.close()
            return Undecodable(f"{task.path or task.modality}: {how} while decoding it")

    def _ready(self) -> Hand:
        how = ""
        for _ in range(_STARTS):
            if self._hand is not None:
                return self._hand
            self._process, connection = _begun(self._context, self._work)
            try:
                connection.recv()
                self._hand = Hand(connection, self._process.pid or 0)
            except (EOFError, OSError):
                how = _ended(self._process)
                connection.close()
        if self._hand is None:
            raise RuntimeError(f"decoding: {how} before it was ready")
        return self._hand

    def close(self) -> None:
        """Ends the process, in the middle of a file if need be."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._hand is not None:
            self._hand.connection.close()
        self._process = self._hand = None


def helpers_context() -> Any:
    """How `Helper` starts processes; to be called by the main thread."""
    return _context()


def _begun(context: Any, work: Work) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """A worker process, and the connection to it, by which it will say that it is ready."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, work), name=tether.WORKER, daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _ended(process: multiprocessing.process.BaseProcess) -> str:
    """Waits for the end of a process, not for long, and says how it came."""
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    code = process.exitcode
    if code is not None and code < 0:
        return f"the worker process was ended by {signal.Signals(-code).name}"
    return f"the worker process ended with status {code}"


def _context() -> Any:
    """Workers are forked from a fresh process that has imported this module, never from one with threads or a GPU.

    That process is started by the thread that calls this. Linux knows a parent as a thread: where it is the main one,
    which lives as long as the process, the other end of its life is seen by the kernel.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([tether.TETHERED, __name__])
    main = threading.current_thread() is threading.main_thread()
    with tether.named() if main else contextlib.nullcontext(), tether.deaf():
        forkserver.ensure_running()
    return context
