"""What training costs here, from a few steps of few rows: bytes that are held, seconds, floating-point operations.

Bytes are those of the allocator, exactly: PyTorch's own count on a GPU; on a CPU each allocation that its profiler
notes. What a process has besides (libraries, gaps between tensors) is the difference to its resident size.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lbfast import ops
from lbfast.profiling.count import Counter
from lbfast.training import memory
from lbfast.training.parameters import groups, local, trained
from lbfast.training.recipes import Recipe
from lbfast.training.report import memory_mib
from lbfast.training.step import CAPTIONS_AT_ONCE, LargeBatchStep, Towers

ENOUGH = 0.5
"""Seconds: what takes as long is not made longer to be measured better."""

LOSS_ROWS = 2048


@dataclass(frozen=True)
class Line:
    """fixed + each * rows."""

    fixed: float
    each: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> Line:
        each = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - each * first[0], each)

    def at(self, rows: float) -> float:
        return self.fixed + self.each * rows


@dataclass(frozen=True)
class Costs:
    """What one process needs. Bytes but for what says otherwise.

    Attributes:
        weights: of the model, all of it. trained: those that are trained.
        kept: activations that m rows keep for their backward.
        backward: the most that is held in the backward of m rows besides gradients: these activations too.
        captions: that embedding so many captions at once holds; 0 where language is trained with the rest.
        loss: that the loss of B pairs holds, embeddings and their gradients included.
        pixels: of a row, where they are on this device.
        resident: of the process without all these. loading: its most until the model was there.
        again: seconds of the forward and backward of a row after another forward of it. once: after none.
        caption: seconds of a caption. step: of the optimizer. loss_seconds: of LOSS_ROWS pairs.
        flops: of a row as in `once`, as in `again`, and of a caption; where no seconds are measured.
    """

    weights: int
    trained: int
    kept: Line
    backward: Line
    captions: Line
    loss: Line
    pixels: int
    resident: float
    loading: float
    once: float = 0.0
    again: float = 0.0
    caption: float = 0.0
    step: float = 0.0
    loss_seconds: float = 0.0
    flops: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def live(self, micro_batch: int, rows: int, batch: int) -> float:
        """Bytes of tensors at the most in a step, gradients and the optimizer's state included.

        Captions are embedded before there are gradients; the loss is computed when one micro-batch has its activations
        and there are no gradients yet.
        """
        before = self.captions.at(min(rows, max(CAPTIONS_AT_ONCE, micro_batch))) if self.captions.each else 0.0
        there = 3 * self.trained + self.embeddings(batch) + self.pixels * rows
        phases = (
            before - self.trained,
            self.kept.at(micro_batch) + self.loss.at(batch) - self.embeddings(batch) - self.trained,
            self.backward.at(micro_batch),
        )
        return self.weights + there + max(phases)

    def embeddings(self, batch: int) -> float:
        """Of the batch and their gradients, which stay until the last backward: about half of what the loss holds."""
        return self.loss.each * batch / 2


def measure(
    towers: Towers,
    recipe: Recipe,
    device: torch.device,
    autocast: torch.dtype | None,
    micro_batch: int,
    time_it: bool,
    tell: Callable[[str], object],
) -> Costs:
    """Costs of the model's training on the device where it is; its parameters are as they were afterwards.

    tell: is told what is measured next.
    """
    loading = memory_mib(device) * memory.MIB if device.type == "cpu" else 0.0
    model, parameters = towers.model, trained(towers.model)
    weights = sum(local(x).nbytes for x in (*model.parameters(), *model.buffers()))
    own = sum(local(x).nbytes for x in parameters.values())

    def arithmetic() -> torch.autocast:
        return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)

    def large(rows: int) -> LargeBatchStep:
        known: Any = _Known()
        return LargeBatchStep(towers, rows, autocast=autocast, offload=recipe.offload, cache=known)

    def step(rows: int, pieces: int) -> Callable[[], Any]:
        batch, taken = synthetic(towers, recipe, rows * pieces), large(rows)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            taken(batch, 0)

        return run

    optimizer = torch.optim.AdamW(groups(model, recipe), lr=0.0, fused=True)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0  # and so the weights stay
    with _undisturbed(model):
        first = min(2, micro_batch)
        tell(f"memory of a step of {2 * first} rows")
        most = _as_in_a_run(towers, recipe, autocast, optimizer, first)
        tell("activations of one and two rows")
        kept = Line(*memory.activations(towers, recipe, device, arithmetic))
        tell("backward of one and two rows")
        one, two = (_peak(step(rows, 2), device, model) - own for rows in (1, 2))
        backward = Line.through((1, one), (2, max(two, one + 1)))
        captions, caption = Line(0, 0), 0.0
        if not towers.text_trained:
            count = CAPTIONS_AT_ONCE
            tell(f"{count} captions")
            batch = synthetic(towers, recipe, count, pixels=False)
            plain = LargeBatchStep(towers, count, autocast=autocast)

            def embed() -> None:
                plain.embed_captions(batch.input_ids, batch.attention_mask)

            captions = Line(0, _peak(embed, device, model) / count)
            caption = _seconds(embed, device) / count if time_it else 0.0
        tell("loss")
        loss, loss_seconds = _loss(towers, recipe, device, time_it)
        pixels = 0 if device.type == "cuda" else synthetic(towers, recipe, 1).pixel_values.nbytes
        rows, once, twice, seconds = 1, 0.0, 0.0, 0.0
        tell("time of a step" if time_it else "operations of a step")
        if time_it:
            once = _seconds(step(1, 1), device)
            while once < ENOUGH and rows < micro_batch:
                rows = min(micro_batch, 4 * rows)
                once = _seconds(step(rows, 1), device)
        costs = Costs(weights, own, kept, backward, captions, loss, pixels, 0.0, loading)
        resident = most - costs.live(first, 2 * first, 2 * first) if device.type == "cpu" else 0.0
        if time_it:
            twice, seconds = _seconds(step(rows, 2), device), _seconds(optimizer.step, device)
        flops = (0.0, 0.0, 0.0) if time_it else _flops(towers, recipe, autocast)
    return Costs(
        weights, own, kept, backward, captions, loss, pixels, max(resident, 0.0), loading,
        once / rows, max(twice - once, once) / rows, caption, seconds, loss_seconds, flops,
    )  # fmt: skip


def _as_in_a_run(
    towers: Towers, recipe: Recipe, autocast: torch.dtype | None, optimizer: torch.optim.Optimizer, rows: int
) -> float:
    """The most bytes that the process has in a second step, of two micro-batches, before anything else is done here."""
    batch, taken = synthetic(towers, recipe, 2 * rows), LargeBatchStep(towers, rows, autocast=autocast)
    _forget()
    for parameter in trained(towers.model).values():  # a first step would take long, and leave the same
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    towers.model.zero_grad(set_to_none=True)
    taken(batch, 0)
    optimizer.step()
    return memory_mib(taken.device) * memory.MIB


def synthetic(towers: Towers, recipe: Recipe, rows: int, pixels: bool = True) -> SimpleNamespace:
    """So many pairs of zeros, each caption as long as the recipe has them, on the CPU."""
    model = towers.model
    vision = model.vision_model
    length = min(recipe.context_length, model.config.text_config.max_position_embeddings)
    frames = (model.config.vision_config.num_frames,) if model.config.vision_config.add_time_attn else ()
    shape = (vision.embeddings.pixel_shape[0], *frames, *vision.embeddings.pixel_shape[1:])
    ids = torch.zeros(rows, length, dtype=torch.int64)
    ids[:, -1] = 1
    return SimpleNamespace(
        pixel_values=torch.zeros(rows, *shape) if pixels else None,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        groups=torch.arange(rows),
    )


class _Known:
    """In place of a cache of captions: it has them all, so that a step embeds none."""

    def read(self, ids: torch.Tensor, out: torch.Tensor, together: int | None = None) -> torch.Tensor:
        out.fill_(out.shape[1] ** -0.5)
        return torch.empty(0, dtype=torch.int64)


def _loss(towers: Towers, recipe: Recipe, device: torch.device, time_it: bool) -> tuple[Line, float]:
    """Bytes by rows, and seconds of LOSS_ROWS."""
    size = towers.model.config.projection_dim

    def run(rows: int) -> None:
        image, text = (torch.full((rows, size), size**-0.5, device=device) for _ in range(2))
        image.requires_grad_()
        scale = torch.ones((), device=device, requires_grad=True)
        if recipe.loss == "sigmoid":
            ops.sigmoid_loss(image, text, scale, torch.zeros((), device=device, requires_grad=True)).backward()
        else:
            options: Any = {"dims": recipe.dims, "label_smoothing": recipe.label_smoothing}
            ops.info_nce(image, text, scale, **options).backward()

    run(2)
    found = [(rows, _peak(lambda: run(rows), device)) for rows in (LOSS_ROWS, 2 * LOSS_ROWS)]  # noqa: B023
    return Line.through(*found), _seconds(lambda: run(LOSS_ROWS), device) if time_it else 0.0


def _flops(towers: Towers, recipe: Recipe, autocast: torch.dtype | None) -> tuple[float, float, float]:
    known: Any = _Known()
    counts = []
    for rows, pieces in ((1, 1), (1, 2)):
        taken = LargeBatchStep(towers, rows, autocast=autocast, cache=known)
        with Counter() as counter:
            taken(synthetic(towers, recipe, rows * pieces), 0)
        counts.append(sum(work.flops for work in counter.work.values()))
    caption = 0.0
    if not towers.text_trained:
        batch = synthetic(towers, recipe, 2, pixels=False)
        with Counter() as counter:
            LargeBatchStep(towers, 2, autocast=autocast).embed_captions(batch.input_ids, batch.attention_mask)
        caption = sum(work.flops for work in counter.work.values()) / 2
    return counts[0], counts[1] - counts[0], caption


def _peak(run: Callable[[], Any], device: torch.device, model: torch.nn.Module | None = None) -> float:
    """The most bytes that run() holds at once beyond what was there; gradients are given up before."""
    if model is not None:
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says when it begins
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as noted:
        run()
    most = _most(noted)
    del noted  # its events lie between what was freed
    _trim()
    return most


def _most(noted: Any) -> int:
    """The most bytes that were held at once while a profiler of memory was running."""
    changes = [event for event in noted.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: int(event.start_ns())):
        now += event.nbytes()
        most = max(most, now)
    return most


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median of three, after one more; of one where that is long: after the first on a GPU, where kernels compile."""
    times: list[float] = []
    least = 2 if device.type == "cuda" else 1
    while len(times) < 4 and (len(times) < least or times[-1] < 4 * ENOUGH):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:] or times)


def _trim() -> None:
    """What has been freed goes back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _forget() -> None:
    """The same, and the high-water mark falls to the present size."""
    _trim()
    with contextlib.suppress(OSError):  # no Linux
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Gradients are none before and after; random generators go on as if nothing had been drawn."""
    model.zero_grad(set_to_none=True)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.zero_grad(set_to_none=True)
