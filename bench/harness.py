"""Timing and memory, the same way for every bench: candidates take turns, medians with spread, JSON with a header.

A candidate is a callable without arguments that does its work once; what it needs is made before. GPU times are those
of events around a call with a cold L2 cache; CPU times are wall clock. Extra memory is what a call needs beyond what
was there before it: on a GPU by the allocator's peak, on a CPU by the peak resident size of a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lbfast.doctor import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile of `rounds` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def header(device: str) -> dict[str, Any]:
    """What was measured on: device, versions, threads."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "memory_GiB": round(properties.total_memory / 2**30, 1)}
        facts |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    else:
        facts |= {"device": cpu_name(), "threads": torch.get_num_threads()}
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], device: str, seconds: float = 3.0, least: int = 3, most: int = 50
) -> dict[str, Timing]:
    """Times candidates in turns, so that a machine that slows down slows all; one call each to warm up first.

    Rounds go on until each candidate has had `seconds` on average, `least` rounds at least and `most` at most.
    """
    for run in candidates.values():
        run()
    clock = _gpu_ms if device == "cuda" else _cpu_ms
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begun = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begun > seconds * len(candidates):
            break
        for name, run in candidates.items():
            times[name].append(clock(run))
    return {name: _timing(values) for name, values in times.items()}


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return Timing(*(round(x, 3) for x in (statistics.median(ordered), *at)), len(ordered))


def _cpu_ms(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return (time.perf_counter() - begun) * 1e3


_cold: list[torch.Tensor] = []


def _gpu_ms(run: Callable[[], Any]) -> float:
    if not _cold:
        _cold.append(torch.empty(256 * MIB, dtype=torch.int8, device="cuda"))
    _cold[0].zero_()  # pushes the inputs out of L2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def gpu_extra_mib(run: Callable[[], Any]) -> float:
    """Peak of the CUDA allocator during a call, above what was allocated before it."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def cpu_extra_mib(
    make: Callable[..., Callable[[], Any]], *arguments: Any, warm: tuple[Any, ...] | None = None
) -> float:
    """Peak resident size during `make(*arguments)()`, above what was resident before the call, in a new process.

    make must be importable (a module's function), and makes the inputs. `warm`: arguments of a small call that loads
    libraries and thread pools first, so that they are not counted. Linux only.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_measure, args=(child, make, arguments, warm))
    process.start()
    child.close()
    try:
        return parent.recv()
    except EOFError as error:
        raise RuntimeError(f"cpu_extra_mib: {make.__name__}{arguments}: the process ended early") from error
    finally:
        process.join()


def _measure(pipe: Any, make: Callable[..., Callable[[], Any]], arguments: Any, warm: Any) -> None:
    if warm is not None:
        make(*warm)()
    run = make(*arguments)
    before = _resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to the present size
    result = run()
    pipe.send((_resident_kib("VmHWM") - before) / 1024)
    del result


def _resident_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def write(name: str, device: str, rows: list[dict[str, Any]]) -> Path:
    """Writes bench/results/<name>.json: header and rows."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps({"header": header(device), "rows": rows}, indent=1) + "\n")
    os.replace(written, path)
    return path
