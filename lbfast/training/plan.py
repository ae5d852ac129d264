"""Whether a run will fit, and how long it will take, before it is begun."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from lbfast.model.languagebind import LanguageBindModel
from lbfast.training import memory
from lbfast.training.measure import LOSS_ROWS, Costs, Line, measure
from lbfast.training.parameters import training_mode
from lbfast.training.recipes import Recipe
from lbfast.training.run import Batches, autocast_dtype
from lbfast.training.step import Towers

GIB = 2**30
GPUS = (16, 24, 40, 80, 141)
"""GiB of memory."""

SHARE = 0.92
"""Of a GPU's memory, for tensors: its context and what lies between tensors take the rest."""

GPU_WORKSPACE = 256 * memory.MIB
"""Of the loss on a GPU; see `info_nce`."""


@dataclass(frozen=True)
class Plan:
    """What a run will take on each device.

    Attributes:
        micro_batch, batch_size, world: rows at once, of the global batch, processes.
        memory: bytes by what they are for. Not all of it is there at the same time: see `peak`.
        peak: bytes at the most; on a CPU the process's resident size, on a GPU what PyTorch has allocated.
        capacity: bytes that there are. largest_batch: the global batch that they allow, 0 where none does.
        seconds: of a step. reading: seconds of these for decoding samples and captions. steps: of an epoch.
        epochs: of the recipe. stated: TFLOP/s that the seconds are by; None: measured.
        table: global batch -> GiB it needs at the micro-batch, and for a GPU of each size the largest micro-batch.
        estimated: what the table for GPUs is by, where it isn't measured on one.
    """

    micro_batch: int
    batch_size: int
    world: int
    memory: Mapping[str, float]
    peak: float
    capacity: float
    largest_batch: int
    seconds: float
    reading: float
    steps: int | None
    epochs: int
    stated: float | None
    table: Mapping[int, tuple[float, Mapping[int, int]]] = field(default_factory=dict)
    estimated: str = ""

    @property
    def fits(self) -> bool:
        """Whether the recipe's batch fits into the memory that there is."""
        return self.peak <= self.capacity

    def text(self) -> str:
        """All of it, for people."""
        lines = [f"{name:<36}{size / memory.MIB:>12,.1f} MiB" for name, size in self.memory.items()]
        lines.append(f"{'at the most, at one time':<36}{self.peak / memory.MIB:>12,.1f} MiB")
        verdict = "fits" if self.fits else "does not fit"
        lines.append(f"{verdict} into {self.capacity / GIB:.1f} GiB; largest global batch: {self.largest_batch:,}")
        lines.append(f"micro-batch {self.micro_batch}, global batch {self.batch_size:,}, processes {self.world}")
        how = "measured here" if self.stated is None else f"at {self.stated:g} TFLOP/s a process"
        lines.append(f"a step takes {duration(self.seconds)} ({how}; reading data {duration(self.reading)} of it)")
        if self.steps is not None:
            epoch = self.steps * self.seconds
            lines.append(
                f"an epoch of {self.steps:,} steps {duration(epoch)}, all {self.epochs} {duration(epoch * self.epochs)}"
            )
        lines += ["", f"largest micro-batch of a GPU by its memory{self.estimated}; -: none fits"]
        lines.append(f"{'global batch':>12}{'needs GiB':>11}" + "".join(f"{f'{size} GiB':>9}" for size in GPUS))
        for batch, (needed, sizes) in self.table.items():
            cells = "".join(f"{sizes[size] or '-':>9}" for size in GPUS)
            lines.append(f"{batch:>12,}{needed / GIB:>11.2f}{cells}")
        return "\n".join(lines)


