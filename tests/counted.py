"""What a GPU would be asked to launch, counted on the CPU: Triton's kernels, which are not run, and PyTorch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from lbfast import dispatch

_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "alias"}
"""Operators that launch nothing, beside views."""


class _Operators(TorchDispatchMode):
    """Appends PyTorch's operators that launch something, those inside of lbfast's own too."""

    def __init__(self, names: list[str], device: str):
        super().__init__()
        self.names, self.device = names, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "lbfast":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        tensors = (item for item in tree_leaves((args, kwargs, out)) if isinstance(item, torch.Tensor))
        if not func.is_view and name not in _NOTHING and any(t.device.type == self.device for t in tensors):
            self.names.append(name)
        return out


@contextlib.contextmanager
def launches(monkeypatch: Any, device: str = "cpu") -> Iterator[list[str]]:
    """The names of what is launched inside of the block, in order, where a device's tensors are taken for a GPU's.

    What is computed there is meaningless.
    """
    names: list[str] = []

    def launcher(kernel: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: names.append(kernel.__name__)

    with monkeypatch.context() as patch, dispatch.use_impl("triton"), torch.no_grad(), _Operators(names, device):
        patch.setattr(KernelInterface, "__getitem__", launcher)
        yield names
