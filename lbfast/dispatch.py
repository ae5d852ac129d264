"""Chooses an implementation for a call of an op, and says why the others were not chosen.

An op hands over its implementations in order of preference, each with a `why_not(*args, **kwargs) -> list[str]`
that names every reason why it cannot take these inputs:

    impl = dispatch.choose("attention", impl, {"triton": why_not_triton, "torch": why_not_torch}, q, k, v, causal=True)

`impl=` given by the caller never falls back: it raises with every reason. `use_impl` and LBFAST_IMPL do the same for
every op that has an implementation of that name; ops that have none choose as usual.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

NAMES = ("triton", "native", "torch")

Reasons = Callable[..., list[str]]

_override: str | None = None


def _check_name(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


def _from_environment() -> str | None:
    name = os.environ.get("LBFAST_IMPL")
    return _check_name(name, "environment variable LBFAST_IMPL") if name else None


@contextlib.contextmanager
def use_impl(name: str | None) -> Iterator[None]:
    """Makes every op that has an implementation `name` ("triton", "native" or "torch") use it inside the block.

    None restores the automatic choice. Raises ValueError for an unknown name. Process-wide, like torch.backends flags.
    """
    global _override
    if name is not None:
        _check_name(name, "use_impl(name)")
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def choose(op: str, impl: str | None, implementations: Mapping[str, Reasons], *args: Any, **kwargs: Any) -> str:
    """Returns the name of the implementation that takes this call.

    Args:
        op: name of the op, for the error message.
        impl: what the caller asked for, or None.
        implementations: name -> why_not, in order of preference.
        args, kwargs: the inputs, handed to why_not.

    Raises:
        ValueError: `impl` is not one of this op's implementations.
        RuntimeError: the implementation asked for, or every one, cannot take these inputs; the message has all reasons.
    """
    wanted = impl
    if wanted is None:
        override = _override or _from_environment()
        wanted = override if override in implementations else None
    elif wanted not in implementations:
        raise ValueError(f"{op}: impl: expected one of {', '.join(implementations)}, got {impl!r}")
    if wanted is not None:
        reasons = implementations[wanted](*args, **kwargs)
        if reasons:
            raise RuntimeError(f"{op}: impl={wanted!r} cannot take these inputs: {'; '.join(reasons)}")
        return wanted
    if "torch" in implementations and aten_only():
        return "torch"
    for name, why_not in implementations.items():
        if not why_not(*args, **kwargs) and not (name == "triton" and triton_interpreted()):
            return name  # the interpreter is for tests that ask for it
    every = explain(implementations, *args, **kwargs)
    raise RuntimeError(
        f"{op}: no implementation can take these inputs: " + "; ".join(f"{k}: {', '.join(v)}" for k, v in every.items())
    )


def explain(implementations: Mapping[str, Reasons], *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """For each implementation, every reason why it cannot take these inputs (an empty list: it can)."""
    return {name: why_not(*args, **kwargs) for name, why_not in implementations.items()}


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _constant(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, without its import of all of torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _find(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@_constant
def installed(module: str) -> bool:
    """True where `module` can be imported; looked up once, and a constant to torch.compile."""
    return _find(module)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device; None outside autocast, and on "meta", which has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def aten_only() -> bool:
    """True where only PyTorch's own operators mean something: to TorchScript, to ONNX, to transforms of torch.func."""
    if torch.compiler.is_compiling():  # of ONNX's two exporters one compiles, the other traces
        return torch.onnx.is_in_onnx_export()
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def traced() -> bool:
    """True where what is done now is done again for other data: nothing may depend on what tensors hold."""
    return torch.compiler.is_compiling() or aten_only()


def triton_interpreted() -> bool:
    """True where Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(*tensors: torch.Tensor) -> list[str]:
    """Reasons, common to every op, why a Triton kernel cannot take these tensors."""
    if not installed("triton"):
        return ["triton is not installed (pip install lbfast[gpu])"]
    for t in tensors:  # asked at every call: quicker than a generator
        if not t.is_cuda:
            return [] if triton_interpreted() else ["the tensors are not on a GPU"]
    return []


def why_not_native(*tensors: torch.Tensor) -> list[str]:
    """Reasons, common to every op, why a native CPU kernel cannot take these tensors. Compiles them at first use."""
    for t in tensors:
        if not t.is_cpu:
            return ["the tensors are not on the CPU"]
    reason = _native_reason()
    return [reason] if reason else []


@_constant
def _native_reason() -> str:
    """Why the native kernels are not available, or an empty string. Compiles them: torch.compile must not trace it."""
    from lbfast import native

    return "; ".join(native.why_not())
