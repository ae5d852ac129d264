"""Several devices, a process each: batches go to whichever is free, and come back as rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lbfast.data import tether
from lbfast.data.crew import context
from lbfast.embedding.embedder import Embedder

Then = Callable[[torch.Tensor], None]


class Devices:
    """Embeds batches on several devices. Use as a context manager, which ends the processes.

    Args:
        embedder: copied to each process with a device of its own; opened there at the first batch.
        names: of the devices; one may be named more than once.
    """

    def __init__(self, embedder: Embedder, names: Sequence[str]):
        self._names: dict[Connection, str] = {}
        self._idle: list[Connection] = []
        self._busy: dict[Connection, Then] = {}
        self._processes: dict[Connection, Any] = {}
        threads = max(1, torch.get_num_threads() // len(names))
        made = context()
        for name in names:
            ours, theirs = made.Pipe()
            arguments = (theirs, embedder.on(name), threads)
            process = made.Process(target=_serve, args=arguments, name=tether.WORKER, daemon=True)
            process.start()
            theirs.close()
            self._names[ours], self._processes[ours] = name, process
            self._idle.append(ours)

    def __enter__(self) -> Devices:
        return self

    def __exit__(self, *error: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
            process.join()

    def submit(self, modality: str, values: list[Any], then: Then) -> None:
        """Hands a batch to a free device, waiting for one; `then` is called in a later call here, with its rows.

        Raises RuntimeError where a device has failed.
        """
        while not self._idle:
            self._collect()
        connection = self._idle.pop(0)
        self._busy[connection] = then
        try:
            connection.send((modality, values))
        except OSError:
            raise self._gone(connection) from None

    def drain(self) -> None:
        """Waits for all that was submitted."""
        while self._busy:
            self._collect()

    def _collect(self) -> None:
        for ready in wait(list(self._busy)):
            connection: Any = ready
            try:
                rows = connection.recv()
            except (EOFError, OSError):
                raise self._gone(connection) from None
            if isinstance(rows, Exception):
                raise rows
            then = self._busy.pop(connection)
            self._idle.append(connection)
            then(torch.from_numpy(rows))

    def _gone(self, connection: Connection) -> RuntimeError:
        process = self._processes[connection]
        process.join(5)
        how = f"its process ended with status {process.exitcode}"
        return RuntimeError(f"device: {self._names[connection]}: {how}; what is finished is kept")


def _serve(connection: Connection, embedder: Embedder, threads: int) -> None:
    """The process of a device: answers batches until its parent hangs up or is gone."""
    tether.ignore_signals()
    tether.die_with_parent()
    torch.set_num_threads(threads)
    opened = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            modality, values = connection.recv()
            answer: Any
            try:
                if modality != opened:
                    embedder.open(modality, alone=True)
                    opened = modality
                answer = embedder.embed_values(modality, values).cpu().numpy()
            except Exception as error:
                kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
                answer = RuntimeError(f"{kind}{error}")
            connection.send(answer)
