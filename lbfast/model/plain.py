"""The one rule for reading weights past their module: only where the module is plain.

Faster paths hand a module's parameters to an op, or call it with less than its own input (packed captions, pooled
tokens alone), instead of calling it. A module that has hooks, or was wrapped, replaced, adapted, pruned, parametrized
or quantized, is more than its parameters: it is called, with the tensors that upstream's module of that name is given.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as hooks

from lbfast import dispatch
from lbfast.products import trained_linear

_KINDS: set[type] = {nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d, nn.ModuleList}
_TENSORS = {torch.Tensor, nn.Parameter, FakeTensor}  # the last while torch.export traces

_Class = TypeVar("_Class", bound=type)


def ours(kind: _Class) -> _Class:
    """Marks a class, not its subclasses, as one whose instances are plain where nothing was done to them."""
    _KINDS.add(kind)
    return kind


def plain(*modules: nn.Module) -> bool:
    """Whether these modules, each by itself, are what their class makes of their parameters, and nobody watches."""
    return not (dispatch.aten_only() or hooks._has_any_global_hook()) and all(map(_is_plain, modules))


def wholly_plain(root: nn.Module) -> bool:
    """Whether a module and all that is in it are plain: asked at every call, so without the generators of modules()."""
    pending: list[Any] = [root]
    while pending:
        module = pending.pop()
        if module is not None:
            if not _is_plain(module):
                return False
            pending.extend(module._modules.values())
    return plain()


def product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of x: where it is plain, by the library's fastest product."""
    if torch.compiler.is_compiling() or not are_linear(layer) or dispatch.autocast_dtype(x.device):
        return layer(x)
    return trained_linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]


def are_linear(*layers: nn.Module) -> bool:
    """Whether all are plain nn.Linear with a bias."""
    return all(type(layer) is nn.Linear and layer.bias is not None for layer in layers) and plain(*layers)


def _is_plain(module: Any) -> bool:
    if (
        type(module) not in _KINDS
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    ):
        return False
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in _TENSORS:
            return False
    return True