def plan(
    recipe: Recipe,
    model: LanguageBindModel,
    batches: Batches | None = None,
    *,
    device: torch.device | str | None = None,
    world: int = 1,
    workers: int = 0,
    tflops: float | None = None,
    tell: Callable[[str], object] = str,
) -> Plan:
    """What training a prepared model by a recipe would take, from a few steps of few rows. The model stays as it is.

    Each process is taken to hold all of the parameters, as with DistributedDataParallel; what passes between processes
    takes no time here.

    Args:
        recipe: see Recipe.
        model: from `initial_model`, or any model after `prepare`; it is moved to the device.
        batches: the data: how many there are, and how long they take to read. None: neither is known.
        device: default: the model's.
        world: processes that share a global batch, each on a device of its own.
        workers: processes that decode ahead; see `Batches`.
        tflops: TFLOP/s that the towers reach, to compute the time by; None: it is measured.
        tell: is told what is measured next: L/14 takes minutes on a CPU.

    Raises ValueError for a `tflops` or `world` that is not positive, torch.OutOfMemoryError where not even two rows fit
    on a GPU.
    """
    if tflops is not None and not 0 < tflops < float("inf"):
        raise ValueError(f"tflops: expected a number above 0, got {tflops}")
    if world < 1:
        raise ValueError(f"world: expected at least 1, got {world}")
    place = next(model.parameters()).device if device is None else torch.device(device)
    training_mode(model.to(place))  # type: ignore[arg-type]
    for tower in (model.vision_model, model.text_model) if recipe.train_text else (model.vision_model,):
        memory.recompute(tower.encoder, recipe.checkpointing)
    towers, autocast = Towers(model), autocast_dtype(recipe, place)
    rows = -(-recipe.batch_size // world)
    wanted = recipe.micro_batch or _fitting(towers, recipe, place, autocast, rows)
    micro_batch = min(wanted, rows)
    costs = measure(towers, recipe, place, autocast, micro_batch, tflops is None, tell)
    capacity = memory.capacity(place) * (SHARE if place.type == "cuda" else 1.0)
    seconds = _seconds(costs, micro_batch, rows, recipe.batch_size, world, tflops)
    reading = 0.0
    if batches is not None and hasattr(batches, "reading_seconds"):
        reading = batches.reading_seconds() * rows
    whole = seconds + reading if not workers else max(seconds, reading / workers)
    on_gpu, how = costs, ""
    if place.type != "cuda":
        tell("activations in a GPU's precision")
        on_gpu, how = _as_on_a_gpu(costs, towers, recipe)
    live = costs.live(micro_batch, rows, recipe.batch_size)
    embeddings = costs.embeddings(recipe.batch_size)
    parts = {
        "weights": float(costs.weights),
        "gradients": float(costs.trained),
        "optimizer": 2.0 * costs.trained,
        f"activations of {micro_batch} rows": costs.kept.at(micro_batch),
        "more in their backward": max(costs.backward.at(micro_batch) - costs.kept.at(micro_batch), 0.0),
        f"embeddings of {recipe.batch_size:,} pairs": embeddings,
        "scratch of the loss": max(costs.loss.at(recipe.batch_size) - embeddings, 0.0),
    }
    if place.type != "cuda":
        parts[f"pixels of {rows:,} rows"] = float(costs.pixels * rows)
        parts["Python, libraries, gaps"] = costs.resident
        parts["while the model is loaded (in all)"] = costs.loading
    return Plan(
        micro_batch, recipe.batch_size, world, parts, max(live + costs.resident, costs.loading), capacity,
        _largest(costs, micro_batch, world, capacity - costs.resident), whole,
        min(reading if not workers else reading / workers, whole),
        None if batches is None else batches.steps_per_epoch, recipe.epochs, tflops,
        _table(on_gpu, recipe.batch_size, micro_batch, world), how,
    )  # fmt: skip


def duration(seconds: float) -> str:
    """ "850 ms", "12.3 s", "4.5 min", "2.1 h" or "3.4 days"."""
    for unit, most, name in ((1e-3, 1.0, "ms"), (1.0, 100.0, "s"), (60.0, 6000.0, "min"), (3600.0, 2e5, "h")):
        if seconds < most:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"


def _fitting(towers: Towers, recipe: Recipe, device: torch.device, autocast: torch.dtype | None, most: int) -> int:
    def arithmetic() -> torch.autocast:
        return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)

    return memory.fitting_rows(towers, recipe, device, arithmetic, most)


def _seconds(costs: Costs, micro_batch: int, rows: int, batch: int, world: int, tflops: float | None) -> float:
    """Of a step, without reading its data."""
    pieces = -(-rows // micro_batch)
    each = rows / pieces
    if tflops is None:
        loss = costs.loss_seconds * (batch / LOSS_ROWS) ** 2 / world
        return each * (costs.once + (pieces - 1) * costs.again) + rows * costs.caption + costs.step + loss
    once, again, caption = costs.flops
    loss = 4 * 2.0 * costs.loss.each / 16 * batch**2 / world
    return (each * (once + (pieces - 1) * again) + rows * caption + loss) / (tflops * 1e12)


def _largest(costs: Costs, micro_batch: int, world: int, capacity: float) -> int:
    """The global batch whose memory is just below the capacity."""
    low, high = 0, 1
    while high < 2**40 and costs.live(micro_batch, -(-high // world), high) <= capacity:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = costs.live(micro_batch, -(-middle // world), middle) <= capacity
        low, high = (middle, high) if fits else (low, middle)
    return low


def _table(costs: Costs, batch_size: int, micro_batch: int, world: int) -> dict[int, tuple[float, Mapping[int, int]]]:
    found: dict[int, tuple[float, Mapping[int, int]]] = {}
    for batch in sorted({batch_size, *(4**power for power in range(4, 11))}):
        rows = -(-batch // world)
        sizes = {}
        for size in GPUS:
            low, high = 0, rows + 1
            while high - low > 1:
                middle = (low + high) // 2
                fits = costs.live(middle, rows, batch) <= size * GIB * SHARE
                low, high = (middle, high) if fits else (low, middle)
            sizes[size] = low
        found[batch] = (costs.live(min(micro_batch, rows), rows, batch), sizes)
    return found


def _as_on_a_gpu(costs: Costs, towers: Towers, recipe: Recipe) -> tuple[Costs, str]:
    """Costs as a GPU's, from what was counted on a CPU: activations in the GPU's precision, pixels elsewhere."""
    device = torch.device("cpu")
    ratio, precision = 1.0, "float32"
    if recipe.precision in ("auto", "bfloat16", "float16"):
        with torch.random.fork_rng():
            lower = memory.activations(
                towers, recipe, device, lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=True)
            )
        ratio, precision = min(lower[1] / costs.kept.each, 1.0), "16 bits"
    lines = {
        name: Line(getattr(costs, name).fixed * ratio, getattr(costs, name).each * ratio)
        for name in ("kept", "backward", "captions")
    }
    loss = Line(GPU_WORKSPACE, costs.loss.each)
    found = Costs(costs.weights, costs.trained, lines["kept"], lines["backward"], lines["captions"], loss, 0, 0.0, 0.0)
    return found, f" (estimated from a CPU's activations in {precision})"
