"""What the kernels share: jit helpers, the description of a compilation ahead of time, the name of an architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch


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
