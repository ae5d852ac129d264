"""Processes that decode what requests bring: in parallel, off the event loop, each file with its time."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lbfast.data.crew import Work
from lbfast.data.decode import Helper, Task, Undecodable, helpers_context
from lbfast.serving.batching import Unusable


class Decoders:
    """So many processes, started when they are first needed. Made by the main thread."""

    def __init__(self, work: Work, workers: int, seconds: float):
        context, self._seconds = helpers_context(), seconds
        self._helpers = [Helper(work, context) for _ in range(workers)]
        self._free: queue.SimpleQueue[Helper] = queue.SimpleQueue()
        for helper in self._helpers:
            self._free.put(helper)
        self._threads = ThreadPoolExecutor(workers, "lbfast-decode")

    async def decode(self, task: Task) -> np.ndarray:
        """The pixel values of a file. Unusable: there are none."""
        result = await asyncio.get_running_loop().run_in_executor(self._threads, self._decoded, task)
        if isinstance(result, Undecodable):
            raise Unusable(result.reason)
        return result

    def _decoded(self, task: Task) -> Any:
        helper = self._free.get()  # there are as many as threads
        try:
            return helper.decode(task, self._seconds)
        finally:
            self._free.put(helper)

    def close(self) -> None:
        """Ends them."""
        self._threads.shutdown(cancel_futures=True)
        for helper in self._helpers:
            helper.close()
