"""The machine: its name and versions, and the two rates that every floor is made of, measured on the spot."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product gives the matmul rate
_COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes: larger than any cache
_ROUNDS = 7
_LONG = 0.03  # seconds of a product: a larger one is at no better rate


@dataclass(frozen=True)
class Rates:
    """flops: FLOP/s of the library's product of square matrices in a dtype. bytes: B/s of a copy, read and written."""

    flops: float
    bytes: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """The least time for so many FLOP and bytes: that of the resource which takes longer."""
        return 1e3 * max(flops / self.flops, moved / self.bytes)


@functools.cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """Of "cpu" or "cuda", the best of a few rounds: about a second on a CPU, where torch.mm and oneDNN both try.

    Matrices are smaller where a product of those takes long: in bfloat16 on a CPU that has none, minutes.
    """
    numbers, side = _COPIED[device] // 4, min(_SIDE[device], 256)
    while (product := _product_seconds(side, device, dtype)) < _LONG and side < _SIDE[device]:
        side *= 2
    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    copy = _best_seconds(lambda: target.copy_(source), device)
    return Rates(2 * side**3 / product, 2 * source.numel() * source.element_size() / copy)


def _product_seconds(side: int, device: str, dtype: torch.dtype) -> float:
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _best_seconds(lambda: torch.mm(a, b, out=out), device)
    if device == "cpu" and dtype != torch.float64 and torch.backends.mkldnn.is_available():
        with contextlib.suppress(RuntimeError):  # oneDNN has none of this dtype for this CPU
            theirs = _best_seconds(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), device)
            product = min(product, theirs)
    return product


def _best_seconds(run: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(1 + _ROUNDS):
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        else:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return min(times[1:])  # the first one warms up


def facts(device: str) -> dict[str, Any]:
    """What numbers of "cpu" or "cuda" depend on: device, versions, threads or clocks. For headers of results."""
    import lbfast

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lbfast": lbfast.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, **_driver()}
        try:
            import triton
        except ImportError:
            return found
        return {**found, "triton": triton.__version__}
    from lbfast.doctor import cpu_name

    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    found |= {"device": cpu_name(), "threads": torch.get_num_threads()}
    return {**found, "capability": torch.backends.cpu.get_cpu_capability(), "amx": amx()}


def _driver() -> dict[str, Any]:
    """The GPU's driver and clocks as nvidia-ml-py tells them, or else nvidia-smi; nothing where neither is there."""
    from lbfast.profiling import power

    return power.driver_and_clocks()


def slug(device: str) -> str:
    """The device's name for file names: "amd-epyc-2-threads", "nvidia-h200"."""
    name = facts(device)["device"]
    if device == "cpu":
        name += f" {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
