"""What a GPU draws and how fast it runs while something else happens: NVML, sampled by a thread.

Needs nvidia-ml-py (`import pynvml`); without it, or without a GPU, `why_not` says so and nothing is sampled.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

INTERVAL_S = 0.02


@dataclass(frozen=True)
class Sample:
    """One look: seconds since the start, watts, MHz of the multiprocessors and of the memory, degrees Celsius, MiB."""

    seconds: float
    watts: float
    sm_mhz: int
    memory_mhz: int
    celsius: int
    used_mib: float


@dataclass
class Samples:
    """What was seen. joules: by the GPU's own counter where it has one, else watts over time."""

    taken: list[Sample] = field(default_factory=list)
    joules: float = 0.0

    def summary(self) -> dict[str, float]:
        """Means of power and clocks, the highest temperature and memory; empty where nothing was sampled."""
        if not self.taken:
            return {}
        count = len(self.taken)
        return {
            "watts": round(sum(s.watts for s in self.taken) / count, 1),
            "sm_mhz": round(sum(s.sm_mhz for s in self.taken) / count),
            "memory_mhz": round(sum(s.memory_mhz for s in self.taken) / count),
            "celsius": max(s.celsius for s in self.taken),
            "used_mib": round(max(s.used_mib for s in self.taken)),
            "joules": round(self.joules, 2),
        }


def why_not(index: int = 0) -> str:
    """Why GPU `index` cannot be sampled; empty where it can."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return "nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
        nvml.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:  # NVML's own kinds: no driver, no device, no permission
        return f"NVML: {error}"
    return ""


@contextlib.contextmanager
def sampling(index: int = 0, interval_s: float = INTERVAL_S) -> Iterator[Samples]:
    """Samples GPU `index` until the block ends. Yields what will have been seen then; empty where `why_not` objects."""
    samples = Samples()
    if why_not(index):
        yield samples
        return
    nvml = importlib.import_module("pynvml")
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    stop = threading.Event()
    begun = time.perf_counter()
    before = _millijoules(nvml, handle)

    def run() -> None:
        while True:
            with contextlib.suppress(nvml.NVMLError):
                samples.taken.append(_look(nvml, handle, time.perf_counter() - begun))
            if stop.wait(interval_s):
                return

    thread = threading.Thread(target=run, name="nvml", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
        after = _millijoules(nvml, handle)
        if before is None or after is None:
            samples.joules = _integral(samples.taken)
        else:
            samples.joules = (after - before) / 1e3


def _look(nvml: Any, handle: Any, seconds: float) -> Sample:
    return Sample(
        seconds,
        nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
    )


def _millijoules(nvml: Any, handle: Any) -> float | None:
    try:
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None


def _integral(taken: list[Sample]) -> float:
    """Watts over seconds, by trapezoids."""
    return sum((a.watts + b.watts) / 2 * (b.seconds - a.seconds) for a, b in itertools.pairwise(taken))


def driver_and_clocks(index: int = 0) -> dict[str, Any]:
    """Driver version and the highest clocks of GPU `index`, from NVML or nvidia-smi; empty where neither answers."""
    if not why_not(index):
        nvml = importlib.import_module("pynvml")
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        with contextlib.suppress(nvml.NVMLError):
            driver = nvml.nvmlSystemGetDriverVersion()
            return {
                "driver": driver.decode() if isinstance(driver, bytes) else driver,
                "max_sm_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
                "max_memory_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
            }
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem"]
    try:
        shown = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
        )
        driver, sm, memory = (part.strip() for part in shown.stdout.strip().split(","))
        return {"driver": driver, "max_sm_mhz": int(sm), "max_memory_mhz": int(memory)}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


@contextlib.contextmanager
def nothing() -> Iterator[Samples]:
    """In place of `sampling` where there is no GPU to look at."""
    yield Samples()
