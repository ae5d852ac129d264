"""`import lbfast` is cheap, its names are there, and imports only run downwards."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lbfast

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("triton", "av", "kaldi_native_fbank", "pyarrow", "typer", "rich", "torch.distributed", "transformers.models")
"""What `import lbfast` must not import."""


def run(program: str) -> dict:
    shown = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)


def test_import_lbfast_costs_little():
    program = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import lbfast
spent = time.perf_counter() - start
new = sorted(set(sys.modules) - before)
print(json.dumps({"seconds": spent, "new": new}))
"""
    found = run(program)
    assert found["seconds"] < 1
    assert [name for name in found["new"] if name.startswith(HEAVY)] == []
    assert "transformers" not in found["new"]


def test_the_models_import_no_media_library():
    program = """
import json, sys
from lbfast import LanguageBind, LanguageBindVideo, LanguageBindAudioConfig, transform_dict, to_device
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(run(program))
    assert not loaded & {"av", "kaldi_native_fbank", "lbfast.reference", "lbfast.kernels", "pyarrow", "typer"}


@pytest.mark.parametrize("name", lbfast.__all__)
def test_public_names(name):
    module = lbfast._WHERE.get(name)
    assert name in dir(lbfast)
    if module is not None:
        assert getattr(lbfast, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'lbfast' has no attribute 'LanguageBend'"):
        lbfast.LanguageBend  # noqa: B018


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) for every import of a file."""
    tree = ast.parse(path.read_text())
    later = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name, node not in later) for name in names)


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


PRODUCT = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "lbfast").rglob("*.py")
    if path.relative_to(ROOT).parts[1] not in ("reference", "testing.py")
)
LAYERS = {  # folder: what its files must not import
    "lbfast/ops": ("lbfast.model", "lbfast.processing", "lbfast.embedding", "lbfast.cli", "transformers"),
    "lbfast/processing": ("lbfast.embedding", "lbfast.cli", "lbfast.ops"),
    "lbfast/model": ("lbfast.embedding", "lbfast.cli", "lbfast.kernels"),
    "lbfast/embedding": ("lbfast.cli", "lbfast.kernels"),
}


@pytest.mark.parametrize("file", PRODUCT)
def test_imports_run_downwards(file):
    for module, at_once in imports(ROOT / file):
        assert not is_in(module, "lbfast.reference", "lbfast.testing", "tests", "bench"), f"{file} imports {module}"
        assert not (at_once and is_in(module, "triton", "lbfast.kernels", "av", "kaldi_native_fbank")), module
        for folder, above in LAYERS.items():
            assert not (file.startswith(f"{folder}/") and is_in(module, *above)), f"{file} imports {module}"


KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("*.py"))


@pytest.mark.parametrize("file", KERNELS)
def test_kernels_import_only_triton_torch_and_their_own(file):
    own = ("lbfast.kernels.primitives", "lbfast.kernels.configs")
    for module, _ in imports(ROOT / file):
        if is_in(module, "lbfast"):
            stem = Path(file).stem.removesuffix("_bwd")
            assert is_in(module, *own, f"lbfast.kernels.{stem}", f"lbfast.kernels.{stem}_bwd") or module in {
                "lbfast.kernels.primitives",
                "lbfast.kernels.configs",
            }, f"{file} imports {module}"
        else:
            top = module.partition(".")[0]
            assert top in ("torch", "triton") or top in sys.stdlib_module_names, f"{file} imports {module}"
