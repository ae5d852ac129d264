"""The one rule for reading weights past their module: only where the module is plain.

Faster paths hand a module's parameters to an op, or call it with less than its own input (packed captions, pooled
tokens alone), instead of calling it. A module that has hooks, or was wrapped, replaced, adapted, pruned, parametrized
or quantized, is more than its parameters: it is called, with the tensors that upstream's module of that name is given.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    return not _watched() and all(map(_is_plain, modules))


def wholly_plain(root: nn.Module) -> bool:
    """Whether a module and all that is in it are plain."""
    return plain_parts(root) is not None


def plain_parts(root: nn.Module) -> list[Any] | None:
    """`parts`, where all of them are plain. Asked at every call, so without the generators of modules()."""
    if _watched():
        return None
    found: list[Any] = [root]
    for module in found:  # which grows
        if module is not None:
            if not _is_plain(module):
                return None
            found.extend(module._modules.values())
    return found


def parts(root: nn.Module) -> list[Any]:
    """A module and all that is in it, each before what it has; None for what may be there and is not."""
    found: list[Any] = [root]
    for module in found:
        if module is not None:
            found.extend(module._modules.values())
    return found


def product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of x: where it is plain, by the library's fastest product."""
    return products((layer,), x)[0]


def products(layers: Iterable[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """The same of each of several: what is asked of all is asked once."""
    if torch.compiler.is_compiling() or dispatch.autocast_dtype(x.device) or _watched():
        return [layer(x) for layer in layers]
    return [
        trained_linear(x, layer.weight, layer.bias) if _is_linear(layer) else layer(x)  # type: ignore[arg-type]
        for layer in layers
    ]


def are_linear(*layers: nn.Module) -> bool:
    """Whether all are plain nn.Linear with a bias."""
    return all(map(_is_linear, layers)) and not _watched()


def _watched() -> bool:
    """Whether every module is to be called, whatever it is."""
    return dispatch.aten_only() or hooks._has_any_global_hook()


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer._parameters.get("bias") is not None and _is_plain(layer)


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
