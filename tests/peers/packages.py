"""Peers' own tests, from an unpacked source distribution or git copy outside of the tree, as modules to build upon."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def peers_module(name: str, variable: str, module: str, stubs: dict[str, str] | None = None) -> ModuleType:
    """A module of a peer's `tests` folder, whose path an environment variable holds; without it the tests skip.

    Args:
        name: of the package that the folder becomes: `tests` is taken.
        variable: e.g. TRANSFORMERS_TESTS.
        module: the file's name without .py.
        stubs: modules that a source distribution leaves out, each with the name of an empty class in it.
    """
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no folder with {name}", allow_module_level=True)
    package = ModuleType(name)
    package.__path__ = [str(Path(folder))]
    sys.modules[name] = package
    for stub, member in (stubs or {}).items():
        if not (Path(folder) / f"{stub.replace('.', '/')}.py").is_file():
            parent, _, _ = stub.rpartition(".")
            sys.modules[f"{name}.{parent}"] = ModuleType(f"{name}.{parent}")
            empty = sys.modules[f"{name}.{stub}"] = ModuleType(f"{name}.{stub}")
            setattr(empty, member, type(member, (), {}))
    return importlib.import_module(f"{name}.{module}")
