"""The processes that decode: started one by one, ended in the middle of a file if need be, none of them forgotten."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from lbfast.data import tether
from lbfast.data.shared import Desk, Hand

_DECODERS = "lbfast.data.decode"  # what workers need: the process that they are forked from imports it once
_STARTS = 2  # how often a worker may fail to start before the run stops


class Work(Protocol):
    """What a worker does: `decode` turns a task into its result, and whatever goes wrong into an `Undecodable`.

    A result that is an iterator is sent one by one, and then `DONE`.
    """

    def decode(self, task: Any, /) -> Any: ...


WITHOUT = "; workers=0 decodes without worker processes"

DONE = "done"
"""What ends the results of a task that has several."""


def _work(connection: Connection, work: Work) -> None:
    """A worker process: says that it is ready, then answers tasks until its parent hangs up or is gone."""
    tether.ignore_signals()
    tether.die_with_parent()
    torch.set_num_threads(1)
    desk = Desk(connection)
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)
        while True:
            result = work.decode(desk.task())
            if isinstance(result, Iterator):
                for each in result:
                    desk.answer(each)
                result = DONE
            desk.answer(result)


class Worker:
    """A process of a crew, as the thread that hands it tasks has it."""

    def __init__(self, crew: Crew, process: multiprocessing.process.BaseProcess, connection: Connection):
        self._crew, self._process = crew, process
        self.hand = Hand(connection, process.pid or 0)

    def ended(self) -> str:
        """Lets go of it, and says how it ended."""
        self.hand.connection.close()  # the worker reads the end of its input, and ends
        return self._crew.ended(self._process)

    def kill(self) -> None:
        """Ends it, in the middle of a file if need be."""
        self._process.kill()
        self.ended()


class Crew:
    """Starts workers, each with a copy of `work` (it is pickled), and ends them all when it is closed.

    Args:
        how: of `context`; None: the caller's.
        advice: what to add where none can be started.
    """

    def __init__(self, work: Work, how: Any = None, advice: str = ""):
        self._work, self._context, self._advice = work, context() if how is None else how, advice
        self.running: set[multiprocessing.process.BaseProcess] = set()
        self.closing = False
        self._threads: list[threading.Thread] = []

    def serve(self, workers: int, hand_out: Callable[[], None]) -> None:
        """A thread for each worker that is wanted: `hand_out` starts one and hands it tasks, until `closing`."""
        for _ in range(workers):
            self._threads.append(threading.Thread(target=hand_out, name=tether.WORKER, daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Kills what runs; the threads that wait for it hear of that."""
        self.closing = True
        for process in tuple(self.running):
            process.kill()

    def join(self) -> None:
        """Waits for the threads of a crew that is closed."""
        for thread in self._threads:
            thread.join()

    def start(self) -> Worker:
        """A worker that has said it is ready. RuntimeError: none can be had."""
        how = ""
        for _ in range(_STARTS):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, self._work), name=tether.WORKER, daemon=True)
            process.start()
            self.running.add(process)
            theirs.close()
            try:
                ours.recv()
                return Worker(self, process, ours)
            except (EOFError, OSError):
                how = self.ended(process)
                ours.close()
                if self.closing:
                    break
        raise RuntimeError(f"decoding: {how} before it was ready{self._advice}")

    def ended(self, process: multiprocessing.process.BaseProcess) -> str:
        """How a process ended, or is now ended."""
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        self.running.discard(process)
        code = process.exitcode
        if code is not None and code < 0:
            return f"the worker process was ended by {signal.Signals(-code).name}"
        return f"the worker process ended with status {code}"


def context() -> Any:
    """Workers are forked from a fresh process that has imported this module, never from one with threads or a GPU.

    That process is started by the thread that calls this. Linux knows a parent as a thread: where it is the main one,
    which lives as long as the process, the other end of its life is seen by the kernel.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([tether.TETHERED, _DECODERS])
    main = threading.current_thread() is threading.main_thread()
    with tether.named() if main else contextlib.nullcontext(), tether.deaf():
        forkserver.ensure_running()
    return context
