"""Items of many requests, embedded together: batches of one kind, in the order in which they came."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

Run = Callable[[str, Sequence[Any]], Sequence["np.ndarray | str"]]
"""(kind, values) -> for each its embedding, or why there is none. It blocks."""


class Full(Exception):
    """There is no room for more."""


class Unusable(ValueError):
    """What was asked for cannot be embedded: the fault of who asked."""


@dataclass
class _Waiting:
    value: Any
    answer: asyncio.Future[np.ndarray]
    since: float


class Batcher:
    """Runs a model on what comes, up to `size` items of one kind at a time. For one event loop.

    An item waits at most `wait` seconds for others to join it, from when it came; meanwhile the model may be busy with
    those before it. The oldest goes first, and takes along what there is of its kind.

    Args:
        run: computes a batch; called by a thread of its own, one batch at a time. What it raises is tried again item by
            item, so that one hurts no other.
        size, wait: see above.
        room: items that may be taken and not yet answered.
        on_batch: (kind, items, seconds) after each.
    """

    def __init__(
        self,
        run: Run,
        *,
        size: int,
        wait: float,
        room: int,
        on_batch: Callable[[str, int, float], None] = lambda *_: None,
    ):
        self._run, self.size, self.wait, self.room, self._on_batch = run, size, wait, room, on_batch
        self.taken = 0
        self._seconds = 0.01  # an item takes, lately
        self._queues: dict[str, collections.deque[_Waiting]] = {}
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "lbfast-model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def stop(self) -> None:
        """Once nobody waits any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._thread.shutdown()

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def seconds_of_work(self) -> float:
        """About how long what is taken will take."""
        return self.taken * self._seconds

    def take(self, count: int) -> None:
        """Takes on so many items, to be given back by `done`. Full: there is no room."""
        if self.taken + count > self.room:
            raise Full
        self.taken += count

    def done(self, count: int) -> None:
        self.taken -= count

    async def embed(self, kind: str, value: Any) -> np.ndarray:
        """(E,) float32. Unusable: there is no embedding of it. Whoever is cancelled is left out of later batches."""
        waiting = _Waiting(value, asyncio.get_running_loop().create_future(), time.monotonic())
        self._queues.setdefault(kind, collections.deque()).append(waiting)
        self._came.set()
        return await waiting.answer

    async def _serve(self) -> None:
        while True:
            kind = self._oldest()
            if kind is None:
                self._came.clear()
                await self._came.wait()
                continue
            batch = await self._gather(self._queues[kind])
            if not batch:
                continue
            start = time.monotonic()
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._answers, kind, batch)
            spent = time.monotonic() - start
            self._seconds += 0.2 * (spent / len(batch) - self._seconds)
            self._on_batch(kind, len(batch), spent)
            for waiting, answer in zip(batch, answers):
                if waiting.answer.done():  # nobody waits for it any more
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)

    def _oldest(self) -> str | None:
        """The kind of the item that came first."""
        for queue in self._queues.values():
            while queue and queue[0].answer.done():
                queue.popleft()
        heads = {kind: queue[0].since for kind, queue in self._queues.items() if queue}
        return min(heads, key=heads.__getitem__, default=None)

    async def _gather(self, queue: collections.deque[_Waiting]) -> list[_Waiting]:
        """What is there of a kind, when it is enough or its first has waited long enough."""
        end = queue[0].since + self.wait
        while len(queue) < self.size and (left := end - time.monotonic()) > 0:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except asyncio.TimeoutError:
                break
        batch: list[_Waiting] = []
        while queue and len(batch) < self.size:
            waiting = queue.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
        return batch

    def _answers(self, kind: str, batch: Sequence[_Waiting]) -> list[np.ndarray | Exception]:
        values = [waiting.value for waiting in batch]
        try:
            return [_answer(row) for row in self._run(kind, values)]
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [self._answers(kind, [waiting])[0] for waiting in batch]


def _answer(row: np.ndarray | str) -> np.ndarray | Exception:
    return Unusable(row) if isinstance(row, str) else row
