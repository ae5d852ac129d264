"""`import lbfast` is cheap, and its names are there."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import lbfast

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("triton", "av", "kaldi_native_fbank", "pyarrow", "typer", "rich", "torch.distributed", "transformers.models")
"""What `import lbfast` must not import."""


def run(program: str) -> dict:
    shown = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)


@pytest.fixture(scope="module")
def imported() -> dict:
    """What `import lbfast` loads after torch, in how many seconds, and what there is once models are asked for."""
    return run("""
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import lbfast
spent = time.perf_counter() - start
new = sorted(set(sys.modules) - before)
from lbfast import LanguageBind, LanguageBindVideo, LanguageBindAudioConfig, transform_dict, to_device
print(json.dumps({"seconds": spent, "new": new, "models": sorted(sys.modules)}))
""")


def test_import_lbfast_costs_little(imported):
    assert imported["seconds"] < 1
    assert [name for name in imported["new"] if name.startswith(HEAVY)] == []
    assert "transformers" not in imported["new"]


def test_help_needs_neither_torch_nor_transformers():
    program = """
import json, sys
from lbfast.__main__ import main
sys.argv = ["lbfast", "--help"]
try:
    with open("/dev/null", "w") as sys.stdout:
        main()
except SystemExit:
    pass
sys.stdout = sys.__stdout__
print(json.dumps(sorted(sys.modules)))
"""
    assert not set(run(program)) & {"torch", "numpy", "transformers"}


def test_the_models_import_no_media_library(imported):
    unwanted = {"av", "kaldi_native_fbank", "lbfast.reference", "lbfast.kernels", "pyarrow", "typer"}
    assert not set(imported["models"]) & unwanted


@pytest.mark.parametrize("name", lbfast.__all__)
def test_public_names(name):
    module = lbfast._WHERE.get(name)
    assert name in dir(lbfast)
    if module is not None:
        assert getattr(lbfast, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", sorted((ROOT / "lbfast").rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_names_that_come_at_first_use_have_types(path):
    """A package's `__getattr__` gives Any: type checkers read what it imports for them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
        return
    for_them = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {name.asname for part in for_them for node in part.body for name in getattr(node, "names", ())}
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {"__version__"}
    package = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
    assert set(package.__all__) - imported - defined == set()
    for node in (node for part in for_them for node in part.body):
        assert isinstance(node, ast.ImportFrom)
        for name in node.names:  # what they are told is what there is
            assert name.asname == name.name and hasattr(importlib.import_module(str(node.module)), name.name), name.name


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'lbfast' has no attribute 'LanguageBend'"):
        lbfast.LanguageBend  # noqa: B018


def test_a_picture_is_embedded_without_what_only_training_needs(tmp_path):
    """transformers' models take two seconds to import, torch's compiler and SymPy one."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    program = f"""
import json, sys
from lbfast.embedding import embed_files
embed_files([{str(tmp_path / "a.png")!r}], ["lbfast-mini/image"], {str(tmp_path / "a.parquet")!r}, workers=None)
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(run(program))
    assert "lbfast.model.towers" in loaded
    assert not loaded & {"transformers.modeling_utils", "torch._dynamo", "sympy", "av"}
