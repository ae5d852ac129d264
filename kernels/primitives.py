"""What the kernels share: jit helpers, the description of a compilation ahead of time, the name of an architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One kernel at one of LanguageBind's shapes, to be compiled without a GPU. `kernels/X.py: aot_cases(arch)`.

    name: what to print, shape included. kernel: the jit function. signature: argument -> Triton's type ("*bf16", "i32",
    "fp32"), with ":16" behind it where the address or the number is a multiple of 16, as the launcher would find it;
    constants: the other arguments (constexpr, and None for tensors left out) -> value.
    flops, bytes: what one launch at this shape must do and move, for the floor.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    flops: float
    bytes: float


@functools.cache
def _arch(device_index: int) -> str:
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...: the key of the tables in configs.py; "default" for the CPU (the interpreter)."""
    if device.type != "cuda":
        return "default"
    return _arch(torch.cuda.current_device() if device.index is None else device.index)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes tensor's GPU the current one, where Triton launches; nothing to do for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def programs(device: torch.device, per_sm: int) -> int:
    """How many programs fill the GPU `per_sm` times over; a small number for the interpreter."""
    if device.type != "cuda":
        return 3
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Sums are float32, float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32
