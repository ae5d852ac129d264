"""A model's call under torch.profiler: a trace, operators beside the machine's roofline, memory over time, energy."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile as torch_profile

from lbfast import files
from lbfast.profiling import machine, power
from lbfast.profiling.count import Counter, Work

POINTS = 2000  # of the memory timeline, at most
_LAUNCHES = ("cuLaunch", "cudaLaunch")  # whose kernels are their operators', or `alone`


@dataclass(frozen=True)
class Operator:
    """One row: the work of an operator, or of a kernel that none launched, in one call of the model. ms: of the GPU
    where there is one, else of the CPU.

    roofline: the least time its FLOP and bytes could take at the machine's measured rates, over the time they took;
    above 1 where a cache served the bytes.
    """

    name: str
    calls: float
    ms: float
    flops: float
    bytes: float
    roofline: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass
class Profile:
    """What was found of one call of `items` items.

    Attributes:
        ms: median wall time of a call that nothing watched.
        operators: the longest first.
        memory: (milliseconds, MiB) since the trace began, of tensors of the device.
        energy: of a GPU that NVML sampled (`power.Samples.summary`), and joules for each item; else empty.
    """

    header: dict[str, Any]
    items: int
    ms: float
    operators: list[Operator]
    rates: machine.Rates
    memory: list[tuple[float, float]] = field(default_factory=list)
    energy: dict[str, float] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        return sum(op.flops for op in self.operators)

    @property
    def of_matmul_rate(self) -> float:
        return self.flops / (self.ms / 1e3) / self.rates.flops

    def write(self, path: Path) -> None:
        files.write(path, json.dumps({**asdict(self), "of_matmul_rate": self.of_matmul_rate}, indent=1) + "\n")


def run(
    call: Callable[[], Any], items: int, device: torch.device, dtype: torch.dtype, out: Path, seconds: float = 1.0
) -> Profile:
    """Profiles `call`, which works on `items` items, and writes out/trace.json (Chrome's and Perfetto's format).

    Args:
        dtype: of the products, for the roofline.
        seconds: for how long calls are timed before, and sampled by NVML where that is there.
    """
    kind = device.type
    out.mkdir(parents=True, exist_ok=True)
    call()
    _wait(kind)
    rates = machine.rates(kind, dtype)
    ms, energy = _timed(call, kind, items, seconds)
    with Counter() as counter:
        call()
    _wait(kind)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (kind == "cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on stderr when it begins and ends
    with torch_profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        call()
        _wait(kind)
    trace = out / "trace.json"
    with files.replacing(trace) as staged:
        profiler.export_chrome_trace(str(staged))
    spent = _by_name(profiler.events(), kind, counter.work.keys())
    if kind == "cuda":
        spent |= alone(trace)
    return Profile(
        machine.facts(kind), items, ms, operators(spent, counter.work, rates), rates, timeline(trace, kind), energy
    )


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def _timed(call: Callable[[], Any], kind: str, items: int, seconds: float) -> tuple[float, dict[str, float]]:
    """(median milliseconds of a call, energy) of calls for so many seconds, three at least."""
    times: list[float] = []
    with power.sampling() if kind == "cuda" else power.nothing() as samples:
        begun = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            call()
            _wait(kind)
            times.append(time.perf_counter() - start)
    energy = samples.summary()
    if energy:
        energy["joules_per_item"] = round(energy["joules"] / (items * len(times)), 4)
    return 1e3 * sorted(times)[len(times) // 2], energy


def _by_name(events: Iterable[Any], kind: str, counted: Collection[str]) -> dict[str, tuple[int, float]]:
    """Name -> (calls, milliseconds): the whole time of operators that were counted, of the others their own."""
    spent: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.device_type != DeviceType.CPU or event.cpu_parent is not None or event.name.startswith(_LAUNCHES):
            continue
        for name, ms in _own_times(event, kind, counted):
            calls, total = spent.get(name, (0, 0.0))
            spent[name] = (calls + 1, total + ms)
    return spent


def _own_times(event: Any, kind: str, counted: Collection[str]) -> Iterator[tuple[str, float]]:
    whole = event.name in counted
    if kind == "cuda":
        us = event.device_time_total if whole else event.self_device_time_total
    else:
        us = event.cpu_time_total if whole else event.self_cpu_time_total
    yield event.name, us / 1e3
    if not whole:
        for child in event.cpu_children:
            yield from _own_times(child, kind, counted)


def alone(trace: Path) -> dict[str, tuple[int, float]]:
    """Kernels of a trace that no operator launched, as Triton's are where nothing is differentiated: name -> (calls,
    milliseconds)."""
    events = json.loads(trace.read_text())["traceEvents"]
    launchers = {event["args"].get("External id") for event in events if event.get("cat") == "cpu_op"}
    spent: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.get("cat") == "kernel" and event["args"].get("External id") not in launchers - {None}:
            calls, total = spent.get(event["name"], (0, 0.0))
            spent[event["name"]] = (calls + 1, total + event["dur"] / 1e3)
    return spent


def operators(spent: dict[str, tuple[int, float]], work: dict[str, Work], rates: machine.Rates) -> list[Operator]:
    """Times joined with work by name; the longest first. What took no time on the device is left out."""
    found = []
    for name, (calls, ms) in spent.items():
        done = work.get(name, Work())
        if ms <= 0:
            continue
        floor = rates.floor_ms(done.flops, done.bytes)
        found.append(Operator(name, calls, round(ms, 4), done.flops, done.bytes, round(floor / ms, 4)))
    return sorted(found, key=lambda op: -op.ms)


def timeline(trace: Path, kind: str) -> list[tuple[float, float]]:
    """(milliseconds, MiB) of the device's tensors over a trace, relative to its start, thinned out to POINTS."""
    wanted = 1 if kind == "cuda" else 0  # DeviceType
    events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == wanted
    )
    points, held = [], 0
    for at, change in changes:
        held += change
        points.append(((at - changes[0][0]) / 1e3, held / 2**20))
    return points[:: max(1, -(-len(points) // POINTS))]
