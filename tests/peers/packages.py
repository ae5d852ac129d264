"""Peers' own tests, from an unpacked source distribution or git copy outside of the tree, as modules to build upon."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def peers_module(
    name: str, variable: str, module: str, stubs: dict[str, str] | None = None, folder: str = ""
) -> ModuleType:
    """A module of a peer's `tests` folder, whose path an environment variable holds; without it the tests skip.

    Args:
        name: of the package that the folder becomes: `tests` is taken.
        variable: e.g. TRANSFORMERS_TESTS.
        module: the file's name without .py.
        stubs: modules that a source distribution leaves out, each with the name of an empty class in it.
        folder: of the tests, below the path.
    """
    given = os.environ.get(variable)
    if not given:
        pytest.skip(f"{variable} names no folder with {name}", allow_module_level=True)
    where = Path(given) / folder
    package = ModuleType(name)
    package.__path__ = [str(where)]
    sys.modules[name] = package
    for stub, member in (stubs or {}).items():
        if not (where / f"{stub.replace('.', '/')}.py").is_file():
            parent, _, _ = stub.rpartition(".")
            sys.modules[f"{name}.{parent}"] = ModuleType(f"{name}.{parent}")
            empty = sys.modules[f"{name}.{stub}"] = ModuleType(f"{name}.{stub}")
            setattr(empty, member, type(member, (), {}))
    return importlib.import_module(f"{name}.{module}")


class Names(type):
    """Of classes whose attributes are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Absent(ModuleType):
    """A module of such classes."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (), {})


def stub_torchvision() -> None:
    """open_clip imports it, and timm, which imports it too; of neither anything is used in the tests here."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    sys.modules["timm"] = None  # type: ignore[assignment]
    for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc", ".datasets"):
        name = f"torchvision{name}"
        sys.modules[name] = Absent(name)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, sys.modules[name])
