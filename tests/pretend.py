"""A GPU that the CPU pretends to be: what benches ask of one is answered, every line of theirs runs, no kernel does."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import harness


def _on_the_cpu(value):
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value == "cuda" else value


class OnTheCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {key: _on_the_cpu(value) for key, value in (kwargs or {}).items()}
        return func(*map(_on_the_cpu, args), **kwargs)


class Event:
    """A CUDA event, by the wall clock."""

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, last):
        return 1e3 * (last.at - self.at)


@contextlib.contextmanager
def pretended_gpu():
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=2**37, multi_processor_count=132, major=9, minor=0)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    answers = {
        "is_available": lambda: True,
        "get_device_properties": lambda device: properties,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "Event": Event,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: time.sleep(1e-5)),
        "graph": lambda graph, stream: contextlib.nullcontext(),
    }
    with pytest.MonkeyPatch.context() as patch, OnTheCpu():
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(harness, "MIB", 2**10)  # of what pushes the inputs out of the cache
        patch.setattr(harness, "_cold", [])
        patch.setattr(torch.random, "fork_rng", lambda *given, **more: contextlib.nullcontext())
        yield
