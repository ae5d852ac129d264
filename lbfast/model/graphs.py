"""CUDA graphs of a function of batches: one for each batch size and shape, captured at first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SLOTS = 2
"""Batches in flight on their way to the device: one is copied while the one before is computed."""


@dataclass
class _Recording:
    """A captured call: its input and output live at fixed addresses."""

    replay: Callable[[], None]
    given: torch.Tensor
    result: torch.Tensor


class Graphs:
    """Calls a function of one batch (B, ...) -> (B, D) by replaying what it launched.

    Batches are padded with what an earlier one left to the next of `batch_sizes`; larger ones go in pieces. A batch in
    CPU memory is copied through pinned buffers on a stream of its own, while the batch before is computed. Without a
    gradient only, and for one thread at a time.

    Args:
        function: whose launches depend on the shape and dtype of its argument alone, and never wait for the device.
        batch_sizes: to record, each at its first use.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], batch_sizes: Sequence[int]):
        self.function = function
        self.batch_sizes = sorted(set(batch_sizes))
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._uploads: dict[tuple[object, ...], _Upload] = {}
        self._pool: object = None

    def __call__(self, batch: torch.Tensor, device: torch.device) -> torch.Tensor:
        """batch (B, ...), B >= 1, on the CPU or on `device` -> (B, D) on `device`."""
        pieces = [self._run(piece, device) for piece in batch.split(self.batch_sizes[-1])]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def padded_size(self, batch: int) -> int | None:
        """The size that a batch is padded to; None of one that goes in pieces."""
        return next((size for size in self.batch_sizes if size >= batch), None)

    @torch.inference_mode(False)  # buffers made under inference_mode could not be written outside of it
    @torch.no_grad()
    def _run(self, batch: torch.Tensor, device: torch.device) -> torch.Tensor:
        size = self.padded_size(len(batch))
        assert size is not None
        key = (size, *batch.shape[1:], batch.dtype, device)
        if batch.device != device:
            if key not in self._uploads:
                self._uploads[key] = _Upload((size, *batch.shape[1:]), batch.dtype, device)
            batch = self._uploads[key](batch)
        if key not in self._recordings:
            given = batch.new_zeros((size, *batch.shape[1:]))
            given[: len(batch)].copy_(batch)
            self._recordings[key] = self._record(given)
        recording = self._recordings[key]
        recording.given[: len(batch)].copy_(batch)
        recording.replay()
        return recording.result[: len(batch)].clone()

    def _record(self, given: torch.Tensor) -> _Recording:
        with torch.cuda.device(given.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries choose their algorithms, kernels are compiled
                    self.function(given)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
                result = self.function(given)
            self._pool = graph.pool()  # results are cloned before the next replay, so that all graphs share memory
        return _Recording(graph.replay, given, result)


class _Upload:
    """Copies batches of at most one size to the device, on a stream of its own, through pinned memory."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pinned = [torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(SLOTS)]
        self.arrived = [torch.empty(shape, dtype=dtype, device=device) for _ in range(SLOTS)]
        self.copied = [torch.cuda.Event() for _ in range(SLOTS)]
        self.free: list[torch.cuda.Event | None] = [None] * SLOTS
        self.turn = 0

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """batch (B, ...) on the CPU -> the same on the device, valid until SLOTS calls later."""
        slot, self.turn = self.turn, (self.turn + 1) % SLOTS
        current = torch.cuda.current_stream(self.stream.device)
        self.free[slot - 1] = current.record_event()  # what the batch before was copied to has been read by then
        self.copied[slot].synchronize()  # the pinned buffer's last copy is over
        pinned, arrived = self.pinned[slot][: len(batch)], self.arrived[slot][: len(batch)]
        pinned.copy_(batch)
        free = self.free[slot]
        if free is not None:
            self.stream.wait_event(free)
        with torch.cuda.stream(self.stream):
            arrived.copy_(pinned, non_blocking=True)
            self.copied[slot].record(self.stream)
        current.wait_event(self.copied[slot])
        return arrived
